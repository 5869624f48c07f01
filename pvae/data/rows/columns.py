"""Column types of a declared table: the values they allow and the likelihood of each. Needs only pydantic.

A new type of column is one final class with ``type: Literal["name"] = "name"``.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from pvae.component import LARGEST_FLOAT, Component, Ints
from pvae.errors import refuse

if TYPE_CHECKING:
    import numpy as np

    from pvae.graph.site import Law

    Floats = np.typing.NDArray[np.float64]

Levels = Annotated[tuple[int | str, ...], Field(strict=False)]
"""Levels of a column: a tuple of strings or integers; a list, as TOML gives it, is accepted."""

Time = Literal["seconds", "days", "hour_sin", "hour_cos", "week_sin", "week_cos", "year_sin", "year_cos"]
"""Readings of a date or a duration as a number."""

LARGEST_COUNT = 2**24
"""Largest count that a column may contain: above it float32 cannot represent every integer."""

TRUTH = (("0", "false", "False", "FALSE"), ("1", "true", "True", "TRUE"))
"""Strings accepted for 0 and for 1 in a binary column that declares no `values`."""


class Column(Component):
    """Type of one column of a table: its allowed values, its transform and its likelihood."""

    tag: ClassVar[str] = "type"

    of: str | None = None
    """Name of the column in the table, where it differs from the name under `data.columns`; one column of a table may
    be read several times, such as a date as its days and as parts of the year."""
    missing: Literal["error", "mask"] = "error"
    """`error`: refuse missing values; `mask`: leave them out of the likelihood, and give the encoder an indicator."""

    @property
    def family(self) -> str:
        """Name of the distribution of the column, as in `pvae.graph.site.Law`: the declared `likelihood`, if any."""
        return str(getattr(self, "likelihood", ""))

    @property
    @abstractmethod
    def expected(self) -> str:
        """Description of the allowed values of the column, for error messages."""

    @property
    def said(self) -> tuple[int | str, ...]:
        """Levels that the codes 0, 1, 2, ... stand for, strings or integers as declared; empty for a numeric column."""
        return ()

    @property
    def words(self) -> tuple[str, ...]:
        """Levels that the codes 0, 1, 2, ... stand for, as strings; empty for a numeric column."""
        return tuple(map(str, self.said))

    @property
    def warp(self) -> str:
        """Name of the function applied to the values before standardisation: `none`, `log`, `log1p` or `logit`."""
        return str(getattr(self, "transform", "none")).replace("standardise", "none")

    @property
    def is_standardised(self) -> bool:
        """True if values are standardised, after `warp`, by mean and standard deviation of the training rows."""
        return getattr(self, "transform", "none") != "none"

    @abstractmethod
    def inside(self, values: Floats) -> np.typing.NDArray[np.bool_]:
        """Return True for each value that the column allows; NaN is checked separately."""

    def code_of(self, word: str) -> int | None:
        """Return the code of a level as written in a file (`1` also as `1.0`), or None if it is no level."""
        known = word if word in self.words else word.removesuffix(".0")
        return self.words.index(known) if known in self.words else None

    def law(self, name: str) -> Law:
        """Return the likelihood of the column: family, number of levels, masking, and the given name."""
        from pvae.graph.site import Law

        return Law(self.family, max(1, len(self.words)), self.missing == "mask", name)


class ContinuousColumn(Column):
    """Column of real numbers."""

    type: Literal["continuous"] = "continuous"
    transform: Literal["standardise", "none", "log", "log1p", "logit"] = "standardise"
    """Transform of the values; all but `none` end with standardisation by the observed training rows."""
    likelihood: Literal["normal", "student_t"] = "normal"
    """Distribution of the column; its scale (and degrees of freedom) are learned, one value for the column."""
    time: Time | None = None
    """Reading of dates and durations: `days` or `seconds` (of dates: since 1970, UTC), or the sine or cosine of the
    hour of the day, the day of the week or the day of the year, such as `hour_sin`; None for plain numbers."""
    format: str | None = None
    """Format of dates that are text, in the codes of `strftime` such as `%d.%m.%Y`; None for ISO 8601."""
    text: Ints | None = Field(default=None, min_length=2, max_length=2)
    """Number of words that are read of a text, and size of the vocabulary; for values beside x, not for columns of it.
    """

    @property
    def expected(self) -> str:
        if self.time is not None:
            return f"a date ({self.format or 'ISO 8601'})" + (" or a duration" if self.format is None else "")
        where = {"log": " above 0", "log1p": " above -1", "logit": " between 0 and 1, neither of them"}
        return f"a finite number{where.get(self.transform, '')}"

    @model_validator(mode="after")
    def _a_date(self) -> Self:
        refuse(self.format is not None and self.time is None, "data.columns.format", ValueError)
        return self

    def inside(self, values: Floats) -> np.typing.NDArray[np.bool_]:
        low = {"log": 0.0, "log1p": -1.0, "logit": 0.0}.get(self.transform, -LARGEST_FLOAT)
        high = 1.0 if self.transform == "logit" else LARGEST_FLOAT
        return (values > low) & (values < high)


class CountColumn(Column):
    """Column of counts 0, 1, 2, ..."""

    type: Literal["count"] = "count"
    likelihood: Literal["poisson", "negative_binomial"] = "poisson"
    """Distribution of the column; the dispersion of a negative binomial is learned, one value for the column."""

    @property
    def expected(self) -> str:
        return f"a count, an integer 0 .. {LARGEST_COUNT}"

    def inside(self, values: Floats) -> np.typing.NDArray[np.bool_]:
        return (values >= 0) & (values <= LARGEST_COUNT) & (values % 1 == 0)


class WordColumn(Column):
    """Column of levels (strings or integers), coded 0, 1, 2, ... in their declared order."""

    unknown: Literal["error", "missing"] = "error"
    """`error`: refuse a level that is not declared; `missing`: count it as a missing value, in the data of the fit and
    in new data alike (needs `missing = "mask"`); the notes of the data say how many cells that are."""

    @property
    @abstractmethod
    def said(self) -> tuple[int | str, ...]:
        """Levels that the codes 0, 1, 2, ... stand for, strings or integers as declared."""

    @property
    def expected(self) -> str:
        shown = ", ".join(map(repr, self.words[:12]))
        return f"one of {shown}{', ...' if len(self.words) > 12 else ''}"

    def inside(self, values: Floats) -> np.typing.NDArray[np.bool_]:
        return (values >= 0) & (values < len(self.words)) & (values % 1 == 0)

    @model_validator(mode="after")
    def _different(self) -> Self:
        refuse(len(set(self.words)) < len(self.said), "data.columns.levels", ValueError, said=self.said[:20])
        refuse(self.unknown == "missing" and self.missing == "error", "data.columns.unknown", ValueError)
        return self


class BinaryColumn(WordColumn):
    """Column with two levels, coded 0 and 1."""

    type: Literal["binary"] = "binary"
    family: ClassVar[str] = "bernoulli"
    values: Annotated[Levels, Field(min_length=2, max_length=2)] | None = None
    """Levels as written in the file, that of 0 first; None accepts 0 and 1, or false and true."""

    @property
    def said(self) -> tuple[int | str, ...]:
        return (0, 1) if self.values is None else self.values

    def code_of(self, word: str) -> int | None:
        if self.values is not None:
            return super().code_of(word)
        return next((code for code, words in enumerate(TRUTH) if word.removesuffix(".0") in words), None)


class CategoricalColumn(WordColumn):
    """Column with several unordered levels."""

    type: Literal["categorical"] = "categorical"
    family: ClassVar[str] = "categorical"
    levels: Annotated[Levels, Field(min_length=2, max_length=10_000)]
    """All levels as written in the file, strings or integers."""

    @property
    def said(self) -> tuple[int | str, ...]:
        return self.levels
