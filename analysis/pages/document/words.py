"""Words of pages: numbers and tables as a page, a CSV file and the terminal show them, and texts of the catalogue.

The catalogue holds titles, captions and sentences, into which the results of a run are filled: it is every TOML file
of `templates/`, a table for each section of a page. Its texts hold results as Jinja fields, such as `{{ gap | nats }}`.
An entry is known by its dotted name, such as `guide.khat`; an unknown entry, or a field that is not given, is an error.
Names from outside are escaped by the page, not here.
"""

import csv
import io
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from itertools import repeat
from pathlib import Path
from typing import Any, SupportsFloat, TypeVar

from markupsafe import Markup
from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from pvae.analysis.figures.estimate import Estimate, Figures, cell
from pvae.analysis.pages.document.blocks import PageColumn, PageSection, PageTable, Part, Picture, Sentence, Tile
from pvae.analysis.pages.plots.base import nats, png
from pvae.words import Catalogue

Value = Estimate | float | int | str | None
"""Type of the value in one cell of a table; None is shown as a dash."""
PARTS = ("error", "data error", "kind")
"""Extra columns after each column of estimates in a CSV file: Monte Carlo error, error over data, and kind."""


# ---------------------------------------------------------------------- values


def plus_minus(e: Estimate, digits: int = 2) -> str:
    """Return an estimate with its Monte Carlo standard error, as `1.23 ± 0.04`; `1.23` for an exact value."""
    return " ".join(part for part in (nats(e, digits), error_of(e, digits)) if part)


def typeset(text: str) -> str:
    """Return a sentence of a result with the signs that pages use for +- and minus."""
    return re.sub(r"(?<![\w.])-(?=[\d ])", "−", text.replace("+-", "±"))


def percent(value: SupportsFloat) -> str:
    """Return a proportion as a percentage without decimals, or with one decimal below 9.5 %; a dash if not finite."""
    if not math.isfinite(share := float(value)):
        return "–"
    return f"{100 * share:.0f} %" if share == 0 or abs(share) >= 0.095 else f"{100 * share:.1f} %"


def shown_value(value: Value, digits: int) -> str:
    """Return the value of a table cell as text, fractions with `digits` decimal places; a dash for None."""
    if isinstance(value, Estimate):
        return plus_minus(value, digits)
    if isinstance(value, bool) or value is None:
        return "–" if value is None else ("yes" if value else "no")
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f").replace("-", "−")
    return nats(value, digits) if isinstance(value, float) else value


def error_of(e: Estimate, digits: int = 3) -> str:
    """Return the standard error of an estimate, as `± 0.012`; empty text if it is 0 or not finite."""
    return f"± {nats(e.standard_error, digits)}" if e.standard_error and math.isfinite(e.standard_error) else ""


def html_cell(value: Value, digits: int) -> Markup:
    """Return the value of a table cell as HTML, with the standard error in a `span` of class `error`."""
    if isinstance(value, Estimate) and (error := error_of(value, digits)):
        return Markup("{} <span class='error'>{}</span>").format(nats(value, digits), error)
    return Markup("{}").format(legible(shown_value(value, digits)))


def legible(value: Any) -> Any:
    """Return text with U+FFFD in place of control and bidirectional characters, except newline and tab."""
    # Markup, the output of a macro, is clean; `isprintable` is fast for data URIs of pictures, of 100 000 characters
    if not isinstance(value, str) or isinstance(value, Markup) or value.isprintable():
        return value
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Cf") else "\ufffd" for c in value)


# ---------------------------------------------------------------------- tables


def csv_of(table: PageTable) -> str:
    """Return a table as CSV text with all digits; standard errors and kind of estimates are in columns of their own."""
    out = io.StringIO()
    sheet = csv.writer(out, lineterminator="\n")
    titles = [column.title for column in table.columns]
    estimated = [any(isinstance(row[i], Estimate) for row in table.rows) for i in range(len(titles))]
    heads = [[title, *(f"{title} {part}" for part in PARTS if e)] for title, e in zip(titles, estimated, strict=True)]
    lines = [[_values(v, e) for v, e in zip(row, estimated, strict=True)] for row in table.rows]
    sheet.writerows([cell(value) for values in line for value in values] for line in (heads, *lines))
    return out.getvalue()


def _values(value: Value, estimated: bool) -> list[Any]:
    if isinstance(value, Estimate):
        return [value.value, value.standard_error, value.data_error, value.label]
    return [value, *("" for _ in PARTS if estimated)]


def rich_of(table: PageTable) -> Table:
    """Return a table of a page as a rich table, for the terminal."""
    made = Table(title=Text(table.caption), title_justify="left")
    for i, column in enumerate(table.columns):
        justify: Any = "left" if column.is_text or not i else "right"
        made.add_column(Text(column.title), justify=justify, no_wrap=not column.is_text)
    for r, row in enumerate(table.rows):
        cells = [Text(shown_value(v, column.digits)) for v, column in zip(row, table.columns, strict=True)]
        made.add_row(*cells, style="bold" if r in table.strong else None)
    return made


# ---------------------------------------------------------------------- the catalogue


T = TypeVar("T")
FORMATS: dict[str, Callable[..., Any]] = {"nats": nats, "number": nats, "percent": percent, "plus_minus": plus_minus}
WORDS = Catalogue(Path(__file__).with_name("templates"), "*.toml", **FORMATS)
text, texts = WORDS.text, WORDS.texts


def alert(name: str, /, **fields: Any) -> Sentence:
    """Return a sentence of the verdict that reports a problem."""
    return Sentence(text(name, **fields), True)


def tile(name: str, /, **fields: Any) -> Tile:
    """Return a headline number; the entry has its name `what`, its `figure` and its `unit`."""
    return Tile(*(text(f"{name}.{key}", **fields) for key in ("what", "figure", "unit")))


def picture(name: str, made: Figure, /, *, of: str | None = None, **fields: Any) -> Picture:
    """Return a matplotlib figure, drawn at 120 dpi, as a picture of a page; the entry has its `alt` and `caption`.

    Its id is the last part of `name`; for one of several latents the name of this latent, `of`, follows, which is a
    field of the texts as well.
    """
    alt, caption = (text(f"{name}.{key}", of=of, **fields) for key in ("alt", "caption"))
    return Picture(_id(name, of), png(made), alt, caption)


def table(
    name: str, rows: Sequence[tuple[Any, ...]], /, *titles: str, of: str | None = None, digits: int | Sequence[int] = 3,
    strong: tuple[int, ...] = (), folded: bool = False, **fields: Any,
) -> PageTable:  # fmt: skip
    """Return a table of a page; the entry has its caption `table`, and titles of `columns` and of columns of `words`.

    Columns titled `titles` stand between the two. Its id is that of `picture`.
    """
    found, caption = WORDS.entry(name), text(f"{name}.table", of=of, **fields)
    numbers = [*(WORDS.template(title).render(fields) for title in found.get("columns", ())), *titles]
    columns = list(map(PageColumn, numbers, repeat(digits) if isinstance(digits, int) else digits))
    columns += [PageColumn(title, is_text=True) for title in found.get("words", ())]
    return PageTable(_id(name, of), caption, tuple(columns), rows, strong, folded)


def table_of(name: str, found: Figures, /, **fields: Any) -> PageTable:
    """Return the table of one result, a row per term: name, estimate, kind (exact, bound, estimate) and explanation."""
    rows = [(term, e, e.label, meaning) for term, e, meaning in found.known()]
    return table(name, rows, found.unit, title=found.title, **fields)


def _id(name: str, of: str | None) -> str:
    last = name.rpartition(".")[2]
    return last if of is None else f"{last}_{of}"


def section(
    id: str, name: str = "", *, is_appendix: bool = False, scored: bool = False, where: Callable[[Any], Any] = bool
) -> Callable[[Callable[[T], Iterable[Part]]], Callable[[T], PageSection | None]]:
    """Decorate a function that yields the parts of a section: it then returns the section, None if it has no parts.

    The entry `name`, by default the id, has its `title` and its `lead`. Empty sentences are left out. A section that is
    `scored` has no parts for a model without a likelihood, such as a GAN, and none unless `where` holds of its subject.
    """

    def decorate(make: Callable[[T], Iterable[Part]]) -> Callable[[T], PageSection | None]:
        @wraps(make)
        def made(subject: T) -> PageSection | None:
            left_out = (scored and getattr(subject, "implicit", False)) or not where(subject)
            parts = () if left_out else tuple(part for part in make(subject) if part != "")
            words = WORDS.entry(name or id)
            lead = WORDS.template(words.get("lead", "")).render()
            return PageSection(id, words["title"], parts, lead, is_appendix) if parts else None

        return made

    return decorate
