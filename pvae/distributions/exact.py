"""Log densities with gamma functions in float64: in float32 they lose up to 2.6 nats at counts of 1e7."""

import math
from copy import copy
from functools import cache
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pvae.distributions.base import Batched, Size

GAMMA_FAMILIES = (
    torch.distributions.Beta, torch.distributions.Binomial, torch.distributions.Dirichlet,
    torch.distributions.FisherSnedecor, torch.distributions.Gamma, torch.distributions.LKJCholesky,
    torch.distributions.Multinomial, torch.distributions.NegativeBinomial, torch.distributions.Poisson,
    torch.distributions.StudentT, torch.distributions.Wishart, dist.BetaBinomial, dist.DirichletMultinomial,
    dist.GammaPoisson, dist.LKJ, dist.MultivariateStudentT,
)  # fmt: skip
"""Families of torch and Pyro whose log density is a difference of log-gamma functions of parameters or values."""


def log_density(fn: Any, value: Tensor) -> Tensor:
    """Return the log density of values under a distribution, nats; float64 if its family has gamma functions.

    Elsewhere it is `fn.log_prob(value)` itself. Parameters count as exactly what they are in their own precision.
    """
    return doubled(fn).log_prob(value.double()) if has_gamma(fn) else fn.log_prob(value)


def has_gamma(fn: Any) -> bool:
    """Return whether the log density of a distribution, perhaps wrapped or transformed, has gamma functions."""
    while not _is_gamma_family(fn.__class__):
        inner = getattr(fn, "base_dist", None)
        fn = getattr(fn, "_component_distribution", None) if inner is None else inner
        if fn is None:
            return False
    return True


@cache
def _is_gamma_family(cls: type) -> bool:
    return issubclass(cls, GAMMA_FAMILIES)


def doubled(fn: Any) -> Any:
    """Return a copy of a distribution with its floating-point parameters in float64, for its log density alone."""
    wide = copy(fn)
    for name, part in vars(fn).items():
        if isinstance(part, Tensor) and part.is_floating_point():
            setattr(wide, name, part.double())
        elif isinstance(part, torch.distributions.Distribution):
            setattr(wide, name, doubled(part))
    wide.__class__ = EXACT.get(type(fn), type(fn))
    return wide


class ExactPoisson(dist.Poisson):
    """Poisson distribution whose log density is float64."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log probability of counts, nats, `(...)`, float64; exact for the rates as they are held."""
        if self._validate_args:
            self._validate_sample(value)
        rate, count = self.rate.double(), value.double()
        return count.xlogy(rate) - rate - log_gamma(count + 1)


class ExactNegativeBinomial(dist.NegativeBinomial):
    """Negative binomial distribution whose log density is float64, at any dispersion: a Poisson in the limit."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log probability of counts, nats, `(...)`, float64; exact for the parameters as they are held."""
        if self._validate_args:
            self._validate_sample(value)
        r, logits, count = narrowed(self.total_count.double()), self.logits.double(), value.double()
        score = r * logsigmoid(-logits) + count * logsigmoid(logits) + log_rising(r, count) - log_gamma(count + 1)
        return score.masked_fill(r + count == 0, 0.0)


class ExactStudentT(dist.StudentT):
    """Student's t distribution whose log density is float64, at any degrees of freedom: a normal in the limit."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, nats, `(...)`, float64; exact for the parameters as they are held."""
        if self._validate_args:
            self._validate_sample(value)
        df, scale = narrowed(self.df.double()), narrowed(self.scale.double())
        unit = (value.double() - self.loc) / scale
        ratio = log_rising(df / 2, df.new_tensor(0.5)) - 0.5 * (df * math.pi).log() - scale.log()
        return ratio - 0.5 * (df + 1) * (unit.square() / df).log1p()


class OpenUnit(dist.constraints.Constraint):
    """Constraint of proportions: numbers above 0 and below 1."""

    def check(self, value: Tensor) -> Tensor:
        """Return whether each element lies inside (0, 1), booleans."""
        return (value > 0) & (value < 1)

    def __repr__(self) -> str:
        return "numbers above 0 and below 1"


open_unit = OpenUnit()


class Doubling(dist.TorchDistribution):
    """Base of distributions whose log density is that of their parameters and values in float64."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, nats, `(...)`, float64; exact for the parameters as they are held."""
        return super(Doubling, doubled(self)).log_prob(value.double())


class ExactContinuousBernoulli(Doubling, dist.ContinuousBernoulli):
    """Continuous Bernoulli distribution whose log density is float64: its constant cancels near a mean of 1/2."""


class ExactBeta(Doubling, dist.Beta):
    """Beta distribution inside (0, 1) whose log density is float64; samples are rounded to numbers inside."""

    support = open_unit  # type: ignore[assignment]

    def rsample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return samples, `sample_shape + (...)`, with their gradient."""
        bounds = torch.finfo(self.concentration1.dtype)
        return super().rsample(sample_shape).clamp(bounds.tiny, 1 - bounds.eps)


class ZeroInflated(Batched):
    """Mixture of zero and a distribution of counts, elementwise; log densities are those of the latter's precision.

    Arguments:
        base_dist: distribution of the counts, batch shape `(...)`.
        gate: logit of the probability of a further zero, `(...)`.
    """

    widened = ("base_dist", "gate")

    def __init__(self, base_dist: Any, gate: Tensor) -> None:
        self.base_dist, self.gate = base_dist, gate
        super().__init__(base_dist.batch_shape)

    @property
    def support(self) -> dist.constraints.Constraint:
        return self.base_dist.support

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log probability of counts, nats, `(...)`."""
        if self._validate_args:
            self._validate_sample(value)
        score = self.base_dist.log_prob(value)
        gate = self.gate.to(score.dtype)
        score = score + logsigmoid(-gate)
        return torch.where(value == 0, torch.logaddexp(score, logsigmoid(gate)), score)

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return samples, `sample_shape + (...)`, without gradient."""
        with torch.no_grad():
            found = self.base_dist.sample(torch.Size(sample_shape))
            return found.masked_fill(torch.bernoulli(self.gate.sigmoid().expand(found.shape)) > 0, 0.0)

    @property
    def mean(self) -> Tensor:
        """Mean of every element, `(...)`."""
        return self.base_dist.mean * (-self.gate).sigmoid()


_OWN = ExactPoisson, ExactNegativeBinomial, ExactStudentT
EXACT: dict[type, type] = {cls.__mro__[depth]: cls for cls in _OWN for depth in (1, 2)}
"""Classes of torch and Pyro, and those that stand for them in `doubled`."""


def narrowed(t: Tensor) -> Tensor:
    """Return a tensor without the copies of dimensions that were expanded, which have length 1."""
    return t[tuple(slice(None if stride else 1) for stride in t.stride())]


# ---------------------------------------------------------------------- gamma functions of float64 tensors, at least 0


def log_gamma(z: Tensor) -> Tensor:
    """Return log Gamma(z) for z > 0, float64, by Stirling's series at z + 8; faster than `torch.lgamma` if compiled."""
    w = z + 8
    return (w - 0.5) * w.log() - w + 0.5 * math.log(2 * math.pi) + _tail(w) - _product(z).log()


def log_rising(n: Tensor, x: Tensor) -> Tensor:
    """Return log Gamma(n + x) - log Gamma(n), float64, without cancellation for large n, and with its gradient in n.

    The gradient (the first derivative alone) is that of a linear function with the value 0: `torch.digamma` takes five
    times as long as all the rest.
    """
    if x.requires_grad:
        return (n + x).lgamma() - n.lgamma()
    still = n.detach()
    a, w = still + x, still + 8
    v = w + x
    step = torch.log1p(x / w)
    ratio = _product(a) * (1 / _product(still))
    value = (w - 0.5) * step + x * (v.log() - 1) + _tail(v) - _tail(w) - ratio.log()
    return value + (n - still) * (step + _slope(a) - _slope(still)) if torch.is_grad_enabled() else value


def _product(z: Tensor) -> Tensor:
    """Return z (z + 1) ... (z + 7) = Gamma(z + 8) / Gamma(z)."""
    q = z * (z + 7)
    return q * (q + 6) * ((q + 10) * (q + 12))


def _tail(w: Tensor) -> Tensor:
    """Return Stirling's series 1/(12 w) - 1/(360 w^3) + ... for w >= 8, to 1e-12."""
    u = 1 / (w * w)
    return (1 / 12 - u * (1 / 360 - u * (1 / 1260 - u * (1 / 1680 - u / 1188)))) / w


def _slope(z: Tensor) -> Tensor:
    """Return digamma(z) - log(z + 8), to 1e-12."""
    w, q = z + 8, z * (z + 7)
    u = 1 / (w * w)
    series = u * (1 / 12 - u * (1 / 120 - u * (1 / 252 - u * (1 / 240 - u / 132))))
    return -series - 0.5 / w - (2 * z + 7) * (1 / q + 1 / (q + 6) + 1 / (q + 10) + 1 / (q + 12))
