"""Likelihoods p(x | h): from the decoder's output to a distribution over one datum."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal, final

import pyro.distributions as dist
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Component, Shape
from pvae.determined import Determined, Rounded
from pvae.event import Event

Size = torch.Size | list[int] | tuple[int, ...]


class Likelihood(Component):
    """The density of a datum given the decoder's output."""

    hint: ClassVar[str] = ""

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

    @abstractmethod
    def build(self, x: Shape) -> LikelihoodModule:
        """A module from the decoder's output `(..., channels * x[0], *x[1:])` to a distribution of event `x`."""


class LikelihoodModule(nn.Module):
    """Base of what likelihoods build: splits the decoder's output into the parameters of each element."""

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


class BernoulliModule(LikelihoodModule):
    """Independent Bernoulli elements; the decoder gives logits."""

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Logits `(..., *x)` to the distribution."""
        return Event(dist.Bernoulli(logits=h), len(self.x))


@final
class Bernoulli(Likelihood):
    """Independent binary elements."""

    kind: Literal["bernoulli"] = "bernoulli"
    hint: ClassVar[str] = "set data.binarize to 'dynamic', 'static' or 'threshold', or use likelihood 'normal'"

    @property
    def support(self) -> constraints.Constraint:
        """0 or 1."""
        return constraints.boolean

    def build(self, x: Shape) -> LikelihoodModule:
        """See `Likelihood.build`."""
        return BernoulliModule(x, 1)


class NormalModule(LikelihoodModule):
    """Independent normal elements with a fixed, a shared learned, or a predicted scale."""

    log_scale: Tensor

    def __init__(self, x: Shape, mode: str, scale: float, floor: float) -> None:
        super().__init__(x, 2 if mode == "per_datum" else 1)
        self.floor = floor
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


@final
class Normal(Likelihood):
    """Independent normal elements; a fixed scale makes the reconstruction a scaled squared error."""

    kind: Literal["normal"] = "normal"
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
        """See `Likelihood.build`."""
        return NormalModule(x, self.scale, self.value, self.floor)


class CategoricalModule(LikelihoodModule):
    """Independent categorical elements; the decoder gives one logit per level."""

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """`(..., levels * x[0], *x[1:])` to the distribution."""
        return Event(dist.Categorical(logits=torch.stack(self.split(h), -1)), len(self.x))


@final
class Categorical(Likelihood):
    """Independent elements with unordered levels 0 .. levels - 1."""

    kind: Literal["categorical"] = "categorical"
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
        """See `Likelihood.build`."""
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
        """See `Likelihood.build`."""
        return DiscretizedLogisticModule(x, self.levels, self.floor)


class PoissonModule(LikelihoodModule):
    """Independent counts; the decoder gives log-rates."""

    def __init__(self, x: Shape, bounds: tuple[float, float]) -> None:
        super().__init__(x, 1)
        self.bounds = bounds

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Log-rates `(..., *x)` to the distribution."""
        return Event(dist.Poisson(h.clamp(*self.bounds).exp()), len(self.x))


@final
class Poisson(Likelihood):
    """Independent counts 0, 1, 2, ..."""

    kind: Literal["poisson"] = "poisson"
    hint: ClassVar[str] = "set data.scale = 'raw', or use likelihood 'normal'"

    @property
    def support(self) -> constraints.Constraint:
        """Non-negative integers."""
        return constraints.nonnegative_integer

    def build(self, x: Shape) -> LikelihoodModule:
        """See `Likelihood.build`."""
        return PoissonModule(x, (-12.0, 12.0))


# ---------------------------------------------------------------------- x as the decoder says, with certainty


class DeterminedModule(LikelihoodModule):
    """x is the decoder's output."""

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """`(..., *x)` to the point."""
        return Determined(h, event_dim=len(self.x))


@final
class DeterminedLikelihood(Likelihood):
    """x = g(z) with certainty: log p(x | z) is 0, never found by comparing numbers; the posterior must be `inverse`."""

    kind: Literal["determined"] = "determined"
    hint: ClassVar[str] = "use data of real numbers"

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers."""
        return constraints.real

    @property
    def is_point(self) -> bool:
        """See `Likelihood.is_point`."""
        return True

    def build(self, x: Shape) -> LikelihoodModule:
        """See `Likelihood.build`."""
        return DeterminedModule(x, 1)


class RoundedModule(LikelihoodModule):
    """x is the decoder's output rounded down to a level."""

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
        """See `Likelihood.is_point`."""
        return True

    def build(self, x: Shape) -> LikelihoodModule:
        """See `Likelihood.build`."""
        return RoundedModule(x, self.levels)
