"""Likelihoods of pixel grey values: the discretised logistic, and a deterministic value rounded to a grey value."""

from __future__ import annotations

from typing import ClassVar, Literal, final

import pyro.distributions as dist
from pydantic import Field
from torch import Tensor
from torch.distributions import constraints

from pvae.component import Shape
from pvae.distributions.base import Event, Rounded
from pvae.distributions.observed import DiscretizedLogistic, lattice
from pvae.models.likelihoods.base import Likelihood, LikelihoodModule


class DiscretizedLogisticModule(LikelihoodModule):
    """Module of the discretised logistic likelihood: independent pixels; the decoder outputs location and log-scale."""

    def __init__(self, x: Shape, levels: int, floor: float) -> None:
        super().__init__(x, 2)
        self.levels = levels
        self.floor = floor

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the distribution of x for a decoder output `(..., 2 x[0], *x[1:])`."""
        loc, log_scale = self.split(h)
        logistic = DiscretizedLogistic(loc + 0.5, (log_scale - 2.0).clamp(min=self.floor), self.levels)
        return Event(logistic, len(self.x))


@final
class DiscretizedLogisticLikelihood(Likelihood):
    """Discretised logistic likelihood of pixels: a logistic density integrated over the bin of each grey value."""

    kind: Literal["discretized_logistic"] = "discretized_logistic"
    levels: int = Field(default=256, gt=1)
    """Number of grey values; a pixel takes the values k / (levels - 1), k = 0 .. levels - 1."""
    floor: float = -7.0
    """Smallest log-scale of the logistic density, for pixels in [0, 1]."""
    hint: ClassVar[str] = "set data.scale = 'unit', data.binarize = 'none' and likelihood.levels (17 for digits)"

    @property
    def support(self) -> constraints.Constraint:
        """Support of each pixel: the grey values k / (levels - 1)."""
        return lattice(self.levels)

    @property
    def channels(self) -> int:
        """Number of parameters of each pixel: location and log-scale."""
        return 2

    def build(self, x: Shape) -> LikelihoodModule:
        return DiscretizedLogisticModule(x, self.levels, self.floor)


class RoundedModule(LikelihoodModule):
    """Module of the likelihood `rounded`: a point mass at the decoder's output, rounded down to a grey value."""

    is_point: ClassVar[bool] = True

    def __init__(self, x: Shape, levels: int) -> None:
        super().__init__(x, 1)
        self.levels = levels

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the point mass at x for a decoder output `(..., *x)` in [0, 1]."""
        return Rounded(h, self.levels, len(self.x))


@final
class RoundedLikelihood(Likelihood):
    """Point-mass likelihood: x is g(z) in [0, 1] rounded down to a grey value; the posterior must be `dequantised`."""

    kind: Literal["rounded"] = "rounded"
    levels: int = Field(default=256, gt=1)
    """Number of grey values; a pixel takes the values k / (levels - 1), k = 0 .. levels - 1."""
    hint: ClassVar[str] = "set data.scale = 'unit', data.binarize = 'none' and likelihood.levels (17 for digits)"

    @property
    def support(self) -> constraints.Constraint:
        """Support of each pixel: the grey values k / (levels - 1)."""
        return lattice(self.levels)

    @property
    def is_point(self) -> bool:
        return True

    def build(self, x: Shape) -> LikelihoodModule:
        return RoundedModule(x, self.levels)
