"""The command study: everything that a study file declares, run and compared; and the work of its processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvae.cli.app import DATA_DIR, DEVICE, JSON, RUN_DIR, RUNS, app, emit, say, tell
from pvae.errors import PvaeError

if TYPE_CHECKING:
    from pvae.studies import Study


@app.command()
def study(
    file: Annotated[str, typer.Argument(help="The name of a study (priors, discrete) or a TOML file with [sweep].")],
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Processes at a time; cores / threads.")] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of each process.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cases with their states, run nothing.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the comparison; study-NAME unless said.")] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Compare the runs on one HTML page.")] = True,
    device: DEVICE = "auto",
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: JSON = False,
) -> None:
    """Run a study: declarations, values and seeds in parallel processes; finished runs are recognised and kept."""
    from pvae.component import load_plugins

    load_plugins(report=lambda line: tell(line, err=True))
    if dry_run:
        _list(file, run_dir, as_json)
        return
    from pvae.analysis.pages.document.document import claim
    from pvae.runs.rundir import slug
    from pvae.studies import study as run_study
    from pvae.studies.cases import Declared

    where = out or Path(f"study-{slug(Declared.load(file).name)}")
    if page or out is not None:
        claim(where)  # before the work
    found = run_study(
        file, run_dir=run_dir, data_dir=data_dir, device=device, jobs=jobs, threads=threads, progress=not quiet
    )
    written = _compared(found, where, show=not (quiet or as_json)) if page else None
    if out is not None and written is None:
        found.save(out)
    emit({**found.to_dict(), "file": written and str(written)}) if as_json else say(found)
    if written is not None and not as_json:
        tell(f"comparison: {written}")
    for (case, seed, stage), error in found.failures.items():
        tell(f"failed: {case}, {stage}, seed {seed}: {error}", err=True)
    if found.failures:
        raise typer.Exit(1)


def _compared(found: Study, out: Path, *, show: bool) -> Path | None:
    """The page and the tables of a study; None, and a word, where its runs do not compare."""
    from pvae.analysis.pages.compare import SECTIONS
    from pvae.util.progress import ProgressBar

    try:
        with ProgressBar(len(SECTIONS), "compare", show=show) as bar:
            return found.compare(out, on_progress=bar.report)
    except PvaeError as error:
        tell(f"no comparison: {error}", err=True)
        return None


def _list(file: str, run_dir: Path, as_json: bool) -> None:
    from pvae.studies import states
    from pvae.studies.cases import Declared

    rows: list[dict[str, Any]] = [
        {"case": case.label, "seed": case.seed, "stage": case.stage, "state": state, "run": run and str(run.path)}
        for case, state, run in states(Declared.load(file), run_dir)
    ]
    if as_json:
        emit(rows)
        return
    width = max(len(row["case"]) for row in rows)
    for row in rows:
        tell(f"{row['state']:9} {row['case']:{width}}  seed {row['seed']}  {row['stage']}  {row['run'] or ''}".rstrip())


@app.command("study-work", hidden=True)
def study_work() -> None:
    """Do one piece of a study, read as JSON from standard input: what `pvae study` starts processes with."""
    import json

    from pvae.component import load_plugins
    from pvae.studies.runner import work

    load_plugins(report=lambda line: tell(line, err=True))
    work(json.load(sys.stdin))
