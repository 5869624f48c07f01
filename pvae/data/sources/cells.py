"""Data source of AnnData files (`.h5ad`): cells by genes, dense or sparse, and the table that describes the cells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np

from pvae.data.rows.cache import Writer, decoded
from pvae.data.rows.files import (
    PIECE_BYTES,
    AnyArray,
    ArrayLayout,
    Index,
    SparseRows,
    Stored,
    located,
    require_room,
    version_of,
)
from pvae.data.rows.rows import Rows, joined
from pvae.data.sources.arrays import unpacked
from pvae.data.sources.base import FileData
from pvae.data.sources.hdf import node_of, opened
from pvae.data.sources.python import LARGEST_GAP, column_labels
from pvae.errors import DataError, near, printable
from pvae.util.types import Array

if TYPE_CHECKING:
    import h5py


@final
class H5ad(FileData):
    """AnnData file (`.h5ad`): the matrix `X` or a layer, dense or sparse, and labels from a column of `obs`.

    A sparse matrix stays sparse, its rows are made dense batch by batch; with `stream` it stays on the disk as well.

    References: The AnnData file format specification (scverse), https://anndata.readthedocs.io
    """

    source: Literal["h5ad"] = "h5ad"
    layer: str | None = None
    """Name of the layer to read in place of `X`."""
    labels: str | None = None
    """Column of `obs` with the labels: categories, names or integers; None for data without labels."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        path = located(self.path, data_dir)
        name = "X" if self.layer is None else f"layers/{self.layer}"
        with opened(path) as file:
            x = self._matrix(file, name, path)
            y, names = (
                (None, None) if self.labels is None else column_labels(_column(file, self.labels, path), self.labels)
            )
            inner = [f"{group}/{key}" for group in ("layers", "obsm", "obsp") for key in file.get(group, ())]
            left = [key for key in ("X", *inner, "raw/X") if key != name and key in file]
        notes = [f"{path.name}: matrices that are not read: {', '.join(map(printable, left))}"] if left else []
        return joined({"train": (x, y)}, self.split_seed, name, largest=self.largest, label_names=names, notes=notes)

    def _matrix(self, file: h5py.File, name: str, path: Path) -> AnyArray:
        import h5py
        from scipy import sparse

        node, where = node_of(file, name, str(path)), f"{path}, {name!r}"
        key = {"source": "h5ad", "path": str(path.resolve()), "version": version_of(path), "array": name}
        if isinstance(node, h5py.Dataset):
            if node.ndim != 2 or 0 in node.shape or node.dtype.kind not in "biuf":
                raise DataError(f"{where}: expected a matrix of numbers; got shape {node.shape} of {node.dtype}.")
            step = max(1, PIECE_BYTES // max(1, node.dtype.itemsize * node.shape[1]))
            pieces = (node[start : start + step] for start in range(0, len(node), step))
            return unpacked(pieces, ArrayLayout(node.shape, node.dtype, 0), self.stream, where, key)
        kind = str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "")))
        if not kind.startswith(("csr", "csc")):
            raise DataError(f"{where}: expected a matrix, dense, CSR or CSC; got {printable(kind) or 'a group'}.")
        parts = {part: node_of(file, f"{name}/{part}", str(path)) for part in ("data", "indices", "indptr")}
        shape = tuple(int(n) for n in node.attrs.get("shape", node.attrs.get("h5sparse_shape", ())))
        if len(shape) != 2 or min(shape) < 1 or parts["data"].dtype.kind not in "biuf":
            raise DataError(f"{where}: expected a matrix of numbers; got shape {shape} of {parts['data'].dtype}.")
        if kind.startswith("csr") and self.stream:
            kept = decoded(key, lambda writer: _copied(writer, parts))
            return CsrRows(kept.arrays, shape, where)
        require_room((3 * parts["data"].size,), parts["data"].dtype, where)
        arrays = tuple(part[...] for part in parts.values())
        matrix = (sparse.csr_array if kind.startswith("csr") else sparse.csc_array)(arrays, shape=shape)
        matrix.check_format()
        return SparseRows(matrix)


def _copied(writer: Writer, parts: Mapping[str, h5py.Dataset]) -> None:
    for name, part in parts.items():
        step = PIECE_BYTES // part.dtype.itemsize
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

    def read(self, index: Index) -> Array:
        from scipy.sparse import csr_array

        rows = np.arange(self.shape[0])[index] if isinstance(index, slice) else index
        if not len(rows):
            return np.zeros((0, self.shape[1]), self.dtype)
        low, high = int(rows[0]), int(rows[-1]) + 1
        if high - low > LARGEST_GAP * len(rows):
            return np.concatenate([self.read(slice(int(row), int(row) + 1)) for row in rows])
        span = slice(int(self.starts[low]), int(self.starts[high]))
        columns, values = self.indices[span], self.data[span]
        if len(columns) and not (0 <= columns.min() and columns.max() < self.shape[1]):
            raise DataError(f"{self.where}: expected columns 0 .. {self.shape[1] - 1}; got {columns.max()}.")
        starts = self.starts[low : high + 1] - self.starts[low]
        return np.asarray(csr_array((values, columns, starts), (high - low, self.shape[1])).toarray()[rows - low])


def _column(file: h5py.File, name: str, path: Path) -> Any:
    """Return a column of `obs` as a pandas Series, from any version of the AnnData format.

    Raises:
        DataError: there is no such column.
    """
    import h5py
    import pandas

    obs = node_of(file, "obs", str(path))
    if name not in obs:
        names = [key for key in obs if not key.startswith("__")]
        raise DataError(f"{path}: expected a column of obs, {', '.join(names)}; got {name!r}{near(name, names)}.")
    node = node_of(file, f"obs/{name}", str(path))
    if isinstance(node, h5py.Group) and "codes" in node:
        return pandas.Series(
            _categories(node["codes"][...], node["categories"], bool(node.attrs.get("ordered", False)))
        )
    if isinstance(node, h5py.Group):
        return pandas.Series(node["values"][...]).mask(node["mask"][...])
    if "categories" in node.attrs:  # before version 0.8
        return pandas.Series(_categories(node[...], file[node.attrs["categories"]]))
    return pandas.Series(_values(node))


def _values(node: h5py.Dataset) -> Array:
    import h5py

    return node.asstr()[...] if h5py.check_string_dtype(node.dtype) is not None else node[...]


def _categories(codes: Array, words: h5py.Dataset, ordered: bool = False) -> Any:
    import pandas

    return pandas.Categorical.from_codes(codes.astype(np.int64), list(_values(words)), ordered=ordered)  # type: ignore[call-overload]
