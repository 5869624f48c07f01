"""Commands for samples, latents, reconstructions, traversals, interpolations, and the rate-distortion plane."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

import pvae
from pvae.cli.app import ON_FITTED, Shared, beside, command, rows_of, tell
from pvae.errors import DataError, DeclarationError
from pvae.util.files import write_atomic, write_together

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    import pvae.analysis.pages.plots.pictures
    from pvae.analysis.samples.running import Generated
    from pvae.data import Dataset
    from pvae.runs.run import Run


@command(ON_FITTED)
def sample(
    shared: Shared,
    run: str,
    n: Annotated[int, Option("-n", min=1, help="Number of samples.")] = 64,
    mean: bool = False,
    given: list[str] | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Sample z from the prior and x from the decoder; write both, and x as a picture where it is one."""
    opened = shared.open(run)
    asked = partial(pvae.analysis.sample, mean=mean, given=_given(given), seed=seed)
    found = shared.watched("sample", asked, opened, n, total=n)
    _keep(shared, opened, "sample", out, found, pvae.analysis.pages.plots.pictures.sampled)


@command(ON_FITTED)
def encode(
    shared: Shared,
    run: str,
    split: str = "test",
    rows: int | None = None,
    mean: Annotated[bool, Option("--mean", help="Centres of q(z | x) in place of samples.")] = False,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Encode the rows of a split: write their latents, and plot each latent beside samples from its prior."""
    opened = shared.open(run)
    chosen, x, y = rows_of(opened, split, rows, seed)
    found = shared.watched("encode", pvae.analysis.encode, opened, x, mean=mean, seed=seed, total=len(chosen))
    prior = pvae.analysis.sample(opened, 1000, seed=seed)
    labels, names = None if y is None else y.numpy(), opened.data.label_names
    planes = pvae.analysis.pages.plots.pictures.encoded(found, prior, labels, names)
    _keep(shared, opened, f"encode-{split}", out, found, planes, row=chosen, **({} if y is None else {"label": y}))


@command(ON_FITTED)
def reconstruct(
    shared: Shared,
    run: str,
    split: str = "test",
    rows: int | None = None,
    draw: Annotated[bool, Option("--draw", help="Samples of p(x | z) in place of its means.")] = False,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Encode a split's rows and decode them again, with log p(x | z) of each."""
    opened = shared.open(run)
    chosen, x, _ = rows_of(opened, split, rows, seed)
    rebuild, total = pvae.analysis.reconstruct, len(chosen)
    found = shared.watched("reconstruct", rebuild, opened, x, mean=not draw, seed=seed, total=total)
    seen = opened.data.split(split).observed(x).double().numpy()
    picture = pvae.analysis.pages.plots.pictures.reconstructed(found, seen, _background(opened.data))
    _keep(shared, opened, f"reconstruct-{split}", out, found, picture, row=chosen)


@command(ON_FITTED)
def traverse(
    shared: Shared,
    run: str,
    latent: Annotated[str | None, Option("--latent", help="The latent; the guide's first unless said.")] = None,
    split: str = "test",
    row: Annotated[int, Option("--row", min=0, help="Start from the code of this row of the split.")] = 0,
    prior: Annotated[bool, Option("--prior", help="Start from the prior's mean instead.")] = False,
    dims: Annotated[str | None, Option("--dims", help="Coordinates, 0,1; the ten with most KL unless said.")] = None,
    steps: Annotated[int, Option("--steps", min=1, help="Values of each coordinate.")] = 9,
    span: Annotated[float, Option("--span", help="Range, in standard deviations of the prior.")] = 3.0,
    given: list[str] | None = None,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Vary one coordinate of a latent at a time, and decode each value."""
    opened, places = shared.open(run), None if dims is None else _integers("--dims", dims)
    start = _row(opened, split, "--row", row)
    asked = partial(pvae.analysis.traverse, given=_given(given), seed=seed)
    found = shared.watched("traverse", asked, opened, None if prior else start, latent, places, steps, span)
    _keep(shared, opened, f"traverse-{found.latent}", out, found, pvae.analysis.pages.plots.pictures.traversed)


@command(ON_FITTED)
def interpolate(
    shared: Shared,
    run: str,
    first: Annotated[int, Argument(min=0, help="A row of the split.", metavar="I")],
    last: Annotated[int, Argument(min=0, help="Another row of the split.", metavar="J")],
    split: str = "test",
    steps: Annotated[int, Option("--steps", min=2, help="Points on the line, both ends included.")] = 9,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Decode points on the line between the latents of two rows."""
    opened = shared.open(run)
    one, other = _row(opened, split, "I", first), _row(opened, split, "J", last)
    found = pvae.analysis.interpolate(opened, one, other, steps, seed=seed)
    stem = f"interpolate-{split}-{first}-{last}"
    _keep(shared, opened, stem, out, found, pvae.analysis.pages.plots.pictures.interpolated)


@command(ON_FITTED, name="rate-distortion")
def rate_distortion(
    shared: Shared,
    runs: Annotated[list[str], Argument(help="Runs on the same data, each as for other commands.", metavar="RUN...")],
    split: str = "test",
    rows: int | None = None,
    samples: int = 1,
    seed: int = 0,
    out: Annotated[Path, Option("--out", help="File to write, without suffix: a CSV and a picture.")] = Path(
        "rate-distortion"
    ),
) -> None:
    """Place runs on the rate-distortion plane: KL of the latents and negative reconstruction, in nats per datum."""
    from pvae.analysis.pages.study import csv

    opened = [shared.open(run) for run in runs]
    found = shared.watched("rate-distortion", pvae.analysis.rate_distortion, opened, split, rows, samples, seed)
    table, picture = beside(out, ".csv"), beside(out, ".png")
    write_together({table: csv(found.to_frame()), picture: pvae.analysis.pages.plots.base.png(found.figure())})
    files = {"csv": str(table), "png": str(picture)}
    shared.answer({**found.to_dict(), **files}, found, f"csv: {table}\npng: {picture}")


def _row(run: Run, split: str, name: str, row: int) -> Tensor:
    """Return one row of a split as a batch; `name` is the argument that gives its number."""
    part = run.data.split(split)
    if row >= len(part):
        raise DeclarationError(f"{name}: expected a row of {split}, 0 .. {len(part) - 1}; got {row}.")
    return part.rows[row : row + 1]


def _given(given: list[str] | None) -> dict[str, int | str] | None:
    """Return the values of `--given` by covariate, such as `y=3` or `words=ankle boot`; None if there are none."""
    pairs = [text.partition("=") for text in given or ()]
    number = re.compile(r"\s*[+-]?\d+\s*")
    found = {name.strip(): int(value) if number.fullmatch(value) else value.strip() for name, _, value in pairs}
    return found or None


def _integers(option: str, text: str) -> list[int]:
    """Return the integers that an option lists, such as `0,1`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DeclarationError(f"{option}: expected an integer, or several as in 0,1; got {text!r}.") from None


def _background(data: Dataset) -> Any:
    """Return at most 1000 training rows `(m, *shape)`, which plots show behind samples."""
    train = data.train
    return train.observed(train.rows[:1000]).double().numpy()


def _keep(
    shared: Shared,
    run: Run,
    stem: str,
    out: Path | None,
    found: Generated,
    plot: Figure | None | Mapping[str, Figure] | Callable[..., Figure | None],
    **more: Tensor,
) -> None:
    """Write arrays, pictures, and samples of tabular data as CSV in the table's units; print the paths of the files.

    Arguments:
        shared: values of the shared options.
        run: the run that samples come from.
        stem: name of the files in the run's analysis folder.
        out: path of the files without suffix, in place of that.
        found: result of a generating command.
        plot: picture of it, pictures by name, or the function that draws it over training data.
        more: arrays to write beside those of the result.
    """
    from pvae.analysis.export.sites import safe_names
    from pvae.analysis.pages.study import csv

    path = out or run.files.analysis / stem
    arrays = found.save(beside(path, ".npz"), **more)
    tensors, data, tables = found.tensors(), None, []
    try:
        data = run.data
    except DataError as error:  # samples need none
        tell(f"note: no plot and no table of the samples, without the data: {error}", err=True)
    drawn = plot if not callable(plot) else plot(found, _background(data)) if data else None
    figures = drawn if isinstance(drawn, Mapping) else {} if drawn is None else {"": drawn}
    names = safe_names({name: () for name in figures}) if len(figures) > 1 else dict.fromkeys(figures, "")
    pictures = [beside(path, f"-{name}.png" if name else ".png") for name in names.values()]
    for target, figure in zip(pictures, figures.values(), strict=True):
        write_atomic(target, pvae.analysis.pages.plots.base.png(figure))
    if data is not None and data.table is not None and (x := tensors.get("x")) is not None and x.dim() == 2:
        tables = [beside(path, ".csv")]
        write_atomic(tables[0], csv(data.table.to_frame(x)))
    shapes = {key: list(t.shape) for key, t in {**tensors, **more}.items()}
    written = {"npz": str(arrays), "png": [str(p) for p in pictures], "csv": [str(p) for p in tables]}
    lines = [f"npz: {arrays}", *(f"csv: {p}" for p in tables), *(f"png: {p}" for p in pictures)]
    shared.answer({"run": str(run.path), **written, "shapes": shapes}, "\n".join(lines))
