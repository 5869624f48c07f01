"""The command line: thin over the Python interface; heavy imports happen inside the commands that need them."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvae import __version__
from pvae.errors import DeclarationError, PvaeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure
    from torch import Tensor

    from pvae.analysis.generate import Generated
    from pvae.run import Run
    from pvae.spec import Experiment

app = typer.Typer(
    name="pvae",
    help="Declare a latent-variable model, fit it by SVI, see where every nat of its ELBO goes.",
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
JSON = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
SPLIT = Annotated[str, typer.Option("--split", help="train, validation or test.")]
ROWS = Annotated[int | None, typer.Option("--rows", min=1, help="Use this many rows, drawn at random by the seed.")]
SEED = Annotated[int, typer.Option("--seed", help="Seed of the draws.")]
RUNS = Path("runs")


def emit(data: Any) -> None:
    """JSON on standard output."""
    typer.echo(json.dumps(data, indent=2, allow_nan=False))


def say(renderable: Any) -> None:
    """Something rich can draw, on standard output; wide when it is not a terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 120).print(renderable)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"pvae {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    plugins: Annotated[list[str] | None, typer.Option("--import", help="Import a module that defines kinds.")] = None,
) -> None:
    if plugins:
        from pvae.component import load_plugins

        sys.path.insert(0, os.getcwd())
        load_plugins(tuple(plugins))


def _load(name: str, overrides: list[str] | None) -> Experiment:
    from pvae.component import load_plugins
    from pvae.spec import Experiment

    load_plugins(report=lambda line: typer.echo(line, err=True))
    return Experiment.load(name, overrides or ())


def _run(run: str, run_dir: Path, data_dir: Path | None) -> Run:
    from pvae.component import load_plugins
    from pvae.run import Run

    load_plugins(report=lambda line: typer.echo(line, err=True))
    return Run.load(run, root=run_dir, data_dir=data_dir)


# ---------------------------------------------------------------------- declarations


@app.command("list")
def list_zoo(as_json: JSON = False) -> None:
    """Show the zoo: one declared file for every system."""
    from pvae import zoo

    entries = zoo.entries()
    if as_json:
        emit([{"name": name, "description": text} for name, text in entries])
        return
    width = max(len(name) for name, _ in entries)
    for name, text in entries:
        typer.echo(f"{name:{width}}  {text}")


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Name of the experiment; writes NAME.toml.")],
    like: Annotated[str | None, typer.Option("--like", help="Zoo entry to start from (vae unless said).")] = None,
) -> None:
    """Write a starter file."""
    from pvae import zoo
    from pvae.rundir import slug

    if "/" in name or "\\" in name:
        raise DeclarationError(f"{name}: expected a name, not a path; the file is written here.")
    path = Path(f"{slug(name)}.toml")
    if path.exists():
        raise DeclarationError(f"{path}: expected a new name; a file of this name is there already.")
    lines = zoo.find(like or (name if name in zoo.names() else "vae")).read_text().splitlines()
    body = [line for line in lines if not line.startswith("name =")]
    head = ["#:schema pvae.schema.json", f"name = {json.dumps(name, ensure_ascii=False)}"]
    path.write_text("\n".join([*head, *body, ""]))
    typer.echo(f"wrote {path}; check it with: pvae check {path}")
    typer.echo("for completion in an editor: pvae schema > pvae.schema.json")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a declaration, for editors."""
    from pvae.spec import Experiment

    typer.echo(Experiment.schema_json())


@app.command()
def check(
    file: NAME,
    overrides: OVERRIDES = None,
    build: Annotated[bool, typer.Option("--build", help="Also load data, build, and take one loss.")] = False,
    data_dir: DATA_DIR = None,
) -> None:
    """Check a declaration; with --build also its data, shapes and one ELBO on a tiny batch."""
    experiment = _load(file, overrides)
    if not build:
        typer.echo(f"{file}: ok")
        return
    from pvae.data import load
    from pvae.trainer import evaluate

    data = experiment.conditioned(load(experiment.data, data_dir=data_dir, seed=experiment.seed))
    data.require_support(experiment.decoder.support, experiment.decoder.likelihood.hint)
    pair = experiment.build(data.shape)
    rows = data.train.x[:4]
    problems = pair.check(rows)
    if problems:
        raise DeclarationError([f"{file}: {problem}" for problem in problems])
    measured = experiment.objective.measure(pair, rows, experiment.seed)
    if measured is None:
        elbo = evaluate(pair, rows, experiment.seed)["elbo"]
        said = f"ELBO of {len(rows)} rows before training {elbo:.2f} nats per datum"
    else:
        said = f"critic's loss of {len(rows)} rows before training {measured['critic_loss']:.2f} nats; no likelihood"
    count = sum(p.numel() for p in pair.parameters())
    typer.echo(f"{file}: ok; x {list(data.shape)}, {len(data.train)} training rows, {count:,} parameters, {said}")


@app.command()
def show(file: NAME, overrides: OVERRIDES = None, data_dir: DATA_DIR = None) -> None:
    """Read a declaration back: graph, formulas, shapes, parameter counts."""
    from pvae.data import load
    from pvae.show import render

    experiment = _load(file, overrides)
    data = load(experiment.data, data_dir=data_dir, seed=experiment.seed)
    say(render(experiment, data.shape, experiment.build(data.shape)))


# ---------------------------------------------------------------------- fitting


@app.command()
def fit(
    name: NAME,
    overrides: OVERRIDES = None,
    device: DEVICE = "auto",
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Fit an experiment and keep everything in a run directory."""
    from pvae.svi import fit as fit_experiment

    experiment = _load(name, overrides)
    run = fit_experiment(experiment, run_dir=run_dir, data_dir=data_dir, device=device, progress=not quiet)
    _done(run, run_dir, data_dir, quiet=quiet)


@app.command()
def resume(
    run: RUN,
    overrides: OVERRIDES = None,
    allow_changes: Annotated[bool, typer.Option("--allow-changes", help="Accept an inexact continuation.")] = False,
    device: DEVICE = "auto",
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Go on where a run stopped; bit for bit on a CPU."""
    from pvae.svi import resume as resume_run

    opened = _run(run, run_dir, data_dir)
    second = getattr(opened.plan, "refit", None) is not None
    if opened.status.get("state") == "finished" and not overrides and not second:
        typer.echo(f"{opened.path} is finished (epoch {opened.status.get('epoch')}); nothing to resume")
        typer.echo("to train longer: pvae resume RUN train.epochs=N --allow-changes")
        return
    done = resume_run(opened, *(overrides or ()), allow_changes=allow_changes, device=device, progress=not quiet)
    _done(done, run_dir, data_dir, quiet=quiet)


@app.command()
def refit(
    run: RUN,
    overrides: OVERRIDES = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Draws per datum of the surgeries.")] = 1,
    rows: ROWS = None,
    device: DEVICE = "auto",
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: JSON = False,
) -> None:
    """Freeze a run and fit another prior to its codes, say latents.z.prior.kind=realnvp train.epochs=50."""
    from pvae.svi import refit as refit_run

    opened = _run(run, run_dir, data_dir)
    quiet = quiet or as_json
    child = refit_run(opened, *(overrides or ()), run_dir=run_dir, device=device, progress=not quiet)
    _compare(opened, child, rows, samples, as_json=as_json, quiet=quiet)


def _compare(parent: Run, child: Run, rows: int | None, samples: int, *, as_json: bool, quiet: bool) -> None:
    """Surgery before and after a second stage, on train and test; kept with the new run."""
    from pvae.analysis import Gain, gain
    from pvae.files import pretty, write_atomic
    from pvae.progress import Progress

    found: dict[str, Gain] = {}
    with Progress(4, "surgery", show=not quiet) as bar:
        for i, split in enumerate(("train", "test")):
            x, _ = _rows(child, split, rows, 0)
            found[split] = gain(
                parent.pair, child.pair, x, samples, on_progress=lambda done, _, i=i: bar.update(2 * i + done, "")  # type: ignore[misc]
            )  # fmt: skip
    record = {"run": str(child.path), "parent": str(parent.path), "splits": {k: v.to_dict() for k, v in found.items()}}
    write_atomic(child.files.analysis / "refit.json", pretty(record))
    if as_json:
        emit(record)
        return
    _finished(child)
    for split, result in found.items():
        typer.echo(f"\n{split}:")
        say(result)


def _done(run: Run, run_dir: Path, data_dir: Path | None, *, quiet: bool) -> None:
    """The last line of a fit; after a second stage also what it won."""
    parent = (run.files.manifest.get("parent") or {}).get("run")
    if parent is None:
        _finished(run)
        return
    _compare(_run(str(parent), run_dir, data_dir), run, None, 1, as_json=False, quiet=quiet)


def _finished(run: Run) -> None:
    parent = (run.files.manifest.get("parent") or {}).get("run")
    if parent:
        typer.echo(f"{run.path} (prior fitted anew; parent {parent})")
    status = run.status
    elbo = status.get("elbo")
    figure = f", best validation ELBO {elbo:.3f} nats per datum" if isinstance(elbo, float) else ""
    typer.echo(f"{run.path}: epoch {status.get('epoch')} of {status.get('epochs')}, {status.get('seconds')} s{figure}")


@app.command()
def runs(run_dir: RUN_DIR = RUNS, as_json: JSON = False) -> None:
    """List runs with their state."""
    from pvae.listing import list_runs

    rows = list_runs(run_dir)
    if as_json:
        emit(rows)
        return
    if not rows:
        typer.echo(f"no runs in {run_dir}; make one with: pvae fit vae")
    for row in rows:
        elbo = f"elbo {row['elbo']:>10.3f}" if isinstance(row.get("elbo"), float) else ""
        epochs = f"{row.get('epoch') if row.get('epoch') is not None else '-'}/{row.get('epochs') or '-'}"
        typer.echo(f"{row['state']:12} {epochs:>9}  {elbo:15}  {row['path']}")


# ---------------------------------------------------------------------- analysis


def _rows(run: Run, split: str, rows: int | None, seed: int) -> tuple[Tensor, Tensor | None]:
    """x and labels of a split, or of `rows` of its rows."""
    from pvae import seeds

    part = run.data.split(split)
    chosen = seeds.subset(len(part), rows, seed)
    return part.x[chosen], None if part.y is None else part.y[chosen]


@app.command()
def surgery(
    run: RUN,
    split: Annotated[str, typer.Option("--split", help="train, validation, test; both: train and test.")] = "test",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Draws per datum.")] = 1,
    rows: ROWS = None,
    components: Annotated[
        int | None, typer.Option("--components", min=2, help="Rows behind q_agg, at random; I_q gets two bounds.")
    ] = None,
    by_class: Annotated[bool, typer.Option("--by-class", help="Also one row for each label.")] = False,
    seed: SEED = 0,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Take the ELBO apart: reconstruction, mutual information, marginal KL, and what a better prior can win."""
    from pvae.analysis import surgery as take_apart
    from pvae.analysis.anatomy import Surgery, class_table, side_by_side
    from pvae.progress import Progress

    opened = _run(run, run_dir, data_dir)
    names = ("train", "test") if split == "both" else (split,)
    found: dict[str, Surgery] = {}
    train = None
    with Progress(samples * len(names), "surgery", show=not as_json) as bar:
        for i, name in enumerate(names):
            x, labels = _rows(opened, name, rows, seed)
            found[name] = take_apart(
                opened.pair, x, samples=samples, seed=seed, labels=labels, train=train, components=components,
                on_progress=lambda done, _, i=i: bar.update(i * samples + done, ""),  # type: ignore[misc]
            )  # fmt: skip
            train = x
    if as_json and split != "both":
        emit({"run": str(opened.path), "split": split, **found[split].to_dict()})
        return
    if as_json:
        emit({"run": str(opened.path), "splits": {name: s.to_dict() for name, s in found.items()}})
        return
    say(side_by_side(found) if split == "both" else found[split])
    for name, s in found.items() if by_class else ():
        say(class_table(s, name, opened.data.label_names) if s.classes else f"{name} has no labels")


METHODS = ("iwae", "prior", "ais", "bracket")


@app.command()
def evidence(
    run: RUN,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="iwae: importance samples of the guide; prior: of the prior; ais: annealed; bracket: annealed both "
            "ways on simulated data.",
        ),
    ] = "iwae",
    split: SPLIT = "test",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Importance samples per datum.")] = 5000,
    temperatures: Annotated[int, typer.Option("--temperatures", min=1, help="Of ais and bracket.")] = 200,
    chains: Annotated[int, typer.Option("--chains", min=1, help="Of ais and bracket, per datum.")] = 16,
    rows: ROWS = None,
    seed: SEED = 0,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Bound log p(x) from below by importance samples (IWAE), or by annealing."""
    from pvae import analysis
    from pvae.progress import Progress

    if method not in METHODS:
        raise DeclarationError(f"--method: expected one of {', '.join(METHODS)}; got {method!r}.")
    opened = _run(run, run_dir, data_dir)
    x, _ = _rows(opened, split, rows, seed)
    with Progress(100, method, show=not as_json) as bar:
        common = {"seed": seed, "on_progress": lambda done, total: bar.update(100 * done // total, "")}
        anneal = {"temperatures": temperatures, "chains": chains, **common}
        result: Any
        if method in ("iwae", "prior"):
            bound = analysis.evidence if method == "iwae" else analysis.prior_evidence
            result = bound(opened.pair, x, samples=samples, **common)  # type: ignore[arg-type]
        elif method == "ais":
            result = analysis.ais(opened.pair, x, **anneal)  # type: ignore[arg-type]
        else:
            result = analysis.bracket(opened.pair, x, rows=min(rows or 100, len(x)), **anneal)  # type: ignore[arg-type]
    if as_json:
        emit({"run": str(opened.path), "split": split, "method": method, **result.to_dict()})
    else:
        say(result)


@app.command()
def gap(
    run: RUN,
    split: SPLIT = "test",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of the refinement of q, for every datum.")] = 300,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Use this many rows, drawn at random by the seed.")] = 200,
    seed: SEED = 0,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Split log p(x) - ELBO: what a richer guide would win, and what a better encoder would."""
    from pvae.analysis import gap as split_gap
    from pvae.progress import Progress

    opened = _run(run, run_dir, data_dir)
    x, _ = _rows(opened, split, rows, seed)
    with Progress(100, "gap", show=not as_json) as bar:
        result = split_gap(
            opened.pair, x, steps=steps, seed=seed, on_progress=lambda done, total: bar.update(100 * done // total, "")
        )
    if as_json:
        emit({"run": str(opened.path), "split": split, **result.to_dict()})
    else:
        say(result)


@app.command("two-sample")
def two_sample(
    run: RUN,
    split: SPLIT = "test",
    rows: ROWS = None,
    mean: Annotated[bool, typer.Option("--mean", help="Means of p(x | z), without the likelihood's noise.")] = False,
    neighbours: Annotated[int, typer.Option("-k", min=1, help="Which neighbour the balls of precision reach.")] = 5,
    seed: SEED = 0,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Compare samples with data: can a classifier tell them apart, and what of the data do they reach?"""
    from pvae.analysis.two_sample import STEPS, compare
    from pvae.progress import Progress

    opened = _run(run, run_dir, data_dir)
    with Progress(len(STEPS), "two-sample", show=not as_json) as bar:
        found = compare(
            opened, split, rows, seed, mean=mean, k=neighbours, on_progress=lambda done, _, what: bar.update(done, what)
        )
    if as_json:
        emit({"run": str(opened.path), **found.to_dict()})
    else:
        say(found)


@app.command()
def critic(
    run: RUN,
    split: SPLIT = "train",
    rows: ROWS = None,
    seed: SEED = 0,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Estimate KL(q_agg || p) from draws alone: also where the code is a point, and no density is known."""
    from pvae.analysis import critic as estimate
    from pvae.progress import Progress

    opened = _run(run, run_dir, data_dir)
    x, _ = _rows(opened, split, rows, seed)
    with Progress(100, "critic", show=not as_json) as bar:
        found = estimate(opened, x, seed, on_progress=lambda done, total: bar.update(100 * done // total, ""))
    if as_json:
        emit({"run": str(opened.path), "split": split, **found.to_dict()})
    else:
        say(found)


@app.command()
def counterexamples(
    data: Annotated[str, typer.Option("--data", help="digits, fashion_mnist, mnist.")] = "digits",
    out: Annotated[Path | None, typer.Option("--out", help="Also write a CSV: its path without suffix.")] = None,
    seed: SEED = 0,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Show that samples and likelihood say little of each other: two textbook models on real data."""
    from pvae.analysis import counterexamples as study
    from pvae.data import load
    from pvae.data.declared import Data
    from pvae.files import write_atomic
    from pvae.progress import Progress

    known = [name for name in ("digits", "fashion_mnist", "mnist") if name in Data.members]
    if data not in known:
        raise DeclarationError(f"--data: expected one of {', '.join(known)}; got {data!r}.")
    with Progress(100, "counterexamples", show=not as_json) as bar:
        found = study(
            load(Data.parse(data), data_dir=data_dir), seed,
            on_progress=lambda done, total, what: bar.update(100 * done // total, what),
        )  # fmt: skip
    if out is not None:
        write_atomic(_beside(out, ".csv"), found.models().round(4).to_csv())
    if as_json:
        emit(found.to_dict())
    else:
        say(found)


@app.command()
def selfcheck(device: DEVICE = "auto", seed: SEED = 0, as_json: JSON = False) -> None:
    """Measure models whose every figure is known exactly: are surgery, evidence and gaps right on this machine?"""
    from pvae.analysis.selfcheck import selfcheck as measure
    from pvae.progress import Progress
    from pvae.svi import pick_device

    with Progress(100, "selfcheck", show=not as_json) as bar:
        found = measure(
            str(pick_device(device)),
            seed,
            on_progress=lambda done, total, what: bar.update(100 * done // total, what),
        )
    if as_json:
        emit(found.to_dict())
    else:
        say(found)
    if not found.ok:
        typer.echo(found.summary(), err=True)
        raise typer.Exit(1)


@app.command()
def posterior(
    run: RUN,
    split: SPLIT = "test",
    draws: Annotated[int, typer.Option("--draws", min=1, help="Draws per datum.")] = 100,
    rows: ROWS = None,
    seed: SEED = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file; analysis/posterior-SPLIT.nc unless said.")
    ] = None,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
) -> None:
    """Export draws of the guide, with densities and diagnostics, as NetCDF for ArviZ."""
    from pvae.progress import Progress

    opened = _run(run, run_dir, data_dir)
    with Progress(draws, "posterior") as bar:
        found = opened.posterior(split, draws, rows, seed, on_progress=lambda done, _: bar.update(done, ""))
    path = found.save(out or opened.files.analysis / f"posterior-{split}.nc")
    typer.echo(found.summary().to_string(float_format="{:.3f}".format, max_rows=40))
    typer.echo(f"posterior: {path}")


@app.command()
def report(run: RUN, run_dir: RUN_DIR = RUNS, data_dir: DATA_DIR = None, split: SPLIT = "test") -> None:
    """Write the report of a run: one HTML file."""
    from importlib import import_module

    from pvae.progress import Progress

    opened = _run(run, run_dir, data_dir)
    made: Any = import_module(f"pvae.analysis.{'sample_report' if opened.pair.implicit else 'report'}")
    with Progress(len(made.STEPS), "report") as bar:
        findings = made.examine(opened, split=split, on_progress=lambda done, _, what: bar.update(done, what))
    path = made.write(findings)
    say(findings.held)
    typer.echo(f"report: {path}")


# ---------------------------------------------------------------------- what a model makes


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
    from pvae.analysis import plots
    from pvae.analysis import sample as draw
    from pvae.progress import Progress

    opened = _run(run, run_dir, data_dir)
    with Progress(n, "sample", show=not as_json) as bar:
        found = draw(
            opened, n, mean=mean, given=_given(given), seed=seed, on_progress=lambda done, _: bar.update(done, "")
        )
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
    from pvae.analysis import plots
    from pvae.analysis import sample as draw
    from pvae.progress import Progress

    opened = _run(run, run_dir, data_dir)
    part, chosen = opened.data.split(split), _chosen(opened, split, rows, seed)
    with Progress(len(chosen), "encode", show=not as_json) as bar:
        found = find_codes(
            opened, part.x[chosen], mean=mean, seed=seed, on_progress=lambda done, _: bar.update(done, "")
        )
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
    from pvae.analysis import plots
    from pvae.analysis import reconstruct as decode_again
    from pvae.progress import Progress

    opened = _run(run, run_dir, data_dir)
    part, chosen = opened.data.split(split), _chosen(opened, split, rows, seed)
    with Progress(len(chosen), "reconstruct", show=not as_json) as bar:
        found = decode_again(
            opened, part.x[chosen], mean=not draw, seed=seed, on_progress=lambda done, _: bar.update(done, "")
        )
    picture = plots.reconstructed(found, part.data[chosen].double().numpy(), _background(opened))
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
    from pvae.analysis import plots
    from pvae.analysis import traverse as move
    from pvae.progress import Progress

    opened, places = _run(run, run_dir, data_dir), None if dims is None else _integers("--dims", dims)
    part = opened.data.split(split)
    if row >= len(part):
        raise DeclarationError(f"--row: expected a row of {split}, 0 .. {len(part) - 1}; got {row}.")
    start = None if prior else part.x[row : row + 1]
    with Progress(100, "traverse", show=not as_json) as bar:
        found = move(
            opened, start, latent, places, steps, span, given=_given(given), seed=seed,
            on_progress=lambda done, total: bar.update(100 * done // total, ""),
        )  # fmt: skip
    picture = plots.traversed(found, _background(opened))
    _keep(opened, f"traverse-{found.latent}", out, found, {"": picture}, as_json)


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
    from pvae.analysis import plots
    from pvae.analysis import rate_distortion as measure
    from pvae.files import write_atomic
    from pvae.progress import Progress

    opened = [_run(run, run_dir, data_dir) for run in runs]
    with Progress(100, "rate-distortion", show=not as_json) as bar:
        found = measure(
            opened, split, rows, samples, seed, on_progress=lambda done, total: bar.update(100 * done // total, "")
        )
    table, picture = _beside(out, ".csv"), _beside(out, ".png")
    write_atomic(table, found.to_frame().to_csv(index=False))
    write_atomic(picture, plots.png(found.figure()))
    if as_json:
        emit({**found.to_dict(), "csv": str(table), "png": str(picture)})
        return
    say(found)
    typer.echo(f"csv: {table}")
    typer.echo(f"png: {picture}")


def _chosen(run: Run, split: str, rows: int | None, seed: int) -> Tensor:
    """Numbers of a split's rows, `rows` of them at random or all."""
    from pvae import seeds

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
    return run.data.train.data[:1000].double().numpy()


def _beside(path: Path, suffix: str) -> Path:
    """A path with a suffix more, or in the place of .npz, .csv or .png."""
    if not path.name:
        raise DeclarationError(f"--out: expected a file's path without suffix; got {str(path)!r}.")
    name = path.stem if path.suffix in (".npz", ".csv", ".png") else path.name
    return path.with_name(name + suffix)


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
    from pvae.analysis import plots
    from pvae.analysis.groups import safe_names
    from pvae.files import write_atomic

    path = out or run.files.analysis / stem
    arrays = found.save(_beside(path, ".npz"), **more)
    figures = {name: figure for name, figure in made.items() if figure is not None}
    names = safe_names({name: () for name in figures}) if len(figures) > 1 else dict.fromkeys(figures, "")
    pictures = [_beside(path, f"-{name}.png" if name else ".png") for name in names.values()]
    for target, figure in zip(pictures, figures.values(), strict=True):
        write_atomic(target, plots.png(figure))
    if as_json:
        shapes = {key: list(t.shape) for key, t in {**found.tensors(), **more}.items()}
        emit({"run": str(run.path), "npz": str(arrays), "png": [str(p) for p in pictures], "shapes": shapes})
        return
    typer.echo(f"npz: {arrays}")
    for target in pictures:
        typer.echo(f"png: {target}")


# ---------------------------------------------------------------------- entry


def main() -> None:
    """Run the command line; every deliberate error becomes its message and its exit code."""
    try:
        code = app(standalone_mode=False)
    except PvaeError as error:
        for line in str(error).splitlines():
            print(line, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        _usage_or_bug(error)
    sys.exit(code if isinstance(code, int) else 0)


def _usage_or_bug(error: Exception) -> None:
    """Wrong usage is shown as the parser words it; anything else is a bug and keeps its traceback."""
    show_usage = getattr(error, "show", None)
    if show_usage is None:
        raise error
    show_usage()
    sys.exit(2)


if __name__ == "__main__":
    main()
