"""Normal likelihoods: independent elements, or one covariance over all of them."""

from __future__ import annotations

import math
from math import prod
from typing import ClassVar, Literal, final

import pyro.distributions as dist
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Shape
from pvae.distributions.factored_normal import FactoredNormal
from pvae.distributions.independent import Event
from pvae.models.likelihoods.base import Likelihood, LikelihoodModule
from pvae.models.likelihoods.closed_form import ClosedForm, MultivariateNormalForm, NormalForm
from pvae.nn.heads import lower_factor


class NormalModule(LikelihoodModule):
    """Independent normal elements with a fixed, a shared learned, or a predicted scale."""

    log_scale: Tensor

    def __init__(self, x: Shape, mode: str, scale: float, floor: float) -> None:
        super().__init__(x, 2 if mode == "per_datum" else 1)
        self.floor = 0.0 if mode == "fixed" else floor
        self.offset = torch.tensor(scale).log().item()
        if mode == "shared":
            self.log_scale = nn.Parameter(torch.tensor(self.offset))
        elif mode == "fixed":
            self.register_buffer("log_scale", torch.tensor(self.offset), persistent=False)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """`(..., channels * x[0], *x[1:])` to the distribution."""
        if self.channels == 1:
            loc, log_scale = h, self.log_scale
        else:
            loc, offset = self.split(h)
            log_scale = offset + self.offset
        return Event(dist.Normal(loc, log_scale.exp().clamp(min=self.floor)), len(self.x))

    def closed_form(self) -> ClosedForm:
        return NormalForm(self)


@final
class Normal(Likelihood):
    """Independent normal elements; a fixed scale makes the reconstruction a scaled squared error."""

    kind: Literal["normal"] = "normal"
    closed_form: ClassVar[bool] = True
    scale: Literal["fixed", "shared", "per_datum"] = "shared"
    """`fixed`: the declared `value`; `shared`: one learned number; `per_datum`: predicted for every element."""
    value: float = Field(default=0.3, gt=0)
    """The fixed scale, or where learning starts."""
    floor: float = Field(default=1e-3, gt=0)
    """Smallest scale: the density of a learned scale has no upper bound otherwise."""

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers."""
        return constraints.real

    @property
    def channels(self) -> int:
        """Location, and log-scale when it is predicted."""
        return 2 if self.scale == "per_datum" else 1

    def build(self, x: Shape) -> LikelihoodModule:
        return NormalModule(x, self.scale, self.value, self.floor)


class MultivariateNormalModule(LikelihoodModule):
    """One normal over all elements of x; the decoder gives its mean and (if `full`) the factor of its covariance.

    The factor is diag(s) (I + strictly lower triangle) with s^2 = value^2 exp(2 a) + floor: any a and any triangle
    will do, and no conditional variance is below `floor`.
    """

    def __init__(self, x: Shape, covariance: str, value: float, floor: float) -> None:
        super().__init__(x, 1)
        self.size = d = prod(self.x)
        self.full, self.offset, self.floor = covariance == "full", math.log(value), floor
        if not self.full:
            self.factor = nn.Parameter(torch.zeros(d * (d + 1) // 2))

    @property
    def inputs(self) -> Shape:
        """The event's shape or, with a full covariance, D (D + 3) / 2 numbers."""
        return (self.size * (self.size + 3) // 2,) if self.full else self.x

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """`(..., *inputs)` to the distribution."""
        d = self.size
        if self.full:
            loc, log_scale, below = h.split([d, d, d * (d - 1) // 2], -1)
        else:
            loc = h.flatten(h.dim() - len(self.x))
            log_scale, below = self.factor.split([d, d * (d - 1) // 2])
        scale = (2 * (log_scale + self.offset)).exp().add(self.floor).sqrt()
        return FactoredNormal(loc, lower_factor(scale, below), self.x)

    def closed_form(self) -> ClosedForm:
        return MultivariateNormalForm(self)


@final
class MultivariateNormal(Likelihood):
    """One normal over all elements of x, of any covariance: with a `table`, the Gaussian mixture."""

    kind: Literal["multivariate_normal"] = "multivariate_normal"
    closed_form: ClassVar[bool] = True
    covariance: Literal["full", "tied"] = "full"
    """`full`: predicted for every datum (one for each component of a mixture); `tied`: one learned for all."""
    value: float = Field(default=0.3, gt=0)
    """Standard deviation of every element where gradient learning starts."""
    floor: float = Field(default=1e-6, ge=0)
    """Least variance. The objective `em` adds it to the diagonal, as scikit-learn does with `reg_covar`."""

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers."""
        return constraints.real

    def build(self, x: Shape) -> LikelihoodModule:
        return MultivariateNormalModule(x, self.covariance, self.value, self.floor)
