"""Importance weights: log means, errors, Pareto shape k-hat, samplers; first dimension samples, last data.

And results with lower bounds on log p(x) for 1 to K importance samples, with diagnostics of their weights.
"""

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate, Figures, Row, refuse, text
from pvae.pair.terms import Terms

WeightSampler = Callable[[Tensor, int], Any]
"""Function from a batch and a number of samples to log weights `(samples, batch)`; for one sample also `(batch,)`.

It may return a tuple: the weights, and V values of every sample whose weighted means are wanted, `(..., V)`."""
SMALLEST_TAIL = 5
"""Smallest number of weights above the cutoff that the Pareto fit needs."""
PRIOR_WEIGHT, PRIOR_SHAPE = 10, 0.5
"""Prior on the Pareto shape k: the number of weights that it counts as, and their shape."""
NEGLIGIBLE = 10 * torch.finfo(torch.float64).eps
"""Proportion of the posterior mass below which a grid point of the fit is dropped."""
LOG_TINIEST = math.log(torch.finfo(torch.float64).tiny)
"""Log of the smallest weight distinguishable from zero when the largest weight is 1."""


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
    return ((1 - 1 / samples) * (total - (1 - more.sum(0)).square() / samples)).clamp(min=0).nan_to_num(nan=math.inf)


def one_by_one(sampler: WeightSampler) -> WeightSampler:
    """Return a sampler of log weights that runs guide and model once per sample."""
    return lambda x, count: torch.stack([sampler(x, 1).reshape(len(x)) for _ in range(count)])


def side_by_side(sampler: WeightSampler) -> WeightSampler:
    """Return a sampler that puts all samples in one batch, for pairs that accept no plate of particles."""
    return lambda x, count: sampler(x.repeat(count, *(1,) * (x.dim() - 1)), 1).reshape(count, len(x))


# ---------------------------------------------------------------------- k-hat, a diagnostic of their average


def tail_length(samples: int) -> int:
    """Return the number of largest weights that form the tail: min(S / 5, 3 sqrt(S)), rounded up."""
    return math.ceil(min(samples / 5, 3 * math.sqrt(samples)))


def khat_limit(samples: int) -> float:
    """Return the k-hat above which the average of S weights is not reliable: min(1 - 1 / log10 S, 0.7)."""
    return min(1 - 1 / math.log10(max(samples, 2)), 0.7)


def pareto_k(log_weights: Tensor, samples: int, resolution: Tensor | float = 0.0) -> Tensor:
    r"""Fit a generalised Pareto distribution to the largest importance weights of every datum; return its shape k-hat.

    Weights of shape k have finite moments up to order 1 / k; their variance is infinite from k = 1/2 on. The fit is
    the empirical Bayes estimate of Zhang and Stephens on the excess over the cutoff, shrunk towards 1/2 by a prior
    that counts as ten weights. The results equal those of `arviz.psislw`, with the exceptions under Returns.

    References:
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646
        A New and Efficient Estimation Method for the Generalized Pareto Distribution (Zhang, Stephens, 2009),
        https://doi.org/10.1198/tech.2009.08017

    Arguments:
        log_weights: the largest log weights of every datum, at least `tail_length(samples) + 1`, in any order,
            `(tail + 1 or more, n)`.
        samples: number S of all weights.
        resolution: rounding error of the log weights; smaller differences count as equal. A number or `(n,)`.

    Returns:
        k-hat, `(n,)`, float64; an estimate. Infinite where only one to four weights exceed the cutoff (as in ArviZ).
        NaN where there is no tail to fit (in ArviZ: infinite): fewer than 21 samples, a tail of equal weights (as
        under the true posterior), or weights that are all zero.

    Raises:
        DataError: there are fewer log weights than the tail and its cutoff need.
    """
    if (tail := tail_length(samples)) < SMALLEST_TAIL:
        return log_weights.new_full(log_weights.shape[1:], math.nan, dtype=torch.float64)
    refuse(len(log_weights) <= tail, "refused.few_weights", tail=tail, samples=samples, count=len(log_weights))
    top = log_weights.double().topk(tail + 1, 0).values
    relative = top - top[0]
    cutoff = relative[-1].clamp(min=LOG_TINIEST)
    above = relative[:-1] > cutoff
    count = above.sum(0)
    excess = torch.where(above, relative[:-1].exp() - cutoff.exp(), 0.0)
    shape = torch.where(count >= SMALLEST_TAIL, _shape(excess, count.clamp(min=1)), math.inf)
    return torch.where((relative[-1] >= -resolution) | ~top[0].isfinite(), math.nan, shape)


def _shape(excess: Tensor, count: Tensor) -> Tensor:
    """Return the posterior mean of the Pareto shape, `(n,)`, from the sorted `excess` `(tail, n)` over the cutoff.

    Entries after the first `count` are zero.
    """
    grid, weight = _grid(excess, count)
    shape = _mean_log(excess, (weight * grid).sum(0), count)
    return (count * shape + PRIOR_WEIGHT * PRIOR_SHAPE) / (count + PRIOR_WEIGHT)


def _grid(excess: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return values of the Pareto parameter b = -shape / scale and their posterior weights, each `(points, n)`."""
    points = 30 + count.double().sqrt().floor()
    j = torch.arange(1, int(points.max()) + 1, dtype=torch.float64, device=excess.device)[:, None]
    # The first quartile from below, counted from above: `excess` falls.
    quartile = excess.gather(0, (count - (count / 4 + 0.5).floor().long())[None])
    grid = 1 / excess[0] + (1 - (points / (j - 0.5)).sqrt()) / (3 * quartile)
    shape = _mean_log(excess, grid[:, None], count)
    score = count * ((-grid / shape).log() - shape - 1)
    weight = score.masked_fill(j > points, -math.inf).softmax(0)  # data with shorter tails have fewer points
    weight = torch.where(weight >= NEGLIGIBLE, weight, 0.0)
    return grid, weight / weight.sum(0)


def _mean_log(excess: Tensor, b: Tensor, count: Tensor) -> Tensor:
    """Return the mean of log(1 - b excess) over the tail of `count` weights; zeros after them add nothing."""
    return torch.log1p(-b * excess).sum(-2) / count


# ---------------------------------------------------------------------- the bounds that they give


class Bounds(Figures):
    """Lower bounds on the mean log p(x) with 1, ..., `samples` importance samples, nats per datum."""

    what: ClassVar[str]
    """Name of the estimated quantity, for the title of the table."""
    names: ClassVar[tuple[str, str]]
    """Names, in the table, of the bound with one sample and of the others, to which `_K` is appended."""
    source: ClassVar[str]
    """Distribution the samples are drawn from, "guide" or "prior"."""

    n: int
    """Number of data."""
    samples: int
    """Largest number of samples K."""
    curve: tuple[tuple[int, Estimate], ...]
    """Pairs (K, bound with K samples) for K from 1 to `samples`, all from the same samples; the bound never falls with
    K."""
    log_p: Tensor
    """Lower bound on log p(x) of every datum with all samples, nats, `(n,)`."""
    ess: Tensor
    """Effective sample size of the weights of every datum, `(n,)`, at most `samples`."""
    khat: Tensor
    """Pareto shape k-hat of the largest weights of every datum, `(n,)`; NaN where there is no tail
    (`weights.pareto_k`)."""

    @property
    def gap(self) -> float:
        """Bound with all samples minus that with one, nats: a lower bound on KL(source || p(z|x)); see `source`."""
        return self.curve[-1][1].value - self.curve[0][1].value

    @property
    def khat_limit(self) -> float:
        """Limit of k-hat above which the bound of a datum is not reliable: min(1 - 1 / log10(samples), 0.7)."""
        return khat_limit(self.samples)

    @property
    def khat_share(self) -> float:
        """Proportion of data whose k-hat exceeds `khat_limit`; NaN with too few samples for a tail."""
        known = tail_length(self.samples) >= SMALLEST_TAIL
        return float((self.khat > self.khat_limit).double().mean()) if known else math.nan

    def rows(self) -> Iterator[Row]:
        """Yield the rows (term, estimate, meaning) in order of K; with a single sample its bound has both names."""
        one, many = self.names
        yield one, self.curve[0][1], text("bounds.first", source=self.source)
        for k, bound in self.curve[1:] or self.curve:
            yield f"{many}_{k}", bound, f"lower bound on log p(x), K = {k} samples of the {self.source}"

    def trust(self) -> str:
        """Return a sentence on the reliability of importance sampling, from k-hat."""
        return text("bounds.trust", found=self, share=self.khat_share, limit=self.khat_limit)

    def summary(self) -> str:
        """Return the gap and the median effective sample size, in one line."""
        return f"gap {self.gap:.4f}; effective samples {self.ess.median():.0f} (median)"

    def to_dict(self) -> dict[str, Any]:
        """Return bounds and diagnostics as plain numbers and strings, for JSON; None for values that are not finite."""
        khat = self.khat[~self.khat.isnan()]
        return self.nested(
            curve=[{"samples": k, **e.to_dict()} for k, e in self.curve], gap=self.gap, ess_median=self.ess.median(),
            ess_min=self.ess.min(), khat_limit=self.khat_limit, khat_share=self.khat_share,
            khat_median=khat.median() if len(khat) else None, khat_max=khat.max() if len(khat) else None,
        )  # fmt: skip


class Evidence(Bounds):
    """Lower bounds on the mean log p(x) with samples of the guide, nats per datum; the result of `evidence`."""

    exact: Estimate | None = None
    """Exact mean log p(x) for flows and for discrete latents of at most 4096 joint states, which are summed; else
    None."""
    joint: bool = False
    """True if the guide samples global latents: every weight is that of the whole data set, and the bounds are on
    log p(x_1, ..., x_n), divided by n."""

    def figure(self) -> Any:
        from pvae.analysis.pages.plots import curves

        return curves.importance(self)

    def rows(self) -> Iterator[Row]:
        yield from super().rows()
        if self.exact is not None:
            yield "log_p", self.exact, "log p(x) itself: the density of a flow, or the sum over all states of the codes"

    @property
    def elbo(self) -> Estimate:
        """Bound with one sample (the ELBO), averaged over the same samples as the other bounds."""
        return self.curve[0][1]

    @property
    def iwae(self) -> Estimate:
        """Importance-weighted (IWAE) bound with all samples, the tightest one."""
        return self.curve[-1][1]


class PriorEvidence(Bounds):
    """Lower bounds on the mean log p(x) with samples of the prior, nats per datum; the result of `prior_evidence`."""

    @property
    def jensen(self) -> Estimate:
        """Jensen's bound E_p(z) log p(x | z), averaged over the same samples as the other bounds."""
        return self.curve[0][1]

    @property
    def evidence(self) -> Estimate:
        """Bound with all S samples of the prior: log (1/S) sum_s p(x | z_s), in expectation at most log p(x)."""
        return self.curve[-1][1]
