"""Commands that write pages: report and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pvae.cli.app import DATA_DIR, JSON, RUN, RUN_DIR, RUNS, SEED, SPLIT, app, emit, open_run, say, tell

FIGURES = Annotated[bool, typer.Option("--figures", help="Also write every picture as a PNG of its own.")]
SAMPLES = Annotated[int, typer.Option("--evidence-samples", min=2, help="Importance samples for each of 500 data.")]


@app.command()
def report(
    run: RUN,
    split: SPLIT = "test",
    evidence_samples: SAMPLES = 500,
    gap_steps: Annotated[int, typer.Option("--gap-steps", min=0, help="Of the refinement of q; 0: no gaps.")] = 200,
    figures: FIGURES = False,
    seed: SEED = 0,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Write the report of a run: one HTML file, its numbers as JSON and CSV."""
    from pvae.analysis.pages.report import examine
    from pvae.analysis.pages.sections import SECTIONS
    from pvae.analysis.pages.sections.examination import Case
    from pvae.util.progress import ProgressBar

    opened = open_run(run, run_dir, data_dir)
    case = Case(opened, split, evidence_samples=evidence_samples, gap_steps=gap_steps, seed=seed)
    with ProgressBar(len(SECTIONS), "report", show=not as_json) as bar:
        found = examine(case, bar.report)
    path = found.write(opened.files.report, figures=figures)
    if as_json:
        emit({"file": str(path), **found.to_dict(), "run": str(opened.path)})
        return
    say(found)
    tell(f"report: {path}")


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(help="Two or more runs; differences are to the first.", metavar="RUN...")
    ],
    split: SPLIT = "test",
    evidence_samples: SAMPLES = 500,
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")] = Path("comparison"),
    figures: FIGURES = False,
    seed: SEED = 0,
    run_dir: RUN_DIR = RUNS,
    data_dir: DATA_DIR = None,
    as_json: JSON = False,
) -> None:
    """Compare runs on the same data: one HTML file with a column for each, paired differences, rate and distortion."""
    from pvae.analysis.pages.compare import SECTIONS, Bench, examine
    from pvae.analysis.pages.document.document import claim
    from pvae.util.progress import ProgressBar

    opened = [open_run(run, run_dir, data_dir) for run in runs]
    bench = Bench(opened, split=split, evidence_samples=evidence_samples, seed=seed)
    claim(out)  # before the work
    with ProgressBar(len(SECTIONS), "compare", show=not as_json) as bar:
        found = examine(bench, " and ".join(bench.names), "", bar.report)
    path = found.write(out, figures=figures)
    if as_json:
        emit({"file": str(path), **found.to_dict()})
        return
    say(found)
    tell(f"comparison: {path}")
