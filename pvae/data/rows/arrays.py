"""Arrays that stay where they are, on a disk or sparse, and give dense rows when asked: enough of NumPy for `Rows`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from pvae.errors import DataError
from pvae.util.types import Array

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_NPY_HEADER_BYTES = 2**16
SPAN_BYTES = 2**25
"""Largest part of a file that is mapped at once to read scattered rows: until then its pages stay in memory."""
MAX_DIMENSIONS = 32

Index = slice | NDArray[np.int64]
"""Consecutive rows, or row numbers in ascending order."""


class Stored(ABC):
    """Rows `(n, *row)` of one type, of which only those that are asked for are in memory."""

    scattered: ClassVar[bool] = False
    """True where scattered rows are as cheap to read as neighbours."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def read(self, index: Index) -> Array:
        """Return a copy of some rows, `(m, ...)`: each with the values of a row, in any shape.

        Raises:
            DataError: they cannot be read any more.
        """

    def expect(self, start: int, stop: int) -> None:  # noqa: B027 - most have nothing to do
        """Begin to fetch rows `[start, stop)`, which will be read soon, and do not wait for them."""

    def reshape(self, *shape: int) -> Self:
        """Return the same rows in another shape, the number of rows first."""
        other = copy(self)
        other.shape = shape
        return other

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Index) -> Array:
        rows = self.read(index)
        return rows.reshape(len(rows), *self.shape[1:])

    @property
    def ndim(self) -> int:
        """Number of dimensions, including that of the rows."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)


AnyArray = Array | Stored
"""The rows of a source: an array in memory, or one that is read as it is needed."""


@dataclass(eq=False)
class FileArray(Stored):
    """Rows in a file, one after another, as NumPy would write them.

    The file is mapped anew for every read and unmapped after it, so that its pages do not stay in memory. A file that
    is cut short or written over in the meantime is noticed.

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
        if isinstance(index, slice):
            return np.array(self._mapped()[index])
        out = np.empty((len(index), *self.shape[1:]), self.dtype)
        span = max(1, SPAN_BYTES // max(1, self._row_bytes))
        start = 0
        while start < len(index):
            stop = int(np.searchsorted(index, index[start] + span))
            out[start:stop] = self._mapped()[index[start:stop]]
            start = stop
        return out

    @property
    def _row_bytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape[1:])

    def _mapped(self) -> Array:
        if version_of(self.path) != self.version:
            raise DataError(f"{self.path}: expected the file of the start; got another, changed since. Start again.")
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)

    def expect(self, start: int, stop: int) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        first, length = self.offset + start * self._row_bytes, (stop - start) * self._row_bytes
        with suppress(OSError), self.path.open("rb") as file:  # a hint only: `read` says what is wrong
            os.posix_fadvise(file.fileno(), first, length, os.POSIX_FADV_WILLNEED)


def version_of(path: Path) -> tuple[int, int]:
    """Return the bytes and the time of change (ns) of a file.

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

    def __init__(self, matrix: Any) -> None:
        from scipy.sparse import csr_array

        self.matrix = csr_array(matrix)
        self.shape, self.dtype = self.matrix.shape, self.matrix.dtype

    def read(self, index: Index) -> Array:
        dense: Array = self.matrix[index].toarray()
        return dense


class Joined(Stored):
    """Arrays one after another, as one."""

    def __init__(self, parts: Sequence[AnyArray]) -> None:
        self.parts = list(parts)
        self.shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        self.dtype = np.result_type(*(part.dtype for part in parts))
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    def read(self, index: Index) -> Array:
        pieces = []
        for part, start, stop in zip(self.parts, self.starts[:-1], self.starts[1:], strict=True):
            if isinstance(index, slice):
                low, high, _ = index.indices(len(self))
                pieces.append(part[slice(max(low, start) - start, max(0, min(high, stop) - start))])
            else:
                pieces.append(part[index[(index >= start) & (index < stop)] - start])
        return np.concatenate([piece for piece in pieces if len(piece)] or pieces[:1], dtype=self.dtype)


@dataclass(frozen=True)
class NpyHeader:
    """The header of a `.npy` stream.

    Arguments:
        shape: (n, *row); of an array in Fortran order, the other way round.
        dtype: of a value.
        fortran: True where the values are those of the transposed array.
        offset: bytes before the first value.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    offset: int

    def in_rows(self, x: Array) -> Array:
        """Return the array that was read as `shape`, its rows first."""
        return np.ascontiguousarray(x.T) if self.fortran else x

    def require_rows(self, where: str) -> None:
        """Refuse columns one after another: rows cannot be read from them where they are.

        Raises:
            DataError: see above.
        """
        if self.fortran:
            raise DataError(
                f"{where}: expected rows one after another; got columns (Fortran order). Save it in C order."
            )


def read_npy_header(stream: IO[bytes], size: int, where: str) -> NpyHeader:
    """Read the header of a `.npy` stream; the stream is left at the first value.

    Arguments:
        stream: at its start.
        size: its bytes.
        where: the name of the stream in messages.

    Raises:
        DataError: not NumPy's format, not real numbers (objects could run code), or not as long as it says.
    """
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream, max_header_size=MAX_NPY_HEADER_BYTES)
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
    return NpyHeader(shape[::-1] if fortran else shape, dtype, fortran, offset)


def open_npy(path: Path) -> tuple[FileArray, NpyHeader]:
    """Return the array of a `.npy` file, none of it read yet, and its header.

    Raises:
        DataError: no such file; see `read_npy_header`.
    """
    version = version_of(path)
    try:
        with path.open("rb") as stream:
            header = read_npy_header(stream, version[0], str(path))
    except OSError as error:
        raise DataError(f"{path}: expected a NumPy array (.npy); got {error.strerror}.") from error
    return FileArray(path, header.dtype, header.shape, header.offset, version), header


def npy_array(path: Path) -> FileArray:
    """Return the array of a `.npy` file, none of it read yet.

    Raises:
        DataError: see `open_npy`; or columns stand one after another, not rows.
    """
    array, header = open_npy(path)
    header.require_rows(str(path))
    return array
