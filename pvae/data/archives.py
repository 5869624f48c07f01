"""NumPy archives: read without pickle, sizes checked before anything is allocated."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pvae.data.rows import SPLITS, Array, Rows, joined
from pvae.errors import DataError, near

if TYPE_CHECKING:
    from pvae.data.declared import Npz

MAX_HEADER_BYTES = 2**16
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, NotImplementedError, RuntimeError)


def read_arrays(path: Path, keys: Sequence[str]) -> dict[str, Array]:
    """Some arrays of an archive.

    Raises:
        DataError: the file is missing or broken, a key is absent, an array holds objects, or sizes disagree.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            held = [name.removesuffix(".npy") for name in archive.namelist()]
            for key in keys:
                if key not in held:
                    raise DataError(f"{path}: expected an array {key!r}; got {', '.join(held)}{near(key, held)}.")
                _check_member(archive, key, path)
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in keys}
    except FileNotFoundError:
        raise DataError(f"Expected a NumPy archive at {path}; got no such file.") from None
    except BROKEN as error:
        raise DataError(f"{path}: expected a NumPy archive (.npz); got a broken or foreign file: {error}.") from error


def held_keys(path: Path) -> list[str]:
    """The names of the arrays in an archive; none when it is missing or foreign."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile):
        return []


def _check_member(archive: zipfile.ZipFile, key: str, path: Path) -> None:
    """Compare the header's announcement with the bytes that are there."""
    info = archive.getinfo(f"{key}.npy")
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream, max_header_size=MAX_HEADER_BYTES)
        header = stream.tell()
    if dtype.hasobject:
        raise DataError(f"{path}: expected numbers in {key!r}; got an object array, which could run code. Save floats.")
    wanted = header + dtype.itemsize * int(np.prod(shape, dtype=object))
    if info.file_size != wanted:
        raise DataError(f"{path}: expected {wanted} bytes for {key!r} {shape}; got {info.file_size}.")
    if wanted > _memory_bytes():
        raise DataError(f"{path}: {key!r} {shape} needs {wanted} bytes; this computer has {_memory_bytes()}.")


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # a system that does not say
        return 2**40


def read_npz(declared: Npz, data_dir: Path | None) -> Rows:
    """The rows of a declared archive.

    Raises:
        DataError: see `read_arrays` and `joined`.
    """
    from pvae.data.sources import user_folder

    path = _located(declared.path, user_folder(data_dir))
    held = held_keys(path)
    if declared.x not in held and f"{declared.x}_train" in held:
        names = [name for name in SPLITS if f"{declared.x}_{name}" in held]
        keys = {name: (f"{declared.x}_{name}", declared.y and f"{declared.y}_{name}") for name in names}
    else:
        keys = {"train": (declared.x, declared.y)}
    arrays = read_arrays(path, [key for pair in keys.values() for key in pair if key])
    rows = joined({name: (arrays[x], arrays[y] if y else None) for name, (x, y) in keys.items()}, declared.split_seed)
    return Rows(rows.x, rows.y, rows.parts, declared.largest or rows.largest, name=declared.x)


def _located(path: str, folder: Path | None) -> Path:
    inside = folder / path if folder else Path(path)
    return inside if inside.is_file() else Path(path)
