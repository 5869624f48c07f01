"""Conversion of values into Python source text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def quoted(text: str) -> str:
    """Return a string as a Python literal in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def literal(value: Any) -> str:
    """Return numbers, strings, lists, tuples and dictionaries as a Python literal, strings in double quotes."""
    if isinstance(value, dict):
        return named({key: literal(item) for key, item in value.items()})
    if isinstance(value, tuple | list):
        inner = ", ".join(map(literal, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    return quoted(value) if isinstance(value, str) else repr(value)


def named(expressions: Mapping[str, str]) -> str:
    """Return the source text of a dictionary, given the expressions of its values."""
    return f"{{{', '.join(f'{quoted(name)}: {value}' for name, value in expressions.items())}}}"


def between(start: float, end: float, share: str) -> str:
    """Return the expression of `start + (end - start) * share`, where `share` is an expression."""
    return share if (start, end) == (0, 1) else f"{start:g} + {end - start!r} * {share}"
