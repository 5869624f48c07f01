"""Page of a report: its sections in reading order, progress while they are computed, and output in several formats.

The formats are HTML, JSON, terminal text and files in a folder. Files are written atomically, and a folder with HTML
that pvae did not write is refused.
"""

import re
from collections.abc import Callable, Mapping
from functools import cache
from html import escape
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Group
from rich.padding import Padding
from rich.text import Text

from pvae.analysis.pages.document.blocks import PageSection, PageTable, Picture, Question, Sentence, Tile
from pvae.analysis.pages.document.words import WORDS, csv_of, html_cell, legible, rich_of, text
from pvae.errors import OutputError, refuse
from pvae.runs.find import Claim, is_abandoned, leftovers
from pvae.util import Record, StageProgress, silent
from pvae.util.files import digest, make_folder, plain, pretty, raising, read_object, remove, write_together

PAGE, NUMBERS, TABLES, PICTURES, FILES = "index.html", "report.json", "tables", "figures", "files"
FILE_NAME_CHARACTERS = 80
"""Longest file name, without its extension, that is not shortened."""
NUMBERS_BYTES = 1 << 28
"""Largest `report.json` of an earlier page that is read, in bytes."""
RUNNING_TEXT = re.compile("(<(?:p|li|figcaption)(?: [^>]*)?>|</b>)([^<]+)")
"""The text of a paragraph, an item or a caption of a page, after its tag."""
OWN = re.compile(rf"{TABLES}/[\w.-]+\.csv|{PICTURES}/[\w.-]+\.png", re.ASCII)
"""Relative paths that the CSV and PNG files of a page can have."""


class Document(Record):
    """Page of a report or comparison: title, sections in reading order, and footer."""

    kicker: str
    """Short line of text above the title."""
    title: str
    description: str
    identity: str
    """Line below the title: the run or runs, the start of the run, and the data."""
    numbers: Mapping[str, Any]
    """Entries at the start of `report.json`, before those of the sections."""
    sections: tuple[PageSection, ...]
    footer: str

    @property
    def verdict(self) -> list[Sentence]:
        """Sentences at the top of the page, collected from all sections; alerts come first."""
        return sorted(self._of(Sentence), key=lambda sentence: not sentence.is_alert)

    @property
    def alerts(self) -> list[Sentence]:
        """Sentences of the verdict that report a problem; the first screen shows the first three."""
        return [sentence for sentence in self.verdict if sentence.is_alert]

    @property
    def glance(self) -> PageSection | None:
        """Section with the answers of the first screen; None for a page without one, which starts with the verdict."""
        return next((section for section in self.sections if any(section.of(Question))), None)

    @property
    def body(self) -> list[PageSection]:
        """Sections below the first screen."""
        return [section for section in self.sections if section.is_shown and section is not self.glance]

    @property
    def tiles(self) -> list[Tile]:
        """Headline numbers at the top of the page, collected from all sections."""
        return self._of(Tile)

    def _of(self, kind: Any) -> list[Any]:
        return [part for section in self.sections for part in section.of(kind)]

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers of the page as `report.json` holds them; NaN and infinities become None."""
        parts = {**self.numbers, "verdict": [{"text": s.text, "alert": s.is_alert} for s in self.verdict]}
        for numbers in self._of(Mapping):
            parts |= numbers
        return dict(plain(parts))

    def to_html(self) -> str:
        """Return the page as a self-contained HTML file, without scripts or external resources."""
        page = engine().get_template("document.html.j2").render(document=self)
        return explained(page, **WORDS.entry("glossary")) if self.glance else page

    def write(self, folder: Path, *, figures: bool = False) -> Path:
        """Write `index.html`, `report.json` and a CSV file per table into a folder; return the path of the HTML file.

        If `figures` is set, or an earlier page of the folder has them, each picture is also written as PNG. Each file
        is written under another name before the first is replaced: an error leaves an earlier page whole. The HTML is
        replaced last: if it is new, all other files are new. Tables and pictures that only an earlier page has are
        removed; other files stay.

        Raises:
            DataError: the folder holds an `index.html` or `report.json` that pvae did not write, or a link.
            OutputError: the folder cannot be created, or a file cannot be written.
        """
        old = earlier(folder)
        files = {f"{TABLES}/{slug(table.id)}.csv": csv_of(table).encode() for table in self._of(PageTable)}
        if figures or any(name.startswith(f"{PICTURES}/") for name in old):
            files |= {f"{PICTURES}/{slug(picture.id)}.png": picture.png for picture in self._of(Picture)}
        listed, page = {**self.to_dict(), FILES: sorted(files)}, self.to_html()
        for name in sorted({name.split("/")[0] for name in (*files, *old)}):
            make_folder(folder / name)
        whole: dict[str, str | bytes] = {NUMBERS: pretty(listed), **files, PAGE: page}
        write_together({folder / name: content for name, content in whole.items()})
        for name in old - files.keys():
            (folder / name).unlink(missing_ok=True)
        return folder / PAGE

    def __rich__(self) -> Group:
        said = [Text.assemble(("! ", "bold red") if s.is_alert else ("- ", ""), s.text) for s in self.verdict]
        shown = chain.from_iterable(section.of(PageTable) for section in self.sections if not section.is_appendix)
        tables = [Padding(rich_of(table), (1, 0, 0, 0)) for table in shown if not table.folded]
        return Group(Text(self.title, style="bold"), *said, *tables)


def explained(page: str, terms: Mapping[str, str], title: str) -> str:
    """Return an HTML page with a glossary of the terms in its running text; the first place of each points there."""
    number = {term: i for i, term in enumerate(terms, 1)}
    longest_first = map(re.escape, sorted(terms, key=len, reverse=True))
    known = re.compile(rf"(?<![\w(])(?:{'|'.join(longest_first)})(?!\w|\.\w)")

    def pointed(found: re.Match[str]) -> str:
        at = number.pop(term := found[0], None)
        return f'<a class="term" href="#term-{at}" title="{escape(terms[term])}">{term}</a>' if at else term

    page = RUNNING_TEXT.sub(lambda text: f"{text[1]}{known.sub(pointed, text[2])}", page)
    used = [(i, term, meaning) for i, (term, meaning) in enumerate(terms.items(), 1) if term not in number]
    return page.replace(
        "</main>", engine().get_template("glossary.html.j2").render(terms=used, title=title) + "</main>"
    )


@cache
def engine() -> Environment:
    """Return the Jinja environment of the templates; it is cached, so that each template is compiled only once."""
    loader, blocks = FileSystemLoader(Path(__file__).parent / "templates"), ("trim_blocks", "lstrip_blocks")
    alone: Any = dict.fromkeys(blocks, True)
    found = Environment(loader=loader, autoescape=True, finalize=legible, undefined=StrictUndefined, **alone)
    found.filters |= {"kind": lambda block: type(block).__name__, "cell": html_cell}
    return found


# ---------------------------------------------------------------------- folder


def claimed(folder: Path) -> Claim:
    """Return the claim of a page's folder: the context in which one process makes and writes the page.

    Raises:
        BusyError: another process makes a page there.
        DataError, OutputError: as `earlier`.
    """
    earlier(folder)
    return Claim(folder / ".lock", "a page")


def earlier(folder: Path) -> set[str]:
    """Create the folder of a page, with its parents, or reuse that of an earlier page.

    Returns:
        The relative paths of the CSV and PNG files that the earlier page wrote; empty for a new folder.

    Raises:
        DataError: the folder holds an `index.html` or `report.json` that pvae did not write.
        OutputError: the folder cannot be created.
    """
    with raising(OutputError, f"{folder}: expected a folder"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    make_folder(folder)
    if not any((folder / name).exists() for name in (PAGE, NUMBERS)):
        return set()
    found = read_object(folder, NUMBERS, NUMBERS_BYTES) if (folder / NUMBERS).exists() else {}
    refuse("verdict" not in found, text("page.other_pages", folder=folder))
    for path in filter(is_abandoned, leftovers(folder)):
        remove(path, ignore_errors=True)
    listed = found.get(FILES)
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    return {name for name in names if OWN.fullmatch(name)}


def slug(name: str) -> str:
    """Return a valid file name for the id of a table or picture; different ids give different file names."""
    if len(plain := re.sub(r"[^A-Za-z0-9._]", lambda m: f"-{ord(m.group()):x}", name) or "-") <= FILE_NAME_CHARACTERS:
        return plain
    return f"{plain[:FILE_NAME_CHARACTERS]}-{digest(name.encode(errors='surrogatepass'))[:16]}"


T = TypeVar("T")
STAGE_UNITS = 100
"""Units of progress that one stage counts for."""


class Stages:
    """Reporter of the progress of a page in stages; it never falls, although the parts of a stage are not known ahead.

    Arguments:
        total: number of stages.
        on_progress: called with (units done, total units, name of the stage and of its part).
    """

    def __init__(self, total: int = 1, on_progress: StageProgress = silent) -> None:
        self.total, self.on_progress = total, on_progress
        self.stage, self.done, self.inside = "", -1, 0.0

    def begin(self, stage: str) -> None:
        """Start the next stage, which completes the one before, and report its name."""
        self.stage, self.done, self.inside = stage, self.done + 1, 0.0
        self._tell(self.inside, stage)

    def part(self, name: str) -> Callable[..., None]:
        """Return a `Progress` or `StageProgress` for a part of the present stage, half of the stage's remainder."""
        start = self.inside

        def report(done: int, total: int, _stage: str = "", /) -> None:
            self.inside = max(self.inside, start + (1 - start) / 2 * done / max(total, 1))
            self._tell(self.inside, f"{self.stage}: {name}" if self.stage else name)

        return report

    def _tell(self, inside: float, what: str) -> None:
        self.on_progress(STAGE_UNITS * max(self.done, 0) + int(STAGE_UNITS * inside), STAGE_UNITS * self.total, what)

    def sections(self, table: Mapping[str, Callable[[T], PageSection | None]], subject: T) -> tuple[PageSection, ...]:
        """Return the sections of a page: each function of `table` is called on `subject`, as one stage; drop Nones."""
        found: list[PageSection] = []
        for name, make in table.items():
            self.begin(name)
            found += filter(None, [make(subject)])
        self.begin("written")
        return tuple(found)
