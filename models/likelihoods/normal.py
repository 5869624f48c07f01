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
from pvae.distributions.base import Event
from pvae.distributions.observed import FactoredNormal
from pvae.models.likelihoods.base import Likelihood, LikelihoodModule
from pvae.models.likelihoods.closed_form import ClosedForm, MultivariateNormalForm, NormalForm
from pvae.nn.network import lower_factor


class NormalModule(LikelihoodModule):
    """Module of the normal likelihood: independent elements, with a fixed, a learned shared or a predicted scale."""

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
        """Return the distribution of x for a decoder output `(..., channels * x[0], *x[1:])`."""
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
    """Normal likelihood of independent elements; a fixed scale makes the reconstruction a scaled squared error."""

    kind: Literal["normal"] = "normal"
    closed_form: ClassVar[bool] = True
    scale: Literal["fixed", "shared", "per_datum"] = "shared"
    """Standard deviation: `fixed` at `value`; `shared`, one learned number; `per_datum`, predicted per element."""
    value: float = Field(default=0.3, gt=0)
    """Fixed standard deviation, or the initial one if it is learned or predicted."""
    floor: float = Field(default=1e-3, gt=0)
    """Smallest learned standard deviation; without it the density of a learned scale has no upper bound."""

    @property
    def support(self) -> constraints.Constraint:
        """Support of each element: real numbers."""
        return constraints.real

    @property
    def channels(self) -> int:
        """Number of parameters of each element: the mean and, if it is predicted, the log-scale."""
        return 2 if self.scale == "per_datum" else 1

    def build(self, x: Shape) -> LikelihoodModule:
        return NormalModule(x, self.scale, self.value, self.floor)


class MultivariateNormalModule(LikelihoodModule):
    """Module of a normal over all elements of x; the decoder outputs its mean and (if `full`) its covariance factor.

    The factor is diag(s) (I + strictly lower triangle) with s^2 = value^2 exp(2 a) + floor: a and the triangle are
    unconstrained, and no conditional variance (of an element given those before it) is below `floor`.
    """

    def __init__(self, x: Shape, covariance: str, value: float, floor: float) -> None:
        super().__init__(x, 1)
        self.size = d = prod(self.x)
        self.full, self.offset, self.floor = covariance == "full", math.log(value), floor
        if not self.full:
            self.factor = nn.Parameter(torch.zeros(d * (d + 1) // 2))

    @property
    def inputs(self) -> Shape:
        """Event shape of the decoder's output: that of x or, with a full covariance, D (D + 3) / 2 for D elements."""
        return (self.size * (self.size + 3) // 2,) if self.full else self.x

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the distribution of x for a decoder output `(..., *inputs)`."""
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
    """Multivariate normal likelihood over all of x; for a code and the network `table` it gives a Gaussian mixture."""

    kind: Literal["multivariate_normal"] = "multivariate_normal"
    closed_form: ClassVar[bool] = True
    covariance: Literal["full", "tied"] = "full"
    """Covariance: `full`, predicted for every datum (one per mixture component); `tied`, one learned for all data."""
    value: float = Field(default=0.3, gt=0)
    """Initial standard deviation of every element, when the model is fitted by gradients."""
    floor: float = Field(default=1e-6, ge=0)
    """Smallest conditional variance; the objective `em` adds it to the diagonal, as scikit-learn does `reg_covar`."""

    @property
    def support(self) -> constraints.Constraint:
        """Support of each element: real numbers."""
        return constraints.real

    def build(self, x: Shape) -> LikelihoodModule:
        return MultivariateNormalModule(x, self.covariance, self.value, self.floor)
