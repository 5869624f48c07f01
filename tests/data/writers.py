"""Files of data as other programs write them: NumPy, struct, gzip and Pillow, never pvae's own code."""

import gzip
import hashlib
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from scipy import sparse

from pvae.data.dataset import Dataset
from pvae.data.sources.collections import MNIST_FILES, Collection, IdxFile
from pvae.errors import DataError

RNG = np.random.RandomState(0)
ROWS = 60
FLOATS = RNG.standard_normal((ROWS, 5)).astype(np.float32)
Y = RNG.permutation(np.arange(ROWS) % 3)
NAMES = ("ant", "bee", "cow")
SMALL = ("latents.z.dim=2", "train.epochs=1", "train.batch_size=16", "train.engine=eager")


def refused(
    match: str, call: Callable[..., Any], *given: Any, error: type[Exception] = DataError, **options: Any
) -> None:
    """Require that a call is refused, as an error of the data unless told otherwise, with a message that matches."""
    with pytest.raises(error, match=match):
        call(*given, **options)


def assert_same(data: Dataset, wanted: Dataset) -> None:
    """Require the same rows, read at once and by their numbers, and the same labels in every split."""
    for one, other in zip(data.splits, wanted.splits, strict=True):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.rows[torch.tensor([2, 0])], other.x[[2, 0]])
        assert one.y is other.y is None or torch.equal(one.y, other.y)  # type: ignore[arg-type]


def gzipped(content: bytes) -> bytes:
    """Return bytes as gzip writes them, without the time: tests are named after them, in every process alike."""
    return gzip.compress(content, mtime=0)


def npy(path: Path, array: Any) -> str:
    """Write one array."""
    np.save(path, array)
    return str(path)


def npz(folder: Path, save: Callable[..., None] = np.savez, **arrays: Any) -> str:
    """Write the archive `data.npz` into a folder."""
    save(folder / "data.npz", **arrays)
    return str(folder / "data.npz")


def hdf5(path: Path, **arrays: Any) -> str:
    """Write data sets, named by their paths, into an HDF5 file."""
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, chunks=True, compression="gzip")
    return str(path)


def matlab(path: Path, **arrays: np.ndarray) -> str:
    """Write arrays as MATLAB 7.3 does: HDF5 behind a block of 512 bytes, all axes in reverse."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array.T)
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file".ljust(512))
    return str(path)


def h5ad(path: Path, x: Any, obs: pandas.DataFrame, var: pandas.DataFrame | None = None, **layers: Any) -> str:
    """Write a matrix, its layers, and the tables of its rows and columns as the AnnData file format says."""

    def matrix(group: h5py.Group, name: str, values: Any) -> None:
        if not sparse.issparse(values):
            group[name] = values
            return
        made = group.create_group(name)
        made.attrs["encoding-type"], made.attrs["shape"] = f"{values.format}_matrix", values.shape
        for part in ("data", "indices", "indptr"):
            made[part] = getattr(values, part)

    with h5py.File(path, "w") as file:
        matrix(file, "X", x)
        for name, values in layers.items():
            matrix(file.require_group("layers"), name, values)
        table = file.create_group("obs")
        for name, column in zip(map(str, obs), (obs[key] for key in obs), strict=True):
            if isinstance(column.dtype, pandas.CategoricalDtype):
                made = table.create_group(name)
                made["codes"], made["categories"] = column.cat.codes, [str(word) for word in column.cat.categories]
                made.attrs["encoding-type"], made.attrs["ordered"] = "categorical", column.cat.ordered
            else:
                table[name] = column.to_list()
        for name, frame in (("obs", obs), ("var", var)):
            if frame is not None and not isinstance(frame.index, pandas.RangeIndex):
                file.require_group(name)["_index"] = frame.index.to_list()
                file[name].attrs["_index"] = "_index"
    return str(path)


def idx_bytes(array: np.ndarray, code: int = 0x08, letter: str = "B") -> bytes:
    """Return the bytes of an IDX file of the type `code`, whose letter in `struct` is `letter`."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + struct.pack(f">{array.size}{letter}", *array.flatten().tolist())


def idx(path: Path, array: np.ndarray, code: int = 0x08, letter: str = "B", zipped: bool = False) -> str:
    """Write an IDX file, plain or gzipped."""
    content = idx_bytes(array, code, letter)
    path.write_bytes(gzipped(content) if zipped else content)
    return str(path)


def pictures(folder: Path, pixels: np.ndarray, labels: list[str], suffixes: tuple[str, ...] = ("png",)) -> str:
    """Write images (n, H, W) into sub-folders that are named after their labels."""
    for number, (one, label) in enumerate(zip(pixels, labels, strict=True)):
        place = folder / "pictures" / label
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one).save(place / f"{number:02}.{suffixes[number % len(suffixes)]}")
    return str(folder / "pictures")


def small_arrays() -> dict[str, np.ndarray]:
    """The four arrays of a collection as small as 16 images of 3 x 3 pixels."""
    draw = np.random.RandomState(1)
    return {
        "x_train": draw.randint(0, 256, (12, 3, 3)).astype(np.uint8),
        "y_train": (np.arange(12) % 10).astype(np.uint8),
        "x_test": draw.randint(0, 256, (4, 3, 3)).astype(np.uint8),
        "y_test": (np.arange(4) % 10).astype(np.uint8),
    }


def small_collection(**changes: Any) -> Collection:
    """MNIST with the small arrays and a mirror that does not answer."""
    files = {
        key: IdxFile(MNIST_FILES.files[key].name, array.shape, hashlib.sha256(idx_bytes(array)).hexdigest())
        for key, array in small_arrays().items()
    }
    return replace(MNIST_FILES, files=files, **{"mirrors": ("http://127.0.0.1:9/",), **changes})


def zipped_files(collection: Collection) -> dict[str, bytes]:
    """The gzipped files of a small collection, by name."""
    return {f"{collection.files[key].name}.gz": gzipped(idx_bytes(x)) for key, x in small_arrays().items()}


def place(folder: Path, collection: Collection) -> None:
    """Write the files of a small collection into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zipped_files(collection).items():
        (folder / name).write_bytes(content)
