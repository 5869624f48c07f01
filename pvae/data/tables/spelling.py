"""Numbers, dates and durations as tables write them: one rule for the reader and for the guess of a declaration."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pvae.data.rows.prepare import Floats

if TYPE_CHECKING:
    import pandas

NA = ("", "NA", "nan")
"""Strings that mean a missing value unless a table declares others."""
DAY = 86_400.0
"""Seconds of a day."""
YEAR_DAYS = 365.25


@dataclass(frozen=True)
class Spelling:
    """Marks with which a table writes its numbers.

    Arguments:
        decimal: decimal mark.
        thousands: mark between groups of three digits; empty for none.
    """

    decimal: str = "."
    thousands: str = ""

    @property
    def usual(self) -> bool:
        """True for the spelling of programs: a decimal point and no groups."""
        return (self.decimal, self.thousands) == (".", "")

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


def moments(cells: pandas.Series[Any], form: str | None) -> tuple[Floats, bool]:
    """Return dates as seconds since 1970 (UTC), or durations as seconds, NaN for cells that are neither; and which.

    Arguments:
        cells: dates or durations of pandas, Arrow or Python, or texts.
        form: format of texts by the codes of `strftime`; None for ISO 8601, and for durations such as `1:02:03`.

    Returns:
        Seconds `(n,)`, and True if they are durations.
    """
    import pandas

    if pandas.api.types.is_timedelta64_dtype(cells.dtype):
        return np.asarray(cells.dt.total_seconds(), np.float64), True
    given = cells.astype(object).map(_moment)
    if form is None and not pandas.api.types.is_datetime64_any_dtype(cells.dtype):
        spans = pandas.to_timedelta(given.where(given.map(_is_span)), errors="coerce")
        if spans.notna().any():
            return np.asarray(spans.dt.total_seconds(), np.float64), True
    dates = pandas.to_datetime(given, errors="coerce", utc=True, format=form or "ISO8601")
    seconds = (dates - pandas.Timestamp(0, tz="UTC")).dt.total_seconds()
    return np.asarray(seconds, np.float64), False


def _moment(value: Any) -> Any:
    """Return a cell that may be a moment (a text, or a date or duration of any library); None for others."""
    kinds = str | datetime.date | datetime.timedelta | np.datetime64 | np.timedelta64
    return str(value) if isinstance(value, datetime.time) else value if isinstance(value, kinds) else None


def _is_span(value: Any) -> bool:
    if isinstance(value, str):
        return bool(re.fullmatch(r"(-?\d+ days?,? )?[+-]?\d+:\d\d(:\d\d(\.\d+)?)?", value.strip()))
    return isinstance(value, datetime.timedelta | np.timedelta64)


def read_time(seconds: Floats, unit: str) -> Floats:
    """Return seconds as a unit (`seconds`, `days`), or as the sine or cosine of a cyclic part, such as `hour_sin`."""
    if unit in ("seconds", "days"):
        return seconds / (DAY if unit == "days" else 1.0)
    part, wave = unit.rsplit("_", 1)
    angle = 2 * np.pi * seconds / PARTS[part]
    return np.sin(angle) if wave == "sin" else np.cos(angle)


DATE_FORMS = tuple(
    f"{day}{hour}" for hour in ("", " %H:%M", " %H:%M:%S") for day in ("%d.%m.%Y", "%m/%d/%Y", "%d/%m/%Y")
)


def date_forms(words: Sequence[str]) -> list[str | None]:
    """Return the formats in which all words are dates: None for ISO 8601 or a duration, else codes of `strftime`.

    Of several formats in which they are the same dates, the first is returned.
    """
    import pandas

    cells = pandas.Series(list(words), dtype=object)
    if not cells.map(lambda word: bool(re.search(r"\d[-.:/]\d", word))).all():
        return []
    found: dict[str | None, Floats] = {}
    for form in (None, *DATE_FORMS):
        seconds, _ = moments(cells, form)
        if not np.isnan(seconds).any() and not any(np.array_equal(seconds, other) for other in found.values()):
            found[form] = seconds
    return list(found)


def numbers_of(cells: pandas.Series[Any], spelling: Spelling) -> tuple[Floats, NDArray[np.bool_]]:
    """Return cells as numbers `(n,)`, NaN where a cell is missing or no number; and True for cells that are no number.

    Arguments:
        cells: column whose missing values are None, NaN or pandas' own.
        spelling: marks of numbers written as text.
    """
    import pandas

    codes, found = pandas.factorize(cells.astype(object))
    known = [spelling.number(value) for value in found]
    values = np.array([np.nan if value is None else value for value in known] + [np.nan])
    wrong = np.array([value is None for value in known] + [False])
    return values[codes], wrong[codes]
