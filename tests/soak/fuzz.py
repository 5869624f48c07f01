"""Drawn declarations and mangled files by the thousand: no untyped error, no hang, bounded memory.

    python -m tests.soak.fuzz --inputs 10000 --seed 1 --log fuzz.log

Every input goes to a worker process that may take so many seconds and so much memory. What is neither read nor refused
by a typed error is written, with its traceback, to the folder named by `--log`; the exit status then is 1.
"""

import argparse
import logging
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from pvae.experiment.experiment import Experiment
from tests.drawn import families, kinds_in, sound, wild
from tests.hostile import Surface, mangled, surfaces, try_bytes, try_declaration
from tests.strange import Tampered, files, tampering, try_file

MIB = 1 << 20
SPAWN = multiprocessing.get_context("spawn")
DECLARED: dict[str, Callable[[], SearchStrategy[Any]]] = {"sound": sound, "wild": wild}
DRAWN: dict[str, Callable[[], SearchStrategy[Any]]] = {"right file": files, "tampered run": tampering}
SHARES = {"right file": 8, "tampered run": 8}
"""Inputs of a surface for one of each other."""


@dataclass
class Answer:
    """What became of an input.

    Arguments:
        outcome: read, refused, trained ...; or the type of an untyped error.
        trace: its traceback.
        seconds: how long it took.
        peak: resident memory of the worker so far, MiB, over what it had before its first input.
    """

    outcome: str
    trace: str = ""
    seconds: float = 0.0
    peak: float = 0.0


def serve(connection: Connection, memory: int) -> None:
    """Answer inputs until there are no more."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message="`torch.jit.script")  # torch's own, as in pyproject.toml
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)  # a run notes it, and goes on with no other
    with tempfile.TemporaryDirectory() as home:
        os.environ["XDG_CACHE_HOME"] = f"{home}/cache"
        table, runs = surfaces(Path(home)), Tampered(Path(home) / "tampered")
        resource.setrlimit(resource.RLIMIT_DATA, (used("VmData") + memory, resource.RLIM_INFINITY))
        before = used("VmHWM")
        connection.send(Answer("ready"))
        while (job := connection.recv()) is not None:
            answer = answered(table, runs, *job)
            answer.peak = (used("VmHWM") - before) / MIB
            connection.send(answer)


def used(key: str) -> int:
    """Bytes of this process, by the kernel's name for them."""
    match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(match[1]) << 10 if match else 0


def answered(table: dict[str, Surface], runs: Tampered, name: str, content: Any) -> Answer:
    """Try one input."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            if name in DECLARED:
                answer = Answer(try_declaration(content, Path(folder)))
            elif name in DRAWN:
                attempt = try_file if name == "right file" else runs.attempt
                answer = Answer(attempt(content, Path(folder)))
            else:
                answer = Answer(try_bytes(table[name], content, Path(folder)))
        except Exception as error:
            answer = Answer(f"UNTYPED {type(error).__name__}", traceback.format_exc())
    answer.seconds = time.monotonic() - started
    return answer


class Worker:
    """One process, its job, and since when."""

    def __init__(self, memory: int) -> None:
        self.connection, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=serve, args=(theirs, memory), daemon=True)
        self.process.start()
        theirs.close()
        self.job: tuple[str, Any] | None = ("start", None)
        self.since = time.monotonic()

    def give(self, job: tuple[str, Any]) -> None:
        """Start on an input."""
        self.job, self.since = job, time.monotonic()
        self.connection.send(job)


@dataclass
class Report:
    """Counts, the slowest input, the highest peak; untyped errors are written down as they come."""

    folder: Path
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    slowest: tuple[float, str] = (0.0, "")
    peak: tuple[float, str] = (0.0, "")
    bad: int = 0
    kinds: set[tuple[str, str]] = field(default_factory=set)
    """Family and kind of every part that was trained."""

    def note(self, job: tuple[str, Any], answer: Answer) -> None:
        """Count an answer."""
        name, content = job
        self.counts[name, answer.outcome] += 1
        if answer.outcome == "trained":
            self.kinds |= kinds_in(Experiment.from_dict(content.raw))
        self.slowest = max(self.slowest, (answer.seconds, name))
        self.peak = max(self.peak, (answer.peak, name))
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.counts.total() % 100 == 0:
            (self.folder / "counts.txt").write_text(f"{self}\n")
        if answer.outcome.startswith("UNTYPED"):
            self.bad += 1
            text = f"{name}: {answer.outcome}\n\n{answer.trace}\n{content!r}\n"
            (self.folder / f"{self.bad:04d}-{name.replace(' ', '-')}.txt").write_text(text)

    @property
    def missing(self) -> list[str]:
        """Kinds of model and fit that no declaration trained with; sources of data are surfaces of their own."""
        known = {(family.__name__, kind) for family in families() for kind in family.members}
        return [f"{family} {kind}" for family, kind in sorted(known - self.kinds) if family not in ("Data", "Column")]

    def __str__(self) -> str:
        lines = [f"{name:<34} {outcome:<28} {n:>6}" for (name, outcome), n in sorted(self.counts.items())]
        total = sum(self.counts.values())
        return "\n".join(
            [
                *lines,
                f"inputs {total}, untyped errors {self.bad}, slowest {self.slowest[0]:.1f} s ({self.slowest[1]}), "
                f"peak memory over the baseline {self.peak[0]:.0f} MiB ({self.peak[1]})",
                f"kinds trained {len(self.kinds)}; never: {', '.join(self.missing) or 'none'}",
            ]
        )


class Pool:
    """Workers that are replaced when they hang or die."""

    def __init__(self, workers: int, memory: int, seconds: float, report: Report) -> None:
        self.memory, self.seconds, self.report = memory, seconds, report
        self.workers = [Worker(memory) for _ in range(workers)]

    def submit(self, job: tuple[str, Any]) -> None:
        """Hand an input to the next worker that is free."""
        while not (free := [worker for worker in self.workers if worker.job is None]):
            self.collect()
        free[0].give(job)

    def collect(self) -> None:
        """Take answers; end what hangs."""
        ready = wait([worker.connection for worker in self.workers if worker.job], timeout=1.0)
        for i, worker in enumerate(self.workers):
            if worker.connection in ready:
                self._take(i, worker)
            elif worker.job and time.monotonic() - worker.since > self.seconds:
                worker.process.kill()
                self._lost(i, worker, "hang")

    def _take(self, i: int, worker: Worker) -> None:
        try:
            answer = worker.connection.recv()
        except (EOFError, ConnectionError):
            worker.process.join()
            return self._lost(i, worker, f"death with status {worker.process.exitcode}")
        if worker.job and answer.outcome != "ready":
            self.report.note(worker.job, answer)
        worker.job = None
        return None

    def _lost(self, i: int, worker: Worker, why: str) -> None:
        if worker.job and worker.job[0] == "start":
            raise RuntimeError(f"a worker never started: {why}")
        if worker.job:
            self.report.note(worker.job, Answer(f"UNTYPED {why}", seconds=time.monotonic() - worker.since))
        self.workers[i] = Worker(self.memory)

    def finish(self) -> None:
        """Wait for what is under way, and let the workers go."""
        while any(worker.job for worker in self.workers):
            self.collect()
        for worker in self.workers:
            worker.connection.send(None)
            worker.process.join()


def feed(pool: Pool, name: str, strategy: SearchStrategy[Any], inputs: int, number: int) -> None:
    """Draw inputs of one surface, and hand each to the pool."""

    @seed(number)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def draw(content: Any) -> None:
        pool.submit((name, content))

    draw()


def main() -> int:
    """Draw, try, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, default=Path("fuzz.log"), help="folder of untyped errors")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--memory", type=int, default=2048, help="MiB an input may allocate")
    parser.add_argument("--seconds", type=float, default=120.0, help="an input may take")
    parser.add_argument("--only", default="", help="surfaces whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        strategies = {name: mangled(surface.seeds) for name, surface in surfaces(Path(home)).items()}
    strategies |= {name: draws() for name, draws in (DECLARED | DRAWN).items()}
    strategies = {name: strategy for name, strategy in strategies.items() if options.only in name}
    weights = {name: SHARES.get(name, 1) for name in strategies}
    report = Report(options.log)
    pool = Pool(options.workers, options.memory * MIB, options.seconds, report)
    for name, strategy in strategies.items():
        feed(pool, name, strategy, max(1, options.inputs * weights[name] // sum(weights.values())), options.seed)
    pool.finish()
    print(report)
    return 1 if report.bad else 0


if __name__ == "__main__":
    sys.exit(main())
