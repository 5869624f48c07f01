"""Where data come from: declared sources, their files, and the splits as tensors.

Importing this package imports neither torch nor numpy; each name is fetched where it lives on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pvae.data.dataset import Dataset, Split, load
    from pvae.data.declared import (
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
    from pvae.data.rows.rows import Rows

_HOMES = {
    "CSV": "declared",
    "Data": "declared",
    "Dataset": "dataset",
    "Digits": "declared",
    "FashionMNIST": "declared",
    "FrameSource": "declared",
    "Idx": "declared",
    "Images": "declared",
    "MNIST": "declared",
    "Npy": "declared",
    "Npz": "declared",
    "Parquet": "declared",
    "Rows": "rows.rows",
    "Split": "dataset",
    "Splits": "declared",
    "TensorSource": "declared",
    "Toy": "declared",
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
