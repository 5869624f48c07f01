"""Workers of studies in child processes, of this machine or of a cluster's job. Standard library only."""

import json
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from subprocess import DEVNULL, Popen
from typing import Any

BUSY, KILLED, KILLS, SECONDS = 75, -signal.SIGKILL, 3, 10.0
"""Exit codes of workers that a job begins again, after some seconds; number of kills that end the job."""
STOPPED = frozenset(code for n in (signal.SIGINT, signal.SIGTERM) for code in (128 + n, -n))
"""Exit codes of processes that a signal ended."""


def begin(command: list[str], order: dict[str, Any]) -> Popen[bytes]:
    """Start and return a worker, which reads its order as JSON from standard input; its messages go to `log`."""
    env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(order["threads"]))
    with tempfile.TemporaryFile() as written, open(order["log"], "ab") as log:
        written.write(json.dumps({**order, "supervisor": os.getpid()}).encode())
        written.seek(0)
        # A session of its own: a terminal's Ctrl-C reaches this process alone, which passes it on once.
        return Popen(command, stdin=written, stdout=DEVNULL, stderr=log, env=env, start_new_session=True)


class Attempt:
    """Function that submitit runs in a job of an array: a first stage and its second stages, or one task.

    submitit keeps it as a pickle in the study's private folder and unpickles it in the job; pvae reads no pickle.

    Arguments:
        command: command line of a worker.
        orders: what the workers read, one after the other.
    """

    def __init__(self, command: list[str], orders: list[dict[str, Any]]) -> None:
        self.command, self.orders = command, orders
        self.child: Popen[bytes] | None = None

    def __call__(self) -> None:
        """Run the workers; the job ends with the largest of their exit codes."""
        if code := max([self._run(order) for order in self.orders]):
            sys.exit(code)

    def _run(self, order: dict[str, Any]) -> int:
        """Run one worker, and again after a kill or while another process has its case; return its exit code."""
        kills = 0
        while True:
            self.child = begin(self.command, order)
            while (code := self.child.poll()) is None:
                time.sleep(0.1)
            kills += code == KILLED
            if code in STOPPED:  # by the queue, which ends or requeues the job
                sys.exit(128 + signal.SIGTERM)
            if code != BUSY and (code != KILLED or kills == KILLS):
                return abs(code)
            time.sleep(SECONDS)

    def checkpoint(self) -> Any:
        """Let the worker write its checkpoint, as the queue asks for before a time-out; submitit then requeues it."""
        from submitit.helpers import DelayedSubmission

        if self.child is not None:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.child.pid, signal.SIGTERM)
                os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT)  # a Popen that waits cannot wait twice
        return DelayedSubmission(Attempt(self.command, self.orders))
