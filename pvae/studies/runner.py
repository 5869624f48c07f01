"""Supervision of the tasks of a study: what is neither in its place nor done is begun, here or on Slurm.

Here child processes do the work; on Slurm arrays of jobs, submitted through submitit, and looked for afterwards.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pvae.component import IMPORTED
from pvae.errors import DataError, DeclarationError, Interrupted, MissingExtraError, StorageError, near, require_extra
from pvae.runs.find import Claim, busy
from pvae.signals import Answer
from pvae.studies.sweep import Measure
from pvae.studies.tasks import DONE, FINISHED, LOOK_SECONDS, Shelf, Task, claimed, own_folder
from pvae.util import read_object, write_atomic
from pvae.util.attempt import Attempt, begin

TRIES = 3
"""Number of times that a task is begun whose workers end without a result."""


def command_of() -> list[str]:
    """Return the command line of a worker, which imports the modules that `--import` named for this process."""
    return [sys.executable, "-P", "-m", "pvae", *(f"--import={name}" for name in IMPORTED), "study-work"]


class Machine:
    """This machine as the place of a study's workers.

    Arguments:
        root: folder of the run directories.
        name: safe name of the study, which has a private folder there.
        jobs: number of workers at a time.
    """

    pause = 0.1
    """Seconds between two looks."""
    queues = False
    """True for a queue, which takes all tasks at once, a second stage after its first one."""
    collects = False
    """True if what failed before is told, not begun again."""
    advice = "those under way go on from their last checkpoints with"
    """Words before the command that continues a study after a signal."""

    def __init__(self, root: Path, name: str, jobs: int) -> None:
        self.root, self.name, self.jobs = root, name, jobs
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        """Workers that end with this process, by the ids of their tasks."""
        self.told: set[str] = set()
        """Ids of those that were told to end."""
        self.due = 0.0
        """Time of the next news, unless a worker ends before."""

    @property
    def folder(self) -> Path:
        """Private folder of the study, created on first access; raises OutputError."""
        return own_folder(self.root, self.name)

    def alone(self) -> AbstractContextManager[object]:
        """Return a context in which no other process begins tasks in this place."""
        return nullcontext()

    def states(self) -> dict[str, str] | None:
        """Return the state of every task that is there by its id; None without news."""
        left = {name: worker for name, worker in self.workers.items() if worker.poll() is None}
        if len(left) == len(self.workers) and time.monotonic() < self.due:
            return None
        self.workers, self.due = left, time.monotonic() + LOOK_SECONDS
        return dict.fromkeys(left, "running")

    def begin(self, orders: Mapping[Task, dict[str, Any]]) -> None:
        """Begin the work on tasks by their orders."""
        for task, order in orders.items():
            self.workers[task.id] = begin(command_of(), order)

    def send(self, number: int) -> None:
        """Send a signal to all workers that end with this process."""
        for name, worker in self.workers.items():
            worker.send_signal(number)
            self.told.add(name)

    def end(self) -> list[int]:
        """End the workers that end with this process, and return their exit codes."""
        for name in self.workers.keys() - self.told:
            self.workers[name].send_signal(signal.SIGTERM)
        return [worker.wait() for worker in self.workers.values()]


@dataclass(eq=False)
class Runner:
    """Supervisor of a study's tasks.

    A worker claims its case itself, so that the claim lasts as long as the work, whatever becomes of this process.

    Arguments:
        tasks: tasks of the study.
        setting: what their orders have in common, such as `run_dir`, `device` and `measure`.
        place: where the workers run.
        on_change: called with the tasks after every check of their states.
        origin: argument of `pvae study`, for the message that says how to continue.
    """

    tasks: Sequence[Task]
    setting: Mapping[str, Any]
    place: Machine
    on_change: Callable[[Sequence[Task]], None]
    origin: str

    def __post_init__(self) -> None:
        self.shelf, self.measure = Shelf(self.place.root), Measure.model_validate(self.setting["measure"])

    def run(self) -> None:
        """Run until every task is finished, failed or stopped; raises Interrupted after a signal."""
        with Forward(self.place.send) as answer:
            try:
                while answer.signal is None and self._open():
                    self._look()
                    self.on_change(self.tasks)
                    time.sleep(self.place.pause)
            finally:
                codes = self.place.end()
        if answer.signal is None:
            return
        for task in self._open() if not self.place.queues else ():
            if task.state != "running" or self._beside(task) or task.state not in DONE:
                task.state = "stopped"
        self.on_change(self.tasks)
        done = sum(task.state in FINISHED for task in self.tasks)
        failed = "".join(f"\n{task.title}: {task.error}" for task in self.tasks if task.state == "failed")
        told = f"{done} of {len(self.tasks)} cases are finished; {self.place.advice}: pvae study {self.origin}{failed}"
        message = f"{signal.Signals(answer.signal).name}: {told}"
        full = StorageError.exit_code in codes
        raise StorageError(message) if full else Interrupted(message, answer.signal)

    def _open(self) -> list[Task]:
        return [task for task in self.tasks if task.state not in DONE]

    def _look(self) -> None:
        """Look at the place, then at the runs of what is not there, and begin what is lost; one process at a time."""
        with self.place.alone():
            if (there := self.place.states()) is None:
                return
            lost: dict[Task, dict[str, Any]] = {}
            firsts = {case: task for task in self.tasks for case in task.cases}
            for task in self._open():
                first = firsts[task.parent] if task.parent else None
                if task.id in there:
                    task.state = there[task.id]
                elif first is not None and first.state == "failed":
                    task.state, task.error = "failed", "its first stage failed"
                elif self.place.queues or len(there) + len(lost) < self.place.jobs:
                    is_ready = first is None or first.state in FINISHED or (self.place.queues and first in lost)
                    if is_ready and (order := self._beside(task)):
                        lost[task] = order
            if lost:
                self.place.begin(lost)

    def _beside(self, task: Task) -> dict[str, Any] | None:
        """Return the order of a task that is to be begun, as it is not in its place; else set its state."""
        is_new, task.error = task.state == "waiting", ""
        try:
            log, holder = self.place.folder / f"{task.id}.log", task.claim(self.place.root).holder()
            doing, _, had = task.left(self.shelf, self.measure)
        except (DataError, StorageError) as problem:
            task.state, task.error = "failed", str(problem).splitlines()[0]
            return None
        failed = log.with_suffix(".failed")
        if holder or doing == "held":
            task.state, task.error = "held", str(busy(self.place.root, "a case", holder, "")) if holder else ""
        elif doing == "found":
            task.state = "found" if is_new else "finished"
        elif task.tries == TRIES or (failed.exists() and (self.place.collects or not is_new)):
            said = failed.read_text() if failed.exists() else "its workers ended without a word"
            task.state, task.error = "failed", f"{log}: {said}"
        else:
            task.state, task.doing = "queued" if self.place.queues else "running", doing
            task.tries += 1
            return {**task.order(self.setting, had), "log": str(log)}
        return None


class Forward(Answer):
    """Context that forwards signals: the first lets the child processes write checkpoints, a second ends them at once.

    `send` passes a signal on to all of them.
    """

    def __init__(self, send: Callable[[int], None]) -> None:
        super().__init__()
        self.send = send

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self.send(number)


KEYS = frozenset("account constraint cpus exclude gpus gres mem nodelist partition qos time".split())
"""Keys of `--slurm`, which are options of `sbatch` but for `cpus`."""
MINUTES = 60
"""Time limit of a job unless set, after which it is requeued."""
AT_A_TIME = 100
"""Number of jobs of a study that run at a time unless set."""


def settings_of(pairs: Sequence[str]) -> dict[str, str]:
    """Return the settings that `--slurm partition=main time=60` lists, after checking them and the cluster's tools.

    Raises:
        DeclarationError: a key is unknown, or has no value.
        MissingExtraError: submitit is not installed, or this machine has no `sbatch`.
    """
    given = {key: value for key, _, value in (pair.partition("=") for pair in pairs)}
    if wrong := [key for key, value in given.items() if key not in KEYS or not value]:
        raise DeclarationError.of("studies.runner.slurm", keys=KEYS, found=wrong[0][:60], hint=near(wrong[0], KEYS))
    require_extra("submitit", "cluster", "--on slurm: expected submitit, which submits jobs")
    if shutil.which("sbatch") is None:
        raise MissingExtraError("--on slurm: expected sbatch on the PATH; got none. Say it on a host of the cluster.")
    return given


def submissions(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what was submitted from a folder, by the name of its jobs."""
    return {f"pvae-{path.stem}": read_object(folder, path.name, 1 << 30) for path in sorted(folder.glob("*.json"))}


class Slurm(Machine):
    """A queue of Slurm as the place of a study's workers; their jobs go on when this process ends.

    Arguments:
        root: folder of the run directories.
        name: safe name of the study.
        jobs: number of jobs that run at a time.
        slurm: settings of new jobs; None to begin nothing but what the queue lost, as it was submitted.
    """

    pause, queues, advice = LOOK_SECONDS, True, "the jobs go on; wait for them with"

    def __init__(self, root: Path, name: str, jobs: int, slurm: Sequence[str] | None) -> None:
        super().__init__(root, name, jobs)
        self.collects, self.given = slurm is None, settings_of(slurm or ())
        if slurm is None:
            self.given = list(submissions(self.folder).values())[-1]["given"]

    def alone(self) -> AbstractContextManager[object]:
        return claimed(Claim(self.folder / "submit.lock", "a submission"))

    def states(self) -> dict[str, str] | None:
        if not (known := submissions(self.folder)):
            return {}
        command = ["squeue", "--noheader", "--array", "--format=%j %K %T", f"--name={','.join(known)}"]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        found = {}
        for name, index, state in map(str.split, asked.stdout.splitlines()):
            for task in known[name]["tasks"][int(index) if index.isdecimal() else 0]:
                found[task] = state.lower()
        return found

    def begin(self, orders: Mapping[Task, dict[str, Any]]) -> None:
        """Submit an array of jobs; a first stage and its second stages belong to one of them."""
        import submitit

        jobs: dict[Any, list[dict[str, Any]]] = {}
        for task, order in orders.items():
            jobs.setdefault(task.parent or (task.cases or [task])[0], []).append(order)
        file = self.folder / f"{time.time_ns():x}-{os.urandom(4).hex()}.json"
        tasks = [[order["id"] for order in each] for each in jobs.values()]
        write_atomic(file, json.dumps({"given": dict(self.given), "tasks": tasks}))
        options = {"cpus-per-task" if key == "cpus" else key: value for key, value in self.given.items()}
        executor = submitit.SlurmExecutor(self.folder / "jobs", 10**6, python=f"{shlex.quote(sys.executable)} -P")
        executor.update_parameters(
            job_name=f"pvae-{file.stem}", array_parallelism=self.jobs, time=10**6, stderr_to_stdout=True,
            srun_args=[f"--cpus-per-task={self.given['cpus']}"] if "cpus" in self.given else [],
            additional_parameters={"requeue": True, "time": MINUTES, **options},
        )  # fmt: skip
        try:
            with executor.batch():
                for each in jobs.values():
                    executor.submit(Attempt(command_of(), each))
        except (submitit.core.utils.FailedJobError, OSError) as error:
            file.unlink()
            told = " ".join(str(error).split())[-300:]
            raise DeclarationError(f"--on slurm: expected sbatch to take the jobs; got: {told}.") from error
