"""A hundred cases on a real Slurm, under random kills of tasks, of slurmd and of the submitting process.

    python -m tests.soak.slurm --cases 100      # as root, with Debian's slurm-wlm and munge

`pvae study FILE` is said again whenever it was killed, with `--on slurm` only the first time. At the end every case has
one finished run with each epoch once, and the jobs that were submitted are told.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.slurm.cluster import START, begin, cluster, declare, workers, wrong


def soak(folder: Path, cases: int, length: int, chance: random.Random, every: float) -> tuple[dict[str, int], int]:
    """Run a study to its end under kills; return their numbers by kind, and the exit code of the last call."""
    rates = [0.005 + 0.0001 * i for i in range(cases)]
    file, log = declare(folder / "many.toml", length, rates), folder / "log.txt"
    kills = dict.fromkeys(("worker", "job", "requeue", "slurmd", "study"), 0)
    study = begin(file, "--on", "slurm", "--jobs=2", log=log)
    due = time.monotonic() + 3 * every
    while study.poll() is None or study.returncode == -signal.SIGKILL:
        if study.returncode == -signal.SIGKILL:
            study = begin(file, log=log)
        time.sleep(0.2)
        if time.monotonic() < due or not (there := workers()):
            continue
        kind, number = chance.choice(list(kills)), chance.choice(list(there))
        with suppress(OSError, ValueError):
            if kind == "worker":
                os.kill(there[number], signal.SIGKILL)
            elif kind == "job":  # its own process, and with it all
                os.kill(
                    int(Path(f"/proc/{there[number]}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL
                )
            elif kind == "requeue":
                jobs = subprocess.run(["squeue", "-h", "-t", "R", "-o", "%i"], capture_output=True, text=True)
                subprocess.run(
                    ["scontrol", "requeue", chance.choice(jobs.stdout.split() or ["0"])], capture_output=True
                )
            elif kind == "slurmd":
                os.kill(int((folder / "slurm" / "slurmd.pid").read_text()), signal.SIGKILL)
                time.sleep(chance.uniform(0, 5))
                subprocess.run(["bash", START, "restart", folder / "slurm"], check=True)
            else:
                study.kill()
                study.wait()
            kills[kind] += 1
        due = time.monotonic() + chance.expovariate(1 / every)
    return kills, study.returncode


def main() -> None:
    """Parse the options, run, and print one line for each problem; 1 if there is one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--every", type=float, default=8.0, help="mean seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, cluster(Path(name, "slurm")):
        folder, since = Path(name), time.monotonic()
        kills, code = soak(folder, options.cases, options.epochs, random.Random(options.seed), options.every)
        problems = wrong(folder / "runs", options.cases, options.epochs)
        problems += [] if code == 0 else [f"ended with {code}: {(folder / 'log.txt').read_text()[-2000:]}"]
        records = [json.loads(path.read_text())["tasks"] for path in folder.glob("runs/.studies/many/*.json")]
        print(f"{sum(map(len, records))} jobs in {len(records)} submissions, {time.monotonic() - since:.0f} s, {kills}")
    print("\n".join(problems) or f"each of {options.cases} cases was finished once")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
