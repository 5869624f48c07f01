"""Words of pages: titles, captions and sentences of the catalogue, with the results of a run filled in.

The catalogue is every TOML file of `templates/`, a table for each section of a page. Its texts hold results as Jinja
fields, such as `{{ gap | nats }}`. An entry is known by its dotted name, such as `guide.khat`; an unknown entry, or a
field that is not given, is an error. Names from outside are escaped by the page, not here.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, reduce, wraps
from itertools import repeat
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, StrictUndefined, Template
from matplotlib.figure import Figure

from pvae.analysis.figures.estimate import Figures
from pvae.analysis.pages.document.blocks import PageColumn, PageSection, PageTable, Part, Picture, Sentence, Tile
from pvae.analysis.pages.document.text import percent, plus_minus
from pvae.analysis.pages.plots.base import nats, png
from pvae.util import toml

T = TypeVar("T")
TEMPLATES = Path(__file__).with_name("templates")
ENGINE = Environment(undefined=StrictUndefined)
ENGINE.filters |= {"nats": nats, "number": nats, "percent": percent, "plus_minus": plus_minus}


@cache
def catalogue() -> dict[str, Any]:
    """Return the texts of all files of the catalogue, by section."""
    return {name: entry for path in sorted(TEMPLATES.glob("*.toml")) for name, entry in toml.read(path).items()}


@cache
def _template(words: str) -> Template:
    return ENGINE.from_string(" ".join(words.split()))


def entry(name: str) -> Any:
    """Return an entry of the catalogue, a text or a table of texts, by its dotted name; KeyError if there is none."""
    return reduce(getitem, name.split("."), catalogue())


def text(name: str, /, **fields: Any) -> str:
    """Return a text of the catalogue with its fields filled in, on one line."""
    return _template(entry(name)).render(fields)


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
    name: str,
    rows: Sequence[tuple[Any, ...]],
    /,
    *titles: str,
    of: str | None = None,
    digits: int | Sequence[int] = 3,
    strong: tuple[int, ...] = (),
    folded: bool = False,
    **fields: Any,
) -> PageTable:
    """Return a table of a page; the entry has its caption `table`, and titles of `columns` and of columns of `words`.

    Columns titled `titles` stand between the two. Its id is that of `picture`.
    """
    found, caption = entry(name), text(f"{name}.table", of=of, **fields)
    numbers = [*(_template(title).render(fields) for title in found.get("columns", ())), *titles]
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
            words = entry(name or id)
            lead = _template(words.get("lead", "")).render()
            return PageSection(id, words["title"], parts, lead, is_appendix) if parts else None

        return made

    return decorate
