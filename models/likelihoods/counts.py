"""Likelihoods of counts: Poisson and negative binomial elements."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, final

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Shape
from pvae.distributions.base import Event
from pvae.models.likelihoods.base import Likelihood, LikelihoodModule
from pvae.models.likelihoods.closed_form import ClosedForm, PoissonForm

LOWEST_LOG_RATE = -12.0
"""Smallest log-rate or log-mean (a clamp), so that counts absent from the data stay possible."""
HIGHEST_LOG_RATE = 24 * math.log(2) + 1
"""Largest log-rate or log-mean (a clamp): single precision represents all integers up to 2^24."""


class PoissonModule(LikelihoodModule):
    """Module of the Poisson likelihood: independent counts, whose log-rates are the decoder's output."""

    def __init__(self, x: Shape, bounds: tuple[float, float]) -> None:
        super().__init__(x, 1)
        self.bounds = bounds

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the distribution of x for log-rates `(..., *x)`."""
        return Event(dist.Poisson(h.clamp(*self.bounds).exp()), len(self.x))

    def closed_form(self) -> ClosedForm:
        return PoissonForm(self)


@final
class Poisson(Likelihood):
    """Poisson likelihood: elements of x are independent counts 0, 1, 2, ..."""

    kind: Literal["poisson"] = "poisson"
    closed_form: ClassVar[bool] = True
    hint: ClassVar[str] = "set data.scale = 'raw', or use likelihood 'normal'"

    @property
    def support(self) -> constraints.Constraint:
        """Support of each element: non-negative integers."""
        return constraints.nonnegative_integer

    def build(self, x: Shape) -> LikelihoodModule:
        return PoissonModule(x, (LOWEST_LOG_RATE, HIGHEST_LOG_RATE))


LARGEST_LOG_COUNT = 7.0
"""Largest |log r| of a negative binomial (a clamp), r its dispersion parameter."""


def dispersed(log_mean: Tensor, log_count: Tensor, validate_args: bool | None = None) -> dist.TorchDistribution:
    """Return negative binomials of mean m and variance m + m^2 / r, given log m `(..., d)` and log r `(d,)`."""
    log_count = log_count.clamp(-LARGEST_LOG_COUNT, LARGEST_LOG_COUNT)  # beyond, a Poisson; and lgamma loses digits
    logits = log_mean.clamp(LOWEST_LOG_RATE, HIGHEST_LOG_RATE) - log_count
    return dist.NegativeBinomial(log_count.exp().expand(logits.shape), logits=logits, validate_args=validate_args)


class NegativeBinomialModule(LikelihoodModule):
    """Module of the negative binomial likelihood: the decoder outputs log-means; dispersions are learned."""

    def __init__(self, x: Shape) -> None:
        super().__init__(x, 1)
        self.log_count = nn.Parameter(torch.ones(self.x))

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the distribution of x for log-means `(..., *x)`."""
        return Event(dispersed(h, self.log_count), len(self.x))


@final
class NegativeBinomial(Likelihood):
    """Negative binomial likelihood of independent counts (RNA, say): variance m + m^2 / r, one learned r per element.

    References: Deep generative modeling for single-cell transcriptomics (Lopez et al., 2018),
        https://doi.org/10.1038/s41592-018-0229-2
    """

    kind: Literal["negative_binomial"] = "negative_binomial"
    hint: ClassVar[str] = "set data.scale = 'raw', or use likelihood 'normal'"

    @property
    def support(self) -> constraints.Constraint:
        """Support of each element: non-negative integers."""
        return constraints.nonnegative_integer

    def build(self, x: Shape) -> LikelihoodModule:
        return NegativeBinomialModule(x)
