"""Guess of a table's declaration (column types, transforms, likelihoods) from its first rows."""

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
from pvae.data.rows.labels import natural
from pvae.data.tables.cells import listed, shown, word_of
from pvae.data.tables.readers import TextTable, opened_parquet
from pvae.errors import DataError, near

if TYPE_CHECKING:
    import pandas

    from pvae.data.tables.cells import Cells

GUESSED_ROWS = 10_000
"""Largest number of rows that a guess reads."""
MAX_LEVELS = 100
LARGEST_GUESSED_COUNT = 10_000
"""Largest value of a column that is guessed to be a count; integers above it are declared continuous."""
LARGE_SKEWNESS = 2.0
SEPARATORS = (",", ";", "\t", "|")
NA = ("", "NA", "nan")
Found = dict[str, Any]


@dataclass(frozen=True)
class Guess:
    """Guessed declaration of an experiment on a table.

    Arguments:
        declaration: complete declaration of an experiment, as nested tables.
        left_out: reason why a column is not declared, by the column's name.
        rows: number of rows read for the guess.
    """

    declaration: Found
    left_out: Mapping[str, str]
    rows: int


def guess(path: str, data_dir: Path | None = None, label: str | None = None) -> Guess:
    """Return a declaration of an experiment on a table, guessed from the table's first rows.

    Arguments:
        path: path of a CSV file, or of a Parquet file (`.parquet`, `.pq`).
        data_dir: folder in which the file is looked for first.
        label: name of the label column, or None.

    Raises:
        DataError: the file is not a table, or none of its columns can be modelled.
    """
    where = located(path, data_dir)
    found: Found = {"source": "csv", "path": path}
    if where.suffix.lower() in (".parquet", ".pq"):
        found["source"] = "parquet"
        cells = _parquet_cells(where)
    else:
        with where.open("rb") as file:
            line = file.readline(2**20)
        separator = max(SEPARATORS, key=lambda separator: line.count(separator.encode()))  # the most frequent one
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


def _text_cells(path: Path, separator: str) -> pandas.DataFrame:
    import pandas

    table = TextTable(path, separator)
    parts: list[pandas.DataFrame] = []
    for piece in table.pieces():
        parts.append(table.frame(piece, NA, dict.fromkeys(table.names, "str")))
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
    """Return the guessed declaration of a column of text cells, or the reason why the column is left out."""
    given = cells.dropna()
    words = [str(word) for word in given.unique()]
    if len(words) < 2:
        return "one value alone" if words else "no value"
    kind: Found | str | None
    if len(words) == 2:
        plain = [next((code for code, known in enumerate(TRUTH) if word in known), None) for word in words]
        kind = {"type": "binary"} if set(plain) == {0, 1} else {"type": "binary", "values": _in_order(words)}
    elif (kind := _numbers(given)) is None:
        if len(words) > min(MAX_LEVELS, max(3, len(given) // 2)):
            return f"{len(words)} different words"
        kind = {"type": "categorical", "levels": _in_order(words)}
    return kind if isinstance(kind, str) or len(given) == len(cells) else {**kind, "missing": "mask"}


def _numbers(given: Cells) -> Found | str | None:
    """Return the declaration of a numeric column (count or continuous), or the reason to leave it out.

    The result is None if some cell is not a finite number.
    """
    import pandas

    values = pandas.to_numeric(given, errors="coerce").to_numpy(np.float64)
    if not np.isfinite(values).all():
        return None
    if (values % 1 != 0).any() or values.min() < 0:
        skewed = values.min() > 0 and bool(skew(values) > LARGE_SKEWNESS > 2 * abs(skew(np.log(values))))
        return {"type": "continuous", **({"transform": "log"} if skewed else {})}
    if len(values) > 2 and (np.diff(values) == 1).all():
        return "a number for every row"
    if values.max() > LARGEST_GUESSED_COUNT:
        return {"type": "continuous", "transform": "log1p"}
    spread = values.var() > 1.5 * values.mean()
    return {"type": "count", **({"likelihood": "negative_binomial"} if spread else {})}


def _in_order(words: Sequence[str]) -> list[str] | list[int]:
    """Return the words sorted, as integers if all are written as integers."""
    whole = all(re.fullmatch(r"0|-?[1-9]\d{0,17}", word) for word in words)
    return sorted(map(int, words)) if whole else sorted(words, key=natural)
