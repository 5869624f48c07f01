"""Reader of IDX files (the format of MNIST): arrays of big-endian numbers, plain or gzipped.

References: Gradient-based learning applied to document recognition (LeCun et al., 1998)
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, Literal, cast, final

import numpy as np

from pvae.data.rows.arrays import MAX_DIMENSIONS, AnyArray, FileArray, version_of
from pvae.data.rows.cache import decoded
from pvae.data.rows.files import (
    MAX_DEFLATE_RATIO,
    PIECE_BYTES,
    gathered,
    held,
    located,
    pieces,
    require_room,
)
from pvae.data.rows.rows import Rows
from pvae.data.sources.base import FileData
from pvae.errors import DataError
from pvae.util.types import Array

TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
GZIP = b"\x1f\x8b"


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


@dataclass(frozen=True)
class IdxHeader:
    """Header of an IDX file.

    Arguments:
        shape: shape of the array, (n, *row).
        dtype: type of the values.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any] = np.dtype(np.uint8)

    @property
    def content(self) -> bytes:
        """Header encoded as bytes, as it stands at the start of the file."""
        code = next(code for code, name in TYPES.items() if np.dtype(name) == self.dtype)
        return bytes([0, 0, code, len(self.shape)]) + b"".join(size.to_bytes(4, "big") for size in self.shape)

    @property
    def total(self) -> int:
        """Number of bytes of the whole file after decompression, header included."""
        return 4 + 4 * len(self.shape) + self.dtype.itemsize * prod(self.shape)


def read_idx(path: Path, wanted: IdxHeader | None = None, *, stream: bool = False) -> AnyArray:
    """Return the array of an IDX file, plain or gzipped.

    Arguments:
        path: path of the file.
        wanted: header that the file must have, or None for any valid header.
        stream: leave the values on the disk; a gzipped file is decompressed once into the cache.

    Returns:
        Array of shape (n, *row), big-endian as stored.

    Raises:
        DataError: the magic bytes, sizes or length of the file are wrong, or the array is too large for memory. Sizes
            are checked before anything is allocated.
    """
    with _broken(path), _opened(path) as (file, zipped):
        header = _read_header(file, wanted, path)
        version = version_of(path)
        if not zipped:
            _require_length(path, header.total, version[0])
            array = FileArray(path, header.dtype, header.shape, len(header.content), version)
            return held(array, stream, str(path))
        _require_holdable(path, header.total, version[0])
        content = _content(file, header, path)
        if not stream:
            require_room(header.shape, header.dtype, str(path))
            return gathered(content, header.shape, header.dtype)
        key = {"source": "idx", "path": str(path.resolve()), "version": version}
        return decoded(key, lambda writer: writer.extend("x", content)).arrays["x"]


@contextmanager
def _broken(path: Path) -> Iterator[None]:
    """Convert errors of the decompressor and the disk, raised in the context, to `DataError`."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: expected IDX data; got a broken file of {version_of(path)[0]} bytes: {error}."
        ) from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], bool]]:
    """Yield the open, decompressed file, and True if it was gzipped."""
    with path.open("rb") as plain:
        zipped = plain.read(2) == GZIP
        plain.seek(0)
        if zipped:
            with gzip.GzipFile(fileobj=plain) as file:
                yield cast("IO[bytes]", file), True
        else:
            yield plain, False


def _read_header(file: IO[bytes], wanted: IdxHeader | None, path: Path) -> IdxHeader:
    magic = file.read(4)
    expected = wanted.content[:4].hex(" ") if wanted else "00 00, a type (08 09 0b 0c 0d 0e) and 1 to 32 dimensions"
    known = len(magic) == 4 and magic[:2] == b"\0\0" and magic[2] in TYPES and 1 <= magic[3] <= MAX_DIMENSIONS
    if not known or (wanted and magic != wanted.content[:4]):
        shown = f"{magic.hex(' ') or 'no bytes'}{' (a web page?)' if magic[:1] == b'<' else ''}"
        raise DataError(f"{path}: expected the IDX magic {expected}; got {shown}.")
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise DataError(f"{path}: expected a header of {4 + 4 * magic[3]} bytes; got {4 + len(sizes)}.")
    shape = tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4))
    if wanted and shape != wanted.shape:
        raise DataError(f"{path}: expected sizes {list(wanted.shape)}; got {list(shape)}.")
    if 0 in shape:
        raise DataError(f"{path}: expected sizes of at least 1; got {list(shape)}.")
    return IdxHeader(shape, np.dtype(TYPES[magic[2]]))


def _require_length(path: Path, wanted: int, found: int, more: str = "") -> None:
    if found != wanted:
        what = "trailing bytes" if found > wanted else "a truncated file"
        raise DataError(f"{path}: expected {wanted} bytes; got {more}{found} ({what}).")


def _require_holdable(path: Path, wanted: int, found: int) -> None:
    if wanted > MAX_DEFLATE_RATIO * found:
        raise DataError(
            f"{path}: expected {wanted} bytes, as its header says; got a gzipped file of {found}, which holds at most "
            f"{MAX_DEFLATE_RATIO * found}."
        )


def _content(file: IO[bytes], header: IdxHeader, path: Path) -> Iterator[Array]:
    """Yield chunks of rows of an open IDX file; refuse a file that is too short or has trailing bytes."""
    with _broken(path):
        try:
            yield from pieces(file, header.shape, header.dtype)
        except EOFError as error:
            if isinstance(error.args[0], int):  # else the gzipped stream itself is cut short
                _require_length(path, header.total, len(header.content) + error.args[0])
            raise
        extra = len(file.read(PIECE_BYTES))
    _require_length(path, header.total, header.total + extra, "at least " if extra == PIECE_BYTES else "")
