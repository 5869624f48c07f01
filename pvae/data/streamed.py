"""Rows that are read while a fit goes on: blocks of neighbours, several at a time, in an order that a seed decides.

A block is what is read at once; a window is as many blocks as are in memory. An epoch takes the blocks in a random
order, a window of them at a time, and the rows of a window in a random order: every row once, whatever the size of the
data, and as a function of (seed, epoch) alone, so that a resumed fit goes on bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvae.data.rows.arrays import Stored
from pvae.data.rows.prepare import PUBLISHED_SEED, Binarize, BlockRule, Scaled, require_unit
from pvae.data.rows.rows import SPLITS, Part, chunks, rows_of
from pvae.errors import DataError
from pvae.util import seeds

BLOCK_BYTES = 2**21
WINDOW = 64
"""Blocks in memory: 128 MiB of float32."""
MATERIALISED_BYTES = 2**29
"""Most that is read at once when all rows are asked for."""


Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Survey:
    """What one pass over the rows of a part finds.

    Arguments:
        low: least value of every feature, as stored, `(*row)`; high: the largest.
        digest: SHA-256 of the stored values and of how they are prepared.
    """

    low: NDArray[Any]
    high: NDArray[Any]
    digest: bytes


def survey(rows: Scaled, part: Part, binarize: Binarize) -> Survey:
    """Look at every stored value of a part once."""
    prepared = (str(rows.x.dtype), rows.x.shape[1:], binarize, dict(rows.warps))
    digest = hashlib.sha256(repr(prepared).encode())
    for number in (rows.shift, rows.divisor):
        digest.update(np.asarray(number, np.float64).tobytes())
    low = high = np.full(rows.x.shape[1:], np.nan)
    for _, chunk in chunks(rows.x, part):
        digest.update(np.ascontiguousarray(chunk).data)
        low, high = np.fmin(low, np.fmin.reduce(chunk, 0)), np.fmax(high, np.fmax.reduce(chunk, 0))
    return Survey(low, high, digest.digest())


class Streamed:
    """Rows `(n, *shape)` float32, read and prepared when they are indexed; otherwise as much of a tensor as data need.

    Arguments:
        rows: the scaled rows of a source.
        part: which of them, in ascending order.
        survey: what one pass over them found.
        rule: what is done with every block, drawn anew from a seed of its own; None: nothing.
        columns: `(n, c)` to stand behind every flattened row, or None.
        device: where what is read is put.
    """

    dtype = torch.float32

    def __init__(
        self,
        rows: Scaled,
        part: Part,
        survey: Survey,
        rule: BlockRule | None = None,
        columns: Tensor | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.rows, self.part, self.survey, self.rule, self.columns = rows, part, survey, rule, columns
        self.device = torch.device(device)
        self.row = tuple(rows.x.shape[1:])
        self.shape = torch.Size((len(part), *(self.row if columns is None else (prod(self.row) + columns.shape[1],))))
        self.block = max(1, BLOCK_BYTES // (4 * max(1, prod(self.row))))
        self.blocks = -(-len(part) // self.block)
        self._held: Floats | None = None
        self._slots = np.full(self.blocks, -1)
        self._owners: list[int] = []

    @property
    def digest(self) -> bytes:
        """SHA-256 of the stored values and of how they are prepared."""
        return self.survey.digest

    @property
    def extremes(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Least and largest value of every feature, `(*row)`: as stored, or above or below the threshold."""
        low, high = self.survey.low, self.survey.high
        if self.rule is threshold:
            return threshold(self.rows.scale(low), 0), threshold(self.rows.scale(high), 0)
        return low, high

    def __len__(self) -> int:
        return self.shape[0]

    def size(self) -> torch.Size:
        """As of a tensor."""
        return self.shape

    def dim(self) -> int:
        """As of a tensor."""
        return len(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        """Some rows `(m, *row)`; of one number, that row."""
        if isinstance(index, int):
            return self[torch.tensor([range(len(self))[index]])][0]
        if isinstance(index, slice):
            index = torch.arange(*index.indices(len(self)))
        where = torch.as_tensor(index).cpu()
        if where.dtype is torch.bool:
            where = where.nonzero().flatten()
        self._require_room(len(where))
        x = torch.from_numpy(self._gathered(where.numpy()))
        if self.columns is not None:
            x = torch.cat([x.flatten(1), self.columns[where]], 1)
        return x.to(self.device)

    @property
    def _scattered(self) -> bool:
        """Whether rows are taken one by one, with no blocks."""
        return isinstance(self.rows.x, Stored) and self.rows.x.scattered and self.rule is None

    def _require_room(self, count: int) -> None:
        needed = 4 * count * prod(self.shape[1:])
        if needed > MATERIALISED_BYTES and count > self.block * WINDOW:
            raise DataError(
                f"Expected at most {MATERIALISED_BYTES >> 20} MiB of streamed rows at once; got {count} rows, "
                f"{needed >> 20} MiB. Ask for fewer (--rows), or set data.stream = false."
            )

    def _gathered(self, where: NDArray[Any]) -> Floats:
        if self._scattered:
            order = np.argsort(where, kind="stable")
            out = np.empty((len(where), *self.row), np.float32)
            out[order] = self.rows.of(self._numbers(where[order]))
            return out
        block = where // self.block
        wanted = np.unique(block)
        if len(wanted) <= WINDOW:
            self._load(wanted)
            return self._buffer()[self._slots[block] * self.block + where % self.block]
        out = np.empty((len(where), *self.row), np.float32)
        for some in np.array_split(wanted, -(-len(wanted) // WINDOW)):
            here = np.isin(block, some)
            out[here] = self._gathered(where[here])
        return out

    def _numbers(self, where: NDArray[Any]) -> NDArray[np.int64]:
        """Row numbers in the source."""
        return where + self.part.start if isinstance(self.part, range) else self.part[where]

    def _buffer(self) -> Floats:
        if self._held is None:
            self._held = np.empty((min(WINDOW, self.blocks) * self.block, *self.row), np.float32)
        return self._held

    def _load(self, wanted: NDArray[Any]) -> None:
        """Have some blocks in the buffer, in place of those that have been there longest and are not wanted."""
        keep = set(wanted.tolist())
        for number in wanted[self._slots[wanted] < 0].tolist():
            rows = self._read(number)
            if len(self._owners) < min(WINDOW, self.blocks):
                slot = len(self._owners)
            else:
                oldest = next(n for n in self._owners if n not in keep)
                self._owners.remove(oldest)
                slot, self._slots[oldest] = int(self._slots[oldest]), -1
            self._buffer()[slot * self.block : slot * self.block + len(rows)] = rows
            self._slots[number] = slot
            self._owners.append(number)

    def _read(self, number: int) -> NDArray[Any]:
        part = self.part[number * self.block : (number + 1) * self.block]
        if self.rule is not None:
            return self.rule(self.rows.of(part), number)
        return rows_of(self.rows.x, part) if self.rows.as_stored else self.rows.of(part)

    def order(self, seed: int, epoch: int) -> Tensor | WindowOrder:
        """The order of the rows in an epoch; slices of it are row numbers."""
        if self._scattered:
            return seeds.permutation(len(self), seed, epoch)
        return WindowOrder(len(self), self.block, seed, epoch, self._expect)

    def _expect(self, blocks: NDArray[np.int64]) -> None:
        """The blocks of the next window, so that the disk is at work while this one is fitted."""
        source = self.rows.x
        if not isinstance(source, Stored):
            return
        for number in blocks.tolist():
            part = self.part[number * self.block : (number + 1) * self.block]
            source.expect(int(part[0]), int(part[-1]) + 1)

    def to(self, device: str | torch.device) -> Streamed:
        """The same rows, put on a device when they are read."""
        return Streamed(self.rows, self.part, self.survey, self.rule, self.columns, device)

    def with_columns(self, columns: Tensor) -> Streamed:
        """Rows flattened, with columns `(n, c)` behind them."""
        return Streamed(self.rows, self.part, self.survey, self.rule, columns.float().cpu(), self.device)

    def plain(self) -> Streamed:
        """Rows without such columns."""
        return Streamed(self.rows, self.part, self.survey, self.rule, None, self.device)


class WindowOrder:
    """The order of an epoch, made window by window: slices `[start:stop]` are row numbers `(m,)`.

    Arguments:
        rows: their number n.
        block: rows of a block.
        seed: of the fit.
        epoch: counted from 0.
        expect: told the blocks of a window when the one before it begins.
    """

    def __init__(
        self,
        rows: int,
        block: int,
        seed: int,
        epoch: int,
        expect: Callable[[NDArray[np.int64]], None] = lambda _blocks: None,
    ) -> None:
        self.rows, self.block, self.expect = rows, block, expect
        self.seed = seeds.mix(seed, seeds.ORDER, epoch)
        self.order = seeds.permutation(-(-rows // block), self.seed, 0).numpy()
        sizes = np.minimum(block, rows - self.order * block)
        self.starts = np.concatenate([[0], np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), WINDOW)))])
        self._kept: tuple[int, NDArray[Any]] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: slice) -> Tensor:
        start, stop, _ = index.indices(self.rows)
        first = int(np.searchsorted(self.starts, start, "right")) - 1
        pieces = []
        while start < stop:
            low, high = int(self.starts[first]), int(self.starts[first + 1])
            pieces.append(self._window(first)[start - low : min(stop, high) - low])
            start, first = min(stop, high), first + 1
        return torch.from_numpy(np.concatenate(pieces)) if pieces else torch.empty(0, dtype=torch.long)

    def _window(self, number: int) -> NDArray[Any]:
        if self._kept[0] != number:
            blocks = self.order[number * WINDOW : (number + 1) * WINDOW]
            rows = (blocks[:, None] * self.block + np.arange(self.block)).flatten()
            rows = rows[rows < self.rows]
            self._kept = number, rows[seeds.permutation(len(rows), self.seed, number + 1).numpy()]
            self.expect(self.order[(number + 1) * WINDOW : (number + 2) * WINDOW])
        return self._kept[1]


@dataclass(frozen=True, eq=False)
class Streams:
    """The three splits as they are read; ``raw`` are intensities of "train" to draw anew, or None."""

    x: dict[str, Streamed]
    raw: Streamed | None


def streams(data: Scaled, parts: dict[str, Part], binarize: Binarize) -> Streams:
    """The splits of rows that stay where they are.

    Fixed draws of a binarisation are functions of the split and the number of a block, so that they never change; they
    are other draws than those of `pvae.data.rows.prepare.prepare`, which follow the published protocol.

    Raises:
        DataError: binarisation of values outside [0, 1].
    """
    found = {name: survey(data, parts[name], binarize) for name in SPLITS}
    if binarize == "none":
        return Streams({name: Streamed(data, parts[name], found[name]) for name in SPLITS}, None)
    for name, seen in found.items():
        require_unit(name, float(data.scale(seen.low).min()), float(data.scale(seen.high).max()))
    x = {
        name: Streamed(data, parts[name], found[name], threshold if binarize == "threshold" else fixed(number))
        for number, name in enumerate(SPLITS)
    }
    return Streams(x, Streamed(data, parts["train"], found["train"]) if binarize == "dynamic" else None)


def threshold(chunk: NDArray[np.float64], _number: int) -> NDArray[Any]:
    """Where an intensity is above a half."""
    return chunk > 0.5


def fixed(split: int) -> BlockRule:
    """Bernoulli draws that depend on the split and the block alone."""

    def drawn(chunk: NDArray[np.float64], number: int) -> NDArray[Any]:
        return np.random.RandomState([PUBLISHED_SEED, split, number]).random_sample(chunk.shape) < chunk

    return drawn
