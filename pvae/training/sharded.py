"""A batch that the processes of a fit share: the noise and rows of every shard, sums over them, and signals."""

import signal
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pvae.errors import is_refused_draw
from pvae.training.trainer import Trainer

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Signals that ask a fit to stop."""


class ShardedBatch:
    """One batch in shards (`Parts`): every process adds its own shards, and all get the same sum.

    Arguments:
        trainer: the fit.
        index: rows of the batch in the training data.
    """

    def __init__(self, trainer: Trainer, index: Tensor) -> None:
        self.trainer, self.index = trainer, index
        self.count = trainer.shards.count

    def total(self, work: Callable[[Tensor, float, int], Tensor], width: int, phase: int = 0) -> Tensor:
        """Return the sum of `work` over the shards; tell the trainer of a signal that any process received.

        The first process alone decides if a checkpoint is due: the others wait until it is written.
        """
        sizes = [1] * len(SIGNALS) + [1, width]
        *told, due, total = self.trainer.shards.total(self._parts(work, width, phase)).split(sizes)
        self.trainer.due = bool(due > 0)
        signals = (int(number) for number, found in zip(SIGNALS, told, strict=True) if found > 0)
        self.trainer.stopping = next(signals, None)
        return total

    def _parts(self, work: Callable[[Tensor, float, int], Tensor], width: int, phase: int) -> Iterator[Tensor]:
        """Yield the vectors of this process's shards, after numbers for all to know; NaN where nothing is drawn."""
        bounds = self.trainer.shards.bounds(len(self.index))
        told = [float(self.trainer.stopping == number) for number in SIGNALS]
        for shard in self.trainer.shards.mine:
            start, stop = bounds[shard]
            found = torch.zeros(width, device=self.index.device)
            if stop > start:
                try:
                    x = self.trainer.draw(self.index[start:stop], shard, phase)
                    found = work(x, (stop - start) / len(self.index), shard)
                except (RuntimeError, ValueError) as error:
                    if not is_refused_draw(error):
                        raise
                    found = torch.full((width,), torch.nan, device=self.index.device)
            yield torch.cat([found.new_tensor([*told, float(self.trainer.due and shard == 0)]), found])
