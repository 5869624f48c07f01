"""A first declaration of a table, guessed from the rows at its beginning."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import skew

from pvae.data.rows.columns import TRUTH
from pvae.data.rows.files import located
from pvae.data.tables.cells import listed, shown, word_of
from pvae.data.tables.delimited import read_header, read_pieces, text_frame
from pvae.data.tables.parquet import opened_parquet
from pvae.errors import DataError, near

if TYPE_CHECKING:
    import pandas

    from pvae.data.tables.cells import Cells

GUESSED_ROWS = 10_000
"""Rows that a guess reads."""
MAX_LEVELS = 100
LARGEST_GUESSED_COUNT = 10_000
"""Above it a whole number is taken for a quantity, not a count."""
LARGE_SKEWNESS = 2.0
SEPARATORS = (",", ";", "\t", "|")
NA = ("", "NA", "nan")
Found = dict[str, Any]


@dataclass(frozen=True)
class Guess:
    """A first declaration of a table.

    Arguments:
        declaration: the whole declaration, as nested tables.
        left_out: columns that are not declared, each with the reason.
        rows: number of rows that the guess read.
    """

    declaration: Found
    left_out: Mapping[str, str]
    rows: int


def guess(path: str, data_dir: Path | None = None, label: str | None = None) -> Guess:
    """Guess the declaration of a table from its first rows.

    Arguments:
        path: of a CSV file, or of a Parquet file (`.parquet`, `.pq`).
        data_dir: the folder where it is sought first.
        label: the column that is the label, if there is one.

    Raises:
        DataError: it is no table, or none of its columns can be modelled.
    """
    where = located(path, data_dir)
    found: Found = {"source": "csv", "path": path}
    if where.suffix.lower() in (".parquet", ".pq"):
        found["source"] = "parquet"
        cells = _parquet_cells(where)
    else:
        separator = _separator(where)
        found |= {"separator": separator} if separator != "," else {}
        cells = _text_cells(where, separator)
    if label is not None:
        if label not in cells:
            raise DataError(f"{path}: expected a column {shown(label)}; got none{near(label, map(str, cells))}.")
        found["label"] = label
    kinds = {str(name): column_of(cells[name]) for name in cells if name != label}
    columns = {name: kind for name, kind in kinds.items() if not isinstance(kind, str)}
    left = {name: kind for name, kind in kinds.items() if isinstance(kind, str)}
    if not columns:
        raise DataError(f"{path}: expected a column that varies; got {listed(list(left))}.")
    declaration = {
        "name": where.stem or "table",
        "data": {**found, "columns": columns},
        "latents": {"z": {"dim": max(1, min(10, len(columns) // 2))}},
        "decoder": {"likelihood": {"kind": "columns"}},
    }
    return Guess(declaration, left, len(cells))


def _separator(path: Path) -> str:
    """Return the candidate that occurs most often in the first line."""
    with path.open("rb") as file:
        line = file.readline(2**20)
    return max(SEPARATORS, key=lambda separator: line.count(separator.encode()))


def _text_cells(path: Path, separator: str) -> pandas.DataFrame:
    import pandas

    header = read_header(path, separator)
    parts: list[pandas.DataFrame] = []
    for piece in read_pieces(path, header, separator):
        parts.append(text_frame(piece, header, separator, NA, dict.fromkeys(header.names, "str")))
        if sum(map(len, parts)) >= GUESSED_ROWS:
            break
    if not parts:
        raise DataError(f"{path}: expected rows below the names of the columns; got none.")
    return pandas.concat(parts).head(GUESSED_ROWS)


def _parquet_cells(path: Path) -> pandas.DataFrame:
    import pandas

    batches: Iterator[Any] = opened_parquet(path).iter_batches(GUESSED_ROWS)
    frame = next((batch.to_pandas() for batch in batches), pandas.DataFrame())
    return frame.apply(lambda cells: cells.astype(object).map(word_of, na_action="ignore"))


def column_of(cells: Cells) -> Found | str:
    """Return the declaration of a column of text, or the reason why it is left out."""
    given = cells.dropna()
    words = [str(word) for word in given.unique()]
    if len(words) < 2:
        return "one value alone" if words else "no value"
    kind = _two(words) if len(words) == 2 else _numbers(given) or _levels(words, len(given))
    return kind if isinstance(kind, str) or len(given) == len(cells) else {**kind, "missing": "mask"}


def _two(words: Sequence[str]) -> Found:
    """Declare a column of two words."""
    plain = [next((code for code, known in enumerate(TRUTH) if word in known), None) for word in words]
    return {"type": "binary"} if set(plain) == {0, 1} else {"type": "binary", "values": _in_order(words)}


def _numbers(given: Cells) -> Found | str | None:
    """Declare a count or a quantity, or return the reason against it; None where some word is no number."""
    import pandas

    values = pandas.to_numeric(given, errors="coerce").to_numpy(np.float64)
    if not np.isfinite(values).all():
        return None
    if (values % 1 != 0).any() or values.min() < 0:
        return {"type": "continuous", **({"transform": "log"} if _wants_logarithm(values) else {})}
    if len(values) > 2 and (np.diff(values) == 1).all():
        return "a number for every row"
    if values.max() > LARGEST_GUESSED_COUNT:
        return {"type": "continuous", "transform": "log1p"}
    spread = values.var() > 1.5 * values.mean()
    return {"type": "count", **({"likelihood": "negative_binomial"} if spread else {})}


def _wants_logarithm(values: Any) -> bool:
    """Return True for a positive quantity that is far less skewed on a logarithmic scale."""
    return values.min() > 0 and bool(skew(values) > LARGE_SKEWNESS > 2 * abs(skew(np.log(values))))


def _levels(words: Sequence[str], rows: int) -> Found | str:
    """Declare a column of several words, or return the reason against it."""
    if len(words) > min(MAX_LEVELS, max(3, rows // 2)):
        return f"{len(words)} different words"
    return {"type": "categorical", "levels": _in_order(words)}


def _in_order(words: Sequence[str]) -> list[str] | list[int]:
    """Sort words; as integers where all are written as such."""
    whole = all(re.fullmatch(r"0|-?[1-9]\d{0,17}", word) for word in words)
    return sorted(map(int, words)) if whole else sorted(words)
