"""The columns of a declared table: their values, and the distribution that scores them. This needs only pydantic.

A new type of column is one final class with ``type: Literal["name"] = "name"``.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, final

from pydantic import Field, model_validator

from pvae.component import LARGEST_FLOAT, Component
from pvae.graph.column_law import Law

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Levels = Annotated[tuple[int | str, ...], Field(strict=False)]
"""Words or integers; a list (all that TOML has) is accepted."""

LARGEST_COUNT = 2**24
"""Largest count: above it single precision does not hold every integer."""

TRUTH = (("0", "false", "False", "FALSE"), ("1", "true", "True", "TRUE"))
"""The words for 0 and 1 where a declaration names none."""


class Column(Component):
    """The type of one column of a table."""

    tag: ClassVar[str] = "type"

    missing: Literal["error", "mask"] = "error"
    """`error`: a missing value is refused; `mask`: it adds nothing to the likelihood, and the guide is told."""

    @property
    @abstractmethod
    def family(self) -> str:
        """Name of its distribution: see `pvae.graph.column_law.Law`."""

    @property
    @abstractmethod
    def expected(self) -> str:
        """Description of the values that it may hold, for messages."""

    @property
    def said(self) -> tuple[int | str, ...]:
        """The words or integers that 0, 1, 2, ... stand for; none for a column of numbers."""
        return ()

    @property
    def words(self) -> tuple[str, ...]:
        """The same as text."""
        return tuple(map(str, self.said))

    @property
    def warp(self) -> str:
        """The function that numbers go through first: `none`, `log`, `log1p` or `logit`."""
        return "none"

    @property
    def is_standardised(self) -> bool:
        """True where numbers are then scaled by mean and deviation of the training rows."""
        return False

    @abstractmethod
    def inside(self, values: Floats) -> NDArray[np.bool_]:
        """Return True for each value that it may hold; NaN is looked for elsewhere."""

    def code_of(self, word: str) -> int | None:
        """Return the number of a word as it stands in a file, an integer also as `1.0`; None for other words."""
        known = word if word in self.words else word.removesuffix(".0")
        return self.words.index(known) if known in self.words else None

    def law(self, name: str) -> Law:
        """Return the distribution that scores it."""
        return Law(self.family, max(1, len(self.words)), self.missing == "mask", name)


@final
class ContinuousColumn(Column):
    """Real numbers."""

    type: Literal["continuous"] = "continuous"
    transform: Literal["standardise", "none", "log", "log1p", "logit"] = "standardise"
    """All but `none` standardise by the observed training rows, after a logarithm, log(1 + x) or log(x / (1 - x))."""
    likelihood: Literal["normal", "student_t"] = "normal"
    """Scale (and degrees of freedom) are learned, one for the column."""

    @property
    def family(self) -> str:
        return self.likelihood

    @property
    def expected(self) -> str:
        where = {"log": " above 0", "log1p": " above -1", "logit": " between 0 and 1, neither of them"}
        return f"a finite number{where.get(self.transform, '')}"

    @property
    def warp(self) -> str:
        return "none" if self.transform == "standardise" else self.transform

    @property
    def is_standardised(self) -> bool:
        return self.transform != "none"

    def inside(self, values: Floats) -> NDArray[np.bool_]:
        low = {"log": 0.0, "log1p": -1.0, "logit": 0.0}.get(self.transform, -LARGEST_FLOAT)
        high = 1.0 if self.transform == "logit" else LARGEST_FLOAT
        return (values > low) & (values < high)


@final
class CountColumn(Column):
    """Whole numbers 0, 1, 2, ..."""

    type: Literal["count"] = "count"
    likelihood: Literal["poisson", "negative_binomial"] = "poisson"
    """The dispersion of a negative binomial is learned, one for the column."""

    @property
    def family(self) -> str:
        return self.likelihood

    @property
    def expected(self) -> str:
        return f"a count, an integer 0 .. {LARGEST_COUNT}"

    def inside(self, values: Floats) -> NDArray[np.bool_]:
        return (values >= 0) & (values <= LARGEST_COUNT) & (values % 1 == 0)


class WordColumn(Column):
    """A column of words: its values are 0, 1, 2, ... by the order of the words."""

    @property
    def expected(self) -> str:
        shown = ", ".join(map(repr, self.words[:12]))
        return f"one of {shown}{', ...' if len(self.words) > 12 else ''}"

    def inside(self, values: Floats) -> NDArray[np.bool_]:
        return (values >= 0) & (values < len(self.words)) & (values % 1 == 0)

    @model_validator(mode="after")
    def _different(self) -> Self:
        if len(set(self.words)) < len(self.said):
            raise ValueError(f"levels that differ as they are written; got {list(self.said)[:20]}")
        return self


@final
class BinaryColumn(WordColumn):
    """One of two values."""

    type: Literal["binary"] = "binary"
    values: Annotated[Levels, Field(min_length=2, max_length=2)] | None = None
    """The words for 0 and for 1; by default 0 and 1, or false and true."""

    @property
    def family(self) -> str:
        return "bernoulli"

    @property
    def said(self) -> tuple[int | str, ...]:
        return (0, 1) if self.values is None else self.values

    def code_of(self, word: str) -> int | None:
        if self.values is not None:
            return super().code_of(word)
        return next((code for code, words in enumerate(TRUTH) if word.removesuffix(".0") in words), None)


@final
class CategoricalColumn(WordColumn):
    """One of several levels without an order."""

    type: Literal["categorical"] = "categorical"
    levels: Annotated[Levels, Field(min_length=2, max_length=10_000)]
    """Every level, as it is written: words or integers."""

    @property
    def family(self) -> str:
        return "categorical"

    @property
    def said(self) -> tuple[int | str, ...]:
        return self.levels
