"""Claims on exclusive work: one process of many gets it; a dead one's is taken over, another host's stands."""

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pvae.errors import BusyError
from pvae.runs.find import Claim, birth_of, this_process

ME = this_process()


def forked(work: Callable[[], int]) -> int:
    """The pid of a child that ends with the code that `work` returns."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    return pid


def lasting(path: Path) -> int:
    """0 where this process got the claim, which it never releases; 75 where another has it."""
    try:
        Claim(path, "a run").acquire()
    except BusyError:
        return 75
    return 0


@pytest.mark.parametrize(
    ("there", "lacking"),
    [
        *((there, None) for there in (None, "", "{", '{"host": 5}', "dead")),
        ("dead", "links"),
        (None, "links"),
        (None, "locks"),
    ],
)
def test_one_process_of_many_gets_the_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str | None, lacking: str | None
) -> None:
    """FAULTS 16, 52 and 53: also over an empty file of earlier versions, garbage, and the claim of a dead process."""

    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "not on this file system")

    path = tmp_path / ".lock"
    if there == "dead":
        os.waitpid(forked(lambda: lasting(path)), 0)
        assert json.loads(path.read_text())["pid"]
    elif there is not None:
        path.write_text(there)
    if lacking is not None:
        monkeypatch.setattr(*((os, "link") if lacking == "links" else (fcntl, "flock")), refused)
    (start, go), (heard, told), (hold, end) = os.pipe(), os.pipe(), os.pipe()

    def one() -> int:
        os.close(go)
        os.close(end)
        os.read(start, 1)
        os.write(told, b"%d " % lasting(path))
        return len(os.read(hold, 1))  # alive until all have tried

    pids, codes = [forked(one) for _ in range(8)], b""
    os.close(go)
    os.close(told)
    while codes.count(b" ") < 8 and (more := os.read(heard, 1)):
        codes += more
    os.close(end)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
    assert sorted(codes.split()) == [b"0", *[b"75"] * 7]
    assert os.listdir(tmp_path) == [".lock"]
    Claim(path, "a run").acquire()  # its process is dead


BOOT, _, TABLE = ME["boot"].partition("/")


@pytest.mark.parametrize(
    ("other", "stands"),
    [
        ({}, "wait for it or stop it.$"),
        ({"birth": None, "boot": None}, "wait for it or stop it.$"),  # of a system that tells neither
        ({"birth": "12"}, None),  # the pid was given to another process
        ({"pid": 2**22 + 1}, None),
        ({"boot": f"before/{TABLE}"}, None),  # the host was started anew
        ({"host": "elsewhere", "pid": 1}, r"process 1 on host elsewhere since .*If it is gone, remove .*\.lock\.$"),
        ({"boot": f"{BOOT}/pid:[1]"}, r"If it is gone, remove .*\.lock\.$"),  # another container of this host
    ],
)
def test_a_claim_stands_while_its_process_may_live(tmp_path: Path, other: dict[str, Any], stands: str | None) -> None:
    """FAULTS 15, 48 and 53."""
    path = tmp_path / ".lock"
    path.write_text(json.dumps({**ME, "since": "then", "token": "", **other}))
    if stands is not None:
        with pytest.raises(BusyError, match=stands), Claim(path, "a run"):
            pass
        path.unlink()  # as the message says
    with Claim(path, "a run"):
        assert json.loads(path.read_text())["birth"] == birth_of(os.getpid())
    assert not path.exists()


def test_a_silent_claim_of_another_host_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 15 and 53: after five minutes without a heartbeat, by the file system's clock; a live one beats."""
    monkeypatch.setattr("pvae.runs.find.BEAT_SECONDS", 0.02)
    path = tmp_path / ".lock"
    with Claim(path, "a run") as mine:
        old = path.stat().st_mtime - 400
        os.utime(path, (old, old))
        while path.stat().st_mtime == old:
            time.sleep(0.01)
        foreign = {**mine.own, "host": "elsewhere", "token": "theirs"}
    path.write_text(json.dumps(foreign))
    for age, stands in ((200, True), (400, False)):
        os.utime(path, (time.time() - age,) * 2)
        assert bool(Claim(path, "a run").holder()) == stands
    os.utime(path)
    ahead = time.time() + 3600
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: ahead)  # the clock of this host alone
        with pytest.raises(BusyError):
            Claim(path, "a run").acquire()
    path.write_text(json.dumps({**foreign, "beats": None}))  # of an earlier version, which had no heart
    os.utime(path, (0, 0))
    assert Claim(path, "a run").holder()
    assert os.listdir(tmp_path) == [".lock"]


def test_a_requeued_job_has_what_it_had_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 48: on whatever host it runs now, at once; another job, or another task of this one, has not."""
    path = tmp_path / ".lock"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for job, stands in ((["7", "0"], False), (["7", "1"], True), (["8", "0"], True), ([], True)):
        path.write_text(json.dumps({**ME, "host": "elsewhere", "job": job}))
        assert bool(Claim(path, "a run").holder()) == stands
