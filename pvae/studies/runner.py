"""Supervision of the tasks of a study: what is neither in its place nor done is begun, here by child processes."""

import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from types import FrameType
from typing import Any

from pvae.component import IMPORTED
from pvae.errors import DataError, Interrupted, StorageError
from pvae.runs.claim import busy
from pvae.studies.shelf import Shelf
from pvae.studies.sweep import Measure
from pvae.studies.tasks import DONE, FINISHED, LOOK_SECONDS, Task, own_folder
from pvae.util.attempt import begin
from pvae.util.signals import Answer

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
        self.workers: dict[str, Popen[bytes]] = {}
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
