"""Report of a run, and comparison of runs: one self-contained HTML file, with its numbers in JSON and CSV beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pvae.analysis.pages.comparison.comparison import Comparison
from pvae.analysis.pages.comparison.sections import COMPARISON_SECTIONS
from pvae.analysis.pages.document.document import Document, Stages, claimed
from pvae.analysis.pages.document.words import text
from pvae.analysis.pages.sections import SECTIONS
from pvae.analysis.pages.sections.examination import Examination
from pvae.runs.run import Run
from pvae.util import StageProgress, silent, threads


def report(
    run: Run, *, split: str = "test", samples: int = 8, evidence_samples: int = 500, gap_steps: int = 200,
    seed: int = 0, figures: bool = False, on_progress: StageProgress = silent,
) -> Path:  # fmt: skip
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
        BusyError: another process makes this report.
        PvaeError: the run has no checkpoint or no data, or a file cannot be written.

    Example:
        ```python
        run = pvae.fit("vae", "train.epochs=20")
        page = pvae.analysis.report(run)
        ```
    """
    exam = Examination(run, split, samples=samples, evidence_samples=evidence_samples, gap_steps=gap_steps, seed=seed)
    with claimed(run.files.report):
        return examine(exam, on_progress).write(run.files.report, figures=figures)


def examine(exam: Examination, on_progress: StageProgress = silent) -> Document:
    """Return the report of a run as a page, with all its numbers, tables and pictures computed."""
    exam.stages = Stages(len(SECTIONS), on_progress)
    run = exam.run
    named = {"name": run.name, "id": run.path.name, "started": run.files.manifest.get("started")}
    with threads.threads(1 if exam.is_small else None):
        sections = exam.stages.sections(SECTIONS, exam)
    identity, said = text("page.identity", run=named, split=exam.split), text("page.footer", seed=exam.seed)
    numbers, footer = {"run": named, "split": exam.split, "seed": exam.seed}, f"{said} {text('page.nats')}"
    return Document("pvae report", run.name, run.plan.description, identity, numbers, sections, footer)


def compare(
    runs: Sequence[Run], out: Path, *, names: Sequence[str] | None = None, groups: Sequence[str] | None = None,
    title: str = "Comparison", description: str = "", split: str = "test", samples: int = 2,
    evidence_samples: int = 500, seed: int = 0, figures: bool = False, data: Any = None,
    on_progress: StageProgress = silent,
) -> Path:  # fmt: skip
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
        data: data of the runs that were fitted to data passed in Python, and lack them: anything `Dataset.of` takes.
        on_progress: called with (units done, total units, name of the present stage).

    Returns:
        The path of the HTML file. An earlier page in the folder is replaced only when this one is complete.

    Raises:
        BusyError: another process makes a page in the folder.
        DataError: there are fewer than two runs, or their ELBOs cannot be compared, because they differ in the data,
            the binarisation or the covariates.

    Example:
        ```python
        runs = [pvae.Run.load("vae"), pvae.Run.load("vamp")]
        page = pvae.analysis.compare(runs, Path("comparison"))
        ```
    """
    if data is not None:
        runs = [Run.load(run.path, data=data) if run.lacks_data else run for run in runs]
    asked = {"split": split, "samples": samples, "evidence_samples": evidence_samples, "seed": seed}
    found = Comparison(runs, names, groups, **asked)
    with claimed(out):
        return examine_runs(found, title, description, on_progress).write(out, figures=figures)


def examine_runs(found: Comparison, title: str, description: str, on_progress: StageProgress = silent) -> Document:
    """Return the page of a comparison, with all its numbers, tables and pictures computed."""
    found.stages = Stages(len(found.exams) + len(COMPARISON_SECTIONS), on_progress)
    with threads.threads(1 if found.first.is_small else None):
        _ = found.figures  # computes the metrics of every run, one run after the other
        sections = found.stages.sections(COMPARISON_SECTIONS, found)
    runs = {name: {"name": exam.run.name, "id": exam.run.path.name} for name, exam in found.exams.items()}
    identity = text("compared.identity", count=len(runs), source=found.first.data.source, split=found.split)
    numbers = {"title": title, "runs": runs, "split": found.split, "seed": found.first.seed}
    footer = text("page.footer", seed=found.first.seed)
    return Document("pvae comparison", title, description, identity, numbers, sections, footer)
