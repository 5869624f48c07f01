"""Several runs side by side, on the same data: one HTML file like a run's report, with a column for each run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pvae.analysis.pages.comparison.comparison import Comparison
from pvae.analysis.pages.comparison.sections import COMPARISON_SECTIONS
from pvae.analysis.pages.document.document import Document
from pvae.analysis.pages.document.folder import claim
from pvae.analysis.pages.document.stages import Stages
from pvae.analysis.pages.report import FOOTER
from pvae.runs.run import Run
from pvae.util.progress import StageProgress, silent


def compare(
    runs: Sequence[Run],
    out: Path,
    *,
    names: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    title: str = "Comparison",
    description: str = "",
    split: str = "test",
    samples: int = 2,
    evidence_samples: int = 500,
    seed: int = 0,
    figures: bool = False,
    on_progress: StageProgress = silent,
) -> Path:
    """Compare runs on the same rows; writes `index.html`, `report.json` and `tables/*.csv` into a folder.

    Arguments:
        runs: at least two, on the same data, prepared alike; the first is the reference of paired differences.
        out: the folder, made if it is not there.
        names: names of the runs on the page; default: their own, with their ids where two share one.
        groups: runs of one group differ in their seeds only: figures are then also averaged over each group.
        title: title of the page.
        description: text below the title.
        split: "train", "validation" or "test".
        samples: samples per datum for the surgeries.
        evidence_samples: importance samples per datum, on at most 250 rows.
        seed: seed of rows and samples, the same for all runs.
        figures: also write every picture.
        on_progress: called with (units done, units in all, what comes next).

    Returns:
        The path of the HTML file. An earlier page stays whole until this one is written.

    Raises:
        DataError: fewer than two runs, or runs whose figures cannot be compared: other data, binarisation or
            covariates.

    Example:
        ```python
        runs = [pvae.Run.load("vae"), pvae.Run.load("vamp")]
        page = pvae.analysis.compare(runs, Path("comparison"))
        ```
    """
    settings: dict[str, Any] = {"split": split, "samples": samples, "evidence_samples": evidence_samples, "seed": seed}
    found = Comparison(runs, names, groups, **settings)
    claim(out)
    return examine(found, title, description, on_progress).write(out, figures=figures)


def examine(found: Comparison, title: str, description: str, on_progress: StageProgress = silent) -> Document:
    """Compute everything that a comparison says."""
    found.stages = Stages(len(found.names) + len(COMPARISON_SECTIONS), on_progress)
    _ = found.figures  # measures run after run
    runs = {name: {"name": exam.run.name, "id": exam.run.path.name} for name, exam in found.exams.items()}
    return Document(
        kicker="pvae comparison",
        title=title,
        description=description,
        identity=f"{len(runs)} runs on {found.first.data.source}, the same rows of {found.split} for all",
        numbers={"title": title, "runs": runs, "split": found.split, "seed": found.first.seed},
        sections=found.stages.sections(COMPARISON_SECTIONS, found),
        footer=FOOTER.format(found.first.seed),
    )
