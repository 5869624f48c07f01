"""A value that something else determines: a point, whose density is known and never found by comparing numbers."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pvae.errors import DeclarationError
from pvae.util.types import Size


class Determined(dist.Delta):
    """`value` with certainty; `log_prob` is the given `log_density` whatever is asked.

    `Delta` compares bits: f^-1(f(x)) differs from x by a rounding error, and would be impossible.

    Arguments:
        value: `batch + event`.
        log_density: of the value, nats, `batch`: minus log|det J| of the map that made it; 0 where it is a plain point.
        event_dim: number of event dimensions.
    """

    def __init__(self, value: Tensor, log_density: Tensor | float = 0.0, event_dim: int = 1) -> None:
        super().__init__(value, log_density, event_dim=event_dim, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """The given density, broadcast against a value's batch dimensions."""
        batch = value.shape[: value.dim() - self.event_dim]
        return self.log_density.expand(torch.broadcast_shapes(self.batch_shape, batch))

    def expand(self, batch_shape: Size, _instance: Any = None) -> Determined:
        """The same point over more batch dimensions."""
        if self.batch_shape == tuple(batch_shape):
            return self
        shape = torch.Size(batch_shape)
        return Determined(self.v.expand(shape + self.event_shape), self.log_density.expand(shape), self.event_dim)


class Implicit(dist.Delta):
    """`value` with certainty, made of a z that nothing finds back: it can be drawn, and has no density to report."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Refused.

        Raises:
            DeclarationError: always; what is asked for does not exist.
        """
        raise DeclarationError(
            "log p(x | z): expected a likelihood; got x = g(z), a generator without one. It has no ELBO and no "
            "evidence: compare its samples with data (pvae two-sample)."
        )


class Rounded(Determined):
    """Multiples of 1 / (levels - 1): the value in [0, 1] rounded down to one of `levels` cells of equal width."""

    def __init__(self, value: Tensor, levels: int, event_dim: int = 1) -> None:
        self.levels = levels
        super().__init__((value * levels).floor().clamp(0, levels - 1) / (levels - 1), 0.0, event_dim)
