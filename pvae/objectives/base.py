"""Objectives: what SVI minimises, as functions of a pair's terms; nats per datum."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pvae.component import Component
from pvae.errors import DeclarationError
from pvae.guides.posteriors.base import PosteriorModule
from pvae.nn.precision import Precision, products_in
from pvae.nn.schedules import Constant, Schedule
from pvae.pair.densities import sum_over
from pvae.pair.pair import Pair
from pvae.pair.terms import Terms

if TYPE_CHECKING:
    from pvae.data import Split
    from pvae.data.streamed import Streamed


class Stepper(ABC):
    """Treatment of batches by a fit: a gradient step with each (`Step`), or sums for a closed form."""

    moving_now = False
    """Whether a step has begun to move weights and has not ended; it stays so where it broke off."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """What the returned vector holds."""

    @abstractmethod
    def __call__(self, x: Tensor, frozen: Sequence[nn.Parameter] = ()) -> Tensor:
        """Take in one batch; parameters in `frozen` do not move. Returns the detached vector named by `names`."""

    def begin(self) -> None:  # noqa: B027 - most have nothing to do
        """Called once, before the first step of a fit."""

    def end_epoch(self) -> None:  # noqa: B027
        """Called after the last step of every epoch, before validation."""


@dataclass(frozen=True)
class Fitting:
    """What a stepper other than gradient steps knows of its fit."""

    loss: Loss
    """The objective over the pair."""
    data: Split
    """The training data."""
    steps: int
    """Batches of an epoch."""
    seed: int
    gathered: dict[str, Tensor]
    """What the steps of an epoch sum up, kept here because it belongs to every checkpoint."""
    tell: Callable[[str, str], None]
    """Reports an event, as kind and message."""
    optimizer: torch.optim.Optimizer
    """Over all parameters that are free."""
    clip_norm: float | None = None
    """Largest norm of a gradient; infinite where it is only watched, None where it is not."""
    average: tuple[Sequence[Tensor], float] | None = None
    """Averaged weights in the order of the pair's free parameters, moved in place, with their decay."""


class Objective(Component):
    """A loss over `Terms`; `beta` weighs the KL, `free_bits` leaves the first nats of each latent unpenalised."""

    default: ClassVar[str] = "trace_elbo"
    dtype: ClassVar[torch.dtype | None] = None
    """What parameters are cast to; None leaves them as they are."""
    engine: ClassVar[str | None] = None
    """How its steps run, where there is no choice."""
    refuses: ClassVar[tuple[str, ...]] = ()
    """Keys of `train` that must stay as they are by default."""
    scores: ClassVar[bool] = True
    """Whether it fits a density of x, so that an ELBO can be reported."""

    beta: Schedule = Constant()
    """Weight of the KL in per-datum nats: 1 is the ELBO, 0 an autoencoder."""
    free_bits: float = Field(default=0.0, ge=0)
    """Nats per latent and datum below which the batch-mean KL of a latent is not penalised.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016), appendix C.8
    """

    @abstractmethod
    def terms(self, pair: Pair, x: Tensor, rows: int | None = None) -> Terms:
        """The terms this objective needs of a batch of a data set of `rows`."""

    @abstractmethod
    def loss(self, terms: Terms, beta: Tensor) -> Tensor:
        """Scalar loss, nats per datum."""

    def attach(self, pair: Pair) -> None:  # noqa: B027 - most have nothing to add
        """Add to a declared pair what is fitted beside model and guide; called once, with weights still at random."""

    def measure(self, pair: Pair, x: Tensor | Streamed, seed: int) -> dict[str, float] | None:
        """What validation reports of held-out data `(n, *row)` in place of an ELBO; None for that.

        Moves no weight and no random state; the same seed, the same figures.
        """
        return None

    def misfits(self, pair: Pair, rows: int) -> list[str]:
        """What keeps a pair from being fitted to `rows` training rows by this objective, one line each."""
        return []

    def no_free_scores(self, pair: Pair) -> list[str]:
        """Free bits are no part of the cost that a score function weighs."""
        if not self.free_bits or not pair.layout.scored:
            return []
        names = ", ".join(pair.layout.scored)
        return [f"objective.free_bits: expected 0 beside a score function ({names}); got {self.free_bits}."]

    def stepper(self, fitting: Fitting) -> Stepper | None:
        """What fits the pair instead of gradient steps; None for those."""
        return None

    def penalised(self, loss: Tensor, terms: Terms) -> Tensor:
        """A loss plus the batch means of what is added beside the ELBO (commitment and the like)."""
        return sum_over([loss, *(value.mean() for value in terms.penalties.values())]) if terms.penalties else loss

    def estimated(self, loss: Tensor, terms: Terms, beta: Tensor) -> Tensor:
        """A loss with the gradient of draws that carry none: the score function of every such latent.

        That is (gain - baseline) grad log q, gain = reconstruction - beta * sum of KLs, without the latent's own KL
        where that is in closed form. The value stays as it is. With several particles the mean of the others is taken
        off as well (which leaves the gradient unbiased); a network's baseline is brought nearer to the gain by their
        squared difference.
        """
        for name, score in terms.scores.items():
            others = [kl for site, kl in terms.kl.items() if score.own_kl or site != name]
            gain = terms.reconstruction - (beta * sum_over(others) if others else 0.0)
            gain = gain.detach()
            score.note(gain)
            left = gain if score.baseline is None else gain - score.baseline.detach()
            if left.dim() > 1:
                left = (left - left.mean(0)) * (len(left) / (len(left) - 1))
            loss = loss - (left * (score.log_q - score.log_q.detach())).mean()
            if score.learns and score.baseline is not None:
                error = (score.baseline - gain).square().mean()
                loss = loss + (error - error.detach())
        return loss

    def minus_elbo(self, terms: Terms, beta: Tensor) -> Tensor:
        """beta * sum of batch-mean KLs, each at least `free_bits`, minus the reconstruction."""
        reconstruction, *kl = terms.means
        if self.free_bits:
            kl = [mean.clamp(min=self.free_bits) for mean in kl]
        return torch.addcmul(-reconstruction, beta, sum_over(kl)) if kl else -reconstruction


@final
class TraceELBO(Objective):
    """Monte Carlo ELBO, E_q[log p(x, z) - log q(z | x)] with one draw: equal to Pyro's `Trace_ELBO` divided by n.

    References:
        Auto-Encoding Variational Bayes (Kingma, Welling, 2013), https://arxiv.org/abs/1312.6114
    """

    kind: Literal["trace_elbo"] = "trace_elbo"
    particles: int = Field(default=1, gt=0)
    """Draws per datum."""

    def terms(self, pair: Pair, x: Tensor, rows: int | None = None) -> Terms:
        """See `Objective.terms`."""
        return pair.terms(x, particles=self.particles, rows=rows, expected=True)

    def loss(self, terms: Terms, beta: Tensor) -> Tensor:
        """Minus the ELBO estimate."""
        return self.estimated(self.penalised(self.minus_elbo(terms, beta), terms), terms, beta)

    def misfits(self, pair: Pair, rows: int) -> list[str]:
        """See `Objective.misfits`."""
        return self.no_free_scores(pair)


@final
class TraceMeanFieldELBO(Objective):
    """The ELBO with KL(q(z_l | .) || p(z_l | .)) in closed form wherever torch knows it.

    Valid when, for every latent, neither side's parents are inferred from it; other guides are refused.
    """

    kind: Literal["trace_mean_field_elbo"] = "trace_mean_field_elbo"

    def terms(self, pair: Pair, x: Tensor, rows: int | None = None) -> Terms:
        """See `Objective.terms`."""
        return pair.terms(x, closed_form=True, rows=rows, expected=True)

    def loss(self, terms: Terms, beta: Tensor) -> Tensor:
        """Minus the ELBO estimate."""
        return self.estimated(self.penalised(self.minus_elbo(terms, beta), terms), terms, beta)

    def misfits(self, pair: Pair, rows: int) -> list[str]:
        """See `Objective.misfits`."""
        return self.no_free_scores(pair)


@final
class IWAE(Objective):
    """The importance-weighted bound, E log 1/K sum_k p(x, z_k) / q(z_k | x).

    Draws that carry no gradient have that of their score function, whose baseline is the bound with this draw's weight
    replaced by the geometric mean of the others' (VIMCO); a posterior's own average is not needed, and not moved.

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2015), https://arxiv.org/abs/1509.00519
        Variational Inference for Monte Carlo Objectives (Mnih, Rezende, 2016), https://arxiv.org/abs/1602.06725
    """

    kind: Literal["iwae"] = "iwae"
    particles: int = Field(default=8, gt=1)
    """K, draws per datum."""

    @model_validator(mode="after")
    def _no_free_bits(self) -> Self:
        if self.free_bits:
            raise ValueError("free_bits = 0 with iwae: the bound has no KL term to leave free; use trace_elbo")
        return self

    def terms(self, pair: Pair, x: Tensor, rows: int | None = None) -> Terms:
        """See `Objective.terms`."""
        return pair.terms(x, particles=self.particles, rows=rows)

    def misfits(self, pair: Pair, rows: int) -> list[str]:
        """See `Objective.misfits`."""
        found = []
        if names := ", ".join(pair.layout.expected):
            found.append(
                f"objective.kind: expected trace_elbo with {names}, whose states are summed over; got iwae. Or let the "
                f"posterior draw: estimator = 'score'."
            )
        for name, part in pair.named_modules():
            if isinstance(part, PosteriorModule) and part.learns_baseline:
                key = f"latents.{name.rpartition('.')[2]}.posterior.baseline"
                found.append(f"{key}: expected 'none' or 'average' with iwae; got 'network'.")
        if names := ", ".join(pair.layout.shared):
            found.append(f"objective.kind: expected trace_elbo with global latents ({names}); got iwae.")
        return found

    def loss(self, terms: Terms, beta: Tensor) -> Tensor:
        """Minus the bound; with beta the KL inside the weights is scaled."""
        log_weight = terms.reconstruction - beta * sum_over(list(terms.kl.values()))
        bound = torch.logsumexp(log_weight, 0) - math.log(self.particles)
        loss = self.penalised(-bound.mean(), terms)
        if not terms.scores:
            return loss
        if names := ", ".join(name for name, score in terms.scores.items() if score.learns):
            raise DeclarationError(f"{names}: expected no baseline network under iwae; got one. Set baseline = 'none'.")
        with torch.no_grad():
            left, share = bound - self.without_each(log_weight), beta * log_weight.softmax(0)
        for score in terms.scores.values():  # the KL holds log q without its gradient: d bound / d log q = -share
            gain = left * score.log_q - share * score.weighed
            loss = loss - (gain - gain.detach()).sum(0).mean()
        return loss

    @staticmethod
    def without_each(log_weight: Tensor) -> Tensor:
        """The bound with each of K log-weights `(K, n)` replaced by the mean of the others, `(K, n)`."""
        k = len(log_weight)
        own = torch.eye(k, dtype=torch.bool, device=log_weight.device).unsqueeze(-1)
        others = log_weight.expand(k, -1, -1)
        mean = torch.where(own, 0.0, others).sum(1, keepdim=True) / (k - 1)
        return torch.where(own, mean, others).logsumexp(1) - math.log(k)


class Loss(nn.Module):
    """An objective over a pair as one module, ready to be exported: weights that change live in buffers.

    `forward(x)` returns the loss, differentiable, and a vector of figures without gradient: loss, reconstruction,
    then the KL of every latent (batch means, nats per datum); `names` names them. Networks multiply in `precision`.
    """

    beta: Tensor

    def __init__(
        self, objective: Objective, pair: Pair, rows: int | None = None, precision: Precision = "float32"
    ) -> None:
        super().__init__()
        self.rows, self.precision = rows, precision
        self.objective = objective
        self.pair = pair
        sites = (*pair.layout.latents, *pair.layout.shared, *pair.layout.enumerated)
        self.names: tuple[str, ...] = ("loss", "reconstruction", *(f"kl/{name}" for name in sites))
        self.register_buffer("beta", torch.ones(()), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x `(batch, *event)` to the scalar loss and the vector named by `names`."""
        with products_in(self.precision):
            terms = self.objective.terms(self.pair, x, self.rows)
        loss = self.objective.loss(terms, self.beta)
        return loss, torch.stack([loss, *terms.means]).detach()
