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


def squared_error(largest: Tensor, log_mean: Tensor, inverse_ess: Tensor, samples: int) -> Tensor:
    """Return the squared jackknife error of the log mean weight of every datum, `(n,)`; infinite without any weight.

    Without a sample of share s = w / sum w the log mean falls by -log(1 - s), up to a constant: s in the delta method,
    whose errors are up to three times too small where few samples have most of the weight. Here shares not above the
    smallest of the `largest` fall by s plus a constant, as in the delta method.

    Arguments:
        largest: the largest log weights of every datum, falling, `(k, n)`.
        log_mean: log mean of all weights, `(n,)`.
        inverse_ess: sum w^2 / (sum w)^2, `(n,)`.
        samples: number of all weights.
    """
    logs = largest - log_mean - math.log(samples)
    share = logs.exp()
    fall = torch.log1p(-share.clamp(max=0.5))
    others = torch.logaddexp(logs[1:].logsumexp(0), (1 - share.sum(0)).clamp(min=0).log())
    fall[0] = torch.where(share[0] > 0.5, torch.where(others.isfinite(), others, -1.0), fall[0])
    more = fall + share
    more = more - more[-1:]
    total = inverse_ess - 2 * (share * more).sum(0) + more.square().sum(0)
    found = (1 - 1 / samples) * (total - (1 - more.sum(0)).square() / samples)
    return found.clamp(min=0).nan_to_num(nan=math.inf)


def one_by_one(sampler: WeightSampler) -> WeightSampler:
    """Return a sampler of log weights that runs guide and model once per sample."""
    return lambda x, count: torch.stack([sampler(x, 1).reshape(len(x)) for _ in range(count)])


def side_by_side(sampler: WeightSampler) -> WeightSampler:
    """Return a sampler that puts all samples in one batch, for pairs that accept no plate of particles."""
    return lambda x, count: sampler(x.repeat(count, *(1,) * (x.dim() - 1)), 1).reshape(count, len(x))
