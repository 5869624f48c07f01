"""Likelihood of an x that z determines: the decoder's output with certainty."""

from __future__ import annotations

from typing import ClassVar, Literal, final

import pyro.distributions as dist
from torch import Tensor
from torch.distributions import constraints

from pvae.component import Shape
from pvae.distributions.determined import Determined, Implicit
from pvae.models.likelihoods.base import Likelihood, LikelihoodModule


class DeterminedModule(LikelihoodModule):
    """x is the decoder's output, or its logistic function."""

    is_point: ClassVar[bool] = True

    def __init__(self, x: Shape, squash: str) -> None:
        super().__init__(x, 1)
        self.squash = squash

    def value(self, h: Tensor) -> Tensor:
        """Return x `(..., *x)` of the decoder's output `h`."""
        return h.sigmoid() if self.squash == "sigmoid" else h

    def implicit(self) -> LikelihoodModule:
        return ImplicitModule(self)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """`(..., *x)` to the point."""
        return Determined(self.value(h), event_dim=len(self.x))


class ImplicitModule(LikelihoodModule):
    """x as `point` has it, in a pair whose guide does not find z back: without a density."""

    def __init__(self, point: DeterminedModule) -> None:
        super().__init__(point.x, 1)
        self.point = point

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """`(..., *x)` to what can be drawn and not scored."""
        return Implicit(self.point.value(h), event_dim=len(self.x), validate_args=False)


@final
class DeterminedLikelihood(Likelihood):
    """x = g(z) with certainty: log p(x | z) is 0, never found by comparing numbers, where the posterior is `inverse`.

    With the objective `gan` nothing finds z back, and x has no density at all.
    """

    kind: Literal["determined"] = "determined"
    hint: ClassVar[str] = "use data of real numbers, with squash = 'sigmoid' data.scale = 'unit'"
    squash: Literal["none", "sigmoid"] = "none"
    """`sigmoid`: x in [0, 1] is the logistic function of the decoder's output; for the objective `gan` alone."""

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers, or those in [0, 1]."""
        return constraints.unit_interval if self.squash == "sigmoid" else constraints.real

    @property
    def is_point(self) -> bool:
        return True

    def build(self, x: Shape) -> LikelihoodModule:
        return DeterminedModule(x, self.squash)
