"""Data sources of NumPy files (`.npy`, `.npz`), read without pickle; sizes are checked before any allocation."""

from __future__ import annotations

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, final

import numpy as np

from pvae.data.rows.arrays import (
    AnyArray,
    FileArray,
    NpyHeader,
    npy_array,
    open_npy,
    read_npy_header,
    version_of,
)
from pvae.data.rows.cache import Writer, decoded
from pvae.data.rows.files import MAX_DEFLATE_RATIO, gathered, held, located, pieces, require_room
from pvae.data.rows.rows import SPLITS, Rows, joined
from pvae.data.sources.base import FileData
from pvae.errors import DataError, near
from pvae.util.types import Array

BROKEN = (
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OSError, OverflowError, RuntimeError,
)  # fmt: skip
LOCAL_HEADER_BYTES = 30
"""Size of a zip local file header; its last two numbers are the lengths of the name and extra fields after it."""


@final
class Npy(FileData):
    """Array (n, ...) of a `.npy` file; with `stream` it is memory-mapped, so that its size is not limited by memory.

    Object arrays are refused: reading them could run code.
    """

    source: Literal["npy"] = "npy"
    labels: str | None = None
    """Path of a second `.npy` file with integer labels; None for data without labels."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        path = located(self.path, data_dir)
        y = _read_npy(located(self.labels, data_dir)) if self.labels else None
        return self.to_rows(npy_array(path) if self.stream else _read_npy(path), y, "x")


def _read_npy(path: Path) -> Array:
    x, header = open_npy(path)
    return header.in_rows(np.asarray(held(x, False, str(path))))


@final
class Npz(FileData):
    """Arrays of a NumPy archive (`.npz`): `x` (n, ...), or `x_train`, and possibly `x_validation` and `x_test`.

    Object arrays are refused: reading them could run code.

    Without declared splits the rows are permuted with `split_seed`; splits that the archive contains are kept.
    """

    source: Literal["npz"] = "npz"
    x: str = "x"
    """Name of the array of rows in the archive, without a suffix such as `_train`."""
    y: str | None = None
    """Name of the array of integer labels, without a suffix such as `_train`; None for data without labels."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        path = located(self.path, data_dir)
        names = held_keys(path)
        whole = self.x in names or f"{self.x}_train" not in names
        ends = [""] if whole else [f"_{name}" for name in SPLITS if f"{self.x}_{name}" in names]
        arrays = read_arrays(path, [self.x + end for end in ends], self.stream)
        labels = read_arrays(path, [self.y + end for end in ends]) if self.y else {}
        given = {
            end.removeprefix("_"): (arrays[self.x + end], np.asarray(labels[f"{self.y}{end}"]) if labels else None)
            for end in ends
        }
        if whole:
            return self.to_rows(*given[""], self.x)
        rows = joined(given, self.split_seed)
        return Rows(rows.x, rows.y, rows.parts, self.largest or rows.largest, name=self.x)


@dataclass(frozen=True)
class ArchivedArray:
    """Array in a NumPy archive: its zip entry and its `.npy` header."""

    info: zipfile.ZipInfo
    header: NpyHeader

    def pieces(self, archive: zipfile.ZipFile) -> Iterator[Array]:
        """Yield the rows in chunks of a few MiB, and then verify the zip checksum of the array."""
        with archive.open(self.info) as stream:
            stream.read(self.header.offset)
            yield from pieces(stream, self.header.shape, self.header.dtype)
            stream.read(1)  # at the end of a member zipfile compares its checksum


def read_arrays(path: Path, keys: Sequence[str], stream: bool = False) -> dict[str, AnyArray]:
    """Return the arrays of a NumPy archive with the given names.

    Arguments:
        path: path of the archive.
        keys: names of the arrays.
        stream: leave the arrays on the disk; uncompressed ones are mapped, deflated ones decoded once into the cache.

    Raises:
        DataError: the file is missing or damaged, a name is absent, an array contains objects, sizes are inconsistent,
            or an array is too large for memory.
    """
    with _broken(path), zipfile.ZipFile(path) as archive:
        found = {key: _checked(archive, key, path) for key in keys}
        if stream:
            return {key: _streamed(archive, array, path, key) for key, array in found.items()}
        for key, array in found.items():
            require_room(array.header.shape, array.header.dtype, f"{path}, {key!r}")
        return {key: _held(archive, array) for key, array in found.items()}


@contextmanager
def _broken(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"Expected a NumPy archive at {path}; got no such file.") from None
    except BROKEN as error:
        raise DataError(f"{path}: expected a NumPy archive (.npz); got a broken or foreign file: {error}.") from error


def held_keys(path: Path) -> list[str]:
    """Return the names of the arrays in a NumPy archive; empty if the file is missing or not an archive."""
    with suppress(*BROKEN), zipfile.ZipFile(path) as archive:
        return _names(archive)
    return []


def _names(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def _checked(archive: zipfile.ZipFile, key: str, path: Path) -> ArchivedArray:
    """Return an array of the archive, unread, after its name and the sizes announced for it were checked."""
    names = _names(archive)
    if key not in names:
        raise DataError(f"{path}: expected an array {key!r}; got {', '.join(names)}{near(key, names)}.")
    info = archive.getinfo(f"{key}.npy")
    where = f"{path}, {key!r}"
    _refuse_trick(info, where)
    with archive.open(info) as stream:
        header = read_npy_header(stream, info.file_size, where)
    if not header.shape or 0 in header.shape:
        raise DataError(f"{where}: expected an array (rows, ...) with at least one row; got shape {header.shape}.")
    return ArchivedArray(info, header)


def _refuse_trick(info: zipfile.ZipInfo, where: str) -> None:
    """Refuse a zip entry whose name leads out of the archive, which is a link, or whose size is impossible."""
    name = PurePosixPath(info.filename.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"{where}: expected a plain name in the archive; got one that leads out of it.")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise DataError(f"{where}: expected an array in the archive; got a link.")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{where}: expected an array stored or deflated, as NumPy does; got method {info.compress_type}."
        )
    most = info.compress_size * (MAX_DEFLATE_RATIO if info.compress_type == zipfile.ZIP_DEFLATED else 1)
    if info.file_size > most:
        raise DataError(
            f"{where}: expected {info.file_size} bytes, as the archive says; got {info.compress_size}, which hold at "
            f"most {most}."
        )


def _held(archive: zipfile.ZipFile, array: ArchivedArray) -> Array:
    header = array.header
    return header.in_rows(gathered(array.pieces(archive), header.shape, header.dtype))


def _streamed(archive: zipfile.ZipFile, array: ArchivedArray, path: Path, key: str) -> FileArray:
    header, version = array.header, version_of(path)
    header.require_rows(f"{path}, {key!r}")
    if array.info.compress_type == zipfile.ZIP_DEFLATED:
        entry = {"source": "npz", "path": str(path.resolve()), "version": version, "member": key}
        return decoded(entry, lambda writer: _decode(writer, archive, array, path)).arrays["x"]
    offset = _offset(path, array.info)
    for _ in array.pieces(archive):  # for the checksum's sake
        pass
    return FileArray(path, header.dtype, header.shape, offset + header.offset, version)


def _decode(writer: Writer, archive: zipfile.ZipFile, array: ArchivedArray, path: Path) -> None:
    with _broken(path):
        writer.extend("x", array.pieces(archive))


def _offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Return the byte offset in the archive file at which the content of an uncompressed entry begins."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        local = file.read(LOCAL_HEADER_BYTES)
    lengths = local[LOCAL_HEADER_BYTES - 4 :]
    return info.header_offset + LOCAL_HEADER_BYTES + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
