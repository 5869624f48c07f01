"""Results of rows of data, block by block: in memory, or streamed to a file; processes share the blocks out."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from pvae.analysis.export.rows import Origin, Part
from pvae.analysis.samples.running import Generated, joined
from pvae.data.split import Split
from pvae.runs.run import Run
from pvae.util import Progress, group, seeds, silent

G = TypeVar("G", bound=Generated)

BLOCK_ROWS = 4096
"""Largest number of rows in a block."""
BLOCK_NUMBERS = 2**22
"""Largest number of data elements in a block."""


class RowBlocks(Generic[G]):
    """The results of an analysis for rows of a split, block by block, computed when they are asked for.

    Each block has noise of its own, so that the result of a row depends neither on the process that computes it nor on
    the blocks that are computed beside it. With global latents there is one block, of one sample of them.

    Arguments:
        make: analysis, a function of a run, rows `(m, *row)` and `seed`, whose result has one entry a row.
        run: the run.
        split: split that the rows are of.
        chosen: positions of the rows in the split, `(n,)`; None for all.
        seed: seed of the noise; the first block has that of `make` itself.
        on_progress: called with (rows done, n) after each block.
        mask: argument of `make` with one entry for each row of the split, of which a block gets its own; or None.
        options: further arguments of `make`.
    """

    def __init__(
        self, make: Callable[..., G], run: Run, split: Split, chosen: Tensor | None = None, *,
        seed: int = 0, on_progress: Progress = silent, mask: Any = None, **options: Any,
    ) -> None:  # fmt: skip
        self.make, self.run, self.split, self.seed, self.on_progress, self.options = (
            make, run, split, seed, on_progress, options,
        )  # fmt: skip
        self.mask, self.absent = mask, dict[str, str]()
        self.chosen = torch.arange(len(split)) if chosen is None else chosen
        fewer = max(1, min(BLOCK_ROWS, BLOCK_NUMBERS // max(1, prod(split.rows.shape[1:]))))
        self.size = len(self.chosen) if run.pair.layout.shared else fewer
        self.origin = Origin.of(split, self.chosen, run.transforms)

    def __len__(self) -> int:
        return -(-len(self.chosen) // self.size)

    def __getitem__(self, number: int) -> G:
        """Return the result of a block."""
        at = self.chosen[number * self.size : (number + 1) * self.size]
        seed = seeds.mix(self.seed, seeds.ANALYSIS, number) if number else self.seed
        masked = {} if self.mask is None else {"mask": torch.as_tensor(self.mask)[at]}
        found = self.make(self.run, self.split.rows[at], seed=seed, **masked, **self.options)
        self.absent |= getattr(found, "absent", {})
        self.on_progress(number * self.size + len(at), len(self.chosen))
        return found

    def whole(self) -> G:
        """Return the result of all rows."""
        result: G = replace(joined([self[number] for number in range(len(self))]), origin=self.origin)
        return result

    def parts(self) -> Iterator[Part]:
        """Yield the tensors of the blocks in order; every process gets all, and computes its share of them."""
        for start in range(0, len(self), group.size()):

            def own(i: int, start: int = start) -> dict[str, Tensor]:
                tensors = enumerate(self[start + i].tensors().items())  # of which processes exchange copies, unordered
                return {f"{place:04} {key}": t.clone() for place, (key, t) in tensors}

            for part in group.dealt(min(group.size(), len(self) - start), own):
                yield {key[5:]: part[key] for key in sorted(part)}
