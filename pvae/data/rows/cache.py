"""Cache of downloaded and decoded data sets: an entry is locked while it is made and checksummed when it is opened."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pvae.data.rows.files import FileArray, version_of
from pvae.errors import BusyError, DataError, OutputError, StorageError, instead, refuse
from pvae.util import Record
from pvae.util.files import file_digest, is_sealed, pretty, raising, read_object, sealed

LOCK_SECONDS = 900
DECODED_FORMAT = 7
"""Format version of decoded cache entries; an entry of another version is decoded again."""
INDEX = "index.json"
NAME_BYTES = 200
"""Largest number of bytes of the name of a row of a table."""


def texts(values: Any) -> np.ndarray:
    """Return names of rows `(n,)` as NumPy text, exactly as they are written; missing ones are empty."""
    import pandas

    cells = pandas.Series(values).reset_index(drop=True).convert_dtypes()  # 1 and not 1.0 beside a missing value
    return np.array(cells.astype("string").fillna("").to_numpy(object), np.str_)


def cache_folder() -> Path:
    """Return the user's cache folder for downloaded and decoded data sets."""
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("pvae"))


@contextmanager
def created(folder: Path) -> Iterator[None]:
    """Create a cache folder if needed; raises OutputError for it and for the files that the context creates there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OutputError(f"Expected a cache folder at {folder}; got {error}. Set XDG_CACHE_HOME.") from error


def room(folder: Path) -> AbstractContextManager[None]:
    """Raise StorageError if writing to a cache folder fails in the context, so that no reader blames its own file."""
    return raising(StorageError, f"{folder}: expected room for the rows", "Free some, or set XDG_CACHE_HOME.")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a cache folder if needed and hold its lock for the duration of the context.

    Raises:
        BusyError: another process has not released the lock within `LOCK_SECONDS`.
        OutputError: the folder cannot be created.
    """
    from filelock import FileLock, Timeout

    lock = folder.parent / f"{folder.name}.lock"
    with created(folder):
        try:
            with FileLock(lock, timeout=LOCK_SECONDS):
                yield
        except Timeout:
            raise BusyError(f"Expected the lock {lock}; another process holds it for {LOCK_SECONDS} s.") from None


class Decoded(Record):
    """Cache entry of a source: its arrays as files that can be read by rows, and the notes made while decoding."""

    arrays: dict[str, FileArray]
    notes: dict[str, Any]

    def texts(self, name: str) -> np.ndarray | None:
        """Return the texts `(n,)` that were written under a name; None if there are none."""
        return np.char.decode(self.arrays[name][:], "utf-8") if name in self.arrays else None


class Writer:
    """Writer of a cache entry, to which a source appends rows chunk by chunk.

    Arguments:
        folder: folder of the entry that is being written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.notes: dict[str, Any] = {}
        """Notes stored with the arrays, such as label names; any JSON values."""
        self.arrays: dict[str, dict[str, Any]] = {}
        """Type (as NumPy writes it) and shape of the rows of every array, by its name."""

    def append(self, name: str, rows: np.ndarray) -> None:
        """Append rows `(m, *row)` to the named array, all of one type and one row shape."""
        self.arrays.setdefault(name, {"dtype": rows.dtype.str, "row": rows.shape[1:]})
        with room(self.folder), (self.folder / name).open("ab") as file:
            file.write(np.ascontiguousarray(rows).data)

    def append_texts(self, name: str, words: np.ndarray, width: int | None = NAME_BYTES) -> None:
        """Append texts `(m,)` of at most `width` bytes in UTF-8, the same at each call; None for texts of one call.

        Raises:
            DataError: a text is longer.
        """
        encoded = np.char.encode(words, "utf-8", "backslashreplace")
        width = width or encoded.itemsize
        refuse(encoded.itemsize > width, "data.rows.width", width=width, encoded=encoded)
        self.append(name, encoded.astype(f"S{width}"))

    def extend(self, name: str, pieces: Iterable[np.ndarray]) -> None:
        """Append all chunks of rows to the named array."""
        for rows in pieces:
            self.append(name, rows)


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
    folder = cache_folder() / "decoded" / sealed({**key, "format": DECODED_FORMAT})["sha256"][:32]
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
    with suppress(OSError, DataError, KeyError, AttributeError, TypeError):
        if not is_sealed(index := read_object(folder, INDEX)):
            return None
        arrays: dict[str, FileArray] = {}
        for name, kept in index["arrays"].items():
            path, dtype = folder / name, np.dtype(kept["dtype"])
            if file_digest(path) != kept["sha256"]:
                return None
            version = version_of(path)
            rows = version[0] // (dtype.itemsize * prod(kept["row"]))
            arrays[name] = FileArray(path, dtype, (rows, *kept["row"]), 0, version)
        return Decoded(arrays, index["notes"])
    return None


def _make(folder: Path, make: Callable[[Writer], None]) -> None:
    for stray in folder.parent.glob(f".part-{folder.name}-*"):  # of a process that was killed; the lock is ours
        shutil.rmtree(stray, ignore_errors=True)
    place: dict[str, Any] = {"dir": folder.parent, "prefix": f".part-{folder.name}-"}
    with TemporaryDirectory(**place, ignore_cleanup_errors=True) as temporary:
        part = Path(temporary)
        writer = Writer(part)
        with instead(OSError, "Expected data that can be read; got {problem}."):  # no fault of the cache's disk
            make(writer)
        with room(folder):
            arrays = {name: {**kept, "sha256": file_digest(part / name)} for name, kept in writer.arrays.items()}
            (part / INDEX).write_text(pretty(sealed({"arrays": arrays, "notes": writer.notes})))
            shutil.rmtree(folder)
            part.rename(folder)
