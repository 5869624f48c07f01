"""Checks of a run's folder: analysis files, links, files that are not pvae's, leftovers of interrupted writes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from pvae.errors import DataError
from pvae.util.checks import Check, attempt
from pvae.util.files import MIB, read_inside, walk

FILES = ("manifest.json", "spec.toml", "status.json", "metrics.jsonl", "events.jsonl", ".lock")
FOLDERS = ("checkpoints", "analysis", "report", "exports")
TEMPORARY = (".tmp-", ".old-")
LISTED_FILES = 20
"""Largest number of unexpected files that are listed by name; any others are only counted."""
_DIGEST = re.compile(r"([0-9a-f]{64})  ([^/\0\n]+)\n?\Z")


def analyses(run: Path) -> Iterator[Check]:
    """Yield checks of a run's analysis files: those with a `.sha256` file against it, JSON files for validity."""
    folder = run / "analysis"
    names = sorted(os.listdir(folder)) if folder.is_dir() and not folder.is_symlink() else []
    count = 0
    for name in [n for n in names if n.endswith((".sha256", ".json"))]:
        check = _digest if name.endswith(".sha256") else _json
        found = attempt(f"analysis/{name}", partial(check, folder, name))
        count += not found
        yield from found
    yield Check("analysis", "ok", f"{count} files as they were written")


def strangers(run: Path, live: bool) -> Iterator[Check]:
    """Yield checks of unexpected files in a run's folder: links, devices, files not written by pvae.

    Temporary files of interrupted writes are reported unless the run is being fitted (`live`).
    """
    found = [check for entry in walk(run) if (check := _stranger(run, entry, live)) is not None]
    yield from found[:LISTED_FILES]
    if len(found) > LISTED_FILES:
        yield Check("files", "warning", f"{len(found) - LISTED_FILES} more that are no part of a run")
    if not found:
        yield Check("files", "ok", "no links, nothing foreign, nothing left by an interrupted write")


def _stranger(run: Path, entry: os.DirEntry[str], live: bool) -> Check | None:
    where = Path(entry.path).relative_to(run)
    name, own = str(where), where.parts[0] in (*FILES, "checkpoints") or str(where) in FOLDERS
    if not entry.is_dir(follow_symlinks=False) and not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
        kind = f"a link to {os.readlink(entry.path)}" if entry.is_symlink() else "a device, pipe or socket"
        return Check(name, "failed" if own else "warning", kind, "Remove it: pvae follows no links in a run.")
    if entry.name.startswith(TEMPORARY):
        return None if live else Check(name, "warning", "left by an interrupted write", "See pvae clean.")
    if len(where.parts) == 1 and entry.name not in (*FILES, *FOLDERS):
        return Check(name, "warning", "not of pvae", "Keep files of your own elsewhere.")
    return None


def _digest(folder: Path, name: str) -> Iterator[Check]:
    """Compare a file with its `.sha256` file; raises DataError if they differ, else yields nothing."""
    found = _DIGEST.match(read_inside(folder, name, 1 << 16).decode(errors="replace"))
    if found is None:
        raise DataError(f"{folder / name}: expected a line of sha256sum; got another. Export the file again.")
    digest = hashlib.sha256(read_inside(folder, found[2], 1 << 40)).hexdigest()
    if digest != found[1]:
        raise DataError(f"{folder / found[2]}: expected SHA-256 {found[1]}; got {digest}. Export it again.")
    yield from ()


def _json(folder: Path, name: str) -> Iterator[Check]:
    """Parse a file as JSON; raises DataError if it is invalid, else yields nothing."""
    try:
        json.loads(read_inside(folder, name, 64 * MIB))
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{folder / name}: expected JSON; got {problem}. Run the analysis again.") from problem
    yield from ()
