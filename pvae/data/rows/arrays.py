"""Arrays that are stored on a disk or as sparse matrices and return dense rows when they are indexed."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from pvae.errors import DataError
from pvae.util.types import Array

SPAN_BYTES = 2**25
"""Largest span of a file, in bytes, that is mapped at once to read scattered rows, which bounds the memory used."""

Index = slice | NDArray[np.int64]
"""Index of rows: a slice of consecutive rows, or row numbers in ascending order."""


class Stored(ABC):
    """Array `(n, *row)` outside memory (on a disk, or sparse), of which indexing reads only the rows asked for."""

    scattered: ClassVar[bool] = False
    """True if reading scattered rows is as cheap as reading consecutive ones."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @abstractmethod
    def read(self, index: Index) -> Array:
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

    def __getitem__(self, index: Index) -> Array:
        rows = self.read(index)
        return rows.reshape(len(rows), *self.shape[1:])

    @property
    def ndim(self) -> int:
        """Number of dimensions of the array, including the first one, which counts rows."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Total number of values, the product of the shape."""
        return prod(self.shape)


AnyArray = Array | Stored
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
        version: size and modification time of the file when it was opened, from `version_of`.
    """

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int
    version: tuple[int, int]

    def read(self, index: Index) -> Array:
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
    """Return the size (bytes) and the modification time (ns) of a file, by which a changed file is recognised.

    Raises:
        DataError: the file cannot be found or read.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise DataError(f"{path}: expected a file of data; got {error.strerror}.") from error
    return found.st_size, found.st_mtime_ns


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

    def read(self, index: Index) -> Array:
        dense: Array = self.matrix[index].toarray()
        return dense


class Joined(Stored):
    """Concatenation of several arrays along their rows, without copying them."""

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
