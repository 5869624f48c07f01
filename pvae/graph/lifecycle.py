"""Base classes of Modules that need the training data, or an update other than a gradient step, during a fit.

A part is a Module that a declaration builds (a prior, a codebook, a baseline). The training loop knows parts only by
these classes. It calls `MadeOfData.attend` when a pair is fitted or loaded, `Begun.begin` once before the first step,
`MadeOfData.start` before every batch and `Moving.after_step` after every optimisation step. A second stage of training
calls them on the parts that it fits.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn


class FirstRows(Protocol):
    """Protocol for random subsets of the training data, each a deterministic function of (seed, stream)."""

    @property
    def batch(self) -> int:
        """Number of rows in a batch of the fit."""

    @property
    def seed(self) -> int:
        """Random seed of the fit."""

    def observed(self, count: int, stream: int) -> Tensor:
        """Return a random subset of at most `count` training points without covariates, `(m, *x)`."""

    def inferred(self, site: str, count: int, stream: int) -> list[Mapping[str, Any]]:
        """Run the guide on at most `count` random training rows; return the `infer` dict of a site, one per batch."""


class Begun(nn.Module):
    """Base of Modules initialised from training data: a codebook at k-means centres, pseudo-inputs at training rows."""

    def begin(self, rows: FirstRows) -> None:
        """Initialise the weights from training rows; called once, in declared order, before the first step of a fit."""
        raise NotImplementedError  # pragma: no cover - abstract


class MadeOfData(nn.Module):
    """Base of Modules that keep the training data, such as a prior that mixes posteriors at training points."""

    def attend(self, x: Tensor) -> None:
        """Receive the training data `(n, *event)`; called when a pair is fitted or loaded."""
        raise NotImplementedError  # pragma: no cover - abstract

    def start(self, index: Tensor) -> None:
        """Receive the training-set indices `(batch,)` of the rows of the next batch; called before every batch."""


class Moving(nn.Module):
    """Base of Modules updated by something other than a gradient: a codebook or a baseline by moving averages.

    A forward pass in training mode writes only to scratch buffers, so that evaluation changes no weight.
    """

    def scratch(self) -> list[Tensor]:
        """Return the buffers in which a forward pass leaves what `after_step` reads; sums or means over a batch."""
        raise NotImplementedError  # pragma: no cover - abstract

    def contribution(self, share: float, shard: int, shards: int) -> list[Tensor]:
        """Return what one of the `shards` parts of a batch adds to each of `scratch`, after a forward pass on it.

        The default is that of sums.

        Arguments:
            share: proportion of the batch's rows that are in the part.
            shard: number of the part.
            shards: number of parts.
        """
        return self.scratch()

    def after_step(self) -> None:
        """Update the weights without a device synchronisation; called after every optimiser step."""
        raise NotImplementedError  # pragma: no cover - abstract
