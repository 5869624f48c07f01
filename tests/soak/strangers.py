"""Thirty files as strangers have them, each with one oddity, and what pvae says: a page in Markdown.

python -m tests.soak.strangers
"""

import gzip
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas
import scipy.io
from PIL import Image
from scipy import sparse

from pvae.data import Data, load
from pvae.data.tables.guess import guess
from pvae.errors import PvaeError
from tests.data.writers import h5ad, hdf5, idx_bytes, matlab

Writer = Callable[[Path], object]
RNG = np.random.RandomState(0)
N = 40
X = RNG.standard_normal((N, 4)).astype(np.float32)
Y = np.arange(N) % 3
PIXELS = RNG.randint(0, 256, (N, 6, 5, 3)).astype(np.uint8)
COUNTS = RNG.poisson(0.5, (N, 7)).astype(np.float32)
CELLS = [f"{value:.2f}" for value in X[:, 0]]
REAL = {"type": "continuous"}
COLUMNS = {"columns": {"a": REAL, "b": REAL}}
GUESS = {"source": "guess"}
"""In place of a declaration: take the one that `pvae columns` proposes."""


@dataclass(frozen=True)
class Stranger:
    """A file, what is odd about it, its declaration without the path, and the function that writes it."""

    name: str
    oddity: str
    declared: Mapping[str, Any]
    write: Writer


def table(*columns: list[str], head: str = "a,b", separator: str = ",", encoding: str = "utf-8") -> Writer:
    """Writer of a text table."""
    lines = [*([head] if head else []), *(separator.join(row) for row in zip(*columns, strict=True))]
    return lambda path: path.write_bytes(("\n".join(lines) + "\n").encode(encoding))


def lines_of(*lines: str) -> Writer:
    """Writer of lines as they stand."""
    return lambda path: path.write_text("\n".join(lines) + "\n")


def zipped(write: Writer) -> Writer:
    """Writer of the same file under gzip."""

    def written(path: Path) -> None:
        write(path)
        path.write_bytes(gzip.compress(path.read_bytes(), mtime=0))

    return written


def cut(write: Writer) -> Writer:
    """Writer of the first two thirds of a file."""

    def written(path: Path) -> None:
        write(path)
        content = path.read_bytes()
        path.write_bytes(content[: 2 * len(content) // 3])

    return written


def linked(path: Path) -> None:
    """Write an HDF5 file whose rows are in another file."""
    with h5py.File(path, "w") as file:
        file["x"] = h5py.ExternalLink("secret.h5", "x")
        file["note"] = np.arange(3)


def cells(path: Path, *, labels: Any = None) -> None:
    """Write an AnnData file with raw counts and an embedding beside X."""
    words = ["B", "NK", "T"]
    kinds = pandas.Categorical([words[i] if i >= 0 else None for i in (Y if labels is None else labels)], words)
    h5ad(path, sparse.csr_array(COUNTS), pandas.DataFrame({"type": kinds}))
    with h5py.File(path, "r+") as file:
        file["obsm/X_umap"], file["raw/X"] = X[:, :2], COUNTS


def pictures(path: Path, odd: Callable[[Path], object]) -> None:
    """Write a folder of twelve pictures, the last of which is odd."""
    path.mkdir()
    for i in range(11):
        Image.fromarray(PIXELS[i]).save(path / f"{i:02}.png")
    odd(path)


def ghost(path: Path) -> None:
    """Write a picture that is transparent in its upper half."""
    alpha = np.repeat([0, 255], 15).reshape(6, 5).astype(np.uint8)
    Image.fromarray(np.dstack([PIXELS[11], alpha])).save(path / "11.png")


def scan(path: Path) -> None:
    """Write a picture of 16 bits, and a text."""
    Image.fromarray(PIXELS[0, ..., 0].astype(np.uint16) * 200).save(path / "11.tif")
    (path / "README.txt").write_text("scanned in May")


def written(save: Callable[..., None], **arrays: Any) -> bytes:
    """Return what a function saves, whatever name the file is to have."""
    save(stream := BytesIO(), **arrays)
    return stream.getvalue()


def spreadsheet(path: Path) -> None:
    """Write a zip archive as spreadsheet programs do."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/workbook.xml", "<workbook/>")


STRANGERS = (
    Stranger("medical.npz", "splits and labels (n, 1) in MedMNIST's names; no labels asked for", {"source": "npz"},
        lambda path: path.write_bytes(written(np.savez, **{
            f"{s}_{k}": v[:n] for s, n in (("train", 40), ("val", 8), ("test", 9))
            for k, v in (("images", PIXELS), ("labels", Y[:, None]))}))),
    Stranger("onehot.npz", "labels are one-hot floats", {"source": "npz", "y": "y"},
        lambda path: np.savez_compressed(path, x=X, y=np.eye(3)[Y])),
    Stranger("objects.npz", "the array holds Python objects, which could run code", {"source": "npz"},
        lambda path: np.savez(path, x=np.array([[1], [2, 3]], dtype=object), allow_pickle=True)),
    Stranger("complex.npz", "complex numbers, and no usual name", {"source": "npz", "x": "signal"},
        lambda path: np.savez(path, signal=X + 1j)),
    Stranger("columns.npy", "Fortran order, to be streamed", {"source": "npy", "stream": True},
        lambda path: np.save(path, np.asfortranarray(X))),
    Stranger("hole.npy", "one NaN", {"source": "npy"},
        lambda path: np.save(path, np.where(np.arange(4 * N).reshape(N, 4) == 77, np.nan, X))),
    Stranger("pixels.npy", "pixels 0..255 as int64, to be scaled to 0..1", {"source": "npy", "scale": "unit"},
        lambda path: np.save(path, PIXELS.astype(np.int64))),
    Stranger("ink.npy", "bytes that only hold 0 and 1, to be scaled to 0..1", {"source": "npy", "scale": "unit"},
        lambda path: np.save(path, PIXELS // 128)),
    Stranger("nhwc.npy", "channels last, where the shape says first", {"source": "npy", "shape": [3, 6, 5]},
        lambda path: np.save(path, PIXELS)),
    Stranger("archive.npy", "an npz archive, renamed", {"source": "npy"},
        lambda path: path.write_bytes(written(np.savez, x=X))),
    Stranger("digits.idx.gz", "a download that broke off", {"source": "idx"},
        cut(lambda path: path.write_bytes(gzip.compress(idx_bytes(PIXELS[..., 0]), mtime=0)))),
    Stranger("linked.h5", "the rows are a link into another file", {"source": "hdf5"}, linked),
    Stranger("words.h5", "words in place of numbers", {"source": "hdf5"},
        lambda path: hdf5(path, x=np.array([b"ant", b"bee"] * 20))),
    Stranger("lab.mat", "MATLAB 5: one datum a column, read as one a row", {"source": "mat", "y": "y"},
        lambda path: scipy.io.savemat(path, {"X": X.T, "y": Y})),
    Stranger("struct.mat", "MATLAB 5: the rows are in a struct", {"source": "mat", "x": "s"},
        lambda path: scipy.io.savemat(path, {"s": {"x": X}})),
    Stranger("old.mat", "MATLAB 4, with a second matrix", {"source": "mat"},
        lambda path: scipy.io.savemat(path, {"X": X, "notes": X[:2]}, format="4")),
    Stranger("new.mat", "MATLAB 7.3 (HDF5): pictures along the last axis", {"source": "mat", "rows": "last"},
        lambda path: matlab(path, images=np.moveaxis(PIXELS, 0, -1))),
    Stranger("cells.h5ad", "raw counts and an embedding beside X", {"source": "h5ad", "labels": "type"}, cells),
    Stranger("holes.h5ad", "a cell without a type", {"source": "h5ad", "labels": "type"},
        lambda path: cells(path, labels=np.where(Y == 2, -1, Y))),
    Stranger("short.h5ad", "a copy that broke off", {"source": "h5ad"}, cut(cells)),
    Stranger("german.csv", "decimal commas, read as decimal points", {"source": "csv", "separator": ";", **COLUMNS},
        table([c.replace(".", ",") for c in CELLS], CELLS, head="a;b", separator=";")),
    Stranger("windows.csv", "words in cp1252, read as UTF-8", {"source": "csv", "columns": {"a": REAL}},
        table(CELLS, ["Köln", "Zürich"] * 20, encoding="cp1252")),
    Stranger("headless.csv", "no line of names", {"source": "csv", **COLUMNS}, table(CELLS, CELLS[::-1], head="")),
    Stranger("ragged.csv.gz", "a row with a cell too many, under gzip", {"source": "csv", **COLUMNS},
        zipped(lines_of("a,b", *(f"{c},{c}" + ",9" * (i == 17) for i, c in enumerate(CELLS))))),
    Stranger("null.csv", "NULL among numbers, and `pvae columns`", GUESS,
        table(["NULL", *CELLS[1:]], [*"uv"] * 20)),
    Stranger("prices.csv", "euros, percents and European dates, and `pvae columns`", GUESS,
        table([f"€{abs(float(c)):.2f}" for c in CELLS], [f"{i}%" for i in range(N)], CELLS,
              [f"{1 + i % 28:02}.03.2024" for i in range(N)], head="price,discount,change,day")),
    Stranger("sheet.csv", "an Excel workbook, renamed", {"source": "csv", **COLUMNS}, spreadsheet),
    Stranger("bank.parquet", "decimals, numbers as text and lists, and `pvae columns`", GUESS,
        lambda path: pandas.DataFrame(
            {"a": [Decimal(c) for c in CELLS], "b": CELLS, "c": [[1.0]] * N}).to_parquet(path)),
    Stranger("sprites", "a folder with a picture that is half transparent", {"source": "images"},
        lambda path: pictures(path, ghost)),
    Stranger("scans", "a folder with a TIFF of 16 bits and a text", {"source": "images", "mode": "L"},
        lambda path: pictures(path, scan)),
)  # fmt: skip


def said(stranger: Stranger, folder: Path) -> tuple[str, str]:
    """Write a file, read it as it is declared, and return what became of it: "read", "refused"; and what pvae says."""
    path = folder / stranger.name
    stranger.write(path)
    words: list[str] = []
    try:
        if stranger.declared is GUESS:
            found = guess(stranger.name, folder)
            words += [f"left out: {name}, {why}" for name, why in found.left_out.items()]
            declared = found.declaration["data"]
            words.append(f"proposed: {json.dumps({k: v for k, v in declared.items() if k not in ('source', 'path')})}")
        else:
            declared = {"path": stranger.name, **stranger.declared}
        data = load(Data.parse(dict(declared)), data_dir=folder)
    except PvaeError as error:
        return "refused", f"{error} (exit {error.exit_code})"
    read = f"read: {len(data.train)} + {len(data.validation)} + {len(data.test)} rows of {list(data.shape)}"
    return "read", "; ".join([read, *words, *data.notes])


def rows(folder: Path) -> Iterator[tuple[Stranger, str, str]]:
    """Every file, what became of it, and what pvae says; an untyped error is raised as it comes."""
    for stranger in STRANGERS:
        outcome, words = said(stranger, folder)
        yield stranger, outcome, words.replace(f"{folder}/", "")


def main() -> None:
    """Print the page."""
    print("| file | oddity | what pvae says |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, suppress(BrokenPipeError):
        for stranger, _, words in rows(Path(folder)):
            print(f"| {stranger.name} | {stranger.oddity} | {' '.join(words.split()).replace('|', chr(92) + '|')} |")


if __name__ == "__main__":
    main()
