"""Explorer of a run: one HTML file with a map of a latent, the data behind its points, and decoded latents."""

import hashlib
import io
import json
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas
import torch
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from pvae.analysis.figures.estimate import refuse
from pvae.analysis.pages.document import document, words
from pvae.analysis.pages.plots import clouds
from pvae.analysis.pages.sections.examination import UNFIT
from pvae.analysis.samples import encode, features, running, score, traversal
from pvae.data.rows.prepare import worded
from pvae.data.split import Split
from pvae.runs.run import Run
from pvae.util import Progress, seeds, silent, write_atomic

POINTS, STEPS, COORDINATES = 20_000, 15, 10
"""Largest number of points; values of each slider; largest number of coordinates that have one."""
NUMBERS, CELLS, LEADING = 1 << 27, 1 << 20, 1 << 22
"""Largest numbers of values: of all codes, of all columns of data, of the codes that give the leading directions."""
PICTURE_BYTES, SIDE, ACROSS = 7 << 20, 48, 32
"""Largest size of all thumbnails in bytes, largest side of one in pixels, number of thumbnails beside each other."""


def explore(
    run: Run, *, split: str | Split = "test", rows: int = POINTS, latent: str | None = None, samples: int = 10,
    out: str | Path | None = None, seed: int = 0, on_progress: Progress = silent,
) -> Path:  # fmt: skip
    """Write an explorer of a run: one HTML file, which needs no network, to look around in its latents.

    It has a map of the posterior means of a latent (two coordinates, or the two leading directions), coloured by label,
    covariate, log p(x), a column of the data or a coordinate; the datum under the mouse; the rows inside a lasso, and a
    CSV of them; and E[x | z] at 15 values of the most used coordinates, and of both axes of the map together.

    Arguments:
        run: a run with its data.
        split: "train", "validation", "test" or "all", or new rows (see `Run.rows`).
        rows: number of rows, chosen at random; at most `POINTS`.
        latent: name of the latent; default: the first of real numbers, else of codes, whose embeddings are mapped.
        samples: importance samples per row for log p(x).
        out: the file; default: `analysis/explorer-SPLIT.html` in the folder of the run.
        seed: seed of the rows and samples.
        on_progress: called with (rows done, rows in all).

    Returns:
        The path of the file.

    Raises:
        DataError: the model infers no latent of single data, or codes of a hand-written pair, which have no embedding.
        DeclarationError: there is no such latent.

    Example:
        >>> from pvae.analysis.truths.example import example_run
        >>> explore(example_run(), rows=50).name
        'explorer-test.html'
    """
    part = split if isinstance(split, Split) else run.data.whole() if split == "all" else run.data.split(split)
    name, z, is_real = _mapped(run, encode.encode(run, part.rows[:1], mean=True, seed=seed), latent)
    chosen = seeds.subset(len(part), max(1, min(rows, POINTS, NUMBERS // z.shape[1])), seed)
    asked: dict[str, Any] = {"run": run, "split": part, "chosen": chosen, "seed": seed}
    display = Display(run, part, chosen)
    codes = running.RowBlocks(encode.encode, mean=True, **asked)
    scored = running.RowBlocks(score.score, samples=samples, on_progress=on_progress, **asked)
    blocks = []
    for i, at in enumerate(chosen.split(codes.size)):
        s = scored[i]
        figures = {"log p(x)": s.log_p, "log p(x | z)": s.reconstruction, "p-value": s.p_value}
        shown = {"z": _mapped(run, codes[i], name)[1], "x": display.of(running.observed_rows(part, at))}
        blocks.append(shown | {key: t for key, t in figures.items() if t is not None})
    found, side = running.joined(blocks), run.transforms.side
    z, x = found.pop("z").numpy(), found.pop("x")
    sliders, places, points = _axes(name, z)
    columns = [*_columns("coordinates", places), *_columns("row", codes.origin.columns)]
    if side and part.side:
        beside = side.to_frame(torch.stack([*part.side.values()], 1)[chosen].cpu())
        columns += _columns("covariates", {k: v for k, v in beside.items() if str(k).split("[")[0] not in side.words})
    columns += _columns("scores", {key: t.numpy() for key, t in found.items()})
    data = {"count": len(z), "columns": columns, "sliders": sliders, "data": display.told(x)}
    try:
        refuse(not is_real, "refused.no_slider", name=name)
        means = traversal.decode(run, name, torch.from_numpy(points.pop("z")).float(), seed=seed)
        data["decoded"] = {"columns": _columns("coordinates", points), "data": display.told(display.of(means))}
    except UNFIT as error:
        data["why"] = str(error)
    path = Path(out or run.files.analysis / f"explorer-{part.name}.html")
    write_atomic(path, _page(data, run=run, part=part, latent=name, count=len(z)))
    return path


def _mapped(run: Run, found: encode.Encoding, latent: str | None) -> tuple[str, Tensor, bool]:
    """Return the name of the latent, its codes `(m, D)` or their embeddings, and True if they are real numbers."""
    refuse(not found.latents, "refused.unmapped")
    real = [name for name, c in found.latents.items() if c.value.is_floating_point() and c.probs is None]
    name = running.known_name(latent or (real or [*found.latents])[0], found.latents, "explore")
    value, model = found.latents[name].value, cast(Any, run.pair.model)
    if name not in real:
        refuse(not run.pair.declared, "refused.no_embedding", name=name)
        like = next(model.parameters())
        with torch.no_grad():
            value = model.see({site.name: site for site in model.sites}[name], value.to(like.device), like)
    return name, value.flatten(1).float().cpu(), name in real


def _axes(name: str, z: np.ndarray) -> tuple[list[dict[str, Any]], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return sliders, codes `(n, D)` on the axes of the map by name, and the points that are decoded on them.

    The axes are the leading directions if D > 2, then the coordinates that vary most. Each has a slider with `STEPS`
    values over nearly all codes. The points, whose codes are "z", are those of the first two sliders together, then of
    each other slider with the rest at the mean code.
    """
    order = np.sort(np.argsort(-z.var(0), kind="stable")[:COORDINATES])
    basis, names, middle = np.eye(z.shape[1], dtype=z.dtype)[order], [f"{name}[{i}]" for i in order], z.mean(0)
    offset = np.zeros(len(order))
    if z.shape[1] > 2 and len(z) > 1:
        centre, two, _ = clouds.leading(z[:: 1 + z.size // LEADING])
        basis, names = np.vstack([two.T, basis]), ["direction 1", "direction 2", *names]
        offset = np.concatenate([centre @ two, offset])
    at = z @ basis.T - offset
    low, high = np.quantile(at, (0.005, 0.995), axis=0)
    values = np.linspace(low, high, STEPS).T
    steps = (values - at.mean(0)[:, None])[..., None] * basis[:, None]
    joint = steps[0] if len(steps) == 1 else (steps[0, :, None] + steps[1]).reshape(-1, z.shape[1])
    points = np.concatenate([joint, *steps[2:]]) + middle
    sliders = [{"name": name, "values": v} for name, v in zip(names, values.tolist(), strict=True)]
    placed = (dict(zip(names, side.T, strict=True)) for side in (at, points @ basis.T - offset))
    return sliders, next(placed), {**next(placed), "z": points}


def _columns(group: str, columns: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """Return columns for the page: numbers as float32, words as codes, int32 and -1 for none; both in base64."""
    found = []
    for name, values in columns.items():
        column = {"group": group, "name": words.legible(str(name))}
        if pandas.api.types.is_numeric_dtype(values):
            numbers = pandas.Series(values).to_numpy(np.float32, na_value=np.nan)
        else:
            levels = pandas.Categorical(values)
            numbers, column["words"] = levels.codes.astype(np.int32), [words.legible(str(w)) for w in levels.categories]
        found.append({**column, "values": b64encode(numbers.tobytes()).decode()})
    return found


class Display:
    """Form in which data of a run are shown: images as thumbnails, others as columns in the units of their source."""

    def __init__(self, run: Run, part: Split, chosen: Tensor) -> None:
        first, self.table = running.observed_rows(part, chosen[:1000]), run.transforms
        self.low, self.high = map(float, first.nan_to_num().aminmax())
        self.is_drawn = features.is_image(first.shape[1:]) and not self.table.features
        flat = first.flatten(1).nan_to_num()
        names = self.table.columns or self.table.features
        spread = flat.var(0, correction=0) if names else -(torch.arange(flat.shape[1]) % (1 + flat.numel() // CELLS))
        most = max(1, CELLS // len(chosen))
        self.kept = spread.argsort(descending=True, stable=True)[:most].sort().values.tolist()
        self.names = [*(names or map("x[{}]".format, range(flat.shape[1])))]

    def of(self, x: Tensor) -> Tensor:
        """Return data `(m, *shape)` as thumbnails `(m, 1 or 3, height, width)`, uint8, or as columns `(m, columns)`."""
        if not self.is_drawn:
            return torch.from_numpy(self.table.values(x).reshape(len(x), -1)[:, self.kept])
        grey = (x.float().nan_to_num(self.low) - self.low) / (self.high - self.low or 1.0)
        grey = (255 * grey.clamp(0, 1)).byte().reshape(len(x), -1, *x.shape[-2:])
        return _scaled(grey, min(1.0, SIDE / max(x.shape[-2:])))

    def told(self, shown: Tensor) -> dict[str, Any]:
        """Return what `of` gives for the page: columns, or sheets of thumbnails as data URIs."""
        if not self.is_drawn:
            made, known = zip([self.names[i] for i in self.kept], shown.numpy().T, strict=True), self.table.columns
            return {"columns": _columns("data", {n: worded(v, known[n]) if known else v for n, v in made})}
        while sum(map(len, sheets := [_sheet(part) for part in shown.split(ACROSS**2)])) > PICTURE_BYTES:
            shown = _scaled(shown, 0.9)
        uris = [f"data:image/webp;base64,{b64encode(sheet).decode()}" for sheet in sheets]
        return {"height": shown.shape[2], "width": shown.shape[3], "across": ACROSS, "sheets": uris}


def _scaled(images: Tensor, factor: float) -> Tensor:
    size = [max(1, int(side * factor)) for side in images.shape[2:]]
    return torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)


def _sheet(images: Tensor) -> bytes:
    """Return images `(n, 1 or 3, h, w)` in rows of `ACROSS` as one WebP."""
    n, c, h, w = images.shape
    full = torch.cat([images, images.new_zeros(-n % ACROSS, c, h, w)]).unflatten(0, (-1, ACROSS)).permute(0, 3, 1, 4, 2)
    tiled, content = full.reshape(-1, ACROSS * w, c).expand(-1, -1, 3), io.BytesIO()
    Image.fromarray(tiled.contiguous().numpy()).save(content, "webp", quality=60, method=2)
    return content.getvalue()


def _page(data: dict[str, Any], **about: Any) -> str:
    folder = Path(document.__file__).parent / "templates"
    scripts = [(folder / name).read_text(encoding="utf-8") for name in ("vendor/echarts/echarts.min.js", "explorer.js")]
    hashes = (b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    about["data"] = Markup(json.dumps(data, allow_nan=False).replace("<", "\\u003c"))
    about |= {"scripts": [*map(Markup, scripts)], "hashes": " ".join(f"'sha256-{found}'" for found in hashes)}
    return document.engine().get_template("explorer.html.j2").render(about)
