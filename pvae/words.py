"""Texts of errors, remarks and results, which stand in catalogues apart from the code.

A catalogue is a set of TOML files whose texts are Jinja templates. Only they are templates: values that are filled in
are data, are not escaped for HTML, and are never evaluated. Entries of `pvae/<room>/words.toml` are known by room,
module and a name, such as `pair.enumeration.masked`; errors are made of them by `PvaeError.of`.
"""

import html
import tomllib
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import cache, cached_property, reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment, Template


def near(name: str, names: Iterable[str]) -> str:
    """Return the hint `` (did you mean 'a' or 'b'?)`` with the names similar to ``name``; an empty text if none is."""
    close = get_close_matches(name, list(names), n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""


class Catalogue:
    """Texts in the TOML files of a folder; files and Jinja are loaded when the first text is asked for.

    Lines of an entry may be broken anywhere between words: white space counts as one space. An unknown entry, or a
    field that is not given, is an error.

    Arguments:
        folder: the folder.
        pattern: glob pattern of the files; each has tables of its own.
        filters: filters of the templates, beside Jinja's, `repr`, `html` (escaped), `class` (name of its class) and
            `near` (hint to similar names).
    """

    def __init__(self, folder: Path, pattern: str, **filters: Callable[..., Any]) -> None:
        self.folder, self.pattern, self.filters = folder, pattern, filters

    @cached_property
    def entries(self) -> dict[str, Any]:
        """Tables of all files by name."""
        files = [tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(self.folder.glob(self.pattern))]
        return {name: table for found in files for name, table in found.items()}

    @cached_property
    def engine(self) -> "Environment":
        """Jinja environment of the templates."""
        from jinja2 import Environment, StrictUndefined

        engine = Environment(undefined=StrictUndefined, finalize=format)  # as an f-string has it
        own = {"repr": repr, "html": html.escape, "class": lambda v: type(v).__name__, "near": near}
        engine.filters |= {**own, **self.filters}
        return engine

    @cached_property
    def template(self) -> Callable[[str], "Template"]:
        """Function that compiles a text, once."""
        return cache(lambda source: self.engine.from_string(" ".join(source.split())))

    def entry(self, name: str) -> Any:
        """Return an entry, a text or texts, by its dotted name; KeyError if there is none."""
        return reduce(getitem, name.split("."), self.entries)

    def text(self, name: str, /, **fields: Any) -> str:
        """Return a text, its fields filled in; empty if it does not apply."""
        return self.template(self.entry(name)).render(fields)

    def texts(self, name: str, /, **fields: Any) -> tuple[str, ...]:
        """Return those of a list of texts that apply, their fields filled in."""
        return tuple(filter(None, (self.template(source).render(fields) for source in self.entry(name))))


MESSAGES = Catalogue(Path(__file__).parent, "*/words.toml")
"""Texts of all rooms but those of results and pages, which `analysis/` keeps."""
text, texts = MESSAGES.text, MESSAGES.texts
