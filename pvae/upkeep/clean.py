"""What may go of a folder of runs: what interrupted writes left, old checkpoints, failed runs, caches."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from pvae.data.rows.cache import cache_folder
from pvae.errors import BusyError, CheckpointError, DataError, OutputError
from pvae.runs import checkpoint
from pvae.runs.find import folders
from pvae.runs.listing import list_runs
from pvae.runs.owner import STALE_AFTER_SECONDS
from pvae.runs.rundir import RunDirectory
from pvae.util.checks import one_line
from pvae.util.files import MIB, walk

if TYPE_CHECKING:
    from rich.table import Table


@final
@dataclass(frozen=True)
class Removal:
    """Something that may go.

    Arguments:
        path: of the file or folder.
        size: bytes, all its files added up.
        why: it may go.
    """

    path: Path
    size: int
    why: str


@final
@dataclass(frozen=True, repr=False)
class Cleaning:
    """What `clean` has removed, or would.

    Arguments:
        root: the folder of runs.
        applied: whether it was removed.
        removals: all that may go; when applied, what has gone.
        skipped: runs that were left alone, with the reason.
        failed: what could not be removed, with the reason.
    """

    root: Path
    applied: bool
    removals: tuple[Removal, ...]
    skipped: tuple[tuple[Path, str], ...]
    failed: tuple[tuple[Path, str], ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(removal.size for removal in self.removals)

    def summary(self) -> str:
        """What was freed, or would be, in a sentence."""
        count = f"{len(self.removals)} removed" if self.applied else f"{len(self.removals)} would be removed"
        also = "" if self.applied or not self.removals else "; say --apply (apply=True) to do it"
        return f"{count}, {megabytes(self.size)} {'freed' if self.applied else 'to free'}{also}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; sizes in bytes."""
        return {
            "root": str(self.root),
            "applied": self.applied,
            "bytes": self.size,
            "removals": [{"path": str(r.path), "bytes": r.size, "why": r.why} for r in self.removals],
            "skipped": [{"path": str(path), "why": why} for path, why in self.skipped],
            "failed": [{"path": str(path), "why": why} for path, why in self.failed],
        }

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Path, size and reason of everything, as they are shown."""
        for r in self.removals:
            yield one_line(str(r.path)), megabytes(r.size), r.why
        for label, pairs in (("skipped", self.skipped), ("failed", self.failed)):
            for path, why in pairs:
                yield one_line(str(path)), label, one_line(why)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(caption=self.summary(), caption_justify="left")
        table.add_column("path", overflow="fold")
        table.add_column("size", justify="right", no_wrap=True)
        table.add_column("why")
        for row in self.rows():
            table.add_row(*map(Text, row))
        return table

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return "\n".join([*(f"{size:>10}  {path}  ({why})" for path, size, why in self.rows()), self.summary()])


def megabytes(size: int) -> str:
    """A number of bytes, as people read it."""
    return f"{size / MIB:.1f} MiB" if size >= MIB / 10 else f"{size / 1024:.1f} KiB"


def clean(root: str | Path = "runs", *, apply: bool = False, failed: bool = False, cache: bool = False) -> Cleaning:
    """Show what interrupted writes and old checkpoints take, or remove it.

    Of every run that nobody holds: temporaries of interrupted writes, and checkpoints older than the two newest that
    read. Its lock is held meanwhile. Links are neither followed nor removed, and nothing outside of the folder of runs
    (and of the cache) is touched.

    Arguments:
        root: the folder of runs.
        apply: remove; else only say what would go.
        failed: also whole runs that ended before their first checkpoint.
        cache: also downloaded and decoded data; they are made again when they are needed.

    Returns:
        What has gone or would go, with its size in bytes, and what was left alone.
    """
    broom = _Broom(Path(root), apply)
    for row in list_runs(Path(root)):
        broom.run(Path(row["path"]), row["state"], failed)
    for folder in folders(Path(root)):
        broom.sweep(_old_temporaries(folder))
    if cache and broom.at_work:
        broom.skipped.append((cache_folder(), "a run at work may be reading from it"))
    for entry, lock in _cached() if cache and not broom.at_work else ():
        broom.cached(entry, lock)
    return Cleaning(Path(root), apply, tuple(broom.removals), tuple(broom.skipped), tuple(broom.failed))


class _Broom:
    """Collects what may go, and removes it where it is told to."""

    def __init__(self, root: Path, apply: bool) -> None:
        self.root, self.apply, self.at_work = root, apply, False
        self.removals: list[Removal] = []
        self.skipped: list[tuple[Path, str]] = []
        self.failed: list[tuple[Path, str]] = []

    def run(self, path: Path, state: str, failed: bool) -> None:
        """One run, held meanwhile; one that is at work, here or on another host, is named and left alone."""
        if not _is_plain(path / "manifest.json"):
            return
        if state == "running":
            self.at_work = True
            self.skipped.append((path, "at work"))
            return
        try:
            with RunDirectory(path).held():
                self.sweep(_whole(path, state) if failed and _never_saved(path, state) else _parts(path))
        except (BusyError, OutputError, DataError, CheckpointError) as problem:
            self.skipped.append((path, str(problem)))

    def cached(self, entry: Path, lock: Path) -> None:
        """One entry of the cache, under its lock."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(lock, timeout=0):
                self.sweep([(entry, "cache")])
        except (Timeout, OSError) as problem:
            self.skipped.append((entry, f"held by another process: {problem}"))

    def sweep(self, doomed: Iterable[tuple[Path, str]]) -> None:
        """Remove, or only note."""
        for path, why in doomed:
            try:
                removal = Removal(path, _size(path), why)
                if self.apply:
                    _remove(path)
                self.removals.append(removal)
            except OSError as problem:
                self.failed.append((path, str(problem.strerror or problem)))


def _is_plain(path: Path) -> bool:
    with suppress(OSError):
        return stat.S_ISREG(path.lstat().st_mode)
    return False


def _parts(path: Path) -> list[tuple[Path, str]]:
    """What may go of a run that is kept."""
    found = [item for folder in (path, path / "analysis", path / "report") for item in _old_temporaries(folder)]
    return [*found, *_strays(path / "checkpoints"), *_surplus(path / "checkpoints")]


def _old_temporaries(folder: Path) -> list[tuple[Path, str]]:
    """Temporaries of interrupted writes; a young one may be of an analysis that is being written."""
    before = time.time() - STALE_AFTER_SECONDS
    old = [path for path in _hidden(folder, ".tmp-") if path.lstat().st_mtime < before]
    return [(path, "left by an interrupted write") for path in old]


def _hidden(folder: Path, start: str) -> list[Path]:
    """What lies in a folder, no link, under a name that starts so."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    return [folder / name for name in sorted(os.listdir(folder)) if name.startswith(start)]


def _strays(folder: Path) -> list[tuple[Path, str]]:
    """What killed writes left among the checkpoints; one set aside that nothing replaced is no stray."""
    replaced = [path for path in _hidden(folder, ".old-") if (folder / path.name[5:].rpartition("-")[0]).is_dir()]
    return [(path, "left by an interrupted write") for path in [*_hidden(folder, ".tmp-"), *replaced]]


def _surplus(folder: Path) -> list[tuple[Path, str]]:
    """Checkpoints older than the newest that are kept; only such count as read."""
    paths = [] if folder.is_symlink() else checkpoint.newest_first(folder)
    sound = 0
    for i, path in enumerate(paths if len(paths) > checkpoint.KEPT_CHECKPOINTS else ()):
        with suppress(CheckpointError):
            checkpoint.read(path)
            sound += 1
        if sound == checkpoint.KEPT_CHECKPOINTS:
            return [(old, f"older than the {sound} newest that read") for old in paths[i + 1 :]]
    return []


def _never_saved(path: Path, state: str) -> bool:
    """Whether a run ended before its first checkpoint; one just made may only be about to begin."""
    if state not in ("failed", "interrupted", "stale", "created") or checkpoint.newest_first(path / "checkpoints"):
        return False
    return time.time() - (path / "manifest.json").lstat().st_mtime > STALE_AFTER_SECONDS


def _whole(path: Path, state: str) -> list[tuple[Path, str]]:
    return [(path, f"{state} before its first checkpoint")]


def _cached() -> Iterator[tuple[Path, Path]]:
    """Entries of the cache and their locks: a folder for each collection, and for each decoded file."""
    root = cache_folder()
    for parent in (root, root / "decoded"):
        for folder in folders(parent) if not parent.is_symlink() else ():
            if folder != root / "decoded":
                yield folder, parent / f"{folder.name}.lock"
        for part in _hidden(parent, ".part-"):
            yield part, parent / f"{part.name.removeprefix('.part-').rpartition('-')[0]}.lock"


def _size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder; links count as themselves."""
    own = path.lstat()
    if not stat.S_ISDIR(own.st_mode):
        return own.st_size
    return sum(e.stat(follow_symlinks=False).st_size for e in walk(path) if not e.is_dir(follow_symlinks=False))


def _remove(path: Path) -> None:
    """Remove; a folder is renamed first, so that a kill half way leaves no half run or checkpoint under its name."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    doomed = path.with_name(f".tmp-{os.urandom(8).hex()}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)
