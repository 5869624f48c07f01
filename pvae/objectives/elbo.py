"""The ELBO as an objective: estimated from samples, or with KL divergences in closed form."""

from __future__ import annotations

from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor

from pvae.objectives.base import Objective
from pvae.pair.densities import sum_over
from pvae.pair.pair import Pair
from pvae.pair.terms import Terms


def minus_elbo(terms: Terms, beta: Tensor, free_bits: float = 0.0) -> Tensor:
    """Return beta * sum of batch-mean KLs, each at least `free_bits`, minus the mean reconstruction; nats per datum."""
    reconstruction, *kl = terms.means
    if free_bits:
        kl = [mean.clamp(min=free_bits) for mean in kl]
    return torch.addcmul(-reconstruction, beta, sum_over(kl)) if kl else -reconstruction


def with_penalties(loss: Tensor, terms: Terms) -> Tensor:
    """Return a loss plus the batch means of the penalties that are no part of the ELBO (a commitment loss, say)."""
    return sum_over([loss, *(value.mean() for value in terms.penalties.values())]) if terms.penalties else loss


def with_score_functions(loss: Tensor, terms: Terms, beta: Tensor) -> Tensor:
    """Return a loss of the same value, plus the score-function gradients of latents that have no pathwise gradient.

    The gradient is (gain - baseline) grad log q, gain = reconstruction - beta * sum of KLs, without the latent's own KL
    if that is in closed form. With several particles the mean gain of the others is subtracted as well (which leaves
    the gradient unbiased). The network of a baseline is fitted to the gain by least squares.
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


class ELBO(Objective):
    """Base of negative-ELBO losses, with score-function gradients and penalties; subclasses estimate the ELBO terms."""

    def loss(self, terms: Terms, beta: Tensor) -> Tensor:
        loss = with_penalties(minus_elbo(terms, beta, self.free_bits), terms)
        return with_score_functions(loss, terms, beta)

    def misfits(self, pair: Pair, rows: int) -> list[str]:
        if not self.free_bits or not pair.layout.scored:
            return []
        names = ", ".join(pair.layout.scored)
        return [f"objective.free_bits: expected 0 beside a score function ({names}); got {self.free_bits}."]


@final
class TraceELBO(ELBO):
    """Monte Carlo ELBO, E_q[log p(x, z) - log q(z | x)] from `particles` samples: Pyro's `Trace_ELBO` divided by n.

    References:
        Auto-Encoding Variational Bayes (Kingma, Welling, 2013), https://arxiv.org/abs/1312.6114
    """

    kind: Literal["trace_elbo"] = "trace_elbo"
    particles: int = Field(default=1, gt=0)
    """Number of samples per datum."""

    def terms(self, pair: Pair, x: Tensor, rows: int | None = None) -> Terms:
        return pair.terms(x, particles=self.particles, rows=rows, expected=True)


@final
class TraceMeanFieldELBO(ELBO):
    """ELBO with KL(q(z_l | .) || p(z_l | .)) in closed form for all pairs of distributions for which torch has one.

    It is valid if no parent of a latent, in model or guide, is itself inferred from that latent; other guides are
    refused.
    """

    kind: Literal["trace_mean_field_elbo"] = "trace_mean_field_elbo"

    def terms(self, pair: Pair, x: Tensor, rows: int | None = None) -> Terms:
        return pair.terms(x, closed_form=True, rows=rows, expected=True)
