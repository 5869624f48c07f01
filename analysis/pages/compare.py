"""Comparison of several runs on the same data: one HTML file like a run's report, with a column for each run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pvae.analysis.pages.comparison.comparison import Comparison
from pvae.analysis.pages.comparison.sections import COMPARISON_SECTIONS
from pvae.analysis.pages.document.document import Document, claim
from pvae.analysis.pages.document.stages import Stages
from pvae.analysis.pages.report import FOOTER
from pvae.runs.run import Run
from pvae.util.progress import StageProgress, silent
from pvae.util.threads import single_thread


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
    """Compare runs on the same rows of data; write `index.html`, `report.json` and `tables/*.csv` into a folder.

    Arguments:
        runs: at least two runs on the same data, prepared alike; the first is the reference of paired differences.
        out: folder of the page; it is created if it does not exist.
        names: names of the runs on the page; by default their own, with the run's id if two runs share a name.
        groups: group of each run. Runs of one group differ only in their seeds: metrics are averaged over each group.
        title: title of the page.
        description: text below the title.
        split: rows that the models are compared on: "train", "validation" or "test".
        samples: posterior samples per datum for the ELBO surgery of each run.
        evidence_samples: importance samples per datum, on at most 250 rows.
        seed: seed of the chosen rows and of all samples, the same for all runs.
        figures: also write each picture as `figures/*.png`.
        on_progress: called with (units done, total units, name of the present stage).

    Returns:
        The path of the HTML file. An earlier page in the folder is replaced only when this one is complete.

    Raises:
        DataError: there are fewer than two runs, or their ELBOs cannot be compared, because they differ in the data,
            the binarisation or the covariates.

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
    """Return the page of a comparison, with all its numbers, tables and pictures computed."""
    found.stages = Stages(len(found.names) + len(COMPARISON_SECTIONS), on_progress)
    with single_thread(found.first.is_small):
        _ = found.figures  # computes the metrics of every run, one run after the other
        sections = found.stages.sections(COMPARISON_SECTIONS, found)
    runs = {name: {"name": exam.run.name, "id": exam.run.path.name} for name, exam in found.exams.items()}
    return Document(
        kicker="pvae comparison",
        title=title,
        description=description,
        identity=f"{len(runs)} runs on {found.first.data.source}, the same rows of {found.split} for all",
        numbers={"title": title, "runs": runs, "split": found.split, "seed": found.first.seed},
        sections=sections,
        footer=FOOTER.format(found.first.seed),
    )
