"""Distributions with declared event dimensions, and point distributions of deterministic values."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pvae.errors import DeclarationError
from pvae.util.types import Size


class Event(dist.Independent):
    """Distribution with declared event dimensions, as `to_event` returns; `expand` to its own shape costs nothing.

    A plate expands every site in every training step.
    """

    def expand(self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: Any = None) -> Any:
        """Return this distribution expanded to `batch_shape`."""
        return self if self.batch_shape == tuple(batch_shape) else super().expand(batch_shape, _instance)


class Determined(dist.Delta):
    """Point distribution at `value` whose `log_prob` is the given `log_density` for any argument.

    Pyro's `Delta` compares exactly: f^-1(f(x)) differs from x by a rounding error, and would get log density -inf.

    Arguments:
        value: the point, `batch + event`.
        log_density: log density of the value, nats, `batch`: minus log|det J| of the map that made it; 0 without a map.
        event_dim: number of event dimensions.
    """

    def __init__(self, value: Tensor, log_density: Tensor | float = 0.0, event_dim: int = 1) -> None:
        super().__init__(value, log_density, event_dim=event_dim, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the given log density, nats, broadcast over the batch dimensions of `value`."""
        batch = value.shape[: value.dim() - self.event_dim]
        return self.log_density.expand(torch.broadcast_shapes(self.batch_shape, batch))

    def expand(self, batch_shape: Size, _instance: Any = None) -> Determined:
        """Return this distribution expanded to `batch_shape`."""
        if self.batch_shape == tuple(batch_shape):
            return self
        shape = torch.Size(batch_shape)
        return Determined(self.v.expand(shape + self.event_shape), self.log_density.expand(shape), self.event_dim)


class Implicit(dist.Delta):
    """Point distribution at x = g(z) for a generator g without a likelihood: it can be sampled, but has no density."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Raise an error, as an implicit generator has no density.

        Raises:
            DeclarationError: always.
        """
        raise DeclarationError(
            "log p(x | z): expected a likelihood; got x = g(z), a generator without one. It has no ELBO and no "
            "evidence: compare its samples with data (pvae two-sample)."
        )


class Rounded(Determined):
    """Point distribution at `value` in [0, 1], quantised to `levels` cells; cell k is written as k / (levels - 1)."""

    def __init__(self, value: Tensor, levels: int, event_dim: int = 1) -> None:
        self.levels = levels
        super().__init__((value * levels).floor().clamp(0, levels - 1) / (levels - 1), 0.0, event_dim)
