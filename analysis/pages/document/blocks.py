"""Parts of a page as data: sentences, tiles, pictures, tables, notes and listings, gathered in sections."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from pvae.analysis.pages import plots


@dataclass(frozen=True)
class Sentence:
    """One sentence of the verdict; an alert says which setting to change."""

    text: str
    is_alert: bool = False


@dataclass(frozen=True)
class Tile:
    """Headline figure."""

    what: str
    figure: str
    unit: str
    """Its unit, and the rows or samples it was computed on."""


@dataclass(frozen=True)
class Picture:
    """Figure with an alternative text, and a caption that says what to look for."""

    id: str
    png: bytes = field(repr=False)
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """Data URI of the PNG."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def picture(id: str, made: Figure, alt: str, caption: str) -> Picture:
    """Draw a figure at 120 dpi."""
    return Picture(id, plots.png(made), alt, caption)


@dataclass(frozen=True)
class PageColumn:
    """One column of a table."""

    title: str
    digits: int = 3
    """Digits after the point of its numbers."""
    is_text: bool = False
    """True for words, which may be long."""


def columns(*titles: str, digits: int = 3, words: Sequence[str] = ()) -> tuple[PageColumn, ...]:
    """Columns of numbers (the first names the rows), then columns of words."""
    return (*(PageColumn(title, digits) for title in titles), *(PageColumn(title, is_text=True) for title in words))


@dataclass(frozen=True)
class PageTable:
    """Figures in rows; the first column names them."""

    id: str
    caption: str
    """Contents of the table: which figures, of which data, in which unit."""
    columns: tuple[PageColumn, ...]
    rows: Sequence[tuple[Any, ...]]
    """One `Value` for each column."""
    strong: tuple[int, ...] = ()
    """Rows set in bold."""
    folded: bool = False
    """True for a table shown on demand, of figures that a picture shows already."""


@dataclass(frozen=True)
class Note:
    """Paragraph in a quiet colour."""

    text: str


@dataclass(frozen=True)
class Listing:
    """Preformatted lines: a declaration, formulas."""

    text: str
    label: str
    """Description for screen readers, and the title of a folded one."""
    folded: bool = False
    """True for a listing shown on demand."""


Block = Picture | PageTable | Note | Listing


@dataclass(frozen=True)
class PageSection:
    """One part of a page."""

    id: str
    title: str
    """Heading; a section without one holds numbers only and is not shown."""
    blocks: tuple[Block, ...] = ()
    lead: str = ""
    """Paragraph before the blocks."""
    sentences: tuple[Sentence, ...] = ()
    """Its part of the verdict."""
    tiles: tuple[Tile, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Its numbers by key of `report.json`; no two sections share a key."""
    is_appendix: bool = False
    """True for a section that a terminal does not show."""

    def of(self, kind: type[Any]) -> Iterator[Any]:
        """Return its blocks of one kind."""
        return (block for block in self.blocks if isinstance(block, kind))
