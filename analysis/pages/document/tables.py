"""Tables of a page: their rows from results with estimates, and their output as CSV and in the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from pvae.analysis.figures.estimate import Estimate, Figures, cell
from pvae.analysis.pages.document.blocks import PageTable, columns
from pvae.analysis.pages.document.text import Value, shown_value

PARTS = ("error", "data error", "kind")
"""Extra columns after each column of estimates in a CSV file: Monte Carlo error, error over data, and kind."""


def table_of(id: str, figures: Figures, caption: str = "", digits: int = 3) -> PageTable:
    """Return the table of one result, a row per term: name, estimate, kind (exact, bound, estimate) and explanation."""
    titles = columns("term", figures.unit, digits=digits, words=("kind", "what it is"))
    return PageTable(
        id, caption or figures.title, titles, [(name, e, e.label, meaning) for name, e, meaning in figures.known()]
    )


def side_by_side(results: Mapping[str, Figures]) -> list[tuple[Any, ...]]:
    """Return rows that compare results of one kind: a term, its estimate in each result or None, its explanation.

    Terms are in the order of the result with the most terms, followed by those of other results only.
    """
    listed = sorted(([*result.rows()] for result in results.values()), key=len, reverse=True)
    terms = {term: meaning for rows in listed for term, _, meaning in rows}
    found = [{term: e for term, e, _ in result.rows()} for result in results.values()]
    rows = [(term, *(figures.get(term) for figures in found), meaning) for term, meaning in terms.items()]
    return [row for row in rows if any(e is not None for e in row[1:-1])]


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
