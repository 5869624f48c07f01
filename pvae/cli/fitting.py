"""Commands that fit: fit, resume, refit; and runs, which lists what they made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pvae.cli.app import (
    DATA_DIR,
    DEVICE,
    JSON,
    NAME,
    OVERRIDES,
    ROWS,
    RUN,
    RUN_DIR,
    RUNS,
    app,
    emit,
    load_declaration,
    open_run,
    rows_of,
    say,
)

if TYPE_CHECKING:
    from pvae.run import Run


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

    experiment = load_declaration(name, overrides)
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

    opened = open_run(run, run_dir, data_dir)
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

    opened = open_run(run, run_dir, data_dir)
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
            x, _ = rows_of(child, split, rows, 0)
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
    _compare(open_run(str(parent), run_dir, data_dir), run, None, 1, as_json=False, quiet=quiet)


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
