"""A first declaration of a table, guessed from the rows at its beginning."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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
SKEWED = 2.0
SEPARATORS = (",", ";", "\t", "|")
NA = ("", "NA", "nan")
Found = dict[str, Any]


@dataclass(frozen=True)
class Guess:
    """What a table seems to hold.

    Arguments:
        declaration: a whole one, as nested tables.
        left_out: columns that are not declared, each with the reason.
        rows: how many were looked at.
    """

    declaration: Found
    left_out: Mapping[str, str]
    rows: int


def guess(path: str, data_dir: Path | None = None, label: str | None = None) -> Guess:
    """Look at the first rows of a table.

    Arguments:
        path: of a CSV file, or of a Parquet file (`.parquet`, `.pq`).
        data_dir: where to look for it first.
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
    columns: dict[str, Found] = {}
    left: dict[str, str] = {}
    for name in cells:
        if name != label:
            kind = column_of(cells[name])
            if isinstance(kind, str):
                left[str(name)] = kind
            else:
                columns[str(name)] = kind
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
    """The candidate that the first line has most of."""
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
    """What a column of text seems to hold; or why it is left out."""
    given = cells.dropna()
    words = [str(word) for word in given.unique()]
    if len(words) < 2:
        return "one value alone" if words else "no value"
    kind = _two(words) if len(words) == 2 else _numbers(given) or _levels(words, len(given))
    return kind if isinstance(kind, str) or len(given) == len(cells) else {**kind, "missing": "mask"}


def _two(words: Sequence[str]) -> Found:
    """One of two words."""
    plain = [next((code for code, known in enumerate(TRUTH) if word in known), None) for word in words]
    return {"type": "binary"} if set(plain) == {0, 1} else {"type": "binary", "values": _in_order(words)}


def _numbers(given: Cells) -> Found | str | None:
    """A count or a quantity; None of what is no number."""
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
    """Whether a positive quantity is far less skewed on a logarithmic scale."""
    if values.min() <= 0:
        return False
    return _skewness(values) > SKEWED > 2 * abs(_skewness(np.log(values)))


def _skewness(values: Any) -> float:
    centred = values - values.mean()
    return float((centred**3).mean() / max((centred**2).mean() ** 1.5, 1e-300))


def _levels(words: Sequence[str], rows: int) -> Found | str:
    """One of several words; or why not."""
    if len(words) > min(MAX_LEVELS, max(3, rows // 2)):
        return f"{len(words)} different words"
    return {"type": "categorical", "levels": _in_order(words)}


def _in_order(words: Sequence[str]) -> list[str] | list[int]:
    """Sorted; as integers where all are written as such."""
    whole = all(re.fullmatch(r"0|-?[1-9]\d{0,17}", word) for word in words)
    return sorted(map(int, words)) if whole else sorted(words)
