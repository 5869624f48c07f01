"""The cache of downloaded and decoded data: locked while an entry is made, checked when it is opened."""

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
"""Version of decoded entries; an entry of another version is made again."""
INDEX = "index.json"


def cache_folder() -> Path:
    """Return the folder of downloads and decoded data."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("pvae"))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Own a folder of the cache, made on demand.

    Raises:
        BusyError: another process holds it for a quarter of an hour.
        OutputError: it cannot be made.
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
    """Arrays of a source in a form that can be read by rows, with notes that were taken when they were decoded."""

    arrays: dict[str, FileArray]
    notes: dict[str, Any]


class Writer:
    """Writer of a cache entry, to which a source adds rows piece by piece.

    Arguments:
        folder: of the entry that is being made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: dict[str, Any] = {}
        """Kept beside the arrays; anything JSON can say."""
        self.arrays: dict[str, Growing] = {}

    def append(self, name: str, rows: Array) -> None:
        """Add rows `(m, *row)` to an array; its type and the shape of a row are those of its first piece."""
        if name not in self.arrays:
            self.arrays[name] = Growing(self.folder / f"{name}.npy", rows.dtype, rows.shape[1:])
        self.arrays[name].append(rows)

    def extend(self, name: str, pieces: Iterable[Array]) -> None:
        """Add rows, piece by piece."""
        for rows in pieces:
            self.append(name, rows)


class Growing:
    """A `.npy` file that grows by rows."""

    def __init__(self, path: Path, dtype: np.dtype[Any], row: tuple[int, ...]) -> None:
        self.path, self.dtype, self.row, self.rows = path, dtype, row, 0
        try:
            self.file = path.open("xb")
            self._head()
        except OSError as error:
            raise _no_room(path.parent, error) from error

    def _head(self) -> None:
        """Write the header; NumPy leaves room in it for the number of rows, so that it can be written anew."""
        described = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self.file, {**described, "shape": (self.rows, *self.row)})

    def append(self, rows: Array) -> None:
        """Add rows."""
        try:
            self.file.write(np.ascontiguousarray(rows, self.dtype).data)
        except OSError as error:  # here, so that no reader takes a full disk for a broken file
            raise _no_room(self.path.parent, error) from error
        self.rows += len(rows)

    def close(self) -> None:
        """Write the number of rows into the header, and everything to the disk."""
        self.file.seek(0)
        self._head()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


def decoded(key: Mapping[str, Any], make: Callable[[Writer], None]) -> Decoded:
    """Return the arrays that `make` decodes, from the cache when they are there and whole.

    Arguments:
        key: everything that they depend on, also the version of their file; anything JSON can say.
        make: decodes them; an error that it raises goes through, and nothing is kept.

    Raises:
        DataError: nothing was decoded.
        OutputError: the cache cannot be written.
        StorageError: the disk is full.
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
    """Return an entry of which every byte is as it was written, or None."""
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
