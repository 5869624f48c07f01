"""Rows that are read while a fit goes on, as much of a tensor as data need."""

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
"""Largest part of the rows that is read at once."""


@dataclass(frozen=True, eq=False)
class Streamed:
    """Rows `(n, *shape)` float32, read and prepared when they are indexed.

    Arguments:
        blocks: the rows.
        columns: `(n, c)` to stand behind every flattened row, or None.
        device: the device of the tensors that are read.
    """

    blocks: Blocks
    columns: Tensor | None = None
    device: torch.device = torch.device("cpu")

    dtype = torch.float32

    @property
    def shape(self) -> torch.Size:
        """Shape `(n, *shape)` of all rows."""
        row = self.blocks.row
        return torch.Size((len(self), *(row if self.columns is None else (prod(row) + self.columns.shape[1],))))

    @property
    def digest(self) -> bytes:
        """SHA-256 of the stored values and of how they are prepared."""
        return self.blocks.survey.digest

    @property
    def extremes(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Least and largest value of every feature, `(*row)`: as stored, or above or below the threshold."""
        low, high = self.blocks.survey.low, self.blocks.survey.high
        if self.blocks.rule is threshold:
            return threshold(self.blocks.rows.scale(low), 0), threshold(self.blocks.rows.scale(high), 0)
        return low, high

    def __len__(self) -> int:
        return len(self.blocks)

    def size(self) -> torch.Size:
        """Return the shape, as a tensor does."""
        return self.shape

    def dim(self) -> int:
        """Return the number of dimensions, as a tensor does."""
        return len(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        """Return some rows `(m, *row)`; of one number, that row.

        Raises:
            DataError: too many at once.
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
        """Return the order of the rows in an epoch; slices of it are row numbers."""
        return self.blocks.order(seed, epoch)

    def to(self, device: str | torch.device) -> Streamed:
        """Return the same rows, put on a device when they are read."""
        return replace(self, device=torch.device(device))

    def with_columns(self, columns: Tensor | None) -> Streamed:
        """Return the rows flattened, with columns `(n, c)` behind them; of None, the rows without such columns."""
        return replace(self, columns=None if columns is None else columns.float().cpu())


def streams(data: Scaled, parts: dict[str, Part], binarize: Binarize) -> tuple[dict[str, Streamed], Streamed | None]:
    """Return the three splits of rows that stay where they are, and intensities of "train" to draw anew, or None.

    Fixed draws of a binarisation are functions of the split and the number of a block, so that they never change; they
    are other draws than those of `pvae.data.rows.prepare.prepare`, which follow the published protocol.

    Raises:
        DataError: binarisation of values outside [0, 1].
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
    """Return 1 where an intensity is above a half."""
    return block > 0.5


def fixed(split: int, block: Floats, number: int) -> NDArray[np.bool_]:
    """Return Bernoulli draws that depend on the split and the number of the block alone."""
    return np.random.RandomState([PUBLISHED_SEED, split, number]).random_sample(block.shape) < block
