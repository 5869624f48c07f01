"""Folder of a page: its files, written whole, beside nothing that no page wrote."""

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
"""Longest name that a file bears in full."""
NUMBERS_BYTES = 1 << 28
"""Largest `report.json` of an earlier page that is read."""
OWN = re.compile(rf"{TABLES}/[\w.-]+\.csv|{PICTURES}/[\w.-]+\.png", re.ASCII)
"""Files that a page has beside it."""


def claim(folder: Path) -> set[str]:
    """Make a folder, with its parents, or take that of an earlier page; returns the files which that one wrote.

    Raises:
        DataError: it holds an `index.html` or `report.json` that no page wrote.
        OutputError: it cannot be made.
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
    """Write numbers, files and page into a claimed folder; the page comes last, so that where it is new, all is.

    Files of `old` that are not written again are removed, and nothing else.
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
    """Return a name that a file can bear; different names give different ones."""
    plain = re.sub(r"[^A-Za-z0-9._]", lambda m: f"-{ord(m.group()):x}", name) or "-"
    if len(plain) <= FILE_NAME_CHARACTERS:
        return plain
    return f"{plain[:FILE_NAME_CHARACTERS]}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:16]}"
