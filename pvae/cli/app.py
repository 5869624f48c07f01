"""The parser of the command line, the options that commands share, and functions that print their results."""

from __future__ import annotations

import inspect
import os
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer
from typer import Argument, Option

import pvae
from pvae.errors import EXIT_CODES, misdeclared, printable
from pvae.util import ProgressBar, Record, replace

if TYPE_CHECKING:
    from torch import Tensor

    from pvae.data.split import Split
    from pvae.experiment.experiment import Experiment
    from pvae.runs.run import Run

T = TypeVar("T")
Told = Callable[..., None]


def _declared(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments and options that tables of `options.toml` declare, by name of the parameter."""
    arguments, options = (found.get(kind, {}).items() for kind in ("arguments", "options"))
    made = {n: Option(given.pop("flag", f"--{n.replace('_', '-')}"), **given) for n, given in options}
    return {n: Argument(**given) for n, given in arguments} | made


DECLARED = tomllib.loads((Path(__file__).parent / "options.toml").read_text(encoding="utf-8"))
CODES = "\n".join(f"{code:5} {meaning}" for code, meaning in EXIT_CODES.items())
app = typer.Typer(epilog=f"\b\nExit codes:\n{CODES}", rich_markup_mode=None, **DECLARED["app"])
OPTIONS, OWN = _declared(DECLARED), {name: _declared(found) for name, found in DECLARED["commands"].items()}
"""Arguments and options by name of the parameter: those of several commands, and those of one, by its function."""


class Shared(Record):
    """Values of the shared options in one call of a command, with methods to open runs and print results.

    `--help` lists these options in this order, after those of the command itself.
    """

    split: str = "test"
    rows: int | None = None
    seed: int = 0
    out: Path | None = None
    device: str = "cpu"
    export: list[str] | None = None
    run_dir: Path = Path("runs")
    data_dir: Path | None = None
    pair: str | None = None
    data: Path | None = None
    quiet: bool = False
    strict: bool = False
    as_json: bool = False
    as_csv: bool = False
    as_latex: bool = False

    def open(self, run: str, device: str = "cpu") -> Run:
        """Open a run on a device, after loading the components of installed plugins."""
        load_installed_plugins()
        from pvae.cli.handwritten import is_pair_file, load_arguments, load_pair, on_data

        opened: Any
        if is_pair_file(run):
            opened = on_data(run, self.data)
        elif self.pair is None:
            opened = pvae.Run.load(run, root=self.run_dir, data_dir=self.data_dir)
            if self.data is not None and opened.lacks_data:
                opened = pvae.Run.load(run, root=self.run_dir, data=self.data)
        else:
            pair = load_pair(self.pair)
            opened = pvae.Run.load(run, root=self.run_dir, pair=pair, data=load_arguments(self.data, pair))
        if device == "cpu":
            return opened
        from pvae.training.launch import pick_device

        return opened.to(pick_device(device))

    def open_rows(self, run: str) -> tuple[Run, Split]:
        """Open a run, with the rows that it is applied to: new ones of `--data`, those of a split, or "all"."""
        from pvae.cli.handwritten import is_pair_file

        if self.data and not self.pair and not is_pair_file(run):
            opened = replace(self, data=None).open(run, self.device)
            return opened, opened.rows(self.data)
        opened = self.open(run, self.device)
        return opened, opened.data.whole() if self.split == "all" else opened.data.split(self.split)

    def open_as_it_is(self, text: str) -> Run:
        """Return a new run that holds a hand-written pair with its present weights, for a page on it."""
        from pvae.cli.handwritten import load_arguments, load_pair
        from pvae.training.fit import kept_as_it_is

        pair = load_pair(text)
        pair.origin = f"--pair {text} --data {self.data}"
        return kept_as_it_is(pair, load_arguments(self.data, pair), self.run_dir)

    def measure(self, run: str, label: str, measure: Callable[..., Any], total: int = 100, **facts: str) -> None:
        """Open a run on the device of `--device`, measure something under a progress bar, and print what is found.

        Arguments:
            run: the run, as for `open`.
            label: name of the measurement on the progress bar.
            measure: function of the run and the callback `on_progress`, whose result has a `to_dict`.
            total: units of work of the progress bar.
            facts: entries of the JSON between the run and the result.
        """
        opened = self.open(run, self.device)
        found = self.watched(label, measure, opened, total=total)
        self.answer({"run": str(opened.path), **facts, **found.to_dict()}, found)

    def fitting(self) -> dict[str, Any]:
        """Return the options of a fit as arguments of `pvae.fit`, `resume` and `refit`."""
        return {"device": self.device, "export": self.export or (), "progress": not self.quiet}

    def bar(self, label: str, total: int = 100) -> ProgressBar:
        """Make the progress bar of an analysis; it stays silent under `--json`."""
        return ProgressBar(total, label, show=not self.as_json)

    def watched(self, label: str, work: Callable[..., T], *given: Any, total: int = 100, **named: Any) -> T:
        """Return the result of a function of these arguments and `on_progress`, called under a progress bar."""
        with self.bar(label, total) as bar:
            return work(*given, **named, on_progress=bar.report)

    def answer(self, data: Any, *shown: Any, columns: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Print `data` as JSON under `--json`, else what is `shown`: texts, and objects that rich can draw.

        Under `--csv` and `--latex` print `columns`, figures by term of each run or split.
        """
        if self.as_json:
            from pvae.util import pretty

            typer.echo(pretty(data), nl=False)  # standard output then holds nothing else
            return
        if columns is not None and (self.as_csv or self.as_latex):
            from pvae.analysis.figures import paper

            typer.echo((paper.csv if self.as_csv else paper.latex)(columns), nl=False)
            return
        for part in shown:
            (tell if isinstance(part, str) else say)(part)


def command(*options: str, name: str | None = None, device: str = "cpu") -> Callable[[Told], Told]:
    """Register a function `f(shared, ...)` as a command that also takes some of the shared options.

    Arguments:
        options: names of fields of `Shared`, or of groups of them in `options.toml`; the function gets their values in
            one `Shared`.
        name: name of the command; that of the function unless given.
        device: default value of the option `--device`.
    """
    defaults, types, groups = Shared(device=device), get_type_hints(Shared), DECLARED["groups"]
    chosen = {key for each in options for key in groups.get(each, [each])}

    def register(function: Told) -> Told:
        @wraps(function)
        def run(**given: Any) -> None:
            shared = Shared(**{key: given.pop(key) for key in chosen})
            with _processes(name or function.__name__, shared) as is_needed:
                if is_needed:
                    function(shared, **given)

        _, *own = inspect.signature(function, eval_str=True).parameters.values()
        option = partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
        shared = [option(key, default=getattr(defaults, key), annotation=types[key]) for key in types if key in chosen]
        known = OPTIONS | OWN.get(function.__name__, {})
        parameters = [p.replace(annotation=Annotated[p.annotation, known[p.name]]) for p in (*own, *shared)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return app.command(name)(run)

    return register


@contextmanager
def _processes(name: str, shared: Shared) -> Iterator[bool]:
    """Join the processes that torchrun started, in a command that they share; False where the first one does it alone.

    All but the first are silent.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield True
        return
    from pvae.training.launch import pick_device
    from pvae.util import files, group

    if name not in DECLARED["shared_out"]:
        yield not files.follows()
        return
    with group.joined(pick_device(shared.device)), ExitStack() as stack:
        if files.follows():
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(redirect_stdout(nowhere))
            stack.enter_context(redirect_stderr(nowhere))
        yield True


def tell(text: str, *, err: bool = False) -> None:
    """Print a text for people, with control characters shown as escapes."""
    typer.echo(printable(text), err=err)


def say(renderable: Any) -> None:
    """Print an object that rich can draw; 120 columns wide where standard output is no terminal."""
    from rich.console import Console
    from rich.segment import Segment, Segments

    console = Console(width=None if sys.stdout.isatty() else 120)
    drawn = [Segment(printable(part.text), part.style) for part in console.render(renderable)]
    console.print(Segments(drawn), end="")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"pvae {pvae.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
    plugins: Annotated[list[str] | None, Option("--import", help="Import a module that defines kinds.")] = None,
    traceback: Annotated[bool, Option("--traceback", help="Show where an error was raised, too.")] = False,
) -> None:
    context.ensure_object(dict)["traceback"] = traceback
    if plugins:
        from pvae.component import load_plugins

        sys.path.append(os.getcwd())  # last: a file named like another module stands in for none
        load_plugins(tuple(plugins))


def load_installed_plugins() -> None:
    """Load the components of installed plugins; a plugin that fails to load is reported on standard error."""
    from pvae.component import load_plugins

    load_plugins(report=lambda line: tell(line, err=True))


def load_declaration(name: str, overrides: list[str] | None) -> Experiment:
    """Return the declaration of a zoo name or TOML file with overrides, after loading installed plugins."""
    load_installed_plugins()
    return pvae.Experiment.load(name, overrides or ())


def rows_of(run: Run, split: str, rows: int | None, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return rows of a split, `rows` of them chosen by the seed or all: their numbers, data, and labels (or None)."""
    from pvae.util import seeds

    part = run.data.split(split)
    chosen = seeds.subset(len(part), rows, seed)
    return chosen, part.rows[chosen], None if (y := part.labels) is None else y[chosen]


def beside(path: Path, suffix: str) -> Path:
    """Return a path with `suffix` appended, in place of .npz, .csv or .png if it ends with one of them."""
    misdeclared(not path.name, f"--out: expected a file's path without suffix; got {str(path)!r}.")
    name = path.stem if path.suffix in (".npz", ".csv", ".png") else path.name
    return path.with_name(name + suffix)
