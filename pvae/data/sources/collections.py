"""Data sources of published images: scikit-learn's digits and photographs, MNIST and Fashion-MNIST.

The files of MNIST and Fashion-MNIST are checked by SHA-256. They are looked for in the user's data folder
(``data_dir``, or ``PVAE_DATA_DIR``), then in the system package, then in the cache; else they are downloaded from a
mirror, unless ``PVAE_OFFLINE=1``.
"""

import hashlib
import os
import tempfile
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, TypeAdapter

from pvae.data.rows import cache, rows
from pvae.data.rows.files import user_folder
from pvae.data.sources.arrays import idx_header, read_array, read_idx
from pvae.data.sources.base import Data
from pvae.errors import DataError, refuse, text
from pvae.util import Record, toml

DOWNLOAD_PIECE_BYTES = 2**20
CONNECT_AND_READ_SECONDS = (10, 60)


class IdxFile(Record):
    """IDX file of an image collection: name without ``.gz``, shape of its array, SHA-256 of its decompressed bytes."""

    name: str
    shape: tuple[int, ...]
    sha256: str


class Collection(Record):
    """Image collection of four IDX files ``x_train, y_train, x_test, y_test``, and the places to look for them."""

    slug: str
    files: dict[str, IdxFile]
    mirrors: tuple[str, ...]
    system: Path | None = None
    package: str | None = None
    archive: str | None = None
    label_names: tuple[str, ...] | None = None

    def find(self, file: IdxFile, named: Path | None, *others: Path) -> Path | None:
        """Return the path of a file, plain or gzipped: in the user's folder, the system's, or the others."""
        places = [*self._own(named), *([self.system] if self.system else []), *others]
        paths = [place / name for place in places for name in (file.name, f"{file.name}.gz")]
        return next(filter(Path.is_file, paths), None)

    def find_archive(self, named: Path | None) -> Path | None:
        """Return the path of the archive of all four files in the user's folder."""
        return next(filter(Path.is_file, (place / self.archive for place in self._own(named) if self.archive)), None)

    def _own(self, named: Path | None) -> list[Path]:
        return [named / self.slug, named] if named else []


_KNOWN = TypeAdapter(dict[str, Collection]).validate_python(toml.read(Path(__file__).with_suffix(".toml")))
FASHION_MNIST, MNIST_FILES = (_KNOWN[name] for name in ("fashion_mnist", "mnist"))


class FashionMNIST(Data):
    """Fashion-MNIST: 70 000 images (1, 28, 28) of clothes in ten classes.

    References: Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017), https://arxiv.org/abs/1708.07747
    """

    source: Literal["fashion_mnist"] = "fashion_mnist"

    def read(self, data_dir: Path | None, seed: int) -> rows.Rows:
        """Return rows (70000, 1, 28, 28); train [0, 50000), validation [50000, 60000), test [60000, 70000)."""
        return read_collection(FASHION_MNIST, data_dir)


class MNIST(Data):
    """MNIST: 70 000 handwritten digits (1, 28, 28).

    References: Gradient-based learning applied to document recognition (LeCun et al., 1998)
    """

    source: Literal["mnist"] = "mnist"

    def read(self, data_dir: Path | None, seed: int) -> rows.Rows:
        """Return rows (70000, 1, 28, 28); train [0, 50000), validation [50000, 60000), test [60000, 70000)."""
        return read_collection(MNIST_FILES, data_dir)


class Digits(Data):
    """Handwritten digits of scikit-learn: 1797 images (1, 8, 8) with grey levels 0 to 16; needs no download."""

    source: Literal["digits"] = "digits"

    def read(self, data_dir: Path | None, seed: int) -> rows.Rows:
        """Return rows (1797, 1, 8, 8); train [0, 1000), validation [1000, 1350), test [1350, 1797)."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        parts = {"train": range(1000), "validation": range(1000, 1350), "test": range(1350, 1797)}
        x, y = bunch.data.reshape(-1, 1, 8, 8).astype(np.uint8), bunch.target
        return rows.Rows(x, y, parts, largest=16.0, label_names=tuple("0123456789"), name="digits")


class Patches(Data):
    """Colour patches of the two photographs that scikit-learn holds (a temple, a flower); needs no download.

    Each photograph is cut into blocks of twice the side of a patch, which are dealt to the splits in a fixed random
    order, 80 % to train; the patches of a block are 81, an eighth of a side apart. No two splits share a pixel.
    """

    source: Literal["patches"] = "patches"
    size: Annotated[int, Field(ge=8, le=96, multiple_of=8)] = 32
    """Side of a patch in pixels, a multiple of 8."""

    def read(self, data_dir: Path | None, seed: int) -> rows.Rows:
        """Return rows (n, 3, size, size) with the photograph as label; n is 9720 at 32 pixels, 2430 at 64."""
        from sklearn.datasets import load_sample_images

        side, block, x, y = self.size, 2 * self.size, [], []
        for label, photograph in enumerate(load_sample_images().images):
            down, across = photograph.shape[0] // block, photograph.shape[1] // block
            whole = photograph[: down * block, : across * block].reshape(down, block, across, block, 3).swapaxes(1, 2)
            found = np.lib.stride_tricks.sliding_window_view(whole, (side, side), (2, 3))
            x.append(found[:, :, :: side // 8, :: side // 8].reshape(-1, PATCHES, 3, side, side))
            y.append(np.full((len(x[-1]), PATCHES), label))
        order = np.random.RandomState(0).permutation(sum(map(len, x)))
        tenth, n = len(order) // 10 * PATCHES, len(order) * PATCHES
        ends = n - 2 * tenth, n - tenth, n
        parts = dict(zip(("train", "validation", "test"), map(range, (0, *ends), ends), strict=True))
        images = np.concatenate(x)[order].reshape(-1, 3, side, side)
        return rows.Rows(images, np.concatenate(y)[order].ravel(), parts, 255.0, ("temple", "flower"), "patches")


PATCHES = 81
"""Patches of a block of a photograph: nine across and nine down."""


def read_collection(collection: Collection, data_dir: Path | None) -> rows.Rows:
    """Return the rows of an image collection: training rows (the last sixth is the validation split), then test rows.

    Raises:
        DataError: files are missing or damaged.
    """
    folder = user_folder(data_dir)
    if archive := collection.find_archive(folder):
        arrays = {key: _checked_array(archive, key, file) for key, file in collection.files.items()}
    else:
        arrays = {key: _read_file(collection, file, folder) for key, file in collection.files.items()}
    x = np.concatenate([arrays["x_train"], arrays["x_test"]])[:, None]
    y = np.concatenate([arrays["y_train"], arrays["y_test"]])
    train = len(arrays["x_train"])
    fit = train - train // 6
    parts = {"train": range(fit), "validation": range(fit, train), "test": range(train, len(x))}
    return rows.Rows(x, y, parts, 255.0, collection.label_names, collection.slug)


def _checked_array(path: Path, key: str, file: IdxFile) -> np.ndarray:
    array = np.asarray(read_array(path, key))
    if array.dtype != np.uint8 or array.size != prod(file.shape) or len(array) != file.shape[0]:
        raise DataError.of("data.sources.bytes", path=path, file=file, array=array)
    return _checked_digest(array.reshape(file.shape), file, path)


def _read_file(collection: Collection, file: IdxFile, folder: Path | None) -> np.ndarray:
    path = collection.find(file, folder)
    return read_known(path, file) if path else _cached(collection, file)


def read_known(path: Path, file: IdxFile) -> np.ndarray:
    """Return the array of an IDX file of a collection, plain or gzipped, uint8 of shape ``file.shape``.

    Raises:
        DataError: see `read_idx`; or the SHA-256 differs from that of the collection.
    """
    return _checked_digest(np.asarray(read_idx(path, file.shape)), file, path)


def _checked_digest(array: np.ndarray, file: IdxFile, path: Path) -> np.ndarray:
    digest = hashlib.sha256(idx_header(file.shape))
    digest.update(np.ascontiguousarray(array).data)
    refuse(digest.hexdigest() != file.sha256, "data.sources.digest", path=path, file=file, found=digest.hexdigest())
    return array


def _cached(collection: Collection, file: IdxFile) -> np.ndarray:
    """Return the array of a collection's file from the cache; if it is absent or damaged, download it first."""
    path = cache.cache_folder() / collection.slug / f"{file.name}.gz"
    if (found := _verified(path, file)) is not None:
        return found
    if os.environ.get("PVAE_OFFLINE", "0") not in ("", "0"):
        raise DataError(f"Expected {file.name}.gz; got no such file, and PVAE_OFFLINE is set. {_by_hand(collection)}")
    with cache.locked(path.parent):
        if (found := _verified(path, file)) is not None:
            return found
        path.unlink(missing_ok=True)
        return _download(collection, file, path)


def _verified(path: Path, file: IdxFile) -> np.ndarray | None:
    with suppress(DataError):
        return read_known(path, file) if path.is_file() else None
    return None


def _by_hand(collection: Collection) -> str:
    names = [f"{file.name}.gz" for file in collection.files.values()]
    return text("data.sources.by_hand", names=names, collection=collection)


def _download(collection: Collection, file: IdxFile, path: Path) -> np.ndarray:
    """Return the array of a file downloaded from the first mirror that works; the checked file is kept at `path`.

    Raises:
        DataError: no mirror gave the right bytes; the message lists the problem of each.
    """
    import pooch
    import requests

    download = pooch.HTTPDownloader(chunk_size=DOWNLOAD_PIECE_BYTES, timeout=CONNECT_AND_READ_SECONDS)
    problems = []
    for mirror in collection.mirrors:
        url = f"{mirror}{path.name}"
        try:
            with tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
                part = Path(folder) / path.name
                download(url, str(part), None)
                array = read_known(part, file)
                part.replace(path)
                return array
        except requests.RequestException as error:
            problems.append(f"{url}: download failed: {error}.")
        except DataError as error:
            problems.append(f"{url}: {error}")
    raise DataError(f"Expected {path.name} from a mirror; got: {'; '.join(problems)} {_by_hand(collection)}")
