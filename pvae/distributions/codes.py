"""Distributions of codes: grids that can be enumerated, codes known for certain, relaxed one-hots and their twins.

A value of a grid of codes is a tensor of indices `(..., *grid)`. A *relaxed* value holds the logarithms of relaxed
one-hots, `(..., *grid, K)`: in single precision the one-hots themselves underflow at a temperature of 0.2.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints, register_kl

from pvae.distributions.exponential_codes import IMPOSSIBLE
from pvae.distributions.independent import Event
from pvae.util.types import Size

MAX_STATES = 4096
"""Largest number of joint states of one datum that are summed over."""


class Enumerable(Event):
    """Independent codes or bits over a grid, all of whose joint states can be listed where there are few."""

    @property
    def states(self) -> int:
        """Values of one element."""
        return self.base_dist.logits.shape[-1] if isinstance(self.base_dist, dist.Categorical) else 2

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """True if there are at most `MAX_STATES` joint states."""
        return self.event_shape.numel() * math.log(self.states) <= math.log(MAX_STATES) + 1e-9

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Every joint state, `(S, *batch, *grid)`; batch dimensions are of size 1 unless expanded."""
        like = self.base_dist.logits
        found = joint_states(self.states, self.event_shape, like.device)
        found = found if isinstance(self.base_dist, dist.Categorical) else found.to(like)
        lead = self.batch_shape if expand else (1,) * len(self.batch_shape)
        return found.reshape(-1, *(1,) * len(lead), *self.event_shape).expand(-1, *lead, *self.event_shape)


def joint_states(states: int, grid: Size, device: torch.device) -> Tensor:
    """All `states ** P` joint states of a grid of P elements, `(S, *grid)`, int64.

    Raises:
        NotImplementedError: there are more than `MAX_STATES`, as torch says of what cannot be enumerated.
    """
    positions = math.prod(grid)
    if positions * math.log(states) > math.log(MAX_STATES) + 1e-9:
        raise NotImplementedError(f"{states}^{positions} joint states are more than {MAX_STATES}")
    number = torch.arange(states**positions, device=device)
    powers = states ** torch.arange(positions - 1, -1, -1, device=device)
    return (number[:, None] // powers % states).reshape(-1, *grid)


def code_grid(logits: Tensor, grid: int) -> dist.TorchDistribution:
    """Independent codes of logits `(..., *grid, K)` over `grid` dimensions; a plain categorical for none."""
    codes = dist.Categorical(logits=logits, validate_args=False)
    return Enumerable(codes, grid, validate_args=False) if grid else codes


def bits(logits: Tensor) -> dist.TorchDistribution:
    """Independent bits of logits `(..., D)`."""
    return Enumerable(dist.Bernoulli(logits=logits, validate_args=False), 1, validate_args=False)


class Conditional(dist.TorchDistribution):
    """Codes whose probabilities may depend on the codes before them."""

    @abstractmethod
    def conditional_logits(self, value: Tensor) -> Tensor:
        """log p(c_p | c_<p), normalised, `(..., *grid, K)`; of indices or of logarithms of relaxed one-hots."""


def conditional_logits(p: Any, value: Tensor) -> Tensor:
    """log p(c_p | c_<p) of any distribution of codes, `(..., *grid, K)`."""
    while isinstance(p, torch.distributions.Independent | dist.ExpandedDistribution):
        p = p.base_dist
    return p.conditional_logits(value) if isinstance(p, Conditional) else p.logits


class Certain(dist.TorchDistribution):
    """Codes known for certain, as nearest codes are. `log_prob` is 0 for any value: values are never compared.

    Arguments:
        index: `(..., *grid)`, int64.
        states: K.
        grid: number of dimensions of the grid.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, index: Tensor, states: int, grid: int) -> None:
        self.index, self.states = index, states
        at = index.dim() - grid
        super().__init__(index.shape[:at], index.shape[at:], validate_args=False)

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> constraints.Constraint:
        """Indices."""
        return constraints.independent(constraints.integer_interval(0, self.states - 1), len(self.event_shape))

    def expand(self, batch_shape: Size, _instance: Any = None) -> Certain:
        """The same codes over more batch dimensions."""
        if self.batch_shape == tuple(batch_shape):
            return self
        return Certain(self.index.expand(*batch_shape, *self.event_shape), self.states, len(self.event_shape))

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """The codes, `sample_shape + (..., *grid)`."""
        return self.index.expand(*sample_shape, *self.index.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """0 for each datum, nats."""
        lead = value.shape[: value.dim() - len(self.event_shape)]
        return torch.zeros(torch.broadcast_shapes(self.batch_shape, lead), device=value.device)

    @property
    def logits(self) -> Tensor:
        """log q of every code, `(..., *grid, K)`: 0, or as good as impossible; made when asked for."""
        hit = self.index.unsqueeze(-1) == torch.arange(self.states, device=self.index.device)
        return torch.where(hit, 0.0, IMPOSSIBLE)

    @property
    def mode(self) -> Tensor:
        """The codes."""
        return self.index


@register_kl(Certain, torch.distributions.Distribution)
def _certain_kl(q: Certain, p: torch.distributions.Distribution) -> Tensor:
    """-log p of the codes, exactly."""
    return -p.log_prob(q.index)
