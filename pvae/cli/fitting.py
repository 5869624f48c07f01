"""Commands that fit: fit, resume, refit, study and its processes; and export and runs, which read finished runs."""

from __future__ import annotations

import json
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import pvae
from pvae.cli.app import Shared, app, command, load_declaration, load_installed_plugins, rows_of, tell
from pvae.errors import DataError, PvaeError, text
from pvae.runs import find, rundir
from pvae.signals import end_with
from pvae.util import files, progress

if TYPE_CHECKING:
    from pvae.runs.run import Run
    from pvae.studies.cases import Declared


@command("to_fit", device="auto")
def fit(shared: Shared, name: str, overrides: list[str] | None = None) -> None:
    """Fit an experiment, or a hand-written pair with --data, and keep everything in a run directory."""
    from pvae.cli.handwritten import is_pair_file, load_arguments, load_pair

    if is_pair_file(name):
        pair = load_pair(name)
        given = load_arguments(shared.data, pair)
        pair.origin = f"--pair {name} --data {shared.data}"
        _finish(shared, pvae.fit(pair, *(overrides or ()), data=given, run_dir=shared.run_dir, **shared.fitting()))
        return
    places: dict[str, Any] = {"data": shared.data, "run_dir": shared.run_dir, "data_dir": shared.data_dir}
    _finish(shared, pvae.fit(load_declaration(name, overrides), **places, **shared.fitting()))


@command("to_fit", device="auto")
def resume(shared: Shared, run: str, overrides: list[str] | None = None, allow_changes: bool = False) -> None:
    """Continue a run where it stopped, bit for bit on a CPU."""
    opened = shared.open(run)
    unmeasured = _parent(opened) is not None and not (opened.path / "analysis" / "refit.json").exists()
    second = getattr(opened.plan, "refit", None) is not None or unmeasured
    if opened.status.get("state") != "finished" or overrides or second:
        _finish(shared, pvae.resume(opened, *(overrides or ()), allow_changes=allow_changes, **shared.fitting()))
        return
    # standard output holds JSON alone under --json
    tell(text("cli.fitting.finished", run=opened, export=shared.export), err=shared.as_json)
    shared.answer(_facts(opened))
    _require_no_alerts(shared, opened)


@command("to_fit", device="auto")
def refit(
    shared: Shared, run: str, overrides: list[str] | None = None, samples: int = 1, rows: int | None = None
) -> None:
    """Freeze a run and fit another prior to its aggregated posterior, say latents.z.prior.kind=realnvp."""
    opened = shared.open(run)
    child = pvae.refit(opened, *(overrides or ()), run_dir=shared.run_dir, **shared.fitting())
    _compare(shared, opened, child, rows, samples)
    _require_no_alerts(shared, child)


def _compare(shared: Shared, parent: Run | None, child: Run, rows: int | None = None, samples: int = 1) -> None:
    """Print ELBO surgeries before and after a second stage, on train and test, and write them to the new run.

    Where that cannot be done the reason is printed: the second stage itself is finished.
    """
    found, record = {}, {}
    try:
        if parent is None:
            raise DataError(f"{child.path}: expected its first stage {_parent(child)} beside it; got none.")
        with progress.ProgressBar(4, "surgery", show=not shared.quiet) as bar:
            for i, split in enumerate(("train", "test")):
                _, x, _ = rows_of(child, split, rows, 0)
                watch = partial(lambda i, done, _: bar.update(2 * i + done, ""), i)
                given: dict[str, Any] = {"seen": split == "train", "on_progress": watch}
                found[split] = pvae.analysis.gain(parent.pair, child.pair, x, samples, **given)
        splits = {split: gained.to_dict() for split, gained in found.items()}
        record = {"run": str(child.path), "parent": str(parent.path), "splits": splits}
        files.write_atomic(child.files.analysis / "refit.json", files.pretty(record))
    except PvaeError as error:
        tell(f"no comparison with the first stage: {error}", err=True)
    shown = [part for split, result in found.items() for part in (f"\n{split}:", result)]
    shared.answer({**_facts(child), **record}, _summary(child), *shown)


def _finish(shared: Shared, run: Run) -> None:
    """Print the summary of a fit, and the gain of a second stage; under `--strict` alerts end the command with 3."""
    if _parent(run):
        first = run.files.first_stage()
        parent = None if first is None else shared.open(str(first.path))
        _compare(shared, parent, run)
        if parent is not None:
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
    keys = ("state", "epoch", "epochs", "step", "elbo", "log_joint", "seconds", "skipped", "degraded")
    status = {key: run.status.get(key) for key in (*keys, run.files.manifest.get("figure", "elbo"))}
    return {"run": str(run.path), "name": run.name, "parent": _parent(run), **status, "alerts": run.files.alerts()}


def _summary(run: Run) -> str:
    """Return a one-line summary of a run, after a line that names its parent run if it is a second stage."""
    from pvae.objectives.base import named

    name, alerts = str(run.files.manifest.get("figure", "elbo")), run.files.alerts()
    best = value if isinstance(value := run.status.get(name), float) else None
    facts = {"parent": _parent(run), "status": run.status, "figure": named(name), "best": best, "alerts": alerts}
    return text("cli.fitting.summary", path=run.path, **facts)


def _require_no_alerts(shared: Shared, run: Run) -> None:
    """Print the alerts of a run, if there are any, and end the command with exit code 3, under `--strict` only."""
    if shared.strict and (alerts := run.files.alerts()):
        for line in alerts:
            tell(f"alert: {line}", err=True)
        raise typer.Exit(3)


@command("run_dir", "data_dir", "pair", "data", "as_json")
def export(shared: Shared, run: str, kind: str, what: str = "decoder") -> None:
    """Export a run's decoder or encoder, its model card, or its metrics and pictures to TensorBoard or MLflow."""
    if (path := Path(kind)).suffix == ".md":
        from pvae.analysis.pages.card import card

        files.write_atomic(path, card(shared.open(run)))
        where = str(path)
    elif path.suffix:
        from pvae.runs.export.modules import export_module

        where = str(export_module(shared.open(run), path, what))
    else:
        from pvae.runs.export.exporting import export as export_run

        where = export_run(rundir.RunDirectory.open(run, shared.run_dir), kind)
    shared.answer({"kind": kind, "where": where}, where)


@command("run_dir", "as_json")
def runs(shared: Shared) -> None:
    """List runs with their state, epochs and best validation ELBO."""
    rows = rundir.list_runs(shared.run_dir)
    lines = [] if rows else [f"no runs in {shared.run_dir}; make one with: pvae fit vae"]
    for row in rows:
        known = [f"{name} {row[name]:>10.3f}" for name in ("elbo", "log_joint") if isinstance(row.get(name), float)]
        epochs = f"{row.get('epoch') if row.get('epoch') is not None else '-'}/{row.get('epochs') or '-'}"
        lines.append(f"{row['state']:12} {epochs:>9}  {''.join(known):15}  {row['path']}")
    shared.answer(rows, "\n".join(lines))


# ---------------------------------------------------------------------- studies


@command("device", "run_dir", "data_dir", "data", "quiet", "as_json", device="auto")
def study(
    shared: Shared, file: str, jobs: int | None = None, threads: int = 1, allow_changes: bool = False,
    dry_run: bool = False, out: Path | None = None, page: bool = True, on: str | None = None,
    slurm: list[str] | None = None, more: list[str] | None = None,
) -> None:  # fmt: skip
    """Run a study: declarations, values, seeds, trials of a search, here or in a queue; finished runs are kept."""
    from pvae.studies.cases import Declared

    load_installed_plugins()
    declared = Declared.load(file)
    if dry_run:
        _list(shared, declared)
        return
    from pvae.analysis.pages.document.document import earlier

    where = out or Path(f"study-{find.slug(declared.name)}")
    if page or out is not None:
        earlier(where)  # before the work
    options: dict[str, Any] = {name: getattr(shared, name) for name in ("run_dir", "data_dir", "data", "device")}
    options |= {"on": on, "slurm": [*(slurm or ()), *(more or ())], "progress": not shared.quiet}
    found = pvae.study(file, **options, jobs=jobs, threads=threads, allow_changes=allow_changes)
    written = None
    if page:
        try:
            with progress.ProgressBar(100, "compare", show=not (shared.quiet or shared.as_json)) as bar:
                written = found.compare(where, on_progress=bar.report)
        except PvaeError as error:  # runs that cannot be compared
            tell(f"no comparison: {error}", err=True)
    if out is not None and written is None:
        found.save(out)
    shown = (found,) if written is None else (found, f"comparison: {written}")
    shared.answer({**found.to_dict(), "file": written and str(written)}, *shown)
    for (case, seed, stage), problem in found.failures.items():
        tell(f"failed: {case}, {stage}, seed {seed}: {problem}", err=True)
    if found.failures:
        raise typer.Exit(1)


def _list(shared: Shared, declared: Declared) -> None:
    """Print the cases of a study with their states."""
    from pvae.studies.study import names_of, states

    found = states(declared, shared.run_dir)
    rows = [{**names_of(case.key), "state": state, "run": run and str(run.path)} for case, state, run in found]
    width = max((len(row["case"]) for row in rows), default=0)
    line = "{state:9} {case:{width}}  seed {seed}  {stage}  {run}"
    lines = [line.format_map({**row, "run": row["run"] or "", "width": width}).rstrip() for row in rows]
    shared.answer(rows, "\n".join(lines))


@app.command("study-work", hidden=True)
def study_work() -> None:
    """Do one task of a study, read as JSON from standard input; `pvae study` and its jobs start workers with this."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm sends it to all processes of a job
    order = json.load(sys.stdin)
    end_with(order["supervisor"])
    with find.Claim(Path(order["claim"]), "a case"):
        from pvae.studies.tasks import work

        load_installed_plugins()
        work(order)
