"""Rows of a data source before they become tensors: arrays in memory or on the disk, table columns, transforms."""

from pvae.data.rows.cache import Writer, cache_folder, created, decoded, locked, room
from pvae.data.rows.columns import TRUTH, Column, ContinuousColumn
from pvae.data.rows.prepare import Binarize, Floats, Scale
from pvae.data.rows.rows import Part, Rows, in_order, joined, natural, tenths

__all__ = [
    "Binarize", "Column", "ContinuousColumn", "Floats", "Part", "Rows", "Scale", "TRUTH", "Writer", "cache_folder",
    "created", "decoded", "in_order", "joined", "locked", "natural", "room", "tenths",
]  # fmt: skip
