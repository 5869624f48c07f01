"""A page as data: its sections in reading order, and how it becomes HTML, JSON, files and terminal output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pvae.analysis.pages.document.blocks import PageSection, PageTable, Picture, Sentence, Tile
from pvae.analysis.pages.document.folder import PICTURES, TABLES, claim, slug, write_page
from pvae.analysis.pages.document.tables import csv_of, rich_of
from pvae.analysis.pages.document.text import finite, html_cell, legible

if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Document:
    """Page with its sections in reading order."""

    kicker: str
    """Line above the title."""
    title: str
    description: str
    identity: str
    """Which run or runs, when, and on which data."""
    numbers: Mapping[str, Any]
    """First entries of `report.json`."""
    sections: tuple[PageSection, ...]
    footer: str

    @property
    def verdict(self) -> list[Sentence]:
        """Sentences of all sections, alerts first."""
        said = [sentence for section in self.sections for sentence in section.sentences]
        return sorted(said, key=lambda sentence: not sentence.is_alert)

    @property
    def tiles(self) -> list[Tile]:
        """Headline figures of all sections."""
        return [tile for section in self.sections for tile in section.tiles]

    def to_dict(self) -> dict[str, Any]:
        """Return every number, as JSON can hold it."""
        parts = {**self.numbers, "verdict": [{"text": s.text, "alert": s.is_alert} for s in self.verdict]}
        for section in self.sections:
            parts |= section.numbers
        return dict(finite(parts))

    def to_html(self) -> str:
        """Return the page: one file that loads nothing and runs nothing."""
        return _engine().get_template("document.html.j2").render(document=self)

    def write(self, folder: Path, *, figures: bool = False) -> Path:
        """Write page, numbers, a CSV for each table and, on request, a PNG for each picture; returns the page's path.

        Each file is whole or not there. Tables and pictures of an earlier page that this one lacks are removed, and
        nothing else; pictures that an earlier call wrote are written again.

        Raises:
            DataError: the folder holds pages or numbers that no page of pvae wrote, or a link.
            OutputError: it cannot be made, or written to.
        """
        old = claim(folder)
        blocks = [block for section in self.sections for block in section.blocks]
        files = {f"{TABLES}/{slug(b.id)}.csv": csv_of(b).encode() for b in blocks if isinstance(b, PageTable)}
        if figures or any(name.startswith(f"{PICTURES}/") for name in old):
            files |= {f"{PICTURES}/{slug(b.id)}.png": b.png for b in blocks if isinstance(b, Picture)}
        return write_page(folder, old, self.to_dict(), files, self.to_html())

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.padding import Padding
        from rich.text import Text

        parts: list[Any] = [Text(self.title, style="bold")]
        for sentence in self.verdict:
            mark = ("! ", "bold red") if sentence.is_alert else ("- ", "")
            parts.append(Text.assemble(mark, sentence.text))
        for section in self.sections:
            if not section.is_appendix:
                tables = [table for table in section.of(PageTable) if not table.folded]
                parts += [Padding(rich_of(table), (1, 0, 0, 0)) for table in tables]
        return Group(*parts)


@cache
def _engine() -> Environment:
    """Return the template engine, which compiles a template once for all pages."""
    engine = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=legible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters |= {"kind": lambda block: type(block).__name__, "cell": html_cell}
    return engine
