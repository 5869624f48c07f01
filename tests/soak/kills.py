"""Kill commands at random moments, take the work up again, and compare with what nobody interrupted.

    python -m tests.soak.kills --kills 500 --log kills.json

A parent that has imported everything once forks a child for every attempt, so that an attempt costs milliseconds; the
child runs one command line, and gets SIGKILL, SIGTERM or SIGINT. Signals of the first moments go to processes of their
own, with their imports. Every round of kills ends with commands that are left alone and with `pvae clean`; then
weights, averages, optimisers and metrics are those of the uninterrupted work, bit for bit, no run is there twice, `pvae
verify` finds nothing, and what stands in exports and pages is whole. The log is written after every round, and a second
call with the same log goes on from there.
"""

import argparse
import atexit
import json
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from click.exceptions import Exit as ClickExit

from pvae.__main__ import main as main_of_pvae
from pvae.cli.app import app
from pvae.runs import checkpoint
from pvae.signals import Answer
from pvae.training import loop, recovery
from pvae.training.trainer import Trainer
from pvae.util import files
from pvae.util.files import pretty, write_atomic

PHASES = ("before the command", "in the command", "in the middle of an epoch", "in a write", "after the end")
START, BEGUN, STEP, WRITE, END = range(5)
MOST = {BEGUN: 0.3, STEP: 0.1, WRITE: 0.01}
"""Largest number of seconds from the start of a phase to the signal."""
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}
HANG = 120.0
"""Seconds after which a child that goes on hangs."""
EVERY = (0.05, 0.0, 0.2)
"""Least seconds between two checkpoints, round by round: with 0 every step writes one."""
BAD_STEPS = (31, 77)
"""Steps whose loss is not finite, each before as many rollbacks as there are steps before it in this tuple."""
TINY = """\
name = "tiny"
[data]
source = "digits"
binarize = "dynamic"
splits = {train = [0, 576], validation = [1000, 1050], test = [1350, 1390]}
[latents.z]
dim = 3
[encoder.network]
kind = "mlp"
hidden = [32]
[decoder.network]
kind = "mlp"
hidden = [32]
[train]
epochs = EPOCHS
batch_size = 96
engine = "eager"
average = 0.9
nonfinite = "rollback"
checkpoint_seconds = SECONDS
schedule = {kind = "cosine"}
"""
SECOND = """
[refit.priors.z]
kind = "mixture"
components = 3
[refit.train]
epochs = 12
"""
SWEEP = """
[sweep]
seeds = [0, 1]
[sweep.measure]
evidence = 2
rows = 20
[[sweep.refits]]
label = "mixture"
overrides = {latents = {z = {prior = {kind = "mixture", components = 3}}}, train = {epochs = 6}}
"""

Snapshot = dict[str, Any]


# ---------------------------------------------------------------------- kinds of work


@dataclass(frozen=True)
class Work:
    """A kind of work: how it is declared, and the next command in its folder, in which earlier ones may have died.

    Arguments:
        declared: the declaration, with places for name, epochs and seconds between checkpoints.
        command: the next command line there, at random where there are several.
        share: its part of all kills.
        kills: of a round.
        last: command lines that end a round, each left alone.
    """

    declared: str
    command: Callable[[Path, random.Random], list[str]]
    share: float
    kills: int
    last: tuple[tuple[str, ...], ...] = ()
    epochs: int = 30
    prepared: bool = False
    """True if it works on a finished run, which stands there from the start."""
    injected: bool = False
    """True if some steps are not finite."""
    moments: tuple[int, ...] = (BEGUN, STEP, STEP, WRITE, WRITE)
    """Phases in which it is killed, at even odds."""


def fitted(here: Path, _chance: random.Random) -> list[str]:
    """Resume the first stage that began, which goes on to its second; fit anew if none began."""
    begun = [run for run in runs_in(here) if run.parent.name == "tiny" and '"engine"' in text_of(run / "manifest.json")]
    if begun:
        return ["resume", str(begun[-1]), "--device=cpu", "--quiet"]
    return ["fit", "tiny.toml", "--device=cpu", "--quiet"]


def refitted(here: Path, _chance: random.Random) -> list[str]:
    """Fit a second stage by hand, or resume the one that began."""
    begun = [run for run in runs_in(here) if run.parent.name.endswith("_refit")]
    begun = [run for run in begun if checkpoint.newest_first(run / "checkpoints")]
    if begun:
        return ["resume", str(begun[-1]), "--device=cpu", "--quiet"]
    prior = "latents.z.prior={kind='mixture', components=3}"
    return ["refit", "tiny", prior, "train.epochs=12", "--rows=50", "--device=cpu", "--quiet"]


MAKING = (
    ("report", "tiny", "--evidence-samples=2", "--gap-steps=0", "--figures"),
    ("posterior", "tiny", "--draws=4", "--rows=40"),
    ("sample", "tiny", "-n", "9"),
    ("export", "tiny", "tensorboard"),
    ("export", "tiny", "mlflow"),
    ("compare", "tiny", "other", "--evidence-samples=2", "--out=page"),
)
"""Commands that write reports, exports, figures and pages from finished runs."""
MADE = ("analysis", "report")
STUDY = ("study", "tiny.toml", "--device=cpu", "--jobs=2", "--out=page", "--no-page", "--quiet")
WORKS: Mapping[str, Work] = {
    "fit": Work(TINY, fitted, 0.34, 30),
    "rollback": Work(TINY, fitted, 0.16, 20, injected=True),
    "second stage": Work(TINY + SECOND, fitted, 0.22, 24, epochs=8),
    "refit": Work(TINY, refitted, 0.08, 8, epochs=3, prepared=True),
    "pages and exports": Work(
        TINY, lambda _, chance: list(chance.choice(MAKING)), 0.08, 24, MAKING, 3, True, moments=(BEGUN, BEGUN, WRITE)
    ),
    "study": Work(TINY + SWEEP, lambda *_: list(STUDY), 0.04, 8, epochs=4, moments=(BEGUN,)),
}
EARLY = 0.08
"""Share of kills that hit a process of its own within its first seconds."""
EARLY_COMMANDS = (*MAKING, STUDY, ("fit", "tiny.toml", "--quiet"), ("verify", "tiny"), ("runs",), ("clean", "--apply"))


def runs_in(here: Path) -> list[Path]:
    """Folders of runs, the oldest first."""
    return sorted(here.glob("runs/*/2*"), key=lambda run: run.name)


def text_of(path: Path) -> str:
    """Return the content of a file; nothing if it is not there."""
    return path.read_text() if path.is_file() else ""


# ---------------------------------------------------------------------- children


@dataclass
class Tally:
    """Counts of all rounds so far, which the log holds."""

    seed: int
    kills: dict[str, int] = field(default_factory=dict)
    """By kind of work."""
    rounds: dict[str, int] = field(default_factory=dict)
    phases: dict[str, int] = field(default_factory=dict)
    signals: dict[str, int] = field(default_factory=dict)
    exits: dict[str, int] = field(default_factory=dict)
    """Exit codes of killed children, negative if a signal ended them."""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.kills.values())


@dataclass
class Scene:
    """One folder in which commands run, and one byte by which a child tells where it is."""

    phase: mmap.mmap
    work: Work
    here: Path
    problems: list[str] = field(default_factory=list)
    exported: set[Path] = field(default_factory=set)
    """Folders in which a whole TensorBoard export has been seen."""

    def start(self, command: list[str]) -> int:
        """Fork a child that runs a command line in the folder; its pid."""
        self.phase[0] = START
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, CODES)
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, CODES)
            return pid
        try:
            os.chdir(self.here)
            os.dup2(os.open("errors.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            os.dup2(os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            watched(self.phase, self.work.injected)
            sys.argv = ["pvae", *command]
            Answer().__enter__()  # as `pvae` does first; before it Python's own answer is no matter of ours
            self.phase[0] = BEGUN
            signal.pthread_sigmask(signal.SIG_UNBLOCK, CODES)
            main_of_pvae()
            self.phase[0] = END
            atexit._run_exitfuncs()  # as Python does at its end; the first of them ends the process
        finally:
            os._exit(1)

    def finish(self, command: list[str], codes: tuple[int, ...] = (0,)) -> None:
        """Run a command line and leave it alone."""
        code = waited(self.start(command))
        self.look(command, code, code in codes)

    def look(self, command: list[str], code: int | None, expected: bool) -> None:
        """Note an exit code that was not expected, and a traceback."""
        said = text_of(self.here / "errors.txt")
        if "Traceback" in said or "unexpected error" in said or not expected:
            self.problems.append(f"{' '.join(command)[:80]} ended with {code}: {said[-700:]}")
        if found := re.search(r"at step (\d+): checkpoint written\. Go on with: pvae resume (\S+)", said):
            saved = checkpoint.newest_first(self.here / found[2] / "checkpoints")
            if not saved or int(saved[0].name[-8:]) < int(found[1]):
                self.problems.append(f"a checkpoint of step {found[1]} was told, and {saved[:1]} is there")

    def verify(self) -> None:
        """Clean as on the next day; then every run is whole and finished, and no process is left."""
        for path in self.here.rglob("*"):
            os.utime(path, (path.lstat().st_atime, time.time() - 86_400), follow_symlinks=False)
        self.finish(["clean", "--apply", "--failed"])
        for run in runs_in(self.here):
            self.finish(["verify", str(run), "--strict"])
        left = [path for path in self.here.rglob("*") if path.name.startswith((".tmp-", ".old-", ".part-"))]
        self.problems += [f"{path.relative_to(self.here)} is left after clean" for path in left]


def watched(phase: mmap.mmap, injected: bool) -> None:
    """Let this child tell its parent where it is; some of its steps are not finite if `injected`."""
    step, replace, rename, temporary_for = loop.step, os.replace, os.rename, files.temporary_for

    def at_step(trainer: Trainer, index: torch.Tensor) -> bool:
        phase[0] = STEP
        state = trainer.state
        if injected and state.rollbacks < len(BAD_STEPS) and state.step == BAD_STEPS[state.rollbacks]:
            return recovery.failed_step(trainer, f"loss not finite at step {state.step}: injected")
        return step(trainer, index)

    def at_write(path: Path) -> Path:
        phase[0] = WRITE
        return temporary_for(path)

    def after(move: Callable[..., None]) -> Callable[..., None]:
        def moved(*arguments: Any, **options: Any) -> None:
            move(*arguments, **options)
            phase[0] = BEGUN

        return moved

    loop.step, files.temporary_for = at_step, at_write
    os.replace, os.rename = after(replace), after(rename)


def waited(pid: int) -> int | None:
    """Exit code of a child; None if it hung and was ended."""
    until = time.monotonic() + HANG
    while time.monotonic() < until:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def ended(pid: int) -> bool:
    """Whether a child has ended, which is left to be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def killed(pid: int, first: float, wanted: int, after: float, number: int, phase: mmap.mmap) -> tuple[int | None, int]:
    """Send a signal some seconds into the first phase of a kind after some others; its exit code and where it was."""
    while phase[0] == START and not ended(pid):
        time.sleep(0.0002)
    for seconds in (first, after):
        until = time.monotonic() + seconds
        while time.monotonic() < until and not ended(pid):
            time.sleep(min(0.01, max(0.0, until - time.monotonic())))
        while phase[0] != wanted != BEGUN and not ended(pid):
            time.sleep(0.0002)
    where = END if ended(pid) else phase[0]
    os.kill(pid, number)
    return waited(pid), where


def orphans(here: Path) -> list[int]:
    """Processes that a killed parent left working in a folder, by their working directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "cwd") == str(here) and (entry / "stat").read_text().rpartition(") ")[2][0] != "Z":
                found.append(int(entry.name))
        except OSError:
            continue
    return found


# ---------------------------------------------------------------------- rounds


def left(here: Path) -> Snapshot:
    """Return every tensor and metric that a round left by its name, values of exports, files of pages."""
    found: Snapshot = {}
    for run in runs_in(here):
        seed = re.findall(r"^seed = (\d+)", text_of(run / "spec.toml"), re.MULTILINE)
        name = f"{run.parent.name} {''.join(seed)}"
        while name in found:
            name += ", again"
        saved = checkpoint.latest(run / "checkpoints")
        groups = {} if saved is None else saved.tensors
        tensors = {f"{group}/{key}": value for group, entries in groups.items() for key, value in entries.items()}
        rows = [json.loads(line) for line in text_of(run / "metrics.jsonl").splitlines()]
        state = json.loads(text_of(run / "status.json") or "{}").get("state")
        events = [path.read_bytes() for path in run.glob("exports/tensorboard/*")]
        kept = {
            "tensors": {key: (value.dtype, value.numpy(force=True).tobytes()) for key, value in tensors.items()},
            "metrics": [{key: value for key, value in row.items() if key != "seconds"} for row in rows],
            "state": state, "event files": len(events), "points": sum(map(points_in, events)),
            "files": sorted(str(path.relative_to(run)) for part in MADE for path in run.glob(f"{part}/**/*")),
        }  # fmt: skip
        found[name] = kept
    found["pages"] = sorted(str(path.relative_to(here)) for path in here.glob("page/**/*") if path.is_file())
    found["mlflow"] = mlflow_runs(here)
    return found


def points_in(events: bytes) -> int:
    """Records of a TensorBoard file, each whole by its checksum; -1 if one is torn."""
    from tensorboardX.record_writer import masked_crc32c

    count, place = 0, 0
    while place < len(events):
        size = int.from_bytes(events[place : place + 8], "little")
        content = events[place + 12 : place + 12 + size]
        if masked_crc32c(content) != int.from_bytes(events[place + 12 + size : place + 16 + size], "little"):
            return -1
        count, place = count + 1, place + 16 + size
    return count


def mlflow_runs(here: Path) -> list[tuple[Any, ...]]:
    """Name, state and number of metric values of every run in the MLflow store."""
    import sqlite3

    if not (here / "store.db").is_file():
        return []
    asked = (
        "select name, status, (select count(*) from metrics m where m.run_uuid = r.run_uuid) from runs r "
        "where lifecycle_stage = 'active' order by name"
    )
    with sqlite3.connect(here / "store.db") as store:
        return store.execute(asked).fetchall()


def torn(here: Path, exported: set[Path]) -> Iterator[str]:
    """Return what is not whole in exports and pages right after a kill; earlier exports must be there still."""
    now = {path.parent for path in here.glob("runs/*/*/exports/tensorboard/*") if points_in(path.read_bytes()) > 0}
    yield from (f"{path.relative_to(here)}: an export was there, and none is" for path in exported - now)
    exported |= now
    for path in here.rglob("*.html"):
        if not path.read_bytes().rstrip().endswith(b"</html>"):
            yield f"{path.relative_to(here)} is torn"
    for path in here.rglob("*.json"):
        if path.parent.name.startswith((".tmp-", ".old-")):
            continue
        try:
            json.loads(path.read_text())
        except ValueError:
            yield f"{path.relative_to(here)} is torn"
    for path in here.rglob("*.npz"):
        if b"PK\x05\x06" not in path.read_bytes()[-30:]:
            yield f"{path.relative_to(here)} is torn"


def differences(found: Snapshot, wanted: Snapshot) -> Iterator[str]:
    """What is not as uninterrupted work left it."""
    if lost := sorted(wanted.keys() - found.keys()):
        yield f"lost: {lost}"
    if more := sorted(found.keys() - wanted.keys()):
        yield f"done twice, or left: {more}, {[found[name].get('state') for name in more]}"
    for name in found.keys() & wanted.keys():
        if not isinstance(found[name], dict):
            if found[name] != wanted[name]:
                yield f"{name}: {found[name]} for {wanted[name]}"
            continue
        for part, value in found[name].items():
            want = wanted[name][part]
            if value == want:
                continue
            if isinstance(value, dict):
                value, want = ([k for k in {**value, **want} if value.get(k) != want.get(k)], "the same bits")
            elif isinstance(value, list):
                value, want = ([x for x in value if x not in want][:3], [x for x in want if x not in value][:3])
            yield f"{name}: {part}: {str(value)[:300]} for {str(want)[:300]}"


def scene(folder: Path, name: str, phase: mmap.mmap, seconds: float, source: Path | None) -> Scene:
    """A new folder with the declaration of a kind of work, and the finished runs that it starts from."""
    work = WORKS[name]
    folder.mkdir()
    settings = {"EPOCHS": str(work.epochs), "SECONDS": str(seconds)}
    (folder / "tiny.toml").write_text(re.sub("EPOCHS|SECONDS", lambda found: settings[found[0]], work.declared))
    made = Scene(phase, work, folder)
    if work.prepared and source is not None:
        made_later = shutil.ignore_patterns("*_refit", "analysis", "report", "exports")
        shutil.copytree(source / "runs", folder / "runs", ignore=made_later)
    elif work.prepared:
        made.finish(["fit", "tiny.toml", "--device=cpu", "--quiet"])
        made.finish(["fit", "tiny.toml", 'name="other"', "seed=1", "--device=cpu", "--quiet"])
    return made


def ending(made: Scene, chance: random.Random) -> None:
    """Let the commands of a round run to their ends."""
    for command in made.work.last or (made.work.command(made.here, chance),):
        made.finish(list(command))


def round_of(made: Scene, kills: int, chance: random.Random, lasting: float, tally: Tally, name: str) -> None:
    """Some kills of one kind of work, taken up again after each, and left alone at last."""
    for _ in range(kills):
        command, number = made.work.command(made.here, chance), chance.choice(SIGNALS)
        wanted, first = chance.choice(made.work.moments), chance.choice((0.0, chance.uniform(0, 0.6 * lasting)))
        pid = made.start(command)
        code, where = killed(pid, first, wanted, chance.uniform(0, MOST[wanted]), number, made.phase)
        if where == END:
            made.look(command, code, code in (0, CODES[number]))
            if not made.work.last:
                break
            continue
        count(tally, name, PHASES[where], number, code)
        made.look(command, code, code in (CODES[number], *((0,) if number != signal.SIGKILL else ())))
        until = time.monotonic() + 10
        while (there := orphans(made.here)) and time.monotonic() < until:
            time.sleep(0.05)
        if there:
            made.problems.append(f"{len(there)} processes go on 10 s after {PHASES[where]} {number.name}")
            for each in there:
                os.kill(each, signal.SIGKILL)
        made.problems += [
            f"{command[0]}, {PHASES[where]}, {number.name}: {line}" for line in torn(made.here, made.exported)
        ]
    ending(made, chance)
    made.verify()


def count(tally: Tally, name: str, phase: str, number: int, code: int | None) -> None:
    """Count a kill."""
    keys = (
        (tally.kills, name),
        (tally.phases, phase),
        (tally.signals, signal.Signals(number).name),
        (tally.exits, str(code)),
    )
    for table, key in keys:
        table[key] = table.get(key, 0) + 1


def early(folder: Path, kills: int, chance: random.Random, tally: Tally) -> Iterator[str]:
    """Signals in the first seconds of processes of their own; no word is needed before pvae's first line runs."""
    for _ in range(kills):
        command, number = chance.choice(EARLY_COMMANDS), chance.choice((signal.SIGTERM, signal.SIGINT))
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "pvae", *command], cwd=folder, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        time.sleep(chance.choice((0.3, 1.0, 4.0)) * chance.random() ** 2)
        caught = int(re.findall(r"SigCgt:\s*(\w+)", text_of(Path(f"/proc/{child.pid}/status")) or "SigCgt: 0")[0], 16)
        watching = bool(caught >> (signal.SIGTERM - 1) & 1)
        child.send_signal(number)
        said = child.communicate(timeout=HANG)[1]
        count(tally, "first moments", PHASES[BEGUN if watching else START], number, child.returncode)
        if watching and (child.returncode not in (0, CODES[number]) or "Traceback" in said):
            yield f"{' '.join(command)[:60]}: {number.name} gave {child.returncode}: {said[-600:]}"
        if not watching and child.returncode not in (0, -number, CODES[number]) and "KeyboardInterrupt" not in said:
            yield f"{' '.join(command)[:60]}: {number.name} at the start gave {child.returncode}: {said[-600:]}"


def warm(folder: Path, making: tuple[tuple[str, ...], ...]) -> None:
    """Run every command once in this process, so that its children find all imported."""
    folder.mkdir()
    os.chdir(folder)
    (folder / "tiny.toml").write_text(TINY.replace("EPOCHS", "1").replace("SECONDS", "1"))
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        for command in (("fit", "tiny.toml"), ("fit", "tiny.toml", 'name="other"'), *making, ("verify", "tiny")):
            with suppress(SystemExit, ClickExit):
                app([*command], standalone_mode=False, obj={})
        with suppress(SystemExit, ClickExit):
            app(["refit", "tiny", "latents.z.prior.kind=mixture", "--rows=50"], standalone_mode=False, obj={})


def soak(kills: int, folder: Path, tally: Tally, log: Path | None, only: str, keep: bool) -> None:
    """Rounds of kills until there were so many."""
    phase = mmap.mmap(-1, 1)
    shares = {name: work.share for name, work in WORKS.items()} | {"first moments": EARLY}
    shares = {name: share for name, share in shares.items() if only in name}
    wholes: dict[str, tuple[Path, Snapshot, float]] = {}
    warm(folder / "warm", MAKING if {"pages and exports", "first moments"} & shares.keys() else ())
    while tally.total < kills and len(tally.problems) < 100:
        name = min(shares, key=lambda name: tally.kills.get(name, 0) / shares[name])
        number = tally.rounds.get(name, 0)
        chance, began = random.Random(f"{tally.seed} {name} {number}"), time.monotonic()
        whole = "pages and exports" if name == "first moments" else name
        if whole not in wholes:
            made = scene(folder / f"whole-{whole}", whole, phase, EVERY[0], None)
            since = time.monotonic()
            ending(made, chance)
            lasting = (time.monotonic() - since) / max(1, len(made.work.last))
            tally.problems += [f"{whole}, uninterrupted: {line}" for line in made.problems]
            made.verify()
            wholes[whole] = made.here, left(made.here), lasting
        source, wanted, lasting = wholes[whole]
        if name == "first moments":
            problems = list(early(source, min(10, kills - tally.total), chance, tally))
        else:
            here = folder / f"{name}-{number:03d}".replace(" ", "-")
            made = scene(here, name, phase, EVERY[number % len(EVERY)], source)
            round_of(made, min(made.work.kills, kills - tally.total), chance, lasting, tally, name)
            problems = [*made.problems, *differences(left(here), wanted)]
            if not (problems and keep):
                shutil.rmtree(here)
        tally.problems += [f"{name}, round {number}: {line}" for line in problems]
        tally.rounds[name] = number + 1
        tally.seconds = round(tally.seconds + time.monotonic() - began, 1)
        if log is not None:
            write_atomic(log, pretty(vars(tally)))


def main() -> None:
    """Parse the options, run, print one line, write the log; 1 if anything differed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=None, help="a JSON log, from which a second call goes on")
    parser.add_argument("--only", default="", help="kinds of work whose name holds this")
    parser.add_argument("--keep", type=Path, default=None, help="a folder in which rounds with problems are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads would not survive a fork
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tally = Tally(options.seed)
    if options.log is not None and options.log.exists():
        tally = Tally(**json.loads(options.log.read_text()))
    with tempfile.TemporaryDirectory(dir=options.keep) as folder:
        home = Path(folder).resolve()
        os.environ |= {
            "XDG_CACHE_HOME": f"{home}/cache", "MLFLOW_TRACKING_URI": "sqlite:///store.db", "MPLBACKEND": "agg",
            "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        try:
            soak(options.kills, home, tally, options.log, options.only, options.keep is not None)
        finally:
            if options.keep is not None and tally.problems:
                shutil.copytree(home, options.keep / "kept", dirs_exist_ok=True)
    told = ", ".join(f"{number} {name}" for name, number in tally.kills.items())
    print(f"{tally.total} kills in {tally.seconds:.0f} s: {told}; exits {tally.exits}")
    print("\n".join(tally.problems) or "every round ended as if never killed")
    sys.exit(1 if tally.problems else 0)


if __name__ == "__main__":
    main()
