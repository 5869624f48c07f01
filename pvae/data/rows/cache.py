"""Cache of downloaded and decoded data sets: an entry is locked while it is made and checksummed when it is opened."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pvae.data.rows.arrays import FileArray, npy_array
from pvae.errors import BusyError, DataError, OutputError, StorageError
from pvae.util.files import pretty, read_object
from pvae.util.types import Array

LOCK_SECONDS = 900
DECODED_FORMAT = 2
"""Format version of decoded cache entries; an entry of another version is decoded again."""
INDEX = "index.json"


def cache_folder() -> Path:
    """Return the user's cache folder for downloaded and decoded data sets."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("pvae"))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a cache folder if needed and hold its lock for the duration of the context.

    Raises:
        BusyError: another process has not released the lock within `LOCK_SECONDS`.
        OutputError: the folder cannot be created.
    """
    from filelock import FileLock, Timeout

    lock = folder.parent / f"{folder.name}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock, timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise BusyError(f"Expected the lock {lock}; another process holds it for {LOCK_SECONDS} s.") from None
    except OSError as error:
        raise OutputError(f"Expected a cache folder at {folder}; got {error}. Set XDG_CACHE_HOME.") from error


@dataclass(frozen=True)
class Decoded:
    """Cache entry of a source: its arrays as files that can be read by rows, and the notes made while decoding."""

    arrays: dict[str, FileArray]
    notes: dict[str, Any]


class Writer:
    """Writer of a cache entry, to which a source appends rows chunk by chunk.

    Arguments:
        folder: folder of the entry that is being written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: dict[str, Any] = {}
        """Notes stored with the arrays, such as label names; any JSON values."""
        self.arrays: dict[str, Growing] = {}

    def append(self, name: str, rows: Array) -> None:
        """Append rows `(m, *row)` to the named array, whose type and row shape are those of its first rows."""
        if name not in self.arrays:
            self.arrays[name] = Growing(self.folder / f"{name}.npy", rows.dtype, rows.shape[1:])
        self.arrays[name].append(rows)

    def extend(self, name: str, pieces: Iterable[Array]) -> None:
        """Append all chunks of rows to the named array."""
        for rows in pieces:
            self.append(name, rows)


class Growing:
    """File in `.npy` format to which rows can be appended, and whose header is completed by `close`."""

    def __init__(self, path: Path, dtype: np.dtype[Any], row: tuple[int, ...]) -> None:
        self.path, self.dtype, self.row, self.rows = path, dtype, row, 0
        try:
            self.file = path.open("xb")
            self._head()
        except OSError as error:
            raise _no_room(path.parent, error) from error

    def _head(self) -> None:
        """Write the `.npy` header with the present number of rows; NumPy pads it, so that it can be overwritten."""
        described = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self.file, {**described, "shape": (self.rows, *self.row)})

    def append(self, rows: Array) -> None:
        """Append rows `(m, *row)` to the file."""
        try:
            self.file.write(np.ascontiguousarray(rows, self.dtype).data)
        except OSError as error:  # here, so that no reader takes a full disk for a broken file
            raise _no_room(self.path.parent, error) from error
        self.rows += len(rows)

    def close(self) -> None:
        """Write the final number of rows into the header, flush the file to the disk, and close it."""
        self.file.seek(0)
        self._head()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def decoded(key: Mapping[str, Any], make: Callable[[Writer], None]) -> Decoded:
    """Return the decoded arrays of a source from the cache; if the entry is absent or damaged, `make` decodes it first.

    Arguments:
        key: everything that the arrays depend on, such as path and version of the file; any JSON values.
        make: function that decodes the source into a writer; its errors propagate, and then no entry is kept.

    Raises:
        DataError: the source cannot be read while it is decoded.
        OutputError: the cache folder cannot be created.
        BusyError: another process holds the lock of the entry for too long.
        StorageError: the disk is full, or the new entry fails its checksums.
    """
    folder = cache_folder() / "decoded" / _digest({**key, "format": DECODED_FORMAT})[:32]
    if (found := _opened(folder)) is None:
        with locked(folder):
            if (found := _opened(folder)) is None:
                _make(folder, make)
                found = _opened(folder)
    if found is None:
        raise StorageError(f"{folder}: expected what was just decoded; got something else. Check the disk.")
    return found


def _opened(folder: Path) -> Decoded | None:
    """Return the cache entry in a folder if all its checksums match, else None."""
    try:
        index = read_object(folder, INDEX)
        if index.pop("sha256") != _digest(index):
            return None
        arrays: dict[str, FileArray] = {}
        for name, digest in index["arrays"].items():
            path = folder / f"{name}.npy"
            if _file_digest(path) != digest:
                return None
            arrays[name] = npy_array(path)
        return Decoded(arrays, index["notes"])
    except (OSError, DataError, KeyError, AttributeError, TypeError):
        return None


def _digest(index: Mapping[str, Any]) -> str:
    return hashlib.sha256(pretty(index).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make(folder: Path, make: Callable[[Writer], None]) -> None:
    for stray in folder.parent.glob(f".part-{folder.name}-*"):  # of a process that was killed; the lock is ours
        shutil.rmtree(stray, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f".part-{folder.name}-", dir=folder.parent))
    try:
        writer = Writer(part)
        try:
            make(writer)
        except OSError as error:  # a source that cannot be read is no fault of the cache's disk
            raise DataError(f"Expected data that can be read; got {error}.") from error
        finally:
            for array in writer.arrays.values():
                with suppress(ValueError):
                    array.close()
        digests = {name: _file_digest(part / f"{name}.npy") for name in writer.arrays}
        index = {"arrays": digests, "notes": writer.notes}
        (part / INDEX).write_text(pretty({**index, "sha256": _digest(index)}))
        shutil.rmtree(folder)
        part.rename(folder)
    except OSError as error:
        raise _no_room(folder, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _no_room(folder: Path, error: OSError) -> StorageError:
    return StorageError(f"{folder}: expected room for the decoded data; got {error}. Free some, or set XDG_CACHE_HOME.")
