"""Commands that write HTML pages on runs: report and compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pvae.cli.app import ON_RUN, RunName, SeedOption, Shared, SplitName, command

Figures = Annotated[bool, typer.Option("--figures", help="Also write every picture as a PNG of its own.")]
EvidenceSamples = Annotated[
    int, typer.Option("--evidence-samples", min=2, help="Importance samples for each of 500 data (compare: 250).")
]


@command(ON_RUN)
def report(
    shared: Shared,
    run: RunName,
    split: SplitName = "test",
    evidence_samples: EvidenceSamples = 500,
    gap_steps: Annotated[
        int, typer.Option("--gap-steps", min=0, help="Refinement steps of q for the gaps; 0: no gaps.")
    ] = 200,
    figures: Figures = False,
    seed: SeedOption = 0,
) -> None:
    """Write the report of a run: one HTML file, its numbers as JSON and CSV."""
    from pvae.analysis.pages.report import examine
    from pvae.analysis.pages.sections.examination import Examination

    opened = shared.open(run)
    exam = Examination(opened, split, evidence_samples=evidence_samples, gap_steps=gap_steps, seed=seed)
    with shared.bar("report", 100) as bar:
        found = examine(exam, bar.report)
    path = found.write(opened.files.report, figures=figures)
    shared.answer({"file": str(path), **found.to_dict(), "run": str(opened.path)}, found)
    shared.tell(f"report: {path}")


@command(ON_RUN)
def compare(
    shared: Shared,
    runs: Annotated[
        list[str], typer.Argument(help="Two or more runs; differences are to the first.", metavar="RUN...")
    ],
    split: SplitName = "test",
    evidence_samples: EvidenceSamples = 500,
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")] = Path("comparison"),
    figures: Figures = False,
    seed: SeedOption = 0,
) -> None:
    """Compare runs on the same data: one HTML file with a column for each, paired differences, rate and distortion."""
    from pvae.analysis.pages.compare import examine
    from pvae.analysis.pages.comparison.comparison import Comparison
    from pvae.analysis.pages.document.folder import claim

    opened = [shared.open(run) for run in runs]
    comparison = Comparison(opened, split=split, evidence_samples=evidence_samples, seed=seed)
    claim(out)  # before the work
    with shared.bar("compare", 100) as bar:
        found = examine(comparison, " and ".join(comparison.names), "", bar.report)
    path = found.write(out, figures=figures)
    shared.answer({"file": str(path), **found.to_dict()}, found)
    shared.tell(f"comparison: {path}")
