"""Table cells as numbers: how numbers, dates and durations are written, and checks against the declared columns.

The reader of a table and the guess of its declaration share one rule.
"""

import datetime
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import pandas
from pandas.api.types import is_bool_dtype, is_numeric_dtype

from pvae.data.rows import cache, prepare, rows
from pvae.data.rows.columns import Column, ContinuousColumn
from pvae.errors import DataError, near, refuse, text
from pvae.graph.frame import short, split, word_numbers
from pvae.util import Record, field

Cells: TypeAlias = "pandas.Series[Any]"

NA = ("", "NA", "nan")
"""Strings that mean a missing value unless a table declares others."""
DAY = 86_400.0
"""Seconds of a day."""
YEAR_DAYS = 365.25


class Spelling(Record):
    """Marks with which a table writes its numbers.

    Arguments:
        decimal: decimal mark.
        thousands: mark between groups of three digits; empty for none.
    """

    decimal: str = "."
    thousands: str = ""

    def number(self, value: Any) -> float | None:
        """Return a cell as a number: a number itself, or its digits in this spelling; None if it is no number.

        Example:
            >>> Spelling(",", ".").number("1.132,86")
            1132.86
            >>> Spelling().number("1.132,86") is None
            True
        """
        if isinstance(value, bool | np.bool_):
            return None
        if isinstance(value, Real | Decimal):
            return float(value)
        if not isinstance(value, str) or not self._pattern.fullmatch(word := value.strip()):
            return None
        digits = word.replace(self.thousands, "") if self.thousands else word
        return float(digits.replace(self.decimal, "."))

    @property
    def _pattern(self) -> re.Pattern[str]:
        point, mark = re.escape(self.decimal), re.escape(self.thousands)
        whole = rf"(?:\d{{1,3}}(?:{mark}\d{{3}})+|\d+)" if mark else r"\d+"
        return re.compile(rf"[+-]?(?:{whole}(?:{point}\d*)?|{point}\d+)(?:[eE][+-]?\d+)?|[+-]?(?i:inf|infinity)")


SPACES = (" ", "'", "\u00a0", "\u202f")
SPELLINGS = (
    *(Spelling(".", thousands) for thousands in ("", ",", *SPACES)),
    *(Spelling(",", thousands) for thousands in ("", ".", *SPACES)),
)
"""Spellings that a guess tries, in this order."""

PARTS = {"hour": DAY, "week": 7 * DAY, "year": YEAR_DAYS * DAY}
"""Period, in seconds, of the cyclic part of a date that a column may hold."""


def moments(cells: Cells, form: str | None) -> tuple[prepare.Floats, bool]:
    """Return dates as seconds since 1970 (UTC), or durations as seconds, NaN for cells that are neither; and which.

    Arguments:
        cells: dates or durations of pandas, Arrow or Python, or texts.
        form: format of texts by the codes of `strftime`; None for ISO 8601, and for durations such as `1:02:03`.

    Returns:
        Seconds `(n,)`, and True if they are durations.
    """
    if pandas.api.types.is_timedelta64_dtype(cells.dtype):
        return np.asarray(cells.dt.total_seconds(), np.float64), True
    given = cells.astype(object).map(_moment)
    if form is None and not pandas.api.types.is_datetime64_any_dtype(cells.dtype):
        spans = pandas.to_timedelta(given.where(given.map(_is_span)), errors="coerce")
        if spans.notna().any():
            return np.asarray(spans.dt.total_seconds(), np.float64), True
    dates = pandas.to_datetime(given, errors="coerce", utc=True, format=form or "ISO8601")
    return np.asarray((dates - pandas.Timestamp(0, tz="UTC")).dt.total_seconds(), np.float64), False


def _moment(value: Any) -> Any:
    """Return a cell that may be a moment (a text, or a date or duration of any library); None for others."""
    kinds = str | datetime.date | datetime.timedelta | np.datetime64 | np.timedelta64
    return str(value) if isinstance(value, datetime.time) else value if isinstance(value, kinds) else None


def _is_span(value: Any) -> bool:
    if isinstance(value, str):
        return bool(re.fullmatch(r"(-?\d+ days?,? )?[+-]?\d+:\d\d(:\d\d(\.\d+)?)?", value.strip()))
    return isinstance(value, datetime.timedelta | np.timedelta64)


def read_time(seconds: prepare.Floats, unit: str) -> prepare.Floats:
    """Return seconds as a unit (`seconds`, `days`), or as the sine or cosine of a cyclic part, such as `hour_sin`."""
    if unit in ("seconds", "days"):
        return seconds / (DAY if unit == "days" else 1.0)
    part, wave = unit.rsplit("_", 1)
    angle = 2 * np.pi * seconds / PARTS[part]
    return np.sin(angle) if wave == "sin" else np.cos(angle)


def numbers_of(cells: Cells, spelling: Spelling) -> tuple[prepare.Floats, np.typing.NDArray[np.bool_]]:
    """Return cells as numbers `(n,)`, NaN where a cell is missing or no number; and True for cells that are no number.

    Arguments:
        cells: column whose missing values are None, NaN or pandas' own.
        spelling: marks of numbers written as text.
    """
    codes, found = pandas.factorize(cells.astype(object))
    known = [spelling.number(value) for value in found]
    values = np.array([np.nan if value is None else value for value in known] + [np.nan])
    wrong = np.array([value is None for value in known] + [False])
    return values[codes], wrong[codes]


MAX_LABELS = 2**16
NAMES_LISTED = 12

Numbers = dict[str, np.ndarray]
"""Decoded rows: `x` `(m, columns)` and, if declared, labels `y` and names `id`, `(m,)`, and `side` `(m, columns)`.

Missing values are NaN.
"""

Where = Callable[[int], str]
"""Function from the position of a row in a chunk to its name in messages, such as "line 12" or "row 11"."""


def shown(text: str) -> str:
    """Return a cell or a name quoted for a message, with control characters escaped, cut to 60 characters."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def listed(names: Sequence[str]) -> str:
    """Return the first `NAMES_LISTED` names, quoted and joined by commas, for a message."""
    return ", ".join(map(shown, names[:NAMES_LISTED])) + (", ..." if len(names) > NAMES_LISTED else "")


def require_named_once(names: Sequence[str], origin: str) -> None:
    """Refuse a table in which two columns have the same name.

    Raises:
        DataError: a name occurs more than once; the message gives the name.
    """
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    refuse(times > 1, f"{origin}: expected every column to be named once; got {shown(name)} {times} times.")


@dataclass
class CellDecoder:
    """Converter of chunks of a table to numbers, which checks every value against its column.

    Arguments:
        columns: declared columns by name, in the order of x.
        label: name of the label column, or None.
        na: strings that mean a missing value.
        origin: name of the table in messages.
        spelling: marks of numbers written as text.
        id: name of the column with the names of the rows, or None.
        side: columns read beside x, by name.
    """

    columns: Mapping[str, Column]
    label: str | None
    na: Sequence[str]
    origin: str
    spelling: Spelling = Spelling()
    id: str | None = None
    side: Mapping[str, Column] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    """Integer code of every label found so far, by the label's text, in order of appearance."""
    notes: tuple[str, ...] = ()
    """Remarks for the user: columns that are not declared and not read, and undeclared levels that count as missing."""
    words: dict[str, str] = field(default_factory=dict)
    """Words of texts that are longer than the ten characters of `short`, by what it makes of them."""

    @property
    def names(self) -> list[str]:
        """Names of the table's columns to read: those of x, then the columns of labels and ids if there are some."""
        read = [column.of or name for name, column in (*self.columns.items(), *self.side.items())]
        return list(dict.fromkeys([*read, *(name for name in (self.label, self.id) if name is not None)]))

    @property
    def plain_numbers(self) -> list[str]:
        """Names of the table's columns that are read as plain numbers alone, which pandas can parse."""
        read = (*self.columns.items(), *self.side.items())
        words = {c.of or name for name, c in read if c.words or getattr(c, "time", None) or getattr(c, "text", None)}
        return [name for name in self.names if name not in words and name not in (self.label, self.id)]

    def require_columns(self, found: Sequence[str]) -> None:
        """Refuse a table that lacks a declared column; record undeclared columns in `notes`.

        Raises:
            DataError: a declared column is absent, or two columns have the same name.
        """
        require_named_once(found, self.origin)
        there, read = set(found), set(self.names)
        if absent := [name for name in self.names if name not in there]:
            got, no_names = f"{listed(found)}{near(absent[0], found)}", any(map(self.spelling.number, found))
            raise DataError.of("data.cells.absent", of=self.origin, name=shown(absent[0]), got=got, no_names=no_names)
        if left := [name for name in found if name not in read]:
            self.notes = (f"{len(left)} of {len(found)} columns are not declared and left out: {listed(left)}",)

    def decode(self, frame: pandas.DataFrame, where: Where) -> Numbers:
        """Return the rows of a chunk of the table as numbers.

        Raises:
            DataError: a value is not allowed; the message gives its row and column.
        """
        found: Numbers = {"x": np.empty((len(frame), 0))}
        for key, columns in {"x": self.columns, "side": self.side}.items():
            if cells := [self._column(frame[c.of or name], name, c, where) for name, c in columns.items()]:
                found[key] = np.column_stack(cells)
        if self.id is not None:
            found["id"] = cache.texts(frame[self.id])
        if self.label is not None:
            found["y"] = self._labels(frame[self.label], self.label, where)
        return found

    def _column(self, cells: Cells, name: str, column: Column, where: Where) -> prepare.Floats:
        if size := getattr(column, "text", None):
            return self._texts(cells, name, size[0], where)
        values = (self._coded if column.words else self._numbers)(cells, name, column, where)
        missing = np.isnan(values)
        if column.missing == "error" and missing.any():
            mask = "" if name in self.side else f'Set data.columns.{name!r}.missing = "mask", or leave the row out.'
            todo = mask or "Leave the row out, or fill it in."
            raise self._wrong(int(missing.argmax()), name, "a value", "none", where, todo)
        if (wrong := ~missing & ~column.inside(values)).any():
            at = int(wrong.argmax())
            raise self._wrong(at, name, column.expected, f"{values[at]:.15g}", where)
        return values

    def _numbers(self, cells: Cells, name: str, column: Column, where: Where) -> prepare.Floats:
        time = column.time if isinstance(column, ContinuousColumn) else None
        if cells.dtype.kind == "c":
            raise self._wrong(0, name, column.expected, "complex numbers", where)
        if time is None and is_numeric_dtype(cells.dtype) and not is_bool_dtype(cells.dtype):
            return cells.to_numpy(np.float64, na_value=np.nan)
        missing = cells.map(self._is_missing).to_numpy(bool)
        known = cells.where(~missing)
        if time is None:
            values, wrong = numbers_of(known, self.spelling)
        else:
            values = read_time(moments(known, column.format)[0], time)  # type: ignore[attr-defined]
            wrong = np.isnan(values)
        wrong &= ~missing
        if wrong.any():
            at = int(wrong.argmax())
            word = str(cells.iloc[at])
            other = next((each for each in SPELLINGS if time is None and each.number(word) is not None), None)
            raise self._wrong(at, name, column.expected, shown(word), where, text("data.cells.marks", other=other))
        return values

    def _texts(self, cells: Cells, name: str, length: int, where: Where) -> prepare.Floats:
        """Return the numbers of the first words of texts, `(m, length)`, 0 behind the last word."""
        words = [split(cell) if isinstance(cell, str) else None for cell in cells]
        if None in words:
            got = "none" if self._is_missing(cell := cells.iloc[at := words.index(None)]) else shown(str(cell))
            raise self._wrong(at, name, "a text", got, where, "Leave the row out, or fill it in.")
        if any(len(found) > length for found in words if found):
            self.notes = tuple(dict.fromkeys([*self.notes, f"column {name!r}: texts are cut to {length} words"]))
        self.words |= {short(word): word for found in words for word in found or () if len(word) > 10}
        return np.array([word_numbers(found or (), length) for found in words], np.float64).reshape(-1, length)

    def _coded(self, cells: Cells, name: str, column: Column, where: Where) -> prepare.Floats:
        codes, words = self._words(cells)
        found = [np.nan if word is None else column.code_of(word) for word in words]
        wrong = np.isin(codes, [place for place, code in enumerate(found) if code is None])
        if wrong.any() and getattr(column, "unknown", "error") == "missing":
            note = f"column {shown(name)}: levels that are not declared count as missing"
            self.notes = tuple(dict.fromkeys([*self.notes, note]))
            found = [np.nan if code is None else code for code in found]
        elif wrong.any():
            at = int(wrong.argmax())
            word = str(words[codes[at]])
            raise self._wrong(at, name, column.expected, f"{shown(word)}{near(word, column.words)}", where)
        return np.array([*found, np.nan], np.float64)[codes]

    def _words(self, cells: Cells) -> tuple[np.typing.NDArray[np.int64], list[str | None]]:
        """Return the code of each cell (-1 if missing) and the string of each code (None for a missing value)."""
        kinds = cells if isinstance(cells.dtype, pandas.CategoricalDtype) else cells.astype("category")
        words = [None if self._is_missing(value) else word_of(value) for value in kinds.cat.categories]
        return np.asarray(kinds.cat.codes, np.int64), words

    def _labels(self, cells: Cells, name: str, where: Where) -> np.typing.NDArray[np.int64]:
        codes, words = self._words(cells)
        missing = (codes < 0) | np.isin(codes, [place for place, word in enumerate(words) if word is None])
        if missing.any() and not rows.PARTLY_LABELLED.get():
            raise self._wrong(int(missing.argmax()), name, "a label", "none", where, "Leave the row out.")
        words = [*(word or "" for word in words), ""]  # of code -1 as well
        for code in dict.fromkeys(codes.tolist()):
            self.labels.setdefault(str(words[code]), len(self.labels))
        refuse(len(self.labels) > MAX_LABELS, "data.cells.labels", of=self.origin, most=MAX_LABELS, label=shown(name))
        return np.array([self.labels.get(str(word), -1) for word in words], np.int64)[codes]

    def _is_missing(self, value: Any) -> bool:
        if isinstance(value, str):
            return value in self.na or value.strip() in self.na
        return value is None or type(value).__name__ in ("NAType", "NaTType") or value != value  # NA compares to NA

    def _wrong(self, at: int, name: str, expected: str, got: str, where: Where, todo: str = "") -> DataError:
        found = f"{self.origin}, {where(at)}, column {shown(name)}: expected {expected}; got {got}. {todo}"
        return DataError(found.rstrip())


def word_of(value: Any) -> str:
    """Return a cell value as a string, as it would be written in a CSV file: `true`, `false`, or `1` for 1.0."""
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float | np.floating) and value.is_integer() else str(value)
