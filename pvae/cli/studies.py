"""Commands study, which runs and compares what a study file declares, and study-work, one of its processes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pvae.cli.app import Shared, app, command, load_installed_plugins, tell
from pvae.errors import PvaeError

if TYPE_CHECKING:
    from pvae.studies import Study


@command(["device", "run_dir", "data_dir", "quiet", "as_json"], device="auto")
def study(
    shared: Shared,
    file: Annotated[str, typer.Argument(help="The name of a study (priors, discrete) or a TOML file with [sweep].")],
    jobs: Annotated[int | None, typer.Option("--jobs", min=1, help="Processes at a time; cores / threads.")] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of each process.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cases with their states, run nothing.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the comparison; study-NAME unless said.")] = None,
    page: Annotated[bool, typer.Option("--page/--no-page", help="Compare the runs on one HTML page.")] = True,
) -> None:
    """Run a study: declarations, values and seeds in parallel processes; finished runs are recognised and kept."""
    load_installed_plugins()
    if dry_run:
        _list(shared, file)
        return
    from pvae.analysis.pages.document.folder import claim
    from pvae.runs.find import slug
    from pvae.studies import study as run_study
    from pvae.studies.cases import Declared

    where = out or Path(f"study-{slug(Declared.load(file).name)}")
    if page or out is not None:
        claim(where)  # before the work
    found = run_study(
        file,
        run_dir=shared.run_dir,
        data_dir=shared.data_dir,
        device=shared.device,
        jobs=jobs,
        threads=threads,
        progress=not shared.quiet,
    )
    written = _compared(found, where, show=not (shared.quiet or shared.as_json)) if page else None
    if out is not None and written is None:
        found.save(out)
    shared.answer({**found.to_dict(), "file": written and str(written)}, found)
    if written is not None:
        shared.tell(f"comparison: {written}")
    for (case, seed, stage), error in found.failures.items():
        tell(f"failed: {case}, {stage}, seed {seed}: {error}", err=True)
    if found.failures:
        raise typer.Exit(1)


def _compared(found: Study, out: Path, *, show: bool) -> Path | None:
    """Write the HTML page and the tables of a study, and return the page's path.

    If its runs cannot be compared, the reason is printed and None returned.
    """
    from pvae.util.progress import ProgressBar

    try:
        with ProgressBar(100, "compare", show=show) as bar:
            return found.compare(out, on_progress=bar.report)
    except PvaeError as error:
        tell(f"no comparison: {error}", err=True)
        return None


def _list(shared: Shared, file: str) -> None:
    from pvae.studies import states
    from pvae.studies.cases import Declared

    rows: list[dict[str, Any]] = [
        {"case": case.label, "seed": case.seed, "stage": case.stage, "state": state, "run": run and str(run.path)}
        for case, state, run in states(Declared.load(file), shared.run_dir)
    ]
    width = max(len(row["case"]) for row in rows)
    lines = [
        f"{row['state']:9} {row['case']:{width}}  seed {row['seed']}  {row['stage']}  {row['run'] or ''}".rstrip()
        for row in rows
    ]
    shared.answer(rows, "\n".join(lines))


@app.command("study-work", hidden=True)
def study_work() -> None:
    """Do one job of a study, read as JSON from standard input; `pvae study` starts its processes with this."""
    import json

    from pvae.studies.runner import work

    load_installed_plugins()
    work(json.load(sys.stdin))
