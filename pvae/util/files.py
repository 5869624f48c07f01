"""Files that survive a crash: replaced atomically, torn lines mended, never read through a link. No third party."""

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
    """Make renames inside ``folder`` durable, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_new(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file that must not exist yet, with the mode the umask gives; raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        if durable:
            os.fsync(descriptor)


def require_plain_target(path: Path) -> None:
    """Raise OSError for a device, link or folder, which a replacement would destroy."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.EINVAL, "not a plain file (a device, link or folder stands there)")


def write_atomic(path: Path, text: str | bytes, *, durable: bool = True) -> None:
    """Replace ``path`` whole or not at all; raises StorageError, and the old file then stands.

    It is an OutputError where no file can be made at all: no such folder, no permission.
    ``durable=False`` leaves out the fsync, for heartbeats that are written all the time.
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
    """Return a folder, which is made where its parent exists.

    Raises:
        DataError: it is a link, which could lead anywhere.
        OutputError: it cannot be made.
    """
    if folder.is_symlink():
        raise DataError(f"{folder}: expected a folder inside the run; got a link to {os.readlink(folder)!r}.")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as problem:
        raise OutputError(f"{folder}: expected a folder; got {problem.strerror}.") from problem
    return folder


def _open_plain(path: Path, flags: int) -> int:
    """Open a plain file; a link raises OSError, and so does a device or pipe, without blocking."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a plain file")


def read_inside(folder: Path, name: str, limit: int = 16 * MIB) -> bytes:
    """Read the plain file ``name`` in ``folder``.

    Raises DataError for a name with a path in it, a link, a device, a missing or unreadable file, or one over
    ``limit`` bytes: what is read from a run that was handed on must not lead out of it.
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
    """Read the JSON object in the file ``name`` of ``folder``; raises DataError for anything else."""
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
    """Return ``value`` as finite JSON: NaN and infinities as null, numbers of other libraries as floats, else text."""
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
    """Return indented JSON with a last newline; NaN and infinities as null."""
    return json.dumps(_plain(fields), indent=2, allow_nan=False) + "\n"


def json_line(fields: Mapping[str, Any]) -> bytes:
    """Return one line of JSON; NaN and infinities as null."""
    return json.dumps(_plain(fields), allow_nan=False).encode() + b"\n"


def append(path: Path, line: bytes) -> None:
    """Add one whole line, or nothing (raises OSError); a torn line left by a crash is cut off first."""
    descriptor = _open_plain(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        _mend(descriptor)
        _write_whole(descriptor, line)
    finally:
        os.close(descriptor)


def _mend(descriptor: int) -> None:
    """End the file with a whole line: add the newline if only that is missing, else cut the last line off."""
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
    """Read the objects of a file of JSON lines ([] without a file); a torn or garbage last line is dropped.

    Raises DataError with the number of any other line that is damaged: data are never dropped silently.
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
    """Yield all entries below ``folder``; links are not followed, and a folder that vanishes meanwhile is empty."""
    waiting = [str(folder)]
    while waiting:
        entries: list[os.DirEntry[str]] = []
        with suppress(FileNotFoundError), os.scandir(waiting.pop()) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        waiting += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        yield from entries
