"""Command `clean`: removal of leftovers of interrupted writes, old checkpoints, failed runs and cached data."""

import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.table import Column, Table
from rich.text import Text

from pvae.data.rows.cache import cache_folder
from pvae.errors import CheckpointError, PvaeError, text
from pvae.runs import RunDirectory, checkpoint, list_runs
from pvae.runs.find import RUN_ID, STALE_AFTER_SECONDS, folders, is_abandoned, is_run, leftovers
from pvae.upkeep.verify import FILES, FOLDERS
from pvae.util import Record
from pvae.util.checks import one_line
from pvae.util.files import MIB, remove, walk

Doomed = tuple[Path, str]
"""File or folder that can be removed, and the reason."""


class Removal(Record):
    """File or folder that can be removed.

    Arguments:
        path: path of the file or folder.
        size: total size of its files, in bytes.
        why: reason why it can be removed.
    """

    path: Path
    size: int
    why: str


@dataclass(repr=False)
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
    removals: tuple[Removal, ...] = ()
    skipped: tuple[tuple[Path, str], ...] = ()
    failed: tuple[tuple[Path, str], ...] = ()

    @property
    def size(self) -> int:
        """Total size of all removals, in bytes."""
        return sum(removal.size for removal in self.removals)

    def summary(self) -> str:
        """Return a line with the number of removals and the space that was freed, or would be."""
        return text("upkeep.clean.summary", found=self, size=megabytes(self.size))

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values, with sizes in bytes."""
        removals = [{"path": str(r.path), "bytes": r.size, "why": r.why} for r in self.removals]
        skipped, failed = ([{"path": str(p), "why": why} for p, why in rows] for rows in (self.skipped, self.failed))
        whole = {"root": str(self.root), "applied": self.applied, "bytes": self.size}
        return {**whole, "removals": removals, "skipped": skipped, "failed": failed}

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yield the printed rows: path, size (or "skipped", "failed") and reason of every file or run."""
        found = [(r.path, megabytes(r.size), r.why) for r in self.removals]
        found += [(path, "skipped", why) for path, why in self.skipped]
        found += [(path, "failed", why) for path, why in self.failed]
        return ((one_line(str(path)), size, one_line(why)) for path, size, why in found)

    def __rich__(self) -> Table:
        columns = (Column("path", overflow="fold"), Column("size", justify="right", no_wrap=True), "why")
        table = Table(*columns, caption=self.summary(), caption_justify="left")
        for row in self.rows():
            table.add_row(*map(Text, row))
        return table

    def __str__(self) -> str:
        return "\n".join([*(f"{size:>10}  {path}  ({why})" for path, size, why in self.rows()), self.summary()])

    __repr__ = __str__

    def _sweep(self, place: Path, lock: AbstractContextManager[object], doomed: Iterable[Doomed]) -> None:
        """Collect (and remove) what `doomed` finds in a place, under its lock; a place in use is skipped."""
        try:
            with lock:
                for path, why in list(doomed):
                    self._take(path, why)
        except (PvaeError, OSError) as problem:
            held = "held by another process: " if isinstance(problem, Timeout) else ""
            self.skipped += ((place, f"{held}{problem}"),)

    def _take(self, path: Path, why: str) -> None:
        try:
            removal = Removal(path, _size(path), why)
            if self.applied:
                remove(path)
            self.removals += (removal,)
        except OSError as problem:
            self.failed += ((path, str(problem.strerror or problem)),)


def megabytes(size: int) -> str:
    """Return a number of bytes formatted in MiB or KiB."""
    return f"{size / MIB:.1f} MiB" if size >= MIB / 10 else f"{size / 1024:.1f} KiB"


def clean(root: str | Path = "runs", *, apply: bool = False, failed: bool = False, cache: bool = False) -> Cleaning:
    """Remove, or list, the leftovers of interrupted writes and the old checkpoints in a folder of runs.

    In every run that no process has locked, these are the temporary files of interrupted writes that `verify` finds,
    and checkpoints older than the two newest readable ones. The run is locked meanwhile. Folders of runs that were
    killed before they had a manifest, and temporary files beside runs, are removed too. Links are neither followed nor
    removed, and nothing outside the folder of runs (and the cache) is touched.

    Arguments:
        root: folder of runs.
        apply: True to remove the files, False to list them only.
        failed: also remove whole runs that ended before their first checkpoint.
        cache: also remove downloaded and decoded data and compiled steps, which are made again when needed.

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
    folder, at_work = Path(root), False
    found = Cleaning(folder, apply)
    for row in list_runs(folder):
        path, state = Path(row["path"]), row["state"]
        if state == "running" and is_run(path):
            at_work = True
            found.skipped += ((path, "at work"),)
        elif is_run(path):
            found._sweep(path, RunDirectory(path).held(), _leftovers(path, state if failed else ""))
    for name in folders(folder):
        for path in folders(name):
            if not is_run(path) and RUN_ID.fullmatch(path.name) and _is_void(path, failed):
                held = RunDirectory(path).held() if (path / ".lock").exists() else nullcontext()
                found._sweep(path, held, [(path, "without a manifest")])
        found._sweep(name, nullcontext(), _abandoned(sorted(name.glob(".tmp-*"))))
    if cache and at_work:
        found.skipped += ((cache_folder(), "a run at work may be reading from it"),)
    for entry, lock in _cached() if cache and not at_work else ():
        found._sweep(entry, FileLock(lock, timeout=0), [(entry, "cache")])
    return found


def _leftovers(run: Path, ended: str) -> Iterator[Doomed]:
    """Yield leftovers and old checkpoints of a run; the whole run if it has `ended` in this state without any."""
    if ended in ("failed", "interrupted", "stale", "created") and not checkpoint.newest_first(run / "checkpoints"):
        if time.time() - (run / "manifest.json").lstat().st_mtime > STALE_AFTER_SECONDS:  # else perhaps about to start
            yield run, f"{ended} before its first checkpoint"
            return
    yield from _abandoned(leftovers(run), saved := run / "checkpoints")
    yield from _surplus(saved)


def _abandoned(paths: Iterable[Path], locked: Path | None = None) -> Iterator[Doomed]:
    """Return leftovers, but for those that may be of a write in progress; none is in a `locked` folder."""
    found = (path for path in paths if path.parent == locked or is_abandoned(path))
    return ((path, "left by an interrupted write") for path in found)


def _is_void(run: Path, failed: bool) -> bool:
    """Return True if a folder without a manifest holds temporaries alone; if `failed`, also files but no checkpoint."""
    names = {name for name in os.listdir(run) if not name.startswith(".tmp-")} - {".lock"}
    return not names or (failed and names <= {*FILES, *FOLDERS} and not checkpoint.newest_first(run / "checkpoints"))


def _surplus(folder: Path) -> list[Doomed]:
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


def _cached() -> Iterator[tuple[Path, Path]]:
    """Yield the cache entries with lock files: collections, decoded sources, compiled steps, unfinished entries."""
    root = cache_folder()
    shelves = root / "decoded", root / "compiled"
    for parent in (root, *shelves):
        for folder in folders(parent) if not parent.is_symlink() else ():
            if folder not in shelves:
                yield folder, parent / f"{folder.name}.lock"
        for part in [] if parent.is_symlink() else sorted(parent.glob(".part-*")):
            yield part, parent / f"{part.name.removeprefix('.part-').rpartition('-')[0]}.lock"


def _size(path: Path) -> int:
    """Return the size (bytes) of a file, or of all files in a folder, without following links."""
    if not stat.S_ISDIR((own := path.lstat()).st_mode):
        return own.st_size
    return sum(e.stat(follow_symlinks=False).st_size for e in walk(path) if not e.is_dir(follow_symlinks=False))
