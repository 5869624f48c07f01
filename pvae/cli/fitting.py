"""Commands that fit (fit, resume, refit), and the commands export and runs, which read finished runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvae.cli.app import (
    TO_FIT,
    NameOrFile,
    Overrides,
    RowCount,
    RunName,
    Shared,
    command,
    emit,
    load_declaration,
    rows_of,
    say,
    tell,
)
from pvae.util.progress import ProgressBar

if TYPE_CHECKING:
    from pvae.runs.run import Run


@command(TO_FIT, device="auto")
def fit(shared: Shared, name: NameOrFile, overrides: Overrides = None) -> None:
    """Fit an experiment and keep everything in a run directory."""
    from pvae.training.fit import fit as fit_experiment

    experiment = load_declaration(name, overrides)
    run = fit_experiment(
        experiment,
        run_dir=shared.run_dir,
        data_dir=shared.data_dir,
        device=shared.device,
        export=shared.export or (),
        progress=not shared.quiet,
    )
    _finish(shared, run)


@command(TO_FIT, device="auto")
def resume(
    shared: Shared,
    run: RunName,
    overrides: Overrides = None,
    allow_changes: Annotated[bool, typer.Option("--allow-changes", help="Accept an inexact continuation.")] = False,
) -> None:
    """Continue a run where it stopped, bit for bit on a CPU."""
    from pvae.training.resume import resume as resume_run

    opened = shared.open(run)
    second = getattr(opened.plan, "refit", None) is not None
    if opened.status.get("state") == "finished" and not overrides and not second:
        _nothing_to_resume(shared, opened)
        return
    done = resume_run(
        opened,
        *(overrides or ()),
        allow_changes=allow_changes,
        device=shared.device,
        export=shared.export or (),
        progress=not shared.quiet,
    )
    _finish(shared, done)


def _nothing_to_resume(shared: Shared, run: Run) -> None:
    said = shared.as_json  # then standard output holds JSON alone
    tell(f"{run.path} is finished (epoch {run.status.get('epoch')}); nothing to resume", err=said)
    tell("to train longer: pvae resume RUN train.epochs=N --allow-changes", err=said)
    if shared.export:
        tell(f"to export what is there: pvae export RUN {shared.export[0]}", err=said)
    if shared.as_json:
        emit(_facts(run))
    _require_no_alerts(shared, run)


@command(TO_FIT, device="auto")
def refit(
    shared: Shared,
    run: RunName,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples of z per datum in the surgeries.")] = 1,
    rows: RowCount = None,
) -> None:
    """Freeze a run and fit another prior to its aggregated posterior, say latents.z.prior.kind=realnvp."""
    from pvae.training.refit import refit as refit_run

    opened = shared.open(run)
    child = refit_run(
        opened,
        *(overrides or ()),
        run_dir=shared.run_dir,
        device=shared.device,
        export=shared.export or (),
        progress=not shared.quiet,
    )
    _compare(shared, opened, child, rows, samples)
    _require_no_alerts(shared, child)


def _compare(shared: Shared, parent: Run, child: Run, rows: int | None = None, samples: int = 1) -> None:
    """Print ELBO surgeries before and after a second stage, on train and test, and write them to the new run."""
    from pvae.analysis import Gain, gain
    from pvae.util.files import pretty, write_atomic

    found: dict[str, Gain] = {}
    with ProgressBar(4, "surgery", show=not shared.quiet) as bar:
        for i, split in enumerate(("train", "test")):
            x, _ = rows_of(child, split, rows, 0)
            found[split] = gain(
                parent.pair, child.pair, x, samples, on_progress=lambda done, _, i=i: bar.update(2 * i + done, "")  # type: ignore[misc]
            )  # fmt: skip
    record = {"run": str(child.path), "parent": str(parent.path), "splits": {k: v.to_dict() for k, v in found.items()}}
    write_atomic(child.files.analysis / "refit.json", pretty(record))
    if shared.as_json:
        emit({**_facts(child), **record})
        return
    tell(_summary(child))
    for split, result in found.items():
        tell(f"\n{split}:")
        say(result)


def _finish(shared: Shared, run: Run) -> None:
    """Print the summary of a fit, and the gain of a second stage; under `--strict` alerts end the command with 3."""
    name = _parent(run)
    parent = None if name is None else shared.open(name)
    if parent is not None:
        _compare(shared, parent, run)
        _require_no_alerts(shared, parent)
    else:
        shared.answer(_facts(run), _summary(run))
    _require_no_alerts(shared, run)


def _parent(run: Run) -> str | None:
    """Return the name of the run whose prior this one replaces; None unless this is a second stage."""
    name = (run.files.manifest.get("parent") or {}).get("run")
    return None if name is None else str(name)


def _facts(run: Run) -> dict[str, Any]:
    """Return folder, name, parent, state and alerts of a run, for JSON."""
    keys = ("state", "epoch", "epochs", "step", "elbo", "seconds", "skipped", "degraded")
    status = {key: run.status.get(key) for key in keys}
    return {"run": str(run.path), "name": run.name, "parent": _parent(run), **status, "alerts": run.files.alerts()}


def _summary(run: Run) -> str:
    """Return a one-line summary of a run, after a line that names its parent run if it is a second stage."""
    parent = _parent(run)
    head = f"{run.path} (prior fitted anew; parent {parent})\n" if parent else ""
    status = run.status
    elbo = status.get("elbo")
    figure = f", best validation ELBO {elbo:.3f} nats per datum" if isinstance(elbo, float) else ""
    alerts = f"; {n} alerts, see events.jsonl" if (n := len(run.files.alerts())) else ""
    epochs = f"epoch {status.get('epoch')} of {status.get('epochs')}"
    return f"{head}{run.path}: {epochs}, {status.get('seconds')} s{figure}{alerts}"


def _require_no_alerts(shared: Shared, run: Run) -> None:
    """Print the alerts of a run, if there are any, and end the command with exit code 3, under `--strict` only."""
    if shared.strict and (alerts := run.files.alerts()):
        for line in alerts:
            tell(f"alert: {line}", err=True)
        raise typer.Exit(3)


@command(["run_dir", "as_json"])
def export(
    shared: Shared,
    run: RunName,
    kind: Annotated[str, typer.Argument(help="tensorboard or mlflow (MLFLOW_TRACKING_URI says where).")],
) -> None:
    """Export a run's metrics, parameters, alerts and pictures to TensorBoard or MLflow."""
    from pvae.runs.export.exporting import export as export_run
    from pvae.runs.rundir import RunDirectory

    where = export_run(RunDirectory.open(run, shared.run_dir), kind)
    shared.answer({"kind": kind, "where": where}, where)


@command(["run_dir", "as_json"])
def runs(shared: Shared) -> None:
    """List runs with their state, epochs and best validation ELBO."""
    from pvae.runs.rundir import list_runs

    rows = list_runs(shared.run_dir)
    lines = [] if rows else [f"no runs in {shared.run_dir}; make one with: pvae fit vae"]
    for row in rows:
        elbo = f"elbo {row['elbo']:>10.3f}" if isinstance(row.get("elbo"), float) else ""
        epochs = f"{row.get('epoch') if row.get('epoch') is not None else '-'}/{row.get('epochs') or '-'}"
        lines.append(f"{row['state']:12} {epochs:>9}  {elbo:15}  {row['path']}")
    shared.answer(rows, "\n".join(lines))
