"""Distributions of codes: grids that can be enumerated, codes known for certain, relaxed one-hots and their twins.

A value of a grid of codes is a tensor of indices `(..., *grid)`. A *relaxed* value holds the logarithms of relaxed
one-hots, `(..., *grid, K)`: in single precision the one-hots themselves underflow at a temperature of 0.2.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, register_kl
from torch.nn.functional import logsigmoid, pad

from pvae.component import Shape
from pvae.distributions.exponential import IMPOSSIBLE
from pvae.distributions.independent import Event
from pvae.util.types import Size

STATES = 4096
"""Most joint states of one datum that are summed over."""
KL = Literal["relaxed", "categorical"]


class LogSimplex(constraints.Constraint):
    """Logarithms of points of the simplex, whose sum is 1 to rounding."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Membership of `(..., K)`, `(...)`."""
        return value.logsumexp(-1).abs() < 1e-3


log_simplex = LogSimplex()


class Enumerable(Event):
    """Independent codes or bits over a grid, all of whose joint states can be listed where there are few."""

    @property
    def states(self) -> int:
        """Values of one element."""
        return self.base_dist.logits.shape[-1] if isinstance(self.base_dist, dist.Categorical) else 2

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether there are at most `STATES` joint states."""
        return self.event_shape.numel() * math.log(self.states) <= math.log(STATES) + 1e-9

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Every joint state, `(S, *batch, *grid)`; batch dimensions are of size 1 unless expanded."""
        like = self.base_dist.logits
        found = joint_states(self.states, self.event_shape, like.device)
        found = found if isinstance(self.base_dist, dist.Categorical) else found.to(like)
        lead = self.batch_shape if expand else (1,) * len(self.batch_shape)
        return found.reshape(-1, *(1,) * len(lead), *self.event_shape).expand(-1, *lead, *self.event_shape)


def joint_states(states: int, grid: Size, device: torch.device) -> Tensor:
    """All `states ** P` joint states of a grid of P elements, `(S, *grid)`, int64.

    Raises:
        NotImplementedError: there are more than `STATES`, as torch says of what cannot be enumerated.
    """
    positions = math.prod(grid)
    if positions * math.log(states) > math.log(STATES) + 1e-9:
        raise NotImplementedError(f"{states}^{positions} joint states are more than {STATES}")
    number = torch.arange(states**positions, device=device)
    powers = states ** torch.arange(positions - 1, -1, -1, device=device)
    return (number[:, None] // powers % states).reshape(-1, *grid)


def code_grid(logits: Tensor, grid: int) -> dist.TorchDistribution:
    """Independent codes of logits `(..., *grid, K)` over `grid` dimensions; a plain categorical for none."""
    codes = dist.Categorical(logits=logits, validate_args=False)
    return Enumerable(codes, grid, validate_args=False) if grid else codes


def bits(logits: Tensor) -> dist.TorchDistribution:
    """Independent bits of logits `(..., D)`."""
    return Enumerable(dist.Bernoulli(logits=logits, validate_args=False), 1, validate_args=False)


# ---------------------------------------------------------------------- over values of several kinds


class Conditional(dist.TorchDistribution):
    """Codes whose probabilities may depend on the codes before them."""

    @abstractmethod
    def conditional_logits(self, value: Tensor) -> Tensor:
        """log p(c_p | c_<p), normalised, `(..., *grid, K)`; of indices or of logarithms of relaxed one-hots."""


def conditional_logits(p: Any, value: Tensor) -> Tensor:
    """log p(c_p | c_<p) of any distribution of codes, `(..., *grid, K)`."""
    while isinstance(p, torch.distributions.Independent | dist.ExpandedDistribution):
        p = p.base_dist
    return p.conditional_logits(value) if isinstance(p, Conditional) else p.logits


# ---------------------------------------------------------------------- certain


class Certain(dist.TorchDistribution):
    """Codes known for certain: the law of a nearest code. `log_prob` is 0, whatever is asked (never compared).

    Arguments:
        index: `(..., *grid)`, int64.
        states: K.
        grid: number of dimensions of the grid.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, index: Tensor, states: int, grid: int) -> None:
        self.index, self.states = index, states
        at = index.dim() - grid
        super().__init__(index.shape[:at], index.shape[at:], validate_args=False)

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> constraints.Constraint:
        """Indices."""
        return constraints.independent(constraints.integer_interval(0, self.states - 1), len(self.event_shape))

    def expand(self, batch_shape: Size, _instance: Any = None) -> Certain:
        """The same codes over more batch dimensions."""
        if self.batch_shape == tuple(batch_shape):
            return self
        return Certain(self.index.expand(*batch_shape, *self.event_shape), self.states, len(self.event_shape))

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """The codes, `sample_shape + (..., *grid)`."""
        return self.index.expand(*sample_shape, *self.index.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """0 for each datum, nats."""
        lead = value.shape[: value.dim() - len(self.event_shape)]
        return torch.zeros(torch.broadcast_shapes(self.batch_shape, lead), device=value.device)

    @property
    def logits(self) -> Tensor:
        """log q of every code, `(..., *grid, K)`: 0, or as good as impossible; made when asked for."""
        hit = self.index.unsqueeze(-1) == torch.arange(self.states, device=self.index.device)
        return torch.where(hit, 0.0, IMPOSSIBLE)

    @property
    def mode(self) -> Tensor:
        """The codes."""
        return self.index


# ---------------------------------------------------------------------- relaxed


class RelaxedCodes(dist.TorchDistribution):
    r"""log c_k = log softmax((log pi_k + g_k) / tau), g Gumbel, at every position of a grid: Concrete, in logarithms.

    With y = log c the density is Gamma(K) tau^(K-1) prod_k pi_k e^(-tau y_k) / (sum_k pi_k e^(-tau y_k))^K with
    respect to the coordinates log(c_k / sum_{j>k} c_j), k < K, in which a flow may give another density of the same y.

    References:
        The Concrete Distribution (Maddison, Mnih, Teh, 2017), https://arxiv.org/abs/1611.00712
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017), https://arxiv.org/abs/1611.01144

    Arguments:
        logits: log pi, `(..., *grid, K)`; made normalised.
        temperature: tau, a scalar tensor.
        grid: number of dimensions of the grid.
        kl: which KL a loss takes: of the relaxed densities, or of the categoricals.
        noise: draw g; without it a value is a point, c = softmax(log pi / tau).
        has_twin: whether `discrete` is a law of the same latent.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(
        self,
        logits: Tensor,
        temperature: Tensor,
        grid: int,
        *,
        kl: KL = "relaxed",
        noise: bool = True,
        has_twin: bool = True,
        normalised: bool = False,
    ) -> None:
        self.logits = logits if normalised else logits.log_softmax(-1)
        self.temperature, self.grid, self.kl, self.noise, self.has_twin = temperature, grid, kl, noise, has_twin
        at = logits.dim() - grid - 1
        super().__init__(logits.shape[:at], logits.shape[at:], validate_args=False)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """Logarithms of points of the simplex, at every position."""
        return constraints.independent(log_simplex, self.grid)

    def expand(self, batch_shape: Size, _instance: Any = None) -> RelaxedCodes:
        """The same law over more batch dimensions."""
        if self.batch_shape == tuple(batch_shape):
            return self
        return RelaxedCodes(
            self.logits.expand(*batch_shape, *self.event_shape), self.temperature, self.grid,
            kl=self.kl, noise=self.noise, has_twin=self.has_twin, normalised=True,
        )  # fmt: skip

    def rsample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Differentiable draws of log c, `sample_shape + (..., *grid, K)`."""
        logits = self.logits.expand(*sample_shape, *self.logits.shape)
        if self.noise:
            # -log of an exponential variate is Gumbel; the variate is never 0.
            logits = logits - torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_().log()
        return (logits / self.temperature).log_softmax(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of log c, nats, `(...)`; exact; 0 for a point."""
        if not self.noise:
            return (0.0 * value).sum(tuple(range(-self.grid - 1, 0)))
        k = value.shape[-1]
        score = self.logits - self.temperature * value
        score = score.sum(-1) - k * score.logsumexp(-1) + math.lgamma(k) + (k - 1) * self.temperature.log()
        return score.sum(tuple(range(-self.grid, 0))) if self.grid else score

    def discrete(self) -> dist.TorchDistribution:
        """The twin over indices: codes of the same logits, or without noise the most probable ones for certain."""
        if self.noise:
            return code_grid(self.logits, self.grid)
        return Certain(self.logits.argmax(-1), self.logits.shape[-1], self.grid)


class Relaxing(Conditional):
    """A law of codes as the prior of a relaxed latent: it has no density of relaxed values, only its twin's.

    Arguments:
        codes: over indices `(..., *grid)`.
        states: K.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, codes: dist.TorchDistribution, states: int) -> None:
        self.codes, self.states = codes, states
        super().__init__(codes.batch_shape, torch.Size((*codes.event_shape, states)), validate_args=False)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """As that of `RelaxedCodes`."""
        return constraints.independent(log_simplex, len(self.event_shape) - 1)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Relaxing:
        """The same law over more batch dimensions."""
        if self.batch_shape == tuple(batch_shape):
            return self
        return Relaxing(self.codes.expand(torch.Size(batch_shape)), self.states)

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Logarithms of one-hots of a draw of the codes."""
        index = self.codes.sample(torch.Size(sample_shape))
        return torch.where(index.unsqueeze(-1) == torch.arange(self.states, device=index.device), 0.0, IMPOSSIBLE)

    def log_prob(self, value: Tensor) -> Tensor:
        """E log p(c) under independent codes of probabilities e^y, given them at the positions before; nats."""
        score = (value.exp() * self.conditional_logits(value)).sum(-1)
        return score.sum(tuple(range(1 - len(self.event_shape), 0))) if len(self.event_shape) > 1 else score

    def conditional_logits(self, value: Tensor) -> Tensor:
        return conditional_logits(self.codes, value)

    def discrete(self) -> dist.TorchDistribution:
        """The law of the codes."""
        return self.codes


def categorical_kl(q: RelaxedCodes, p: Any, value: Tensor) -> Tensor:
    """sum_p KL(q(c_p) || p(c_p | c_<p)) of the categoricals under a relaxed latent, nats, `(...)`.

    Exact where p is factorised, else an estimate at the relaxed value. Without noise q is a point: -log p of its
    one-hot, with the gradient of the soft one.
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
    """Runs programs in their discrete twins: every relaxed site becomes the code of the same logits."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["fn"] = twin(msg["fn"])


def twin(fn: Any) -> Any:
    """The discrete twin of a relaxed distribution; any other as it is."""
    base = fn
    while isinstance(base, dist.ExpandedDistribution):
        base = base.base_dist
    if isinstance(base, Relaxing) or (isinstance(base, RelaxedCodes) and base.has_twin):
        return base.discrete()
    return fn


def is_relaxed(fn: Any) -> bool:
    """Whether a distribution is of relaxed codes with a discrete twin."""
    while isinstance(fn, dist.ExpandedDistribution):
        fn = fn.base_dist
    return isinstance(fn, RelaxedCodes) and fn.has_twin


@register_kl(Certain, torch.distributions.Distribution)
def _certain_kl(q: Certain, p: torch.distributions.Distribution) -> Tensor:
    """-log p of the codes, exactly."""
    return -p.log_prob(q.index)


# ---------------------------------------------------------------------- coordinates of the simplex


def to_coordinates(log_c: Tensor) -> Tensor:
    r"""Logarithms of relaxed one-hots `(..., K)` as K - 1 free numbers u, by breaking a stick.

    u_k = log(c_k / sum_{j>k} c_j) + log(K - k). The volume changes by |dc/du| = prod_{k<=K} c_k, so that a density of u
    is the density of log c in the measure of `RelaxedCodes`: no Jacobian is left.
    """
    k = log_c.shape[-1]
    rest = log_c.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:]
    return log_c[..., :-1] - rest + torch.arange(k - 1, 0, -1, device=log_c.device).to(log_c).log()


def from_coordinates(u: Tensor) -> Tensor:
    """The inverse of `to_coordinates`, `(..., K - 1)` to `(..., K)`."""
    k = u.shape[-1] + 1
    shifted = u - torch.arange(k - 1, 0, -1, device=u.device).to(u).log()
    left = pad(logsigmoid(-shifted).cumsum(-1), (1, 0))  # of the stick, before each piece
    return left + pad(logsigmoid(shifted), (0, 1))  # the last piece is all that is left


class Coordinates(Transform):
    """u to log c, as `from_coordinates`; its Jacobian is 1 in the measure in which `RelaxedCodes` has its density."""

    domain = constraints.real_vector
    codomain = log_simplex
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Coordinates)

    def _call(self, x: Tensor) -> Tensor:
        return from_coordinates(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return to_coordinates(y)

    def log_abs_det_jacobian(self, x: Tensor, _y: Tensor) -> Tensor:
        """0, `(...)`."""
        return torch.zeros_like(x[..., 0])

    def forward_shape(self, shape: Shape) -> Shape:
        """`(..., K - 1)` to `(..., K)`."""
        return *shape[:-1], shape[-1] + 1

    def inverse_shape(self, shape: Shape) -> Shape:
        """`(..., K)` to `(..., K - 1)`."""
        return *shape[:-1], shape[-1] - 1


@biject_to.register(type(log_simplex))
def _to_log_simplex(_constraint: constraints.Constraint) -> Coordinates:
    return Coordinates()


class FreeCoordinates(dist.TorchDistribution):
    """A density over free coordinates `(..., P (K - 1))` as one of relaxed codes `(..., *grid, K)`.

    Arguments:
        base: over the coordinates of all positions in a row.
        event: `(*grid, K)`.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: Any, event: Shape) -> None:
        self.base = base
        super().__init__(base.batch_shape, torch.Size(event), validate_args=False)

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        """As that of `RelaxedCodes`."""
        return constraints.independent(log_simplex, len(self.event_shape) - 1)

    def expand(self, batch_shape: Size, _instance: Any = None) -> FreeCoordinates:
        """The same density over more batch dimensions."""
        if self.batch_shape == tuple(batch_shape):
            return self
        return FreeCoordinates(self.base.expand(torch.Size(batch_shape)), tuple(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of log c, nats, `(...)`; exact."""
        return self.base.log_prob(to_coordinates(value).flatten(value.dim() - len(self.event_shape)))

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Draws of log c."""
        with torch.no_grad():
            u = self.base.sample(torch.Size(sample_shape))
        return from_coordinates(u.unflatten(-1, (*self.event_shape[:-1], self.event_shape[-1] - 1)))
