"""Sources of the user's own files: each against values that NumPy, struct, gzip or Pillow wrote.

The faults are those of files: truncated, trailing, lying, hostile, too large; every one has its typed error.
"""

import os
import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

import pvae
from pvae.data import Data, H5ad, Hdf5, Idx, Images, Mat, Npy, Npz, load
from pvae.data.rows.cache import cache_folder
from pvae.errors import DataError
from pvae.runs.run import Run
from tests.data.writers import (
    FLOATS,
    NAMES,
    RNG,
    ROWS,
    SMALL,
    Y,
    assert_same,
    gzipped,
    h5ad,
    hdf5,
    idx,
    matlab,
    npy,
    npz,
    pictures,
    refused,
)

X = RNG.randint(0, 256, (ROWS, 2, 3)).astype(np.uint8)


@dataclass(frozen=True)
class Row:
    """A source, the rows that it must give, their labels, and what the labels are called."""

    make: Callable[[Path], Data]
    x: np.ndarray
    y: np.ndarray | None
    label_names: tuple[str, ...] | None = None


def photographs(folder: Path) -> str:
    return pictures(folder, X, [NAMES[label] for label in Y], ("png", "bmp", "pgm"))


CELLS = pandas.DataFrame({"kind": pandas.Categorical(np.take(NAMES, Y)), "n": Y})
BY_NAME = np.argsort(Y, kind="stable")

TABLE = {
    "npy": Row(lambda p: Npy(path=npy(p / "x.npy", FLOATS), labels=npy(p / "y.npy", Y)), FLOATS, Y),
    "npy_bytes": Row(lambda p: Npy(path=npy(p / "x.npy", X), scale="unit"), X, None),
    "npz": Row(lambda p: Npz(path=npz(p, x=FLOATS, y=Y), y="y"), FLOATS, Y),
    "npz_deflated": Row(lambda p: Npz(path=npz(p, np.savez_compressed, a=X, b=Y), x="a", y="b"), X, Y),
    "npz_split": Row(lambda p: Npz(path=npz(p, x_train=FLOATS[:40], x_test=FLOATS[40:])), FLOATS, None),
    "hdf5": Row(lambda p: Hdf5(path=hdf5(p / "x.h5", **{"a/x": FLOATS, "a/y": Y}), x="a/x", y="a/y"), FLOATS, Y),
    "mat": Row(lambda p: Mat(path=matlab(p / "x.mat", x=FLOATS, y=Y[:, None]), y="y"), FLOATS, Y),
    "h5ad": Row(lambda p: H5ad(path=h5ad(p / "x.h5ad", FLOATS, CELLS), labels="kind"), FLOATS, Y, NAMES),
    "idx": Row(lambda p: Idx(path=idx(p / "x", X), labels=idx(p / "y", Y)), X, Y),
    "idx_gz": Row(lambda p: Idx(path=idx(p / "x.gz", FLOATS, 0x0D, "f", zipped=True), binarize="none"), FLOATS, None),
    "images": Row(lambda p: Images(path=photographs(p), mode="L"), X[BY_NAME][:, None], Y[BY_NAME], NAMES),
}


def made(name: str, folder: Path, **changes: Any) -> Any:
    return TABLE[name].make(folder).model_copy(update=changes)


@pytest.mark.parametrize("name", TABLE)
def test_values_are_those_that_were_written(name: str, tmp_path: Path):
    row = TABLE[name]
    for stream in (False, True):
        rows = made(name, tmp_path, stream=stream).read(None, 0)
        assert isinstance(rows.x, np.ndarray) != stream
        assert np.array_equal(rows.x[:], row.x)
        assert np.array_equal(rows.y, row.y) if row.y is not None else rows.y is None
        assert rows.label_names == row.label_names


@pytest.mark.parametrize("name", TABLE)
def test_streamed_rows_are_the_held_ones(name: str, tmp_path: Path):
    held, streamed = (load(made(name, tmp_path, stream=stream)) for stream in (False, True))
    assert_same(streamed, held)
    assert held.notes == streamed.notes


@pytest.mark.parametrize("name", TABLE)
def test_a_fit_on_streamed_rows(name: str, tmp_path: Path):
    experiment = pvae.Experiment.load("vae", SMALL).model_copy(update={"data": made(name, tmp_path, stream=True)})
    declared = experiment.with_overrides("decoder.likelihood.kind=normal")
    run = pvae.fit(declared, run_dir=tmp_path / "runs", device="cpu", progress=False)
    assert np.isfinite(run.metrics["elbo"]).all()
    assert Run.load(run.path).data.fingerprint == run.data.fingerprint


@pytest.mark.parametrize("name", ["npy", "npz_deflated", "idx_gz", "images"])
def test_rows_too_large_for_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """FAULTS 45 (data): refused with the memory they need, before they are read; streamed they pass."""
    monkeypatch.setattr("pvae.util.memory.total_memory", lambda: 2000)
    refused(r"half of this computer's memory of .* GiB; got \(60, .*stream = true", load, made(name, tmp_path))
    assert len(load(made(name, tmp_path, stream=True)).train) == 48


def test_columns_one_after_another(tmp_path: Path):
    columns = np.asfortranarray(FLOATS)
    for source, path in ((Npy, npy(tmp_path / "x.npy", columns)), (Npz, npz(tmp_path, x=columns))):
        assert np.array_equal(source(path=path).read(None, 0).x[:], FLOATS)
        refused("got columns .Fortran order.. Save it in C order", load, source(path=path, stream=True))


def announcing(shape: str, content: bytes = b"") -> bytes:
    """A `.npy` file whose header says `shape`, whatever stands behind it."""
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "broken or foreign file"),
        (b"\x80\x04K\x01.", "broken or foreign file"),
        (announcing("(3, 1)", bytes(23)), r"expected 152 bytes for \(3, 1\) float64; got 151"),
        (announcing("(3, 1)", bytes(25)), r"expected 152 bytes for \(3, 1\) float64; got 153"),
        (announcing("(4611686018427387904, 4611686018427387904)"), r"expected 17014118346046923\d+ bytes .*; got 128"),
        (announcing("(-3, -1)", bytes(24)), r"got 152"),
        (announcing("()", bytes(8)), r"expected an array \(rows, ...\) with at least one row; got shape \(\)"),
        (announcing("(0, 3)"), r"with at least one row; got shape \(0, 3\)"),
        (announcing("(3, 1)", np.array([1, np.nan, 2]).tobytes()), "expected finite numbers; got nan in row 1, col"),
        (announcing("(3,", bytes(24)), "broken or foreign file"),
    ],
)
def test_broken_npy(content: bytes, match: str, stream: bool, tmp_path: Path):
    """FAULTS 19, 24, 26: sizes are compared with the file before anything is allocated."""
    (tmp_path / "x.npy").write_bytes(content)
    refused(match, load, Npy(path=str(tmp_path / "x.npy"), stream=stream))


@pytest.mark.parametrize("stream", [False, True])
def test_objects_are_never_unpickled(stream: bool, tmp_path: Path):
    """FAULTS 7, 28."""
    objects = np.array([{"a": 1}] * ROWS, dtype=object)
    for data in (Npy(path=npy(tmp_path / "x.npy", objects), stream=stream), Npz(path=npz(tmp_path, x=objects))):
        with pytest.raises(DataError, match="got an object array, which could run code. Save floats"):
            load(data.model_copy(update={"stream": stream}))
    refused("expected real numbers; got", load, Npy(path=npy(tmp_path / "x.npy", np.zeros(9, "f4,i4")), stream=stream))


def test_what_is_no_file_is_not_opened(tmp_path: Path):
    """FAULTS 36: a pipe would block, a device would never end."""
    os.mkfifo(tmp_path / "pipe")
    kinds = {"pipe": "a device or pipe", "/dev/zero": "a device or pipe", ".": "a folder", "absent": "no such file"}
    for path, kind in kinds.items():
        for source in (Npy, Npz, Idx):
            refused(f"got {kind}", load, source(path=str(tmp_path / path)))


def test_labels_that_do_not_fit(tmp_path: Path):
    """FAULTS 25."""
    path = npy(tmp_path / "x.npy", FLOATS)
    refused(r"one for each of 60 rows; got shape \(59,\)", load, Npy(path=path, labels=npy(tmp_path / "y.npy", Y[1:])))
    halves = Idx(path=idx(tmp_path / "x", X), labels=idx(tmp_path / "y", Y / 2, 0x0E, "d"))
    refused("expected integers; got 0.5 in row", load, halves)


def lying_header(folder: Path) -> str:
    content = Path(npy(folder / "x.npy", FLOATS)).read_bytes()
    content = content.replace(b"(60, 5)", b"(9940, 5)", 1).replace(b"  \n", b"\n", 1)
    with zipfile.ZipFile(folder / "data.npz", "w") as archive:
        archive.writestr("x.npy", content)
    return str(folder / "data.npz")


def flipped_byte(folder: Path) -> str:
    content = bytearray(Path(npz(folder, x=X)).read_bytes())
    content[300] ^= 1
    return written(folder, content)


def written(folder: Path, content: bytes | bytearray) -> str:
    (folder / "data.npz").write_bytes(content)
    return str(folder / "data.npz")


def test_archive_that_is_split_already(tmp_path: Path):
    path = npz(tmp_path, x_train=FLOATS, y_train=Y, x_test=FLOATS[:7] + 1, y_test=Y[:7])
    data = load(Npz(path=path, y="y"))
    assert [len(split) for split in data.splits] == [54, 6, 7]
    assert torch.equal(data.test.x, torch.from_numpy(FLOATS[:7] + 1))
    path = npz(tmp_path, x_train=FLOATS, x_validation=FLOATS[:5], x_test=FLOATS[:7] + 1)
    assert torch.equal(load(Npz(path=path)).train.x, torch.from_numpy(FLOATS))


def test_archive_in_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    npz(tmp_path, x=X)
    assert len(load(Npz(path="data.npz"), data_dir=tmp_path).train) == 48
    monkeypatch.setenv("PVAE_DATA_DIR", str(tmp_path))
    assert len(load(Npz(path="data.npz")).train) == 48


def patched(folder: Path, offset: int, value: bytes, save: Callable[..., None] = np.savez_compressed) -> str:
    """An archive with other bytes at an offset of its central directory's first entry."""
    content = bytearray(Path(npz(folder, save, x=FLOATS)).read_bytes())
    start = content.rindex(b"PK\1\2") + offset
    content[start : start + len(value)] = value
    return written(folder, content)


def renamed(folder: Path, name: str, method: int = zipfile.ZIP_STORED, mode: int = 0) -> str:
    """An archive whose member bears another name, another method, or the mode of another kind of file."""
    content = Path(npy(folder / "x.npy", FLOATS)).read_bytes()
    info = zipfile.ZipInfo(name)
    info.external_attr, info.compress_type = mode << 16, method
    with zipfile.ZipFile(folder / "data.npz", "w") as archive:
        archive.writestr(info, content)
    return str(folder / "data.npz")


HUGE = b"\xf0\xff\xff\xff"
ARCHIVES: dict[str, tuple[Callable[[Path], str], str, str]] = {
    "a name that leads up": (lambda p: renamed(p, "../x.npy"), "../x", "a plain name in the archive; got one that"),
    "an absolute name": (lambda p: renamed(p, "/etc/x.npy"), "/etc/x", "got one that leads out"),
    "backslashes": (lambda p: renamed(p, "a\\..\\..\\x.npy"), "a\\..\\..\\x", "got one that leads out"),
    "a link": (lambda p: renamed(p, "x.npy", mode=0o120777), "x", "expected an array in the archive; got a link"),
    "LZMA": (lambda p: renamed(p, "x.npy", zipfile.ZIP_LZMA), "x", "stored or deflated, as NumPy does; got method 14"),
    "no suffix": (lambda p: renamed(p, "x"), "x", "expected an array 'x'; got"),
    "another name": (lambda p: npz(p, z=X, xs=X), "x", "expected an array 'x'; got z, xs .did you mean 'xs'"),
    "words": (lambda p: npz(p, x=np.array(["a", "b"])), "x", "expected real numbers"),
    "a size that cannot be, deflated": (
        lambda p: patched(p, 24, HUGE), "x", r"'x': expected 4294967280 bytes, as the archive says; got"
    ),
    "a size that cannot be": (lambda p: patched(p, 24, HUGE, np.savez), "x", "expected 4294967280 bytes, as the arc"),
    "a header that lies": (lying_header, "x", r"'x': expected \d+ bytes for \(9940, 5\) float32; got"),
    "a checksum, deflated": (lambda p: patched(p, 16, b"\0\0\0\0"), "x", "broken or foreign file: Bad CRC-32"),
    "a checksum": (lambda p: patched(p, 16, b"\0\0\0\0", np.savez), "x", "broken or foreign file: Bad CRC-32"),
    "a flipped byte": (flipped_byte, "x", "broken or foreign file"),
    "a password": (lambda p: patched(p, 8, b"\1"), "x", "broken or foreign file: .*encrypted"),
    "an offset": (lambda p: patched(p, 42, b"\x20"), "x", "broken or foreign file"),
    "empty": (lambda p: written(p, b""), "x", "broken or foreign file"),
    "a pickle": (lambda p: written(p, pickle.dumps({"x": 1})), "x", "broken or foreign file"),
    "truncated": (lambda p: written(p, Path(npz(p, x=FLOATS)).read_bytes()[:-100]), "x", "broken or foreign file"),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", ARCHIVES)
def test_hostile_archives(case: str, stream: bool, tmp_path: Path):
    """FAULTS 26, 27 and 28: names that lead out, links, bombs, damage; nothing of it reaches the cache."""
    make, key, match = ARCHIVES[case]
    refused(match, load, Npz(path=make(tmp_path), x=key, stream=stream))
    assert not list(cache_folder().glob("decoded/*/*"))


def test_a_bomb_is_decoded_in_bounded_memory_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """FAULTS 27: 64 MiB of zeros in 64 KiB."""
    path = npz(tmp_path, np.savez_compressed, x=np.zeros((2**13, 2**10)))
    assert os.path.getsize(path) < 2**17
    monkeypatch.setattr("pvae.util.memory.total_memory", lambda: 2**27)
    refused("'x': expected rows that fit into half of this computer's memory", load, Npz(path=path))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("code", "letter"), [*zip((8, 9, 11, 12, 13, 14), "Bbhifd", strict=True)])
def test_every_type_of_idx(code: int, letter: str, zipped: bool, tmp_path: Path):
    values = RNG.randint(0, 100, (20, 2, 1, 3)) * (1 if code == 0x08 else -1)
    path = idx(tmp_path / "x", values.astype(float) / 2 if letter in "fd" else values, code, letter, zipped)
    for stream in (False, True):
        x = Idx(path=path, stream=stream).read(None, 0).x
        assert np.array_equal(x[:] * (2 if letter in "fd" else 1), values)


WHOLE = struct.pack(">BBBB2I", 0, 0, 0x0B, 2, 3, 4) + bytes(24)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "expected the IDX magic 00 00, a type .*; got no bytes"),
        (b"\0\0\x0a\2" + WHOLE[4:], "got 00 00 0a 02"),
        (b"\0\0\x08\0\5", "got 00 00 08 00"),
        (b"\0\0\x08\xff" + bytes(2000), "got 00 00 08 ff"),
        (WHOLE[:9], "expected a header of 12 bytes; got 9"),
        (WHOLE[:-1], r"expected 36 bytes; got 35 \(a truncated file\)"),
        (WHOLE + b"x", r"expected 36 bytes; got 37 \(trailing bytes\)"),
        (struct.pack(">BBBB2I", 0, 0, 8, 2, 0, 4), r"expected sizes of at least 1; got \[0, 4\]"),
        (b"\0\0\x0e\4" + b"\xff" * 16, r"expected 27222589\d+ bytes; got 20 \(a truncated file\)"),
        (gzipped(b"\0\0\x0e\4" + b"\xff" * 16), r"expected 27222589\d+ bytes, as its header says; got a gzip"),
        (gzipped(WHOLE)[:-12], "got a broken file of 2. bytes: Compressed file ended"),
        (gzipped(WHOLE)[:-4] + b"abcd", "broken file of .* bytes: Incorrect length"),
        (gzipped(WHOLE[:30]), r"expected 36 bytes; got 30 \(a truncated file\)"),
        (gzipped(WHOLE + bytes(5)), r"expected 36 bytes; got 41 \(trailing bytes\)"),
        (gzipped(WHOLE + bytes(2**25)), r"got at least \d+ \(trailing bytes\)"),
        (b"\x1f\x8bgarbage", "broken file"),
    ],
)
def test_broken_idx(content: bytes, match: str, stream: bool, tmp_path: Path):
    """FAULTS 26: with the bytes expected and found; sizes are checked before anything is allocated."""
    (tmp_path / "x").write_bytes(content)
    refused(match, load, Idx(path=str(tmp_path / "x"), stream=stream))
    assert not list(cache_folder().glob("decoded/*/*"))


def test_idx_that_is_not_finite(tmp_path: Path):
    """FAULTS 19."""
    values = FLOATS.copy()
    values[7, 2] = np.inf
    for zipped in (False, True):
        with pytest.raises(DataError, match="expected finite numbers; got inf in row 7, column 2"):
            load(Idx(path=idx(tmp_path / "x", values, 0x0D, "f", zipped), stream=True))


def save(path: Path, pixels: Any, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path, **options)


COLOUR = RNG.randint(0, 256, (12, 6, 4, 3)).astype(np.uint8)


def colours(folder: Path) -> Path:
    for number, pixels in enumerate(COLOUR):
        save(folder / f"{number:02}.png", pixels)
    return folder


def test_colour_luminance_and_size(tmp_path: Path):
    path = str(colours(tmp_path / "a"))
    whole = Images(path=path).read(None, 0).x[:]
    assert np.array_equal(whole, COLOUR.transpose(0, 3, 1, 2))
    grey = Images(path=path, mode="L", size=(3, 5)).read(None, 0).x[:]
    by_hand = [Image.fromarray(p).convert("L").resize((5, 3), Image.Resampling.BILINEAR) for p in COLOUR]
    assert np.array_equal(grey[:, 0], np.stack([np.asarray(image) for image in by_hand]))


def test_other_modes_of_colour_and_the_camera_s_orientation(tmp_path: Path):
    picture = Image.fromarray(COLOUR[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(COLOUR[0].transpose(1, 0, 2)[::-1].copy()).save(tmp_path / "a.png", exif=exif)
    picture.convert("RGBA").save(tmp_path / "b.png")
    picture.quantize(256).save(tmp_path / "c.gif")
    picture.save(tmp_path / "d.webp", lossless=True)
    picture.save(tmp_path / "e.tif")
    x = Images(path=str(tmp_path)).read(None, 0).x[:]
    assert all(np.array_equal(image, COLOUR[0].transpose(2, 0, 1)) for image in x)
    assert len(x) == 5


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int, height: int) -> bytes:
    """A PNG of zeros, valid as far as its header goes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6)))


@pytest.fixture
def troubled(tmp_path: Path) -> Path:
    """A folder of twelve images, and of everything that is none."""
    folder = colours(tmp_path / "images")
    whole = (folder / "03.png").read_bytes()
    outside = tmp_path / "outside"
    save(outside / "secret.png", COLOUR[0])
    contents = {
        "a_truncated.png": whole[: len(whole) // 2],
        "b_flipped.png": whole[:60] + bytes([whole[60] ^ 1]) + whole[61:],
        "c_bomb.png": bomb(9000, 9000),
        "d_larger_bomb.png": bomb(50000, 50000),
        "e_text.png": b"no image",
        "f_empty.jpg": b"",
        "g_script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "labels.csv": b"a,b\n",
        "h\x1b[2Jescape.png": b"no image",
        ".hidden.png": b"no image",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    save(folder / "i_deep.png", np.zeros((6, 4), np.uint16))
    (folder / "j_out.png").symlink_to(outside / "secret.png")
    (folder / "k_folder").symlink_to(outside)
    (folder / "l_loop.png").symlink_to(folder / "l_loop.png")
    os.mkfifo(folder / "m_pipe.png")
    (folder / ".cache").mkdir()
    save(folder / ".cache" / "thumbnail.png", COLOUR[0])
    return folder


def test_what_is_no_image_is_skipped_and_listed(troubled: Path, monkeypatch: pytest.MonkeyPatch):
    """FAULTS 27, 29, 36, 38: broken, bombs (none decoded), links out, devices; and the good ones are all there."""
    monkeypatch.setattr("pvae.data.sources.images.SKIPPED_LISTED", 99)
    data = load(Images(path=str(troubled)))
    assert sum(len(split) for split in data.splits) == 12
    (listed,) = [note for note in data.notes if "skipped" in note]
    assert " 14 skipped: " in listed
    for told in (
        "a_truncated.png (",
        "b_flipped.png (broken PNG file (bad header checksum in b'IDAT'))",
        "c_bomb.png (9000 x 9000 pixels, more than 67108864)",
        "d_larger_bomb.png (Image size (2500000000 pixels) exceeds limit",
        "e_text.png (no image by its content)",
        "f_empty.jpg (no image by its content)",
        "g_script.png (no image by its content)",
        "labels.csv (no image by its name)",
        "h\\x1b[2Jescape.png (",
        "i_deep.png (more than 8 bits a channel, mode I;16)",
        "j_out.png (a link out of the folder)",
        "k_folder (a link to a folder)",
        "l_loop.png (a link to nothing)",
        "m_pipe.png (no plain file)",
    ):
        assert told in listed


def test_the_list_of_what_is_skipped_is_short(troubled: Path):
    (listed,) = [note for note in load(Images(path=str(troubled))).notes if "skipped" in note]
    assert listed.endswith(" and 9 more.")


def test_folders_that_give_no_images(tmp_path: Path):
    """FAULTS 29: an error when all are bad."""
    refused("Expected a folder of images at .*absent; got no such folder", load, Images(path=str(tmp_path / "absent")))
    (tmp_path / "empty").mkdir()
    refused(r"expected images \(PNG, .*\); got none\.$", load, Images(path=str(tmp_path / "empty")))
    (tmp_path / "empty" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"expected images that can be read; got none. 1 skipped: a.png \(no image by"):
        load(Images(path=str(tmp_path / "empty")))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.png", b"")
    with pytest.raises(DataError, match="expected a folder of images; got a file. Unpack an archive first"):
        load(Images(path=str(tmp_path / "images.zip")))
    save(colours(tmp_path / "mixed") / "12.png", np.zeros((5, 4, 3), np.uint8))
    with pytest.raises(DataError, match=r"one size; got 6 x 4 in 00.png and 5 x 4 in 12.png. Set data.size = \["):
        load(Images(path=str(tmp_path / "mixed")))
    assert len(load(Images(path=str(tmp_path / "mixed"), size=(6, 4))).train) == 11


def test_labels_are_sub_folders_only_if_every_image_is_in_one(tmp_path: Path):
    path = Path(photographs(tmp_path))
    assert load(Images(path=str(path), mode="L")).label_names == NAMES
    save(path / "top.png", X[0] ^ 1)
    data = load(Images(path=str(path), mode="L"))
    assert data.label_names is None
    assert data.train.y is None


def entries() -> list[Path]:
    return sorted(cache_folder().glob("decoded/*/x"))


def test_an_entry_is_made_once_and_again_when_damaged_or_out_of_date(tmp_path: Path):
    """FAULTS 32."""
    folder = colours(tmp_path / "images")
    declared = Images(path=str(folder), stream=True)
    before = load(declared)
    (entry,) = entries()
    made_at = entry.stat().st_mtime_ns
    load(declared)
    assert entry.stat().st_mtime_ns == made_at
    content = bytearray(entry.read_bytes())
    content[-1] ^= 1
    entry.write_bytes(content)
    assert load(declared).fingerprint == before.fingerprint
    save(folder / "00.png", COLOUR[0] ^ 1)
    assert load(declared).fingerprint != before.fingerprint
    assert len(entries()) == 2
    load(declared.model_copy(update={"mode": "L"}))
    assert len(entries()) == 3
    assert not list(cache_folder().glob("decoded/.part-*"))


DECODE = """
import sys, time
import numpy as np
from pvae.data.rows.cache import decoded
def make(writer):
    with open(sys.argv[1], "a") as log:
        log.write("made\\n")
    time.sleep(0.5)
    writer.append("x", np.arange(6).reshape(3, 2))
print(decoded({"source": "a test"}, make).arrays["x"][:].tolist())
"""


def test_two_processes_that_decode_at_once(tmp_path: Path):
    """FAULTS 32: one decodes, the other waits for it."""
    log = tmp_path / "log"
    command = [sys.executable, "-c", DECODE, str(log)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [writer.communicate(timeout=60)[0].strip() for writer in writers] == ["[[0, 1], [2, 3], [4, 5]]"] * 2
    assert log.read_text() == "made\n"
    assert len(entries()) == 1
