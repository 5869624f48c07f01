"""Kill a fit at random moments, resume it, and compare: its last weights must be the uninterrupted fit's, bit for bit.

    python tests/soak/kills.py --kills 500 --log kills.json

A parent that has imported everything once forks a child for every attempt, so that an attempt costs milliseconds. The
child fits, or resumes what an earlier one left; the parent kills it, four times in five by SIGKILL, else by SIGTERM.
Every round of kills ends with a child that is left alone; then weights, averages, optimiser and metrics are compared.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pvae
from pvae.data import load
from pvae.errors import Interrupted
from pvae.experiment.experiment import Experiment
from pvae.runs import checkpoint
from pvae.training import loop
from pvae.training.trainer import Trainer

BEFORE, RESUMING = "before the first checkpoint", "while resuming"
PHASES = (RESUMING, "in the middle of an epoch", "in the write of a checkpoint", "after the end")
START, STEP, WRITE, END = range(4)
MOMENTS = ((START, 0.25), (STEP, 0.1), (STEP, 0.1), (WRITE, 0.01))
"""When a child is killed, one of these at even odds: the phase waited for, and the most seconds into it."""
ROUND = 15
"""Kills of a round, after which a child is left alone; the first two come while it starts."""
TERM = 0.2
"""Share of kills that are SIGTERM."""
DECLARED: dict[str, Any] = {
    "name": "soak",
    "data": {"source": "digits", "binarize": "dynamic"},
    "latents": {"z": {"dim": 3}},
    "encoder": {"network": {"kind": "mlp", "hidden": [32]}},
    "decoder": {"network": {"kind": "mlp", "hidden": [32]}},
    "train": {"epochs": 30, "batch_size": 96, "engine": "eager", "average": 0.9, "schedule": {"kind": "cosine"}},
}
EVERY = (0.05, 0.0, 0.2)
"""Least seconds between two checkpoints, round by round: with 0 every step writes one."""


@dataclass
class Tally:
    """What happened so far."""

    kills: Counter[str] = field(default_factory=Counter)
    """By phase."""
    signals: Counter[str] = field(default_factory=Counter)
    exits: Counter[int] = field(default_factory=Counter)
    """Of children, as `os.waitstatus_to_exitcode` gives them."""
    rounds: int = 0
    strays: int = 0
    """Temporaries that kills left and the next start swept."""
    problems: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """All kills."""
        return sum(self.kills.values())


def watched(phase: mmap.mmap) -> None:
    """Let a child tell its parent where it is, in one shared byte."""
    write, step = checkpoint.write, loop.step

    def at_step(trainer: Trainer, index: Tensor) -> bool:
        phase[0] = STEP
        return step(trainer, index)

    def told(*arguments: Any, **options: Any) -> Path:
        phase[0] = WRITE
        try:
            return write(*arguments, **options)
        finally:
            phase[0] = STEP

    checkpoint.write = told
    loop.step = at_step


def attempt(folder: Path, experiment: Experiment) -> int:
    """Fit, or go on with what is there; the exit code that the command line would give."""
    try:
        begun = [run for run in sorted(folder.glob("*/*")) if b'"engine"' in (run / "manifest.json").read_bytes()]
        if begun:
            pvae.resume(begun[-1], device="cpu", progress=False)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            pvae.fit(experiment, run_dir=folder, device="cpu", progress=False)
    except Interrupted as stopped:
        return stopped.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def forked(folder: Path, experiment: Experiment, phase: mmap.mmap) -> int:
    """A child at work; its pid."""
    phase[0] = START
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            watched(phase)
            code = attempt(folder, experiment)
            phase[0] = END
            sys.stderr.flush()
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> bool:
    """Whether a child has ended, which is left to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def killed(pid: int, wanted: int, after: float, number: int, phase: mmap.mmap) -> tuple[int, int]:
    """Send a signal some seconds into a phase, unless the child ends before; its exit code and where it was."""
    while phase[0] != wanted and not ended(pid):
        time.sleep(0.0002)
    time.sleep(after)
    where = phase[0]
    os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), where


def left(folder: Path) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Every tensor of the newest checkpoint, and the metrics without their times."""
    (run,) = folder.glob("*/*")
    saved = checkpoint.latest(run / "checkpoints")
    assert saved is not None
    tensors = {f"{group}/{key}": value for group, entries in saved.tensors.items() for key, value in entries.items()}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return tensors, [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def strays(folder: Path) -> int:
    """Temporaries among the checkpoints."""
    return len([*folder.glob("*/*/checkpoints/.*")])


def differences(folder: Path, wanted: tuple[dict[str, Tensor], list[dict[str, Any]]]) -> Iterator[str]:
    """What is not as the uninterrupted fit left it."""
    tensors, rows = left(folder)
    if tensors.keys() != wanted[0].keys():
        yield f"other tensors: {sorted(tensors.keys() ^ wanted[0].keys())}"
        return
    yield from (f"{key} differs" for key, value in tensors.items() if not torch.equal(value, wanted[0][key]))
    if len(rows) != len(wanted[1]):
        yield f"{len(rows)} rows of metrics for {len(wanted[1])}"
    for row, want in zip(rows, wanted[1], strict=False):
        if unlike := [key for key in {**row, **want} if row.get(key) != want.get(key)]:
            yield f"metrics of epoch {want['epoch']} differ in {', '.join(unlike)}: {row} for {want}"
    if strays(folder):
        yield f"{strays(folder)} temporaries are left"


def round_of(
    folder: Path, experiment: Experiment, kills: int, chance: random.Random, phase: mmap.mmap, tally: Tally
) -> None:
    """One fit, killed so many times and resumed to its end."""
    for kill in range(kills):
        number = signal.SIGTERM if chance.random() < TERM else signal.SIGKILL
        wanted, most = MOMENTS[0] if kill < 2 else chance.choice(MOMENTS)
        code, where = killed(forked(folder, experiment, phase), wanted, chance.uniform(0, most), number, phase)
        tally.exits[code] += 1
        if code == 0 or where == END:
            break
        if code not in (-number, 128 + number):
            tally.problems.append(f"a child ended with {code} {PHASES[where]}")
            return
        first = where == START and not [*folder.glob("*/*/checkpoints/step-*")]
        tally.kills[BEFORE if first else PHASES[where]] += 1
        tally.signals[number.name] += 1
        tally.strays += strays(folder)
    code = os.waitstatus_to_exitcode(os.waitpid(forked(folder, experiment, phase), 0)[1])
    tally.exits[code] += 1
    if code != 0:
        tally.problems.append(f"the child that was left alone ended with {code}")


def soak(kills: int, seed: int, folder: Path) -> Tally:
    """Rounds of kills until there were so many, each compared with the fit that nobody killed."""
    chance, phase, tally = random.Random(seed), mmap.mmap(-1, 1), Tally()
    experiment = Experiment.from_dict(DECLARED)
    pair = experiment.build(load(experiment.data).shape)  # brings in scikit-learn, once for all children
    experiment.train.optimizer.build(pair.parameters())  # and torch's compiler, which every optimiser imports
    round_of(folder / "whole", experiment, 0, chance, phase, tally)
    wanted = left(folder / "whole")
    while tally.total < kills and not tally.problems:
        declared = experiment.with_overrides(f"train.checkpoint_seconds={EVERY[tally.rounds % len(EVERY)]}")
        here = folder / f"round-{tally.rounds:03d}"
        round_of(here, declared, min(ROUND, kills - tally.total), chance, phase, tally)
        if not tally.problems:
            tally.problems += [f"round {tally.rounds}: {line}" for line in differences(here, wanted)]
            shutil.rmtree(here)
        tally.rounds += 1
    return tally


def main() -> None:
    """Parse the options, run, print one line, write the log; 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=None, help="where to write a JSON log")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads would not survive a fork
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tally = soak(options.kills, options.seed, Path(folder))
    seconds = time.monotonic() - started
    log = {
        "kills": tally.total, "seed": options.seed, "rounds": tally.rounds, "seconds": round(seconds, 1),
        "phases": {name: tally.kills[name] for name in (BEFORE, *PHASES[:3])}, "signals": dict(tally.signals),
        "exits": {str(code): count for code, count in sorted(tally.exits.items())},
        "temporaries_swept": tally.strays, "problems": tally.problems,
    }  # fmt: skip
    if options.log is not None:
        options.log.write_text(json.dumps(log, indent=2) + "\n")
    print(
        f"{tally.total} kills in {tally.rounds} rounds, {seconds:.0f} s: "
        + ", ".join(f"{tally.kills[name]} {name}" for name in (BEFORE, *PHASES[:3]))
        + (f"; {'; '.join(tally.problems)}" if tally.problems else "; every round ended bit for bit as if never killed")
    )
    sys.exit(1 if tally.problems else 0)


if __name__ == "__main__":
    main()
