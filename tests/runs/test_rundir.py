"""The files of a run: locked, atomic, readable after a crash. Numbers are rows of the faults table."""

import json
import math
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from pvae.errors import BusyError, DataError, DeclarationError, Interrupted, OutputError
from pvae.runs import find
from pvae.runs.find import slug
from pvae.runs.rundir import RunDirectory, list_runs
from pvae.util.files import write_atomic

HERE = Path(__file__).parents[2]
HOST = platform.node()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs", "vamp")


def ago(**time: float) -> str:
    return (datetime.now(UTC) - timedelta(**time)).isoformat()


def state_of(run: RunDirectory) -> str:
    (row,) = list_runs(run.path.parents[1])
    return str(row["state"])


@contextmanager
def child(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A second process with ``run`` opened on the first argument; it ends when its input does."""
    start = "import sys\nfrom pvae.runs.rundir import RunDirectory\nrun = RunDirectory.open(sys.argv[1])\n"
    command = [sys.executable, "-c", start + code, *arguments]
    with subprocess.Popen(
        command, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        yield process


# -- importing


def test_importing_takes_the_standard_library_alone() -> None:
    code = """
import sys
before = set(sys.modules)
import pvae.runs.rundir
new = {name.partition('.')[0] for name in set(sys.modules) - before}
print(*sorted(new - sys.stdlib_module_names))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pvae"]


# -- row 37: names


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "vamp": "vamp", "My run, no. 2": "My-run-no.-2", "../../etc/passwd": "etc-passwd", "naïve": "naive",
        "a\0b\x1b[31m\nc": "a-b-31m-c", "🙂 vae": "vae", "-rf": "rf", ".hidden": "hidden", "chain": "chain",
        "C:\\x": "C-x",
    }.items(),
)  # fmt: skip
def test_37_a_slug_keeps_what_is_safe(name: str, expected: str) -> None:
    """FAULTS 37."""
    assert slug(name) == expected


@pytest.mark.parametrize("name", ["", ".", "..", "/", "🙂", "latest", "NUL", "x" * 300, "\ud800", "\u202e"])
def test_37_a_name_with_little_to_keep_gets_a_digest(name: str) -> None:
    """FAULTS 37."""
    assert re.fullmatch(r"[A-Za-z]+-[0-9a-f]{8}", slug(name))
    assert slug(name) != slug(name + "🙃" + "y" * 70)


@settings(max_examples=300)
@given(st.text(st.characters(), max_size=100))
def test_37_every_slug_is_a_safe_folder_name(name: str) -> None:
    """FAULTS 37."""
    found = slug(name)
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", found)
    assert slug(found) == found


@pytest.mark.parametrize("name", ["a/../b", "🙂", "x" * 300, "\x1b]0;title\x07", "\ud800", "latest", ""])
def test_37_a_run_of_any_name_is_created_listed_and_found(tmp_path: Path, name: str) -> None:
    """FAULTS 37."""
    run = RunDirectory.create(tmp_path, name)
    assert run.path.parent.parent == tmp_path
    assert run.manifest["name"] == name
    assert [row["name"] for row in list_runs(tmp_path)] == [name]
    assert RunDirectory.open(f"{run.path.parent.name}/{run.path.name}", root=tmp_path).path == run.path


# -- creating and opening


def test_a_run_id_is_its_start_and_eight_digits(run: RunDirectory) -> None:
    assert re.fullmatch(r"\d{8}T\d{6}Z-[0-9a-f]{8}", run.path.name)
    assert run.manifest == {"name": "vamp", "id": run.path.name, **{k: run.manifest[k] for k in ("started", "order")}}
    assert abs((datetime.fromisoformat(run.manifest["started"]) - datetime.now(UTC)).total_seconds()) < 60


def test_17_runs_of_the_same_second_are_apart(tmp_path: Path) -> None:
    """FAULTS 17."""
    assert len({RunDirectory.create(tmp_path, "vamp").path for _ in range(30)}) == 30


def test_17_a_run_id_that_is_taken_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 17."""
    monkeypatch.setattr(find, "new_run_id", iter(["same", "same", "same", "other"]).__next__)
    assert [RunDirectory.create(tmp_path, "vamp").path.name for _ in range(2)] == ["same", "other"]
    monkeypatch.setattr(find, "new_run_id", lambda: "same")
    with pytest.raises(OutputError, match="a hundred run ids"):
        RunDirectory.create(tmp_path, "vamp")


def test_42_a_root_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    """FAULTS 42."""
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="expected a folder to write runs into; got ") as caught:
        RunDirectory.create(tmp_path / "file", "vamp")
    assert caught.value.exit_code == 73


def test_open_takes_a_path_a_name_a_name_with_id_and_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ["20260101T000000Z-ffffffff", "20260102T000000Z-00000000", "20260103T000000Z-00000000"]
    monkeypatch.setattr(find, "new_run_id", iter(ids).__next__)
    first, second, other = (RunDirectory.create(tmp_path / "runs", name) for name in ("my vamp", "my vamp", "vq"))
    monkeypatch.chdir(tmp_path)
    table: list[tuple[Path | str, RunDirectory]] = [
        (first.path, first), (str(first.path), first), (f"my-vamp/{first.path.name}", first), ("latest", other),
        *((name, second) for name in ("my vamp", "my-vamp", "runs/my-vamp")),
    ]  # fmt: skip
    for path, expected in table:
        assert RunDirectory.open(path).path == expected.path
        if "runs" not in str(path):
            assert RunDirectory.open(path, root=tmp_path / "runs").path == expected.path


@pytest.mark.parametrize("path", ["vampp", "", "latest", "a\0b", "x" * 5000, "vamp/nothing"])
def test_open_refuses_what_is_no_run(tmp_path: Path, path: str) -> None:
    (tmp_path / "vamp" / "id").mkdir(parents=True)
    with pytest.raises(DeclarationError, match="Expected a run directory") as caught:
        RunDirectory.open(path, root=tmp_path)
    assert caught.value.exit_code == 2
    assert ("did you mean 'vamp'" in str(caught.value)) == (path == "vampp")


def test_readers_never_see_half_a_status(run: RunDirectory) -> None:
    run.update_status(filler="x" * 50_000, step=0)
    stop = threading.Event()

    def heartbeat() -> None:
        while not stop.wait(0.001):
            run.update_status(beat=1)

    thread = threading.Thread(target=heartbeat)
    thread.start()
    for step in range(100):
        run.update_status(step=step)
        assert run.status()["step"] == step  # no update of the other thread undoes this one
    stop.set()
    thread.join()
    assert run.status()["beat"] == 1


# -- manifest, spec, folders


@pytest.mark.parametrize("key", ["name", "device", "engine", "declared", "imports", "data", "trainable", "parent"])
def test_a_manifest_of_other_kinds_is_refused(run: RunDirectory, key: str) -> None:
    found = run.manifest
    for wrong in (None, 3):
        (run.path / "manifest.json").write_text(json.dumps({**found, key: wrong}))
        if wrong is None and key in ("trainable", "parent"):
            assert run.manifest[key] is None
        else:
            with pytest.raises(DataError, match=f"expected .* for '{key}'; got '{wrong}'"):
                _ = run.manifest


def test_the_manifest_keeps_its_identity(run: RunDirectory) -> None:
    identity = run.manifest
    run.write_manifest(
        {"seed": 1, "name": "other", "order": 0, "loss": math.inf, "path": Path("x"), "n": np.float32(0.5)}
    )
    assert run.manifest == {**identity, "seed": 1, "loss": None, "path": "x", "n": 0.5}


def test_the_spec_comes_back(run: RunDirectory) -> None:
    run.write_spec('name = "vämp"\n')
    assert run.spec_text == 'name = "vämp"\n'
    (run.path / "spec.toml").write_bytes(b"\xff")
    with pytest.raises(DataError, match="expected UTF-8"):
        _ = run.spec_text
    (run.path / "spec.toml").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(DataError, match="at most 1048576 bytes"):
        _ = run.spec_text


def test_folders_are_made_on_demand(run: RunDirectory) -> None:
    assert not (run.path / "report").exists()
    for _ in range(2):
        assert run.analysis.is_dir()
        assert run.report.is_dir()


READERS: dict[str, Callable[[RunDirectory], object]] = {
    "manifest.json": lambda run: run.manifest,
    "status.json": RunDirectory.status,
    "metrics.jsonl": RunDirectory.metrics_rows,
    "events.jsonl": RunDirectory.events,
    "spec.toml": lambda run: run.spec_text,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_36_nothing_is_read_outside_the_run(run: RunDirectory, tmp_path: Path, name: str, kind: str) -> None:
    """FAULTS 36."""
    (tmp_path / "secret").write_text('{"secret": 1}\n')
    path = run.path / name
    path.unlink(missing_ok=True)
    make = {"link": lambda: path.symlink_to(tmp_path / "secret"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}
    make[kind]()
    with pytest.raises(DataError, match=f"{name}: expected a plain readable file"):
        READERS[name](run)


@pytest.mark.parametrize("name", ["analysis", "report"])
def test_36_a_folder_of_the_run_is_no_link_and_no_file(run: RunDirectory, tmp_path: Path, name: str) -> None:
    """FAULTS 36."""
    (run.path / name).symlink_to(tmp_path)
    with pytest.raises(DataError, match="expected a folder inside the run; got a link"):
        getattr(run, name)
    (run.path / name).unlink()
    (run.path / name).touch()
    with pytest.raises(OutputError, match="expected a folder; got File exists"):
        getattr(run, name)


def test_36_nothing_is_written_through_a_link(run: RunDirectory, tmp_path: Path) -> None:
    """FAULTS 36."""
    (tmp_path / "precious").write_text("keep")
    for name in (".lock", "metrics.jsonl", "events.jsonl", "status.json"):
        (run.path / name).symlink_to(tmp_path / "precious")
    run.log_metrics({"step": 1})
    run.log_event("alert", "text")
    with pytest.raises(DataError, match=r"\.lock: expected a plain file"), run.lock():
        pass
    assert (tmp_path / "precious").read_text() == "keep"
    assert run.degraded is not None


# -- row 43: metrics and events


def test_metrics_are_finite_json(run: RunDirectory) -> None:
    run.log_metrics({"step": 1, "elbo": -0.1, "kl": math.nan, "z": {"max": -math.inf}, "n": np.float64(2.5)})
    run.log_metrics({"step": np.int64(2), "elbo": 1e-300, "flag": True, "none": None})
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=lambda _: pytest.fail("not JSON")) for line in lines] == run.metrics_rows()
    first = {"step": 1, "elbo": -0.1, "kl": None, "z": {"max": None}, "n": 2.5}
    assert run.metrics_rows() == [first, {"step": 2, "elbo": 1e-300, "flag": True, "none": None}]
    assert run.degraded is None


def test_metrics_are_a_table(run: RunDirectory) -> None:
    assert run.metrics().empty
    run.log_metrics({"step": 1, "elbo": math.nan})
    run.log_metrics({"step": 2, "elbo": -3.5})
    table = run.metrics()
    assert list(table["step"]) == [1, 2]
    assert table["elbo"].dtype == float
    assert math.isnan(table["elbo"][0])


def test_43_a_line_torn_anywhere_is_dropped_by_readers_and_cut_by_writers(run: RunDirectory) -> None:
    """FAULTS 43."""
    path = run.path / "metrics.jsonl"
    run.log_metrics({"step": 1})
    run.log_metrics({"step": 2, "elbo": -1.5})
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole) + 1):
        path.write_bytes(whole[:length])
        survivors = [1, 2] if length >= len(whole) - 1 else [1]  # only the line's end is missing: nothing is lost
        assert [row["step"] for row in run.metrics_rows()] == survivors
        run.log_metrics({"step": 3})
        assert [row["step"] for row in run.metrics_rows()] == [*survivors, 3]
        assert path.read_bytes().endswith(b'}\n{"step": 3}\n')


@pytest.mark.parametrize("tail", [b"\0" * 100, b"\xff\xfe", b"[1, 2]", b"[" * 100_000, b'"text"', b"{'a': 1}"])
def test_43_a_last_line_of_garbage_is_dropped(run: RunDirectory, tail: bytes) -> None:
    """FAULTS 43."""
    run.log_metrics({"step": 1})
    run.log_event("alert", "one")
    for name, end in (("metrics.jsonl", b""), ("events.jsonl", b"\n")):
        with (run.path / name).open("ab") as file:
            file.write(tail + end)
    assert run.metrics_rows() == [{"step": 1}]
    assert [event["message"] for event in run.events()] == ["one"]
    run.log_metrics({"step": 2})
    assert run.metrics_rows() == [{"step": 1}, {"step": 2}]


def test_43_a_damaged_line_in_the_middle_is_named(run: RunDirectory) -> None:
    """FAULTS 43."""
    (run.path / "metrics.jsonl").write_text('{"step": 1}\ngarbage\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl: .*got garbage in line 2. Delete that line"):
        run.metrics_rows()


def test_truncate_metrics_drops_what_a_resumed_run_writes_again(run: RunDirectory) -> None:
    run.truncate_metrics(3)  # before the first row
    assert run.metrics_rows() == []
    for epoch in range(6):
        run.log_metrics({"epoch": epoch, "elbo": 0.1 * epoch})
    run.log_metrics({"note": "no epoch"})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"epoch": 2, "el')
    run.truncate_metrics(3)
    assert [row.get("epoch") for row in run.metrics_rows()] == [0, 1, 2, 3, None]
    assert run.metrics_rows()[3]["elbo"] == 0.1 * 3


def test_events_keep_kind_message_and_fields(run: RunDirectory) -> None:
    run.log_event("alert", "collapsed \x1b[31m", site="z", nats=math.inf)
    (event,) = run.events()
    assert datetime.fromisoformat(event.pop("time")).tzinfo is UTC
    assert event == {"kind": "alert", "message": "collapsed \x1b[31m", "site": "z", "nats": None}
    assert b"\x1b" not in (run.path / "events.jsonl").read_bytes()


# -- row 3: nowhere to write


def test_03_metrics_that_cannot_be_written_degrade_the_run(run: RunDirectory) -> None:
    """FAULTS 3."""
    (run.path / "metrics.jsonl").mkdir()
    run.log_metrics({"step": 1})
    assert run.degraded == "metrics.jsonl could not be written: Is a directory"
    assert run.status()["degraded"] == run.degraded
    (run.path / "events.jsonl").mkdir()
    run.log_event("alert", "text")
    assert run.degraded.startswith("metrics.jsonl"), "the first reason is the one to keep"


def test_03_a_status_that_cannot_be_written_degrades_the_run(run: RunDirectory) -> None:
    """FAULTS 3."""
    (run.path / "status.json").mkdir()
    run.update_status(state="running")
    assert run.degraded is not None
    assert "not a plain file" in run.degraded


def test_03_a_row_that_fits_only_half_is_not_written_at_all(run: RunDirectory) -> None:
    """FAULTS 3."""
    run.log_metrics({"step": 0})
    code = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for step in range(1, 100):
    run.log_metrics({"step": step, "filler": "x" * 70})
print(run.degraded)
"""
    with child(code, str(run.path)) as process:
        out, err = process.communicate()
    assert out == "metrics.jsonl could not be written: File too large\n", err
    steps = [row["step"] for row in run.metrics_rows()]
    assert steps == list(range(len(steps)))
    assert len(steps) > 10
    assert (run.path / "metrics.jsonl").read_bytes().endswith(b"}\n")
    assert "File too large" in run.status()["degraded"]


# -- row 16: one owner

HOLD = """
with run.lock():
    run.update_status(state="running")
    print("locked", flush=True)
    sys.stdin.read()
"""
TRY = """
from pvae.errors import PvaeError
try:
    with run.lock():
        print("got it")
except PvaeError as problem:
    print(problem, file=sys.stderr)
    sys.exit(problem.exit_code)
"""


def attempt(run: RunDirectory) -> tuple[int, str]:
    with child(TRY, str(run.path)) as process:
        _, err = process.communicate()
    return process.returncode, err


def test_16_a_second_process_exits_75_and_names_the_owner(run: RunDirectory) -> None:
    """FAULTS 16."""
    with child(HOLD, str(run.path)) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "locked\n"
        code, said = attempt(run)
        assert code == 75
        assert f"process {owner.pid} on host {HOST} since {run.status()['started']}" in said
        assert run.status()["pid"] == owner.pid
        assert state_of(run) == "running"
    assert attempt(run) == (0, "")


def test_53_a_live_fit_is_found_where_its_claim_was_removed(run: RunDirectory) -> None:
    """FAULTS 53: by the pid and the birth in the status, for a fit, an export and a cleaning alike."""
    with child(HOLD, str(run.path)) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "locked\n"
        (run.path / ".lock").unlink()
        code, said = attempt(run)
        assert code == 75
        assert f"held by process {owner.pid} on host {HOST} since" in said
        with pytest.raises(BusyError, match=f"process {owner.pid} "), run.held():
            pass
        assert not (run.path / ".lock").exists()  # nothing stands in the way once it has ended
    assert attempt(run) == (0, "")
    run.update_status(state="running", host="elsewhere", heartbeat=find.utc_now())
    with pytest.raises(BusyError, match="on host elsewhere .* counts as gone after 300 s without a heartbeat"):
        run.held().__enter__()


def test_16_a_second_lock_in_one_process_is_refused_and_released_after(run: RunDirectory) -> None:
    """FAULTS 16."""
    with run.lock():
        with pytest.raises(BusyError, match=f"process {os.getpid()} on host") as caught:
            RunDirectory.open(run.path).lock().__enter__()
        assert caught.value.exit_code == 75
    with run.lock():
        assert run.status()["host"] == HOST


def test_15_16_a_killed_owner_leaves_a_stale_run_that_can_be_locked(run: RunDirectory) -> None:
    """FAULTS 15 and 16."""
    with child(HOLD, str(run.path)) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "locked\n"
        owner.kill()
    assert state_of(run) == "stale"
    assert attempt(run) == (0, "")


@pytest.mark.parametrize(
    ("problem", "state"),
    [*((p, "interrupted") for p in (None, KeyboardInterrupt(), Interrupted("", 15))), (OSError(), "failed")],
)
def test_leaving_the_lock_leaves_nothing_running(run: RunDirectory, problem: BaseException | None, state: str) -> None:
    with nullcontext() if problem is None else pytest.raises(type(problem)), run.lock():
        run.update_status(state="running")
        if problem is not None:
            raise problem
    assert run.status()["state"] == state


def test_leaving_the_lock_keeps_a_state_that_was_set(run: RunDirectory) -> None:
    with run.lock():
        run.update_status(state="finished")
    with run.lock():  # a later analysis holds the run too
        pass
    assert run.status()["state"] == "finished"


# -- row 15: listing


HERE_AND_ALIVE = {"host": HOST, "pid": os.getpid()}
ELSEWHERE = {"host": "elsewhere", "pid": 1}


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        (HERE_AND_ALIVE, "running"),
        ({**HERE_AND_ALIVE, "birth": find.birth_of(os.getpid())}, "running"),
        ({**HERE_AND_ALIVE, "heartbeat": lambda: ago(days=3)}, "running"),  # a long epoch on this host
        ({**HERE_AND_ALIVE, "birth": "12"}, "stale"),  # the pid was given to another process
        ({"host": HOST}, "stale"),
        *(({"host": HOST, "pid": pid}, "stale") for pid in (0, -1, True, "1", 10**30)),
        ({**ELSEWHERE, "heartbeat": lambda: ago(minutes=4.5)}, "running"),
        ({**ELSEWHERE, "heartbeat": lambda: ago(minutes=-60)}, "running"),  # its clock is ahead
        ({**ELSEWHERE, "heartbeat": lambda: ago(minutes=5.5)}, "stale"),
        *(({**ELSEWHERE, "heartbeat": beat}, "stale") for beat in ("yesterday", "2026-01-01T00:00:00", 5)),
        ({**ELSEWHERE, "pid": os.getpid(), "heartbeat": "yesterday"}, "stale"),
    ],
)
def test_15_a_run_whose_machine_died_is_stale(run: RunDirectory, fields: dict[str, Any], state: str) -> None:
    """FAULTS 15."""
    run.update_status(state="running", **{k: v() if callable(v) else v for k, v in fields.items()})
    assert state_of(run) == state


def test_15_a_run_whose_process_died_is_stale(run: RunDirectory) -> None:
    """FAULTS 15."""
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as process:
        pass
    run.update_status(state="running", host=HOST, pid=process.pid)
    assert state_of(run) == "stale"
    run.update_status(state="finished")
    assert state_of(run) == "finished"


def test_15_a_zombie_is_dead(run: RunDirectory) -> None:
    """FAULTS 15."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    run.update_status(state="running", host=HOST, pid=pid)
    assert state_of(run) == "stale"
    os.waitpid(pid, 0)


def test_runs_are_listed_by_start(tmp_path: Path) -> None:
    starts = ["2026-01-03T00:00:00+00:00", "2026-01-01T00:00:00+00:00", "2026-01-02T00:00:00+00:00"]
    for name, start in zip("abc", starts, strict=True):
        run = RunDirectory.create(tmp_path, name)
        write_atomic(run.path / "manifest.json", json.dumps({"name": name, "started": start}))
    run.update_status(state="finished", epoch=3, epochs=10, elbo=-90.5, seconds=12)
    rows = list_runs(tmp_path)
    assert [row["name"] for row in rows] == ["b", "c", "a"]
    place = {"name": "c", "id": run.path.name, "path": str(run.path), "started": starts[2]}
    figures = {"epoch": 3, "epochs": 10, "elbo": -90.5, "log_joint": None, "seconds": 12.0}
    assert rows[1] == {**place, **figures, "state": "finished", "why": None}
    assert rows[0]["state"] == "created"
    assert list_runs(tmp_path / "missing") == []


def test_68_what_was_begun_last_is_the_latest(tmp_path: Path) -> None:
    """FAULTS 17 and 68: where the clock was ahead once, where a folder was renamed."""
    ahead = RunDirectory.create(tmp_path, "vae")
    ahead.path = ahead.path.rename(ahead.path.with_name("20991231T000000Z-00000000"))
    fields = {**ahead.manifest, "started": "2099-12-31T00:00:00+00:00", "order": 4102358400000}
    write_atomic(ahead.path / "manifest.json", json.dumps(fields))
    second = RunDirectory.create(tmp_path, "vae")
    second.path = second.path.rename(second.path.with_name("zzz-the-best"))
    last = RunDirectory.create(tmp_path, "vae")
    assert RunDirectory.open("latest", tmp_path).path == RunDirectory.open("vae", tmp_path).path == last.path
    assert [row["path"] for row in list_runs(tmp_path)] == [str(run.path) for run in (ahead, second, last)]
    last.write_manifest({"order": 1})
    assert last.manifest["order"] > second.manifest["order"] > fields["order"]


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("manifest.json", None, "No such file"),
        ("manifest.json", b"", "expected a JSON object"),
        ("manifest.json", b"\xff", "expected a JSON object"),
        ("manifest.json", b'{"name": 5}', "expected text for 'name'"),
        ("manifest.json", b'{"started": []}', "expected text for 'started'"),
        ("status.json", b"[]", "expected a JSON object"),
        ("status.json", b"[" * 100_000, "expected a JSON object"),
        ("status.json", b'{"state": "\\u001b[2J"}', r"expected a state of running, .*; got '\\x1b"),
        ("status.json", b'{"state": ["running"]}', "expected a state"),
        ("status.json", b" " * (17 << 20), "at most"),
    ],
)
def test_a_broken_run_is_listed_and_never_raises(run: RunDirectory, name: str, content: bytes | None, why: str) -> None:
    other = RunDirectory.create(run.path.parents[1], "other")
    (run.path / name).unlink(missing_ok=True)
    if content is not None:
        (run.path / name).write_bytes(content)
    rows = {row["id"]: row for row in list_runs(run.path.parents[1])}
    assert rows[run.path.name]["state"] == "broken"
    assert re.search(why, rows[run.path.name]["why"])
    assert rows[run.path.name]["started"][:4] == str(datetime.now(UTC).year)
    assert rows[other.path.name]["state"] == "created"


def test_absurd_numbers_and_strange_folders_do_not_break_a_listing(run: RunDirectory, tmp_path: Path) -> None:
    root = run.path.parents[1]
    (root / "vamp" / "stray").mkdir()
    (root / "note.txt").touch()
    (root / "link").symlink_to(tmp_path)
    (root / ".cache" / "x").mkdir(parents=True)
    text = '{"state": "finished", "epoch": 1%s, "elbo": NaN, "epochs": "<b>", "seconds": -Infinity, "started": 1e999}'
    (run.path / "status.json").write_text(text % ("0" * 400))
    stray, row = list_runs(root)
    assert (stray["id"], stray["state"], stray["started"]) == ("stray", "broken", "")
    assert [row[key] for key in ("state", "epoch", "epochs", "elbo", "seconds")] == ["finished", *[None] * 4]
