"""The parser, the options that commands share, and how they print."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvae import __version__
from pvae.errors import EXIT_CODES, DeclarationError, printable

if TYPE_CHECKING:
    from torch import Tensor

    from pvae.experiment.experiment import Experiment
    from pvae.runs.run import Run

app = typer.Typer(
    name="pvae",
    help="Declare a latent-variable model, fit it by SVI, see where every nat of its ELBO goes.",
    epilog="\b\nExit codes:\n" + "\n".join(f"{code:5} {meaning}" for code, meaning in EXIT_CODES.items()),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

NAME = Annotated[str, typer.Argument(help="A zoo name (see `pvae list`) or a TOML file.", metavar="NAME_OR_FILE")]
RUN = Annotated[str, typer.Argument(help="A run: its folder, its name (the newest), name/id, or latest.")]
OVERRIDES = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides: train.epochs=20", metavar="[KEY=VALUE]...")
]
RUN_DIR = Annotated[Path, typer.Option("--run-dir", help="Where runs are kept.", envvar="PVAE_RUN_DIR")]
DATA_DIR = Annotated[
    Path | None, typer.Option("--data-dir", help="Where to look for data first.", envvar="PVAE_DATA_DIR")
]
DEVICE = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
EXPORT = Annotated[
    list[str] | None, typer.Option("--export", help="Record it there too: tensorboard, mlflow.", metavar="KIND")
]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
SPLIT = Annotated[str, typer.Option("--split", help="train, validation or test.")]
ROWS = Annotated[int | None, typer.Option("--rows", min=1, help="Use this many rows, drawn at random by the seed.")]
SEED = Annotated[int, typer.Option("--seed", help="Seed of the draws.")]
RUNS = Path("runs")


@dataclass
class Settings:
    """What holds for every command."""

    traceback: bool = False


def emit(data: Any) -> None:
    """JSON on standard output: the only document there."""
    from pvae.util.files import pretty

    typer.echo(pretty(data), nl=False)


def tell(text: str, *, err: bool = False) -> None:
    """A line for people, which moves no cursor whatever the names in it are."""
    typer.echo(printable(text), err=err)


def say(renderable: Any) -> None:
    """Something rich can draw, on standard output; wide when it is not a terminal."""
    from rich.console import Console
    from rich.segment import Segment, Segments

    console = Console(width=None if sys.stdout.isatty() else 120)
    drawn = [Segment(printable(part.text), part.style) for part in console.render(renderable)]
    console.print(Segments(drawn), end="")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"pvae {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    plugins: Annotated[list[str] | None, typer.Option("--import", help="Import a module that defines kinds.")] = None,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised, too.")] = False,
) -> None:
    context.ensure_object(Settings).traceback = traceback
    if plugins:
        from pvae.component import load_plugins

        sys.path.insert(0, os.getcwd())
        load_plugins(tuple(plugins))


def load_declaration(name: str, overrides: list[str] | None) -> Experiment:
    """A declaration, with the kinds of installed plugins."""
    from pvae.component import load_plugins
    from pvae.experiment.experiment import Experiment

    load_plugins(report=lambda line: tell(line, err=True))
    return Experiment.load(name, overrides or ())


def open_run(run: str, run_dir: Path, data_dir: Path | None, device: str = "cpu") -> Run:
    """A run on a device, with the kinds of installed plugins."""
    from pvae.component import load_plugins
    from pvae.runs.run import Run

    load_plugins(report=lambda line: tell(line, err=True))
    opened = Run.load(run, root=run_dir, data_dir=data_dir)
    if device == "cpu":
        return opened
    from pvae.training.fit import pick_device

    return opened.to(pick_device(device))


def rows_of(run: Run, split: str, rows: int | None, seed: int) -> tuple[Tensor, Tensor | None]:
    """x and labels of a split, or of `rows` of its rows."""
    from pvae.util import seeds

    part = run.data.split(split)
    chosen = seeds.subset(len(part), rows, seed)
    return part.rows[chosen], None if part.y is None else part.y[chosen]


def beside(path: Path, suffix: str) -> Path:
    """A path with a suffix more, or in the place of .npz, .csv or .png."""
    if not path.name:
        raise DeclarationError(f"--out: expected a file's path without suffix; got {str(path)!r}.")
    name = path.stem if path.suffix in (".npz", ".csv", ".png") else path.name
    return path.with_name(name + suffix)
