"""Rows outside memory: arrays in files, sparse matrices and concatenations, and the reading of the user's own files."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, ClassVar, Self

import numpy as np

from pvae.errors import DataError, PvaeError, refuse
from pvae.util import Record, files, memory

SPAN_BYTES = 2**25
"""Largest span of a file, in bytes, that is mapped at once to read scattered rows, which bounds the memory used."""
PIECE_BYTES = 2**21
"""Bytes read from a stream at once, unless one row is larger."""
MAX_NPY_HEADER_BYTES = 2**16
MAX_DIMENSIONS = 32

CONFINED: ContextVar[str] = ContextVar("confined", default="")
"""Kind of the declaration that names the data, if it is not the user's: then only the user's data folder is read."""


@contextmanager
def confined(by: str) -> Iterator[None]:
    """Context in which a declaration of a kind names the data; an empty kind is the user's own, see `CONFINED`."""
    token = CONFINED.set(CONFINED.get() or by)
    try:
        yield
    finally:
        CONFINED.reset(token)


Index = slice | np.typing.NDArray[np.int64]
"""Index of rows: a slice of consecutive rows, or row numbers in ascending order."""


class Stored(ABC):
    """Array `(n, *row)` outside memory (on a disk, or sparse), of which indexing reads only the rows asked for."""

    scattered: ClassVar[bool] = False
    """True if reading scattered rows is as cheap as reading consecutive ones."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def read(self, index: Index) -> np.ndarray:
        """Return a copy of the indexed rows, `(m, ...)`, with all values of each row but not necessarily its shape.

        Raises:
            DataError: the rows cannot be read any more.
        """

    def expect(self, start: int, stop: int) -> None:  # noqa: B027 - most have nothing to do
        """Start to prefetch rows `[start, stop)`, which will be read soon, without waiting for them."""

    def reshape(self, *shape: int) -> Self:
        """Return a view of the same rows with another shape, `(n, *row)`."""
        other = copy(self)
        other.shape = shape
        return other

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Index) -> np.ndarray:
        rows = self.read(index)
        return rows.reshape(len(rows), *self.shape[1:])


AnyArray = np.ndarray | Stored
"""Rows of a source: a NumPy array in memory, or a `Stored` array that is read when it is indexed."""


@dataclass(eq=False)
class FileArray(Stored):
    """Array in a binary file, its rows stored contiguously (C order).

    The file is memory-mapped anew for every read, so that its pages do not stay in memory. A file that was changed
    since it was opened is refused.

    Arguments:
        path: the file.
        dtype: type of the values.
        shape: (n, *row).
        offset: number of bytes before the first row.
        version: what `version_of` said of the file when it was opened.
    """

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    version: tuple[int, ...]

    def read(self, index: Index) -> np.ndarray:
        if isinstance(index, slice):
            return np.array(self._mapped()[index])
        out, start = np.empty((len(index), *self.shape[1:]), self.dtype), 0
        while start < len(index):
            stop = int(np.searchsorted(index, index[start] + max(1, SPAN_BYTES // max(1, self._row_bytes))))
            out[start:stop] = self._mapped()[index[start:stop]]
            start = stop
        return out

    @property
    def _row_bytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape[1:])

    def _mapped(self) -> np.ndarray:
        refuse(version_of(self.path) != self.version, "data.files.changed", path=self.path)
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)

    def expect(self, start: int, stop: int) -> None:
        first, length = self.offset + start * self._row_bytes, (stop - start) * self._row_bytes
        # A hint only, which not every system takes: `read` says what is wrong.
        with suppress(OSError, AttributeError), self.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), first, length, os.POSIX_FADV_WILLNEED)


def version_of(path: Path) -> tuple[int, ...]:
    """Return size (bytes), times of modification and change (ns) and inode, by which a changed file is recognised.

    A copy that keeps the modification time (`rsync -t`) has another time of change, or another inode.

    Raises:
        DataError: the file cannot be found or read.
    """
    with files.raising(DataError, f"{path}: expected a file of data"):
        found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


class SparseRows(Stored):
    """Sparse matrix `(n, features)` whose rows become dense when they are indexed.

    Arguments:
        matrix: any `scipy.sparse` matrix or array; stored as CSR (compressed sparse rows).
    """

    scattered: ClassVar[bool] = True

    def __init__(self, matrix: Any) -> None:
        from scipy.sparse import csr_array

        self.matrix = csr_array(matrix)
        self.shape, self.dtype = self.matrix.shape, self.matrix.dtype

    def read(self, index: Index) -> np.ndarray:
        return np.asarray(self.matrix[index].toarray())


class Joined(Stored):
    """Concatenation of several arrays along their rows, without copying them."""

    def __init__(self, parts: Sequence[AnyArray]) -> None:
        self.parts = list(parts)
        self.shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        self.dtype = np.result_type(*(part.dtype for part in parts))
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    def read(self, index: Index) -> np.ndarray:
        pieces = []
        for part, start, stop in zip(self.parts, self.starts[:-1], self.starts[1:], strict=True):
            if isinstance(index, slice):
                low, high, _ = index.indices(len(self))
                pieces.append(part[slice(max(low, start) - start, max(0, min(high, stop) - start))])
            else:
                pieces.append(part[index[(index >= start) & (index < stop)] - start])
        return np.concatenate([piece for piece in pieces if len(piece)] or pieces[:1], dtype=self.dtype)


def user_folder(data_dir: Path | None) -> Path | None:
    """Return the user's data folder, from the argument or the environment variable ``PVAE_DATA_DIR``, or None.

    Raises:
        DataError: the folder does not exist.
    """
    if (named := data_dir or os.environ.get("PVAE_DATA_DIR")) and not Path(named).is_dir():
        raise DataError(f"--data-dir, PVAE_DATA_DIR: expected a folder; got {named}.")
    return Path(named) if named else None


def candidate(path: str, data_dir: Path | None, wanted: Callable[[Path], bool]) -> Path:
    """Return a declared path: inside the user's data folder if what is `wanted` (a file, a folder) is there.

    Raises:
        DataError: it leads out of that folder, also by links, and is named by a run that is not the user's own.
    """
    folder = user_folder(data_dir)
    found = folder / path if folder and wanted(folder / path) else Path(path)
    if by := CONFINED.get():
        if not folder or not wanted(found) or not found.resolve().is_relative_to(folder.resolve()):
            raise DataError.of("data.files.confined", found=found, folder=folder, by=by)
    return found


def located(path: str, data_dir: Path | None) -> Path:
    """Return the path of a declared data file: inside the user's data folder if it exists there, else as declared.

    Raises:
        DataError: the file does not exist; or it is a folder, a device or a pipe, which are never opened.
    """
    refuse(not (found := candidate(path, data_dir, Path.is_file)).exists(), "data.files.none", found=found)
    refuse(not found.is_file(), "data.files.no_file", found=found)
    return found


@contextmanager
def broken_as(problem: str) -> Iterator[None]:
    """Convert errors of readers of foreign bytes, raised in the context, to a `DataError` that begins with `problem`.

    Such readers may raise anything, warnings made errors among it.
    """
    try:
        yield
    except (PvaeError, MemoryError):
        raise
    except Exception as error:
        raise DataError(f"{problem}: {error}.") from error


def require_room(shape: tuple[int, ...], dtype: np.dtype[Any], name: str, advice: str = "") -> None:
    """Refuse rows of which the stored copy and the float32 copy together exceed half of this computer's memory.

    Raises:
        DataError: the rows are too large; the message gives the memory that they need.
    """
    needed = (dtype.itemsize + 4) * prod(shape)
    memory.require_memory(needed, name, f"{shape} {dtype}", advice or "Set data.stream = true.")


def held(x: Stored, stream: bool, name: str) -> AnyArray:
    """Return the rows unread if they are to be streamed, else as an array in memory.

    Raises:
        DataError: see `require_room`.
    """
    if stream:
        return x
    require_room(x.shape, x.dtype, name)
    return x[:] if x.shape and 0 not in x.shape else np.empty(x.shape, x.dtype)


class ArrayLayout(Record):
    """ArrayLayout of an array in a binary stream.

    Arguments:
        shape: (n, *row); for an array in Fortran order, the reversed shape.
        dtype: type of the values.
        offset: number of bytes before the first value.
        fortran: True if the values are stored in Fortran order, that is, transposed.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int
    fortran: bool = False

    @property
    def total(self) -> int:
        """Number of bytes of the whole stream, header included."""
        return self.offset + self.dtype.itemsize * prod(self.shape)

    def pieces(self, stream: IO[bytes], where: str) -> Iterator[np.ndarray]:
        """Yield the rows of a stream, which stands at the first value, in chunks `(m, *row)` of about `PIECE_BYTES`.

        Raises:
            DataError: the stream ends early; the message gives the number of bytes that were read.
        """
        row = self.dtype.itemsize * prod(self.shape[1:])
        step = max(1, PIECE_BYTES // row)
        for start in range(0, self.shape[0], step):
            rows = min(step, self.shape[0] - start)
            content = stream.read(rows * row)
            refuse(len(content) < rows * row, "data.rows.cut", where=where, layout=self, end=start * row + len(content))
            yield np.frombuffer(content, self.dtype).reshape(rows, *self.shape[1:])

    def in_rows(self, x: AnyArray) -> AnyArray:
        """Return an array that was read with this shape, transposed to rows first if in Fortran order."""
        return np.ascontiguousarray(x.T) if self.fortran and isinstance(x, np.ndarray) else x


def npy_layout(stream: IO[bytes], size: int, where: str, by_rows: bool, kinds: str = "biuf") -> ArrayLayout:
    """Return the layout of a `.npy` stream, which is left at the position of the first value.

    Arguments:
        stream: binary stream at its start.
        size: total number of bytes of the stream.
        where: name of the stream in messages.
        by_rows: refuse an array in Fortran order, whose rows are not contiguous and cannot be streamed.
        kinds: accepted kinds of dtypes, by NumPy's letters.

    Raises:
        DataError: the stream is not in NumPy's format, does not contain real numbers (object arrays could run code),
            is in Fortran order, or its size differs from that of its header.
    """
    with broken_as(f"{where}: expected a NumPy array (.npy); got a broken or foreign file"):
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream, max_header_size=MAX_NPY_HEADER_BYTES)
    refuse(dtype.hasobject, f"{where}: expected numbers; got an object array, which could run code. Save floats.")
    refuse(dtype.kind not in kinds, f"{where}: expected real numbers; got {dtype}. Save floats.")
    fortran = fortran and len(shape) > 1
    layout = ArrayLayout(shape[::-1] if fortran else shape, dtype, stream.tell(), fortran)
    if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0 or layout.total != size:
        raise DataError(f"{where}: expected {layout.total} bytes for {shape} {dtype}; got {size}.")
    refuse(fortran and by_rows, "data.files.fortran", where=where)
    return layout


def read_npy(path: Path, stream: bool = False, kinds: str = "biuf") -> AnyArray:
    """Return the array of a `.npy` file, mapped from the disk if `stream`; `kinds` as in `npy_layout`.

    Raises:
        DataError: the file does not exist or is too large for memory; see `npy_layout`.
    """
    version = version_of(path)
    with broken_as(f"{path}: expected a NumPy array (.npy); got a file that cannot be read"), path.open("rb") as file:
        layout = npy_layout(file, version[0], str(path), stream, kinds)
    array = FileArray(path, layout.dtype, layout.shape, layout.offset, version)
    return layout.in_rows(held(array, stream, str(path)))
