"""Life cycle of a part in a fit: begun at training data, told the rows of a batch, moved after a step.

A part is a Module that a declaration builds. The engine calls these classes alone, so that it names no kind:
`MadeOfData.attend` when a pair is fitted or read, `Begun.begin` once before the first step, `MadeOfData.start` before
every batch and `Moving.after_step` after every optimisation step. A second stage calls them on the parts that it fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn


class FirstRows(Protocol):
    """Random subsets of the training data, each a function of (seed, stream)."""

    @property
    def batch(self) -> int:
        """Rows of a batch of the fit."""

    @property
    def seed(self) -> int:
        """Seed of the fit."""

    def observed(self, count: int, stream: int) -> Tensor:
        """Return at most `count` data without covariates, `(m, *x)`."""

    def inferred(self, site: str, count: int, stream: int) -> list[Mapping[str, Any]]:
        """Run the guide on at most `count` rows, a batch at a time; return the `infer` of one of its sites."""


class Begun(nn.Module):
    """Base of parts whose weights begin at training data: a codebook at cluster centres, pseudo-inputs at rows."""

    def begin(self, rows: FirstRows) -> None:
        """Set the first weights; called once, in declared order, before the first step of a fit."""
        raise NotImplementedError  # pragma: no cover - abstract


class MadeOfData(nn.Module):
    """Base of parts that hold the training data (a mixture of posteriors at them, say)."""

    def attend(self, x: Tensor) -> None:
        """Take the training data `(n, *event)`; called when a pair is fitted or read."""
        raise NotImplementedError  # pragma: no cover - abstract

    def start(self, index: Tensor) -> None:
        """Take the row numbers `(batch,)` of the next training batch; called before each."""


class Moving(nn.Module):
    """Base of parts that are moved by something other than a gradient: a codebook by averages, a baseline.

    A forward pass in training mode writes scratch buffers alone, so that evaluation moves nothing.
    """

    def after_step(self) -> None:
        """Move, without synchronisation; called after every step of the optimiser."""
        raise NotImplementedError  # pragma: no cover - abstract
