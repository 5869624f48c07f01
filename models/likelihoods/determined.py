"""Likelihood of data that z determines: a point mass at the decoder's output."""

from __future__ import annotations

from typing import ClassVar, Literal, final

import pyro.distributions as dist
from torch import Tensor
from torch.distributions import constraints

from pvae.component import Shape
from pvae.distributions.base import Determined, Implicit
from pvae.models.likelihoods.base import Likelihood, LikelihoodModule


class DeterminedModule(LikelihoodModule):
    """Module of the likelihood `determined`: a point mass at the decoder's output, or at its logistic function."""

    is_point: ClassVar[bool] = True

    def __init__(self, x: Shape, squash: str) -> None:
        super().__init__(x, 1)
        self.squash = squash

    def value(self, h: Tensor) -> Tensor:
        """Return x `(..., *x)` for a decoder output `h`."""
        return h.sigmoid() if self.squash == "sigmoid" else h

    def implicit(self) -> LikelihoodModule:
        return ImplicitModule(self)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the point mass at x for a decoder output `(..., *x)`."""
        return Determined(self.value(h), event_dim=len(self.x))


class ImplicitModule(LikelihoodModule):
    """Point mass of the likelihood `point` without its density, for a GAN, whose guide does not invert the decoder."""

    def __init__(self, point: DeterminedModule) -> None:
        super().__init__(point.x, 1)
        self.point = point

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return a distribution that can be sampled but has no density, for a decoder output `(..., *x)`."""
        return Implicit(self.point.value(h), event_dim=len(self.x), validate_args=False)


@final
class DeterminedLikelihood(Likelihood):
    """Point-mass likelihood x = g(z): with the posterior `inverse`, log p(x | z) is 0 without comparing x to g(z).

    With the objective `gan` the guide does not invert the decoder, and x has no density.
    """

    kind: Literal["determined"] = "determined"
    hint: ClassVar[str] = "use data of real numbers, with squash = 'sigmoid' data.scale = 'unit'"
    squash: Literal["none", "sigmoid"] = "none"
    """`sigmoid`: x in [0, 1] is the logistic function of the decoder's output; for the objective `gan` only."""

    @property
    def support(self) -> constraints.Constraint:
        """Support of each element: real numbers, or [0, 1] with `squash = "sigmoid"`."""
        return constraints.unit_interval if self.squash == "sigmoid" else constraints.real

    @property
    def is_point(self) -> bool:
        return True

    def build(self, x: Shape) -> LikelihoodModule:
        return DeterminedModule(x, self.squash)
