"""Studies on a queue, without one: what is submitted, found there, and told of what ended; what a job does."""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pvae.errors import DeclarationError, Interrupted, MissingExtraError
from pvae.runs.find import slug
from pvae.runs.run import Run
from pvae.studies.cases import Declared
from pvae.studies.runner import Runner, Slurm, settings_of
from pvae.studies.study import placed, study
from pvae.studies.tasks import work
from pvae.util import attempt
from pvae.util.attempt import Attempt
from tests.cli_runner import run_cli
from tests.runs_shared import signalled_at
from tests.studies.test_study import AGG, NETWORK, runner, write

FAKES = {
    "sbatch": 'cp "$1" "$FAKE/script"; echo x >>"$FAKE/count"; echo Submitted batch job 7',
    "srun": "true",
    "squeue": 'test ! -e "$FAKE/down" && cat "$FAKE/queue"',
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with commands in the place of Slurm's: `queue` is what squeue prints, `count` grows with submissions."""
    pytest.importorskip("submitit")
    folder = tmp_path / "fake"
    folder.mkdir()
    for name, line in FAKES.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    (folder / "queue").touch()
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return folder


def on_queue(file: Path, slurm: Sequence[str] | None) -> Runner:
    return runner(file, file.parent / "runs", Slurm(file.parent / "runs", "tiny", 2, slurm))


def orders(folder: Path) -> list[list[dict[str, Any]]]:
    """The orders of every job, as submitit reads them in it."""
    from submitit.core.utils import DelayedSubmission

    called: list[Any] = [
        DelayedSubmission.load(path).function for path in sorted((folder / "jobs").glob("*_submitted.pkl"))
    ]
    return [element.orders for element in called]


def test_a_study_is_submitted_once_and_collected_by_whoever_asks(tmp_path, slurm):
    file = write(tmp_path, {"seeds": [0, 1], "refits": [AGG]})
    first = on_queue(file, ["partition=main", "cpus=2"])
    first._look()
    script = (slurm / "script").read_text()
    for line in ("array=0-1%2", "partition=main", "cpus-per-task=2", "time=60", "requeue", "signal=USR2@90"):
        assert f"#SBATCH --{line}\n" in script
    assert f"{sys.executable} -P -u -m submitit" in script
    assert stat.S_IMODE(first.place.folder.stat().st_mode) == 0o700
    assert [len(element) for element in orders(first.place.folder)] == [
        2,
        2,
    ]  # a first stage, and the second one after it
    name = next(line.partition("=")[2] for line in script.splitlines() if "job-name" in line)
    (slurm / "queue").write_text(f"{name} 0 RUNNING\n{name} 1 PENDING\n")
    for again in (first, on_queue(file, ()), on_queue(file, None)):
        again._look()
        assert [task.state for task in again.tasks] == ["running", "running", "pending", "pending"]
    (slurm / "down").touch()
    assert first.place.states() is None
    first._look()
    assert first.tasks[0].state == "running"  # as it was
    (slurm / "down").unlink()
    for order in orders(first.place.folder)[0]:
        work(order)
    (slurm / "queue").write_text(f"{name} 1 RUNNING\n")
    first._look()
    assert [task.state for task in first.tasks] == ["finished", "finished", "running", "running"]
    failed = Path(orders(first.place.folder)[1][0]["log"])
    failed.with_suffix(".failed").write_text("loss not finite")
    work(orders(first.place.folder)[1][0])  # as another process does afterwards
    (slurm / "queue").write_text("")
    last = Path(orders(first.place.folder)[1][1]["log"])
    last.with_suffix(".failed").write_text("no disk")
    collecting = on_queue(file, None)
    collecting._look()
    assert [task.state for task in collecting.tasks] == ["found", "found", "found", "failed"]
    assert collecting.tasks[3].error == f"{last}: no disk"
    assert (slurm / "count").read_text() == "x\n"
    on_queue(file, ())._look()
    assert (slurm / "count").read_text() == "x\nx\n"  # the failed one alone, as it was said again
    there = placed(slug(Declared.load(file).name), tmp_path / "runs", None, (), None, 1)
    assert (there.folder, there.collects, there.jobs) == (first.place.folder, True, 100)
    assert not placed(slug(Declared.load(file).name), tmp_path / "runs", "local", (), None, 1).queues


def test_jobs_that_end_without_a_word_are_submitted_again_and_then_fail(tmp_path, slurm):
    one = on_queue(write(tmp_path, {}), ())
    for _ in range(3):
        one._look()
        assert one.tasks[0].state == "queued"
    one._look()
    assert one.tasks[0].state == "failed"
    assert one.tasks[0].error.endswith(".log: its workers ended without a word")


def test_a_signal_ends_the_waiting_and_no_job(tmp_path, slurm, monkeypatch):
    monkeypatch.setattr(Slurm, "pause", 0.05)
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    one = on_queue(write(tmp_path, {}), ())
    monkeypatch.setattr(Slurm, "states", lambda _self: {one.tasks[0].id: "pending"})
    with pytest.raises(Interrupted, match=r"0 of 1 cases are finished; the jobs go on; wait for them with: pvae study"):
        one.run()


def test_what_sbatch_refuses_is_told_and_forgotten(tmp_path, slurm):
    (slurm / "sbatch").write_text("#!/bin/sh\necho invalid partition specified: mian >&2; exit 1\n")
    one = on_queue(write(tmp_path, {}), ["partition=mian"])
    with pytest.raises(DeclarationError, match="expected sbatch to take the jobs; got: .*mian"):
        one._look()
    assert not list(one.place.folder.glob("*.json"))


def test_settings_are_checked_by_name(tmp_path, slurm, monkeypatch, capsys):
    assert settings_of(["partition=main", "time=1:00:00"]) == {"partition": "main", "time": "1:00:00"}
    for wrong in ("partitoin=main", "gpus", "cpus="):
        with pytest.raises(DeclarationError, match=r"--slurm: expected KEY=VALUE with a key of account, .* got"):
            settings_of([wrong])
    with pytest.raises(DeclarationError, match="did you mean 'partition'"):
        settings_of(["partitoin=main"])
    file = write(tmp_path, {})
    for options, said in (
        (("--on", "cluster"), "--on: expected local or slurm; got 'cluster'."),
        (
            ("--slurm", "partition=main", "gpus=1"),
            "--slurm: expected with --on slurm; got 'partition=main gpus=1' alone.",
        ),
    ):
        assert said in run_cli("study", str(file), *options, code=2)[1]
    (slurm / "sbatch").unlink()
    monkeypatch.setenv("PATH", str(slurm))
    with pytest.raises(MissingExtraError, match="expected sbatch on the PATH"):
        study(file, run_dir=tmp_path / "runs", on="slurm", progress=False)
    monkeypatch.setattr("pvae.errors.find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pvae-pyro\[cluster\]'"):
        settings_of([])


# ---------------------------------------------------------------------- on a node


def test_a_requeued_case_goes_on_on_another_node(tmp_path, monkeypatch):
    """FAULTS 55 and 62: the difference is in its events; outside of a queue that is asked about."""
    (tmp_path / "rows.csv").write_text("a,b\n" + "".join(f"{i % 7},{i % 5}\n" for i in range(200)))
    columns = {"a": "continuous", "b": "continuous"}
    table = {"source": "csv", "path": str(tmp_path / "rows.csv"), "columns": columns}
    file = write(tmp_path, {}, data=table, decoder={**NETWORK, "likelihood": "columns"})
    one = runner(file, tmp_path / "runs")
    order = one._beside(one.tasks[0])
    assert order is not None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with signalled_at(1), pytest.raises(Interrupted):
        work(order)
    with monkeypatch.context() as other:
        other.setattr("platform.node", lambda: "second")
        other.delenv("SLURM_JOB_ID")
        with pytest.raises(DeclarationError, match=r"host = .*; got 'second'"):
            work(order)
        assert "--allow-changes" in Path(order["log"]).with_suffix(".failed").read_text()
        other.setenv("SLURM_JOB_ID", "8")
        work(order)
        assert not Path(order["log"]).with_suffix(".failed").exists()
    (path,) = (tmp_path / "runs" / "tiny").iterdir()
    assert Run.load(path).files.manifest["host"] == "second"
    said = [event["message"] for event in Run.load(path).files.events() if event["kind"] == "changed"]
    assert [message.count("host = ") for message in said] == [1]
    found = study(file, run_dir=tmp_path / "runs", progress=False)
    assert found.runs["tiny", 0, "fit"].data.shape == (2,)


WORKER = """\
import json, os, signal, sys, time
order = json.load(sys.stdin)
assert order["supervisor"] == os.getppid()
with open(order["log"], "a") as log:
    log.write("begun\\n")
times = open(order["log"]).read().count("begun")
for act in order["acts"][times - 1:times]:
    os.kill(os.getpid(), act) if act < 0 or act == 9 else sys.exit(act) if act < 200 else time.sleep(act)
"""


def attempted(folder: Path, *acts: int) -> tuple[Attempt, Path]:
    log = folder / "case.log"
    return Attempt([sys.executable, "-c", WORKER], [{"log": str(log), "threads": 1, "acts": acts}]), log


@pytest.mark.parametrize(
    ("acts", "code", "begun"),
    [
        ((0,), 0, 1),
        ((9, 75, 0), 0, 3),  # killed; held by another; done
        ((65,), 65, 1),
        ((9, 9, 9), 9, 3),
        ((143,), 143, 1),  # stopped by the queue, which ends or requeues the job
    ],
)
def test_a_job_begins_again_what_was_killed_and_waits_for_what_is_held(tmp_path, monkeypatch, acts, code, begun):
    monkeypatch.setattr(attempt, "SECONDS", 0.01)
    one, log = attempted(tmp_path, *acts)
    if code:
        with pytest.raises(SystemExit) as ended:
            one()
        assert ended.value.code == code
    else:
        one()
    assert log.read_text().count("begun") == begun


def test_before_a_time_out_the_worker_writes_its_checkpoint(tmp_path):
    """In the signal handler of a job that waits for its worker, as submitit calls it."""
    pytest.importorskip("submitit")
    one, log = attempted(tmp_path, 300)
    found = []

    def handler(*_: object) -> None:
        found.append(one.checkpoint())
        sys.exit(1)

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        threading.Timer(0.8, lambda: os.kill(os.getpid(), signal.SIGUSR2)).start()
        with pytest.raises(SystemExit):
            one()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert found[0].function.orders == one.orders
    assert one.child is not None
    assert one.child.wait() == -signal.SIGTERM
    assert log.read_text().count("begun") == 1
