"""Data sources of arrays: of NumPy (`.npy`, `.npz`), read without pickle, IDX, the format of MNIST, and named ones.

Sizes are checked before anything is allocated.

References: Gradient-based learning applied to document recognition (LeCun et al., 1998)
"""

import gzip
import stat
import struct
import zipfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, cast

import numpy as np

from pvae.data.rows import cache, files, prepare
from pvae.data.rows.files import AnyArray, ArrayLayout, FileArray
from pvae.data.rows.rows import SPLITS, Rows, joined
from pvae.data.sources.base import FileData
from pvae.data.tables.side import side_rows
from pvae.errors import DataError, near, printable, refuse

MAX_DEFLATE_RATIO = 1032
"""Largest compression ratio of the deflate format (output bytes for each input byte)."""
TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
LABEL_KINDS = "biufUS"
"""Kinds of dtypes that labels may have, by NumPy's letters: numbers and text."""
GZIP = b"\x1f\x8b"


class Npy(FileData):
    """Array (n, ...) of a `.npy` file; with `stream` it is memory-mapped, so that its size is not limited by memory.

    Object arrays are refused: reading them could run code.
    """

    source: Literal["npy"] = "npy"
    labels: str | None = None
    """Path of a second `.npy` file with integer labels; None for data without labels."""
    mask: str | None = None
    """Path of another `.npy` file of booleans, of the shape of the rows, True (or 1) where a value is missing, for
    values that cannot be NaN, such as bytes; None for no such file. New rows have NaN instead."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        path = files.located(self.path, data_dir)
        y = np.asarray(files.read_npy(files.located(self.labels, data_dir), kinds=LABEL_KINDS)) if self.labels else None
        x = files.read_npy(path, self.stream)
        if self.mask is not None:
            x = prepare.Holed(x, files.read_npy(files.located(self.mask, data_dir), self.stream), self.mask)
        return self.to_rows(x, y, "x")


class Idx(FileData):
    """IDX file, the format of MNIST: an array of any of its six number types, plain or gzipped.

    References: Gradient-based learning applied to document recognition (LeCun et al., 1998)
    """

    source: Literal["idx"] = "idx"
    labels: str | None = None
    """Path of a second IDX file with integer labels; None for data without labels."""
    mask: str | None = None
    """Path of another IDX file of the shape of the rows, 1 where a value is missing and 0 elsewhere; None for no such
    file. New rows have none."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        x = read_idx(files.located(self.path, data_dir), stream=self.stream)
        y = np.asarray(read_idx(files.located(self.labels, data_dir))) if self.labels else None
        if self.mask is not None:
            x = prepare.Holed(x, read_idx(files.located(self.mask, data_dir), stream=self.stream), self.mask)
        return self.to_rows(x, y, "x")


def unpacked(
    content: Iterator[np.ndarray], layout: ArrayLayout, stream: bool, where: str, key: Mapping[str, Any]
) -> AnyArray:
    """Return the array of a compressed stream: decoded once into the cache under `key` if `stream`, else in memory."""
    if stream:
        return cache.decoded(key, lambda writer: writer.extend("x", content)).arrays["x"]
    files.require_room(layout.shape, layout.dtype, where)
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
        np.ndarray of shape (n, *row), big-endian as stored.

    Raises:
        DataError: the magic bytes, sizes or length of the file are wrong, or the array is too large for memory. Sizes
            are checked before anything is allocated.
    """
    version = files.version_of(path)
    with _idx_errors(path, version[0]), path.open("rb") as plain:
        zipped = plain.read(2) == GZIP
        plain.seek(0)
        file = cast("IO[bytes]", gzip.GzipFile(fileobj=plain)) if zipped else plain
        layout = _idx_layout(file, wanted, path)
        if not zipped:
            _require_length(path, layout, version[0])
            return files.held(FileArray(path, layout.dtype, layout.shape, layout.offset, version), stream, str(path))
        if layout.total > (most := MAX_DEFLATE_RATIO * version[0]):
            raise DataError.of("data.sources.gzip", path=path, layout=layout, size=version[0], most=most)
        key = {"source": "idx", "path": str(path.resolve()), "version": version}
        return unpacked(_unzipped(file, layout, path, version[0]), layout, stream, str(path), key)


def _idx_errors(path: Path, size: int) -> AbstractContextManager[None]:
    return files.broken_as(f"{path}: expected IDX data; got a broken file of {size} bytes")


def _idx_layout(file: IO[bytes], wanted: tuple[int, ...] | None, path: Path) -> ArrayLayout:
    magic, expected = file.read(4), "00 00, a type (08 09 0b 0c 0d 0e) and 1 to 32 dimensions"
    known = len(magic) == 4 and magic[:2] == b"\0\0" and magic[2] in TYPES and 1 <= magic[3] <= files.MAX_DIMENSIONS
    if wanted:
        known, expected = magic == idx_header(wanted)[:4], idx_header(wanted)[:4].hex(" ")
    refuse(not known, "data.sources.magic", path=path, expected=expected, found=magic.hex(" "))
    sizes = file.read(4 * magic[3])
    refuse(len(sizes) < 4 * magic[3], f"{path}: expected a header of {4 + 4 * magic[3]} bytes; got {4 + len(sizes)}.")
    shape = struct.unpack(f">{magic[3]}I", sizes)
    refuse(wanted and shape != wanted, "data.sources.shape", path=path, wanted=wanted, shape=shape)
    refuse(0 in shape, f"{path}: expected sizes of at least 1; got {list(shape)}.")
    return ArrayLayout(shape, np.dtype(TYPES[magic[2]]), 4 + len(sizes))


def _unzipped(file: IO[bytes], layout: ArrayLayout, path: Path, size: int) -> Iterator[np.ndarray]:
    """Yield chunks of rows of a gzipped IDX file; refuse a file that is too short or has trailing bytes."""
    with _idx_errors(path, size):
        yield from layout.pieces(file, str(path))
        extra = len(file.read(files.PIECE_BYTES))
        _require_length(path, layout, layout.total + extra, "at least " if extra == files.PIECE_BYTES else "")


def _require_length(path: Path, layout: ArrayLayout, found: int, more: str = "") -> None:
    refuse(found != layout.total, "data.sources.length", path=path, layout=layout, found=found, more=more)


LOCAL_HEADER = struct.Struct("<26x2H")
"""Zip local file header; its last two numbers are the lengths of the name and extra fields after it."""
USUAL_NAMES = ("x", "X", "images", "image", "imgs", "data", "features", "inputs", "counts", "arr_0")
"""Names under which the rows of an archive are looked for, in this order."""
SPLIT_NAMES = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "dev"), "test": ("test",)}
"""Names of each split in an archive."""


def _by_split(wanted: str, names: Sequence[str], path: Path) -> dict[str, str]:
    """Return the names of the arrays of each split, such as `train_images` of "train" for `images`; empty if absent.

    An array of the whole name is that of "train" if no other is.

    Raises:
        DataError: several arrays are of one split.
    """
    found = {}
    for split, known in SPLIT_NAMES.items():
        forms = {f"{wanted}_{name}" for name in known} | {f"{name}_{wanted}" for name in known}
        there = [name for name in names if name.lower() in {form.lower() for form in forms}]
        refuse(len(there) > 1, f"{path}: expected one array of {wanted!r} for {split}; got {', '.join(there)}.")
        if there:
            found[split] = there[0]
    if wanted in names:
        return {**found, "train": wanted} if "train" not in found else {"train": wanted}
    return found


class NamedArrays(FileData):
    """Base of the sources of files with several arrays: `x` (n, ...), or one array a split, as `x_train` and `val_x`.

    Splits are found by the usual names (`train`, `val`, `valid`, `validation`, `dev`, `test`), before or after that of
    the array; those that the file lacks are random tenths of the training rows, permuted with `split_seed`. Arrays
    that are not read are named in `Dataset.notes`.
    """

    x: str | None = None
    """Name of the array of rows in the file, without the name of a split, such as `images` for `train_images`; None
    finds it among the usual names."""
    y: str | None = None
    """Name of the array of labels in the file, without the name of a split; None for data without labels."""

    mask: str | None = None
    """Name of an array of booleans, of the shape of the rows, True where a value is missing, without the name of a
    split; for values that cannot be NaN, such as bytes. None for no such array."""
    id: str | None = None
    """Name of the array with the name of each row (text or numbers), without the name of a split; None for no names."""

    @abstractmethod
    def names(self, path: Path) -> list[str]:
        """Return the names of all arrays of the file."""

    @abstractmethod
    def array(self, path: Path, name: str, text: bool) -> AnyArray:
        """Return an array of the file, rows first; labels, with `text`, may be text and are never streamed."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        path = files.located(self.path, data_dir)
        names = self.names(path)
        wanted = self.x or next((name for name in USUAL_NAMES if _by_split(name, names, path)), "x")
        side = [column.of or name for name, column in self.side.items()]
        wants = filter(None, (wanted, self.y, self.id, self.mask, *side))
        known = {want: _by_split(want, names, path) or {"train": want} for want in wants}
        found, used = known[wanted], [name for arrays in known.values() for name in arrays.values()]
        for name in used:
            if name not in names:
                shown = ", ".join(map(printable, names)) or "none"
                raise DataError(f"{path}: expected an array {name!r}; got {shown}{near(name, names)}.")
        refuse("train" not in found, f"{path}: expected training rows, {wanted}_train; got {', '.join(names)}.")
        for want, arrays in known.items():
            if lacking := [split for split in found if split not in arrays]:
                raise DataError.of("data.sources.beside", path=path, wanted=want, y=self.y, of=lacking, names=names)

        def text(name: str | None, split: str) -> np.ndarray | None:
            return np.asarray(self.array(path, known[name][split], True)) if name else None

        def rows(name: str, split: str) -> AnyArray:
            x = self.array(path, name, False)
            if self.mask is not None:
                mask = known[self.mask][split]
                x = prepare.Holed(x, self.array(path, mask, False), f"{path}, {mask!r}")
            return x if self.stream else x[:]

        given = {split: (rows(name, split), text(self.y, split)) for split, name in found.items()}
        ids = [cache.texts(text(self.id, split)) for split in SPLITS if self.id and split in found]
        left = [name for name in names if name not in used]
        notes = [f"{path.name}: arrays that are not read: {', '.join(map(printable, left))}"] if left else []
        if self.x is None and wanted != "x":
            notes.append(f"{path.name}: rows are read from {', '.join(found.values())}")
        more: dict[str, Any] = {"notes": tuple(notes), "ids": np.concatenate(ids) if ids else None}
        raw = {name: np.concatenate([text(name, split) for split in SPLITS if split in found]) for name in side}
        more["side"] = side_rows(raw, self.side, sum(len(x) for x, _ in given.values()), str(path))
        return joined(given, self.split_seed, wanted, largest=self.largest, masked=self.masked, **more)


class Npz(NamedArrays):
    """Arrays of a NumPy archive (`.npz`). Object arrays are refused: reading them could run code."""

    source: Literal["npz"] = "npz"

    def names(self, path: Path) -> list[str]:
        with _opened(path) as archive:
            return _names(archive)

    def array(self, path: Path, name: str, text: bool) -> AnyArray:
        return read_array(path, name, self.stream and not text, text=text)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    with _archive_errors(path), zipfile.ZipFile(path) as archive:
        yield archive


def _archive_errors(path: Path) -> AbstractContextManager[None]:
    return files.broken_as(f"{path}: expected a NumPy archive (.npz); got a broken or foreign file")


def _names(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read_array(path: Path, key: str, stream: bool = False, *, text: bool = False) -> AnyArray:
    """Return the array of a NumPy archive with the given name.

    Arguments:
        path: path of the archive.
        key: name of the array.
        stream: leave the array on the disk: an uncompressed one is mapped, a deflated one decoded once into the cache.
        text: accept text as well as numbers, for labels.

    Raises:
        DataError: the file is missing or damaged, the name is absent, the array contains objects, sizes are
            inconsistent, or the array is too large for memory.
    """
    version, where = files.version_of(path), f"{path}, {key!r}"
    with _opened(path) as archive:
        names = _names(archive)
        refuse(key not in names, f"{path}: expected an array {key!r}; got {', '.join(names)}{near(key, names)}.")
        info = archive.getinfo(f"{key}.npy")
        _refuse_trick(info, where)
        with archive.open(info) as file:
            layout = files.npy_layout(file, info.file_size, where, stream, LABEL_KINDS if text else "biuf")
        refuse(not layout.shape or 0 in layout.shape, "data.rows.none", name=where, shape=layout.shape)
        content = _content(archive, info, layout, path)
        if stream and info.compress_type == zipfile.ZIP_STORED:
            for _ in content:  # for the checksum's sake
                pass
            offset = _offset(path, info) + layout.offset
            return FileArray(path, layout.dtype, layout.shape, offset, version)
        entry = {"source": "npz", "path": str(path.resolve()), "version": version, "member": key}
        return layout.in_rows(unpacked(content, layout, stream, where, entry))


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo, layout: ArrayLayout, path: Path) -> Iterator[np.ndarray]:
    """Yield the rows of an array in chunks of a few MiB, and then verify its zip checksum."""
    with _archive_errors(path), archive.open(info) as file:
        file.read(layout.offset)
        yield from layout.pieces(file, str(path))
        file.read(1)  # at the end of a member zipfile compares its checksum


def _refuse_trick(info: zipfile.ZipInfo, where: str) -> None:
    """Refuse a zip entry whose name leads out of the archive, which is a link, or whose size is impossible."""
    name = PurePosixPath(info.filename.replace("\\", "/"))
    refuse(name.is_absolute() or ".." in name.parts, "data.sources.outside", where=where)
    refuse(stat.S_ISLNK(info.external_attr >> 16), f"{where}: expected an array in the archive; got a link.")
    ratios = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: MAX_DEFLATE_RATIO}
    refuse(info.compress_type not in ratios, "data.sources.packed", where=where, method=info.compress_type)
    if info.file_size > (most := info.compress_size * ratios[info.compress_type]):
        raise DataError.of("data.sources.archive", where=where, info=info, most=most)


def _offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Return the byte offset in the archive file at which the content of an uncompressed entry begins."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        return info.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size)))
