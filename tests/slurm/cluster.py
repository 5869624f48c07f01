"""A study of short cases on a Slurm of one machine, for tests/slurm/check.py and tests/soak/slurm.py."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pvae.runs.find import folders

START = Path(__file__).with_name("start.sh")
STUDY = """\
[data]
source = "digits"
binarize = "threshold"
splits = {{ train = [0, 500], validation = [1000, 1100], test = [1300, 1400] }}
[latents.z]
dim = 2
[encoder.network]
kind = "mlp"
hidden = [8]
[decoder]
likelihood = "bernoulli"
network = {{ kind = "mlp", hidden = [8] }}
[train]
epochs = {epochs}
engine = "eager"
checkpoint_seconds = 1.0
"""
SWEEP = """\
[sweep]
measure = {{ rows = 20, evidence = 2 }}
[sweep.zip]
label = {labels}
train.optimizer.lr = {rates}
"""


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """Start the Slurm in a folder, and stop it; its commands find it through the environment."""
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    subprocess.run(["bash", START, "start", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["bash", START, "stop", folder], check=True)


def declare(file: Path, epochs: int, rates: Sequence[float]) -> Path:
    """Write a study with a case for each learning rate."""
    sweep = SWEEP.format(labels=[f"case {i}" for i in range(len(rates))], rates=list(rates))
    file.write_text(STUDY.format(epochs=epochs) + sweep)
    return file


def begin(file: Path, *options: str, log: Path) -> subprocess.Popen[bytes]:
    """Start `pvae study` of a file, with its runs beside it."""
    command = [sys.executable, "-P", "-m", "pvae", "study", str(file), "--device=cpu", "--no-page", *options]
    with log.open("ab") as said:
        return subprocess.Popen(command, cwd=file.parent, stdout=said, stderr=said, start_new_session=True)


def workers() -> dict[int, int]:
    """Return the pid of each worker that is running in a job, by the number of that job in its array (-1 without)."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            if b"study-work" in (entry / "cmdline").read_bytes():
                told = dict(line.partition(b"=")[::2] for line in (entry / "environ").read_bytes().split(b"\0"))
                if told.get(b"SLURM_CONF", b"").decode() == os.environ["SLURM_CONF"]:
                    found[int(told.get(b"SLURM_ARRAY_TASK_ID", b"-1"))] = int(entry.name)
    return found


def states(runs: Path) -> dict[str, list[str]]:
    """Return the states of all runs by their names; each case has one of its own."""
    return {
        name.name: [json.loads((run / "status.json").read_text())["state"] for run in folders(name)]
        for name in folders(runs)
    }


def epochs(run: Path) -> list[int]:
    """Return the epochs of a run's training metrics, in the order of their lines."""
    path = run / "metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines() if path.exists() else ())
    return [row["epoch"] for row in rows if row["split"] == "train"]


def wrong(runs: Path, cases: int, length: int) -> list[str]:
    """Return what is not one finished run for each of so many cases, with each epoch once."""
    found = states(runs)
    lines = [f"{name}: {there}" for name, there in found.items() if there != ["finished"]]
    lines += [f"{len(found)} of {cases} cases"] if len(found) != cases else []
    for run in (run for name in folders(runs) for run in folders(name)):
        if epochs(run) != list(range(1, length + 1)):
            lines.append(f"{run}: epochs {Counter(epochs(run)).most_common(3)}")
    return lines


def until(ready: object, seconds: float = 120.0) -> None:
    """Wait until a function returns something true."""
    end = time.monotonic() + seconds
    while not ready():  # type: ignore[operator]
        if time.monotonic() > end:
            raise TimeoutError(f"Expected {ready} within {seconds:.0f} s.")
        time.sleep(0.1)
