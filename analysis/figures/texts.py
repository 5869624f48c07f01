"""Texts of results: the entries of `results.toml`, filled in by Jinja; an unknown entry or field is an error."""

import html
import math
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from pvae.util import toml


def short(value: float, digits: int = 2) -> str:
    """Return a number with `digits` decimal places, or 0."""
    return f"{value:.{digits}f}" if abs(value) >= 0.5 * 10**-digits else "0"


def with_error(e: Any) -> str:
    """Return an estimate with its error, as `2.04 +- 0.03`; with three decimal places where it is below 0.005."""
    digits = 2 if e.standard_error >= 0.005 else 3
    return f"{short(e.value, digits)} +- {short(e.standard_error, digits)}"


ENTRIES = toml.flat(toml.read(Path(__file__).with_name("results.toml")))
ENGINE = Environment(undefined=StrictUndefined)
ENGINE.filters |= {"short": short, "with_error": with_error, "log": math.log, "html": html.escape}


@cache
def _template(words: str) -> Template:
    return ENGINE.from_string(" ".join(words.split()))


def text(name: str, /, **fields: Any) -> str:
    """Return the text with a dotted name, such as `collapse.use`, its fields filled in; empty if it does not apply."""
    return _template(ENTRIES[name]).render(fields)


def texts(name: str, /, **fields: Any) -> tuple[str, ...]:
    """Return those of the texts of a list that apply, their fields filled in."""
    return tuple(filter(None, (_template(words).render(fields) for words in ENTRIES[name])))
