"""Numbers, text and tables of results as a page, a CSV file, the terminal and JSON show them."""

import csv
import io
import math
import re
import unicodedata
from typing import Any, SupportsFloat

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from pvae.analysis.figures.estimate import Estimate, cell
from pvae.analysis.pages.document.blocks import PageTable
from pvae.analysis.pages.plots.base import nats as nats

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
    if not isinstance(value, str) or isinstance(value, Markup):  # Markup, the output of a macro, is clean
        return value
    if value.isprintable():  # fast path, for the data URIs of pictures, which have 100 000 characters
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
