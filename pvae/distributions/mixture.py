"""Mixture of distributions of one exponential family."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pvae.distributions.exponential import Members
from pvae.util.types import Size


class Mixture(dist.TorchDistribution):
    r"""Mixture sum_k w_k q_k(z) of distributions of one exponential family, scored by one matrix product.

    The log density is a log-sum-exp of log q_k(z) = <T(z), eta_k> - A(eta_k), differentiable. The product takes
    differences of terms of size z^2 / 2 s^2, so it is computed in float64 whatever the type of the members; the result
    has the type of the values.

    Arguments:
        members: the K mixture components, over values `(D,)`.
        log_weights: normalised log mixture weights log w_k, `(K,)`; None for uniform weights.
        left_out: components excluded from the mixture of each row, `(batch, K)` booleans (leave-one-out); None for no
            exclusion.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(
        self,
        members: Members,
        log_weights: Tensor | None = None,
        batch_shape: Size = (),
        left_out: Tensor | None = None,
    ) -> None:
        self.members, self.log_weights, self.left_out = members, log_weights, left_out
        super().__init__(torch.Size(batch_shape), torch.Size((members.dim,)), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the exact log density of values `(..., D)`, nats, `(...)`."""
        members = self.members.double()
        eta, constant = members.natural()
        even = constant.new_full((), -math.log(len(members)))
        constant = constant + (even if self.log_weights is None else self.log_weights.double())
        flat = value.reshape(-1, self.event_shape[0]).double()
        if torch.is_grad_enabled():
            return self._scored(flat, members, eta, constant).to(value.dtype).reshape(value.shape[:-1])
        size = max(1, BLOCK_SCORES // len(members))
        if self.left_out is not None:  # a block holds whole batches
            size = max(1, size // len(self.left_out)) * len(self.left_out)
        blocks = [self._scored(block, members, eta, constant) for block in flat.split(size)]
        return torch.cat(blocks).to(value.dtype).reshape(value.shape[:-1])

    def _scored(self, flat: Tensor, members: Members, eta: Tensor, constant: Tensor) -> Tensor:
        scores = torch.addmm(constant, members.statistics(flat, members.origin), eta)
        if self.left_out is None:
            return scores.logsumexp(-1)
        rows, count = self.left_out.shape
        scores = scores.reshape(-1, rows, count).masked_fill(self.left_out, -torch.inf)
        share = torch.log1p(-self.left_out.double().mean(-1))  # renormalises the weights of the other components
        return (scores.logsumexp(-1) - share).flatten()

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return samples `sample_shape + batch_shape + (D,)` of the whole mixture, without gradient."""
        shape = torch.Size(sample_shape) + self.batch_shape
        count = shape.numel()
        with torch.no_grad():
            if self.log_weights is None:
                index = torch.randint(len(self.members), (count,), device=self.members.origin.device)
            else:
                index = torch.multinomial(self.log_weights.exp(), count, replacement=True)
            return self.members.rows(index).sample().reshape(shape + self.event_shape)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Mixture:
        """Return this distribution expanded to `batch_shape`."""
        if self.batch_shape == tuple(batch_shape):
            return self
        return Mixture(self.members, self.log_weights, batch_shape, self.left_out)


BLOCK_SCORES = 2**23
"""Largest number of component log densities computed at a time, when no gradient is recorded."""
