"""Likelihoods p(x | h): from the decoder's output to a distribution over one datum."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, ClassVar, Literal, final

import pyro.distributions as dist
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Component, Shape
from pvae.distributions.determined import Determined, Implicit, Rounded
from pvae.distributions.independent import Event
from pvae.errors import DataError
from pvae.graph.column_law import Law
from pvae.nn.heads import lower_factor
from pvae.util.types import Size


class Likelihood(Component):
    """The density of a datum given the decoder's output."""

    hint: ClassVar[str] = ""
    of_tables: ClassVar[bool] = False
    """Whether it is made of the columns of a table, and of no other data."""
    closed_form: ClassVar[bool] = False
    """Whether the objective `em` can fit it: its module is a `ClosedForm`."""

    @property
    @abstractmethod
    def support(self) -> constraints.Constraint:
        """Values a datum may take, elementwise."""

    @property
    def channels(self) -> int:
        """Numbers the decoder must produce per element of x."""
        return 1

    @property
    def is_point(self) -> bool:
        """Whether z determines x: its posterior must then know the way back."""
        return False

    def over(self, laws: Sequence[Law]) -> Likelihood:
        """The likelihood of a table of such columns: itself, where it asks for none."""
        return self

    def reader(self) -> ReaderModule | None:
        """What x goes through before the guide's networks; None where they read it as it is."""
        return None

    @abstractmethod
    def build(self, x: Shape) -> LikelihoodModule:
        """A module from the decoder's output `(..., channels * x[0], *x[1:])` to a distribution of event `x`."""


class ReaderModule(nn.Module):
    """Data `(..., *x)` as the guide's networks read them, `(..., *output)`; it learns nothing."""

    output: Shape


class LikelihoodModule(nn.Module):
    """Base of what likelihoods build: splits the decoder's output into the parameters of each element."""

    is_point: ClassVar[bool] = False
    """Whether z determines x."""

    def __init__(self, x: Shape, channels: int) -> None:
        super().__init__()
        self.x = tuple(x)
        self.channels = channels

    @property
    def inputs(self) -> Shape:
        """Event shape expected of the decoder."""
        return (self.channels * self.x[0], *self.x[1:])

    def split(self, h: Tensor) -> tuple[Tensor, ...]:
        """`channels` tensors `(..., *x)`."""
        return h.unflatten(-len(self.x), (self.channels, self.x[0])).unbind(-len(self.x) - 1)

    def implicit(self) -> LikelihoodModule:
        """Return this likelihood without its density, for a pair in which x is sampled and never scored."""
        raise NotImplementedError  # pragma: no cover - declarations ask only a likelihood under which z determines x


class ClosedForm(LikelihoodModule):
    """A likelihood whose weighted maximum is in closed form: an exponential family of the decoder's output.

    Statistics are float64 sums over data, so that they add up over batches; those of normal families are about
    `origin`, `(prod(x),)`, the mean of the data, against cancellation.
    """

    def statistics(self, x: Tensor, origin: Tensor) -> Tensor:
        """Sufficient statistics of data `(n, *x)`, `(n, F)`; here x itself."""
        return x.flatten(1)

    def maximise(self, counts: Tensor, sums: Tensor, origin: Tensor) -> Tensor:
        """The decoder's outputs under which weighted data are most likely; sets what the components share.

        Arguments:
            counts: sums of the weights, `(K,)`; none is zero.
            sums: weighted sums of `statistics`, `(K, F)`.
            origin: as in `statistics`.

        Returns:
            One output for each component, flattened, `(K, prod(inputs))`.

        Raises:
            DataError: there is no maximum: a covariance is singular.
        """
        raise NotImplementedError  # pragma: no cover - abstract

    def around(self, x: Tensor, mean: Tensor, origin: Tensor) -> Tensor:
        """Statistics of a component moved to data `(m, *x)`, `(m, F)`: half way from the mean over all data."""
        return (self.statistics(x, origin) + mean) / 2


class NormalForm(ClosedForm):
    """A normal family: its first statistics are x - origin, the others its second moments."""

    def around(self, x: Tensor, mean: Tensor, origin: Tensor) -> Tensor:
        """Located at `x`, and as spread out as all data are."""
        centre = mean[None, : len(origin)] + origin
        return self.statistics(x, origin) + mean - self.statistics(centre, origin)


LOWEST = -12.0
"""Least log-odds or log-rate that a closed form gives: a value never seen stays possible."""
HIGHEST = 24 * math.log(2) + 1
"""Largest log-rate: counts go up to 2^24, the integers that single precision holds."""


class BernoulliModule(ClosedForm):
    """Independent Bernoulli elements; the decoder gives logits."""

    def maximise(self, counts: Tensor, sums: Tensor, origin: Tensor) -> Tensor:
        return torch.logit(sums / counts[:, None], eps=1 / (1 + math.exp(-LOWEST)))

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Logits `(..., *x)` to the distribution."""
        return Event(dist.Bernoulli(logits=h), len(self.x))


@final
class Bernoulli(Likelihood):
    """Independent binary elements."""

    kind: Literal["bernoulli"] = "bernoulli"
    hint: ClassVar[str] = "set data.binarize to 'dynamic', 'static' or 'threshold', or use likelihood 'normal'"
    closed_form: ClassVar[bool] = True

    @property
    def support(self) -> constraints.Constraint:
        """0 or 1."""
        return constraints.boolean

    def build(self, x: Shape) -> LikelihoodModule:
        return BernoulliModule(x, 1)


class NormalModule(NormalForm):
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

    def statistics(self, x: Tensor, origin: Tensor) -> Tensor:
        """x and, where a scale is learned, its square."""
        y = x.flatten(1) - origin
        return torch.cat([y, y.square()], 1) if self.learns_scale else y

    @property
    def learns_scale(self) -> bool:
        """Whether the scale is no constant."""
        return self.channels == 2 or isinstance(self.log_scale, nn.Parameter)

    def maximise(self, counts: Tensor, sums: Tensor, origin: Tensor) -> Tensor:
        """See `ClosedForm.maximise`; scales are at least `floor`."""
        mean, *square = (sums / counts[:, None]).split(len(origin), 1)
        if not square:
            return mean + origin
        variance = (square[0] - mean.square()).clamp(min=self.floor**2)
        if self.channels == 2:
            return torch.cat([mean + origin, 0.5 * variance.log() - self.offset], 1)
        pooled = counts @ (square[0] - mean.square()) / counts.sum()
        self.log_scale.copy_(0.5 * pooled.mean().clamp(min=self.floor**2).log())
        return mean + origin


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


class FactoredNormal(dist.TorchDistribution):
    """N(loc, L L^T) over an event of any shape, flattened; rows that share a factor L never copy it.

    torch's own copies the factor for every row once a plate has expanded it: K n D^2 numbers for n rows under K
    enumerated components.

    Arguments:
        loc: `(..., D)`.
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
        """Real numbers."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Size, _instance: Any = None) -> FactoredNormal:
        """The same distribution over more batch dimensions."""
        return FactoredNormal(self.loc, self.scale_tril, self.event_shape, batch_shape, validate_args=False)

    def _along(self, operation: Callable[[Tensor, Tensor], Tensor], vectors: Tensor) -> Tensor:
        """`operation(L, columns)` of vectors `(..., D)`: as one matrix where the last batch dimension shares L."""
        factor = self.scale_tril
        if vectors.dim() == 1 or factor.dim() > 2 and factor.shape[-3] > 1:
            return operation(factor, vectors.unsqueeze(-1)).squeeze(-1)
        return operation(factor.squeeze(-3) if factor.dim() > 2 else factor, vectors.mT).mT

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, nats, `(...)`; exact."""
        if self._validate_args:
            self._validate_sample(value)
        difference = value.flatten(value.dim() - len(self.event_shape)) - self.loc
        unit = self._along(lambda factor, y: torch.linalg.solve_triangular(factor, y, upper=False), difference)
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        score = -0.5 * (unit.square().sum(-1) + unit.shape[-1] * math.log(2 * math.pi)) - log_det
        return score.expand(torch.broadcast_shapes(score.shape, self.batch_shape))

    def rsample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Differentiable draws `sample_shape + (..., *event)`."""
        shape = (*sample_shape, *self.batch_shape, self.loc.shape[-1])
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return (self.loc + self._along(torch.matmul, noise)).unflatten(-1, self.event_shape)

    def _full(self, value: Tensor) -> Tensor:
        return value.expand(*self.batch_shape, value.shape[-1]).unflatten(-1, self.event_shape)

    @property
    def mean(self) -> Tensor:
        """`(..., *event)`."""
        return self._full(self.loc)

    @property
    def variance(self) -> Tensor:
        """Of every element by itself, `(..., *event)`."""
        return self._full(self.scale_tril.square().sum(-1))


class MultivariateNormalModule(NormalForm):
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

    def statistics(self, x: Tensor, origin: Tensor) -> Tensor:
        """x and the lower triangle of x x^T."""
        y = x.flatten(1) - origin
        row, column = torch.tril_indices(self.size, self.size, device=y.device)
        return torch.cat([y, y[:, row] * y[:, column]], 1)

    def maximise(self, counts: Tensor, sums: Tensor, origin: Tensor) -> Tensor:
        """See `ClosedForm.maximise`; `floor` is added to the variances."""
        d = self.size
        row, column = torch.tril_indices(d, d, device=sums.device)
        mean, packed = (sums / counts[:, None]).split([d, len(row)], 1)
        packed = packed - mean[:, row] * mean[:, column]
        if not self.full:
            packed = (counts @ packed / counts.sum())[None]
        covariance = packed.new_zeros(len(packed), d, d)
        covariance[:, row, column] = covariance[:, column, row] = packed
        covariance.diagonal(dim1=1, dim2=2).add_(self.floor)
        square = mean.square() if self.full else mean.square().amax(0)
        noise = 8 * d * torch.finfo(sums.dtype).eps * (covariance.diagonal(dim1=1, dim2=2) + square)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        scale = factor.diagonal(dim1=1, dim2=2)
        pivots = scale.square().masked_fill(failed[:, None] > 0, 0.0)
        self._require_regular(pivots, noise, counts)
        log_scale = 0.5 * (pivots - self.floor).clamp(min=torch.finfo(sums.dtype).tiny).log() - self.offset
        row, column = torch.tril_indices(d, d, -1, device=sums.device)
        free = torch.cat([log_scale, factor[:, row, column] / scale[:, row]], 1)
        if self.full:
            return torch.cat([mean + origin, free], 1)
        self.factor.copy_(free[0])
        return mean + origin

    def _require_regular(self, pivots: Tensor, noise: Tensor, counts: Tensor) -> None:
        """Refuse covariances whose pivots, the conditional variances, may be rounding: they have no density."""
        bad = (pivots <= noise).any(1).nonzero().flatten().tolist()
        if bad:
            which, weight = (f"component {bad[0]}", counts[bad[0]]) if self.full else ("all components", counts.sum())
            remedy = "declare fewer codes, or covariance = 'tied'" if self.full else "or leave out constant features"
            least = max(1e-6, 2 * float(noise[bad[0]].max()))
            raise DataError(
                f"likelihood multivariate_normal: expected a covariance of full rank for {which}; got a singular one, "
                f"of {weight:.6g} data in {self.size} dimensions. Set likelihood.floor to {least:.1g}, {remedy}."
            )


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


class CategoricalModule(ClosedForm):
    """Independent categorical elements; the decoder gives one logit per level."""

    def statistics(self, x: Tensor, origin: Tensor) -> Tensor:
        """Which level every element has, level by level."""
        levels = torch.arange(self.channels, device=x.device)[:, None]
        return (x.flatten(1)[:, None] == levels).to(origin).flatten(1)

    def maximise(self, counts: Tensor, sums: Tensor, origin: Tensor) -> Tensor:
        p = (sums / counts[:, None]).unflatten(1, (self.channels, -1))
        least = math.exp(LOWEST)
        rare = p < least
        kept = (1 - least * rare.sum(1, keepdim=True)) / p.masked_fill(rare, 0.0).sum(1, keepdim=True)
        return (p * kept).masked_fill(rare, least).log().flatten(1)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """`(..., levels * x[0], *x[1:])` to the distribution."""
        return Event(dist.Categorical(logits=torch.stack(self.split(h), -1)), len(self.x))


@final
class Categorical(Likelihood):
    """Independent elements with unordered levels 0 .. levels - 1."""

    kind: Literal["categorical"] = "categorical"
    closed_form: ClassVar[bool] = True
    levels: int = Field(gt=1)
    """Number of levels."""
    hint: ClassVar[str] = "set data.scale = 'raw' and likelihood.levels to the number of levels"

    @property
    def support(self) -> constraints.Constraint:
        """Integers 0 .. levels - 1."""
        return constraints.integer_interval(0, self.levels - 1)

    @property
    def channels(self) -> int:
        """One logit per level."""
        return self.levels

    def build(self, x: Shape) -> LikelihoodModule:
        return CategoricalModule(x, self.levels)


class lattice(constraints.Constraint):  # noqa: N801 - named as torch names its constraints
    """Multiples of 1 / (levels - 1) in [0, 1], to single precision."""

    is_discrete = True

    def __init__(self, levels: int) -> None:
        self.levels = levels
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Elementwise membership."""
        index = value * (self.levels - 1)
        return ((index - index.round()).abs() < 1e-3) & (value >= 0) & (value <= 1)

    def __repr__(self) -> str:
        return f"multiples of 1/{self.levels - 1} in [0, 1]"


class DiscretizedLogistic(dist.TorchDistribution):
    """A logistic density on [0, 1] rounded to `levels` values k / (levels - 1); the end bins are open.

    P(k) = F(k + 1/2) - F(k - 1/2), F the logistic distribution function, with F = 0 below the first
    bin and 1 above the last: a mass function that sums to one exactly.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016),
        https://arxiv.org/abs/1606.04934

    Arguments:
        loc: centre in [0, 1] units, `(...)`.
        log_scale: log of the scale in the same units, `(...)`.
        levels: number of values.
    """

    arg_constraints = {"loc": constraints.real, "log_scale": constraints.real}

    def __init__(self, loc: Tensor, log_scale: Tensor, levels: int, validate_args: bool | None = None) -> None:
        self.loc, self.log_scale = torch.broadcast_tensors(loc, log_scale)
        self.levels = levels
        super().__init__(self.loc.shape, torch.Size(), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The lattice of values."""
        return lattice(self.levels)

    def expand(self, batch_shape: Size, _instance: Any = None) -> DiscretizedLogistic:
        """The same distribution over more batch dimensions."""
        return DiscretizedLogistic(
            self.loc.expand(batch_shape), self.log_scale.expand(batch_shape), self.levels, validate_args=False
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of lattice values, nats, `(...)`; exact."""
        if self._validate_args:
            self._validate_sample(value)
        half = 0.5 / (self.levels - 1)
        inverse = torch.exp(-self.log_scale)
        upper = (value - self.loc + half) * inverse
        lower = (value - self.loc - half) * inverse
        # log(F(upper) - F(lower)) = log F(upper) + log(1 - F(lower)) + log(1 - exp(lower - upper))
        width = 2 * half * inverse
        log_mass = torch.log(-torch.expm1(-width))
        log_below = nn.functional.logsigmoid(upper)
        log_above = nn.functional.logsigmoid(-lower)
        first, last = value < half, value > 1 - half
        zero = torch.zeros_like(log_mass)
        return (
            torch.where(last, zero, log_below)
            + torch.where(first, zero, log_above)
            + torch.where(first | last, zero, log_mass)
        )

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Lattice values `sample_shape + (...)`."""
        with torch.no_grad():
            u = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
            draw = self.loc + self.log_scale.exp() * torch.logit(u, eps=1e-7)
            return (draw.clamp(0, 1) * (self.levels - 1)).round() / (self.levels - 1)

    @property
    def mean(self) -> Tensor:
        """The centre, clipped to [0, 1] (not the mean of the rounded values)."""
        return self.loc.clamp(0, 1)


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


class PoissonModule(ClosedForm):
    """Independent counts; the decoder gives log-rates."""

    def __init__(self, x: Shape, bounds: tuple[float, float]) -> None:
        super().__init__(x, 1)
        self.bounds = bounds

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Log-rates `(..., *x)` to the distribution."""
        return Event(dist.Poisson(h.clamp(*self.bounds).exp()), len(self.x))

    def maximise(self, counts: Tensor, sums: Tensor, origin: Tensor) -> Tensor:
        return (sums / counts[:, None]).log().clamp(*self.bounds)


@final
class Poisson(Likelihood):
    """Independent counts 0, 1, 2, ..."""

    kind: Literal["poisson"] = "poisson"
    closed_form: ClassVar[bool] = True
    hint: ClassVar[str] = "set data.scale = 'raw', or use likelihood 'normal'"

    @property
    def support(self) -> constraints.Constraint:
        """Non-negative integers."""
        return constraints.nonnegative_integer

    def build(self, x: Shape) -> LikelihoodModule:
        return PoissonModule(x, (LOWEST, HIGHEST))


MOST_DISPERSED = 7.0
"""Largest |log r| of a negative binomial."""


def dispersed(log_mean: Tensor, log_count: Tensor, validate_args: bool | None = None) -> dist.TorchDistribution:
    """Negative binomials of given means m `(..., d)` and variances m + m^2 / r, for r `(d,)`; logarithms of both."""
    log_count = log_count.clamp(-MOST_DISPERSED, MOST_DISPERSED)  # beyond, a Poisson; and lgamma loses digits
    logits = log_mean.clamp(LOWEST, HIGHEST) - log_count
    return dist.NegativeBinomial(log_count.exp().expand(logits.shape), logits=logits, validate_args=validate_args)


class NegativeBinomialModule(LikelihoodModule):
    """Independent counts; the decoder gives logarithms of means, and a dispersion is learned for every element."""

    def __init__(self, x: Shape) -> None:
        super().__init__(x, 1)
        self.log_count = nn.Parameter(torch.ones(self.x))

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Log-means `(..., *x)` to the distribution."""
        return Event(dispersed(h, self.log_count), len(self.x))


@final
class NegativeBinomial(Likelihood):
    """Independent counts of variance m + m^2 / r, with one learned r for every element: RNA counts, say.

    References: Deep generative modeling for single-cell transcriptomics (Lopez et al., 2018),
        https://doi.org/10.1038/s41592-018-0229-2
    """

    kind: Literal["negative_binomial"] = "negative_binomial"
    hint: ClassVar[str] = "set data.scale = 'raw', or use likelihood 'normal'"

    @property
    def support(self) -> constraints.Constraint:
        """Non-negative integers."""
        return constraints.nonnegative_integer

    def build(self, x: Shape) -> LikelihoodModule:
        return NegativeBinomialModule(x)


# ---------------------------------------------------------------------- x as the decoder says, with certainty


class DeterminedModule(LikelihoodModule):
    """x is the decoder's output, or its logistic function."""

    is_point: ClassVar[bool] = True

    def __init__(self, x: Shape, squash: str) -> None:
        super().__init__(x, 1)
        self.squash = squash

    def value(self, h: Tensor) -> Tensor:
        """What x is, `(..., *x)`, where the decoder says `h`."""
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
