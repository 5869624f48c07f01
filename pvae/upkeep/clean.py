"""Command `clean`: removal of leftovers of interrupted writes, old checkpoints, failed runs and cached data."""

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
from pvae.runs.find import STALE_AFTER_SECONDS, folders
from pvae.runs.rundir import RunDirectory, list_runs
from pvae.util.checks import one_line
from pvae.util.files import MIB, walk

if TYPE_CHECKING:
    from rich.table import Table


@final
@dataclass(frozen=True)
class Removal:
    """File or folder that can be removed.

    Arguments:
        path: path of the file or folder.
        size: total size of its files, in bytes.
        why: reason why it can be removed.
    """

    path: Path
    size: int
    why: str


@final
@dataclass(frozen=True, repr=False)
class Cleaning:
    """Result of `clean`: the files and folders that it removed or would remove.

    Arguments:
        root: folder of runs.
        applied: True if files were removed, False if they were only listed.
        removals: files and folders that were removed (if applied) or can be removed.
        skipped: runs and cache entries that were left alone, each with the reason.
        failed: files that could not be removed, each with the reason.
    """

    root: Path
    applied: bool
    removals: tuple[Removal, ...]
    skipped: tuple[tuple[Path, str], ...]
    failed: tuple[tuple[Path, str], ...]

    @property
    def size(self) -> int:
        """Total size of all removals, in bytes."""
        return sum(removal.size for removal in self.removals)

    def summary(self) -> str:
        """Return a line with the number of removals and the space that was freed, or would be."""
        count = f"{len(self.removals)} removed" if self.applied else f"{len(self.removals)} would be removed"
        also = "" if self.applied or not self.removals else "; say --apply (apply=True) to do it"
        return f"{count}, {megabytes(self.size)} {'freed' if self.applied else 'to free'}{also}"

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values, with sizes in bytes."""
        return {
            "root": str(self.root),
            "applied": self.applied,
            "bytes": self.size,
            "removals": [{"path": str(r.path), "bytes": r.size, "why": r.why} for r in self.removals],
            "skipped": [{"path": str(path), "why": why} for path, why in self.skipped],
            "failed": [{"path": str(path), "why": why} for path, why in self.failed],
        }

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield the printed rows: path, size (or "skipped", "failed") and reason of every file or run."""
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
    """Return a number of bytes formatted in MiB or KiB."""
    return f"{size / MIB:.1f} MiB" if size >= MIB / 10 else f"{size / 1024:.1f} KiB"


def clean(root: str | Path = "runs", *, apply: bool = False, failed: bool = False, cache: bool = False) -> Cleaning:
    """Remove, or list, the leftovers of interrupted writes and the old checkpoints in a folder of runs.

    In every run that no process has locked, these are temporary files of interrupted writes, and checkpoints older than
    the two newest readable ones. The run is locked meanwhile. Links are neither followed nor removed, and nothing
    outside the folder of runs (and the cache) is touched.

    Arguments:
        root: folder of runs.
        apply: True to remove the files, False to list them only.
        failed: also remove whole runs that ended before their first checkpoint.
        cache: also remove downloaded and decoded data, which are downloaded or decoded again when needed.

    Returns:
        The files that were or would be removed, with their bytes, and the runs that were left alone.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import pvae
        >>> runs = TemporaryDirectory()
        >>> few = "data.splits.train=[0, 200]"
        >>> run = pvae.fit("vae", few, "train.epochs=1", run_dir=runs.name, progress=False)
        >>> found = pvae.clean(runs.name, apply=True)
        >>> found.removals, found.skipped  # no write was interrupted
        ((), ())
        >>> runs.cleanup()
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
    """Collector of files that can be removed; it removes them if `apply` is set."""

    def __init__(self, root: Path, apply: bool) -> None:
        self.root, self.apply, self.at_work = root, apply, False
        self.removals: list[Removal] = []
        self.skipped: list[tuple[Path, str]] = []
        self.failed: list[tuple[Path, str]] = []

    def run(self, path: Path, state: str, failed: bool) -> None:
        """Collect (and remove) the leftovers of one run under its lock; a run that is being fitted is skipped."""
        if not _is_plain(path / "manifest.json"):
            return
        if state == "running":
            self.at_work = True
            self.skipped.append((path, "at work"))
            return
        try:
            with RunDirectory(path).held():
                whole = [(path, f"{state} before its first checkpoint")]
                self.sweep(whole if failed and _never_saved(path, state) else _parts(path))
        except (BusyError, OutputError, DataError, CheckpointError) as problem:
            self.skipped.append((path, str(problem)))

    def cached(self, entry: Path, lock: Path) -> None:
        """Collect (and remove) one cache entry under its lock; an entry in use is skipped."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(lock, timeout=0):
                self.sweep([(entry, "cache")])
        except (Timeout, OSError) as problem:
            self.skipped.append((entry, f"held by another process: {problem}"))

    def sweep(self, doomed: Iterable[tuple[Path, str]]) -> None:
        """Record files as removals, and remove them if `apply` is set."""
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
    """Return the leftover files and old checkpoints of a run, each with the reason to remove it."""
    found = [item for folder in (path, path / "analysis", path / "report") for item in _old_temporaries(folder)]
    return [*found, *_strays(path / "checkpoints"), *_surplus(path / "checkpoints")]


def _old_temporaries(folder: Path) -> list[tuple[Path, str]]:
    """Return temporary files of interrupted writes; recent ones, perhaps of an analysis in progress, are left out."""
    before = time.time() - STALE_AFTER_SECONDS
    old = [path for path in _hidden(folder, ".tmp-") if path.lstat().st_mtime < before]
    return [(path, "left by an interrupted write") for path in old]


def _hidden(folder: Path, start: str) -> list[Path]:
    """Return the entries of a folder whose names begin with `start`; [] if the folder is a link or absent."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    return [folder / name for name in sorted(os.listdir(folder)) if name.startswith(start)]


def _strays(folder: Path) -> list[tuple[Path, str]]:
    """Return temporary folders of interrupted checkpoint writes, and renamed old checkpoints that were replaced."""
    replaced = [path for path in _hidden(folder, ".old-") if (folder / path.name[5:].rpartition("-")[0]).is_dir()]
    return [(path, "left by an interrupted write") for path in [*_hidden(folder, ".tmp-"), *replaced]]


def _surplus(folder: Path) -> list[tuple[Path, str]]:
    """Return the checkpoints older than the `KEPT_CHECKPOINTS` newest readable ones."""
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
    """Return True if a run ended without any checkpoint; False for a very new run, which may be about to start."""
    if state not in ("failed", "interrupted", "stale", "created") or checkpoint.newest_first(path / "checkpoints"):
        return False
    return time.time() - (path / "manifest.json").lstat().st_mtime > STALE_AFTER_SECONDS


def _cached() -> Iterator[tuple[Path, Path]]:
    """Yield the cache entries with their lock files: downloaded collections, decoded sources, unfinished entries."""
    root = cache_folder()
    for parent in (root, root / "decoded"):
        for folder in folders(parent) if not parent.is_symlink() else ():
            if folder != root / "decoded":
                yield folder, parent / f"{folder.name}.lock"
        for part in _hidden(parent, ".part-"):
            yield part, parent / f"{part.name.removeprefix('.part-').rpartition('-')[0]}.lock"


def _size(path: Path) -> int:
    """Return the size (bytes) of a file, or of all files in a folder, without following links."""
    own = path.lstat()
    if not stat.S_ISDIR(own.st_mode):
        return own.st_size
    return sum(e.stat(follow_symlinks=False).st_size for e in walk(path) if not e.is_dir(follow_symlinks=False))


def _remove(path: Path) -> None:
    """Remove a file or folder; a folder is renamed first, so that an interruption leaves no partial run."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    doomed = path.with_name(f".tmp-{os.urandom(8).hex()}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)
