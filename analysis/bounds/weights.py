"""Log mean importance weights, their errors and samplers; first dimension samples, last dimension data."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from pvae.pair.terms import Terms

WeightSampler = Callable[[Tensor, int], Tensor]
"""Function from a batch and a number of samples to log weights `(samples, batch)`; for one sample also `(batch,)`."""


def log_weights(terms: Terms, given: Collection[str] = ()) -> Tensor:
    """Return log weights log p(x, z) - log q(z | x), `(particles, batch)`, float64.

    The KLs of global latents in `given`, which are treated as constants, are left out.
    """
    kl = (value.double() for name, value in terms.kl.items() if name not in given)
    return terms.reconstruction.double() - sum(kl)


def log_mean(log_weights: Tensor) -> Tensor:
    """Return the log of the mean importance weight over samples, `(n,)`."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def inverse_ess(log_weights: Tensor) -> Tensor:
    """Return sum w^2 / (sum w)^2, `(n,)`: the inverse effective sample size; 1 where all weights are zero."""
    return ((2 * log_weights).logsumexp(0) - 2 * log_weights.logsumexp(0)).exp().nan_to_num(nan=1.0)


def delta_error(inverse_ess: Tensor, samples: int) -> float:
    """Return the delta-method standard error of the mean over data of log mean weights; NaN with one sample."""
    if samples == 1:
        return math.nan
    return float((inverse_ess - 1 / samples).clamp(min=0).sum().sqrt() / len(inverse_ess))


def one_by_one(sampler: WeightSampler) -> WeightSampler:
    """Return a sampler of log weights that runs guide and model once per sample."""
    return lambda x, count: torch.stack([sampler(x, 1).reshape(len(x)) for _ in range(count)])


def side_by_side(sampler: WeightSampler) -> WeightSampler:
    """Return a sampler that puts all samples in one batch, for pairs that accept no plate of particles."""
    return lambda x, count: sampler(x.repeat(count, *(1,) * (x.dim() - 1)), 1).reshape(count, len(x))
