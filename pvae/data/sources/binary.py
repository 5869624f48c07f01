"""Data sources of files with one array: NumPy's (`.npy`), read without pickle, and IDX, the format of MNIST.

Sizes are checked before anything is allocated.

References: Gradient-based learning applied to document recognition (LeCun et al., 1998)
"""

import gzip
import struct
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Literal, cast, final

import numpy as np

from pvae.data.rows.cache import decoded
from pvae.data.rows.files import (
    MAX_DIMENSIONS,
    PIECE_BYTES,
    AnyArray,
    ArrayLayout,
    FileArray,
    broken_as,
    held,
    located,
    read_npy,
    require_room,
    version_of,
)
from pvae.data.rows.rows import Rows
from pvae.data.sources.base import FileData
from pvae.errors import DataError
from pvae.util.types import Array

MAX_DEFLATE_RATIO = 1032
"""Largest compression ratio of the deflate format (output bytes for each input byte)."""
TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
LABEL_KINDS = "biufUS"
"""Kinds of dtypes that labels may have, by NumPy's letters: numbers and text."""
GZIP = b"\x1f\x8b"


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
        y = np.asarray(read_npy(located(self.labels, data_dir), kinds=LABEL_KINDS)) if self.labels else None
        return self.to_rows(read_npy(path, self.stream), y, "x")


@final
class Idx(FileData):
    """IDX file, the format of MNIST: an array of any of its six number types, plain or gzipped.

    References: Gradient-based learning applied to document recognition (LeCun et al., 1998)
    """

    source: Literal["idx"] = "idx"
    labels: str | None = None
    """Path of a second IDX file with integer labels; None for data without labels."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        x = read_idx(located(self.path, data_dir), stream=self.stream)
        y = np.asarray(read_idx(located(self.labels, data_dir))) if self.labels else None
        return self.to_rows(x, y, "x")


def unpacked(
    content: Iterator[Array], layout: ArrayLayout, stream: bool, where: str, key: Mapping[str, Any]
) -> AnyArray:
    """Return the array of a compressed stream: decoded once into the cache under `key` if `stream`, else in memory."""
    if stream:
        return decoded(key, lambda writer: writer.extend("x", content)).arrays["x"]
    require_room(layout.shape, layout.dtype, where)
    out, start = np.empty(layout.shape, layout.dtype), 0
    for piece in content:
        out[start : start + len(piece)] = piece
        start += len(piece)
    return out


# IDX


def idx_header(shape: tuple[int, ...]) -> bytes:
    """Return the header of an IDX file of unsigned bytes, as it stands at the start of the file."""
    return struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)


def read_idx(path: Path, wanted: tuple[int, ...] | None = None, *, stream: bool = False) -> AnyArray:
    """Return the array of an IDX file, plain or gzipped.

    Arguments:
        path: path of the file.
        wanted: shape that the file must have, of unsigned bytes; None for any shape and type.
        stream: leave the values on the disk; a gzipped file is decompressed once into the cache.

    Returns:
        Array of shape (n, *row), big-endian as stored.

    Raises:
        DataError: the magic bytes, sizes or length of the file are wrong, or the array is too large for memory. Sizes
            are checked before anything is allocated.
    """
    version = version_of(path)
    with _idx_errors(path, version[0]), path.open("rb") as plain:
        zipped = plain.read(2) == GZIP
        plain.seek(0)
        file = cast("IO[bytes]", gzip.GzipFile(fileobj=plain)) if zipped else plain
        layout = _idx_layout(file, wanted, path)
        if not zipped:
            _require_length(path, layout, version[0])
            return held(FileArray(path, layout.dtype, layout.shape, layout.offset, version), stream, str(path))
        if layout.total > MAX_DEFLATE_RATIO * version[0]:
            raise DataError(
                f"{path}: expected {layout.total} bytes, as its header says; got a gzipped file of {version[0]}, which "
                f"holds at most {MAX_DEFLATE_RATIO * version[0]}."
            )
        key = {"source": "idx", "path": str(path.resolve()), "version": version}
        return unpacked(_unzipped(file, layout, path, version[0]), layout, stream, str(path), key)


def _idx_errors(path: Path, size: int) -> AbstractContextManager[None]:
    return broken_as(f"{path}: expected IDX data; got a broken file of {size} bytes")


def _idx_layout(file: IO[bytes], wanted: tuple[int, ...] | None, path: Path) -> ArrayLayout:
    magic, expected = file.read(4), "00 00, a type (08 09 0b 0c 0d 0e) and 1 to 32 dimensions"
    known = len(magic) == 4 and magic[:2] == b"\0\0" and magic[2] in TYPES and 1 <= magic[3] <= MAX_DIMENSIONS
    if wanted:
        known, expected = magic == idx_header(wanted)[:4], idx_header(wanted)[:4].hex(" ")
    if not known:
        shown = f"{magic.hex(' ') or 'no bytes'}{' (a web page?)' if magic[:1] == b'<' else ''}"
        raise DataError(f"{path}: expected the IDX magic {expected}; got {shown}.")
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise DataError(f"{path}: expected a header of {4 + 4 * magic[3]} bytes; got {4 + len(sizes)}.")
    shape = struct.unpack(f">{magic[3]}I", sizes)
    if wanted and shape != wanted:
        raise DataError(f"{path}: expected sizes {list(wanted)}; got {list(shape)}.")
    if 0 in shape:
        raise DataError(f"{path}: expected sizes of at least 1; got {list(shape)}.")
    return ArrayLayout(shape, np.dtype(TYPES[magic[2]]), 4 + len(sizes))


def _unzipped(file: IO[bytes], layout: ArrayLayout, path: Path, size: int) -> Iterator[Array]:
    """Yield chunks of rows of a gzipped IDX file; refuse a file that is too short or has trailing bytes."""
    with _idx_errors(path, size):
        yield from layout.pieces(file, str(path))
        extra = len(file.read(PIECE_BYTES))
        _require_length(path, layout, layout.total + extra, "at least " if extra == PIECE_BYTES else "")


def _require_length(path: Path, layout: ArrayLayout, found: int, more: str = "") -> None:
    if found != layout.total:
        kind = "trailing bytes" if found > layout.total else "a truncated file"
        raise DataError(f"{path}: expected {layout.total} bytes; got {more}{found} ({kind}).")
