"""Files as strangers have them: nothing is cut, dropped or reordered without a remark that names it."""

import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pvae.data import Dataset, Images, Npy, Npz, load
from pvae.data.rows.rows import natural
from tests.data.writers import npy, npz, refused

RNG = np.random.RandomState(0)
X = RNG.rand(30, 4).astype(np.float32)
OTHER = RNG.rand(6, 4).astype(np.float32) + 100
CODES = np.arange(30) % 3


# ---------------------------------------------------------------------- archives

NAMES = {
    "x_val": ("x_train", "x_val", None),
    "X_valid": ("X_train", "X_valid", None),
    "val_images": ("train_images", "val_images", None),
    "dev": ("data_train", "data_dev", None),
    "whole": ("x", "x_val", None),
    "declared": ("train_rows", "validation_rows", "rows"),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_validation_split_of_an_archive_is_read(tmp_path, name):
    """FAULTS 69."""
    train, validation, x = NAMES[name]
    data = load(Npz(path=npz(tmp_path, np.savez, **{train: X, validation: OTHER}), x=x))
    assert torch.equal(data.validation.x, torch.from_numpy(OTHER))
    assert len(data.train) + len(data.test) == 30


def test_arrays_that_are_not_read_are_named(tmp_path):
    """FAULTS 69."""
    data = load(Npz(path=npz(tmp_path, x=X, y=CODES, weights=X)))
    assert "data.npz: arrays that are not read: y, weights" in data.notes
    assert not any("not read" in note for note in load(Npz(path=npz(tmp_path, x=X, y=CODES), y="y")).notes)


def test_two_arrays_of_one_split_are_refused(tmp_path):
    path = npz(tmp_path, x_train=X, x_val=OTHER, val_x=OTHER)
    refused("expected one array of 'x' for validation; got x_val, val_x", load, Npz(path=path))


def test_an_archive_without_training_rows_is_refused(tmp_path):
    refused("expected training rows, x_train; got x_test", load, Npz(path=npz(tmp_path, x_test=X)))
    path = npz(tmp_path, x_train=X, x_val=OTHER, y_train=CODES)
    refused("expected labels 'y' of validation; got x_train, x_val, y_train", load, Npz(path=path, y="y"))


# ---------------------------------------------------------------------- labels

WORDS = np.array(["1", "2", "10"])
LABELS: dict[str, tuple[Any, list[int], tuple[str, ...] | None]] = {
    "column": (CODES[:, None], [0, 1, 2], None),
    "one-hot": (np.eye(3)[CODES], [0, 1, 2], None),
    "floats": (CODES.astype(np.float32), [0, 1, 2], None),
    "text": (WORDS[CODES], [0, 1, 2], ("1", "2", "10")),
    "bytes": (np.char.encode(WORDS)[CODES], [0, 1, 2], ("1", "2", "10")),
    "names": (np.array(["s2", "s10", "s1"])[CODES], [1, 2, 0], ("s1", "s2", "s10")),
}


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("source", ["npz", "npy", "python"])
def test_labels_become_integers(tmp_path, name, source):
    y, first, names = LABELS[name]
    if source == "npz":
        data = load(Npz(path=npz(tmp_path, x=X, labels=y), y="labels"))
    elif source == "npy":
        data = load(Npy(path=npy(tmp_path / "x.npy", X), labels=npy(tmp_path / "y.npy", y)))
    else:
        data = Dataset.from_tensors(X, y)
    row = (data.train.x[:, None] == torch.from_numpy(X)).all(-1).float().argmax(1)
    assert data.train.y is not None
    assert data.train.y.tolist() == [first[i] for i in (row % 3).tolist()]
    assert data.label_names == names


def test_text_labels_of_all_splits_are_numbered_together(tmp_path):
    path = npz(tmp_path, x_train=X, x_test=OTHER, y_train=WORDS[CODES], y_test=np.array(["2", "5"] * 3))
    data = load(Npz(path=path, y="y"))
    assert data.label_names == ("1", "2", "5", "10")
    assert data.test.y is not None
    assert data.test.y.tolist() == [1, 2] * 3


BAD_LABELS = {
    "fractions": (CODES + 0.5, "expected integers; got 0.5 in row 0"),
    "NaN": (np.where(CODES == 1, np.nan, 0.0), "expected integers; got nan in row 1"),
    "two ones": (np.ones((30, 3)), r"expected one for each of 30 rows; got shape \(30, 3\)"),
}


@pytest.mark.parametrize("name", BAD_LABELS)
def test_labels_that_are_none_are_refused(tmp_path, name):
    y, said = BAD_LABELS[name]
    refused(said, load, Npz(path=npz(tmp_path, x=X, y=y), y="y"))


def test_natural_order():
    words = ["b", "a10", "a9", "a", "10", "-3", "2", "a1b2", "", "²"]
    assert sorted(words, key=natural) == ["-3", "2", "10", "", "a", "a1b2", "a9", "a10", "b", "²"]


# ---------------------------------------------------------------------- shapes

PICTURES = RNG.randint(0, 256, (30, 4, 6, 3)).astype(np.uint8)


@pytest.mark.parametrize("shape", [(3, 4, 6), (3, 6, 4), (6, 4, 3)])
def test_a_shape_that_would_scramble_rows_is_refused(tmp_path, shape):
    """FAULTS 70."""
    said = r"axes in another order and would scramble every row. Save x.transpose\(0, "
    refused(said, load, Npy(path=npy(tmp_path / "x.npy", PICTURES), shape=shape))


@pytest.mark.parametrize("shape", [(72,), (4, 18), (1, 4, 6, 3), (24, 3), (2, 2, 6, 3)])
def test_a_shape_that_keeps_the_order_of_values_is_accepted(tmp_path, shape):
    assert load(Npy(path=npy(tmp_path / "x.npy", PICTURES), shape=shape)).shape == shape


def test_the_transpose_that_is_named_is_the_one_to_take(tmp_path):
    with pytest.raises(Exception, match=r"transpose\(0, 3, 1, 2\), which is \[3, 4, 6\]"):
        load(Npy(path=npy(tmp_path / "x.npy", PICTURES), shape=(3, 4, 6)))
    squares = PICTURES[:, :, :4]
    with pytest.raises(Exception, match=r"transpose\(0, 3, 1, 2\), which is \[3, 4, 4\]"):
        load(Npy(path=npy(tmp_path / "x.npy", squares), shape=(3, 4, 4)))


# ---------------------------------------------------------------------- images


def deep_png(path: Path, channels: int) -> None:
    """Write a PNG with 16 bits a sample."""
    values = RNG.randint(0, 2**16, (4, 4, channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    head = struct.pack(">IIBBBBB", 4, 4, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(b)) + t + b + struct.pack(">I", zlib.crc32(t + b)) for t, b in parts)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def deep_ppm(path: Path) -> None:
    """Write a PPM with samples up to 1023."""
    path.write_bytes(b"P6\n4 4\n1023\n" + RNG.randint(0, 1024, (4, 4, 3)).astype(">u2").tobytes())


def colour(seed: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (4, 4, 3)).astype(np.uint8))


def clear(mode: str) -> Callable[[Path], None]:
    """Return a writer of a picture whose upper half is transparent and red."""

    def write(path: Path) -> None:
        picture = colour(7)
        picture.paste((255, 0, 0), (0, 0, 4, 2))
        picture.putalpha(Image.fromarray(np.repeat([0, 0, 255, 255], 4).reshape(4, 4).astype(np.uint8)))
        picture.convert(mode).save(path)

    return write


def paged(path: Path) -> None:
    colour(8).save(path, save_all=True, append_images=[colour(9)])


ODD: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "16 bits, grey": ("a.png", lambda path: deep_png(path, 1), r"a.png \(more than 8 bits a channel"),
    "16 bits, grey and alpha": ("a.png", lambda path: deep_png(path, 2), r"a.png \(more than 8 bits a channel"),
    "16 bits, colour": ("a.png", lambda path: deep_png(path, 3), r"a.png \(more than 8 bits a channel"),
    "16 bits, colour and alpha": ("a.png", lambda path: deep_png(path, 4), r"a.png \(more than 8 bits a channel"),
    "10 bits": ("a.ppm", deep_ppm, r"a.ppm \(more than 8 bits a channel"),
    "alpha": ("a.png", clear("RGBA"), "1 of 21 images have transparent pixels: composited on white"),
    "grey and alpha": ("a.png", clear("LA"), "1 of 21 images have transparent pixels: composited on white"),
    "pages": ("a.tif", paged, "1 of 21 images have more than one page or frame: the first is read"),
    "frames": ("a.gif", paged, "1 of 21 images have more than one page or frame: the first is read"),
    "CMYK": ("a.jpg", lambda path: colour(8).convert("CMYK").save(path), "1 of 21 images are in CMYK: converted"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_image_that_is_not_read_whole_is_named(tmp_path, name):
    """FAULTS 71."""
    for i in range(20):
        colour(i).save(tmp_path / f"{i}.png")
    file, write, said = ODD[name]
    write(tmp_path / file)
    notes = " ".join(load(Images(path=str(tmp_path))).notes)
    assert re.search(said, notes), notes


def test_plain_images_have_no_remark(tmp_path):
    for i in range(20):
        colour(i).convert(["RGB", "P", "L", "RGBA"][i % 4]).save(tmp_path / f"{i}.png")
    assert load(Images(path=str(tmp_path))).notes == ()


@pytest.mark.parametrize(("background", "level"), [("white", 1.0), ("black", 0.0)])
def test_transparent_pixels_show_the_background(tmp_path, background, level):
    """FAULTS 71."""
    for i in range(20):
        clear("RGBA")(tmp_path / f"{i}.png")
        colour(i).save(tmp_path / f"{i + 20}.png")
    data = load(Images(path=str(tmp_path), background=background))
    clearest = torch.cat([split.x for split in data.splits])[:, :, :2].flatten(1)
    assert int((clearest == level).all(1).sum()) == 20


def test_labels_of_folders_are_in_natural_order(tmp_path):
    for word in ("1", "10", "2"):
        (tmp_path / word).mkdir()
        for i in range(5):
            colour(i + 10 * int(word)).save(tmp_path / word / f"{i}.png")
    assert load(Images(path=str(tmp_path))).label_names == ("1", "2", "10")


# ---------------------------------------------------------------------- bytes


def test_masks_of_bytes_under_the_unit_scale_are_named(tmp_path):
    masks = RNG.randint(0, 2, (30, 4)).astype(np.uint8)
    said = 'all values are 0 or 1, and scale = "unit" divides by 255: use scale = "raw"'
    assert said in load(Npy(path=npy(tmp_path / "x.npy", masks), scale="unit")).notes
    assert said not in load(Npy(path=npy(tmp_path / "x.npy", masks * 255), scale="unit")).notes
    assert load(Npy(path=npy(tmp_path / "x.npy", masks > 0), scale="unit")).train.x.max() == 1
