"""Data sources in Python objects: tensors, arrays, sparse matrices, torch datasets, and AnnData-like objects."""

import tempfile
import weakref
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sized
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from scipy.sparse import issparse
from torch.utils.data import DataLoader, Dataset as TorchDataset, IterableDataset

from pvae.data.rows.cache import cache_folder, created, room, texts
from pvae.data.rows.files import PIECE_BYTES, AnyArray, Index, SparseRows, Stored, require_room
from pvae.data.rows.prepare import Scale
from pvae.data.rows.rows import PARTLY_LABELLED, Rows, in_order, joined
from pvae.data.sources.base import Data, Seed
from pvae.data.tables.side import side_rows
from pvae.errors import DataError, instead, refuse

LARGEST_GAP = 4
"""Largest number of rows read for each row wanted: a sparser selection of rows is read row by row."""


class PassedData(Data):
    """Base of the sources of objects passed in Python: `pvae.fit(experiment, data=...)`, or a method of `Dataset`."""

    split_seed: Seed = 0
    """Seed of the permutation that makes the splits that are neither passed nor declared."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Raise a DataError, because the data must be passed in Python and cannot be read."""
        source = getattr(self, self.tag)
        raise DataError(f'Expected data for data.source = "{source}"; got none. Pass data=... in Python.')

    @abstractmethod
    def rows_of(self, data: Any, name: str = "train") -> Rows:
        """Return the rows of an object with random splits; `name` is that of the rows in messages.

        Raises:
            DataError: the object is of another kind, or has values that are not allowed.
        """


class TensorSource(PassedData):
    """Source of tensors, arrays, sparse matrices, torch datasets and AnnData that are passed in Python."""

    source: Literal["tensor"] = "tensor"
    scale: Scale = "raw"
    """Scaling of the values; `unit` needs unsigned bytes (divided by 255)."""
    layer: str | None = None
    """Layer to read of AnnData in place of `X`."""
    labels: str | None = None
    """Column of `obs` of AnnData with the labels; None for data without labels."""

    def rows_of(self, data: Any, name: str = "train") -> Rows:
        refuse(self.layer or self.labels, "data.sources.not_anndata", found=type(data).__name__)
        raw: Mapping[Any, Any] = data if isinstance(data, Mapping) else {}
        if isinstance(data, Mapping):
            refuse("x" not in data, "data.sources.named", name=name, data=data)
            data = (data["x"], data["y"]) if "y" in data else data["x"]
        read = partial(collected, stream=False) if isinstance(data, TorchDataset) else tensors
        x, y = read(data, name)
        side = side_rows(raw, self.side, x.shape[0] if x.shape else 0, name)
        more: dict[str, Any] = {"features": feature_names(data), "masked": self.masked, "side": side}
        return joined({"train": (x, y)}, self.split_seed, name, **more)


def as_array(values: Any, name: str) -> AnyArray:
    """Return a tensor, an array-like or a sparse matrix as an array; rows of a sparse matrix stay sparse until read.

    Raises:
        DataError: the values are not an array, or a sparse matrix does not have two dimensions.
    """
    if isinstance(values, Stored):
        return values
    if issparse(values):
        refuse(values.ndim != 2, f"{name}: expected a sparse matrix (rows, features); got shape {values.shape}.")
        return SparseRows(values)
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return np.asarray(values.float() if values.dtype is torch.bfloat16 else values)
    if isinstance(values, np.ma.MaskedArray):  # of numbers in general, NaN where masked
        return np.ma.filled(values.astype(np.result_type(values.dtype, np.float32)), np.nan)
    try:
        return np.asarray(values)
    except (ValueError, TypeError) as error:
        raise DataError(f"{name}: expected an array; got {error}.") from error


def is_bare(data: Any) -> bool:
    """Return True if the data are a one-dimensional array (n,) of scalars."""
    return not isinstance(data, TorchDataset) and not is_anndata(data) and np.ndim(data) == 1


def tensors(part: Any, name: str) -> tuple[AnyArray, np.ndarray | None]:
    """Return x (n, ...) and labels (n,) or None of a split, given as x or as a tuple (x, y) of tensors or arrays.

    Raises:
        DataError: values are not arrays, or are too large for memory; `name` is that of the split.
    """
    x, y = part if isinstance(part, tuple) and len(part) == 2 else (part, None)
    array = as_array(x, name)
    if isinstance(array, np.ndarray):
        require_room(array.shape, array.dtype, name, "Pass a torch Dataset and stream=True to Dataset.from_torch.")
    return array, None if y is None else np.asarray(as_array(y, name))


def feature_names(data: Any) -> tuple[str, ...] | None:
    """Return the names of the columns of a DataFrame, or of the variables of an AnnData-like object; else None."""
    data = data[0] if isinstance(data, tuple) and data else data
    found = getattr(data, "var_names", getattr(data, "columns", None))
    return None if found is None else tuple(map(str, found))


# torch


class NamelessFile:
    """Unnamed temporary file in the cache folder, closed (and so deleted) when it is no longer referenced."""

    def __init__(self) -> None:
        with created(cache_folder()):
            self.file: IO[bytes] = tempfile.TemporaryFile(dir=cache_folder())
        weakref.finalize(self, self.file.close)


class Spool(Stored):
    """Array (n, *row) in an unnamed temporary file, which the system deletes when the last array on it is gone.

    Arguments:
        file: open temporary file.
        dtype: type of the values.
        shape: shape of the array, (n, *row).
    """

    def __init__(self, file: NamelessFile, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.file, self.dtype, self.shape = file, dtype, shape

    def read(self, index: Index) -> np.ndarray:
        return np.array(np.memmap(self.file.file, self.dtype, "r", 0, self.shape)[index])


def collected(dataset: Any, name: str, stream: bool) -> tuple[AnyArray, np.ndarray | None]:
    """Return all items of a torch dataset, in order: x (n, ...), and labels (n,) or None.

    Arguments:
        dataset: map-style or iterable dataset of items x, (x,), (x, y), or mappings with "x" and perhaps "y".
        name: name of the split in messages.
        stream: write x to a temporary file in the cache folder, a few MiB at a time, instead of keeping it in memory.

    Raises:
        DataError: the dataset is empty, its items differ in shape or type, or they are too large for memory.
    """
    blocks: list[np.ndarray] = []
    labels: list[Any] = []
    file = NamelessFile() if stream else None
    for x, y in _blocks(dataset, name):
        labels += y
        if file:
            with room(cache_folder()):
                file.file.write(np.ascontiguousarray(x).data)
                file.file.flush()
            blocks = [x]  # the last, for its type
        else:
            require_room((len(labels), *x.shape[1:]), x.dtype, name, "Pass stream=True to Dataset.from_torch.")
            blocks.append(x)
    refuse(not blocks, f"{name}: expected a dataset of at least one item; got none.")
    if (known := [label for label in labels if label is not None]) and len(known) < len(labels):
        raise DataError.of("data.sources.some_labels", name=name, known=known, labels=labels)
    last = blocks[-1]
    held = Spool(file, last.dtype, (len(labels), *last.shape[1:])) if file else np.concatenate(blocks)
    return held, np.asarray(as_array(known, f"Labels of {name}")) if known else None


def _blocks(dataset: Any, name: str) -> Iterator[tuple[np.ndarray, list[Any]]]:
    """Yield stacked items x `(m, ...)` and their labels, in chunks of about `PIECE_BYTES`."""
    first, xs, ys = None, list[np.ndarray](), list[Any]()
    for i, item in enumerate(_items(dataset, name)):
        x, y = _parted(item, f"{name}, item {i}")
        first = x if first is None else first
        refuse((x.shape, x.dtype) != (first.shape, first.dtype), "data.sources.item", name=name, i=i, first=first, x=x)
        xs.append(x)
        ys.append(y)
        if len(xs) * max(1, x.nbytes) >= PIECE_BYTES:
            yield np.stack(xs), ys
            xs, ys = [], []
    if xs:
        yield np.stack(xs), ys


def _items(dataset: Any, name: str) -> Iterator[Any]:
    refuse(isinstance(dataset, DataLoader), "data.sources.loader", name=name)
    if isinstance(dataset, IterableDataset):
        return iter(dataset)
    if not isinstance(dataset, TorchDataset) or not isinstance(dataset, Sized):
        raise DataError(f"{name}: expected a torch Dataset with a length, or an IterableDataset; got {type(dataset)}.")
    return (dataset[number] for number in range(len(dataset)))


def _parted(item: Any, where: str) -> tuple[np.ndarray, Any]:
    if isinstance(item, Mapping):
        refuse("x" not in item, "data.sources.mapping", where=where, item=item)
        x, y = item["x"], item.get("y")
    elif isinstance(item, tuple | list):
        refuse(len(item) not in (1, 2), "data.sources.values", where=where, item=item)
        x, y = (*item, None)[:2]
    else:
        x, y = item, None
    return np.asarray(as_array(x, where)), y.item() if isinstance(y, torch.Tensor) and y.numel() == 1 else y


# AnnData


class Sliced(Stored):
    """Rows of a matrix on the disk that supports indexing, such as an HDF5 dataset; sparse rows become dense.

    Arguments:
        source: object with `shape` and `dtype` that can be indexed by slices and by ascending row numbers.
    """

    def __init__(self, source: Any) -> None:
        self.source, self.shape, self.dtype = source, tuple(source.shape), np.dtype(source.dtype)

    def read(self, index: Index) -> np.ndarray:
        chosen: Any = slice(None)  # of what is read
        if not isinstance(index, slice):
            low, high = (int(index[0]), int(index[-1]) + 1) if len(index) else (0, 0)
            if high - low <= LARGEST_GAP * len(index):
                chosen, index = index - low, slice(low, high)
        closed = "Expected the rows of an open file; got {problem}. Keep it open."
        with instead((OSError, ValueError, RuntimeError), closed):
            rows = self.source[index]
        return np.asarray(rows.toarray() if issparse(rows) else rows)[chosen]


def is_anndata(data: Any) -> bool:
    """Return True for an AnnData-like object: it has a matrix `X` and a table `obs` that describes its rows."""
    return hasattr(data, "X") and hasattr(data, "obs")


def anndata_rows(adata: Any, source: Any) -> Rows:
    """Return the rows of an AnnData-like object with random splits: 80 % train, 10 % validation, 10 % test.

    Arguments:
        adata: AnnData-like object.
        source: declaration with `layer`, which holds x (None for the matrix `X`), `labels`, a column of `obs` (or
            None), the columns of `obs` to read beside x, and `split_seed`.

    Raises:
        DataError: the layer or column does not exist; labels are missing, or are neither integers nor names; see
            `Rows`.
    """
    layer, labels = source.layer, source.labels
    name = "X" if layer is None else f"layers[{layer!r}]"
    x, y, words, ids = _matrix(adata, layer, name), None, None, getattr(adata, "obs_names", None)
    if labels is not None:
        refuse(labels not in adata.obs, "data.sources.obs", labels=labels, obs=adata.obs)
        y, words = column_labels(adata.obs[labels], labels)
    more: dict[str, Any] = {"ids": None if ids is None else texts(ids), "read": {"layer": layer, "labels": labels}}
    more |= {"side": side_rows(adata.obs, source.side, x.shape[0], "obs"), "masked": source.masked}
    return joined({"train": (x, y)}, source.split_seed, name, label_names=words, features=feature_names(adata), **more)


def _matrix(adata: Any, layer: str | None, name: str) -> AnyArray:
    refuse(layer is not None and layer not in adata.layers, "data.sources.layer", layer=layer, held=adata.layers)
    refuse((matrix := adata.X if layer is None else adata.layers[layer]) is None, "data.sources.no_matrix", name=name)
    if isinstance(matrix, np.ndarray | Stored | torch.Tensor) or issparse(matrix):
        return as_array(matrix, name)
    return Sliced(matrix)


def column_labels(found: Any, column: str) -> tuple[np.ndarray, tuple[str, ...] | None]:
    """Return a column of `obs` as integer labels `(n,)`, and the names of the categories (None for integers).

    Categories keep an order of the user's own; those in pandas' alphabetical order are numbered in natural order.

    Raises:
        DataError: a label is missing, or the labels are neither categories, names nor integers.
    """
    import pandas as pd

    values = pd.Series(found)
    refuse(values.isna().any() and not PARTLY_LABELLED.get(), "data.sources.unlabelled", column=column, values=values)
    if pd.api.types.is_integer_dtype(values.dtype):
        return values.fillna(-1).to_numpy(np.int64), None
    refuse(pd.api.types.is_float_dtype(values.dtype), "data.sources.floats", column=column, values=values)
    categories = values.astype("category").cat
    codes, words = categories.codes.to_numpy(np.int64), tuple(map(str, categories.categories))
    # an order of the user's own, not pandas' default, is kept
    return (codes, words) if categories.ordered or list(words) != sorted(words) else in_order(codes, words)
