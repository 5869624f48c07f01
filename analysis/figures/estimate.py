"""Estimates: a value with its errors and its kind (exact, bound, estimate); and results of them, in tables and words.

The words are the entries of `results.toml`, filled in by Jinja; an unknown entry or field is an error.
"""

import math
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, dataclass_transform, get_type_hints

import pandas
from rich.console import ConsoleOptions
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pvae.errors import DataError, DeclarationError, PvaeError
from pvae.util import Record, plain
from pvae.words import Catalogue

Kind = Literal["exact", "lower_bound", "upper_bound", "estimate"]
CONSERVATIVE = "conservative"
WIDE = 100
"""Width of a terminal, in characters, from which tables have a column of explanations."""
HUGE = 1e150
"""Size from which a value counts as infinite."""


class Estimate(Record):
    """A value with its errors and its kind, in nats unless the result that holds it says otherwise.

    Example:
        >>> estimate = Estimate(-86.31, standard_error=0.02, kind="lower_bound")
        >>> print(estimate)
        -86.3100 +- 0.0200 (lower bound)
        >>> float(estimate)
        -86.31
    """

    value: float
    standard_error: float = 0.0
    """Monte Carlo standard error with the data fixed."""
    kind: Kind = "estimate"
    """One of exact, lower_bound, upper_bound and estimate; bounds hold in expectation."""
    data_error: float | None = None
    """Standard error that another data set of the same size would add; None where it is not known."""
    note: str = ""
    """Remark on the way the standard error was computed."""

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        if self.kind == "exact" and not self.standard_error:
            return f"{self.value:.4f} (exact)"
        return f"{self.value:.4f} +- {self.standard_error:.4f} ({self.kind.replace('_', ' ')})"

    @property
    def label(self) -> str:
        """Kind of the estimate in words, followed by the note."""
        return self.kind.replace("_", " ") + (f", {self.note}" if self.note else "")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain numbers and strings, for JSON; values that are not finite are None."""
        return dict(plain(asdict(self)))


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """Return an estimate of a positive multiple of the estimated quantity."""
    data_error = None if estimate.data_error is None else estimate.data_error * factor
    value, error = estimate.value * factor, estimate.standard_error * factor
    return replace(estimate, value=value, standard_error=error, data_error=data_error)


def exact(value: float) -> Estimate:
    """Return a value as an `Estimate` of kind "exact", without Monte Carlo error."""
    return Estimate(value, 0.0, "exact")


def exact_mean(terms: Tensor) -> Estimate:
    """Return the mean of terms `(n,)` that are exact for every datum, without Monte Carlo error."""
    return over_noisy_rows(terms, 0.0, "exact")


def over_rows(values: Tensor) -> Estimate:
    """Return the mean of independent values `(n,)`, one per row, with its standard error."""
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), error, "estimate")


def proportion(hits: Tensor) -> Estimate:
    """Return the mean of independent zeros and ones `(n,)`, one per row (ties 1/2), with its standard error.

    With k ones it is sqrt(p (1 - p) / n) of p = (k + 1) / (n + 2): a proportion that was found to be 0 or 1 is not
    known without error.
    """
    n = len(hits)
    p = (float(hits.sum()) + 1) / (n + 2)
    return Estimate(float(hits.double().mean()), math.sqrt(p * (1 - p) / n))


def over_whole_draws(terms: Tensor, kind: Kind = "estimate") -> Estimate:
    """Return the mean of terms `(samples, n)`, with the error between samples, as rows share noise within a sample."""
    found = over_draws(terms, kind)
    if len(terms) == 1:
        return replace(found, note="one draw of the global latents, whose noise is not in it")
    return replace(found, standard_error=float(terms.mean(1).std() / math.sqrt(len(terms))))


def over_noisy_rows(values: Tensor, error: float, kind: Kind) -> Estimate:
    """Return the mean of values `(n,)`, one per row, that are known up to noise by which their mean has an `error`.

    The spread of the values over rows, divided by sqrt(n), holds noise and data: the error of the data is what remains
    of it without that noise. If the error is NaN, as noise and spread cannot be told apart, the spread takes its place,
    which is too large on average, and the note says "conservative".
    """
    found = over_rows(values)
    spread = found.standard_error if len(values) > 1 else None
    if math.isnan(error):
        return replace(found, kind=kind, data_error=spread, note=CONSERVATIVE)
    data_error = None if spread is None else math.sqrt(max(spread**2 - error**2, 0.0))
    return Estimate(found.value, error, kind, data_error)


def over_draws(terms: Tensor, kind: Kind = "estimate", of: int | None = None) -> Estimate:
    """Return the mean of terms `(samples, n)` with its errors; the n rows may be a random subset of `of` rows.

    With several samples the Monte Carlo error comes from the variance within each datum, sqrt(sum_i var_i / S) / n. A
    single sample cannot separate noise from the spread over data (`over_noisy_rows`).
    """
    draws, n = terms.shape
    error = float((terms.var(0).sum() / draws).sqrt() / n) if draws > 1 else math.nan
    found = replace(over_noisy_rows(terms.mean(0), error, kind), value=float(terms.mean()))
    if draws == 1 or of is None or n >= of or found.data_error is None:
        return found
    return replace(found, standard_error=math.hypot(error, found.data_error * math.sqrt(1 - n / of)))


def jackknife(left_out: Tensor, size: int, units: int) -> float:
    """Return the standard error of a figure of n units that are independent samples of a distribution.

    Its square is the delete-d jackknife's variance, (n - d)^2 / (d n) times the variance of the values over groups,
    times (k - 1) / (k - 3): figures divided by their errors then have unit variance for few groups as well. Errors of
    the infinitesimal jackknife were up to three times too small where single units stand out in logs of sums.

    Arguments:
        left_out: values of the figure without each of k disjoint groups of d units, `(k,)`.
        size: number d of units in a group.
        units: number n of units.

    Returns:
        The error; NaN for a single group, and where a value is not finite.

    References:
        A General Theory for Jackknife Variance Estimation (Shao, Wu, 1989), https://doi.org/10.1214/aos/1176347263
    """
    if (k := len(left_out)) < 2 or not bool((left_out.abs() < HUGE).all()):
        return math.nan
    return float(left_out.std()) * (units - size) / math.sqrt(size * units) * math.sqrt((k - 1) / max(k - 3, 1))


# ---------------------------------------------------------------------- words of results


def short(value: float, digits: int = 2) -> str:
    """Return a number with `digits` decimal places, or 0."""
    return f"{value:.{digits}f}" if abs(value) >= 0.5 * 10**-digits else "0"


def with_error(e: Estimate) -> str:
    """Return an estimate with its error, as `2.04 +- 0.03`; with three decimal places where it is below 0.005."""
    digits = 2 if e.standard_error >= 0.005 else 3
    return f"{short(e.value, digits)} +- {short(e.standard_error, digits)}"


WORDS = Catalogue(Path(__file__).parent, "results.toml", short=short, with_error=with_error, log=math.log)
text, texts = WORDS.text, WORDS.texts
TEXT_NAME = re.compile(r"\w+\.\w+")


def refuse(problem: object, words: str, error: type[PvaeError] = DataError, /, **fields: Any) -> None:
    """Raise a DataError if there is a problem; its message is `words`, or the text of that name with its fields."""
    if problem:
        raise error(text(words, **fields) if TEXT_NAME.fullmatch(words) else words)


def misdeclared(problem: object, words: str, /, **fields: Any) -> None:
    """Raise a DeclarationError if there is a problem, as `refuse` does."""
    refuse(problem, words, DeclarationError, **fields)


# ---------------------------------------------------------------------- results

TABLES = tomllib.loads(Path(__file__).with_name("tables.toml").read_text(encoding="utf-8"))
"""Class attributes of results, by the name of the class."""
Row = tuple[str, Estimate | None, str]
"""Row of a table of results: name of the term, its estimate (None where it is not defined), and its meaning."""


def cell(value: object) -> object:
    """Return a value as a CSV cell that no spreadsheet evaluates as a formula; numbers stay numbers."""
    is_formula = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    return f"'{value}" if is_formula else value


def annotated(result: Any, prefix: str = "", **more: Any) -> Iterator[Row]:
    """Yield the annotated fields of a dataclass as rows of a table; `more` are further fields of their formats."""
    for field, hint in get_type_hints(type(result), include_extras=True).items():
        if meant := getattr(hint, "__metadata__", ()):
            name, meaning = (_said(words, result, **more) for words in (field, *meant)[-2:])
            yield prefix + name, getattr(result, field), meaning


def _said(words: str, found: Any, **more: Any) -> str:
    """Return the text of that name, with the field `found`; other words are a format of the result."""
    return text(words, found=found, **more) if TEXT_NAME.fullmatch(words) else words.format(found, **more)


@dataclass_transform(frozen_default=True)
class Figures:
    """Base class of results that consist of named estimates, shown as text, table, data frame, HTML and JSON.

    Every subclass is a frozen dataclass; its heading, remarks, unit and counts stand in `tables.toml`.

    A field `Annotated[Estimate, meaning]` is a row of the table, whose meaning is a format of the result, or the name
    of a text; its name is that of the field, or another format before the meaning.
    """

    heading: ClassVar[str]
    """Title of the table as a format of the result, such as "evidence (n = {0.n})", or the name of a text."""
    remarked: ClassVar[str] = ""
    """Name of the list of texts that are the `remarks`; empty if there are none."""
    unit: ClassVar[str] = "nats"
    """Unit of the estimates, per datum."""
    counts: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes (numbers of rows, settings) that `to_dict` puts before the estimates."""
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, *, eq: bool = True) -> None:
        for name, value in TABLES.get(cls.__name__, {}).items():
            setattr(cls, name, tuple(value) if isinstance(value, list) else value)
        dataclass(frozen=True, repr=False, eq=eq)(cls)

    @property
    def title(self) -> str:
        """Title of the table: the quantity, its unit and the number of data."""
        return _said(self.heading, self)

    def rows(self) -> Iterator[Row]:
        """Yield the rows of the table (term, estimate or None, meaning) in reading order: the annotated fields."""
        yield from annotated(self)

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences below the table."""
        return texts(self.remarked, found=self) if self.remarked else ()

    @property
    def sentences(self) -> tuple[str, ...]:
        """Sentences below the table, with the one on errors that are conservative, where some are."""
        said = "conservative errors: one draw cannot tell Monte Carlo noise from spread over data; take more samples"
        return (*self.remarks, *((said,) if any(CONSERVATIVE in e.note for _, e, _ in self.known()) else ()))

    def known(self) -> Iterator[tuple[str, Estimate, str]]:
        """Yield the rows of the table whose estimate is defined."""
        yield from ((name, figure, meaning) for name, figure, meaning in self.rows() if figure is not None)

    def figures(self) -> dict[str, Any]:
        """Return the estimates of all rows by term, as plain numbers and strings for JSON."""
        return {name: None if figure is None else figure.to_dict() for name, figure, _ in self.rows()}

    def facts(self) -> dict[str, Any]:
        """Return the attributes named in `counts`, for JSON."""
        return {name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in self.counts}

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes in `counts` and all estimates, as plain numbers and strings for JSON."""
        return {**self.facts(), **self.figures()}

    def nested(self, **more: Any) -> dict[str, Any]:
        """Return the attributes in `counts`, the estimates under "figures", and `more`, as plain values for JSON."""
        return dict(plain({"unit": "nats per datum", **self.facts(), "figures": self.figures(), **more}))

    def to_frame(self) -> pandas.DataFrame:
        """Return a data frame with one row per term: value, errors, kind and note."""
        return pandas.DataFrame([{"term": name, **e.to_dict()} for name, e, _ in self.known()]).set_index("term")

    def table(self, meanings: bool = True) -> Table:
        """Return the estimates as a rich table, with or without the column that explains them."""
        table = Table(title=Text(self.title), caption=Text("\n".join(self.sentences)), caption_justify="left")
        table.add_column("term", no_wrap=True)
        table.add_column("value ± std error", justify="right", no_wrap=True)
        for column in ("kind", "what it is")[: 1 + meanings]:
            table.add_column(column)
        for name, e, meaning in self.known():
            error = f" ± {e.standard_error:.4f}" if e.standard_error else ""
            cells = (f"{e.value:.4f}{error}", e.label.removesuffix(f", {CONSERVATIVE}"), Text(meaning))
            table.add_row(Text(name), *cells[: 2 + meanings])
        return table

    def __rich__(self) -> "Explained":
        return Explained(self.table, tuple((name, meaning) for name, _, meaning in self.known()))

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return "\n".join([self.title, *(f"{name:28s} {e}" for name, e, _ in self.known()), *self.sentences])

    def figure(self) -> Any:
        """Return the picture that a notebook shows above the table, a matplotlib figure; None if there is none."""

    def _repr_html_(self) -> str:
        from pvae.analysis.pages.plots.base import pictured  # here, because plots import results

        return pictured(self.figure(), self.title) + text("figures.html", found=self)


class Explained(Record):
    """Table for the terminal with a column that explains its rows, which stands below it if the terminal is narrow."""

    make: Callable[[bool], Table]
    """Function that returns the table, with that column if its argument is True."""
    meanings: Sequence[tuple[str, str]]

    def __rich_console__(self, _: Any, options: ConsoleOptions) -> Iterator[Table]:
        wide = options.max_width >= WIDE
        yield self.make(wide)
        if not wide:
            below = Table.grid(padding=(0, 2))
            for term, meaning in self.meanings:
                below.add_row(Text(term, no_wrap=True), Text(meaning))
            yield below


def merged(results: Mapping[str, Figures]) -> list[tuple[Any, ...]]:
    """Return rows that compare results of one kind: a term, its estimate in each result or None, its explanation.

    Terms are in the order of the result with the most terms, followed by those of other results only.
    """
    listed = sorted(([*result.rows()] for result in results.values()), key=len, reverse=True)
    terms = {term: meaning for rows in listed for term, _, meaning in rows}
    found = [{term: e for term, e, _ in result.known()} for result in results.values()]
    rows = [(term, *(figures.get(term) for figures in found), meaning) for term, meaning in terms.items()]
    return [row for row in rows if any(e is not None for e in row[1:-1])]
