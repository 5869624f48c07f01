"""Where data come from: declared sources, their files, and the splits as tensors.

Importing this package imports neither torch nor numpy; each name is fetched where it lives on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvae.data.dataset import Dataset, Split, load
    from pvae.data.rows.rows import Rows
    from pvae.data.sources.base import (
        CSV,
        MNIST,
        Data,
        Digits,
        FashionMNIST,
        FrameSource,
        Idx,
        Images,
        Npy,
        Npz,
        Parquet,
        Splits,
        TensorSource,
        Toy,
    )

_HOMES = {
    "CSV": "sources.base",
    "Data": "sources.base",
    "Dataset": "dataset",
    "Digits": "sources.base",
    "FashionMNIST": "sources.base",
    "FrameSource": "sources.base",
    "Idx": "sources.base",
    "Images": "sources.base",
    "MNIST": "sources.base",
    "Npy": "sources.base",
    "Npz": "sources.base",
    "Parquet": "sources.base",
    "Rows": "rows.rows",
    "Split": "dataset",
    "Splits": "sources.base",
    "TensorSource": "sources.base",
    "Toy": "sources.base",
    "load": "dataset",
}

__all__ = [
    "CSV",
    "MNIST",
    "Data",
    "Dataset",
    "Digits",
    "FashionMNIST",
    "FrameSource",
    "Idx",
    "Images",
    "Npy",
    "Npz",
    "Parquet",
    "Rows",
    "Split",
    "Splits",
    "TensorSource",
    "Toy",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"pvae.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pvae.data' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
