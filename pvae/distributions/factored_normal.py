"""Multivariate normal over events of any shape, parametrised by a Cholesky factor of its covariance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pvae.util.types import Size


class FactoredNormal(dist.TorchDistribution):
    """Multivariate normal N(loc, L L^T) over a flattened event of any shape; rows share one factor L without copies.

    `torch.distributions.MultivariateNormal` copies L for every row once a plate has expanded it: K n D^2 numbers for n
    rows under K enumerated mixture components.

    Arguments:
        loc: mean of the flattened event, `(..., D)`.
        scale_tril: L, `(D, D)`, or `(..., D, D)` with as many batch dimensions as `loc`.
        event: shape of an event of D elements.
        batch: batch shape, when it is larger than that of `loc`.
    """

    arg_constraints = {"loc": constraints.real_vector, "scale_tril": constraints.lower_cholesky}
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        scale_tril: Tensor,
        event: Size,
        batch: Size | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.scale_tril = loc, scale_tril
        super().__init__(
            torch.Size(loc.shape[:-1] if batch is None else batch), torch.Size(event), validate_args=validate_args
        )

    @property
    def support(self) -> constraints.Constraint:
        """Support: real numbers in every element of the event."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Size, _instance: Any = None) -> FactoredNormal:
        """Return this distribution expanded to `batch_shape`."""
        return FactoredNormal(self.loc, self.scale_tril, self.event_shape, batch_shape, validate_args=False)

    def _along(self, operation: Callable[[Tensor, Tensor], Tensor], vectors: Tensor) -> Tensor:
        """Return `operation(L, columns)` for vectors `(..., D)`, as one matrix if the last batch dimension shares L."""
        factor = self.scale_tril
        if vectors.dim() == 1 or factor.dim() > 2 and factor.shape[-3] > 1:
            return operation(factor, vectors.unsqueeze(-1)).squeeze(-1)
        return operation(factor.squeeze(-3) if factor.dim() > 2 else factor, vectors.mT).mT

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of values `(..., *event)`, nats, `(...)`; exact."""
        if self._validate_args:
            self._validate_sample(value)
        difference = value.flatten(value.dim() - len(self.event_shape)) - self.loc
        unit = self._along(lambda factor, y: torch.linalg.solve_triangular(factor, y, upper=False), difference)
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        score = -0.5 * (unit.square().sum(-1) + unit.shape[-1] * math.log(2 * math.pi)) - log_det
        return score.expand(torch.broadcast_shapes(score.shape, self.batch_shape))

    def rsample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return reparametrised samples, `sample_shape + (..., *event)`."""
        shape = (*sample_shape, *self.batch_shape, self.loc.shape[-1])
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return (self.loc + self._along(torch.matmul, noise)).unflatten(-1, self.event_shape)

    def _full(self, value: Tensor) -> Tensor:
        return value.expand(*self.batch_shape, value.shape[-1]).unflatten(-1, self.event_shape)

    @property
    def mean(self) -> Tensor:
        """Mean of every element, `(..., *event)`."""
        return self._full(self.loc)

    @property
    def variance(self) -> Tensor:
        """Marginal variance of every element, `(..., *event)`."""
        return self._full(self.scale_tril.square().sum(-1))
