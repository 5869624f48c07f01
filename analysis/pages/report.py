"""The report of a run: one self-contained HTML file, with every number beside it in JSON and CSV."""

from __future__ import annotations

from pathlib import Path

from pvae.analysis.pages.document.document import Document
from pvae.analysis.pages.sections import SECTIONS
from pvae.analysis.pages.sections.examination import Case, Progress, silent
from pvae.runs.run import Run


def report(
    run: Run,
    *,
    split: str = "test",
    samples: int = 8,
    evidence_samples: int = 500,
    gap_steps: int = 200,
    seed: int = 0,
    figures: bool = False,
    on_progress: Progress = silent,
) -> Path:
    """Write `report/` of a run: `index.html`, `report.json`, `tables/*.csv`; twice the same, byte for byte.

    Arguments:
        run: a run with a checkpoint.
        split: the rows that are reported: "train", "validation" or "test".
        samples: draws per datum for the surgery, 20 000 at most in all.
        evidence_samples: importance samples per datum, on at most 500 rows.
        gap_steps: of the refinement of q(z | x), datum by datum, on 50 rows; 0 leaves the gaps out.
        seed: of all draws.
        figures: also write every picture, `figures/*.png`.
        on_progress: called with (steps done, steps in all, what comes next).

    Returns:
        The path of the HTML file.

    Raises:
        PvaeError: the run has no checkpoint or no data, or a file cannot be written.
    """
    case = Case(run, split, samples=samples, evidence_samples=evidence_samples, gap_steps=gap_steps, seed=seed)
    return examine(case, on_progress).write(run.files.report, figures=figures)


def examine(case: Case, on_progress: Progress = silent) -> Document:
    """Compute everything that a report says."""
    found = []
    for done, (name, make) in enumerate(SECTIONS.items()):
        on_progress(done, len(SECTIONS), name)
        found.append(make(case))
    on_progress(len(SECTIONS), len(SECTIONS), "written")
    run = case.run
    started = str(run.files.manifest.get("started", ""))
    return Document(
        kicker="pvae report",
        title=run.name,
        description=run.plan.description,
        identity=f"run {run.path.name}{started and f', started {started}'}; figures of the split {case.split}",
        numbers={
            "run": {"name": run.name, "id": run.path.name, "started": run.files.manifest.get("started")},
            "split": case.split,
            "seed": case.seed,
        },
        sections=tuple(section for section in found if section is not None),
        footer=(
            f"Every number of this page stands in report.json beside it, every table in tables/. Draws used seed "
            f"{case.seed}. Nats are natural units of information: 1 nat = 1.44 bits."
        ),
    )
