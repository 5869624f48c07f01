"""Twelve cases on a real Slurm: one is pre-empted, one killed, one fails; each other one is finished once.

    python -m tests.slurm.check        # as root, with Debian's slurm-wlm and munge

The submitting process is killed as soon as the jobs are there; `pvae study FILE` then waits for them and collects.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.slurm.cluster import begin, cluster, declare, states, until, workers, wrong

EPOCHS = 250
RATES = (1e30, *(0.01 + 0.001 * i for i in range(11)))


def queue() -> list[str]:
    """Return the states of all jobs in the queue."""
    asked = ["squeue", "--noheader", "--array", "--format=%T"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()


def check(folder: Path) -> list[str]:
    """Run the study, disturb it, and return what is not as expected."""
    file, log = declare(folder / "twelve.toml", EPOCHS, RATES), folder / "log.txt"
    first = begin(file, "--on", "slurm", "--slurm", "partition=main", "time=30", "cpus=1", "--jobs=2", log=log)
    until(queue)
    first.kill()
    first.wait()
    until(lambda: 1 in workers() and list(folder.glob("runs/*/*/metrics.jsonl")))
    jobs = subprocess.run(["squeue", "--noheader", "--format=%F"], capture_output=True, text=True).stdout.split()
    subprocess.run(["scontrol", "requeue", f"{jobs[0]}_1"], check=True)
    until(lambda: any(number > 1 for number in workers()))
    time.sleep(1)
    os.kill(next(pid for number, pid in workers().items() if number > 1), signal.SIGKILL)
    begun = len(queue())
    second = begin(file, "--json", log=folder / "told.json")
    code = second.wait(timeout=300)
    told = (folder / "told.json").read_text()
    found = json.loads(told[told.index("{\n") : told.rindex("}") + 1])
    problems = [f"ended with {code}"] if code != 1 else []
    problems += [f"{len(found['runs'])} finished"] if len(found["runs"]) != len(RATES) - 1 else []
    if [(each["case"] == "case 0", ".log: loss not finite" in each["error"]) for each in found["failures"]] != [
        (True, True)
    ]:
        problems.append(f"failures: {found['failures']}")
    submitted = len(list(folder.glob("runs/.studies/twelve/*.json")))
    problems += [f"{submitted} submissions"] if submitted != 1 else []
    problems += [line for line in wrong(folder / "runs", len(RATES), EPOCHS) if "case-0" not in line]
    print(f"{begun} jobs were left when the worker was killed; states {states(folder / 'runs')}")
    return problems


if __name__ == "__main__":
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, cluster(Path(name, "slurm")):
        try:
            problems = check(Path(name))
        except Exception as error:
            problems = [f"{type(error).__name__}: {error}"]
        if problems:
            subprocess.run(
                ["bash", "-c", f"tail -n 20 {name}/log.txt {name}/told.json {name}/runs/.studies/twelve/*.log"]
            )
    print("\n".join(problems) or f"each other case was finished once ({time.monotonic() - begun:.0f} s)")
    sys.exit(bool(problems))
