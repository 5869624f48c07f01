"""Distributions with declared event dimensions, and point distributions of deterministic values."""

from __future__ import annotations

from copy import copy
from typing import Any, ClassVar, Self

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


class Batched(dist.TorchDistribution):
    """Base of distributions that `expand` copies, with wider parameters and without validation."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    widened: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes with batch dimensions: tensors, distributions, and lists of these."""

    def expand(self, batch_shape: Size, _instance: Any = None) -> Self:
        """Return this distribution expanded to `batch_shape`: itself if it has that shape."""
        shape = torch.Size(batch_shape)
        if self.batch_shape == shape:
            return self
        wide = copy(self)
        for name in self.widened:
            setattr(wide, name, self._wider(getattr(self, name), shape))
        wide._batch_shape, wide._validate_args = shape, False
        return wide

    def _wider(self, part: Any, shape: torch.Size) -> Any:
        if isinstance(part, list):
            return [self._wider(item, shape) for item in part]
        sizes = part.shape if isinstance(part, Tensor) else part.batch_shape
        return part.expand(shape + sizes[len(self.batch_shape) :])


class Determined(Batched, dist.Delta):
    """Point distribution at `value` whose `log_prob` is the given `log_density` for any argument.

    Pyro's `Delta` compares exactly: f^-1(f(x)) differs from x by a rounding error, and would get log density -inf.

    Arguments:
        value: the point, `batch + event`.
        log_density: log density of the value, nats, `batch`: minus log|det J| of the map that made it; 0 without a map.
        event_dim: number of event dimensions.
    """

    widened = ("v", "log_density")

    def __init__(self, value: Tensor, log_density: Tensor | float = 0.0, event_dim: int = 1) -> None:
        super().__init__(value, log_density, event_dim=event_dim, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the given log density, nats, broadcast over the batch dimensions of `value`."""
        batch = value.shape[: value.dim() - self.event_dim]
        return self.log_density.expand(torch.broadcast_shapes(self.batch_shape, batch))


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
