"""Likelihoods of data that z determines: a point mass at the decoder's output, or at its grey value."""

from __future__ import annotations

from typing import ClassVar, Literal, final

import pyro.distributions as dist
from pydantic import Field
from torch import Tensor
from torch.distributions import constraints

from pvae.component import Shape
from pvae.distributions.base import Determined, Implicit, Rounded
from pvae.distributions.observed import lattice
from pvae.models.likelihoods.base import Likelihood, LikelihoodModule
from pvae.models.likelihoods.standard import GREYS


class PointModule(LikelihoodModule):
    """Module of the likelihoods under which z determines x: a point mass at a function of the decoder's output.

    Arguments:
        x: event shape of a datum.
        declared: the likelihood.
        is_point: False for a GAN, whose guide does not invert the decoder: x is then sampled but has no density.
    """

    def __init__(self, x: Shape, declared: DeterminedLikelihood | RoundedLikelihood, is_point: bool = True) -> None:
        super().__init__(x, 1)
        self.declared, self.is_point = declared, is_point

    def implicit(self) -> LikelihoodModule:
        return PointModule(self.x, self.declared, is_point=False)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the point mass at x, without a density if `is_point` is False, for a decoder output `(..., *x)`."""
        point = self.declared.point(h, len(self.x))
        return point if self.is_point else Implicit(point.v, event_dim=len(self.x), validate_args=False)


@final
class DeterminedLikelihood(Likelihood):
    """Point-mass likelihood x = g(z): with the posterior `inverse`, log p(x | z) is 0 without comparing x to g(z).

    With the objective `gan` the guide does not invert the decoder, and x has no density.
    """

    kind: Literal["determined"] = "determined"
    hint: ClassVar[str] = "use data of real numbers, with squash = 'sigmoid' data.scale = 'unit'"
    is_point: ClassVar[bool] = True
    squash: Literal["none", "sigmoid"] = "none"
    """`sigmoid`: x in [0, 1] is the logistic function of the decoder's output; for the objective `gan` only."""

    @property
    def support(self) -> constraints.Constraint:
        """Support of each element: real numbers, or [0, 1] with `squash = "sigmoid"`."""
        return constraints.unit_interval if self.squash == "sigmoid" else constraints.real

    def point(self, h: Tensor, event_dim: int) -> Determined:
        """Return the point mass at x for a decoder output `(..., *x)` of `event_dim` event dimensions."""
        return Determined(h.sigmoid() if self.squash == "sigmoid" else h, event_dim=event_dim)

    def build(self, x: Shape) -> LikelihoodModule:
        return PointModule(x, self)


@final
class RoundedLikelihood(Likelihood):
    """Point-mass likelihood: x is g(z) in [0, 1] rounded down to a grey value; the posterior must be `dequantised`."""

    kind: Literal["rounded"] = "rounded"
    hint: ClassVar[str] = GREYS
    is_point: ClassVar[bool] = True
    levels: int = Field(default=256, gt=1)
    """Number of grey values; a pixel takes the values k / (levels - 1), k = 0 .. levels - 1."""

    @property
    def support(self) -> constraints.Constraint:
        """Support of each pixel: the grey values k / (levels - 1)."""
        return lattice(self.levels)

    def point(self, h: Tensor, event_dim: int) -> Determined:
        """Return the point mass at x for a decoder output `(..., *x)` in [0, 1] of `event_dim` event dimensions."""
        return Rounded(h, self.levels, event_dim)

    def build(self, x: Shape) -> LikelihoodModule:
        return PointModule(x, self)
