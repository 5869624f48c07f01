"""Commands that show what a model makes: samples, codes, reconstructions, traversals, interpolations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvae.cli.app import (
    DATA_DIR,
    JSON,
    ROWS,
    RUN,
    RUN_DIR,
    RUNS,
    SEED,
    SPLIT,
    app,
    beside,
    emit,
    open_run,
    say,
    tell,
)
from pvae.errors import DeclarationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure
    from torch import Tensor

    from pvae.analysis.samples.generate import Generated
    from pvae.runs.run import Run


OUT = Annotated[
    Path | None,
    typer.Option("--out", help="What to write, without suffix; COMMAND in the run's analysis folder unless said."),
]
GIVEN = Annotated[
    list[str] | None,
    typer.Option("--given", help="A covariate's value, y=3 or 'words=ankle boot', for a model conditioned on one."),
]


@app.command()
def sample(
    run: RUN,
    n: Annotated[int, typer.Option("-n", min=1, help="Draws.")] = 64,
    mean: Annotated[bool, typer.Option("--mean", help="Means of p(x | z), without the likelihood's noise.")] = False,
    given: GIVEN = None,
    seed: SEED = 0,
    out: OUT = None,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Draw z from the prior and x from the decoder; write both, and x as a picture where it is one."""
    from pvae.analysis import sample as draw
    from pvae.analysis.pages import plots
    from pvae.util.progress import ProgressBar

    opened = open_run(run, run_dir, data_dir)
    with ProgressBar(n, "sample", show=not as_json) as bar:
        found = draw(opened, n, mean=mean, given=_given(given), seed=seed, on_progress=bar.report)
    _keep(opened, "sample", out, found, {"": plots.sampled(found, _background(opened))}, as_json)


@app.command()
def encode(
    run: RUN,
    split: SPLIT = "test",
    rows: ROWS = None,
    mean: Annotated[bool, typer.Option("--mean", help="Centres of q(z | x) in place of draws.")] = False,
    seed: SEED = 0,
    out: OUT = None,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Write the latents of a split's rows, and show each beside its prior."""
    from pvae.analysis import encode as find_codes
    from pvae.analysis import sample as draw
    from pvae.analysis.pages import plots
    from pvae.util.progress import ProgressBar

    opened = open_run(run, run_dir, data_dir)
    part, chosen = opened.data.split(split), _chosen(opened, split, rows, seed)
    with ProgressBar(len(chosen), "encode", show=not as_json) as bar:
        found = find_codes(opened, part.rows[chosen], mean=mean, seed=seed, on_progress=bar.report)
    more = {"row": chosen} if part.y is None else {"row": chosen, "label": part.y[chosen]}
    labels = None if part.y is None else part.y[chosen].numpy()
    planes = plots.encoded(found, draw(opened, 1000, seed=seed), labels, opened.data.label_names)
    _keep(opened, f"encode-{split}", out, found, planes, as_json, **more)


@app.command()
def reconstruct(
    run: RUN,
    split: SPLIT = "test",
    rows: ROWS = None,
    draw: Annotated[bool, typer.Option("--draw", help="Draws of p(x | z) in place of its means.")] = False,
    seed: SEED = 0,
    out: OUT = None,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Encode a split's rows and decode them again, with log p(x | z) of each."""
    from pvae.analysis import reconstruct as decode_again
    from pvae.analysis.pages import plots
    from pvae.util.progress import ProgressBar

    opened = open_run(run, run_dir, data_dir)
    part, chosen = opened.data.split(split), _chosen(opened, split, rows, seed)
    with ProgressBar(len(chosen), "reconstruct", show=not as_json) as bar:
        found = decode_again(opened, part.rows[chosen], mean=not draw, seed=seed, on_progress=bar.report)
    picture = plots.reconstructed(found, part.observed(part.rows[chosen]).double().numpy(), _background(opened))
    _keep(opened, f"reconstruct-{split}", out, found, {"": picture}, as_json, row=chosen)


@app.command()
def traverse(
    run: RUN,
    latent: Annotated[str | None, typer.Option("--latent", help="Which; the guide's first unless said.")] = None,
    split: SPLIT = "test",
    row: Annotated[int, typer.Option("--row", min=0, help="Start from the code of this row of the split.")] = 0,
    prior: Annotated[bool, typer.Option("--prior", help="Start from the prior's mean instead.")] = False,
    dims: Annotated[
        str | None, typer.Option("--dims", help="Coordinates, 0,1; the ten of most KL unless said.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Values of each coordinate.")] = 9,
    span: Annotated[float, typer.Option("--span", help="How far, in standard deviations of the prior.")] = 3.0,
    given: GIVEN = None,
    seed: SEED = 0,
    out: OUT = None,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Move one coordinate of a latent at a time and decode."""
    from pvae.analysis import traverse as move
    from pvae.analysis.pages import plots
    from pvae.util.progress import ProgressBar

    opened, places = open_run(run, run_dir, data_dir), None if dims is None else _integers("--dims", dims)
    part = opened.data.split(split)
    if row >= len(part):
        raise DeclarationError(f"--row: expected a row of {split}, 0 .. {len(part) - 1}; got {row}.")
    start = None if prior else part.rows[row : row + 1]
    with ProgressBar(100, "traverse", show=not as_json) as bar:
        found = move(
            opened, start, latent, places, steps, span, given=_given(given), seed=seed,
            on_progress=bar.report,
        )  # fmt: skip
    picture = plots.traversed(found, _background(opened))
    _keep(opened, f"traverse-{found.latent}", out, found, {"": picture}, as_json)


@app.command()
def interpolate(
    run: RUN,
    first: Annotated[int, typer.Argument(min=0, help="A row of the split.", metavar="I")],
    last: Annotated[int, typer.Argument(min=0, help="Another.", metavar="J")],
    split: SPLIT = "test",
    steps: Annotated[int, typer.Option("--steps", min=2, help="Points of the way, both ends among them.")] = 9,
    seed: SEED = 0,
    out: OUT = None,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Decode the line between the codes of two rows."""
    from pvae.analysis import interpolate as walk
    from pvae.analysis.pages import plots

    opened = open_run(run, run_dir, data_dir)
    part = opened.data.split(split)
    for name, row in (("I", first), ("J", last)):
        if row >= len(part):
            raise DeclarationError(f"{name}: expected a row of {split}, 0 .. {len(part) - 1}; got {row}.")
    found = walk(opened, part.rows[first : first + 1], part.rows[last : last + 1], steps, seed=seed)
    picture = plots.interpolated(found, _background(opened))
    _keep(opened, f"interpolate-{split}-{first}-{last}", out, found, {"": picture}, as_json)


@app.command("rate-distortion")
def rate_distortion(
    runs: Annotated[
        list[str], typer.Argument(help="Runs on the same data, each as for other commands.", metavar="RUN...")
    ],
    split: SPLIT = "test",
    rows: ROWS = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Draws per datum.")] = 1,
    seed: SEED = 0,
    out: Annotated[Path, typer.Option("--out", help="What to write, without suffix: a CSV and a picture.")] = Path(
        "rate-distortion"
    ),
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Put runs on one plane: what their codes cost, and what is lost by them."""
    from pvae.analysis import rate_distortion as measure
    from pvae.analysis.figures.table import cell
    from pvae.analysis.pages import plots
    from pvae.util.files import write_atomic
    from pvae.util.progress import ProgressBar

    opened = [open_run(run, run_dir, data_dir) for run in runs]
    with ProgressBar(100, "rate-distortion", show=not as_json) as bar:
        found = measure(opened, split, rows, samples, seed, on_progress=bar.report)
    table, picture = beside(out, ".csv"), beside(out, ".png")
    write_atomic(table, found.to_frame().map(cell).to_csv(index=False))
    write_atomic(picture, plots.png(found.figure()))
    if as_json:
        emit({**found.to_dict(), "csv": str(table), "png": str(picture)})
        return
    say(found)
    tell(f"csv: {table}")
    tell(f"png: {picture}")


def _chosen(run: Run, split: str, rows: int | None, seed: int) -> Tensor:
    """Numbers of a split's rows, `rows` of them at random or all."""
    from pvae.util import seeds

    return seeds.subset(len(run.data.split(split)), rows, seed)


def _given(given: list[str] | None) -> dict[str, int | str] | None:
    """`y=3` or `words=ankle boot` as a value by name; the model says which of the two it takes."""
    pairs = [text.partition("=") for text in given or ()]
    number = re.compile(r"\s*[+-]?\d+\s*")
    found = {name.strip(): int(value) if number.fullmatch(value) else value.strip() for name, _, value in pairs}
    return found or None


def _integers(option: str, text: str) -> list[int]:
    """`0,1` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise DeclarationError(f"{option}: expected an integer, or several as in 0,1; got {text!r}.") from None


def _background(run: Run) -> Any:
    """Training data `(m, *shape)` to show samples against: as numpy has them, a thousand at most."""
    train = run.data.train
    return train.observed(train.rows[:1000]).double().numpy()


def _as_table(run: Run, path: Path, found: Generated) -> list[Path]:
    """Write rows of a table in its own words and units; the path, where the data are one."""
    from pvae.analysis.figures.table import cell
    from pvae.util.files import write_atomic

    table, x = run.data.table, found.tensors().get("x")
    if table is None or x is None or x.dim() != 2:
        return []
    target = beside(path, ".csv")
    write_atomic(target, table.to_frame(x).rename(columns=cell).map(cell).to_csv(index=False))
    return [target]


def _keep(
    run: Run,
    stem: str,
    out: Path | None,
    found: Generated,
    made: Mapping[str, Figure | None],
    as_json: bool,
    **more: Tensor,
) -> None:
    """Write arrays and pictures, and say where they are."""
    from pvae.analysis.export.datasets import safe_names
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
    if as_json:
        shapes = {key: list(t.shape) for key, t in {**found.tensors(), **more}.items()}
        written = {"npz": str(arrays), "png": [str(p) for p in pictures], "csv": [str(p) for p in tables]}
        emit({"run": str(run.path), **written, "shapes": shapes})
        return
    tell(f"npz: {arrays}")
    for target in tables:
        tell(f"csv: {target}")
    for target in pictures:
        tell(f"png: {target}")
