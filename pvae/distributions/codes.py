"""Distributions of discrete codes on a grid: enumerable categoricals, autoregressive and deterministic codes.

A value of a grid of codes is a tensor of indices `(..., *grid)`. A *relaxed* value holds the logarithms of relaxed
one-hots, `(..., *grid, K)`: in single precision the one-hots themselves underflow at a temperature of 0.2.
"""

import math
from abc import abstractmethod
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pvae.distributions import base, exponential_codes

MAX_STATES = 4096
"""Largest number of joint states of the codes of one data point that is enumerated."""


class Enumerated:
    """Mixin of distributions of codes or bits over a grid, whose joint states can be enumerated if these are few."""

    batch_shape: Any
    event_shape: Any

    values: Tensor
    """Values of one element, `(K,)`: the codes 0 .. K - 1, or 0 and 1 of a bit."""

    @property
    def has_enumerate_support(self) -> bool:
        """True if there are at most `MAX_STATES` joint states, so that they can be enumerated."""
        return self.event_shape.numel() * math.log(len(self.values)) <= math.log(MAX_STATES) + 1e-9

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all S joint states, `(S, *batch, *grid)`; batch dimensions have size 1 unless expanded.

        Raises:
            NotImplementedError: there are more than `MAX_STATES`; the same type as torch raises for infinite supports.
        """
        positions, lead = self.event_shape.numel(), self.batch_shape if expand else (1,) * len(self.batch_shape)
        if not self.has_enumerate_support:
            raise NotImplementedError(f"{len(self.values)}^{positions} joint states are more than {MAX_STATES}")
        found = torch.cartesian_prod(*[self.values] * positions)
        return found.reshape(-1, *(1,) * len(lead), *self.event_shape).expand(-1, *lead, *self.event_shape)


class Enumerable(Enumerated, base.Event):  # type: ignore[override]
    """Independent codes or bits over a grid."""

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """Values of one element, `(K,)`: the codes 0 .. K - 1, or 0 and 1 of a bit."""
        like = self.base_dist.logits
        count, dtype = (like.shape[-1], None) if isinstance(self.base_dist, dist.Categorical) else (2, like.dtype)
        return torch.arange(count, dtype=dtype, device=like.device)


def code_grid(logits: Tensor, grid: int) -> dist.TorchDistribution:
    """Return independent categoricals of logits `(..., *grid, K)`; `grid` is the number of grid dimensions."""
    codes = dist.Categorical(logits=logits, validate_args=False)
    return Enumerable(codes, grid, validate_args=False) if grid else codes


def bits(logits: Tensor) -> dist.TorchDistribution:
    """Return the distribution of D independent bits with logits `(..., D)`."""
    return Enumerable(dist.Bernoulli(logits=logits, validate_args=False), 1, validate_args=False)


class Conditional(base.Batched):
    """Base of autoregressive distributions of codes: probabilities depend on the codes at earlier positions."""

    @abstractmethod
    def conditional_logits(self, value: Tensor) -> Tensor:
        """Return normalised log p(c_p | c_<p), `(..., *grid, K)`, at indices or logarithms of relaxed one-hots."""


def conditional_logits(p: Any, value: Tensor) -> Tensor:
    """Return log p(c_p | c_<p) of any distribution of codes at a value, `(..., *grid, K)`."""
    p = base.unwrapped(p)
    return p.conditional_logits(value) if isinstance(p, Conditional) else p.logits


def codes_below(states: int, grid: int) -> dist.constraints.Constraint:
    """Return the constraint of codes 0 .. `states` - 1 at every position of a grid of some dimensions."""
    return dist.constraints.independent(dist.constraints.integer_interval(0, states - 1), grid)


class Certain(base.Batched):
    """Deterministic codes, such as nearest codes (VQ); `log_prob` is 0 for any value, as values are not compared.

    Arguments:
        index: the codes, `(..., *grid)`, int64.
        states: number of codes K at each position.
        grid: number of dimensions of the grid.
    """

    widened = ("index",)
    count = tables = 1
    """Numbers of codes that make one vector, along the last axis of the grid, and of codebooks they take in turn."""

    def __init__(self, index: Tensor, states: int, grid: int) -> None:
        self.index, self.states = index, states
        at = index.dim() - grid
        super().__init__(index.shape[:at], index.shape[at:], validate_args=False)

    @dist.constraints.dependent_property(is_discrete=True)
    def support(self) -> dist.constraints.Constraint:
        """Support: indices 0 .. K - 1 at every position of the grid."""
        return codes_below(self.states, len(self.event_shape))

    def sample(self, sample_shape: base.Size = torch.Size()) -> Tensor:
        """Return the codes themselves, expanded to `sample_shape + (..., *grid)`."""
        return self.index.expand(*sample_shape, *self.index.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return 0 for every value, nats, without comparing it with the codes."""
        lead = value.shape[: value.dim() - len(self.event_shape)]
        return torch.zeros(torch.broadcast_shapes(self.batch_shape, lead), device=value.device)

    @property
    def logits(self) -> Tensor:
        """Log probability of every code, `(..., *grid, K)`: 0 for the given code, -1e30 for the others."""
        hit = self.index.unsqueeze(-1) == torch.arange(self.states, device=self.index.device)
        return torch.where(hit, 0.0, exponential_codes.IMPOSSIBLE)

    @property
    def mode(self) -> Tensor:
        """Codes themselves, `(..., *grid)`, int64."""
        return self.index


@torch.distributions.register_kl(Certain, torch.distributions.Distribution)
def _certain_kl(q: Certain, p: torch.distributions.Distribution) -> Tensor:
    """Return KL(q || p) of deterministic codes q, nats: exactly -log p of the codes."""
    return -p.log_prob(q.index)
