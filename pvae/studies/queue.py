"""Slurm as the place of a study's workers: arrays of jobs, submitted through submitit, and looked for afterwards."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pvae.errors import DeclarationError, MissingExtraError, near, require_extra
from pvae.runs.claim import Claim
from pvae.studies.runner import Machine, command_of
from pvae.studies.tasks import LOOK_SECONDS, Task, claimed
from pvae.util.attempt import Attempt
from pvae.util.files import read_object, write_atomic

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
        found = f"got {wrong[0][:60]!r}{near(wrong[0], KEYS)}"
        raise DeclarationError(f"--slurm: expected KEY=VALUE with a key of {', '.join(sorted(KEYS))}; {found}.")
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
