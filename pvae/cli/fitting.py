"""Commands that fit: fit, resume, refit; and runs, which lists what they made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvae.cli.app import (
    DATA_DIR,
    DEVICE,
    EXPORT,
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
    tell,
)

if TYPE_CHECKING:
    from pvae.runs.run import Run

STRICT = Annotated[bool, typer.Option("--strict", help="Exit with 3 where the run finished with alerts.")]
QUIET = Annotated[bool, typer.Option("--quiet", help="No progress.")]


@app.command()
def fit(
    name: NAME,
    overrides: OVERRIDES = None,
    device: DEVICE = "auto",
    export: EXPORT = None,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    quiet: QUIET = False,
    strict: STRICT = False,
    as_json: JSON = False,
) -> None:
    """Fit an experiment and keep everything in a run directory."""
    from pvae.training.fit import fit as fit_experiment

    experiment = load_declaration(name, overrides)
    run = fit_experiment(
        experiment, run_dir=run_dir, data_dir=data_dir, device=device, export=export or (), progress=not quiet
    )
    _done(run, run_dir, data_dir, quiet=quiet, strict=strict, as_json=as_json)


@app.command()
def resume(
    run: RUN,
    overrides: OVERRIDES = None,
    allow_changes: Annotated[bool, typer.Option("--allow-changes", help="Accept an inexact continuation.")] = False,
    device: DEVICE = "auto",
    export: EXPORT = None,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    quiet: QUIET = False,
    strict: STRICT = False,
    as_json: JSON = False,
) -> None:
    """Go on where a run stopped; bit for bit on a CPU."""
    from pvae.training.fit import resume as resume_run

    opened = open_run(run, run_dir, data_dir)
    second = getattr(opened.plan, "refit", None) is not None
    if opened.status.get("state") == "finished" and not overrides and not second:
        tell(f"{opened.path} is finished (epoch {opened.status.get('epoch')}); nothing to resume", err=as_json)
        tell("to train longer: pvae resume RUN train.epochs=N --allow-changes", err=as_json)
        if export:
            tell(f"to export what is there: pvae export RUN {export[0]}", err=as_json)
        if as_json:
            emit(_facts(opened))
        _require_quiet(opened, strict)
        return
    done = resume_run(
        opened,
        *(overrides or ()),
        allow_changes=allow_changes,
        device=device,
        export=export or (),
        progress=not quiet,
    )
    _done(done, run_dir, data_dir, quiet=quiet, strict=strict, as_json=as_json)


@app.command()
def refit(
    run: RUN,
    overrides: OVERRIDES = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Draws per datum of the surgeries.")] = 1,
    rows: ROWS = None,
    device: DEVICE = "auto",
    export: EXPORT = None,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    quiet: QUIET = False,
    strict: STRICT = False,
    as_json: JSON = False,
) -> None:
    """Freeze a run and fit another prior to its codes, say latents.z.prior.kind=realnvp train.epochs=50."""
    from pvae.training.fit import refit as refit_run

    opened = open_run(run, run_dir, data_dir)
    child = refit_run(
        opened, *(overrides or ()), run_dir=run_dir, device=device, export=export or (), progress=not quiet
    )
    _compare(opened, child, rows, samples, as_json=as_json, quiet=quiet)
    _require_quiet(child, strict)


def _compare(parent: Run, child: Run, rows: int | None, samples: int, *, as_json: bool, quiet: bool) -> None:
    """Surgery before and after a second stage, on train and test; kept with the new run."""
    from pvae.analysis import Gain, gain
    from pvae.util.files import pretty, write_atomic
    from pvae.util.progress import ProgressBar

    found: dict[str, Gain] = {}
    with ProgressBar(4, "surgery", show=not quiet) as bar:
        for i, split in enumerate(("train", "test")):
            x, _ = rows_of(child, split, rows, 0)
            found[split] = gain(
                parent.pair, child.pair, x, samples, on_progress=lambda done, _, i=i: bar.update(2 * i + done, "")  # type: ignore[misc]
            )  # fmt: skip
    record = {"run": str(child.path), "parent": str(parent.path), "splits": {k: v.to_dict() for k, v in found.items()}}
    write_atomic(child.files.analysis / "refit.json", pretty(record))
    if as_json:
        emit({**_facts(child), **record})
        return
    _finished(child)
    for split, result in found.items():
        typer.echo(f"\n{split}:")
        say(result)


def _done(run: Run, run_dir: Path, data_dir: Path | None, *, quiet: bool, strict: bool, as_json: bool) -> None:
    """The last line of a fit; after a second stage also what it won."""
    name = _parent(run)
    parent = None if name is None else open_run(name, run_dir, data_dir)
    if parent is not None:
        _compare(parent, run, None, 1, as_json=as_json, quiet=quiet)
    elif as_json:
        emit(_facts(run))
    else:
        _finished(run)
    for stage in (parent, run):
        if stage is not None:
            _require_quiet(stage, strict)


def _parent(run: Run) -> str | None:
    """The run whose prior this one fits anew, if there is one."""
    name = (run.files.manifest.get("parent") or {}).get("run")
    return None if name is None else str(name)


def _facts(run: Run) -> dict[str, Any]:
    """A run for programs: where it is, how it stands, its alerts."""
    keys = ("state", "epoch", "epochs", "step", "elbo", "seconds", "skipped", "degraded")
    status = {key: run.status.get(key) for key in keys}
    return {"run": str(run.path), "name": run.name, "parent": _parent(run), **status, "alerts": run.files.alerts()}


def _finished(run: Run) -> None:
    if parent := _parent(run):
        tell(f"{run.path} (prior fitted anew; parent {parent})")
    status = run.status
    elbo = status.get("elbo")
    figure = f", best validation ELBO {elbo:.3f} nats per datum" if isinstance(elbo, float) else ""
    alerts = f"; {n} alerts, see events.jsonl" if (n := len(run.files.alerts())) else ""
    epochs = f"epoch {status.get('epoch')} of {status.get('epochs')}"
    tell(f"{run.path}: {epochs}, {status.get('seconds')} s{figure}{alerts}")


def _require_quiet(run: Run, strict: bool) -> None:
    """Under --strict, alerts are told and end the command with 3."""
    if strict and (alerts := run.files.alerts()):
        for line in alerts:
            tell(f"alert: {line}", err=True)
        raise typer.Exit(3)


@app.command()
def export(
    run: RUN,
    kind: Annotated[str, typer.Argument(help="tensorboard or mlflow (MLFLOW_TRACKING_URI says where).")],
    run_dir: RUN_DIR = RUNS,
    as_json: JSON = False,
) -> None:
    """Export a run's metrics, parameters, alerts and pictures to TensorBoard or MLflow."""
    from pvae.runs.exporters import export as export_run
    from pvae.runs.rundir import RunDirectory

    where = export_run(RunDirectory.open(run, run_dir), kind)
    if as_json:
        emit({"kind": kind, "where": where})
    else:
        tell(where)


@app.command()
def runs(run_dir: RUN_DIR = RUNS, as_json: JSON = False) -> None:
    """List runs with their state."""
    from pvae.runs.listing import list_runs

    rows = list_runs(run_dir)
    if as_json:
        emit(rows)
        return
    if not rows:
        tell(f"no runs in {run_dir}; make one with: pvae fit vae")
    for row in rows:
        elbo = f"elbo {row['elbo']:>10.3f}" if isinstance(row.get("elbo"), float) else ""
        epochs = f"{row.get('epoch') if row.get('epoch') is not None else '-'}/{row.get('epochs') or '-'}"
        tell(f"{row['state']:12} {epochs:>9}  {elbo:15}  {row['path']}")
