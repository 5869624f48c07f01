"""Concrete (Gumbel-softmax) distributions of codes, in logarithms: simplex, densities and discrete counterparts."""

import math
from collections.abc import Collection
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pvae.component import Shape
from pvae.distributions.base import Batched, Size
from pvae.distributions.codes import Certain, Conditional, code_grid, conditional_logits
from pvae.distributions.exponential_codes import IMPOSSIBLE


class LogSimplex(dist.constraints.Constraint):
    """Constraint of logarithms of simplex points: exponentials sum to 1 within 1e-3."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Return whether values `(..., K)` satisfy the constraint, `(...)` booleans."""
        return value.logsumexp(-1).abs() < 1e-3


log_simplex = LogSimplex()


def to_coordinates(log_c: Tensor) -> Tensor:
    r"""Return the K - 1 unconstrained stick-breaking coordinates u of logarithms of relaxed one-hots `(..., K)`.

    u_k = log(c_k / sum_{j>k} c_j) + log(K - k). The volume changes by |dc/du| = prod_{k<=K} c_k, so that a density of u
    equals the density of log c in the measure of `RelaxedCodes`, without a Jacobian factor.
    """
    rest = log_c.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:]
    return log_c[..., :-1] - rest + torch.arange(log_c.shape[-1] - 1, 0, -1, device=log_c.device).to(log_c).log()


def from_coordinates(u: Tensor) -> Tensor:
    """Return log c `(..., K)` of stick-breaking coordinates u `(..., K - 1)`: the inverse of `to_coordinates`."""
    shifted = u - torch.arange(u.shape[-1], 0, -1, device=u.device).to(u).log()
    left = nn.functional.pad(nn.functional.logsigmoid(-shifted).cumsum(-1), (1, 0))  # of the stick, before each piece
    return left + nn.functional.pad(nn.functional.logsigmoid(shifted), (0, 1))  # the last piece is all that is left


class Coordinates(torch.distributions.Transform):
    """Transform from stick-breaking coordinates u to log c; its Jacobian is 1 in the measure of `RelaxedCodes`."""

    domain, codomain = dist.constraints.real_vector, log_simplex
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Coordinates)

    _call, _inverse = staticmethod(from_coordinates), staticmethod(to_coordinates)

    def log_abs_det_jacobian(self, x: Tensor, _y: Tensor) -> Tensor:
        """Return 0, `(...)`: the Jacobian is 1 in the measure of `RelaxedCodes`."""
        return torch.zeros_like(x[..., 0])

    def forward_shape(self, shape: Shape) -> Shape:
        """Return the shape `(..., K)` of log c from the shape `(..., K - 1)` of coordinates."""
        return *shape[:-1], shape[-1] + 1

    def inverse_shape(self, shape: Shape) -> Shape:
        """Return the shape `(..., K - 1)` of coordinates from the shape `(..., K)` of log c."""
        return *shape[:-1], shape[-1] - 1


torch.distributions.biject_to.register(type(log_simplex), lambda _constraint: Coordinates())


class Simplices(Batched):
    """Base of distributions of the logarithms of points of the simplex, one for each position of a grid."""

    @dist.constraints.dependent_property(is_discrete=False)
    def support(self) -> dist.constraints.Constraint:
        """Support: logarithms of points of the simplex at every position of the grid."""
        return dist.constraints.independent(log_simplex, len(self.event_shape) - 1)


KL = Literal["relaxed", "categorical"]


class RelaxedCodes(Simplices):
    r"""Concrete distribution in logarithms: log c = log softmax((log pi + g) / tau), g Gumbel, on a grid of codes.

    With y = log c the density is Gamma(K) tau^(K-1) prod_k pi_k e^(-tau y_k) / (sum_k pi_k e^(-tau y_k))^K with
    respect to the coordinates log(c_k / sum_{j>k} c_j), k < K, in which a flow may also define a density.

    References:
        The Concrete Distribution (Maddison, Mnih, Teh, 2017), https://arxiv.org/abs/1611.00712
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017), https://arxiv.org/abs/1611.01144

    Arguments:
        logits: log pi up to a constant, `(..., *grid, K)`; they are normalised here.
        temperature: tau, a scalar tensor.
        grid: number of dimensions of the grid.
        kl: KL that a loss uses: "relaxed", of the Concrete densities, or "categorical", of the discrete codes.
        noise: True to sample g; if False, the value is deterministic, c = softmax(log pi / tau).
        has_twin: False if the latent has no discrete counterpart, as under a prior over relaxed values.
    """

    widened = ("logits",)
    has_rsample = True

    def __init__(
        self, logits: Tensor, temperature: Tensor, grid: int, *,
        kl: KL = "relaxed", noise: bool = True, has_twin: bool = True,
    ) -> None:  # fmt: skip
        self.logits = logits.log_softmax(-1)
        self.temperature, self.grid, self.kl, self.noise, self.has_twin = temperature, grid, kl, noise, has_twin
        at = logits.dim() - grid - 1
        super().__init__(logits.shape[:at], logits.shape[at:], validate_args=False)

    def rsample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return reparametrised samples of log c, `sample_shape + (..., *grid, K)`."""
        logits = self.logits.expand(*sample_shape, *self.logits.shape)
        if self.noise:
            # -log of an exponential variate is Gumbel; the variate is never 0.
            logits = logits - torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_().log()
        return (logits / self.temperature).log_softmax(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the exact log density of log c, nats, `(...)`; 0 without noise, when the value is deterministic."""
        if not self.noise:
            return (0.0 * value).sum(tuple(range(-self.grid - 1, 0)))
        k = value.shape[-1]
        score = self.logits - self.temperature * value
        score = score.sum(-1) - k * score.logsumexp(-1) + math.lgamma(k) + (k - 1) * self.temperature.log()
        return score.sum(tuple(range(-self.grid, 0))) if self.grid else score

    def discrete(self) -> dist.TorchDistribution:
        """Return the discrete counterpart: categorical codes of the same logits; without noise, their mode."""
        if self.noise:
            return code_grid(self.logits, self.grid)
        return Certain(self.logits.argmax(-1), self.logits.shape[-1], self.grid)


class Relaxing(Simplices, Conditional):
    """Prior over discrete codes, used for a relaxed latent: relaxed values get the expected log probability of codes.

    Arguments:
        codes: distribution over indices `(..., *grid)`.
        states: number of codes K at each position.
    """

    widened = ("codes",)

    def __init__(self, codes: dist.TorchDistribution, states: int) -> None:
        self.codes, self.states = codes, states
        super().__init__(codes.batch_shape, torch.Size((*codes.event_shape, states)), validate_args=False)

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return samples of the codes as logarithms of one-hots, `sample_shape + (..., *grid, K)`."""
        index = self.codes.sample(torch.Size(sample_shape))
        return torch.where(index.unsqueeze(-1) == torch.arange(self.states, device=index.device), 0.0, IMPOSSIBLE)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return sum_p E[log p(c_p | c_<p)] under independent codes with probabilities exp(value), nats, `(...)`.

        The conditional probabilities are evaluated at the relaxed values of the positions before.
        """
        score = (value.exp() * self.conditional_logits(value)).sum(-1)
        return score.sum(tuple(range(1 - len(self.event_shape), 0))) if len(self.event_shape) > 1 else score

    def conditional_logits(self, value: Tensor) -> Tensor:
        return conditional_logits(self.codes, value)

    def discrete(self) -> dist.TorchDistribution:
        """Return the distribution over discrete codes."""
        return self.codes


def categorical_kl(q: RelaxedCodes, p: Any, value: Tensor) -> Tensor:
    """Return sum_p KL(q(c_p) || p(c_p | c_<p)) of the categorical codes of a relaxed latent, nats, `(...)`.

    Exact if p is factorised, else an estimate at the relaxed value. Without noise q is a point mass, and the KL is
    -log p of its mode, with the straight-through gradient of the relaxed value.
    """
    log_p = conditional_logits(p, value)
    if q.noise:
        kl = (q.logits.exp() * (q.logits - log_p)).sum(-1)
    else:
        soft = value.exp()
        hit = (value.argmax(-1, keepdim=True) == torch.arange(value.shape[-1], device=value.device)).to(soft)
        kl = -((hit + (soft - soft.detach())) * log_p).sum(-1)
    return kl.sum(tuple(range(-q.grid, 0))) if q.grid else kl


class Discretised(Messenger):
    """Pyro handler that replaces every relaxed site by the discrete codes of the same logits.

    Arguments:
        names: names of the sites to replace; None for all that have a discrete counterpart.
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if self.names is None or msg["name"] in self.names:
            msg["fn"] = twin(msg["fn"])


class LogOneHot(Batched):
    """Categorical code as the logarithm of a one-hot vector: 0 at the code, -1e30 elsewhere.

    Arguments:
        codes: a `OneHotCategorical`.
    """

    widened = ("codes",)
    has_enumerate_support = True

    def __init__(self, codes: torch.distributions.OneHotCategorical) -> None:
        self.codes = codes
        super().__init__(codes.batch_shape, codes.event_shape, validate_args=False)

    @property
    def logits(self) -> Tensor:
        """Log probabilities of the codes, `(..., K)`."""
        return self.codes.logits

    @dist.constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> dist.constraints.Constraint:
        """Support: logarithms of one-hot vectors."""
        return log_simplex

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return samples, `sample_shape + (..., K)`."""
        return torch.where(self.codes.sample(torch.Size(sample_shape)) > 0, 0.0, IMPOSSIBLE)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log probability of the code of each value, nats, `(...)`."""
        return (value.exp() * self.codes.logits).sum(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return the logarithms of all one-hot vectors, one for each code."""
        return torch.where(self.codes.enumerate_support(expand) > 0, 0.0, IMPOSSIBLE)


def twin(fn: Any) -> Any:
    """Return the discrete counterpart of a relaxed distribution, Pyro's own or declared; any other one unchanged."""
    base = fn
    while isinstance(base, dist.ExpandedDistribution):
        base = base.base_dist
    if isinstance(base, Relaxing) or (isinstance(base, RelaxedCodes) and base.has_twin):
        return base.discrete()
    if isinstance(base, torch.distributions.Independent):
        inner = twin(base.base_dist)
        return fn if inner is base.base_dist else dist.Independent(inner, base.reinterpreted_batch_ndims)
    if isinstance(base, torch.distributions.RelaxedOneHotCategorical):
        return dist.OneHotCategorical(logits=base.logits).expand(fn.batch_shape)
    if isinstance(base, torch.distributions.RelaxedBernoulli):
        return dist.Bernoulli(logits=base.logits).expand(fn.batch_shape)
    if isinstance(base, torch.distributions.relaxed_categorical.ExpRelaxedCategorical):
        return LogOneHot(dist.OneHotCategorical(logits=base.logits).expand(fn.batch_shape))
    return fn


def is_relaxed(fn: Any) -> bool:
    """Return whether a distribution is over relaxed codes or bits that have a discrete counterpart."""
    return not isinstance(fn, Relaxing) and twin(fn) is not fn
