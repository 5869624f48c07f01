"""Files that survive a crash, the provenance of a run, and threads. Numbers are rows of the faults table."""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pvae.errors import DataError, StorageError
from pvae.util.files import read_inside, write_atomic
from pvae.util.provenance import provenance
from pvae.util.threads import threads

# -- atomic writes


def test_write_atomic_replaces_and_leaves_no_temporary(tmp_path: Path) -> None:
    for text in ("one", b"two", "drei \ud800"):
        write_atomic(tmp_path / "file", text)
    assert (tmp_path / "file").read_bytes() == b"drei \\ud800"
    assert os.listdir(tmp_path) == ["file"]


def test_36_write_atomic_goes_through_no_device_link_or_folder(tmp_path: Path) -> None:
    """FAULTS 36."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    # Special files of our own, never those of the system: were the guard to fail, this would replace them.
    for path in (tmp_path / "pipe", tmp_path / "folder", tmp_path / "link"):
        before = path.lstat()
        with pytest.raises(StorageError, match="not a plain file"):
            write_atomic(path, "text")
        assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert not (tmp_path / "target").exists()


def test_44_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 44."""
    write_atomic(tmp_path / "file", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        write_atomic(tmp_path / "file", "new")
    assert caught.value.exit_code == 74
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", ".", "", "a/b", "a\0"])
def test_36_read_inside_takes_plain_names(tmp_path: Path, name: str) -> None:
    """FAULTS 36."""
    with pytest.raises(DataError, match="expected a plain file name"):
        read_inside(tmp_path, name)


# -- provenance


def fake_git(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "git").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_provenance_is_json_without_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setattr(sys, "argv", ["/home/alice/bin/pvae", "fit", "x.toml"])
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    found = provenance()
    assert json.loads(json.dumps(found)) == found
    assert found["argv"] == ["~/bin/pvae", "fit", "x.toml"]
    assert found["git"] is None
    assert found["host"] == platform.node()
    assert found["versions"]["python"] == platform.python_version()
    assert {"torch", "pyro-ppl", "safetensors"} <= found["versions"].keys()


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('[ "$3" = status ] && echo " M file" || echo abc', {"commit": "abc", "dirty": True}),
        ('[ "$3" = status ] || echo abc', {"commit": "abc", "dirty": False}),
        ('[ "$3" = status ] && exit 1 || echo abc', {"commit": "abc", "dirty": None}),
        ("exit 128", None),
        ("exec sleep 20", None),
    ],
)
def test_provenance_asks_git_and_never_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: dict[str, Any] | None
) -> None:
    monkeypatch.setattr("pvae.util.provenance.GIT_SECONDS", 1.0)
    fake_git(tmp_path / "bin", script, monkeypatch)
    assert provenance()["git"] == expected


# -- threads


@pytest.mark.parametrize(("number", "inside"), [(1, 1), (None, 2)])
def test_the_number_of_threads_is_restored(number: int | None, inside: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads(number):
            assert torch.get_num_threads() == inside
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_version_is_read_past_metadata_that_are_being_written(tmp_path, monkeypatch):
    """A build in the working directory makes its folder of metadata before the files in it."""
    from pvae.util.provenance import installed_version

    known = installed_version("pydantic")
    half = tmp_path / "pydantic-0.dist-info"
    half.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert known is not None
    assert installed_version("pydantic") == known
    (half / "METADATA").write_text("")
    assert installed_version("pydantic") == known
    (half / "METADATA").write_text("Name: pydantic\nVersion: 0.1\n")
    assert installed_version("pydantic") == "0.1"
