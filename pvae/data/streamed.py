"""Rows that are read from the disk when they are indexed, in blocks of consecutive rows and a seeded random order.

A block is read at once; a window is the number of blocks cached in memory. An epoch visits the blocks in a random
order, one window at a time, and the rows of a window in a random order: every row once, whatever the size of the data.
The order depends only on (seed, epoch), so that a resumed fit continues bit for bit. Where batches have shards, each
has blocks of its own in every window, so that a process reads those of its shards alone.
"""

import hashlib
from collections.abc import Callable
from functools import cached_property, partial
from math import ceil, floor, prod
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from pvae.data.rows.files import Stored
from pvae.data.rows.prepare import PUBLISHED_SEED, Binarize, Floats, Scaled, extremes, kept_missing, require_unit
from pvae.data.rows.rows import NEW, SPLITS, Part, rows_of
from pvae.errors import DataError
from pvae.util import Record, group, replace, seeds

BLOCK_BYTES = 2**21
WINDOW = 64
"""Number of blocks cached in memory, together 128 MiB of float32."""
MATERIALISED_BYTES = 2**29
"""Largest number of bytes of streamed rows that one indexing call reads, beyond a window of blocks."""

Expect = Callable[[np.typing.NDArray[np.int64]], None]
"""Function that starts to prefetch blocks, given by their numbers."""
BlockRule = Callable[[Floats, int], np.ndarray]
"""Binarisation of a block: function of its scaled rows and its number, which can seed different samples per block."""


class Survey(NamedTuple):
    """Minimum and maximum of every feature of a split, each `(*row)`, and its checksum, from one pass over its rows.

    The extremes are those of the stored values; with the threshold rule, 0 or 1. The checksum is SHA-256 of the stored
    values, their scaling and their binarisation.
    """

    low: np.ndarray
    high: np.ndarray
    digest: bytes


def survey(rows: Scaled, part: Part, binarize: Binarize) -> Survey:
    """Return minimum, maximum and checksum of the stored rows with the numbers in `part`, from one pass over them."""
    digest = hashlib.sha256(repr((str(rows.x.dtype), rows.x.shape[1:], binarize, dict(rows.warps))).encode())
    for number in (rows.shift, rows.divisor):
        digest.update(np.asarray(number, np.float64).tobytes())
    return Survey(*extremes(rows.x, part, digest), digest.digest())


class WindowOrder:
    """Random order of the rows in an epoch, computed window by window: a slice gives row numbers `(m,)`.

    Arguments:
        rows: number of rows, n.
        block: number of rows in a block.
        seed: seed of the fit.
        epoch: number of the epoch, counted from 0.
        expect: function that prefetches blocks; called with those of the next window when a window begins.
        batch: number of rows in a batch, if it has shards.
        shards: the shards of a batch.
    """

    def __init__(
        self, rows: int, block: int, seed: int, epoch: int, expect: Expect, batch: int, shards: group.Shards
    ) -> None:
        self.rows, self.block, self.expect, self.batch, self.shards = rows, block, expect, batch, shards
        self.seed = seeds.mix(seed, seeds.ORDER, epoch)
        self.order = seeds.permutation(-(-rows // block), self.seed, 0).numpy()
        sizes = np.minimum(block, rows - self.order * block)
        self.starts = np.concatenate([[0], np.cumsum(np.add.reduceat(sizes, np.arange(0, len(sizes), WINDOW)))])
        self._kept: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

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

    def _window(self, number: int) -> np.ndarray:
        if self._kept[0] != number:
            blocks = self.order[number * WINDOW : (number + 1) * WINDOW]
            rows = (blocks[:, None] * self.block + np.arange(self.block)).flatten()
            rows = rows[rows < self.rows]
            drawn = seeds.permutation(len(rows), self.seed, number + 1).numpy()
            shard = self._shard_of(np.arange(self.starts[number], self.starts[number + 1]))
            own = np.argsort(np.sort(shard)[drawn], kind="stable")  # neighbouring rows, in random order, for each shard
            order = np.empty_like(rows)
            order[np.argsort(shard, kind="stable")] = rows[drawn[own]]
            self._kept = number, order
            following = self.order[(number + 1) * WINDOW : (number + 2) * WINDOW]
            mine, each = self.shards.mine, len(following) / self.shards.count
            self.expect(following[floor(mine.start * each) : ceil(mine.stop * each)])
        return self._kept[1]

    def _shard_of(self, position: np.typing.NDArray[np.int64]) -> np.typing.NDArray[np.int64]:
        """Return the number of the shard to which each position of the epoch belongs."""
        whole = self.rows // self.batch * self.batch
        ends, last = (np.array(self.shards.bounds(n))[:, 1] for n in (self.batch, self.rows - whole))
        inside = np.searchsorted(ends, position % self.batch, "right")
        return np.where(position < whole, inside, np.searchsorted(last, position - whole, "right"))


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
    def _held(self) -> np.typing.NDArray[np.float32]:
        return np.empty((len(self._owners) * self.block, *self.row), np.float32)

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, where: np.typing.NDArray[np.int64]) -> np.typing.NDArray[np.float32]:
        """Return the rows `(m, *row)` at given positions in the split, in any order."""
        if self.scattered:
            order = np.argsort(where, kind="stable")
            out = np.empty((len(where), *self.row), np.float32)
            place = where[order]
            out[order] = self.rows.of(place + self.part.start if isinstance(self.part, range) else self.part[place])
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

    def _load(self, wanted: np.typing.NDArray[np.int64]) -> None:
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

    def _read(self, number: int) -> np.ndarray:
        part = self._part_of(number)
        if (rule := self.rule) is not None:
            return kept_missing(lambda block: rule(block, number), self.rows.of(part))
        return rows_of(self.rows.x, part) if self.rows.as_stored else self.rows.of(part)

    def expect(self, numbers: np.typing.NDArray[np.int64]) -> None:
        """Start to prefetch blocks, given by their numbers, without waiting for them; a window begins."""
        self._next = 0  # in place of the window before, so that a process that reads a part of each holds a part
        if isinstance(source := self.rows.x, Stored):
            for part in map(self._part_of, numbers.tolist()):
                source.expect(int(part[0]), int(part[-1]) + 1)

    def order(self, seed: int, epoch: int, batch: int = 1, shards: group.Shards | None = None) -> Tensor | WindowOrder:
        """Return the random order of the rows in an epoch, as `Split.order` does; its slices are row numbers."""
        if self.scattered:
            return seeds.permutation(len(self), seed, epoch)
        return WindowOrder(len(self), self.block, seed, epoch, self.expect, batch, shards or group.Shards(1))


class Streamed(Record, eq=False):
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
        row = self.blocks.row if self.columns is None else (prod(self.blocks.row) + self.columns.shape[1],)
        return torch.Size((len(self), *row))

    def __len__(self) -> int:
        return len(self.blocks)

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
        if (where := torch.as_tensor(index).cpu()).dtype is torch.bool:
            where = where.nonzero().flatten()
        needed = 4 * len(where) * prod(self.shape[1:])
        if needed > MATERIALISED_BYTES and len(where) > self.blocks.block * WINDOW:
            raise DataError.of("data.streamed.too_many", most=MATERIALISED_BYTES, rows=len(where), needed=needed)
        x = torch.from_numpy(self.blocks[where.numpy()])
        if self.columns is not None:
            x = torch.cat([x.flatten(1), self.columns[where]], 1)
        return x.to(self.device)

    def to(self, device: str | torch.device) -> Self:
        """Return the same rows, to be moved to a device when they are read."""
        return replace(self, device=torch.device(device))

    def of_part(self, part: Part, columns: Tensor | None) -> Self:
        """Return the rows of the source with the numbers in `part`, prepared as these are, and their covariates."""
        own = self.blocks
        return replace(self, blocks=Blocks(own.rows, part, own.survey, own.rule), columns=columns)

    def with_columns(self, columns: Tensor | None) -> Self:
        """Return the rows flattened and followed by covariates `(n, c)`; for None, the rows without covariates."""
        return replace(self, columns=None if columns is None else columns.float().cpu())


def streams(data: Scaled, parts: dict[str, Part], binarize: Binarize) -> tuple[dict[str, Streamed], Streamed | None]:
    """Return each split as streamed rows, and the train intensities if binarisation is dynamic (else None).

    Static binarisation samples each block with a seed made of the split and the block number, so that its values never
    change; they differ from those of `pvae.data.rows.prepare.prepare`, which follows the published protocol.

    Raises:
        DataError: values to binarise are outside [0, 1].
    """
    found = {name: survey(data, part, binarize) for name, part in parts.items()}
    plain = {name: Streamed(Blocks(data, part, found[name])) for name, part in parts.items()}
    if binarize == "none":
        return plain, None
    x = {}
    for name, seen in found.items():
        low, high = data.scale(seen.low), data.scale(seen.high)
        require_unit(name, float(np.fmin.reduce(low, None)), float(np.fmax.reduce(high, None)))
        blocks = Blocks(data, parts[name], seen, partial(fixed, (*SPLITS, NEW).index(name)))
        if binarize == "threshold":
            blocks = Blocks(data, parts[name], seen._replace(low=low > 0.5, high=high > 0.5), threshold)
        x[name] = Streamed(blocks)
    return x, plain.get("train") if binarize == "dynamic" else None


def threshold(block: Floats, _number: int) -> np.typing.NDArray[np.bool_]:
    """Return True for each intensity above 0.5."""
    return block > 0.5


def fixed(split: int, block: Floats, number: int) -> np.typing.NDArray[np.bool_]:
    """Return Bernoulli samples of a block of intensities, with a seed that depends only on split and block number."""
    return np.random.RandomState([PUBLISHED_SEED, split, number]).random_sample(block.shape) < block
