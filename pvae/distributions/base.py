"""Bases of distributions, and those of data that Pyro lacks: points, grey values, normals that share a factor."""

import math
from collections.abc import Callable
from copy import copy
from typing import Any, ClassVar, Self

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.errors import DeclarationError

Size = torch.Size | list[int] | tuple[int, ...]
"""Shape of samples, as `sample(Size)` and `expand(Size)` of a distribution accept it."""
HALF_LOG_2PI = math.log(math.sqrt(2 * math.pi))


def unwrapped(fn: Any) -> Any:
    """Return the base distribution inside `Independent` and `ExpandedDistribution` wrappers."""
    while isinstance(fn, torch.distributions.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn


class Event(dist.Independent):
    """Distribution with declared event dimensions, as `to_event` returns: the same numbers in less time.

    A plate expands every site in every training step, here at no cost to its own shape; a sum of log probabilities of
    bits changes its sign once.
    """

    wide: Any = None
    """Last expansion, which a distribution that never changes keeps (itself before the first); None in others."""

    def __init__(self, base: dist.TorchDistribution, dims: int, validate_args: bool | None = None) -> None:
        if validate_args is not None:
            base._validate_args = validate_args
        shape = base._batch_shape
        batch = len(shape) - dims
        self.base_dist, self.reinterpreted_batch_ndims = base, dims
        self._batch_shape, self._event_shape = shape[:batch], shape[batch:] + base._event_shape

    def expand(self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: Any = None) -> Any:
        """Return this distribution expanded to `batch_shape`."""
        shape, wide = torch.Size(batch_shape), self.wide
        if self._batch_shape == shape:
            return self
        if wide is None or wide._batch_shape != shape:
            wide = self.__new__(type(self)) if _instance is None else _instance
            base = self.base_dist.expand(shape + self._event_shape[: self.reinterpreted_batch_ndims])
            wide.__dict__.update(vars(self), base_dist=base, _batch_shape=shape, wide=None)
            self.wide = None if self.wide is None else wide
        return wide

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of values `(..., *event)`, nats, `(...)`."""
        base = self.base_dist
        if base.__class__ is dist.Bernoulli and base.logits.shape == value.shape and not base._validate_args:
            return -self.total(nn.functional.binary_cross_entropy_with_logits(base.logits, value, reduction="none"))
        return self.total(base.log_prob(value))

    def total(self, parts: Tensor) -> Tensor:
        """Return the sum over the elements of every event, `(...)` of `(..., *event)`."""
        dims = self.reinterpreted_batch_ndims
        return parts.sum(-1) if dims == 1 else parts.flatten(-dims).sum(-1) if dims else parts

    def normal_kl(self, prior: Any) -> Tensor | None:
        """Return KL(self || N(0, I)) of normals whose log density was taken, `(...)`, nats; None for others."""
        q, p = self.base_dist, getattr(prior, "base_dist", None)
        if q.__class__ is not PlainNormal or p.__class__ is not UnitNormal or q.known is None:
            return None
        variance, log_scale = q.known
        twice = self.total(torch.addcmul(variance, q.loc, q.loc).sub(log_scale, alpha=2))
        return torch.rsub(twice, -self._event_shape.numel() / 2, alpha=-0.5)


def bernoulli(logits: Tensor) -> dist.TorchDistribution:
    """Return independent bits of logits `(...)`, as `Bernoulli(logits=logits)` does in more time."""
    found = dist.Bernoulli.__new__(dist.Bernoulli)
    found.logits = found._param = logits
    torch.distributions.Distribution.__init__(found, logits.shape)
    return found


class PlainNormal(dist.Normal):
    """Normal distribution of a location and a scale of one shape: Pyro's numbers from fewer operations."""

    known: tuple[Tensor, Tensor] | None = None
    """Variance and log-scale, as the last log density had them; None before."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        self.loc, self.scale = loc, scale
        torch.distributions.Distribution.__init__(self, loc.shape)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Any:
        """Return this distribution expanded to `batch_shape`."""
        wide = self.__new__(type(self))
        loc, scale = (t.expand(batch_shape) for t in (self.loc, self.scale))
        wide.__dict__.update(vars(self), loc=loc, scale=scale, known=None, _batch_shape=loc.shape)
        return wide

    def rsample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return reparametrised samples, `sample_shape + (...)`."""
        loc = self.loc
        return loc + torch.randn(self._extended_shape(sample_shape), dtype=loc.dtype, device=loc.device) * self.scale

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of every element, nats, of the shape of `value`."""
        if self._validate_args:
            self._validate_sample(value)
        self.known = variance, log_scale = self.scale**2, self.scale.log()
        twice = torch.add((value - self.loc) ** 2 / variance, log_scale, alpha=2)
        return torch.rsub(twice, -HALF_LOG_2PI, alpha=0.5)


class UnitNormal(PlainNormal):
    """Normal distribution whose location is 0 and whose scale is 1, both given as tensors."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of every element, nats, of the shape of `value`."""
        if self._validate_args or value.shape[value.dim() - self.loc.dim() :] != self.loc.shape:
            return super().log_prob(value)
        return torch.rsub(value**2, -HALF_LOG_2PI, alpha=0.5)


class Batched(dist.TorchDistribution):
    """Base of distributions that `expand` copies, with wider parameters and without validation."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    widened: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes with batch dimensions: tensors, distributions, and lists of these."""

    def expand(self, batch_shape: Size, _instance: Any = None) -> Self:
        """Return this distribution expanded to `batch_shape`: itself if it has that shape."""
        shape = torch.Size(batch_shape)
        if self.batch_shape == shape:
            return self
        wide = copy(self)
        for name in self.widened:
            setattr(wide, name, self._wider(getattr(self, name), shape))
        wide._batch_shape, wide._validate_args = shape, False
        return wide

    def _wider(self, part: Any, shape: torch.Size) -> Any:
        if isinstance(part, list):
            return [self._wider(item, shape) for item in part]
        sizes = part.shape if isinstance(part, Tensor) else part.batch_shape
        return part.expand(shape + sizes[len(self.batch_shape) :])


class Determined(Batched, dist.Delta):
    """Point distribution at `value` whose `log_prob` is the given `log_density` for any argument.

    Pyro's `Delta` compares exactly: f^-1(f(x)) differs from x by a rounding error, and would get log density -inf.

    Arguments:
        value: the point, `batch + event`.
        log_density: log density of the value, nats, `batch`: minus log|det J| of the map that made it; 0 without a map.
        event_dim: number of event dimensions.
    """

    widened = ("v", "log_density")

    def __init__(self, value: Tensor, log_density: Tensor | float = 0.0, event_dim: int = 1) -> None:
        super().__init__(value, log_density, event_dim=event_dim, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the given log density, nats, broadcast over the batch dimensions of `value`."""
        batch = value.shape[: value.dim() - self.event_dim]
        return self.log_density.expand(torch.broadcast_shapes(self.batch_shape, batch))


class Implicit(dist.Delta):
    """Point distribution at x = g(z) for a generator g without a likelihood: it can be sampled, but has no density."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Raise an error, as an implicit generator has no density.

        Raises:
            DeclarationError: always.
        """
        raise DeclarationError.of("distributions.base.no_likelihood")


class Rounded(Determined):
    """Point distribution at `value` in [0, 1], quantised to `levels` cells; cell k is written as k / (levels - 1)."""

    def __init__(self, value: Tensor, levels: int, event_dim: int = 1) -> None:
        self.levels = levels
        super().__init__((value * levels).floor().clamp(0, levels - 1) / (levels - 1), 0.0, event_dim)


class lattice(dist.constraints.Constraint):  # noqa: N801 - named as torch names its constraints
    """Constraint of grey values: multiples of 1 / (levels - 1) in [0, 1], up to single-precision rounding."""

    is_discrete = True

    def __init__(self, levels: int) -> None:
        self.levels = levels
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Return whether each element is one of the grey values, booleans."""
        index = value * (self.levels - 1)
        return ((index - index.round()).abs() < 1e-3) & (value >= 0) & (value <= 1)

    def __repr__(self) -> str:
        return f"multiples of 1/{self.levels - 1} in [0, 1]"


class DiscretizedLogistic(Batched):
    """Logistic distribution discretised to `levels` values k / (levels - 1) in [0, 1]; the end bins are open.

    P(k) = F(k + 1/2) - F(k - 1/2), F the logistic distribution function, with F = 0 below the first
    bin and 1 above the last: a mass function that sums to one exactly.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016),
        https://arxiv.org/abs/1606.04934

    Arguments:
        loc: centre in [0, 1] units, `(...)`.
        log_scale: log of the scale in the same units, `(...)`.
        levels: number of grey values.
    """

    arg_constraints = {"loc": dist.constraints.real, "log_scale": dist.constraints.real}
    widened = ("loc", "log_scale")

    def __init__(self, loc: Tensor, log_scale: Tensor, levels: int, validate_args: bool | None = None) -> None:
        self.loc, self.log_scale = torch.broadcast_tensors(loc, log_scale)
        self.levels = levels
        super().__init__(self.loc.shape, torch.Size(), validate_args=validate_args)

    @dist.constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> dist.constraints.Constraint:
        """Support: the grey values k / (levels - 1)."""
        return lattice(self.levels)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the exact log probability of grey values, nats, `(...)`."""
        if self._validate_args:
            self._validate_sample(value)
        half = 0.5 / (self.levels - 1)
        inverse = torch.exp(-self.log_scale)
        upper, lower = (value - self.loc + half) * inverse, (value - self.loc - half) * inverse
        # log(F(upper) - F(lower)) = log F(upper) + log(1 - F(lower)) + log(1 - exp(lower - upper))
        log_mass = torch.log(-torch.expm1(-2 * half * inverse))
        log_below, log_above = nn.functional.logsigmoid(upper), nn.functional.logsigmoid(-lower)
        first, last = value < half, value > 1 - half
        inner = log_mass.masked_fill(first | last, 0.0)
        return log_below.masked_fill(last, 0.0) + log_above.masked_fill(first, 0.0) + inner

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return samples of grey values, `sample_shape + (...)`, without gradient."""
        with torch.no_grad():
            u = torch.rand(self._extended_shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
            draw = self.loc + self.log_scale.exp() * torch.logit(u, eps=1e-7)
            return (draw.clamp(0, 1) * (self.levels - 1)).round() / (self.levels - 1)

    @property
    def mean(self) -> Tensor:
        """Centre `loc` clipped to [0, 1], which is not the exact mean of the discretised values."""
        return self.loc.clamp(0, 1)


class FactoredNormal(Batched):
    """Multivariate normal N(loc, L L^T) over a flattened event of any shape; rows share one factor L without copies.

    `torch.distributions.MultivariateNormal` copies L for every row once a plate has expanded it: K n D^2 numbers for n
    rows under K enumerated mixture components.

    Arguments:
        loc: mean of the flattened event, `(..., D)`.
        scale_tril: L, `(D, D)`, or `(..., D, D)` with as many batch dimensions as `loc`.
        event: shape of an event of D elements.
    """

    arg_constraints = {"loc": dist.constraints.real_vector, "scale_tril": dist.constraints.lower_cholesky}
    has_rsample = True

    def __init__(self, loc: Tensor, scale_tril: Tensor, event: Size) -> None:
        self.loc, self.scale_tril = loc, scale_tril
        super().__init__(loc.shape[:-1], torch.Size(event))

    @property
    def support(self) -> dist.constraints.Constraint:
        """Support: real numbers in every element of the event."""
        return dist.constraints.independent(dist.constraints.real, len(self.event_shape))

    def _along(self, operation: Callable[[Tensor, Tensor], Tensor], vectors: Tensor) -> Tensor:
        """Return `operation(L, columns)` for vectors `(..., D)`, as one matrix if the last batch dimension shares L."""
        factor = self.scale_tril
        if vectors.dim() == 1 or factor.dim() > 2 and factor.shape[-3] > 1:
            return operation(factor, vectors.unsqueeze(-1)).squeeze(-1)
        return operation(factor.squeeze(-3) if factor.dim() > 2 else factor, vectors.mT).mT

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of values `(..., *event)`, nats, `(...)`; exact."""
        if self._validate_args:
            self._validate_sample(value)
        difference = value.flatten(value.dim() - len(self.event_shape)) - self.loc
        unit = self._along(lambda factor, y: torch.linalg.solve_triangular(factor, y, upper=False), difference)
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        score = -0.5 * (unit.square().sum(-1) + unit.shape[-1] * math.log(2 * math.pi)) - log_det
        return score.expand(torch.broadcast_shapes(score.shape, self.batch_shape))

    def rsample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return reparametrised samples, `sample_shape + (..., *event)`."""
        shape = (*sample_shape, *self.batch_shape, self.loc.shape[-1])
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return (self.loc + self._along(torch.matmul, noise)).unflatten(-1, self.event_shape)

    def _full(self, value: Tensor) -> Tensor:
        return value.expand(*self.batch_shape, value.shape[-1]).unflatten(-1, self.event_shape)

    @property
    def mean(self) -> Tensor:
        """Mean of every element, `(..., *event)`."""
        return self._full(self.loc)

    @property
    def variance(self) -> Tensor:
        """Marginal variance of every element, `(..., *event)`."""
        return self._full(self.scale_tril.square().sum(-1))
