"""Dotted overrides of a declaration, such as `train.epochs=20`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from pvae.component import Component, table_at


def apply_overrides(
    raw: dict[str, Any], overrides: Sequence[tuple[tuple[str, ...], Any]], root: type[BaseModel]
) -> None:
    """Set dotted paths in the nested dicts of a declaration; a table of another kind keeps only the keys it knows.

    Arguments:
        raw: the declaration, changed in place.
        overrides: pairs of path and value.
        root: class of the declaration.
    """
    for path, value in overrides:
        table = raw
        for depth, part in enumerate(path[:-1]):
            inner = table.get(part)
            if isinstance(inner, str):
                inner = {_tag(raw, path[: depth + 1], root): inner}
            elif not isinstance(inner, dict):
                inner = _default_table(raw, path[: depth + 1], root)
            table[part] = inner
            table = inner
        table[path[-1]] = value
        _forget_foreign_keys(raw, path, root)


def _default_table(raw: dict[str, Any], path: Sequence[str], root: type[BaseModel]) -> dict[str, Any]:
    """Return the table that an override of one key starts from where none is written: the default kind there."""
    _, parent = table_at(raw, path[:-1], root)
    field = parent.model_fields.get(path[-1]) if parent else None
    default = field.default if field else None
    return {default.tag: getattr(default, default.tag)} if isinstance(default, Component) else {}


def _tag(raw: dict[str, Any], path: Sequence[str], root: type[BaseModel]) -> str:
    _, kind = table_at(raw, path, root)
    return kind.tag if kind is not None and issubclass(kind, Component) else "kind"


def _forget_foreign_keys(raw: dict[str, Any], path: tuple[str, ...], root: type[BaseModel]) -> None:
    """Drop the keys that a table of a new kind does not have."""
    if path[-1] not in ("kind", "source", "type") or len(path) == 1:
        return
    table, kind = table_at(raw, path[:-1], root)
    if isinstance(table, dict) and kind is not None and not kind.is_family():  # type: ignore[attr-defined]
        for key in [key for key in table if key not in kind.model_fields]:
            del table[key]
