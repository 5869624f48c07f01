"""Report of a run: one self-contained HTML file, with all its numbers in JSON and CSV files beside it."""

from __future__ import annotations

from pathlib import Path

from pvae.analysis.pages.document.document import Document
from pvae.analysis.pages.document.stages import Stages
from pvae.analysis.pages.sections import SECTIONS
from pvae.analysis.pages.sections.examination import Examination
from pvae.runs.run import Run
from pvae.util.progress import StageProgress, silent
from pvae.util.threads import single_thread

FOOTER = (
    "Every number of this page stands in report.json beside it, every table in tables/. The seed of all samples is {}."
)


def report(
    run: Run,
    *,
    split: str = "test",
    samples: int = 8,
    evidence_samples: int = 500,
    gap_steps: int = 200,
    seed: int = 0,
    figures: bool = False,
    on_progress: StageProgress = silent,
) -> Path:
    """Write the report of a run into its folder `report/`: `index.html`, `report.json` and `tables/*.csv`.

    A second call with the same arguments writes the same bytes.

    Arguments:
        run: a run with a checkpoint.
        split: split that the report describes: "train", "validation" or "test".
        samples: posterior samples per datum for the ELBO surgery; fewer if they would exceed 20 000 in total.
        evidence_samples: importance samples per datum, on at most 500 rows.
        gap_steps: optimisation steps that refine q(z | x) for each of 50 rows; 0 omits the inference gaps.
        seed: seed of all samples.
        figures: also write each picture as `figures/*.png`.
        on_progress: called with (units done, total units, name of the present stage).

    Returns:
        The path of the HTML file. An earlier report is replaced only when this one is complete.

    Raises:
        PvaeError: the run has no checkpoint or no data, or a file cannot be written.

    Example:
        ```python
        run = pvae.fit("vae", "train.epochs=20")
        page = pvae.analysis.report(run)
        ```
    """
    exam = Examination(run, split, samples=samples, evidence_samples=evidence_samples, gap_steps=gap_steps, seed=seed)
    return examine(exam, on_progress).write(run.files.report, figures=figures)


def examine(exam: Examination, on_progress: StageProgress = silent) -> Document:
    """Return the report of a run as a page, with all its numbers, tables and pictures computed."""
    exam.stages = Stages(len(SECTIONS), on_progress)
    run = exam.run
    started = run.files.manifest.get("started")
    with single_thread(exam.is_small):
        sections = exam.stages.sections(SECTIONS, exam)
    return Document(
        kicker="pvae report",
        title=run.name,
        description=run.plan.description,
        identity=f"run {run.path.name}{f', started {started}' if started else ''}; figures of the split {exam.split}",
        numbers={
            "run": {"name": run.name, "id": run.path.name, "started": started},
            "split": exam.split,
            "seed": exam.seed,
        },
        sections=sections,
        footer=f"{FOOTER.format(exam.seed)} Nats are natural units of information: 1 nat = 1.44 bits.",
    )
