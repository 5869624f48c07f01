"""Crash-safe files: atomic replacement, repair of incomplete lines, no reading through links. Standard library only."""

import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from pvae.errors import DataError, OutputError, PvaeError, StorageError, refuse

MIB = 1 << 20

_CANNOT_CREATE = frozenset([errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG])
_FULL = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
_PLAIN_NAME = re.compile(r"(?!\.{1,2}\Z)[^/\\\0]+\Z")


@contextmanager
def raising(kind: type[PvaeError], expected: str, advice: str = "") -> Iterator[None]:
    """Replace an OSError in the context by a `kind` with the message "<expected>; got <reason>. <advice>".

    On a full disk an OutputError becomes a StorageError: another place on it would not help.
    """
    try:
        yield
    except OSError as problem:
        if kind is OutputError and problem.errno in _FULL:
            kind, advice = StorageError, "Make room there and try again."
        raise kind(f"{expected}; got {problem.strerror or problem}. {advice}".rstrip()) from problem


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
    write_together({path: text}, durable=durable)


def write_together(contents: Mapping[Path, str | bytes], *, durable: bool = True) -> None:
    """Write several files, as `write_atomic` does one: all are written under other names before the first is replaced.

    They are replaced in the order given. Raises as `write_atomic`; an error in writing leaves all old files unchanged.
    """
    if follows():
        return
    written: dict[Path, Path] = {}
    try:
        for path, text in contents.items():
            require_plain_target(path)
            written[path] = temporary_for(path)
            content = text.encode(errors="backslashreplace") if isinstance(text, str) else text
            write_new(written[path], content, durable=durable)
        for path, temporary in written.items():
            os.replace(temporary, path)
        for folder in {path.parent for path in written if durable}:
            sync_folder(folder)
    except OSError as problem:
        kind = OutputError if problem.errno in _CANNOT_CREATE else StorageError
        said = f"{path}: expected to be written; got {problem.strerror or problem}. What stood there is unchanged."
        raise kind(said) from problem
    finally:
        for temporary in written.values():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Context that yields a new file beside ``path``, to be filled part by part; at the end it replaces ``path``.

    Raises as `write_atomic`; an error or an interruption leaves what stood there, and no other file.
    """
    temporary = temporary_for(path)
    try:
        with raising(OutputError, f"{path}: expected to be written", "What stood there is unchanged."):
            require_plain_target(path)
            write_new(temporary, b"", durable=False)
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def follows() -> bool:
    """Return True in the processes that torchrun started beside the first, to which they leave all writing."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0"


def make_folder(folder: Path) -> Path:
    """Return a folder after creating it if it does not exist; its parent must exist.

    Raises:
        DataError: the path is a link, which could lead out of the run.
        OutputError: the folder cannot be created.
    """
    refuse(folder.is_symlink(), f"{folder}: expected a folder inside the run; got a link to {folder.resolve()}.")
    with raising(OutputError, f"{folder}: expected a folder"):
        folder.mkdir(exist_ok=True)
    return folder


def temporary_for(path: Path) -> Path:
    """Return a new name beside a path, with this host and process in it, by which others see that it is at work.

    What stands there after a crash counts as left by an interrupted write.
    """
    return path.with_name(f".tmp-{zlib.crc32(platform.node().encode()):08x}-{os.getpid()}-{os.urandom(4).hex()}")


def remove(path: Path, *, ignore_errors: bool = False) -> None:
    """Remove a file or folder; a folder is renamed first, so that an interruption leaves no part under its name."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    doomed = temporary_for(path)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=ignore_errors)


def _open_plain(path: Path, flags: int) -> int:
    """Return the descriptor of an opened regular file; raises OSError for a link, device or pipe, without blocking."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a link, which is not followed")
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
    refuse(not _PLAIN_NAME.match(name), f"{folder}: expected a plain file name; got {name!r}.")
    readable = raising(DataError, f"{folder / name}: expected a plain readable file")
    with readable, os.fdopen(_open_plain(folder / name, os.O_RDONLY), "rb") as file:
        content = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)  # it allocates what it is asked for
    refuse(len(content) > limit, f"{folder / name}: expected at most {limit} bytes; got more.")
    return content


def read_object(folder: Path, name: str, limit: int = 16 * MIB) -> dict[str, Any]:
    """Return the JSON object in the file ``name`` of ``folder``; raises DataError if it contains anything else."""
    return parse_object(folder / name, read_inside(folder, name, limit))


def parse_object(where: Path, content: bytes) -> dict[str, Any]:
    """Return the JSON object in the bytes of the file `where`; raises DataError if they contain anything else."""
    if (found := _json_object(content)) is None:
        raise DataError(f"{where}: expected a JSON object; got {len(content)} bytes that start {content[:24]!r}.")
    return found


def _json_object(content: bytes) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):
        found = json.loads(content.decode())
        return found if isinstance(found, dict) else None
    return None


def plain(value: Any) -> Any:  # noqa: ANN401  (any value goes in, its JSON twin comes out)
    """Return ``value`` as JSON values: NaN and infinity become null, other numbers floats, dataclasses their fields.

    Others are their `to_dict`, or text.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    if is_dataclass(value):
        return plain(vars(value))
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return str(value)
    return number if math.isfinite(number) else None


def pretty(fields: Mapping[str, Any] | list[Any]) -> str:
    """Return indented JSON text that ends in a newline, with NaN and infinities written as null."""
    return json.dumps(plain(fields), indent=2, allow_nan=False) + "\n"


def sealed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``fields`` with ``sha256``, the digest of all others, by which an edit is seen."""
    content = {key: value for key, value in fields.items() if key != "sha256"}
    return {**content, "sha256": digest(pretty(content).encode())}


def digest(content: bytes) -> str:
    """Return the SHA-256 digest of bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 digest of a file's bytes, in hexadecimal, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_sealed(fields: Mapping[str, Any]) -> bool:
    """Return True if ``fields`` are as `sealed` returned them."""
    with suppress(RecursionError):
        return bool(fields.get("sha256") == sealed(fields)["sha256"])
    return False


def json_line(fields: Mapping[str, Any]) -> bytes:
    """Return one line of JSON as bytes, with NaN and infinities written as null."""
    return json.dumps(plain(fields), allow_nan=False).encode() + b"\n"


def append(path: Path, line: bytes) -> None:
    """Append a complete line to a file, or nothing (raises OSError); an incomplete last line is repaired first."""
    if follows():
        return
    descriptor = _open_plain(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        if (size := os.fstat(descriptor).st_size) and os.pread(descriptor, 1, size - 1) != b"\n":
            content = os.pread(descriptor, size, 0)
            start = content.rfind(b"\n") + 1
            if _json_object(content[start:]) is None:  # cut off
                os.ftruncate(descriptor, size := start)
            else:  # only its newline is missing
                line = b"\n" + line
        try:
            while line:
                line = line[os.write(descriptor, line) :]
        except OSError:
            os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def read_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return the objects of a JSON lines file, [] if it does not exist; a damaged last line is dropped.

    Raises DataError with the line number if any other line is damaged: data are never dropped silently.
    """
    if not os.path.lexists(folder / name):
        return []
    lines = [line for line in read_inside(folder, name, 1 << 31).split(b"\n") if line.strip()]
    if (rows := [_json_object(line) for line in lines]) and rows[-1] is None:
        rows.pop()
    refuse(None in rows, "util.files.garbage", path=folder / name, rows=rows)
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
