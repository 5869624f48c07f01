"""Streaming of rows from the disk in blocks of consecutive rows, in a seeded random order.

A block is read at once; a window is the number of blocks cached in memory. An epoch visits the blocks in a random
order, one window at a time, and the rows of a window in a random order: every row once, whatever the size of the data.
The order depends only on (seed, epoch), so that a resumed fit continues bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvae.data.rows.arrays import Stored
from pvae.data.rows.prepare import Binarize, Floats, Scaled
from pvae.data.rows.rows import Part, chunks, rows_of
from pvae.util import seeds

BLOCK_BYTES = 2**21
WINDOW = 64
"""Number of blocks cached in memory, together 128 MiB of float32."""

BlockRule = Callable[[Floats, int], NDArray[Any]]
"""Binarisation of a block: function of its scaled rows and its number, which can seed different samples per block."""


@dataclass(frozen=True, eq=False)
class Survey:
    """Minimum, maximum and checksum of the rows of a split, from one pass over them.

    Arguments:
        low: minimum of every feature over the stored (unscaled) values, `(*row)`.
        high: maximum of every feature over the stored values, `(*row)`.
        digest: SHA-256 of the stored values, their scaling and their binarisation.
    """

    low: NDArray[Any]
    high: NDArray[Any]
    digest: bytes


def survey(rows: Scaled, part: Part, binarize: Binarize) -> Survey:
    """Return minimum, maximum and checksum of the stored rows with the numbers in `part`, from one pass over them."""
    prepared = (str(rows.x.dtype), rows.x.shape[1:], binarize, dict(rows.warps))
    digest = hashlib.sha256(repr(prepared).encode())
    for number in (rows.shift, rows.divisor):
        digest.update(np.asarray(number, np.float64).tobytes())
    low = high = np.full(rows.x.shape[1:], np.nan)
    for _, chunk in chunks(rows.x, part):
        digest.update(np.ascontiguousarray(chunk).data)
        low, high = np.fmin(low, np.fmin.reduce(chunk, 0)), np.fmax(high, np.fmax.reduce(chunk, 0))
    return Survey(low, high, digest.digest())


class Blocks:
    """Reader of the rows `(n, *row)` float32 of a split, with the last `WINDOW` blocks cached in memory.

    Arguments:
        rows: stored rows of the source with their scaling.
        part: row numbers of the split, in ascending order.
        survey: minimum, maximum and checksum of the split.
        rule: binarisation applied to every block, or None.
    """

    def __init__(self, rows: Scaled, part: Part, survey: Survey, rule: BlockRule | None = None) -> None:
        self.rows, self.part, self.survey, self.rule = rows, part, survey, rule
        self.row = tuple(rows.x.shape[1:])
        self.block = max(1, BLOCK_BYTES // (4 * max(1, prod(self.row))))
        self.count = -(-len(part) // self.block)
        self.scattered = isinstance(rows.x, Stored) and rows.x.scattered and rule is None
        self._slots = np.full(self.count, -1)
        self._owners = np.full(min(WINDOW, self.count), -1)
        self._next = 0

    @cached_property
    def _held(self) -> NDArray[np.float32]:
        return np.empty((len(self._owners) * self.block, *self.row), np.float32)

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, where: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the rows `(m, *row)` at given positions in the split, in any order."""
        if self.scattered:
            order = np.argsort(where, kind="stable")
            out = np.empty((len(where), *self.row), np.float32)
            out[order] = self.rows.of(self._numbers(where[order]))
            return out
        block = where // self.block
        wanted = np.unique(block)
        if len(wanted) <= WINDOW:
            self._load(wanted)
            return self._held[self._slots[block] * self.block + where % self.block]
        out = np.empty((len(where), *self.row), np.float32)
        for some in np.array_split(wanted, -(-len(wanted) // WINDOW)):
            here = np.isin(block, some)
            out[here] = self[where[here]]
        return out

    def _numbers(self, where: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row numbers in the source of positions in the split."""
        return where + self.part.start if isinstance(self.part, range) else self.part[where]

    def _load(self, wanted: NDArray[np.int64]) -> None:
        """Read the wanted blocks that are not cached, each in place of the oldest cached block that is not wanted."""
        for number in wanted[self._slots[wanted] < 0].tolist():
            rows = self._read(number)
            while self._owners[self._next] in wanted:
                self._next = (self._next + 1) % len(self._owners)
            slot, old = self._next, self._owners[self._next]
            if old >= 0:
                self._slots[old] = -1
            self._held[slot * self.block : slot * self.block + len(rows)] = rows
            self._slots[number], self._owners[slot] = slot, number
            self._next = (slot + 1) % len(self._owners)

    def _part_of(self, number: int) -> Part:
        return self.part[number * self.block : (number + 1) * self.block]

    def _read(self, number: int) -> NDArray[Any]:
        part = self._part_of(number)
        if self.rule is not None:
            return self.rule(self.rows.of(part), number)
        return rows_of(self.rows.x, part) if self.rows.as_stored else self.rows.of(part)

    def expect(self, numbers: NDArray[np.int64]) -> None:
        """Start to prefetch blocks, given by their numbers, without waiting for them."""
        if isinstance(source := self.rows.x, Stored):
            for part in map(self._part_of, numbers.tolist()):
                source.expect(int(part[0]), int(part[-1]) + 1)

    def order(self, seed: int, epoch: int) -> Tensor | WindowOrder:
        """Return the random order of the rows in an epoch, a function of (seed, epoch); its slices are row numbers."""
        if self.scattered:
            return seeds.permutation(len(self), seed, epoch)
        return WindowOrder(len(self), self.block, seed, epoch, self.expect)


class WindowOrder:
    """Random order of the rows in an epoch, computed window by window: a slice gives row numbers `(m,)`.

    Arguments:
        rows: number of rows, n.
        block: number of rows in a block.
        seed: seed of the fit.
        epoch: number of the epoch, counted from 0.
        expect: function that prefetches blocks; called with those of the next window when a window begins.
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
        pieces = [np.empty(0, np.int64)]
        while start < stop:
            low, high = int(self.starts[first]), int(self.starts[first + 1])
            pieces.append(self._window(first)[start - low : min(stop, high) - low])
            start, first = min(stop, high), first + 1
        return torch.from_numpy(np.concatenate(pieces))

    def _window(self, number: int) -> NDArray[Any]:
        if self._kept[0] != number:
            blocks = self.order[number * WINDOW : (number + 1) * WINDOW]
            rows = (blocks[:, None] * self.block + np.arange(self.block)).flatten()
            rows = rows[rows < self.rows]
            self._kept = number, rows[seeds.permutation(len(rows), self.seed, number + 1).numpy()]
            self.expect(self.order[(number + 1) * WINDOW : (number + 2) * WINDOW])
        return self._kept[1]
