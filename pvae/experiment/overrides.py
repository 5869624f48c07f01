"""Dotted overrides of a declaration, such as `train.epochs=20`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from pvae.component import Component, table_at


def apply_overrides(
    raw: dict[str, Any], overrides: Sequence[tuple[tuple[str, ...], Any]], root: type[BaseModel]
) -> None:
    """Set dotted paths in the nested dictionaries of a declaration.

    A table whose `kind` is overridden loses the keys that the new kind does not have.

    Arguments:
        raw: the declaration, changed in place.
        overrides: pairs of path, as a tuple of keys, and value.
        root: class of the declaration.
    """
    for path, value in overrides:
        table = raw
        for depth, part in enumerate(path[:-1], 1):
            inner = table.get(part)
            table[part] = inner if isinstance(inner, dict) else _new_table(raw, path[:depth], root, inner)
            table = table[part]
        table[path[-1]] = value
        _forget_foreign_keys(raw, path, root)


def _new_table(raw: dict[str, Any], path: Sequence[str], root: type[BaseModel], found: Any) -> dict[str, Any]:
    """Return the table for an overridden key where the declaration has none.

    It is that of the kind whose name is `found` in its place, else that of the default kind, or {}.
    """
    if isinstance(found, str):
        _, kind = table_at(raw, path, root)
        return {kind.tag if kind is not None and issubclass(kind, Component) else "kind": found}
    _, parent = table_at(raw, path[:-1], root)
    field = parent.model_fields.get(path[-1]) if parent else None
    default = field.default if field else None
    return {default.tag: getattr(default, default.tag)} if isinstance(default, Component) else {}


def _forget_foreign_keys(raw: dict[str, Any], path: tuple[str, ...], root: type[BaseModel]) -> None:
    """Remove from a table whose kind has been overridden the keys that the new kind does not have."""
    if path[-1] not in ("kind", "source", "type") or len(path) == 1:
        return
    table, kind = table_at(raw, path[:-1], root)
    if isinstance(table, dict) and kind is not None and not kind.is_family():  # type: ignore[attr-defined]
        for key in [key for key in table if key not in kind.model_fields]:
            del table[key]
