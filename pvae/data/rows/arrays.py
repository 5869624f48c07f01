"""Arrays that stay where they are, on a disk or sparse, and give dense rows when asked: enough of NumPy for `Rows`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from pvae.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

Array = NDArray[Any]
MAX_HEADER_BYTES = 2**16
SPAN_BYTES = 2**25
"""Most of a file that is mapped to read scattered rows: what is touched there is resident until they are read."""
MAX_DIMENSIONS = 32

Index = slice | NDArray[np.int64]
"""Consecutive rows, or row numbers in ascending order."""


class Stored(ABC):
    """Rows `(n, *row)` of one type, of which only those that are asked for are in memory."""

    scattered: ClassVar[bool] = False
    """Whether rows from all over are as cheap as neighbours."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def read(self, index: Index) -> Array:
        """Some rows, a copy `(m, *row)`.

        Raises:
            DataError: they cannot be read any more.
        """

    def expect(self, start: int, stop: int) -> None:  # noqa: B027 - most have nothing to do
        """Rows `[start, stop)` will be read soon: begin to fetch them, and do not wait."""

    @abstractmethod
    def reshape(self, *shape: int) -> Self:
        """The same rows in another shape, the number of rows first."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Index) -> Array:
        return self.read(index)

    @property
    def ndim(self) -> int:
        """Number of dimensions, that of the rows among them."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)


AnyArray = Array | Stored
"""What a source may give: an array in memory, or one that is read as it is needed."""


@dataclass(frozen=True, eq=False)
class FileArray(Stored):
    """Rows in a file, one after another, as NumPy would write them.

    The file is mapped anew for every read and unmapped after it, so that what was read does not stay resident; it is
    also found out when the file is cut short or written over while a fit goes on.

    Arguments:
        path: the file.
        dtype: of a value.
        shape: (n, *row).
        offset: bytes before the first row.
        version: size and time of change of the file, as `version_of` gives them.
    """

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    version: tuple[int, int]

    def read(self, index: Index) -> Array:
        """See `Stored.read`."""
        if isinstance(index, slice):
            return np.array(self._mapped()[index])
        out = np.empty((len(index), *self.shape[1:]), self.dtype)
        span = max(1, SPAN_BYTES // max(1, self._row))
        start = 0
        while start < len(index):
            stop = int(np.searchsorted(index, index[start] + span))
            out[start:stop] = self._mapped()[index[start:stop]]
            start = stop
        return out

    @property
    def _row(self) -> int:
        """Bytes of a row."""
        return self.dtype.itemsize * prod(self.shape[1:])

    def _mapped(self) -> Array:
        if version_of(self.path) != self.version:
            raise DataError(f"{self.path}: expected the file of the start; got another, changed since. Start again.")
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)

    def expect(self, start: int, stop: int) -> None:
        """See `Stored.expect`: the system reads them into its own cache, where it can."""
        if not hasattr(os, "posix_fadvise"):
            return
        first, length = self.offset + start * self._row, (stop - start) * self._row
        with suppress(OSError), self.path.open("rb") as file:  # a hint only: `read` says what is wrong
            os.posix_fadvise(file.fileno(), first, length, os.POSIX_FADV_WILLNEED)

    def reshape(self, *shape: int) -> FileArray:
        """See `Stored.reshape`."""
        return FileArray(self.path, self.dtype, shape, self.offset, self.version)


def version_of(path: Path) -> tuple[int, int]:
    """Bytes and time of change (ns) of a file.

    Raises:
        DataError: it is gone.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: expected a file of data; got {error.strerror}.") from error
    return found.st_size, found.st_mtime_ns


class SparseRows(Stored):
    """A sparse matrix `(n, features)` whose rows are made dense when they are asked for.

    Arguments:
        matrix: any `scipy.sparse` matrix or array; kept in compressed rows.
    """

    scattered: ClassVar[bool] = True

    def __init__(self, matrix: Any, row: tuple[int, ...] | None = None) -> None:
        from scipy.sparse import csr_array

        self.matrix = csr_array(matrix)
        self.shape = (self.matrix.shape[0], *(row or self.matrix.shape[1:]))
        self.dtype = self.matrix.dtype

    def read(self, index: Index) -> Array:
        """See `Stored.read`."""
        dense: Array = self.matrix[index].toarray()
        return dense.reshape(len(dense), *self.shape[1:])

    def reshape(self, *shape: int) -> SparseRows:
        """See `Stored.reshape`."""
        return SparseRows(self.matrix, shape[1:])


class Joined(Stored):
    """Arrays one after another, as one."""

    def __init__(self, parts: Sequence[AnyArray]) -> None:
        self.parts = list(parts)
        self.shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        self.dtype = np.result_type(*(part.dtype for part in parts))
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    def read(self, index: Index) -> Array:
        """See `Stored.read`."""
        pieces = []
        for part, start, stop in zip(self.parts, self.starts[:-1], self.starts[1:], strict=True):
            if isinstance(index, slice):
                low, high, _ = index.indices(len(self))
                pieces.append(part[slice(max(low, start) - start, max(0, min(high, stop) - start))])
            else:
                pieces.append(part[index[(index >= start) & (index < stop)] - start])
        return np.concatenate([piece for piece in pieces if len(piece)] or pieces[:1], dtype=self.dtype)

    def reshape(self, *shape: int) -> Joined:
        """See `Stored.reshape`."""
        return Joined([part.reshape(len(part), *shape[1:]) for part in self.parts])


@dataclass(frozen=True)
class Announced:
    """What the header of a `.npy` stream says of the array behind it.

    Arguments:
        shape: (n, *row); of an array in Fortran order, the other way round.
        dtype: of a value.
        fortran: whether the values are those of the transposed array.
        offset: bytes before the first value.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int


def announced(stream: IO[bytes], size: int, where: str) -> Announced:
    """Read the header of a `.npy` stream; leaves it at the first value.

    Arguments:
        stream: at its start.
        size: its bytes.
        where: what messages call it.

    Raises:
        DataError: not NumPy's format, not real numbers (objects could run code), or not as long as it says.
    """
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream, max_header_size=MAX_HEADER_BYTES)
    except Exception as error:  # NumPy's reader of foreign bytes may raise anything, warnings made errors among it
        raise DataError(f"{where}: expected a NumPy array (.npy); got a broken or foreign file: {error}.") from error
    if dtype.hasobject:
        raise DataError(f"{where}: expected numbers; got an object array, which could run code. Save floats.")
    if dtype.kind not in "biuf":
        raise DataError(f"{where}: expected real numbers; got {dtype}.")
    offset = stream.tell()
    wanted = offset + dtype.itemsize * prod(shape)
    if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0 or wanted != size:
        raise DataError(f"{where}: expected {wanted} bytes for {shape} {dtype}; got {size}.")
    fortran = fortran and len(shape) > 1
    return Announced(shape[::-1] if fortran else shape, dtype, fortran, offset)


def npy_array(path: Path) -> FileArray:
    """The array of a `.npy` file, none of it read yet.

    Raises:
        DataError: no such file; see `announced`; or columns stand one after another, not rows.
    """
    found, version = npy_header(path)
    if found.fortran:
        raise DataError(f"{path}: expected rows one after another; got columns (Fortran order). Save it in C order.")
    return FileArray(path, found.dtype, found.shape, found.offset, version)


def npy_header(path: Path) -> tuple[Announced, tuple[int, int]]:
    """What a `.npy` file says of its array, and the version of the file.

    Raises:
        DataError: no such file; see `announced`.
    """
    version = version_of(path)
    try:
        with path.open("rb") as stream:
            return announced(stream, version[0], str(path)), version
    except OSError as error:
        raise DataError(f"{path}: expected a NumPy array (.npy); got {error.strerror}.") from error
