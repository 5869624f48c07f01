"""Creation of new run folders, and look-up of runs by name. Standard library only."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pvae.errors import DeclarationError, near
from pvae.runs.names import new_run_id, slug


def fresh_folder(parent: Path) -> Path:
    """Return a newly created, unique folder for a run in ``parent``; raises OSError."""
    parent.mkdir(parents=True, exist_ok=True)
    for _ in range(100):
        with suppress(FileExistsError):
            folder = parent / new_run_id()
            folder.mkdir()
            return folder
    raise FileExistsError(errno.EEXIST, f"a hundred run ids, all of them taken, in {parent}")


def is_run(folder: Path) -> bool:
    """Return True if a folder is a run directory, that is, contains a file `manifest.json`."""
    try:
        return stat.S_ISREG((folder / "manifest.json").lstat().st_mode)
    except (OSError, ValueError):
        return False


def folders(parent: Path) -> list[Path]:
    """Return the folders in ``parent``, sorted, without links and hidden ones; [] if it cannot be read."""
    try:
        with os.scandir(parent) as entries:
            found = [e.name for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
    except (OSError, ValueError):
        return []
    return [parent / name for name in sorted(found)]


def _newest(folders: list[Path]) -> list[Path]:
    """Return a list of the run directory with the latest id among the folders; empty if none is a run."""
    return sorted(filter(is_run, folders), key=lambda folder: folder.name)[-1:]


def find_run(path: str, root: Path) -> Path:
    """Return the folder of the run with a path or name; raises DeclarationError, with similar names, if not found."""
    for folder in _candidates(path, root):
        if is_run(folder):
            return folder.resolve()
    names = _names_near(Path(path), root)
    there = f"; there are {', '.join(names[:8])}" if names else "; there is none yet, pvae fit vae makes one"
    raise DeclarationError(
        f"Expected a run directory (it holds manifest.json), or a run in {root}{there}; got {path[:200]!r}"
        f"{near(path.rstrip('/').rpartition('/')[2], names)}."
    )


def _candidates(path: str, root: Path) -> Iterator[Path]:
    """Yield the folders that a path or name of a run may refer to, in order of precedence."""
    if path == "latest":
        yield from _newest([run for name in folders(root) for run in folders(name)])
        return
    for folder in (Path(path), root / path, root / slug(path)):
        yield folder
        yield from _newest(folders(folder))


def _names_near(path: Path, root: Path) -> list[str]:
    runs = folders(path.parent) + folders(root)
    return sorted({folder.name for folder in runs})
