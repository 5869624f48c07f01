"""Entry point `pvae.study`: run the cases that a study file declares, and tabulate the metrics of their runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group

from pvae.data.sources.python import PassedData, as_array
from pvae.errors import misdeclared, printable, text
from pvae.runs import RunDirectory, find
from pvae.runs.run import Run
from pvae.studies.cases import Case, Declared
from pvae.studies.runner import AT_A_TIME, Machine, Runner, Slurm, submissions
from pvae.studies.search import Searching
from pvae.studies.tasks import CLAIMS, Shelf, Task, standing, tasks_of
from pvae.util import Record, StageProgress, silent
from pvae.util.files import make_folder, write_together

if TYPE_CHECKING:
    import pandas

EVIDENCE = 100
"""Importance samples per datum for the lower bound on log p(x) in the comparison of a study's runs."""
Key = tuple[str, int, str]
"""Key of a case: its label, its seed, and its stage (`fit`, `refit`, or the label of a `[[sweep.refits]]`)."""


class Study(Record):
    """Result of a study: its finished runs, and the errors of the failed cases.

    Arguments:
        declared: the study as its file declares it.
        finished: directories of the finished runs, by (label, seed, stage).
        failures: the last line of output of each failed case, by (label, seed, stage).
        data_dir: folder that is searched first for data files.
        searching: the search of the study with its trials; None without a table `[search]`.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> import pvae
        >>> runs = TemporaryDirectory()
        >>> few = "data.splits.train=[0, 200]"
        >>> run = pvae.fit("vae", few, "train.epochs=1", run_dir=runs.name, progress=False)
        >>> file = Path(runs.name, "tiny.toml")
        >>> _ = file.write_text(f"{run.experiment.to_toml()}[sweep]")
        >>> declared = Declared.load(file)
        >>> [(case.label, case.seed) for case in declared.cases]
        [('vae', 0)]
        >>> found = Study(declared, {("vae", 0, "fit"): run.files}, failures={})
        >>> [run.name for run in found.runs.values()]
        ['vae']
        >>> runs.cleanup()
    """

    declared: Declared
    finished: Mapping[Key, RunDirectory]
    failures: Mapping[Key, str]
    data_dir: Path | None = None
    searching: Searching | None = None
    data: str | None = None

    @cached_property
    def runs(self) -> dict[Key, Run]:
        """Return the finished runs by (label, seed, stage), in the order of the study."""
        given: dict[str, Any] = {"data": self.data, "data_dir": self.data_dir, "is_own": True}
        return {key: Run(files, **given) for key, files in self.finished.items()}

    def to_frame(self) -> pandas.DataFrame:
        """Return a data frame of metrics with one row per finished run.

        Columns: `case`, `seed`, `stage`; a column for each dotted path that was set; of the test split `elbo`,
        `reconstruction`, `kl`, `mutual_information`, `marginal_kl` (estimates) and `iwae` (a lower bound of log p(x)),
        `new_gain` and `new_gain_upper` (bounds of what a better prior wins on new data while the encoder stays), of the
        training split `train_elbo` and so on, each with its Monte Carlo error `<metric>_error`, in nats per datum;
        `seconds` of training; `run`, the folder. A metric that is not defined is NaN.
        """
        from pvae.analysis.pages.study import figures, frame, row_of  # here, because analysis stands above

        rows = []
        for case in self.declared.cases:
            if case.key in self.runs:
                found = row_of(figures(run := self.runs[case.key], self.declared.measure))
                rows.append({**names_of(case.key), **case.differences, **found, "run": str(run.path)})
        return frame(rows)

    def summary(self) -> pandas.DataFrame:
        """Return a data frame with one row per case and stage: means over seeds, and standard errors `<metric>_error`.

        The error is the standard deviation over seeds divided by the root of their number; NaN for a single seed.
        """
        from pvae.analysis.pages.study import summary

        return summary(self.to_frame())

    def compare(self, out: str | Path, *, on_progress: StageProgress = silent) -> Path:
        """Write a comparison of the finished runs into a folder, as HTML, JSON and CSV; of a search, its trials.

        The files are `index.html`, `report.json`, `tables/`, `runs.csv` and `summary.csv`; the page of a search that
        stands beside a sweep is in `search/`.

        Runs of one case and stage are averaged over their seeds; the first run is the reference of paired differences.

        Returns:
            The path of the HTML file.

        Raises:
            DataError: fewer than two finished runs, or runs of different data.
        """
        from pvae.analysis.pages.report import compare  # here, because analysis stands above
        from pvae.analysis.pages.search import page_of

        if self.searching is not None and not self.declared.cases:
            return page_of(self.searching).write(Path(out))
        if self.searching is not None:
            page_of(self.searching).write(make_folder(Path(out)) / "search")
        groups = [case if stage == "fit" else f"{case}: {stage}" for case, _, stage in self.runs]
        names = [f"{group} #{seed}" for group, (_, seed, _) in zip(groups, self.runs, strict=True)]
        told: dict[str, Any] = {"title": self.declared.name, "description": self.declared.description}
        told |= {"names": names, "groups": groups, "evidence_samples": EVIDENCE, "on_progress": on_progress}
        page = compare(list(self.runs.values()), Path(out), **told)
        self.save(out)
        return page

    def save(self, out: str | Path) -> None:
        """Write `runs.csv` (one row per run) and `summary.csv` (means over seeds) into a folder, created if missing."""
        from pvae.analysis.pages.study import csv

        folder = make_folder(Path(out))
        write_together({folder / "runs.csv": csv(self.to_frame()), folder / "summary.csv": csv(self.summary())})

    def to_dict(self) -> dict[str, Any]:
        """Return the study's metrics and failures as a dictionary for JSON; a metric that is not defined is NaN."""
        name, description = self.declared.name, self.declared.description
        found: dict[str, Any] = {"study": name, "description": description, "unit": "nats per datum"}
        found |= {"runs": self.to_frame().to_dict("records"), "summary": self.summary().to_dict("records")}
        found["failures"] = [{**names_of(key), "error": error} for key, error in self.failures.items()]
        return found if self.searching is None else {**found, "trials": self.searching.history()}

    def __rich__(self) -> Group:
        from pvae.analysis.pages.search import page_of
        from pvae.analysis.pages.study import table

        sweep = [table(self.summary(), self.declared.name)] if self.declared.cases else []
        return Group(*sweep, *([] if self.searching is None else [page_of(self.searching)]))

    def _repr_html_(self) -> str:
        from pvae.analysis.pages.plots import base, comparisons

        cases = [case if stage == "fit" else f"{case}: {stage}" for case, _, stage in self.finished]
        names = ["" if case in cases[:i] else case for i, case in enumerate(cases)]
        rows = [files.metrics_rows() for files in self.finished.values()]
        made = comparisons.overlaid(names, rows, [*map([*dict.fromkeys(cases)].index, cases)]) if rows else None
        summary = self.summary().to_html(index=False, float_format="{:.4f}".format) if rows else ""
        return f"{base.pictured(made, self.declared.name)}{summary}{text('studies.study.html', found=self)}"

    def __str__(self) -> str:
        return self.summary().to_string(index=False, float_format="{:.4f}".format)


def names_of(key: Key) -> dict[str, Any]:
    """Return label, seed and stage of a case by their names in tables and JSON."""
    return dict(zip(("case", "seed", "stage"), key, strict=True))


def study(
    file: str | Path, *, run_dir: str | Path = "runs", data: Any = None, data_dir: str | Path | None = None,
    device: str = "auto", jobs: int | None = None, threads: int = 1, allow_changes: bool = False, on: str | None = None,
    slurm: Sequence[str] = (), progress: bool = True,
) -> Study:  # fmt: skip
    """Run every case and trial of a study in a process of its own, and compute the metrics of each finished run.

    A run in `run_dir` whose declaration equals that of a case (but for name and description) is the case's run: if it
    is finished it is used as it is, if it was interrupted it is resumed, and if another process works on it, it is
    waited for. A case that fails stops no other. Metrics are stored in the folder of each run, so that a second
    call is quick.

    Arguments:
        file: the name of a study that comes with pvae, or a TOML file with a table `[sweep]`.
        run_dir: folder of the run directories.
        data: data of cases whose source is "tensor" or "frame": a path, DataFrame, array or tensor. What is no path is
            written into `run_dir`, where the processes of the cases read it.
        data_dir: folder that is searched first for data files.
        device: "auto", "cpu" or "cuda"; a resumed run keeps its device.
        jobs: number of processes at a time; by default the number of cores divided by `threads`, or 100 jobs.
        threads: threads of each process; a resumed run keeps its own number.
        allow_changes: resume interrupted runs also on another machine or under other versions, as `resume` does.
        on: "local" for this machine; "slurm" to submit to its queue what is neither there nor done, and to wait. Unless
            given, a study that was submitted before is waited for, and others run on this machine.
        slurm: settings of the jobs, such as `"partition=main"`, `"time=60"` (minutes), `"cpus=4"`, `"gpus=1"`.
        progress: print a line for each change of a case or trial.

    Returns:
        The finished runs, and for each failed case the last line of output of its process.

    Raises:
        DeclarationError: the study is wrong; every problem of every case, before anything runs.
        MissingExtraError: the package of a search or of the queue is not installed, or there is no queue.
        Interrupted: a signal arrived; processes ended after checkpoints. The same call continues the study.
        StorageError: as Interrupted, but a process could not write its checkpoint.

    Example:
        A study of one case, whose run and figures exist already, so that no process starts:

        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> import pvae
        >>> runs = TemporaryDirectory()
        >>> few = "data.splits.train=[0, 200]"
        >>> run = pvae.fit("vae", few, "train.epochs=1", run_dir=runs.name, progress=False)
        >>> file = Path(runs.name, "tiny.toml")
        >>> _ = file.write_text(f"{run.experiment.to_toml()}[sweep.measure]")
        >>> from pvae.analysis.pages.study import figures
        >>> _ = figures(run, Declared.load(file).measure)
        >>> found = pvae.study(file, run_dir=runs.name, progress=False)
        >>> found.to_frame()[["case", "seed", "stage"]].values.tolist()
        [['vae', 0, 'fit']]
        >>> runs.cleanup()
    """
    declared = Declared.load(file)
    passed = [case.label for case in declared.cases if isinstance(case.experiment.data, PassedData)]
    misdeclared(passed and data is None, "studies.study.no_data", file=file, cases=passed)
    for name, given in (("jobs", jobs), ("threads", threads)):
        misdeclared(given is not None and given < 1, f"{name}: expected at least 1; got {given}.")
    root, data_folder = Path(run_dir), None if data_dir is None else Path(data_dir)
    searching = Searching(declared.search, declared.base, declared.name, root) if declared.search else None
    trials = range(declared.search.trials) if declared.search else ()
    tasks = [*tasks_of(declared.cases), *(Task((), search=searching, number=number) for number in trials)]
    places = {"run_dir": str(root.absolute()), "data_dir": data_dir and str(Path(data_dir).absolute())}
    setting: dict[str, Any] = {**places, "device": device, "threads": threads, "allow_changes": allow_changes}
    setting["measure"] = declared.measure.model_dump(exclude_none=True)
    setting["data"] = kept(data, root / find.slug(declared.name))
    place = placed(find.slug(declared.name), root.absolute(), on, slurm, jobs, threads)
    shown: Callable[[Sequence[Task]], None] = Board(declared.name).update if progress else lambda _: None
    Runner(tasks, setting, place, shown, declared.origin).run()
    finished = {case.key: run for case, state, run in states(declared, root) if run is not None and state == "finished"}
    failed = {case.key: task.error for task in tasks if task.state == "failed" for case in task.cases}
    failed |= {(task.title, 0, "trial"): task.error for task in tasks if task.state == "failed" and task.search}
    failures = {key: error for key, error in failed.items() if key not in finished}
    return Study(declared, finished, failures, data_folder, searching, setting["data"])


def kept(data: Any, path: Path) -> str | None:
    """Return the path of data: that of a file, or `path` with the ending of the file that they are written to."""
    if data is None or isinstance(data, str | Path):
        return None if data is None else str(Path(data).absolute())
    path.parent.mkdir(parents=True, exist_ok=True)
    if hasattr(data, "to_parquet"):
        data.to_parquet(path := path.with_suffix(".parquet"))
    else:
        np.save(path := path.with_suffix(".npy"), np.asarray(as_array(data, "data")), allow_pickle=False)
    return str(path.absolute())


def placed(name: str, root: Path, on: str | None, slurm: Sequence[str], jobs: int | None, threads: int) -> Machine:
    """Return the place of a study's workers: the queue if it is asked for, or if the study was submitted before.

    Raises DeclarationError for another place, and for settings of Slurm without it.
    """
    misdeclared(on not in (None, "local", "slurm"), f"--on: expected local or slurm; got {on!r}.")
    misdeclared(slurm and on != "slurm", f"--slurm: expected with --on slurm; got {' '.join(slurm)[:60]!r} alone.")
    if on == "slurm" or (on is None and submissions(root / CLAIMS / name)):
        return Slurm(root, name, jobs or AT_A_TIME, None if on is None else slurm)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(root, name, jobs or max(1, cores // threads))


def states(declared: Declared, root: Path) -> list[tuple[Case, str, RunDirectory | None]]:
    """Return every case with its state and its run directory (None if it has no run), without running anything.

    The states are finished, held (another process is running it), stopped (it can be resumed) and to do.
    """
    shelf = Shelf(root)
    runs = [(case, shelf.best(case)) for case in declared.cases]
    return [(case, "to do" if run is None else standing(run), run) for case, run in runs]


class Board:
    """Printer of the progress of a study, a line for each change of a task, on stderr."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.told: dict[Task, str] = {}

    def update(self, tasks: Sequence[Task]) -> None:
        """Print the state of each task in which it changed."""
        for task in tasks:
            line = told(task)
            if task.state != "waiting" and self.told.get(task) != line:
                self.told[task] = line
                print(printable(f"{self.name}: {task.title}: {line}"), file=sys.stderr, flush=True)


def told(task: Task) -> str:
    """Return the state of a task as text for people."""
    return text("studies.study.state", task=task)
