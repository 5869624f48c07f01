"""The user's own data files: finding them, checking that their rows fit into memory, reading them in chunks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from pvae.data.rows.arrays import AnyArray, Stored
from pvae.errors import DataError
from pvae.util.memory import GIB, total_memory
from pvae.util.types import Array

PIECE_BYTES = 2**21
"""Bytes read from a stream at once, unless one row is larger."""
MAX_DEFLATE_RATIO = 1032
"""Largest compression ratio of the deflate format (output bytes for each input byte)."""


def user_folder(data_dir: Path | None) -> Path | None:
    """Return the user's data folder, from the argument or the environment variable ``PVAE_DATA_DIR``, or None.

    Raises:
        DataError: the folder does not exist.
    """
    named = data_dir or os.environ.get("PVAE_DATA_DIR")
    if not named:
        return None
    if not Path(named).is_dir():
        raise DataError(f"--data-dir, PVAE_DATA_DIR: expected a folder; got {named}.")
    return Path(named)


def located(path: str, data_dir: Path | None) -> Path:
    """Return the path of a declared data file: inside the user's data folder if it exists there, else as declared.

    Raises:
        DataError: the file does not exist; or it is a folder, a device or a pipe, which are never opened.
    """
    folder = user_folder(data_dir)
    inside = folder / path if folder else Path(path)
    found = inside if inside.is_file() else Path(path)
    if not found.exists():
        raise DataError(f"Expected a file of data at {found}; got no such file.")
    if not found.is_file():
        raise DataError(
            f"{found}: expected a file of data; got {'a folder' if found.is_dir() else 'a device or pipe'}."
        )
    return found


def require_room(shape: tuple[int, ...], dtype: np.dtype[Any], name: str, advice: str = "") -> None:
    """Refuse rows of which the stored copy and the float32 copy together exceed half of this computer's memory.

    Raises:
        DataError: the rows are too large; the message gives the memory that they need.
    """
    needed, memory = (dtype.itemsize + 4) * prod(shape), total_memory()
    if 2 * needed > memory:
        raise DataError(
            f"{name}: expected rows that fit into half of this computer's memory of {memory / GIB:,.2f} GiB; got "
            f"{shape} {dtype}, which need {needed / GIB:,.2f} GiB. {advice or 'Set data.stream = true.'}"
        )


def held(x: Stored, stream: bool, name: str) -> AnyArray:
    """Return the rows unread if they are to be streamed, else as an array in memory.

    Raises:
        DataError: see `require_room`.
    """
    if stream:
        return x
    require_room(x.shape, x.dtype, name)
    return x[:] if x.ndim and x.size else np.empty(x.shape, x.dtype)


def pieces(stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[Array]:
    """Yield the rows of a binary stream in chunks `(m, *row)` of about `PIECE_BYTES`.

    Raises:
        EOFError: the stream ends early; its argument is the number of bytes that were read.
    """
    row = dtype.itemsize * prod(shape[1:])
    step, done = max(1, PIECE_BYTES // row), 0
    for start in range(0, shape[0], step):
        rows = min(step, shape[0] - start)
        content = stream.read(rows * row)
        done += len(content)
        if len(content) < rows * row:
            raise EOFError(done)
        yield np.frombuffer(content, dtype).reshape(rows, *shape[1:])


def gathered(some: Iterable[Array], shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return chunks of rows joined in one array of a known shape and type."""
    out, start = np.empty(shape, dtype), 0
    for piece in some:
        out[start : start + len(piece)] = piece
        start += len(piece)
    return out
