"""Crash-safe files: atomic replacement, repair of incomplete lines, no reading through links. Standard library only."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pvae.errors import DataError, OutputError, StorageError

MIB = 1 << 20

_CANNOT_CREATE = frozenset([errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG])
_PLAIN_NAME = re.compile(r"(?!\.{1,2}\Z)[^/\\\0]+\Z")


def sync_folder(folder: Path) -> None:
    """Flush renames inside a folder to the disk (fsync), if the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_new(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file that must not exist yet, and flush it to the disk if `durable`; raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        if durable:
            os.fsync(descriptor)


def require_plain_target(path: Path) -> None:
    """Raise OSError if a path is a device, link or folder, which replacing it would destroy."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.EINVAL, "not a plain file (a device, link or folder stands there)")


def write_atomic(path: Path, text: str | bytes, *, durable: bool = True) -> None:
    """Write a file atomically: either ``path`` is replaced completely, or an error leaves the old file unchanged.

    Raises StorageError; OutputError if no file can be created there at all (no such folder, no permission).
    ``durable=False`` omits the fsync, for files that are rewritten very often.
    """
    content = text.encode(errors="backslashreplace") if isinstance(text, str) else text
    temporary = path.with_name(f".tmp-{os.urandom(8).hex()}")
    try:
        require_plain_target(path)
        try:
            write_new(temporary, content, durable=durable)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            sync_folder(path.parent)
    except OSError as problem:
        kind = OutputError if problem.errno in _CANNOT_CREATE else StorageError
        raise kind(
            f"{path}: expected to be written; got {problem.strerror or problem}. What stood there is unchanged."
        ) from problem


def make_folder(folder: Path) -> Path:
    """Return a folder after creating it if it does not exist; its parent must exist.

    Raises:
        DataError: the path is a link, which could lead out of the run.
        OutputError: the folder cannot be created.
    """
    if folder.is_symlink():
        raise DataError(f"{folder}: expected a folder inside the run; got a link to {os.readlink(folder)!r}.")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as problem:
        raise OutputError(f"{folder}: expected a folder; got {problem.strerror}.") from problem
    return folder


def _open_plain(path: Path, flags: int) -> int:
    """Return the descriptor of an opened regular file; raises OSError for a link, device or pipe, without blocking."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a plain file")


def read_inside(folder: Path, name: str, limit: int = 16 * MIB) -> bytes:
    """Return the bytes of the regular file ``name`` in ``folder``, never reading outside of the folder.

    Raises DataError if the name contains a path, the file is a link or a device, is missing or unreadable, or exceeds
    ``limit`` bytes: a run folder received from others must not make pvae read other files.
    """
    if not _PLAIN_NAME.match(name):
        raise DataError(f"{folder}: expected a plain file name; got {name!r}.")
    try:
        with os.fdopen(_open_plain(folder / name, os.O_RDONLY), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(min(size, limit) + 1)  # it allocates what it is asked for
    except OSError as problem:
        raise DataError(
            f"{folder / name}: expected a plain readable file; got {problem.strerror or problem}."
        ) from problem
    if len(content) > limit:
        raise DataError(f"{folder / name}: expected at most {limit} bytes; got more.")
    return content


def read_object(folder: Path, name: str, limit: int = 16 * MIB) -> dict[str, Any]:
    """Return the JSON object in the file ``name`` of ``folder``; raises DataError if it contains anything else."""
    content = read_inside(folder, name, limit)
    found = _json_object(content)
    if found is None:
        raise DataError(
            f"{folder / name}: expected a JSON object; got {len(content)} bytes that start {content[:24]!r}."
        )
    return found


def _json_object(content: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(content.decode())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _plain(value: Any) -> Any:  # noqa: ANN401  (any value goes in, its JSON twin comes out)
    """Return ``value`` as JSON values: NaN and infinity become null, numbers of other libraries floats, others text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return str(value)
    return number if math.isfinite(number) else None


def pretty(fields: Mapping[str, Any] | list[Any]) -> str:
    """Return indented JSON text that ends in a newline, with NaN and infinities written as null."""
    return json.dumps(_plain(fields), indent=2, allow_nan=False) + "\n"


def json_line(fields: Mapping[str, Any]) -> bytes:
    """Return one line of JSON as bytes, with NaN and infinities written as null."""
    return json.dumps(_plain(fields), allow_nan=False).encode() + b"\n"


def append(path: Path, line: bytes) -> None:
    """Append a complete line to a file, or nothing (raises OSError); an incomplete last line is repaired first."""
    descriptor = _open_plain(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        _mend(descriptor)
        _write_whole(descriptor, line)
    finally:
        os.close(descriptor)


def _mend(descriptor: int) -> None:
    """Repair the last line of a JSON lines file: add a missing newline, or remove the line if its JSON is cut off."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    content = os.pread(descriptor, size, 0)
    start = content.rfind(b"\n") + 1
    if _json_object(content[start:]) is None:
        os.ftruncate(descriptor, start)
    else:
        _write_whole(descriptor, b"\n")


def _write_whole(descriptor: int, line: bytes) -> None:
    size = os.fstat(descriptor).st_size
    try:
        written = 0
        while written < len(line):
            written += os.write(descriptor, line[written:])
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def read_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the objects of a JSON lines file, [] if it does not exist; a damaged last line is dropped.

    Raises DataError with the line number if any other line is damaged: data are never dropped silently.
    """
    if not os.path.lexists(folder / name):
        return []
    lines = [line for line in read_inside(folder, name, 1 << 31).split(b"\n") if line.strip()]
    rows = [_json_object(line) for line in lines]
    if rows and rows[-1] is None:
        rows.pop()
    if None in rows:
        raise DataError(
            f"{folder / name}: expected one JSON object a line; got garbage in line {rows.index(None) + 1}. "
            "Delete that line to go on without it."
        )
    return [row for row in rows if row is not None]


def walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield all files and folders below ``folder``, recursively, without following links."""
    waiting = [str(folder)]
    while waiting:
        entries: list[os.DirEntry[str]] = []
        with suppress(FileNotFoundError), os.scandir(waiting.pop()) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        waiting += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        yield from entries
