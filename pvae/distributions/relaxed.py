"""Relaxed codes, in logarithms, and the discrete distributions that stand behind them."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import constraints

from pvae.distributions.codes import Certain, Conditional, code_grid, conditional_logits
from pvae.distributions.exponential_codes import IMPOSSIBLE
from pvae.distributions.simplex import log_simplex
from pvae.util.types import Size

KL = Literal["relaxed", "categorical"]


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
        has_twin: False if `discrete` is no distribution of the same latent.
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
        """The same distribution over more batch dimensions."""
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
    """A distribution of codes as the prior of a relaxed latent: it scores codes, and has no density of relaxed values.

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
        """The same distribution over more batch dimensions."""
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
        """The distribution of the codes."""
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
    """True for a distribution of relaxed codes that has a discrete twin."""
    while isinstance(fn, dist.ExpandedDistribution):
        fn = fn.base_dist
    return isinstance(fn, RelaxedCodes) and fn.has_twin
