"""Data sources of HDF5 files and of MATLAB files (`.mat`, older formats as well), and the opening of HDF5 files.

Links out of a file and data stored in other files are refused. With `stream` rows are decoded once into the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np

from pvae.data.rows.files import PIECE_BYTES, AnyArray, ArrayLayout, SparseRows, broken_as, require_room, version_of
from pvae.data.sources.arrays import NamedArrays, unpacked
from pvae.errors import DataError, printable
from pvae.util.types import Array

if TYPE_CHECKING:
    import h5py

MAX_CHUNK_BYTES = 2**30
"""Largest chunk of a data set of an HDF5 file; a chunk is decompressed whole."""
MATLAB_HDF5 = b"MATLAB 7.3"


class ArrayFile(NamedArrays):
    """Base of the sources of files that may have their rows along the last axis, as MATLAB's users often have."""

    rows: Literal["first", "last"] = "first"
    """Axis of the arrays along which the rows are: the first, or the last (of a matrix, its columns)."""

    def in_rows(
        self, shape: tuple[int, ...], reverse: bool, take: Callable[[Any], Array], path: Path, name: str, stream: bool
    ) -> Any:
        """Return an array with its rows first, read piece by piece.

        Arguments:
            shape: shape as it is stored.
            reverse: True if all axes are stored in reverse.
            take: function that returns the array at a tuple of slices of the stored axes.
            path: the file.
            name: name of the array.
            stream: decode the rows into the cache, and leave them there.
        """
        last = (self.rows == "last") != reverse  # the axis of rows, as it is stored
        rest = shape[:-1] if last else shape[1:]
        axis = len(shape) - 1 if last else 0

        def piece(start: int, stop: int) -> Array:
            found = take((slice(None),) * axis + (slice(start, stop),))
            found = np.moveaxis(found, axis, 0)
            return np.ascontiguousarray(found.transpose(0, *range(found.ndim - 1, 0, -1)) if reverse else found)

        dtype = take((slice(0, 0),)).dtype
        n = shape[axis]
        step = max(1, PIECE_BYTES // max(1, dtype.itemsize * prod(rest)))
        pieces = (piece(start, min(n, start + step)) for start in range(0, n, step))
        layout = ArrayLayout((n, *(rest[::-1] if reverse else rest)), dtype, 0)
        where = {"path": str(path.resolve()), "version": version_of(path), "array": name}
        key = {"source": getattr(self, self.tag), "rows": self.rows, **where}
        return unpacked(pieces, layout, stream, f"{path}, {name!r}", key)


@final
class Hdf5(ArrayFile):
    """Arrays of an HDF5 file (`.h5`, `.hdf5`), named by their paths within the file, such as `images/x`."""

    source: Literal["hdf5"] = "hdf5"

    def names(self, path: Path) -> list[str]:
        with opened(path) as file:
            return _datasets(file)

    def array(self, path: Path, name: str, text: bool) -> AnyArray:
        with opened(path) as file:
            return _read(self, file, path, name, text, reverse=False)


@final
class Mat(ArrayFile):
    """Arrays of a MATLAB file (`.mat`) of any version; cells, structs and objects are not read."""

    source: Literal["mat"] = "mat"

    def names(self, path: Path) -> list[str]:
        if _is_hdf5(path):
            with opened(path) as file:
                return _datasets(file)
        from scipy.io import whosmat

        with _mat_errors(path):
            return [name for name, _, _ in whosmat(path)]

    def array(self, path: Path, name: str, text: bool) -> AnyArray:
        if _is_hdf5(path):
            with opened(path) as file:
                found = _read(self, file, path, name, text, reverse=True)
        else:
            found = self._older(path, name, text)
        return found.reshape(-1) if text and found.ndim == 2 and 1 in found.shape else found

    def _older(self, path: Path, name: str, text: bool) -> Any:
        from scipy.io import loadmat, whosmat
        from scipy.sparse import issparse

        with _mat_errors(path):
            shape = next(shape for known, shape, _ in whosmat(path) if known == name)
            require_room(shape, np.dtype("f8"), f"{path}, {name!r}", "Save it as version 7.3, and set data.stream.")
            found = loadmat(path, variable_names=[name])[name]
        if issparse(found):
            return SparseRows(found.T if self.rows == "last" else found)
        if found.dtype.kind not in ("biufU" if text else "biuf"):
            kind = "cells or structs" if found.dtype.kind in "OV" else found.dtype
            raise DataError(f"{path}, {name!r}: expected an array of real numbers; got {kind}. Set data.x to one.")
        if text and found.dtype.kind == "U":
            return np.char.strip(found)
        return self.in_rows(found.shape, False, lambda at: found[at], path, name, self.stream and not text)


@contextmanager
def _mat_errors(path: Path) -> Iterator[None]:
    with broken_as(f"{path}: expected a MATLAB file (.mat); got a broken or foreign file"):
        yield


def _is_hdf5(path: Path) -> bool:
    with broken_as(f"{path}: expected a MATLAB file (.mat)"), path.open("rb") as file:
        return file.read(len(MATLAB_HDF5)).startswith((MATLAB_HDF5, b"\x89HDF"))


# HDF5


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading, without a lock.

    Raises:
        DataError: the file is damaged or no HDF5 file; also for errors of reading it in the context.
    """
    import h5py

    with (
        broken_as(f"{path}: expected an HDF5 file; got a broken or foreign file"),
        h5py.File(path, "r", locking=False) as file,
    ):
        yield file


def _datasets(file: h5py.File) -> list[str]:
    """Return the paths of all data sets of a file, and those of its soft and external links, which are not read."""
    import h5py

    found: list[str] = []

    def visit(name: str, link: Any) -> None:
        if not isinstance(link, h5py.HardLink) or isinstance(file[name], h5py.Dataset):
            found.append(name)

    file.visititems_links(visit)
    return [name for name in found if not any(part.startswith("#") for part in name.split("/"))]


def node_of(file: h5py.File, name: str, where: str) -> Any:
    """Return a group or a data set of a file by its path; refuse links and data that are stored in other files.

    Raises:
        DataError: a part of the path is absent or a link, or the data set lies in other files.
    """
    import h5py

    node: Any = file
    for part in name.split("/"):
        if not isinstance(node, h5py.Group) or part not in node:
            there = sorted(node) if isinstance(node, h5py.Group) else []
            raise DataError(f"{where}: expected {name!r}; got {', '.join(map(printable, there)) or 'none'}.")
        if not isinstance(node.get(part, getlink=True), h5py.HardLink):
            raise DataError(f"{where}, {name!r}: expected data in this file; got a link.")
        node = node[part]
    if isinstance(node, h5py.Dataset):
        if node.external or node.is_virtual:
            raise DataError(f"{where}, {name!r}: expected data in this file; got data stored in other files.")
        chunk = node.dtype.itemsize * prod(node.chunks or ())
        if chunk > MAX_CHUNK_BYTES:
            raise DataError(f"{where}, {name!r}: expected chunks of at most 1 GiB; got {chunk} bytes.")
    return node


def _read(source: ArrayFile, file: h5py.File, path: Path, name: str, text: bool, reverse: bool) -> Any:
    """Return a data set with its rows first; `reverse` for MATLAB, whose axes are stored in reverse."""
    import h5py

    node, where = node_of(file, name, str(path)), f"{path}, {name!r}"
    if text and h5py.check_string_dtype(node.dtype) is not None:
        require_room(node.shape, np.dtype("f8"), where)
        return np.asarray(node.asstr()[...], np.str_)
    if node.dtype.kind not in "biuf":
        raise DataError(f"{where}: expected an array of real numbers; got {node.dtype}. Set data.x to one.")
    if not node.shape or 0 in node.shape:
        raise DataError(f"{where}: expected an array (rows, ...) with at least one row; got shape {node.shape}.")
    return source.in_rows(node.shape, reverse, lambda at: node[at], path, name, source.stream and not text)
