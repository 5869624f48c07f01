"""Results made of named estimates, shown as text, table, data frame, HTML and JSON."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from pvae.analysis.figures.estimate import Estimate

if TYPE_CHECKING:
    import pandas
    from rich.table import Table

Row = tuple[str, Estimate | None, str]
"""Row of a table of results: name of the term, its estimate (None where it is not defined), and its meaning."""


def cell(value: object) -> object:
    """Return a value as a CSV cell that no spreadsheet evaluates as a formula; numbers stay numbers."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return value
    return f"'{value}"


class Figures(ABC):
    """Base class of results that consist of named estimates, shown as text, table, data frame, HTML and JSON."""

    unit: ClassVar[str] = "nats"
    """Unit of the estimates, per datum."""
    counts: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes (numbers of rows, settings) that `to_dict` puts before the estimates."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Title of the table: the quantity, its unit and the number of data."""

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """Yield the rows of the table (term, estimate or None, meaning) in reading order."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """Sentences below the table."""
        return ()

    def described(self, **meanings: str) -> Iterator[Row]:
        """Yield rows of estimates that are attributes of the result, each name with its meaning."""
        return ((name, getattr(self, name), meaning) for name, meaning in meanings.items())

    def known(self) -> Iterator[tuple[str, Estimate, str]]:
        """Yield the rows of the table whose estimate is defined."""
        for name, figure, meaning in self.rows():
            if figure is not None:
                yield name, figure, meaning

    def figures(self) -> dict[str, Any]:
        """Return the estimates of all rows by term, as plain numbers and strings for JSON."""
        return {name: None if figure is None else figure.to_dict() for name, figure, _ in self.rows()}

    def facts(self) -> dict[str, Any]:
        """Return the attributes named in `counts`, for JSON."""
        return {name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in self.counts}

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes in `counts` and all estimates, as plain numbers and strings for JSON."""
        return {**self.facts(), **self.figures()}

    def to_frame(self) -> pandas.DataFrame:
        """Return a data frame with one row per term: value, errors, kind and note."""
        import pandas

        return pandas.DataFrame([{"term": name, **e.to_dict()} for name, e, _ in self.known()]).set_index("term")

    def table(self) -> Table:
        """Return the estimates as a rich table."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.title), caption=Text("\n".join(self.remarks)), caption_justify="left")
        for column, justify in (("term", "left"), ("value", "right"), ("std error", "right"), ("kind", "left")):
            table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        table.add_column("what it is")
        for name, e, meaning in self.known():
            error = f"{e.standard_error:.4f}" if e.standard_error else ""
            table.add_row(Text(name), f"{e.value:.4f}", error, e.label, Text(meaning))
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [f"{name:28s} {e}" for name, e, _ in self.known()]
        return "\n".join([self.title, *lines, *self.remarks])

    def _repr_html_(self) -> str:
        body = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{e.value:.4f}</td><td>{e.standard_error:.4f}</td>"
            f"<td>{html.escape(e.label)}</td><td>{html.escape(meaning)}</td></tr>"
            for name, e, meaning in self.known()
        )
        unit = html.escape(self.unit)
        head = f"<tr><th>term</th><th>{unit}</th><th>std error</th><th>kind</th><th></th></tr>"
        remarks = "".join(f"<p>{html.escape(text)}</p>" for text in self.remarks)
        return f"<table><caption>{html.escape(self.title)}</caption>{head}{body}</table>{remarks}"
