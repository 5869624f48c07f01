"""A report as data: sections of text, tables and pictures; how they leave as HTML, JSON, CSV, PNG and text."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.figures.table import Figures, cell
from pvae.analysis.pages import plots
from pvae.errors import DataError, OutputError
from pvae.util.files import make_folder, read_object, write_atomic

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table as RichTable

Value = Estimate | float | int | str | None
"""What a cell of a table holds; None is shown as a dash."""
PAGE, NUMBERS, TABLES, PICTURES, FILES = "index.html", "report.json", "tables", "figures", "files"
LONGEST = 80
"""Characters of a name that a file bears in full."""
LARGEST = 1 << 28
"""Bytes of the numbers of an earlier report."""
OWN = re.compile(rf"{TABLES}/[\w.-]+\.csv|{PICTURES}/[\w.-]+\.png", re.ASCII)
"""Files that a report writes beside its page."""


# ---------------------------------------------------------------------- parts


@dataclass(frozen=True)
class Sentence:
    """One sentence of the verdict; an alert names the knob to turn."""

    text: str
    is_alert: bool = False


@dataclass(frozen=True)
class Tile:
    """A headline figure."""

    what: str
    figure: str
    unit: str
    """Its unit, and what it is of."""


@dataclass(frozen=True)
class Picture:
    """A figure with words for those who cannot see it, and what to look for for those who can."""

    id: str
    png: bytes = field(repr=False)
    alt: str
    caption: str

    @property
    def source(self) -> str:
        """Data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


def picture(id: str, made: Figure, alt: str, caption: str) -> Picture:
    """A figure, drawn at 120 dpi."""
    return Picture(id, plots.png(made), alt, caption)


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    title: str
    digits: int = 3
    """Of numbers."""
    is_text: bool = False
    """Whether it holds words, which may be long."""


@dataclass(frozen=True)
class Table:
    """Figures in rows; the first column names them."""

    id: str
    caption: str
    """What it holds, of which data, in which unit."""
    columns: tuple[Column, ...]
    rows: Sequence[tuple[Any, ...]]
    """Of `Value`s, one for each column."""
    strong: tuple[int, ...] = ()
    """Rows that are set in bold."""
    folded: bool = False
    """Whether it is shown on demand: figures that a picture shows already."""

    def to_csv(self) -> str:
        """One line for each row; an estimate has its error and kind beside it, numbers in full."""
        out = io.StringIO()
        sheet = csv.writer(out, lineterminator="\n")
        parts = [self._parts(i) for i in range(len(self.columns))]
        sheet.writerow([cell(name) for i, column in enumerate(self.columns) for name in _names(column.title, parts[i])])
        for row in self.rows:
            sheet.writerow([cell(value) for i, v in enumerate(row) for value in _values(v, parts[i])])
        return out.getvalue()

    def _parts(self, i: int) -> tuple[str, ...]:
        """What there is to say of the estimates of a column besides their value."""
        found = [row[i] for row in self.rows if isinstance(row[i], Estimate)]
        return ("error", "data_error", "kind") if found else ()

    def rich(self) -> RichTable:
        """For a terminal."""
        from rich.table import Table as Made
        from rich.text import Text

        made = Made(title=Text(self.caption), title_justify="left")
        for i, column in enumerate(self.columns):
            made.add_column(
                Text(column.title), justify="left" if column.is_text or not i else "right", no_wrap=not column.is_text
            )
        for r, row in enumerate(self.rows):
            cells = [Text(shown_value(v, column.digits)) for v, column in zip(row, self.columns, strict=True)]
            made.add_row(*cells, style="bold" if r in self.strong else None)
        return made


def _names(title: str, parts: Sequence[str]) -> list[str]:
    return [title, *(f"{title} {part.replace('_', ' ')}" for part in parts)]


def _values(value: Value, parts: Sequence[str]) -> list[Any]:
    if not parts:
        return [value]
    if not isinstance(value, Estimate):
        return [value, *("" for _ in parts)]
    return [value.value, value.standard_error, value.data_error, value.label]


@dataclass(frozen=True)
class Note:
    """A quiet paragraph."""

    text: str


@dataclass(frozen=True)
class Code:
    """Lines as they stand: a declaration, formulas."""

    text: str
    label: str
    """What it is, for those who hear the page."""
    folded: bool = False
    """Whether it is shown on demand."""


Block = Picture | Table | Note | Code


@dataclass(frozen=True)
class Section:
    """One part of a report."""

    id: str
    title: str
    blocks: tuple[Block, ...] = ()
    lead: str = ""
    """One paragraph before them."""
    sentences: tuple[Sentence, ...] = ()
    """What it adds to the verdict."""
    tiles: tuple[Tile, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Every number of it, by key of `report.json`; one key belongs to one section."""
    is_appendix: bool = False
    """Whether it is left out of a terminal."""

    def of(self, kind: type[Any]) -> Iterator[Any]:
        """Its blocks of one kind."""
        return (block for block in self.blocks if isinstance(block, kind))


# ---------------------------------------------------------------------- the whole


@dataclass(frozen=True)
class Document:
    """A report: what it is of, and its sections in reading order."""

    kicker: str
    title: str
    description: str
    identity: str
    """Which run, when."""
    numbers: Mapping[str, Any]
    """What `report.json` begins with."""
    sections: tuple[Section, ...]
    footer: str

    @property
    def verdict(self) -> list[Sentence]:
        """What the sections say: alerts first."""
        said = [sentence for section in self.sections for sentence in section.sentences]
        return sorted(said, key=lambda sentence: not sentence.is_alert)

    @property
    def tiles(self) -> list[Tile]:
        """The headline figures."""
        return [tile for section in self.sections for tile in section.tiles]

    def to_dict(self) -> dict[str, Any]:
        """Every number, as JSON can hold it."""
        verdict = [{"text": s.text, "alert": s.is_alert} for s in self.verdict]
        parts: dict[str, Any] = {**self.numbers, "verdict": verdict}
        for section in self.sections:
            parts |= section.numbers
        found = finite(parts)
        assert isinstance(found, dict)  # noqa: S101 - of a dict
        return found

    def to_html(self) -> str:
        """The page: one file that loads nothing and runs nothing."""
        engine = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            finalize=legible,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        engine.filters |= {"kind": lambda block: type(block).__name__, "cell": _html_cell}
        return engine.get_template("document.html.j2").render(document=self)

    def write(self, folder: Path, *, figures: bool = False) -> Path:
        """Write page, numbers, a CSV for each table and, on request, a PNG for each picture; returns the page's path.

        Each file is whole or not there. Tables and pictures that an earlier report wrote and this one lacks are taken
        away, and nothing else; pictures once asked for are kept fresh. The page comes last: where it is new, all is.

        Raises:
            DataError: the folder holds pages or numbers that are of no report, or a link.
            OutputError: it cannot be made, or written to.
        """
        old = claim(folder)
        blocks = [block for section in self.sections for block in section.blocks]
        files = {f"{TABLES}/{slug(b.id)}.csv": b.to_csv().encode() for b in blocks if isinstance(b, Table)}
        if figures or any(name.startswith(f"{PICTURES}/") for name in old):
            files |= {f"{PICTURES}/{slug(b.id)}.png": b.png for b in blocks if isinstance(b, Picture)}
        for name in sorted({name.split("/")[0] for name in (*files, *old)}):
            make_folder(folder / name)
        numbers = {**self.to_dict(), FILES: sorted(files)}
        write_atomic(folder / NUMBERS, json.dumps(numbers, indent=2, allow_nan=False, ensure_ascii=True) + "\n")
        for name, content in files.items():
            write_atomic(folder / name, content)
        for name in old - files.keys():
            (folder / name).unlink(missing_ok=True)
        write_atomic(folder / PAGE, self.to_html())
        return folder / PAGE

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
                tables = [table for table in section.of(Table) if not table.folded]
                parts += [Padding(table.rich(), (1, 0, 0, 0)) for table in tables]
        return Group(*parts)


def claim(folder: Path) -> set[str]:
    """Make a folder, with its parents, or take that of an earlier report: the files that one wrote.

    Raises:
        DataError: it holds an `index.html` or `report.json` that no report wrote.
        OutputError: it cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise OutputError(f"{folder}: expected a folder; got {problem.strerror}.") from problem
    make_folder(folder)
    if not any((folder / name).exists() for name in (PAGE, NUMBERS)):
        return set()
    found = read_object(folder, NUMBERS, LARGEST) if (folder / NUMBERS).exists() else {}
    if "verdict" not in found:
        raise DataError(
            f"{folder}: expected an empty folder, or one of an earlier report; got other pages. Say another with --out."
        )
    listed = found.get(FILES)
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    return {name for name in names if OWN.fullmatch(name)}


def slug(name: str) -> str:
    """A name as a file can bear it; other names, other files."""
    plain = re.sub(r"[^A-Za-z0-9._]", lambda m: f"-{ord(m.group()):x}", name) or "-"
    if len(plain) <= LONGEST:
        return plain
    return f"{plain[:LONGEST]}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:16]}"


# ---------------------------------------------------------------------- how things read


def nats(value: float | Estimate, digits: int = 2) -> str:
    """A figure with a true minus sign; a dash where there is none."""
    number = float(value)
    return plots.nats(number, digits) if math.isfinite(number) else "–"


def percent(value: float) -> str:
    """A share in whole per cent; small ones with a digit more."""
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:.0f} %" if value == 0 or abs(value) >= 0.095 else f"{100 * value:.1f} %"


def shown_value(value: Value, digits: int) -> str:
    """A cell as text."""
    if isinstance(value, Estimate):
        return " ".join(part for part in (nats(value, digits), error_of(value, digits)) if part)
    if isinstance(value, bool) or value is None:
        return "–" if value is None else ("yes" if value else "no")
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f").replace("-", "−")
    return nats(value, digits) if isinstance(value, float) else value


def error_of(e: Estimate, digits: int = 3) -> str:
    """`± 0.012`, or nothing for an exact figure."""
    return f"± {nats(e.standard_error, digits)}" if e.standard_error and math.isfinite(e.standard_error) else ""


def _html_cell(value: Value, digits: int) -> Markup:
    """A cell as HTML: the error is quiet."""
    if isinstance(value, Estimate) and (error := error_of(value, digits)):
        return Markup("{} <span class='error'>{}</span>").format(nats(value, digits), error)
    return Markup("{}").format(legible(shown_value(value, digits)))


def legible(value: Any) -> Any:
    """Text without control characters or marks that turn its direction; newlines stay."""
    if not isinstance(value, str) or isinstance(value, Markup):  # Markup is a macro's own output, cleaned inside
        return value
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Cf") else "\ufffd" for c in value)


def finite(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinities become null, what is unknown its text."""
    if isinstance(value, Estimate):
        return finite(value.to_dict())
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def table_of(id: str, figures: Figures, caption: str = "", digits: int = 3) -> Table:
    """A result as a table: term, figure, kind, what it is."""
    return Table(
        id,
        caption or figures.title,
        (
            Column("term"),
            Column(figures.unit, digits),
            Column("kind", is_text=True),
            Column("what it is", is_text=True),
        ),
        tuple((name, e, e.label, meaning) for name, e, meaning in figures.known()),
    )


def side_by_side(results: Mapping[str, Figures]) -> list[tuple[Any, ...]]:
    """Several results of one kind: a row per term, with its name, a figure (or None) for each, and what it is.

    Terms come in the order of the result that has most of them, then those that only others have.
    """
    listed = sorted(([*result.rows()] for result in results.values()), key=len, reverse=True)
    terms = {term: meaning for rows in listed for term, _, meaning in rows}
    columns = [{term: e for term, e, _ in result.rows()} for result in results.values()]
    rows = [(term, *(column.get(term) for column in columns), meaning) for term, meaning in terms.items()]
    return [row for row in rows if any(e is not None for e in row[1:-1])]
