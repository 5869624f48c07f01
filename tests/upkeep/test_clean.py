"""`pvae clean`: what interrupted writes and old checkpoints left is removed, and nothing else."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from pvae.data.rows.cache import cache_folder
from pvae.runs import checkpoint
from pvae.runs.find import utc_now
from pvae.runs.rundir import RunDirectory, list_runs
from pvae.upkeep.clean import Cleaning, clean
from pvae.upkeep.verify import verify
from pvae.util.files import temporary_for
from tests.cli_runner import run_cli, run_cli_json
from tests.upkeep.damage import files_of, flip, newest, oldest, only, status

HOUR_AGO = time.time() - 3600


def old(path: Path, content: bytes = b"12345") -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (HOUR_AGO, HOUR_AGO))
    return path


def gone(found: Cleaning) -> set[str]:
    return {removal.path.name for removal in found.removals}


def test_clean_shows_and_then_removes_what_interrupted_writes_left(run: Path, root: Path) -> None:
    """FAULTS 1: what a killed process leaves; a young file may be that of an analysis at work."""
    old(run / ".tmp-a1")
    old(run / "report" / ".tmp-a2")
    (run / "report" / ".tmp-young").touch()
    shutil.copytree(oldest(run), run / "checkpoints" / ".tmp-a3")
    shutil.copytree(oldest(run), run / "checkpoints" / f".old-{oldest(run).name}-a4a4a4a4")
    before = files_of(root)
    status_before = (run / "status.json").read_bytes()
    asked = ["clean", "--run-dir", str(root)]
    out, _ = run_cli(*asked)
    assert "4 would be removed" in out
    assert "--apply" in out
    assert files_of(root) == before
    told = run_cli_json(*asked, "--apply")
    assert {Path(row["path"]).name for row in told["removals"]} == {
        ".tmp-a1", ".tmp-a2", ".tmp-a3", f".old-{oldest(run).name}-a4a4a4a4",
    }  # fmt: skip
    lost = set(before) - set(files_of(root))
    assert told["bytes"] == sum(len(before[name]) for name in lost) > 10
    assert (run / "report" / ".tmp-young").exists()
    assert (run / "status.json").read_bytes() == status_before
    assert verify(run).ok
    assert not clean(root, apply=True).removals


@pytest.mark.parametrize(
    "place", ["", "report", "report/tables", "report/figures", "exports/tensorboard", "analysis", "checkpoints"]
)
def test_clean_removes_what_verify_finds_of_a_dead_process_at_once(place: str, run: Path, root: Path) -> None:
    """FAULTS 58: a process killed while it wrote; what a living process writes stays."""
    (run / place).mkdir(parents=True, exist_ok=True)
    code = "import os, signal, sys\nfrom pathlib import Path\nfrom pvae.util.files import temporary_for\n"
    code += "temporary_for(Path(sys.argv[1])).touch()\nos.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, str(run / place / "file")], check=False)
    (beside := temporary_for(run.parent / "file")).mkdir()
    (left,) = (run / place).glob(".tmp-*")
    assert [check.name for check in verify(run).of("warning")] == [str(left.relative_to(run))]
    assert gone(clean(root, apply=True)) == {left.name}
    assert not verify(run).of("warning")
    assert beside.exists()


def test_a_run_never_lacks_its_manifest_and_one_that_does_is_removed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAULTS 59: killed between the two steps of its making; what has more in it than a lock goes when asked."""
    monkeypatch.setattr(os, "rename", lambda *_: os.kill(os.getpid(), 9))
    if not (child := os.fork()):
        RunDirectory.create(root, "vae")
    os.waitpid(child, 0)
    monkeypatch.undo()
    (begun,) = (root / "vae").iterdir()
    assert list_runs(root) == []
    empty, spec, mine = (root / "vae" / f"20260101T000000Z-0000000{n}" for n in range(3))
    for folder, names in ((empty, [".lock"]), (spec, ["spec.toml"]), (mine, ["notes.txt"])):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    with RunDirectory(empty).held():
        assert gone(clean(root)) == {begun.name}
    assert gone(clean(root, apply=True)) == {begun.name, empty.name}
    assert gone(clean(root, apply=True, failed=True)) == {spec.name}
    assert [path.name for path in (root / "vae").iterdir()] == [mine.name]


def test_a_checkpoint_that_was_set_aside_and_not_replaced_is_kept(run: Path, root: Path) -> None:
    """FAULTS 1: a process was killed between two renames; the next start gives it its name back."""
    os.rename(newest(run), run / "checkpoints" / f".old-{newest(run).name}-a5a5a5a5")
    assert not clean(root, apply=True).removals
    found = verify(run)
    assert found.ok
    assert found.facts["loads"] == only(found, "warning").name.removeprefix("checkpoints/")


def test_clean_removes_checkpoints_beyond_those_kept_but_only_sound_ones_count(run: Path, root: Path) -> None:
    saved = checkpoint.read(newest(run))
    for step in (30, 40, 50):
        checkpoint.write(run / "checkpoints", step, saved.tensors, saved.state, keep=9)
    flip(run / "checkpoints" / "step-00000050" / "weights.safetensors")
    assert gone(clean(root)) == {"step-00000020", "step-00000000"}
    assert clean(root, apply=True).size > 1000
    assert {path.name for path in (run / "checkpoints").iterdir()} == {f"step-000000{n}" for n in (30, 40, 50)}
    assert verify(run).facts["loads"] == "step-00000040"
    assert not clean(root).removals


def test_clean_removes_runs_that_failed_before_a_checkpoint_when_asked(run: Path, root: Path) -> None:
    empty = RunDirectory.create(root, "empty")
    begun = RunDirectory.create(root, "begun")
    (root / "mine").mkdir()
    (root / "mine" / "notes").mkdir()
    old(root / "mine" / "notes" / "text")
    empty.update_status(state="failed")
    status(run, state="failed")
    os.utime(empty.path / "manifest.json", (HOUR_AGO, HOUR_AGO))
    assert not clean(root).removals
    found = clean(root, apply=True, failed=True)
    assert [(removal.path, removal.why) for removal in found.removals] == [
        (empty.path, "failed before its first checkpoint")
    ]
    assert not empty.path.exists()
    assert begun.path.exists()
    assert run.exists()
    assert (root / "mine" / "notes" / "text").exists()


def test_clean_leaves_a_held_run_alone_and_names_it(run: Path, root: Path) -> None:
    """FAULTS 16: one whose lock another has, and one at work on another host."""
    old(run / ".tmp-a1")
    with RunDirectory(run).held():
        found = clean(root, apply=True)
    assert not found.removals
    assert found.skipped[0][0] == run
    assert "nobody holds" in found.skipped[0][1]
    status(run, state="running", host="elsewhere", heartbeat=utc_now())
    assert clean(root, apply=True).skipped == ((run, "at work"),)
    assert (run / ".tmp-a1").exists()
    status(run, state="finished")
    assert gone(clean(root, apply=True)) == {".tmp-a1"}


def test_clean_follows_no_link(run: Path, root: Path, tmp_path: Path) -> None:
    """FAULTS 36: links out of a run, a linked run, and a lock that is a link."""
    outside = tmp_path / "outside"
    old(outside / ".tmp-file")
    (run / "checkpoints" / ".tmp-link").symlink_to(outside)
    (run / "analysis").symlink_to(outside)
    (root / "linked").symlink_to(outside)
    shutil.copytree(run, root / "vae" / "second", symlinks=True)
    (root / "vae" / "second" / ".lock").unlink(missing_ok=True)
    (root / "vae" / "second" / ".lock").symlink_to(outside / "made")
    found = clean(root, apply=True, failed=True)
    assert gone(found) == {".tmp-link"}
    assert "plain file" in found.skipped[0][1]
    assert [path.name for path in outside.iterdir()] == [".tmp-file"]
    assert not (run / "checkpoints" / ".tmp-link").is_symlink()
    assert (run / "analysis").is_symlink()


def test_clean_of_the_cache_is_asked_for_and_leaves_what_is_held(root: Path) -> None:
    """FAULTS 32: a writer's lock is respected."""
    one, two = cache_folder() / "mnist", cache_folder() / "decoded" / "abc"
    for folder in (one, two):
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(b"123")
    part = cache_folder() / "decoded" / ".part-abc-x1"
    part.mkdir()
    assert not clean(root).removals
    with FileLock(cache_folder() / "decoded" / "abc.lock"):
        found = clean(root, apply=True, cache=True)
    assert gone(found) == {"mnist"}
    assert {path for path, _ in found.skipped} == {two, part}
    assert gone(clean(root, apply=True, cache=True)) == {"abc", ".part-abc-x1"}
    assert not two.exists()
    assert not part.exists()


def test_what_cannot_be_removed_is_told(run: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 42: a read-only folder; what was removed half way is found again."""
    (run / "checkpoints" / ".tmp-a1").mkdir()

    def refuse(path: object, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", refuse)
        out, _ = run_cli("clean", "--run-dir", str(root), "--apply", code=74)
    assert "failed" in out
    assert "Permission denied" in out
    assert "0 removed" in out
    assert len(clean(root, apply=True).removals) == 1


def test_clean_of_nothing(tmp_path: Path) -> None:
    assert run_cli("clean", "--run-dir", str(tmp_path / "none"))[0] == "0 would be removed, 0.0 KiB to free\n"
