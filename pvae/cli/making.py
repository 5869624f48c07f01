"""Commands for samples, latents, reconstructions, traversals, interpolations, and the rate-distortion plane."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvae.cli.app import (
    ON_RUN,
    Mean,
    RowCount,
    RunName,
    SampleCount,
    SeedOption,
    Shared,
    SplitName,
    beside,
    chosen_rows,
    command,
)
from pvae.errors import DeclarationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure
    from torch import Tensor

    from pvae.analysis.samples.generated import Generated
    from pvae.data import Split
    from pvae.runs.run import Run


OutOption = Annotated[
    Path | None,
    typer.Option("--out", help="File to write, without suffix; COMMAND in the run's analysis folder unless said."),
]
GivenOption = Annotated[
    list[str] | None,
    typer.Option("--given", help="A covariate's value, y=3 or 'words=ankle boot', for a model conditioned on one."),
]


@command(ON_RUN)
def sample(
    shared: Shared,
    run: RunName,
    n: Annotated[int, typer.Option("-n", min=1, help="Number of samples.")] = 64,
    mean: Mean = False,
    given: GivenOption = None,
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Sample z from the prior and x from the decoder; write both, and x as a picture where it is one."""
    from pvae.analysis import sample as draw
    from pvae.analysis.pages import plots

    opened = shared.open(run)
    with shared.bar("sample", n) as bar:
        found = draw(opened, n, mean=mean, given=_given(given), seed=seed, on_progress=bar.report)
    _keep(shared, opened, "sample", out, found, {"": plots.sampled(found, _background(opened))})


@command(ON_RUN)
def encode(
    shared: Shared,
    run: RunName,
    split: SplitName = "test",
    rows: RowCount = None,
    mean: Annotated[bool, typer.Option("--mean", help="Centres of q(z | x) in place of samples.")] = False,
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Encode the rows of a split: write their latents, and plot each latent beside samples from its prior."""
    from pvae.analysis import encode as find_codes
    from pvae.analysis import sample as draw
    from pvae.analysis.pages import plots

    opened = shared.open(run)
    part, chosen = opened.data.split(split), chosen_rows(opened, split, rows, seed)
    with shared.bar("encode", len(chosen)) as bar:
        found = find_codes(opened, part.rows[chosen], mean=mean, seed=seed, on_progress=bar.report)
    more = {"row": chosen} if part.y is None else {"row": chosen, "label": part.y[chosen]}
    labels = None if part.y is None else part.y[chosen].numpy()
    planes = plots.encoded(found, draw(opened, 1000, seed=seed), labels, opened.data.label_names)
    _keep(shared, opened, f"encode-{split}", out, found, planes, **more)


@command(ON_RUN)
def reconstruct(
    shared: Shared,
    run: RunName,
    split: SplitName = "test",
    rows: RowCount = None,
    draw: Annotated[bool, typer.Option("--draw", help="Samples of p(x | z) in place of its means.")] = False,
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Encode a split's rows and decode them again, with log p(x | z) of each."""
    from pvae.analysis import reconstruct as decode_again
    from pvae.analysis.pages import plots

    opened = shared.open(run)
    part, chosen = opened.data.split(split), chosen_rows(opened, split, rows, seed)
    with shared.bar("reconstruct", len(chosen)) as bar:
        found = decode_again(opened, part.rows[chosen], mean=not draw, seed=seed, on_progress=bar.report)
    picture = plots.reconstructed(found, part.observed(part.rows[chosen]).double().numpy(), _background(opened))
    _keep(shared, opened, f"reconstruct-{split}", out, found, {"": picture}, row=chosen)


@command(ON_RUN)
def traverse(
    shared: Shared,
    run: RunName,
    latent: Annotated[str | None, typer.Option("--latent", help="The latent; the guide's first unless said.")] = None,
    split: SplitName = "test",
    row: Annotated[int, typer.Option("--row", min=0, help="Start from the code of this row of the split.")] = 0,
    prior: Annotated[bool, typer.Option("--prior", help="Start from the prior's mean instead.")] = False,
    dims: Annotated[
        str | None, typer.Option("--dims", help="Coordinates, 0,1; the ten with most KL unless said.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Values of each coordinate.")] = 9,
    span: Annotated[float, typer.Option("--span", help="Range, in standard deviations of the prior.")] = 3.0,
    given: GivenOption = None,
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Vary one coordinate of a latent at a time, and decode each value."""
    from pvae.analysis import traverse as move
    from pvae.analysis.pages import plots

    opened, places = shared.open(run), None if dims is None else _integers("--dims", dims)
    part = opened.data.split(split)
    _require_row("--row", row, part, split)
    start = None if prior else part.rows[row : row + 1]
    with shared.bar("traverse") as bar:
        found = move(
            opened, start, latent, places, steps, span, given=_given(given), seed=seed,
            on_progress=bar.report,
        )  # fmt: skip
    picture = plots.traversed(found, _background(opened))
    _keep(shared, opened, f"traverse-{found.latent}", out, found, {"": picture})


@command(ON_RUN)
def interpolate(
    shared: Shared,
    run: RunName,
    first: Annotated[int, typer.Argument(min=0, help="A row of the split.", metavar="I")],
    last: Annotated[int, typer.Argument(min=0, help="Another row of the split.", metavar="J")],
    split: SplitName = "test",
    steps: Annotated[int, typer.Option("--steps", min=2, help="Points on the line, both ends included.")] = 9,
    seed: SeedOption = 0,
    out: OutOption = None,
) -> None:
    """Decode points on the line between the latents of two rows."""
    from pvae.analysis import interpolate as walk
    from pvae.analysis.pages import plots

    opened = shared.open(run)
    part = opened.data.split(split)
    for name, row in (("I", first), ("J", last)):
        _require_row(name, row, part, split)
    found = walk(opened, part.rows[first : first + 1], part.rows[last : last + 1], steps, seed=seed)
    picture = plots.interpolated(found, _background(opened))
    _keep(shared, opened, f"interpolate-{split}-{first}-{last}", out, found, {"": picture})


@command(ON_RUN, name="rate-distortion")
def rate_distortion(
    shared: Shared,
    runs: Annotated[
        list[str], typer.Argument(help="Runs on the same data, each as for other commands.", metavar="RUN...")
    ],
    split: SplitName = "test",
    rows: RowCount = None,
    samples: SampleCount = 1,
    seed: SeedOption = 0,
    out: Annotated[Path, typer.Option("--out", help="File to write, without suffix: a CSV and a picture.")] = Path(
        "rate-distortion"
    ),
) -> None:
    """Place runs on the rate-distortion plane: KL of the latents and negative reconstruction, in nats per datum."""
    from pvae.analysis import rate_distortion as measure
    from pvae.analysis.figures.table import cell
    from pvae.analysis.pages import plots
    from pvae.util.files import write_atomic

    opened = [shared.open(run) for run in runs]
    with shared.bar("rate-distortion") as bar:
        found = measure(opened, split, rows, samples, seed, on_progress=bar.report)
    table, picture = beside(out, ".csv"), beside(out, ".png")
    write_atomic(table, found.to_frame().map(cell).to_csv(index=False))
    write_atomic(picture, plots.png(found.figure()))
    shared.answer({**found.to_dict(), "csv": str(table), "png": str(picture)}, found)
    shared.tell(f"csv: {table}\npng: {picture}")


def _require_row(name: str, row: int, part: Split, split: str) -> None:
    if row >= len(part):
        raise DeclarationError(f"{name}: expected a row of {split}, 0 .. {len(part) - 1}; got {row}.")


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


def _background(run: Run) -> Any:
    """Return at most 1000 training rows `(m, *shape)`, which plots show behind samples."""
    train = run.data.train
    return train.observed(train.rows[:1000]).double().numpy()


def _as_table(run: Run, path: Path, found: Generated) -> list[Path]:
    """Write samples of tabular data as CSV, in the words and units of the table, and return the paths written.

    Nothing is written for other data.
    """
    from pvae.analysis.figures.table import cell
    from pvae.util.files import write_atomic

    table, x = run.data.table, found.tensors().get("x")
    if table is None or x is None or x.dim() != 2:
        return []
    target = beside(path, ".csv")
    write_atomic(target, table.to_frame(x).rename(columns=cell).map(cell).to_csv(index=False))
    return [target]


def _keep(
    shared: Shared,
    run: Run,
    stem: str,
    out: Path | None,
    found: Generated,
    made: Mapping[str, Figure | None],
    **more: Tensor,
) -> None:
    """Write the arrays, pictures and tables of a generating command, and print their paths."""
    from pvae.analysis.export.names import safe_names
    from pvae.analysis.pages import plots
    from pvae.util.files import write_atomic

    path = out or run.files.analysis / stem
    arrays = found.save(beside(path, ".npz"), **more)
    figures = {name: figure for name, figure in made.items() if figure is not None}
    names = safe_names({name: () for name in figures}) if len(figures) > 1 else dict.fromkeys(figures, "")
    pictures = [beside(path, f"-{name}.png" if name else ".png") for name in names.values()]
    for target, figure in zip(pictures, figures.values(), strict=True):
        write_atomic(target, plots.png(figure))
    tables = _as_table(run, path, found)
    shapes = {key: list(t.shape) for key, t in {**found.tensors(), **more}.items()}
    written = {"npz": str(arrays), "png": [str(p) for p in pictures], "csv": [str(p) for p in tables]}
    lines = [f"npz: {arrays}", *(f"csv: {p}" for p in tables), *(f"png: {p}" for p in pictures)]
    shared.answer({"run": str(run.path), **written, "shapes": shapes}, "\n".join(lines))
