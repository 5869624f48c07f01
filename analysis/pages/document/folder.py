"""Folder of a page: files are written atomically, and a folder with HTML that pvae did not write is refused."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvae.errors import DataError, OutputError
from pvae.util.files import make_folder, read_object, write_atomic

PAGE, NUMBERS, TABLES, PICTURES, FILES = "index.html", "report.json", "tables", "figures", "files"
FILE_NAME_CHARACTERS = 80
"""Longest file name, without its extension, that is not shortened."""
NUMBERS_BYTES = 1 << 28
"""Largest `report.json` of an earlier page that is read, in bytes."""
OWN = re.compile(rf"{TABLES}/[\w.-]+\.csv|{PICTURES}/[\w.-]+\.png", re.ASCII)
"""Relative paths that the CSV and PNG files of a page can have."""


def claim(folder: Path) -> set[str]:
    """Create the folder of a page, with its parents, or reuse that of an earlier page.

    Returns:
        The relative paths of the CSV and PNG files that the earlier page wrote; empty for a new folder.

    Raises:
        DataError: the folder holds an `index.html` or `report.json` that pvae did not write.
        OutputError: the folder cannot be created.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise OutputError(f"{folder}: expected a folder; got {problem.strerror}.") from problem
    make_folder(folder)
    if not any((folder / name).exists() for name in (PAGE, NUMBERS)):
        return set()
    found = read_object(folder, NUMBERS, NUMBERS_BYTES) if (folder / NUMBERS).exists() else {}
    if "verdict" not in found:
        raise DataError(
            f"{folder}: expected an empty folder, or one of an earlier report; got other pages. "
            "Name another folder with --out."
        )
    listed = found.get(FILES)
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    return {name for name in names if OWN.fullmatch(name)}


def write_page(folder: Path, old: set[str], numbers: Mapping[str, Any], files: Mapping[str, bytes], page: str) -> Path:
    """Write `report.json`, the files and then `index.html` into a folder; return the path of the HTML file.

    The HTML comes last: if it is new, all other files are new. Files of `old` that are not written again are removed.
    """
    for name in sorted({name.split("/")[0] for name in (*files, *old)}):
        make_folder(folder / name)
    listed = {**numbers, FILES: sorted(files)}
    write_atomic(folder / NUMBERS, json.dumps(listed, indent=2, allow_nan=False, ensure_ascii=True) + "\n")
    for name, content in files.items():
        write_atomic(folder / name, content)
    for name in old - files.keys():
        (folder / name).unlink(missing_ok=True)
    write_atomic(folder / PAGE, page)
    return folder / PAGE


def slug(name: str) -> str:
    """Return a valid file name for the id of a table or picture; different ids give different file names."""
    plain = re.sub(r"[^A-Za-z0-9._]", lambda m: f"-{ord(m.group()):x}", name) or "-"
    if len(plain) <= FILE_NAME_CHARACTERS:
        return plain
    return f"{plain[:FILE_NAME_CHARACTERS]}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:16]}"
