"""Commands for samples, traversals, interpolations, and the rate-distortion plane."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pvae
from pvae.cli.app import Shared, beside, command, tell
from pvae.errors import DataError, DeclarationError, instead, misdeclared
from pvae.util import write_atomic, write_together

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    import pvae.analysis.pages.plots.pictures
    from pvae.analysis.samples.running import Generated
    from pvae.runs.run import Run


@command("out", "on_fitted")
def sample(shared: Shared, run: str, n: int = 64, mean: bool = False, given: list[str] | None = None) -> None:
    """Sample z from the prior and x from the decoder; write both, and x as a picture where it is one."""
    opened = shared.open(run)
    asked = partial(pvae.analysis.sample, mean=mean, given=given_of(given), seed=shared.seed)
    found = shared.watched("sample", asked, opened, n, total=n)
    keep(shared, opened, "sample", found, _over_data(opened, "sampled"))


@command("split", "out", "on_fitted")
def traverse(
    shared: Shared, run: str, latent: str | None = None, row: int = 0, prior: bool = False, dims: str | None = None,
    steps: int = 9, span: float = 3.0, given: list[str] | None = None,
) -> None:  # fmt: skip
    """Vary one coordinate of a latent at a time, and decode each value."""
    opened, places = shared.open(run), None if dims is None else _integers("--dims", dims)
    start = _row(opened, shared.split, "--row", row)
    asked = partial(pvae.analysis.traverse, given=given_of(given), seed=shared.seed)
    found = shared.watched("traverse", asked, opened, None if prior else start, latent, places, steps, span)
    keep(shared, opened, f"traverse-{found.latent}", found, _over_data(opened, "traversed"))


@command("split", "out", "on_fitted")
def interpolate(shared: Shared, run: str, first: int, last: int, steps: int = 9) -> None:
    """Decode points on the line between the latents of two rows."""
    opened = shared.open(run)
    one, other = _row(opened, shared.split, "I", first), _row(opened, shared.split, "J", last)
    found = pvae.analysis.interpolate(opened, one, other, steps, seed=shared.seed)
    keep(shared, opened, f"interpolate-{shared.split}-{first}-{last}", found, _over_data(opened, "interpolated"))


@command("split", "rows", "on_fitted", name="rate-distortion")
def rate_distortion(shared: Shared, runs: list[str], samples: int = 1, out: Path = Path("rate-distortion")) -> None:
    """Place runs on the rate-distortion plane: KL of the latents and negative reconstruction, in nats per datum."""
    from pvae.analysis.pages.study import csv

    asked = partial(pvae.analysis.rate_distortion, split=shared.split, rows=shared.rows, samples=samples)
    found = shared.watched("rate-distortion", asked, [shared.open(run) for run in runs], seed=shared.seed)
    table, picture = beside(out, ".csv"), beside(out, ".png")
    write_together({table: csv(found.to_frame()), picture: pvae.analysis.pages.plots.base.png(found.figure())})
    files = {"csv": str(table), "png": str(picture)}
    shared.answer({**found.to_dict(), **files}, found, f"csv: {table}\npng: {picture}")


def _row(run: Run, split: str, name: str, row: int) -> Tensor:
    """Return one row of a split as a batch; `name` is the argument that gives its number."""
    misdeclared(row >= len(part := run.data.split(split)), "cli.making.row", name=name, split=split, part=part, row=row)
    return part.rows[row : row + 1]


def given_of(given: list[str] | None) -> dict[str, Any] | None:
    """Return the values of `--given` by covariate, such as `y=3` or `words=ankle boot`; None if there are none."""
    pairs = [text.partition("=") for text in given or ()]
    found = {name.strip(): _value(value.strip()) for name, _, value in pairs}
    misdeclared(len(found) < len(pairs), f"--given: expected each covariate once; got {', '.join(given or ())}.")
    return found or None


def _value(text: str) -> Any:
    """Return the number that a text is, or the numbers that it lists (`1.5,2`); else the text."""
    for kind in (int, float):
        with suppress(ValueError):
            found = [kind(part) for part in text.split(",")]
            return found if len(found) > 1 else found[0]
    return text


def _integers(option: str, text: str) -> list[int]:
    """Return the integers that an option lists, such as `0,1`."""
    with instead(ValueError, f"{option}: expected an integer, or several as in 0,1; got {text!r}.", DeclarationError):
        return [int(part) for part in text.split(",")]


def background(run: Run) -> Any:
    """Return at most 1000 training rows `(m, *shape)`, which plots show behind samples."""
    train = run.data.train
    return train.observed(train.rows[:1000]).double().numpy()


def keep(
    shared: Shared, run: Run, stem: str, found: Generated, plot: Callable[[Any], Figure | None | Mapping[str, Figure]]
) -> None:
    """Write arrays, pictures, and samples of tabular data as CSV in the table's units; print the paths of the files.

    Arguments:
        shared: values of the shared options.
        run: the run that samples come from.
        stem: name of the files in the run's analysis folder, unless `shared.out` is their path without suffix.
        found: result of a generating command.
        plot: function that draws it: a picture, pictures by name, or none.
    """
    from pvae.analysis.export.sites import safe_names
    from pvae.analysis.pages.plots.base import png
    from pvae.analysis.pages.study import csv

    path, tensors, drawn, table = shared.out or run.files.analysis / stem, found.tensors(), None, None
    written: dict[str, list[str]] = {"npz": [str(found.save(beside(path, ".npz")))], "csv": [], "png": []}
    try:
        table = run.transforms
        drawn = plot(found)
    except DataError as error:  # samples need none
        tell(f"note: no plot, without the data: {error}", err=True)
    figures = drawn if isinstance(drawn, Mapping) else {} if drawn is None else {"": drawn}
    names = safe_names({name: () for name in figures}) if len(figures) > 1 else dict.fromkeys(figures, "")
    pictures = {key: beside(path, f"-{name}.png" if name else ".png") for key, name in names.items()}
    files: dict[Path, str | bytes] = {pictures[key]: png(figure) for key, figure in figures.items()}
    if table and table.columns and (x := tensors.get("x")) is not None and x.dim() == 2:
        files[beside(path, ".csv")] = csv(table.to_frame(x))
    for target, content in files.items():
        write_atomic(target, content)
        written[target.suffix[1:]].append(str(target))
    shapes = {key: list(t.shape) for key, t in tensors.items()}
    lines = [f"{kind}: {target}" for kind, targets in written.items() for target in targets]
    shared.answer({"run": str(run.path), **written, "npz": written["npz"][0], "shapes": shapes}, "\n".join(lines))


def _over_data(run: Run, name: str) -> Callable[[Any], Figure | None]:
    """Return the function of `plots.pictures` that draws a result over training data."""
    return lambda found: getattr(pvae.analysis.pages.plots.pictures, name)(found, background(run))
