"""Rows that are read from the disk when they are indexed, with the part of the tensor interface that data sets need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvae.data.rows.blocks import WINDOW, Blocks, WindowOrder, survey
from pvae.data.rows.prepare import PUBLISHED_SEED, Binarize, Floats, Scaled, require_unit
from pvae.data.rows.rows import SPLITS, Part
from pvae.errors import DataError

MATERIALISED_BYTES = 2**29
"""Largest number of bytes of streamed rows that one indexing call reads, beyond a window of blocks."""


@dataclass(frozen=True, eq=False)
class Streamed:
    """Rows `(n, *shape)` float32 of a split, read, scaled and binarised when they are indexed.

    Arguments:
        blocks: reader of the rows, which caches the last blocks read.
        columns: `(n, c)` covariates to append to each flattened row, or None.
        device: device of the tensors that indexing returns.
    """

    blocks: Blocks
    columns: Tensor | None = None
    device: torch.device = torch.device("cpu")

    dtype = torch.float32

    @property
    def shape(self) -> torch.Size:
        """Shape of all rows, `(n, *shape)`; with covariates `(n, D + c)`."""
        row = self.blocks.row
        return torch.Size((len(self), *(row if self.columns is None else (prod(row) + self.columns.shape[1],))))

    @property
    def digest(self) -> bytes:
        """SHA-256 of the stored values, their scaling and their binarisation."""
        return self.blocks.survey.digest

    @property
    def extremes(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Minimum and maximum of every feature, each `(*row)`, as stored; with the threshold rule, 0 or 1."""
        low, high = self.blocks.survey.low, self.blocks.survey.high
        if self.blocks.rule is threshold:
            return threshold(self.blocks.rows.scale(low), 0), threshold(self.blocks.rows.scale(high), 0)
        return low, high

    def __len__(self) -> int:
        return len(self.blocks)

    def size(self) -> torch.Size:
        """Return the shape of all rows, as `Tensor.size` does."""
        return self.shape

    def dim(self) -> int:
        """Return the number of dimensions, as `Tensor.dim` does."""
        return len(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        """Return the rows `(m, *row)` at an index: row numbers, a slice or a mask; a single integer gives one row.

        Raises:
            DataError: the index asks for more than `MATERIALISED_BYTES`.
        """
        if isinstance(index, int):
            return self[torch.tensor([range(len(self))[index]])][0]
        if isinstance(index, slice):
            index = torch.arange(*index.indices(len(self)))
        where = torch.as_tensor(index).cpu()
        if where.dtype is torch.bool:
            where = where.nonzero().flatten()
        self._require_room(len(where))
        x = torch.from_numpy(self.blocks[where.numpy()])
        if self.columns is not None:
            x = torch.cat([x.flatten(1), self.columns[where]], 1)
        return x.to(self.device)

    def _require_room(self, count: int) -> None:
        needed = 4 * count * prod(self.shape[1:])
        if needed > MATERIALISED_BYTES and count > self.blocks.block * WINDOW:
            raise DataError(
                f"Expected at most {MATERIALISED_BYTES >> 20} MiB of streamed rows at once; got {count} rows, "
                f"{needed >> 20} MiB. Ask for fewer (--rows), or set data.stream = false."
            )

    def order(self, seed: int, epoch: int) -> Tensor | WindowOrder:
        """Return the random order of the rows in an epoch, a function of (seed, epoch); its slices are row numbers."""
        return self.blocks.order(seed, epoch)

    def to(self, device: str | torch.device) -> Streamed:
        """Return the same rows, to be moved to a device when they are read."""
        return replace(self, device=torch.device(device))

    def with_columns(self, columns: Tensor | None) -> Streamed:
        """Return the rows flattened and followed by covariates `(n, c)`; for None, the rows without covariates."""
        return replace(self, columns=None if columns is None else columns.float().cpu())


def streams(data: Scaled, parts: dict[str, Part], binarize: Binarize) -> tuple[dict[str, Streamed], Streamed | None]:
    """Return the three splits as streamed rows, and the train intensities if binarisation is dynamic (else None).

    Static binarisation samples each block with a seed made of the split and the block number, so that its values never
    change; they differ from those of `pvae.data.rows.prepare.prepare`, which follows the published protocol.

    Raises:
        DataError: values to binarise are outside [0, 1].
    """
    found = {name: survey(data, parts[name], binarize) for name in SPLITS}
    plain = {name: Streamed(Blocks(data, parts[name], found[name])) for name in SPLITS}
    if binarize == "none":
        return plain, None
    for name, seen in found.items():
        require_unit(name, float(data.scale(seen.low).min()), float(data.scale(seen.high).max()))
    rules = [threshold if binarize == "threshold" else partial(fixed, split) for split in range(len(SPLITS))]
    x = {name: Streamed(Blocks(data, parts[name], found[name], rule)) for name, rule in zip(SPLITS, rules, strict=True)}
    return x, plain["train"] if binarize == "dynamic" else None


def threshold(block: Floats, _number: int) -> NDArray[np.bool_]:
    """Return True for each intensity above 0.5."""
    return block > 0.5


def fixed(split: int, block: Floats, number: int) -> NDArray[np.bool_]:
    """Return Bernoulli samples of a block of intensities, with a seed that depends only on split and block number."""
    return np.random.RandomState([PUBLISHED_SEED, split, number]).random_sample(block.shape) < block
