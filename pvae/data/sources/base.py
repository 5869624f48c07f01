"""The family of data sources: the fields that every declaration has, and those of sources that read the user's files.

A new source is one final class with ``source: Literal["name"] = "name"`` and a ``read`` that returns `Rows`, in a file
of its own in this folder.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from pvae.component import Component, Ints, Section, Table
from pvae.data.rows.arrays import AnyArray
from pvae.data.rows.columns import Column
from pvae.data.rows.prepare import Binarize, Scale
from pvae.data.rows.rows import SPLITS, Rows, tenths
from pvae.util.types import Array

Range = Annotated[tuple[int, int], Field(strict=False)]
"""Rows ``[start, stop)`` of a source; a list of two integers is accepted."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed of `numpy.random.RandomState`."""


class Splits(Section):
    """Row ranges of the three splits; a split that is not declared is the source's own."""

    train: Range | None = None
    """Rows to fit."""
    validation: Range | None = None
    """Rows that choose the weights and stop the fit."""
    test: Range | None = None
    """Rows that are reported."""

    @property
    def declared(self) -> dict[str, tuple[int, int]]:
        """The ranges that are declared, by split."""
        ranges = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: rows for name, rows in ranges.items() if rows is not None}


class Data(Component):
    """A data set, and the preparation of its rows."""

    tag: ClassVar[str] = "source"

    binarize: Binarize = "none"
    """`threshold`: x > 0.5; `static`: one Bernoulli draw; `dynamic`: the training split is drawn anew each batch."""
    scale: Scale = "unit"
    """`unit`: divide by the largest level; `raw`: as stored; `standardise`: by training mean and deviation."""
    shape: Ints | None = None
    """Reshape each row, for example `[1, 28, 28]`."""
    splits: Table[Splits] = Splits()
    """Row ranges, `train = [0, 50000]` and so on."""

    @property
    def table(self) -> Mapping[str, Column]:
        """The columns of a table, in the order of x; none for other data."""
        return {}

    @abstractmethod
    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Return the rows of the source, with its own splits.

        Arguments:
            data_dir: the folder where files are sought first.
            seed: the experiment's, for a source that simulates its data; a stored source gives the same rows for
                every seed, so that runs of different seeds are compared on one data set.

        Raises:
            DataError: the data are missing or broken.
        """


class FileData(Data):
    """A source that reads the user's own files.

    Without declared splits the rows are permuted with `split_seed`: 80 % train, 10 % validation, 10 % test.
    """

    path: str
    """The file or folder; a relative path is sought in the data folder, then in the working directory."""
    scale: Scale = "raw"
    """`unit` needs `largest`, or unsigned bytes (255)."""
    largest: Annotated[float, Field(gt=0)] | None = None
    """The largest level, for `scale = "unit"`."""
    split_seed: Seed = 0
    """Seed of the permutation."""
    stream: bool = False
    """Leave the rows on the disk and read them in shuffled blocks: for data larger than memory."""

    def to_rows(self, x: AnyArray, y: Array | None, name: str, **more: Any) -> Rows:
        """Return the rows of a file, with a seeded tenth to validate and another to test.

        Arguments:
            x: (n, *shape).
            y: (n,) integer labels, or None.
            name: the name of the rows in messages.
            more: further fields of `Rows`.

        Raises:
            DataError: see `Rows` and `tenths`.
        """
        parts = tenths(x.shape[0], SPLITS[1:], self.split_seed) if x.ndim and x.size else {}
        largest = self.largest or (255.0 if x.dtype == np.uint8 else None)
        return Rows(x, y, parts, largest, name=name, **more)
