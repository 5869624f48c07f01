"""Diagonal normal with network-predicted parameters, used by posteriors and conditional priors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import pyro.distributions as dist
import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from pvae.distributions.independent import Event
from pvae.nn.network import NetworkModule


def check_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    """Return the bounds unchanged; raise ValueError unless the floor is below the ceiling."""
    low, high = bounds
    if low >= high:
        raise ValueError(f"a floor below a ceiling, e.g. [-12.0, 6.0]; got [{low}, {high}]")
    return bounds


LogVarianceBounds = Annotated[tuple[float, float], Field(strict=False), AfterValidator(check_bounds)]
"""Lower and upper bound to which a predicted log-variance is clipped."""


def diagonal_normal(parameters: Tensor, bounds: tuple[float, float]) -> dist.TorchDistribution:
    """Return N(loc, diag(exp(log_variance))), event shape `(dim,)`, of (loc, log_variance) `(..., 2 dim)`."""
    loc, log_variance = parameters.chunk(2, -1)
    return Event(dist.Normal(loc, log_variance.clamp(*bounds).mul(0.5).exp()), 1)


def lower_factor(scale: Tensor, below: Tensor) -> Tensor:
    """Return the Cholesky factor diag(scale) (I + strictly lower triangle), `(..., d, d)`, of a covariance matrix.

    Arguments:
        scale: the positive diagonal, `(..., d)`: standard deviation of each coordinate given those before it.
        below: the strictly lower triangle of the unit factor, row by row, `(..., d (d - 1) / 2)`.
    """
    d = scale.shape[-1]
    row, column = torch.tril_indices(d, d, -1, device=scale.device)
    unit = torch.diag_embed(torch.ones_like(scale))
    unit[..., row, column] = below
    return scale[..., None] * unit


class NormalHead(nn.Module):
    """Network that outputs the location and log-variance of a diagonal normal."""

    def __init__(self, network: NetworkModule, bounds: tuple[float, float]) -> None:
        super().__init__()
        self.network = network
        self.bounds = bounds

    def forward(
        self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor] | None = None
    ) -> dist.TorchDistribution:
        """Return N(loc, diag scale^2), batch shape `(...)`, for named inputs `(..., *shape)`."""
        return diagonal_normal(self.network(inputs), self.bounds)

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the features of the network before its last layer, `(..., width)`."""
        return self.network.features(inputs)
