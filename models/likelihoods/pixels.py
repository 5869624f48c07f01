"""Likelihoods of grey values: a logistic density integrated over each bin, and a rounded point."""

from __future__ import annotations

from typing import ClassVar, Literal, final

import pyro.distributions as dist
from pydantic import Field
from torch import Tensor
from torch.distributions import constraints

from pvae.component import Shape
from pvae.distributions.determined import Rounded
from pvae.distributions.discretized_logistic import DiscretizedLogistic, lattice
from pvae.distributions.independent import Event
from pvae.models.likelihoods.base import Likelihood, LikelihoodModule


class DiscretizedLogisticModule(LikelihoodModule):
    """Independent discretised logistic elements; the decoder gives centre and log-scale."""

    def __init__(self, x: Shape, levels: int, floor: float) -> None:
        super().__init__(x, 2)
        self.levels = levels
        self.floor = floor

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """`(..., 2 x[0], *x[1:])` to the distribution."""
        loc, log_scale = self.split(h)
        logistic = DiscretizedLogistic(loc + 0.5, (log_scale - 2.0).clamp(min=self.floor), self.levels)
        return Event(logistic, len(self.x))


@final
class DiscretizedLogisticLikelihood(Likelihood):
    """Pixels of `levels` grey values under a logistic density integrated over each bin."""

    kind: Literal["discretized_logistic"] = "discretized_logistic"
    levels: int = Field(default=256, gt=1)
    """Number of grey values; a datum is k / (levels - 1)."""
    floor: float = -7.0
    """Smallest log-scale, in units of the [0, 1] range."""
    hint: ClassVar[str] = "set data.scale = 'unit', data.binarize = 'none' and likelihood.levels (17 for digits)"

    @property
    def support(self) -> constraints.Constraint:
        """The grey values."""
        return lattice(self.levels)

    @property
    def channels(self) -> int:
        """Centre and log-scale."""
        return 2

    def build(self, x: Shape) -> LikelihoodModule:
        return DiscretizedLogisticModule(x, self.levels, self.floor)


class RoundedModule(LikelihoodModule):
    """x is the decoder's output rounded down to a level."""

    is_point: ClassVar[bool] = True

    def __init__(self, x: Shape, levels: int) -> None:
        super().__init__(x, 1)
        self.levels = levels

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """`(..., *x)` in [0, 1] to the point."""
        return Rounded(h, self.levels, len(self.x))


@final
class RoundedLikelihood(Likelihood):
    """x is g(z) in [0, 1] rounded down to one of `levels` cells; the posterior must be `dequantised`."""

    kind: Literal["rounded"] = "rounded"
    levels: int = Field(default=256, gt=1)
    """Number of grey values; a datum is k / (levels - 1)."""
    hint: ClassVar[str] = "set data.scale = 'unit', data.binarize = 'none' and likelihood.levels (17 for digits)"

    @property
    def support(self) -> constraints.Constraint:
        """The grey values."""
        return lattice(self.levels)

    @property
    def is_point(self) -> bool:
        return True

    def build(self, x: Shape) -> LikelihoodModule:
        return RoundedModule(x, self.levels)
