"""Formatting of numbers and text for pages, and conversion of values for JSON."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.pages.plots import base

Value = Estimate | float | int | str | None
"""Type of the value in one cell of a table; None is shown as a dash."""


def nats(value: float | Estimate, digits: int = 2) -> str:
    """Return a number with `digits` decimal places and a typographic minus sign; a dash for NaN and infinities."""
    number = float(value)
    return base.nats(number, digits) if math.isfinite(number) else "–"


def plus_minus(e: Estimate, digits: int = 2) -> str:
    """Return an estimate with its Monte Carlo standard error, as `1.23 ± 0.04`; `1.23` for an exact value."""
    return " ".join(part for part in (nats(e, digits), error_of(e, digits)) if part)


def percent(value: float) -> str:
    """Return a proportion as a percentage without decimals, or with one decimal below 9.5 %; a dash if not finite."""
    if not math.isfinite(value):
        return "–"
    return f"{100 * value:.0f} %" if value == 0 or abs(value) >= 0.095 else f"{100 * value:.1f} %"


def shown_value(value: Value, digits: int) -> str:
    """Return the value of a table cell as text, fractions with `digits` decimal places; a dash for None."""
    if isinstance(value, Estimate):
        return plus_minus(value, digits)
    if isinstance(value, bool) or value is None:
        return "–" if value is None else ("yes" if value else "no")
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f").replace("-", "−")
    return nats(value, digits) if isinstance(value, float) else value


def error_of(e: Estimate, digits: int = 3) -> str:
    """Return the standard error of an estimate, as `± 0.012`; empty text if it is 0 or not finite."""
    return f"± {nats(e.standard_error, digits)}" if e.standard_error and math.isfinite(e.standard_error) else ""


def html_cell(value: Value, digits: int) -> Markup:
    """Return the value of a table cell as HTML, with the standard error in a `span` of class `error`."""
    if isinstance(value, Estimate) and (error := error_of(value, digits)):
        return Markup("{} <span class='error'>{}</span>").format(nats(value, digits), error)
    return Markup("{}").format(legible(shown_value(value, digits)))


def legible(value: Any) -> Any:
    """Return text with U+FFFD in place of control and bidirectional characters, except newline and tab."""
    if not isinstance(value, str) or isinstance(value, Markup):  # Markup, the output of a macro, is clean
        return value
    if value.isprintable():  # fast path, for the data URIs of pictures, which have 100 000 characters
        return value
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Cf") else "\ufffd" for c in value)


def finite(value: Any) -> Any:
    """Return a value that JSON can represent: NaN and infinities become None, other objects their `str`."""
    if isinstance(value, Estimate):
        return finite(value.to_dict())
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
