"""Tasks of a study: what the runs leave to do of each, told to a worker as JSON, and what that worker then does.

Runs are found by the digest of their declaration, whatever their names.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae.errors import BusyError, DataError, DeclarationError, Interrupted, OutputError
from pvae.experiment.experiment import Experiment
from pvae.runs import RunDirectory, checkpoint
from pvae.runs.find import Claim, begun, busy, folders, is_stale
from pvae.runs.run import Run
from pvae.studies.cases import Case
from pvae.studies.sweep import SECOND, Measure, Search
from pvae.util import files

if TYPE_CHECKING:
    from pvae.studies.search import Searching

LOOK_SECONDS = 2.0
"""Seconds between two checks of a task on which a process outside of this study is working."""
FINISHED = frozenset(["finished", "found"])
DONE = FINISHED | {"failed", "stopped"}
CLAIMS = ".studies"
"""Folder, in that of the runs, of the claims on tasks and of what studies keep for themselves."""


@dataclass(eq=False)
class Task:
    """Work of one worker: a first stage with its declared second stage, one of `[[sweep.refits]]`, or a trial."""

    cases: tuple[Case, ...]
    search: Searching | None = None
    """Search of which this task is a trial; else None."""
    number: int = 0
    """Number of such a task, from 0, in its study."""
    state: str = "waiting"
    doing: str = ""
    """Work of the running worker: fit, resume, refit, measure or trial."""
    error: str = ""
    """Last line of output of a failed worker; who has a case that is waited for."""
    tries: int = 0
    """Number of times that it was begun."""

    @property
    def parent(self) -> Case | None:
        """Return the case of the first stage of one of `[[sweep.refits]]`; else None."""
        return self.cases[0].parent if self.cases else None

    @property
    def title(self) -> str:
        """Return the case of the task, or its number, as text for people."""
        return self.cases[0].title if self.cases else f"trial task {self.number + 1}"

    @property
    def id(self) -> str:
        """Return what tells the task from others of all studies in a folder of runs."""
        if self.search is not None:
            return f"{self.search.key}-{self.number}"
        return files.digest("".join(case.digest for case in (self.cases[0], self.parent) if case).encode())[:32]

    def left(self, shelf: Shelf, measure: Measure) -> tuple[str, RunDirectory | None, Mapping[str, Any]]:
        """Return what is left to do (`held`: by another; `found`: nothing), the run to begin from, and its manifest."""
        if self.search is not None:
            return "found" if self.search.is_done(self.number) else "trial", None, {}
        runs = [shelf.best(case) for case in self.cases]
        if "held" in (states := ["" if run is None else standing(run) for run in runs]):
            return "held", runs[states.index("held")], {}
        if set(states) == {"finished"}:
            from pvae.analysis.pages.study import kept

            whole = all(run is not None and kept(run, measure) for run in runs)
            return ("found" if whole else "measure"), runs[-1], {}
        if runs[0] is not None:
            going_on = runs[-1] if runs[-1] is not None and states[-1] == "stopped" else runs[0]
            return "resume", runs[0], going_on.manifest
        if self.parent is None:
            return "fit", None, {}
        return "refit", shelf.finished(self.parent), {}

    def order(self, setting: Mapping[str, Any], had: Mapping[str, Any]) -> dict[str, Any]:
        """Return the task as JSON for a worker, with the settings of its study; the threads are those it `had`."""
        claim = str(self.claim(Path(setting["run_dir"])).path.absolute())
        own = {"id": self.id, "claim": claim, **setting, "threads": had.get("threads", setting["threads"])}
        if self.search is not None:
            search = self.search.search.model_dump(exclude_unset=True)
            return {**own, "search": search, "base": self.search.base, "name": self.search.name, "number": self.number}
        parent = None if self.parent is None else self.parent.experiment.to_toml()
        return {**own, "spec": self.cases[0].experiment.to_toml(), "parent": parent}

    def claim(self, root: Path) -> Claim:
        """Return the claim of a worker on the task, in the folder of runs; raises OutputError."""
        return Claim(own_folder(root) / f"{self.id}.lock", "a case")


def tasks_of(cases: Sequence[Case]) -> list[Task]:
    """Return a task for each first stage and each second stage of `[[sweep.refits]]`, in the order of the cases."""
    second = {case.parent: case for case in cases if case.stage == SECOND}
    return [Task((case, *([second[case]] if case in second else ()))) for case in cases if case.stage != SECOND]


def own_folder(root: Path, name: str = "") -> Path:
    """Return the folder of claims, or a private one in it, after creating it; raises OutputError."""
    with files.raising(OutputError, f"{root}: expected a folder to keep runs in"):
        (root / CLAIMS).mkdir(parents=True, exist_ok=True)
        if name:
            (root / CLAIMS / name).mkdir(mode=0o700, exist_ok=True)
    return root / CLAIMS / name


# ---------------------------------------------------------------------- the runs of a study


RANKS = ("finished", "held", "stopped")
"""States of a run that can serve a case, in order of preference; see `standing`."""


def standing(run: RunDirectory) -> str:
    """Return the state of a run: finished, held (a process works on it), stopped (resumable), or void (not usable).

    Raises:
        DataError: its files are damaged.
    """
    manifest, status = run.manifest, run.status()
    if status.get("state") == "finished":
        return "finished"
    if status.get("state") == "running" and not is_stale(status):
        return "held"
    begun = manifest.get("parent") is None or checkpoint.newest_first(run.path / "checkpoints")
    return "stopped" if "engine" in manifest and begun else "void"


class Shelf:
    """Index of the runs below a folder by their declarations; a run whose files are damaged is ignored."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.known: dict[tuple[Path, int], tuple[str, tuple[str, object] | None]] = {}

    def best(self, case: Case) -> RunDirectory | None:
        """Return the run of a case: the newest finished one, else the newest held or stopped one, else None.

        The run of a second stage must name, as its parent, the run of the first stage and the epoch at which it ended.
        """
        first = self.finished(case.parent) if case.parent else None
        if case.parent and first is None:
            return None
        wanted = case.digest, None if first is None else (first.id, first.status().get("epoch"))
        runs = (RunDirectory(path) for name in folders(self.root) for path in folders(name))
        matching = [run for run in runs if self._declared(run) == wanted]
        found: dict[str, RunDirectory] = {}
        for run in sorted(matching, key=lambda run: begun(run.path), reverse=True):
            with suppress(DataError):
                found.setdefault(standing(run), run)
        return next((found[state] for state in RANKS if state in found), None)

    def finished(self, case: Case) -> RunDirectory | None:
        """Return the newest finished run of a case; None if there is none."""
        run = self.best(case)
        return run if run is not None and standing(run) == "finished" else None

    def _declared(self, run: RunDirectory) -> tuple[str, tuple[str, object] | None]:
        """Return the digest of a run's declaration and the parent in its manifest.

        Cached until the declaration file changes.
        """
        with suppress(OSError, DataError, DeclarationError):
            key = run.path, (run.path / "spec.toml").lstat().st_mtime_ns
            if key not in self.known and run.manifest.get("declared") is True:  # not written by hand, and begun
                self.known[key] = Experiment.of_run(run.spec_text).digest(), run.parent
            return self.known.get(key, ("", None))
        return "", None


# ---------------------------------------------------------------------- in the worker


def work(order: Mapping[str, Any]) -> None:
    """Do what an order asks for in this process, which has the claim on it: a case or a trial.

    The last line of an error goes to the file `ID.failed` beside the log, too.
    """
    import torch

    torch.set_num_threads(int(order["threads"]))
    measure, failed = Measure.model_validate(order["measure"]), Path(order["log"]).with_suffix(".failed")
    failed.unlink(missing_ok=True)
    try:
        if "search" in order:
            from pvae.studies.search import Searching

            search = Search.model_validate(order["search"])
            Searching(search, order["base"], order["name"], Path(order["run_dir"])).work(order)
            return
        parent = None if order["parent"] is None else Case.of(Experiment.from_toml(order["parent"]))
        run: Run | None = fitted(Experiment.from_toml(order["spec"]), parent, order, measure)
        from pvae.analysis.pages.study import figures

        while run is not None:
            figures(run, measure)
            first = run.files.first_stage()
            run = None if first is None else own_run(first, order)
    except (BusyError, Interrupted):
        raise
    except Exception as error:
        failed.write_text((str(error).splitlines() or [repr(error)])[-1])
        raise


def own_run(files: RunDirectory, order: Mapping[str, Any]) -> Run:
    """Return the run of a case of an order, on whatever machine it was begun."""
    return Run(files, data=order.get("data"), data_dir=order["data_dir"] and Path(order["data_dir"]), is_own=True)


def fitted(experiment: Experiment, parent: Case | None, order: Mapping[str, Any], measure: Measure) -> Run:
    """Return the finished run of a case: the one that is there, gone on with if it was stopped, or a new one.

    A second stage that the case declares is fitted, too, and its run returned.

    Raises:
        BusyError: another process has the run.
    """
    from pvae.training.fit import fit
    from pvae.training.resume import fit_stage, resume

    case = Case.of(experiment, parent)
    second = [] if experiment.refit is None else [Case.of(experiment.second_stage(), case)]
    root = Path(order["run_dir"])
    doing, found, had = Task((case, *second)).left(Shelf(root), measure)
    device = str(had.get("device", order["device"]))
    if doing == "fit":
        places = {"run_dir": root, "data": order.get("data"), "data_dir": order["data_dir"]}
        return fit(experiment, device=device, progress=False, **places)
    if found is None:
        raise DataError("its first stage failed")
    if doing == "held":
        raise busy(root, "a run", found.status(), "")
    run = own_run(found, order)
    if doing == "resume":
        return resume(run, device=device, progress=False, allow_changes=bool(order["allow_changes"]))
    return fit_stage(run, experiment, root, device, progress=False) if doing == "refit" else run


def claimed(claim: Claim) -> ExitStack:
    """Return a context that holds a claim from now on, after waiting as long as another process has it."""
    held = ExitStack()
    while True:
        with suppress(BusyError):
            held.enter_context(claim)
            return held
        time.sleep(LOOK_SECONDS)
