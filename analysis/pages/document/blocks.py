"""Building blocks of a page: sentences, tiles, pictures, tables, notes and listings, grouped in sections."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pvae.util import Record, field


class Sentence(Record):
    """One sentence of the verdict, the summary at the top of a page.

    An alert (`is_alert`) reports a problem, and the setting that may solve it.
    """

    text: str
    is_alert: bool = False


class Tile(Record):
    """Headline number at the top of a page, with its name and unit."""

    what: str
    figure: str
    unit: str
    """Unit of the number, and the rows or samples that it was computed on."""


class Picture(Record):
    """Figure of a page as PNG, with an alternative text, and a caption that tells how to read it."""

    id: str
    png: bytes = field(repr=False)
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """Data URI of the PNG, for the `src` of an HTML image."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


class Question(Record):
    """Question that the first screen answers, with the sentences and headline numbers of the answer."""

    question: str
    said: Sequence[str] = ()
    tiles: Sequence[Tile] = ()


class PageColumn(Record):
    """Title and number format of one column of a table."""

    title: str
    digits: int = 3
    """Decimal places of the numbers of the column."""
    is_text: bool = False
    """True for a column of text, which is aligned left and may wrap."""


class PageTable(Record):
    """Table of numbers; the first column holds the names of the rows."""

    id: str
    caption: str
    """Description of the table: its quantities, their data and their unit."""
    columns: tuple[PageColumn, ...]
    rows: Sequence[tuple[Any, ...]]
    """Rows of the table, each a tuple with one `Value` per column."""
    strong: tuple[int, ...] = ()
    """Indices of the rows set in bold."""
    folded: bool = False
    """True for a table that is collapsed until the reader opens it, as its numbers are plotted in a picture."""


class Note(Record):
    """Paragraph of a section set in a muted colour: a remark on the results."""

    text: str


class Listing(Record):
    """Preformatted text, such as the declaration of a model or its formulas."""

    text: str
    label: str
    """Description for screen readers; also the title of the listing if it is collapsed."""
    folded: bool = False
    """True for a listing that is collapsed until the reader opens it."""


Block = Picture | PageTable | Note | Listing | Question
Part = Block | Sentence | Tile | str | Mapping[str, Any]
"""Part of a section; a string is a sentence of the verdict without an alert, a mapping holds numbers for JSON."""


class PageSection(Record):
    """Section of a page: a heading, blocks in reading order, and its part of the verdict, tiles and JSON numbers."""

    id: str
    title: str
    parts: Sequence[Part]
    """Blocks in reading order; sentences for the verdict and tiles, both at the top of the page; and mappings.

    The mappings are entries of `report.json`; no two sections share a key.
    """
    lead: str = ""
    """Introductory paragraph, shown before the blocks of the section."""
    is_appendix: bool = False
    """True for a section whose tables are omitted from terminal output."""

    def of(self, kind: Any) -> Iterator[Any]:
        """Return the parts of the section that are instances of a class, such as `PageTable`, or of a union."""
        parts = (Sentence(part) if isinstance(part, str) else part for part in self.parts)
        return (part for part in parts if isinstance(part, kind))

    @property
    def blocks(self) -> list[Block]:
        """Blocks in reading order."""
        return list(self.of(Block))

    @property
    def is_shown(self) -> bool:
        """True for a section with blocks or a lead; of others only sentences, tiles and numbers are on the page."""
        return bool(self.blocks or self.lead)
