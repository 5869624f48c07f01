"""Execution of a study in parallel processes, which start or resume the runs and compute their metrics."""

import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from subprocess import DEVNULL, Popen
from types import FrameType
from typing import IO, Any

from pvae.component import IMPORTED
from pvae.errors import BusyError, DataError, Interrupted, OutputError, StorageError
from pvae.experiment.experiment import Experiment
from pvae.runs.claim import Claim
from pvae.runs.find import folders, slug
from pvae.runs.rundir import RunDirectory
from pvae.studies.cases import Case
from pvae.studies.shelf import Shelf, standing
from pvae.studies.sweep import SECOND, Measure
from pvae.util import files
from pvae.util.signals import Answer

ENTRY = "study-work"
"""Name of the `pvae` command that a child process runs; it reads its job as JSON from standard input."""
POLL_SECONDS = 0.1
LOOK_SECONDS = 2.0
"""Seconds between two checks of a run on which a process outside of this study is working."""
DONE = frozenset(["finished", "found", "failed", "stopped"])
STOPPED = frozenset(code for n in (signal.SIGINT, signal.SIGTERM) for code in (128 + n, -n))
"""Exit codes of processes that a signal ended."""
CLAIMS = ".studies"


# ---------------------------------------------------------------------- tasks


@dataclass
class Task:
    """Work of one child process: a first stage with its declared second stage, or one of `[[sweep.refits]]`."""

    cases: tuple[Case, ...]
    state: str = "waiting"
    doing: str = ""
    """Job of the running process: fit, resume, refit or measure."""
    error: str = ""
    """Last line of output of a failed process; who has a case that is waited for."""
    code: int | None = None
    """Exit code of the last process."""
    process: Popen[bytes] | None = None
    told: IO[bytes] | None = None
    claim: Claim | None = None
    looked: float = field(default=-1e9)

    @property
    def case(self) -> Case:
        """Return the first case of the task."""
        return self.cases[0]

    def now(self, root: Path) -> Mapping[str, Any]:
        """Return the status of the run on which the task's process is working; {} if there is none yet."""
        for case in reversed(self.cases) if self.process is not None else ():
            for path in reversed(folders(root / slug(case.experiment.name))):
                with suppress(DataError):
                    status = RunDirectory(path).status()
                    if self.process is not None and status.get("pid") == self.process.pid:
                        return status
        return {}


def tasks_of(cases: Sequence[Case]) -> list[Task]:
    """Return a task for each first stage and each second stage of `[[sweep.refits]]`, in the order of the cases."""
    second = {case.parent: case for case in cases if case.stage == SECOND}
    return [Task((case, *([second[case]] if case in second else ()))) for case in cases if case.stage != SECOND]


@dataclass(eq=False)
class Runner:
    """Scheduler that runs the tasks of a study in child processes, at most `jobs` at a time.

    Arguments:
        tasks: tasks of the study.
        root: folder of the run directories.
        data_dir: folder that is searched first for data files.
        device: as in `fit`.
        jobs: number of processes at a time.
        threads: threads of each process.
        measure: settings of the metrics of a finished run.
        on_change: called with the tasks after every check of their states.
        origin: argument of `pvae study`, for the message that says how to continue.
        allow_changes: resume runs of another machine or version, too, as `resume` does.
    """

    tasks: Sequence[Task]
    root: Path
    _: KW_ONLY
    data_dir: Path | None
    device: str
    jobs: int
    threads: int
    measure: Measure
    on_change: Callable[[Sequence[Task]], None]
    origin: str
    allow_changes: bool = False

    def __post_init__(self) -> None:
        self.shelf, self.answer = Shelf(self.root), _Forward(self._pass_on)

    def run(self) -> None:
        """Run until every task is finished, failed or stopped; raises Interrupted after a signal."""
        with self.answer:
            try:
                while any(task.state not in DONE for task in self.tasks):
                    self._look()
                    self.on_change(self.tasks)
                    time.sleep(POLL_SECONDS)
            finally:
                self._end_all()
        if (number := self.answer.signal) is not None:
            done = sum(task.state in ("finished", "found") for task in self.tasks)
            failed = "".join(f"\n{task.case.title}: {task.error}" for task in self.tasks if task.state == "failed")
            message = (
                f"{signal.Signals(number).name}: {done} of {len(self.tasks)} cases are finished; those under way "
                f"go on from their last checkpoints with: pvae study {self.origin}{failed}"
            )
            full = any(task.code == StorageError.exit_code for task in self.tasks)
            raise StorageError(message) if full else Interrupted(message, number)

    def _look(self) -> None:
        for task in self.tasks:
            if task.process is not None and task.process.poll() is not None:
                self._ended(task)
        for task in self.tasks:
            if self.answer.signal is not None and task.state in ("waiting", "held"):
                task.state = "stopped"
            free = sum(other.process is not None for other in self.tasks) < self.jobs
            due = time.monotonic() - task.looked > (LOOK_SECONDS if task.state == "held" else 0)
            if free and due and task.state in ("waiting", "held"):
                self._try(task)

    def _try(self, task: Task) -> None:
        """Start the process of a task, unless its first stage is unfinished or another process is working on it."""
        if task.case.parent is not None and not self._is_ready(task, task.case.parent):
            return
        task.looked, task.error = time.monotonic(), ""
        try:
            task.claim = self._claim(task)
            job = None if task.claim is None else self._job(task)
            if job is None:
                task.state = "held" if task.state != "found" else task.state
            else:
                self._start(task, job)
        except (DataError, StorageError) as problem:
            task.state, task.error = "failed", str(problem).splitlines()[0]
        finally:
            if task.process is None:
                self._let_go(task)

    def _is_ready(self, task: Task, parent: Case) -> bool:
        """Return True if the first stage of a task is finished; if that failed, mark the task as failed too."""
        first = next(other for other in self.tasks if other.case is parent)
        if first.state == "failed":
            task.state, task.error = "failed", "its first stage failed"
        return first.state in ("finished", "found")

    def _claim(self, task: Task) -> Claim | None:
        """Make and return the claim of a task in the folder of runs; None while a worker of another study holds it."""
        name = hashlib.sha256("".join(c.digest for c in (task.case, task.case.parent) if c).encode()).hexdigest()[:32]
        with files.raising(OutputError, f"{self.root}: expected a folder to keep runs in"):
            (self.root / CLAIMS).mkdir(parents=True, exist_ok=True)
        claim = Claim(self.root / CLAIMS / f"{name}.lock", "a case")
        try:
            claim.acquire()
        except BusyError as problem:
            task.error = str(problem)
            return None
        return claim

    def _job(self, task: Task) -> dict[str, Any] | None:
        """Return the next job of a task whose lock is acquired, for a child process.

        None if another process is working on one of its runs, or if all runs are finished and their metrics computed.
        """
        runs = [self.shelf.best(case) for case in task.cases]
        states = ["" if run is None else standing(run) for run in runs]
        if "held" in states:
            return None
        if set(states) == {"finished"}:
            from pvae.analysis.pages.study import kept

            if all(run is not None and kept(run, self.measure) for run in runs):
                task.state = "found"
                return None
            return self._told("measure", run=runs[-1])
        if runs[0] is not None:
            going_on = runs[-1] if runs[-1] is not None and states[-1] == "stopped" else runs[0]
            return self._told("resume", run=runs[0], had=going_on.manifest)
        if task.case.parent is None:
            return self._told("fit", spec=task.case.experiment)
        return self._told("refit", run=self.shelf.best(task.case.parent), spec=task.case.experiment)

    def _told(
        self, kind: str, run: RunDirectory | None = None, spec: Experiment | None = None, had: Mapping[str, Any] = {}
    ) -> dict[str, Any]:
        """Return a job as a dictionary for a child process, with device and threads of the manifest `had`."""
        return {
            "kind": kind,
            "run": None if run is None else str(run.path),
            "spec": None if spec is None else spec.to_toml(),
            "run_dir": str(self.root),
            "data_dir": None if self.data_dir is None else str(self.data_dir),
            "device": had.get("device", self.device),
            "threads": had.get("threads", self.threads),
            "measure": self.measure.model_dump(exclude_none=True),
            "allow_changes": self.allow_changes,
        }

    def _start(self, task: Task, job: Mapping[str, Any]) -> None:
        assert task.claim is not None  # noqa: S101 - there is a job
        threads = str(job["threads"])
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONSAFEPATH": "1"}
        command = [sys.executable, "-m", "pvae", *(f"--import={name}" for name in IMPORTED), ENTRY]
        task.told = tempfile.TemporaryFile()
        with tempfile.TemporaryFile() as written:
            claim = str(task.claim.path.resolve())
            written.write(json.dumps({**job, "claim": claim, "parent": os.getpid()}).encode())
            written.seek(0)
            # A session of its own: a terminal's Ctrl-C reaches this process alone, which passes it on once.
            task.process = Popen(
                command, stdin=written, stdout=DEVNULL, stderr=task.told, env=environment,
                start_new_session=True,
            )  # fmt: skip
        task.state, task.doing, task.error = "running", str(job["kind"]), ""
        try:
            task.claim.hand_over(task.process.pid)  # it waits for that
        except StorageError as problem:
            task.told.write(str(problem).encode())
            task.process.kill()

    def _ended(self, task: Task) -> None:
        process, told = task.process, task.told
        assert process is not None  # noqa: S101 - the caller has asked
        assert told is not None  # noqa: S101
        task.code = code = process.wait()
        if code == 0:
            task.state = "finished"
        elif self.answer.signal is not None and code in STOPPED:
            task.state = "stopped"
        elif code == BusyError.exit_code:
            task.state = "held"
        else:
            task.state, task.error = "failed", _last_line(told) or f"its process ended with {code}"
        told.close()
        task.process = task.told = None
        self._let_go(task)

    def _let_go(self, task: Task) -> None:
        if task.claim is not None:
            task.claim.release()
            task.claim = None

    def _end_all(self) -> None:
        """Terminate all child processes and wait for their end, also after an error."""
        running = [task for task in self.tasks if task.process is not None]
        self._pass_on(signal.SIGTERM)
        for task in running:
            self._ended(task)

    def _pass_on(self, number: int) -> None:
        for task in self.tasks:
            if task.process is not None:
                task.process.send_signal(number)


class _Forward(Answer):
    """Context that forwards signals: the first lets the child processes write checkpoints, a second ends them at once.

    `send` passes a signal on to all of them.
    """

    def __init__(self, send: Callable[[int], None]) -> None:
        super().__init__()
        self.send = send

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self.send(number)


def _last_line(told: IO[bytes]) -> str:
    """Return the last line of a process's output that is not blank, at most 1000 characters."""
    told.seek(0, os.SEEK_END)
    told.seek(max(0, told.tell() - 8192))
    lines = [line for line in told.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:1000] if lines else ""


# ---------------------------------------------------------------------- in the child process


def work(job: Mapping[str, Any]) -> None:
    """Do one job of a study in this process: fit, resume or refit a run if needed, then compute its metrics.

    The metrics of the run's first stage are computed as well. Nothing begins before the claim on the job is handed
    over, so that it lasts as long as the work.
    """
    while Claim(Path(job["claim"]), "a case").holder().get("pid") != os.getpid():
        time.sleep(POLL_SECONDS)
    import torch

    from pvae.analysis.pages.study import figures
    from pvae.runs.run import Run
    from pvae.training.fit import fit
    from pvae.training.resume import fit_stage, resume

    torch.set_num_threads(int(job["threads"]))
    root, device = Path(job["run_dir"]), str(job["device"])
    spec = None if job["spec"] is None else Experiment.from_toml(job["spec"])
    run = None if job["run"] is None else Run.load(job["run"], root=root, data_dir=job["data_dir"])
    if job["kind"] == "resume" and run is not None:
        run = resume(run, device=device, progress=False, allow_changes=bool(job["allow_changes"]))
    elif run is not None and spec is not None:
        run = fit_stage(run, spec, root, device, progress=False)
    elif spec is not None:
        run = fit(spec, run_dir=root, data_dir=job["data_dir"], device=device, progress=False)
    measure = Measure.model_validate(job["measure"])
    while run is not None:
        figures(run, measure)
        first = run.files.first_stage()
        run = None if first is None else Run.load(first.path, data_dir=job["data_dir"])
