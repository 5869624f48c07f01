"""Importance-weighted bounds as objectives: IWAE, and its means over groups of samples (MIWAE, PIWAE, CIWAE)."""

import math
from collections.abc import Collection
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pvae.errors import DeclarationError, refuse, text
from pvae.guides.posteriors.base import PosteriorModule
from pvae.objectives.base import Objective, Weighed
from pvae.objectives.elbo import minus_elbo, with_penalties, with_score_functions
from pvae.pair import Estimator, Pair, Terms, sum_over


def log_weights(terms: Terms, beta: Tensor | float) -> Tensor:
    """Return reconstruction - beta * sum of KLs of every sample, `(particles, n)`, nats."""
    return terms.reconstruction - beta * sum_over(list(terms.kl.values()))


def bound_of(log_weight: Tensor) -> Tensor:
    """Return log 1/K sum_k w_k of log-weights `(K, n)`, `(n,)`, nats."""
    return log_weight.logsumexp(0) - math.log(len(log_weight))


class IWAE(Objective):
    r"""The importance-weighted bound, E log 1/K sum_k p(x, z_k) / q(z_k | x), or a combination of such bounds.

    With `groups` M it is the mean of the bounds of M groups of K / M samples, whose gradient by the guide has a higher
    signal-to-noise ratio (MIWAE); `partially` lets the model follow the bound of all K samples meanwhile (PIWAE).
    `elbo` is the weight of the ELBO of the same samples in the bound (CIWAE).

    Samples without a pathwise gradient get a score-function gradient, whose baseline is the bound with this sample's
    weight replaced by the geometric mean of the others' (VIMCO); a posterior's moving-average baseline is not used.

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2015), https://arxiv.org/abs/1509.00519
        Variational Inference for Monte Carlo Objectives (Mnih, Rezende, 2016), https://arxiv.org/abs/1602.06725
        Tighter Variational Bounds are Not Necessarily Better (Rainforth et al., 2018), https://arxiv.org/abs/1802.04537
    """

    kind: Literal["iwae"] = "iwae"
    gradients: ClassVar[tuple[str, ...]] = ("doubly_reparameterised",)
    particles: int = Field(default=8, gt=1)
    """Number of samples per datum, K, those of all groups."""
    groups: int = Field(default=1, gt=0)
    """Number M of groups of samples, a divisor of `particles`, over whose bounds the mean is taken."""
    partially: bool = False
    """True to train the model by the bound of all samples, and only the guide by the mean over groups. What both sides
    read counts as the model's in log p(x, z), and as the guide's in samples and log q."""
    elbo: float = Field(default=0.0, ge=0, lt=1)
    """Weight of the ELBO in the bound, against 1 - `elbo` of the importance-weighted one."""

    @model_validator(mode="after")
    def _fitting_together(self) -> Self:
        refuse(self.free_bits, "objectives.importance.free_bits", ValueError)
        refuse(self.particles % self.groups, "objectives.importance.groups", ValueError, of=self)
        return self

    def terms(self, pair: Pair, x: Tensor, rows: int | None = None, beta: Tensor | float = 1.0) -> Terms:
        """Return the terms of a batch; `beta` is the weight of the KL in the weights that scale the gradient."""
        doubly = self.gradient == "doubly_reparameterised"
        passed = partial(self._passed, beta=beta) if doubly else None
        estimator = Estimator(None if doubly else (), passed, self.partially) if doubly or self.partially else None
        return pair.terms(x, particles=self.particles, rows=rows, estimator=estimator)

    def _passed(self, terms: Terms, beta: Tensor | float) -> Tensor:
        """Return the factors of the gradient that samples pass on when log q has no score, `(particles, n)`.

        Of an ELBO it is 1. In log sum_k w_k a sample of proportion v_k has v_k times its path without the factor, and
        E[v_k d log q(z_k)] = E[(v_k - v_k^2) d log w_k / dz_k dz_k], of which there are beta.
        """
        share = self._grouped(log_weights(terms, beta)).softmax(0)
        own = (1 - self.elbo) * share
        part = own / (own + self.elbo / len(share)) if self.elbo else 1.0
        return (1 - beta * part * (1 - share)).reshape(self.particles, -1)

    def evaluate(self, pair: Pair, x: Tensor, rows: int | None, beta: Tensor, closed: Collection[str] = ()) -> Weighed:
        terms = self.terms(pair, x, rows, beta)
        return self.loss(terms, beta), terms.figures(closed) if closed else terms.means

    def figure(self, epochs: int) -> str:
        return "iwae" if self.beta.at(epochs, epochs) == 1 else "beta_iwae"

    def bound(self, pair: Pair, x: Tensor, rows: int | None, beta: Tensor) -> Tensor:
        terms = self.terms(pair, x, rows)
        found = log_weights(terms, beta)
        value = torch.lerp(bound_of(found if self.partially else self._grouped(found)).mean(), found.mean(), self.elbo)
        return value - sum(terms.penalties[name].mean() for name in pair.layout.factors if name in terms.penalties)

    def misfits(self, pair: Pair, rows: int) -> list[str]:
        found = []
        if names := ", ".join(pair.layout.expected):
            found.append(text("objectives.importance.iwae", names=names))
        for name, part in pair.named_modules():
            if isinstance(part, PosteriorModule) and part.learns_baseline:
                key = f"latents.{name.rpartition('.')[2]}.posterior.baseline"
                found.append(f"{key}: expected 'none' or 'average' with iwae; got 'network'.")
        if names := ", ".join(pair.layout.shared):
            found.append(f"objective.kind: expected trace_elbo with global latents ({names}); got iwae.")
        if pair.layout.scored and self.groups == self.particles:
            found.append("objective.groups: expected at least 2 particles each, for a baseline of scores; got 1.")
        return found

    def loss(self, terms: Terms, beta: Tensor) -> Tensor:
        """Return the negative bound, nats per datum; `beta` scales the KL inside the importance weights."""
        every = log_weights(terms, beta)
        log_weight = self._grouped(every)
        bound, weight = bound_of(log_weight), 1 - self.elbo
        loss = weight * self._with_scores(-bound.mean(), bound, log_weight, terms, beta)
        if self.elbo:
            loss = loss + self.elbo * with_score_functions(minus_elbo(terms, beta), terms, beta)
        if terms.of_model is not None:
            joint = self._grouped(log_weights(terms.of_model, beta))
            with torch.no_grad():
                more = self._grouped(every.softmax(0)) - log_weight.softmax(0) / self.groups
                tighter = bound_of(every).mean() - bound.mean()
            gain = (more * (joint - joint.detach())).sum() / every.shape[1]
            loss = loss - weight * (gain + tighter)
        return with_penalties(loss, terms)

    def _grouped(self, values: Tensor) -> Tensor:
        """Return values `(particles, n)` as `(particles / groups, groups * n)`, a column for every group and datum."""
        return values.reshape(self.particles // self.groups, -1)

    def _with_scores(self, loss: Tensor, bound: Tensor, log_weight: Tensor, terms: Terms, beta: Tensor) -> Tensor:
        """Return a loss of the same value, plus the score-function gradients of latents without a pathwise one."""
        if not terms.scores:
            return loss
        if names := ", ".join(name for name, score in terms.scores.items() if score.learns):
            raise DeclarationError(f"{names}: expected no baseline network under iwae; got one. Set baseline = 'none'.")
        with torch.no_grad():
            left, share = bound - self.without_each(log_weight), beta * log_weight.softmax(0)
        for score in terms.scores.values():  # the KL holds log q without its gradient: d bound / d log q = -share
            gain = left * self._grouped(score.log_q) - share * self._grouped(score.weighed)
            loss = loss - (gain - gain.detach()).sum(0).mean()
        return loss

    @staticmethod
    def without_each(log_weight: Tensor) -> Tensor:
        """Return the bound with each of K log-weights `(K, n)` in turn replaced by the mean of the others, `(K, n)`."""
        k = len(log_weight)
        own = torch.eye(k, dtype=torch.bool, device=log_weight.device).unsqueeze(-1)
        others = log_weight.expand(k, -1, -1)
        mean = torch.where(own, 0.0, others).sum(1, keepdim=True) / (k - 1)
        return torch.where(own, mean, others).logsumexp(1) - math.log(k)
