"""Data sources of HDF5 files, MATLAB files (`.mat`, older formats as well) and AnnData files (`.h5ad`, cells by genes).

Links out of a file and data stored in other files are refused. With `stream` rows are decoded once into the cache.
"""

import mmap
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pandas
from scipy import sparse

from pvae.data.rows import files
from pvae.data.rows.cache import Writer, decoded, texts
from pvae.data.rows.files import AnyArray, ArrayLayout, Index, SparseRows, Stored
from pvae.data.rows.rows import Rows
from pvae.data.sources import base, python
from pvae.data.sources.arrays import NamedArrays, unpacked
from pvae.data.tables.side import side_rows
from pvae.errors import DataError, near, printable, refuse

MAX_CHUNK_BYTES = 2**30
"""Largest chunk of a data set of an HDF5 file; a chunk is decompressed whole."""
MATLAB_HDF5 = b"MATLAB 7.3"
HEAP = rb"GCOL\x01\0\0\0"
"""First bytes of a heap of texts in an HDF5 file."""
SEARCHED_BYTES = 2**32


class ArrayFile(NamedArrays):
    """Base of the sources of files that may have their rows along the last axis, as MATLAB's users often have."""

    rows: Literal["first", "last"] = "first"
    """Axis of the arrays along which the rows are: the first, or the last (of a matrix, its columns)."""

    def in_rows(
        self, shape: tuple[int, ...], reverse: bool, take: Callable[[Any], Any], path: Path, name: str, stream: bool
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

        def piece(start: int, stop: int) -> np.ndarray:
            found = take((slice(None),) * axis + (slice(start, stop),))
            found = np.moveaxis(found, axis, 0)
            return np.ascontiguousarray(found.transpose(0, *range(found.ndim - 1, 0, -1)) if reverse else found)

        dtype = take((slice(0, 0),)).dtype
        n = shape[axis]
        step = max(1, files.PIECE_BYTES // max(1, dtype.itemsize * prod(rest)))
        pieces = (piece(start, min(n, start + step)) for start in range(0, n, step))
        layout = ArrayLayout((n, *(rest[::-1] if reverse else rest)), dtype, 0)
        where = {"path": str(path.resolve()), "version": files.version_of(path), "array": name}
        key = {"source": getattr(self, self.tag), "rows": self.rows, **where}
        return unpacked(pieces, layout, stream, f"{path}, {name!r}", key)


class Hdf5(ArrayFile):
    """Arrays of an HDF5 file (`.h5`, `.hdf5`), named by their paths within the file, such as `images/x`."""

    source: Literal["hdf5"] = "hdf5"

    def names(self, path: Path) -> list[str]:
        return _datasets(path)

    def array(self, path: Path, name: str, text: bool) -> AnyArray:
        return _read(self, path, name, text, reverse=False)


class Mat(ArrayFile):
    """Arrays of a MATLAB file (`.mat`) of any version; cells, structs and objects are not read."""

    source: Literal["mat"] = "mat"

    def names(self, path: Path) -> list[str]:
        if _is_hdf5(path):
            return _datasets(path)
        from scipy.io import whosmat

        with _mat_errors(path):
            return [name for name, _, _ in whosmat(path)]

    def array(self, path: Path, name: str, text: bool) -> AnyArray:
        found = _read(self, path, name, text, reverse=True) if _is_hdf5(path) else self._older(path, name, text)
        return found.reshape(-1) if text and found.ndim == 2 and 1 in found.shape else found

    def _older(self, path: Path, name: str, text: bool) -> Any:
        from scipy.io import loadmat, whosmat

        with _mat_errors(path):
            shape = next(shape for known, shape, _ in whosmat(path) if known == name)
            todo = "Save it as version 7.3, and set data.stream."
            files.require_room(shape, np.dtype("f8"), f"{path}, {name!r}", todo)
            found = loadmat(path, variable_names=[name])[name]
        if sparse.issparse(found):
            return SparseRows(found.T if self.rows == "last" else found)
        if found.dtype.kind not in ("biufU" if text else "biuf"):
            raise DataError.of("data.hdf.no_numbers", path=path, name=name, dtype=found.dtype)
        if text and found.dtype.kind == "U":
            return np.char.strip(found)
        return self.in_rows(found.shape, False, lambda at: found[at], path, name, self.stream and not text)


def _mat_errors(path: Path) -> AbstractContextManager[None]:
    return files.broken_as(f"{path}: expected a MATLAB file (.mat); got a broken or foreign file")


def _is_hdf5(path: Path) -> bool:
    with files.broken_as(f"{path}: expected a MATLAB file (.mat)"), path.open("rb") as file:
        return file.read(len(MATLAB_HDF5)).startswith((MATLAB_HDF5, b"\x89HDF"))


# HDF5


@cache
def require_heaps(path: Path, version: tuple[int, ...]) -> None:
    """Refuse a file with a damaged heap of texts, over which libhdf5 would go without end, deaf to all signals.

    Objects of a heap lie one after another; one that is empty and has no number has no next. Files of more than
    `SEARCHED_BYTES` are not searched; a `version` of a file, see `version_of`, is searched once.

    Raises:
        DataError: there is such an object.
    """
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    for found in re.finditer(HEAP, content) if len(content) <= SEARCHED_BYTES else ():
        at, end = found.end() + 8, found.start() + int.from_bytes(content[found.end() : found.end() + 8], "little")
        while at + 16 <= min(end, len(content)):
            number, size = struct.unpack_from("<H6xQ", content, at)
            refuse(number == size == 0, f"{path}: expected a whole HDF5 file; got one with a damaged heap of texts.")
            at += 16 + -(-size // 8) * 8 if number else size


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading, without a lock.

    Raises:
        DataError: the file is damaged or no HDF5 file; also for errors of reading it in the context.
    """
    with files.broken_as(f"{path}: expected an HDF5 file; got a broken or foreign file"):
        require_heaps(path, files.version_of(path))
        with h5py.File(path, "r", locking=False) as file:
            yield file


def _datasets(path: Path) -> list[str]:
    """Return the paths of all data sets of a file, and those of its soft and external links, which are not read."""
    found: list[str] = []

    def visit(name: str, link: Any) -> None:
        if not isinstance(link, h5py.HardLink) or isinstance(file[name], h5py.Dataset):
            found.append(name)

    with opened(path) as file:
        file.visititems_links(visit)
    return [name for name in found if not any(part.startswith("#") for part in name.split("/"))]


def node_of(file: h5py.File, name: str, where: str) -> Any:
    """Return a group or a data set of a file by its path; refuse links and data that are stored in other files.

    Raises:
        DataError: a part of the path is absent or a link, or the data set lies in other files.
    """
    node: Any = file
    for part in name.split("/"):
        if not isinstance(node, h5py.Group) or part not in node:
            there = sorted(node) if isinstance(node, h5py.Group) else []
            raise DataError(f"{where}: expected {name!r}; got {', '.join(map(printable, there)) or 'none'}.")
        refuse(not isinstance(node.get(part, getlink=True), h5py.HardLink), "data.hdf.link", where=where, name=name)
        node = node[part]
    if isinstance(node, h5py.Dataset):
        refuse(node.external or node.is_virtual, "data.hdf.outside", where=where, name=name)
        refuse(node.dtype.itemsize * prod(node.chunks or ()) > MAX_CHUNK_BYTES, "data.hdf.chunk", at=where, node=node)
    return node


def _read(source: ArrayFile, path: Path, name: str, text: bool, reverse: bool) -> Any:
    """Return a data set with its rows first; `reverse` for MATLAB, whose axes are stored in reverse."""
    with opened(path) as file:
        node, where = node_of(file, name, str(path)), f"{path}, {name!r}"
        if text and h5py.check_string_dtype(node.dtype) is not None:
            files.require_room(node.shape, np.dtype("f8"), where)
            return np.asarray(node.asstr()[...], np.str_)
        refuse(node.dtype.kind not in "biuf", "data.hdf.real", where=where, node=node)
        refuse(not node.shape or 0 in node.shape, "data.rows.none", name=where, shape=node.shape)
        return source.in_rows(node.shape, reverse, lambda at: node[at], path, name, source.stream and not text)


class H5ad(base.FileData):
    """AnnData file (`.h5ad`): the matrix `X` or a layer, dense or sparse, and labels from a column of `obs`.

    A sparse matrix stays sparse, its rows are made dense batch by batch; with `stream` it stays on the disk as well.
    Names of observations are the ids of the rows; by those of variables new data find their features.

    References: The AnnData file format specification (scverse), https://anndata.readthedocs.io
    """

    source: Literal["h5ad"] = "h5ad"
    layer: str | None = None
    """Name of the layer to read in place of `X`."""
    labels: str | None = None
    """Column of `obs` with the labels: categories, names or integers; None for data without labels."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        path = files.located(self.path, data_dir)
        name = "X" if self.layer is None else f"layers/{self.layer}"
        with opened(path) as file:
            x, y, names = self._matrix(file, name, path), None, None
            if self.labels is not None:
                y, names = python.column_labels(_column(file, self.labels, path), self.labels)
            inner = [f"{group}/{key}" for group in ("layers", "obsm", "obsp") for key in file.get(group, ())]
            left = [key for key in ("X", *inner, "raw/X") if key != name and key in file]
            raw = {of: _column(file, of, path) for of in (c.of or name for name, c in self.side.items())}
            ids, features = (_index(file, table, path) for table in ("obs", "var"))
        notes = [f"{path.name}: matrices that are not read: {', '.join(map(printable, left))}"] if left else []
        more: dict[str, Any] = {"ids": ids, "features": None if features is None else tuple(features.tolist())}
        more |= {"label_names": names, "notes": notes, "read": {"layer": self.layer, "labels": self.labels}}
        more["side"] = side_rows(raw, self.side, x.shape[0], str(path))
        return self.to_rows(x, y, name, **more)

    def _matrix(self, file: h5py.File, name: str, path: Path) -> AnyArray:
        node, where = node_of(file, name, str(path)), f"{path}, {name!r}"
        key = {"source": "h5ad", "path": str(path.resolve()), "version": files.version_of(path), "array": name}
        if isinstance(node, h5py.Dataset):
            if node.ndim != 2 or 0 in node.shape or node.dtype.kind not in "biuf":
                raise DataError(f"{where}: expected a matrix of numbers; got shape {node.shape} of {node.dtype}.")
            step = max(1, files.PIECE_BYTES // max(1, node.dtype.itemsize * node.shape[1]))
            pieces = (node[start : start + step] for start in range(0, len(node), step))
            return unpacked(pieces, ArrayLayout(node.shape, node.dtype, 0), self.stream, where, key)
        kind = str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
        refuse(not kind.startswith(("csr", "csc")), "data.hdf.kind", where=where, kind=printable(kind))
        parts = {part: node_of(file, f"{name}/{part}", str(path)) for part in ("data", "indices", "indptr")}
        shape = tuple(int(n) for n in node.attrs.get("shape", node.attrs.get("h5sparse_shape", ())))
        if len(shape) != 2 or min(shape) < 1 or parts["data"].dtype.kind not in "biuf":
            raise DataError(f"{where}: expected a matrix of numbers; got shape {shape} of {parts['data'].dtype}.")
        if kind.startswith("csr") and self.stream:
            return CsrRows(decoded(key, lambda writer: _copied(writer, parts)).arrays, shape, where)
        files.require_room((3 * parts["data"].size,), parts["data"].dtype, where)
        arrays = tuple(part[...] for part in parts.values())
        matrix = (sparse.csr_array if kind.startswith("csr") else sparse.csc_array)(arrays, shape=shape)
        matrix.check_format()
        return SparseRows(matrix)


def _copied(writer: Writer, parts: Mapping[str, h5py.Dataset]) -> None:
    for name, part in parts.items():
        step = files.PIECE_BYTES // part.dtype.itemsize
        writer.extend(name, (part[start : start + step] for start in range(0, len(part), step)))


class CsrRows(Stored):
    """Sparse matrix on the disk, in the three arrays of compressed sparse rows; rows become dense when indexed.

    Arguments:
        arrays: `data`, `indices` and `indptr`; the last is kept in memory.
        shape: (n, features).
        where: name of the matrix in messages.
    """

    def __init__(self, arrays: Mapping[str, Any], shape: tuple[int, ...], where: str) -> None:
        self.data, self.indices, self.shape, self.where = arrays["data"], arrays["indices"], shape, where
        self.dtype, self.starts = self.data.dtype, np.asarray(arrays["indptr"][:], np.int64)
        sizes = np.diff(self.starts)
        fits = len(sizes) == shape[0] and self.starts[0] == 0 and not (sizes < 0).any()
        if not fits or self.starts[-1] != len(self.data) or len(self.indices) != len(self.data):
            raise DataError(f"{where}: expected {shape[0]} compressed rows; got arrays of other sizes.")

    def read(self, index: Index) -> np.ndarray:
        rows = np.arange(self.shape[0])[index] if isinstance(index, slice) else index
        if not len(rows):
            return np.zeros((0, self.shape[1]), self.dtype)
        low, high = int(rows[0]), int(rows[-1]) + 1
        if high - low > python.LARGEST_GAP * len(rows):
            return np.concatenate([self.read(slice(int(row), int(row) + 1)) for row in rows])
        span = slice(int(self.starts[low]), int(self.starts[high]))
        columns, values = self.indices[span], self.data[span]
        refuse(((columns < 0) | (columns >= self.shape[1])).any(), "data.hdf.columns", of=self, columns=columns)
        starts = self.starts[low : high + 1] - self.starts[low]
        found = sparse.csr_array((values, columns, starts), (high - low, self.shape[1]))
        return np.asarray(found.toarray()[rows - low])


def _column(file: h5py.File, name: str, path: Path, table: str = "obs") -> Any:
    """Return a column of `obs` or `var`, from any version of the format; raises DataError if there is none."""
    obs = node_of(file, table, str(path))
    if name not in obs:
        names = [key for key in obs if not key.startswith("__")]
        raise DataError(f"{path}: expected a column of obs, {', '.join(names)}; got {name!r}{near(name, names)}.")
    node = node_of(file, f"{table}/{name}", str(path))
    if isinstance(node, h5py.Group) and "codes" in node:
        ordered = bool(node.attrs.get("ordered", False))
        return pandas.Series(_categories(node["codes"][...], node["categories"], ordered))
    if isinstance(node, h5py.Group):
        return pandas.Series(node["values"][...]).mask(node["mask"][...])
    if "categories" in node.attrs:  # before version 0.8
        return pandas.Series(_categories(node[...], file[node.attrs["categories"]]))
    return pandas.Series(_values(node))


def _index(file: h5py.File, table: str, path: Path) -> np.ndarray | None:
    """Return the names of the rows (`obs`) or features (`var`) of an AnnData file; None if it has none."""
    there = file.get(table)
    name = str(there.attrs.get("_index", "index")) if isinstance(there, h5py.Group) else ""
    return texts(_column(file, name, path, table)) if name and name in there else None


def _values(node: h5py.Dataset) -> np.ndarray:
    return node.asstr()[...] if h5py.check_string_dtype(node.dtype) is not None else node[...]


def _categories(codes: np.ndarray, words: h5py.Dataset, ordered: bool = False) -> Any:
    return pandas.Categorical.from_codes(codes.astype(np.int64), list(_values(words)), ordered=ordered)  # type: ignore[call-overload]
