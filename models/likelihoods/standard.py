"""Likelihoods of independent elements, the multivariate normal, and point masses; not those of counts and tables."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import pyro.distributions as dist
import torch
from pydantic import Field
from torch import Tensor, nn

from pvae.component import Shape
from pvae.distributions import base as distributions
from pvae.distributions.base import Determined, DiscretizedLogistic, Event, FactoredNormal, Implicit, Rounded, lattice
from pvae.models.likelihoods import base
from pvae.models.likelihoods.base import Likelihood, LikelihoodModule
from pvae.nn.network import lower_factor


class Greys(Likelihood):
    """Base of likelihoods of pixels that take grey values."""

    hint: ClassVar[str] = "set data.scale = 'unit', data.binarize = 'none' and likelihood.levels (17 for digits)"
    levels: int = Field(default=256, gt=1)
    """Number of grey values; a pixel takes the values k / (levels - 1): 256 for 8-bit images of data.scale = 'unit'."""

    @property
    def support(self) -> dist.constraints.Constraint:
        """Support of each pixel: the grey values k / (levels - 1)."""
        return lattice(self.levels)


class Elements(Likelihood):
    """Base of likelihoods of independent elements, functions of the decoder's output and of learned parameters."""

    learned: ClassVar[Mapping[str, float]] = {}
    """Parameters that are learned, one for each element, by name, with their initial values."""

    @abstractmethod
    def element(self, *parameters: Tensor) -> dist.TorchDistribution:
        """Return the distribution of every element, batch shape `(..., *x)`.

        Arguments:
            parameters: `channels` tensors `(..., *x)` from the decoder, then those `learned`, each `(*x)`.
        """

    def build(self, x: Shape) -> LikelihoodModule:
        return ElementsModule(x, self)


class ElementsModule(LikelihoodModule):
    """Module of a likelihood of independent elements: parameters are the decoder's output, or learned."""

    def __init__(self, x: Shape, declared: Elements) -> None:
        super().__init__(x, declared.channels)
        self.declared, self.form = declared, declared.closed_form
        for name, start in declared.learned.items():
            self.register_parameter(name, nn.Parameter(torch.full(self.x, start)))

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the distribution of x for a decoder output `(..., channels * x[0], *x[1:])`."""
        return Event(self.declared.element(*self.split(h), *self.parameters()), len(self.x))


class Bernoulli(Elements):
    """Bernoulli likelihood: elements of x are independent and binary."""

    kind: Literal["bernoulli"] = "bernoulli"
    hint: ClassVar[str] = "set data.binarize to 'dynamic', 'static' or 'threshold', or use likelihood 'normal'"
    support: ClassVar[dist.constraints.Constraint] = dist.constraints.boolean
    closed_form: ClassVar[type[base.ClosedForm] | None] = base.BernoulliForm

    def element(self, *parameters: Tensor) -> dist.TorchDistribution:
        return distributions.bernoulli(parameters[0])


class Categorical(Elements):
    """Categorical likelihood: elements of x are independent, with unordered levels 0 .. levels - 1."""

    kind: Literal["categorical"] = "categorical"
    hint: ClassVar[str] = "set data.scale = 'raw' and likelihood.levels to the number of levels"
    closed_form: ClassVar[type[base.ClosedForm] | None] = base.CategoricalForm
    levels: int = Field(gt=1)
    """Number of levels of an element."""

    @property
    def support(self) -> dist.constraints.Constraint:
        """Support of each element: integers 0 .. levels - 1."""
        return dist.constraints.integer_interval(0, self.levels - 1)

    @property
    def channels(self) -> int:
        """Number of parameters of each element: one logit for each level."""
        return self.levels

    def element(self, *parameters: Tensor) -> dist.TorchDistribution:
        return dist.Categorical(logits=torch.stack(parameters, -1))


class DiscretizedLogisticLikelihood(Greys, Elements):
    """Discretised logistic likelihood of pixels: a logistic density integrated over the bin of each grey value."""

    kind: Literal["discretized_logistic"] = "discretized_logistic"
    channels: ClassVar[int] = 2
    floor: float = -7.0
    """Smallest log-scale of the logistic density, for pixels in [0, 1]."""

    def element(self, *parameters: Tensor) -> dist.TorchDistribution:
        loc, log_scale = parameters
        return DiscretizedLogistic(loc + 0.5, (log_scale - 2.0).clamp(min=self.floor), self.levels)


class MixtureOfLogistics(Greys, Elements):
    """Mixture of discretised logistic likelihoods of pixels: each grey value has the mass of its bin, summing to one.

    Pixels and colours are independent given z. The measure counts grey values: log p is a log probability in nats, not
    the log of a density.

    References: PixelCNN++ (Salimans et al., 2017), https://arxiv.org/abs/1701.05517
    """

    kind: Literal["mixture_of_logistics"] = "mixture_of_logistics"
    components: int = Field(default=5, gt=1)
    """Number of logistic components of a pixel."""
    floor: float = -7.0
    """Smallest log-scale of a component, for pixels in [0, 1]."""

    @property
    def channels(self) -> int:
        """Number of parameters of each pixel: weight, centre and log-scale of every component."""
        return 3 * self.components

    def element(self, *parameters: Tensor) -> dist.TorchDistribution:
        logits, loc, log_scale = torch.stack(parameters, -1).chunk(3, -1)
        spread = (torch.arange(self.components, dtype=loc.dtype, device=loc.device) + 0.5) / self.components
        parts = DiscretizedLogistic(loc + spread, (log_scale - 2.0).clamp(min=self.floor), self.levels)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), parts)


class Normal(Likelihood):
    """Normal likelihood of independent elements; a fixed scale makes the reconstruction a scaled squared error."""

    kind: Literal["normal"] = "normal"
    support: ClassVar[dist.constraints.Constraint] = dist.constraints.real
    closed_form: ClassVar[type[base.ClosedForm] | None] = base.NormalForm
    scale: Literal["fixed", "shared", "per_datum"] = "shared"
    """Standard deviation: `fixed` at `value`; `shared`, one learned number; `per_datum`, predicted per element."""
    value: float = Field(default=0.3, gt=0)
    """Fixed standard deviation, or the initial one if it is learned or predicted."""
    floor: float = Field(default=1e-3, gt=0)
    """Smallest learned standard deviation; without it the density of a learned scale has no upper bound."""

    @property
    def channels(self) -> int:
        """Number of parameters of each element: the mean and, if it is predicted, the log-scale."""
        return 2 if self.scale == "per_datum" else 1

    def build(self, x: Shape) -> LikelihoodModule:
        return NormalModule(x, self)


class NormalModule(LikelihoodModule):
    """Module of the normal likelihood: independent elements, with a fixed, a learned shared or a predicted scale."""

    form = base.NormalForm

    def __init__(self, x: Shape, declared: Normal) -> None:
        super().__init__(x, declared.channels)
        self.floor = 0.0 if declared.scale == "fixed" else declared.floor
        self.offset = torch.tensor(declared.value).log().item()
        if declared.scale == "shared":
            self.log_scale: Tensor = nn.Parameter(torch.tensor(self.offset))
        elif declared.scale == "fixed":
            self.log_scale = nn.Buffer(torch.tensor(self.offset), persistent=False)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the distribution of x for a decoder output `(..., channels * x[0], *x[1:])`."""
        loc, *offset = self.split(h)
        log_scale = offset[0] + self.offset if offset else self.log_scale
        return Event(dist.Normal(loc, log_scale.exp().clamp(min=self.floor)), len(self.x))


class MultivariateNormal(Likelihood):
    """Multivariate normal likelihood over all of x; for a code and the network `table` it gives a Gaussian mixture."""

    kind: Literal["multivariate_normal"] = "multivariate_normal"
    support: ClassVar[dist.constraints.Constraint] = dist.constraints.real
    closed_form: ClassVar[type[base.ClosedForm] | None] = base.MultivariateNormalForm
    covariance: Literal["full", "tied"] = "full"
    """Covariance: `full`, predicted for every datum (one per mixture component); `tied`, one learned for all data."""
    value: float = Field(default=0.3, gt=0)
    """Initial standard deviation of every element, when the model is fitted by gradients."""
    floor: float = Field(default=1e-6, ge=0)
    """Smallest conditional variance; the objective `em` adds it to the diagonal, as scikit-learn does `reg_covar`."""

    def build(self, x: Shape) -> LikelihoodModule:
        return MultivariateNormalModule(x, self)


class MultivariateNormalModule(LikelihoodModule):
    """Module of a normal over all elements of x; the decoder outputs its mean and (if `full`) its covariance factor.

    The factor is diag(s) (I + strictly lower triangle) with s^2 = value^2 exp(2 a) + floor: a and the triangle are
    unconstrained, and no conditional variance (of an element given those before it) is below `floor`.
    """

    form = base.MultivariateNormalForm

    def __init__(self, x: Shape, declared: MultivariateNormal) -> None:
        super().__init__(x, 1)
        self.size = d = math.prod(self.x)
        self.full, self.offset, self.floor = declared.covariance == "full", math.log(declared.value), declared.floor
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
    def support(self) -> dist.constraints.Constraint:
        """Support of each element: real numbers, or [0, 1] with `squash = "sigmoid"`."""
        return dist.constraints.unit_interval if self.squash == "sigmoid" else dist.constraints.real

    def point(self, h: Tensor, event_dim: int) -> Determined:
        """Return the point mass at x for a decoder output `(..., *x)` of `event_dim` event dimensions."""
        return Determined(h.sigmoid() if self.squash == "sigmoid" else h, event_dim=event_dim)

    def build(self, x: Shape) -> LikelihoodModule:
        return PointModule(x, self)


class RoundedLikelihood(Greys):
    """Point-mass likelihood: x is g(z) in [0, 1] rounded down to a grey value; the posterior must be `dequantised`."""

    kind: Literal["rounded"] = "rounded"
    is_point: ClassVar[bool] = True

    def point(self, h: Tensor, event_dim: int) -> Determined:
        """Return the point mass at x for a decoder output `(..., *x)` in [0, 1] of `event_dim` event dimensions."""
        return Rounded(h, self.levels, event_dim)

    def build(self, x: Shape) -> LikelihoodModule:
        return PointModule(x, self)


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
