"""NumPy's files, `.npy` and `.npz`: read without pickle, sizes checked before anything is allocated."""

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
"""Bytes of a zip archive's local header, before a name and extra fields whose lengths are its last two numbers."""


@final
class Npy(FileData):
    """One array of a `.npy` file, (n, ...); with `stream` it is mapped, whatever its size.

    Object arrays are refused: reading them could run code.
    """

    source: Literal["npy"] = "npy"
    labels: str | None = None
    """A second `.npy` file, of integer labels; none are read by default."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        path = located(self.path, data_dir)
        y = _read_npy(located(self.labels, data_dir)) if self.labels else None
        return self.to_rows(npy_array(path) if self.stream else _read_npy(path), y, "x")


def _read_npy(path: Path) -> Array:
    x, header = open_npy(path)
    return header.in_rows(np.asarray(held(x, False, str(path))))


@final
class Npz(FileData):
    """Arrays of a NumPy archive: `x` (n, ...), or `x_train`, `x_test` and possibly `x_validation`.

    Object arrays are refused: reading them could run code.

    Without declared splits the rows are permuted with `split_seed` (what the archive splits already stays as it is).
    """

    source: Literal["npz"] = "npz"
    x: str = "x"
    """Key of the rows, or its stem before `_train`."""
    y: str | None = None
    """Key of integer labels, or its stem; none are read by default."""

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
    """An array of an archive."""

    info: zipfile.ZipInfo
    header: NpyHeader

    def pieces(self, archive: zipfile.ZipFile) -> Iterator[Array]:
        """Yield its rows, a few MiB at a time; the last ones only if the member's checksum is right."""
        with archive.open(self.info) as stream:
            stream.read(self.header.offset)
            yield from pieces(stream, self.header.shape, self.header.dtype)
            stream.read(1)  # at the end of a member zipfile compares its checksum


def read_arrays(path: Path, keys: Sequence[str], stream: bool = False) -> dict[str, AnyArray]:
    """Return some arrays of an archive.

    Arguments:
        path: the archive.
        keys: their names.
        stream: leave them on the disk: stored members where they are, deflated ones decoded once into the cache.

    Raises:
        DataError: the file is missing or broken, a key is absent, an array holds objects, sizes disagree or are too
            large for memory.
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
    """Return the names of the arrays in an archive; none when it is missing or foreign."""
    with suppress(*BROKEN), zipfile.ZipFile(path) as archive:
        return _names(archive)
    return []


def _names(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def _checked(archive: zipfile.ZipFile, key: str, path: Path) -> ArchivedArray:
    """Compare the sizes that the archive and the array's header announce with the bytes that are there."""
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
    """Refuse names that lead out of the archive, links, and members that cannot be as long as they say."""
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
    """Return the place of a stored member's first byte in the file."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        local = file.read(LOCAL_HEADER_BYTES)
    lengths = local[LOCAL_HEADER_BYTES - 4 :]
    return info.header_offset + LOCAL_HEADER_BYTES + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
