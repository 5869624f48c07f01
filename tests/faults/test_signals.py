"""Signals at every moment of a command: 130 or 143, one line that is true, no traceback, nothing half done."""

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pvae
from pvae import signals
from pvae.signals import STOPPED
from pvae.training import recovery
from tests.cli_runner import TINY, run_cli
from tests.faults.conftest import FEW_ROWS
from tests.faults.injected import disk_full, without_naps
from tests.runs_shared import assert_same, at_step, fit, resume

NUMBERS = [signal.SIGINT, signal.SIGTERM]


def calling(patch: pytest.MonkeyPatch, place: str, act: Callable[[], object], after: bool = False) -> None:
    """Act once, when the function at a dotted place is called, or has returned."""
    owner, _, name = place.rpartition(".")
    where: Any = pytest.importorskip(owner) if owner[0].islower() else None
    original = getattr(where, name)

    def acting(*arguments: Any, **named: Any) -> Any:
        if not after:
            patch.setattr(where, name, original)
            act()
        found = original(*arguments, **named)
        if after:
            patch.setattr(where, name, original)
            act()
        return found

    patch.setattr(where, name, acting)


def fitting(folder: Path, *more: str) -> list[str]:
    return [
        "fit", "vae", *TINY, *FEW_ROWS, "train.epochs=2", "train.batch_size=50", *more,
        "--quiet", "--device", "cpu", "--run-dir", str(folder),
    ]  # fmt: skip


MOMENTS: dict[str, tuple[str, bool, str]] = {
    "data": ("pvae.training.fit._declared", False, STOPPED),
    "before the lock": ("pvae.training.launch.engine_of", False, STOPPED),
    "in the lock": ("pvae.training.loop.train", False, STOPPED),
    "compile": ("pvae.training.loop.prepare", False, "at step 0, before a step was taken: no checkpoint written, none"),
    "compiled": ("pvae.training.loop.prepare", True, "no checkpoint written, step-00000000 stands. Go on with: pvae"),
    "first step": ("pvae.training.loop.step", False, "at step 1: checkpoint written. Go on with: pvae resume"),
    "end of an epoch": ("pvae.training.loop.end_epoch", False, "at step 3: checkpoint written. Go on with: pvae res"),
    "checkpoint": ("pvae.runs.checkpoint.write", False, "no checkpoint written, none stands. Go on with: pvae resume"),
    "alerts": ("pvae.training.loop.final_alerts", False, STOPPED),
    "message": ("pvae.cli.fitting._summary", False, STOPPED),
}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_fit_is_stopped_at_any_moment_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, number: int
) -> None:
    """FAULTS 14 and 67: 130 or 143, a line that says what there is; the continuation is exact."""
    place, after, said = MOMENTS[moment]
    calling(monkeypatch, place, lambda: os.kill(os.getpid(), number), after)
    _, err = run_cli(*fitting(tmp_path), code=128 + number)
    assert len(err.splitlines()) == 1
    assert err.startswith(f"{signal.Signals(number).name}")
    assert said in err
    monkeypatch.undo()
    if moment in ("data", "before the lock"):
        assert not list(tmp_path.rglob("*"))
        return
    (run,) = tmp_path.glob("*/*")
    assert pvae.Run.load(run).status.get("state") == ("finished" if moment == "message" else "interrupted")
    done = resume(run)
    assert done.status["epoch"] == 2
    assert_same(WHOLE.setdefault("run", fit("vae", tmp_path / "whole", *fitting(tmp_path)[2:-5])), done)


WHOLE: dict[str, pvae.Run] = {}


@pytest.mark.parametrize("number", NUMBERS)
def test_a_report_that_is_stopped_leaves_the_old_one(runs: Path, number: int) -> None:
    """FAULTS 44 and 67: also where what is at work takes KeyboardInterrupt for an error of its own."""

    def translated() -> None:
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt as stop:
            raise ImportError("cannot load an extension") from stop

    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    for act in (lambda: os.kill(os.getpid(), number), translated):
        with pytest.MonkeyPatch.context() as patch:
            calling(patch, "pvae.analysis.pages.report.examine", act)
            _, err = run_cli("report", "vae", "--run-dir", str(runs), code=128 + number)
        assert err == f"{signal.Signals(number).name}: {STOPPED}\n"
    assert before == {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


STOPPER = """
import atexit, os, signal
from pvae.experiment import zoo

class Stop:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGNAL)
        for _ in range(1000):
            pass

def last(entries=zoo.entries):
    Stop()
    return entries()
"""
IN_PROCESSES = {
    "import": "os.kill(os.getpid(), signal.SIGNAL)\nimport torch",
    "finaliser": "zoo.entries = last",
    "exit": "atexit.register(Stop.__del__, None)",
    "first": "",
    "teardown": """
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, signal.SIGNAL)

late = Late()
""",
}
FAST = [("first", signal.SIGTERM), ("exit", signal.SIGINT), ("teardown", signal.SIGTERM)]
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        pytest.param(moment, number, marks=[] if (moment, number) in FAST else slow)
        for moment in IN_PROCESSES
        for number in NUMBERS
    ],
)
def test_a_process_is_stopped_from_its_first_moment_to_its_last(tmp_path: Path, moment: str, number: int) -> None:
    """FAULTS 67: as soon as a handler stands, within an import, where nothing can be raised, and after the work."""
    text = (STOPPER + IN_PROCESSES[moment]).replace("SIGNAL", signal.Signals(number).name)
    (tmp_path / "stopper.py").write_text(text)
    command = [sys.executable, "-m", "pvae", "--import", "stopper", "list"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while moment == "first" and process.poll() is None:
            fields = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
            if int(fields["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1:
                process.send_signal(number)
                break
        out, err = process.communicate(timeout=60)
    ended = (128 + number, f"{signal.Signals(number).name}: {STOPPED}\n") if moment != "teardown" else (0, "")  # none
    assert (process.returncode, err) == ended
    assert ("vae" in out) == (moment in ("exit", "teardown"))


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """FAULTS 14 and 67: with a line."""
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    with signals.Raising() as answer:
        answer.working = True
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):  # as the process goes on here
            os.kill(os.getpid(), signal.SIGINT)
    assert exits == [130]
    assert capfd.readouterr().err == "SIGINT: ended at once, as it came twice\n"


def test_a_signal_before_the_work_ends_the_process(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """FAULTS 67: between the handlers and the first line that catches an exception."""
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    with signals.Raising() as answer, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)  # goes on here, to what it would raise otherwise
    assert exits == [128 + (answer.signal or 0)] == [130]
    assert capfd.readouterr().err == f"SIGINT: {STOPPED}\n"


def test_a_process_ends_with_its_parent() -> None:
    """FAULTS 48: also where the parent is dead before it is looked at."""
    code = """
import os, signal, sys, time
from pvae.signals import Answer, end_with
parent = os.getpid()
if sys.argv[1] == "alive" and os.fork():
    os.kill(parent, signal.SIGKILL)
with Answer():
    end_with(parent)
    time.sleep(30)
"""
    for how, code_of_parent in (("alive", -signal.SIGKILL), ("dead", 143)):
        done = subprocess.run([sys.executable, "-c", code, how], stderr=subprocess.PIPE, text=True, timeout=20)
        assert done.stderr.startswith("SIGTERM: ")  # of the child: the pipe is open until its end
        assert done.returncode == code_of_parent


# ---------------------------------------------------------------------- full disks


@pytest.mark.parametrize("first", [True, False])
def test_a_full_disk_at_a_signal_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    """FAULTS 2 and 49: none was written, which one stands, 74; what stands is gone on with."""
    without_naps(monkeypatch)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        os.kill(os.getpid(), signal.SIGTERM)

    with disk_full(4096 if first else soft), at_step(3, full):
        _, err = run_cli(*fitting(tmp_path), code=74)
    stands = "none" if first else "step-00000000"
    assert f"SIGTERM at step 3: no checkpoint written, {stands} stands" in err
    assert "File too large" in err
    assert ": checkpoint written" not in err
    (run,) = tmp_path.glob("*/*")
    assert pvae.Run.load(run).status["state"] == "interrupted"
    assert resume(run).status["epoch"] == 2


def test_weights_that_are_not_finite_at_a_signal_are_told(tmp_path: Path) -> None:
    """FAULTS 18 and 49: they are in no checkpoint."""

    def spoilt() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        patch.setattr(recovery, "bad_weights", lambda _: ["encoder.weight"])

    with pytest.MonkeyPatch.context() as patch, at_step(3, spoilt):
        _, err = run_cli(*fitting(tmp_path), code=1)
    assert "SIGTERM at step 3: no checkpoint written: weights not finite (encoder.weight)" in err


def no_room(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("command", ["fit", "new"])
@pytest.mark.parametrize("limit", [0, 300, None])
def test_a_full_disk_at_the_beginning_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, limit: int | None
) -> None:
    """FAULTS 65: 74 and the reason, whatever does not fit: a folder, or a part of a file."""
    monkeypatch.chdir(tmp_path)
    arguments = fitting(tmp_path / "runs") if command == "fit" else ["new", "mine"]
    with disk_full(resource.RLIM_INFINITY if limit is None else limit), pytest.MonkeyPatch.context() as patch:
        if limit is None:
            patch.setattr(Path, "mkdir", no_room)
            patch.setattr("pvae.util.files.write_new", no_room)
        _, err = run_cli(*arguments, code=74)
    assert "File too large" in err or "No space left on device" in err
    assert "Choose another" not in err
    assert not list(tmp_path.iterdir())
