"""Data sets: the declared sources, the readers of their files, and the train, validation and test splits as tensors.

Importing this package imports neither torch nor numpy; each name is fetched from its module on first use. Every source
is a public name: a new one needs no line here.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvae.data.dataset import Dataset as Dataset, load as load
    from pvae.data.rows.rows import Rows as Rows
    from pvae.data.sources.base import Data as Data, Splits as Splits
    from pvae.data.split import Split as Split

_HOMES = {
    "Data": "sources.base", "Dataset": "dataset", "Rows": "rows.rows", "Split": "split", "Splits": "sources.base",
    "load": "dataset",
}  # fmt: skip


def _sources() -> dict[str, type[Data]]:
    """Return the data-source classes that pvae itself defines (no plugins), by class name."""
    members = import_module("pvae.data.sources.base").Data.members.values()
    return {member.__name__: member for member in members if member.__module__.startswith(f"{__name__}.")}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name == "__all__":
        return sorted([*_HOMES, *_sources()])
    if not name.startswith("_") and name in (found := _sources()):
        return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_HOMES, *_sources()])
