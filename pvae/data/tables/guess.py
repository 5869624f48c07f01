"""Guess of a table's declaration (column types, transforms, likelihoods) from its first rows."""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from scipy.stats import skew

from pvae.component import from_table
from pvae.data.rows import files, prepare
from pvae.data.rows.columns import TRUTH, Column
from pvae.data.rows.rows import Part, natural, tenths
from pvae.data.tables.cells import NA, SPELLINGS, Cells, Spelling, listed, moments, numbers_of, shown, word_of
from pvae.data.tables.readers import TextTable, opened_parquet, opened_text
from pvae.errors import DataError, near, refuse
from pvae.util import Record

GUESSED_ROWS = 10_000
"""Largest number of rows that a guess reads."""
MAX_LEVELS = 100
LARGEST_GUESSED_COUNT = 10_000
"""Largest value of a column that is guessed to be a count; integers above it are declared continuous."""
LARGE_SKEWNESS = 2.0
MISSING_WORDS = (
    "NULL", "Null", "null", "N/A", "n/a", "#N/A", "NaN", "na", "n.a.", "None", "<NA>", "NaT", "-", "--", "?", ".",
    "missing",
)  # fmt: skip
"""Words that are missing values where all other cells of their column are numbers or dates."""
NEVER_LEVELS = ("NULL", "null", "N/A", "n/a", "#N/A", "NaN", "<NA>")
"""Words that are missing values in any column."""
UNITS = re.compile(r"[+-]?[$€£¥]\s?[\d.,]+|[+-]?[\d.,]+\s?[%$€£¥‰]")
"""Numbers with a percent sign or the sign of a currency, which no spelling of numbers reads."""
SEPARATORS = (",", ";", "\t", "|")
NAMING = ("different words", "a number for every row")
"""Ends of the reasons to leave out a column whose cells name the rows, if each has another."""
Found = dict[str, Any]


class Guess(Record):
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
    where = files.located(path, data_dir)
    found: Found = {"source": "csv", "path": path}
    left: dict[str, str] = {}
    if where.suffix.lower() in (".parquet", ".pq"):
        found["source"] = "parquet"
        cells, whole = _parquet_cells(where, left)
    else:
        layout = _layout(where)
        found |= {name: value for name, value in layout.items() if value != CSV_DEFAULTS[name]}
        cells, whole = _text_cells(TextTable(where, **layout))
    if label is not None:
        refuse(label not in cells, f"{path}: expected a column {shown(label)}; got none{near(label, map(str, cells))}.")
        found["label"] = label
    given = {str(name): [str(word) for word in cells[name].dropna().unique()] for name in cells if name != label}
    spelling = _spelling(list(given.values()), found.get("separator") == ";")
    found |= {"decimal": spelling.decimal} if spelling.decimal != "." else {}
    found |= {"thousands": spelling.thousands} if spelling.thousands else {}
    if na := _missing_words(given.values(), spelling):
        found["na"] = [*NA, *na]
        cells = cells.where(~cells.isin(na))
    train = tenths(len(cells), ("validation", "test"), 0)["train"] if whole and len(cells) > 2 else None
    kinds = {str(name): column_of(cells[name], spelling, train) for name in cells if name != label}
    columns = {name: kind for name, kind in kinds.items() if not isinstance(kind, str)}
    left |= {name: kind for name, kind in kinds.items() if isinstance(kind, str)}
    refuse(not columns, f"{path}: expected a column that varies; got {listed(list(left))}.")
    if names := [n for n in kinds if left.get(n, "").endswith(NAMING) and cells[n].nunique() == len(cells) > 1]:
        found["id"], left[names[0]] = names[0], "another word in every row: taken as their names, data.id"
    declaration = {
        "name": where.name.split(".")[0] or "table",
        "data": {**found, "columns": columns},
        "latents": {"z": {"dim": max(1, min(10, len(columns) // 2))}},
        "decoder": {"likelihood": {"kind": "columns"}},
        "train": {"epochs": max(20, min(400, 300_000 // len(cells)))},  # 3000 steps of 100 rows
    }
    return Guess(declaration, left, len(cells))


CSV_DEFAULTS: Found = {"separator": ",", "encoding": "utf-8", "header": True}


def _layout(path: Path) -> Found:
    """Return the encoding, the separator and whether there is a header of a text table, from its first lines."""
    for encoding in ("utf-8", "utf-16", "cp1252", "latin-1"):
        try:
            with opened_text(path, encoding) as file:
                start = file.read(2**20)
                start[: start.rfind(b"\n") + 1].decode()
        except (DataError, UnicodeDecodeError):
            continue
        if encoding != "utf-16" or b"\n" in start:
            break
    line = start.splitlines()[0] if start.strip() else b""
    separator = max(SEPARATORS, key=lambda mark: line.count(mark.encode()))  # the most frequent one
    names = next(csv.reader([line.decode(errors="replace")], delimiter=separator), [])
    numbers = [any(spelling.number(name) is not None for spelling in SPELLINGS) for name in names]
    return {"separator": separator, "encoding": encoding, "header": not (numbers and any(numbers))}


def _text_cells(table: TextTable) -> tuple[pandas.DataFrame, bool]:
    parts: list[pandas.DataFrame] = []
    for piece in table.pieces():
        parts.append(table.frame(piece, NA, dict.fromkeys(table.names, "str")))
        if sum(map(len, parts)) > GUESSED_ROWS:
            break
    refuse(not parts, f"{table.path}: expected rows below the names of the columns; got none.")
    cells = pandas.concat(parts)
    return cells.head(GUESSED_ROWS), len(cells) <= GUESSED_ROWS


def _parquet_cells(path: Path, left: dict[str, str]) -> tuple[pandas.DataFrame, bool]:
    """Return the first rows as text, and True if they are all; columns of lists, records or bytes go to `left`."""
    file = opened_parquet(path)
    from pyarrow import types

    strange = (types.is_nested, types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    odd = [field for field in file.schema_arrow if any(test(field.type) for test in strange)]
    left |= {field.name: f"{field.type}, neither numbers nor words" for field in odd}
    names = [name for name in file.schema_arrow.names if name not in left]
    batches: Iterator[Any] = file.iter_batches(GUESSED_ROWS, columns=names)
    frame = next((batch.to_pandas() for batch in batches), pandas.DataFrame())
    words = frame.apply(lambda cells: cells.astype(object).map(word_of, na_action="ignore"))
    return words, file.metadata.num_rows <= GUESSED_ROWS


def _spelling(columns: Sequence[Sequence[str]], german: bool) -> Spelling:
    """Return the spelling under which most columns are numbers; a separator `;` suggests a decimal comma."""
    tried = sorted(SPELLINGS, key=lambda s: (s.decimal == ",") != german)
    present = [rest for words in columns if (rest := [word for word in words if word not in MISSING_WORDS])]
    return max(tried, key=lambda s: sum(all(s.number(word) is not None for word in words) for words in present))


def _missing_words(columns: Iterable[Sequence[str]], spelling: Spelling) -> list[str]:
    """Return the words of the table that mean a missing value, in order of appearance."""
    found: dict[str, None] = {}
    for words in columns:
        odd = [word for word in words if word.strip() in MISSING_WORDS]
        rest = [word for word in words if word.strip() not in MISSING_WORDS]
        plain = len(rest) > 1 and (all(spelling.number(w) is not None for w in rest) or bool(date_forms(rest)))
        found |= dict.fromkeys(word.strip() for word in odd if plain or word.strip() in NEVER_LEVELS)
    return list(found)


_DAYS, _HOURS = ("%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y"), ("", " %H:%M", " %H:%M:%S")
DATE_FORMS = tuple(f"{day}{hour}" for hour in _HOURS for day in _DAYS)


def date_forms(words: Sequence[str]) -> list[str | None]:
    """Return the formats in which all words are dates: None for ISO 8601 or a duration, else codes of `strftime`.

    Of several formats in which they are the same dates, the first is returned.
    """
    cells = pandas.Series(list(words), dtype=object)
    if not cells.map(lambda word: bool(re.search(r"\d[-.:/]\d", word))).all():
        return []
    found: dict[str | None, prepare.Floats] = {}
    for form in (None, *DATE_FORMS):
        seconds, _ = moments(cells, form)
        if not np.isnan(seconds).any() and not any(np.array_equal(seconds, other) for other in found.values()):
            found[form] = seconds
    return list(found)


def column_of(cells: Cells, spelling: Spelling = SPELLINGS[0], train: Part | None = None) -> Found | str:
    """Return the guessed declaration of a column of text cells, or the reason why the column is left out.

    Arguments:
        cells: cells as text; missing ones are NaN.
        spelling: spelling of numbers.
        train: row numbers of the training split, in which a standardised column has to vary; None if not known.
    """
    given = cells.dropna()
    words = [str(word) for word in given.unique()]
    if len(words) < 2:
        return "one value alone" if words else "no value"
    kind: Found | str | None
    values, wrong = numbers_of(given, spelling)
    dates = date_forms(words) if wrong.any() else []
    if len(words) == 2:
        truth = {code for word in words for code, known in enumerate(TRUTH) if word in known}
        levels = sorted(words, key=lambda word: word in TRUTH[1]) if truth == {0, 1} else _in_order(words)
        kind = {"type": "binary", **({} if {*words} == {"0", "1"} else {"values": levels})}
    elif not wrong.any():
        kind = _number(values)
    elif len(dates) > 1:
        return f"dates that {' or '.join(map(str, dates))} reads: declare one with time and format"
    elif dates:
        kind = {"type": "continuous", "time": "days", **({} if dates[0] is None else {"format": dates[0]})}
        values = moments(given, dates[0])[0]
    elif sum(bool(UNITS.fullmatch(word.strip())) for word in words) > len(words) / 2:
        return f"numbers with a sign of a unit, such as {shown(words[0])}: write plain numbers"
    elif len(words) > min(MAX_LEVELS, max(3, len(given) // 2)):
        return f"{len(words)} {NAMING[0]}"
    else:
        kind = {"type": "categorical", "levels": _in_order(words)}
    if isinstance(kind, str):
        return kind
    return _checked({**kind, **({} if len(given) == len(cells) else {"missing": "mask"})}, cells, values, train)


def _checked(kind: Found, cells: Cells, values: prepare.Floats, train: Part | None) -> Found | str:
    """Return a declared column, or the reason for which reading its table would refuse it."""
    present = cells.notna().to_numpy()
    if train is not None and not present[np.asarray(train)].any():
        return "no value in the training rows"
    if kind["type"] not in ("continuous", "count"):
        return kind
    column = from_table(Column, kind, "columns")  # type: ignore[type-abstract]
    if not column.inside(values).all():
        return f"values that are not {column.expected}"
    if train is not None and column.is_standardised:
        known = values[np.isin(np.flatnonzero(present), np.asarray(train))]
        if np.ptp(known) <= 1e-12 * np.abs(known).max():
            return "one value alone in the training rows"
    return kind


def _number(values: prepare.Floats) -> Found | str:
    """Return the declaration of a numeric column (count or continuous), or the reason to leave it out."""
    if not np.isfinite(values).all():
        return "values that are not finite"
    if (values % 1 != 0).any() or values.min() < 0:
        skewed = values.min() > 0 and bool(skew(values) > LARGE_SKEWNESS > 2 * abs(skew(np.log(values))))
        return {"type": "continuous", **({"transform": "log"} if skewed else {})}
    if len(values) > 2 and (np.diff(values) == 1).all():
        return NAMING[1]
    if values.max() > LARGEST_GUESSED_COUNT:
        return {"type": "continuous", "transform": "log1p"}
    spread = values.var() > 1.5 * values.mean()
    return {"type": "count", **({"likelihood": "negative_binomial"} if spread else {})}


def _in_order(words: Sequence[str]) -> list[str] | list[int]:
    """Return the words in natural order, as integers if all are written as integers."""
    whole = all(re.fullmatch(r"0|-?[1-9]\d{0,17}", word) for word in words)
    return sorted(map(int, words)) if whole else sorted(words, key=natural)
