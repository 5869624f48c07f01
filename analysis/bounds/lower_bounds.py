"""Results with lower bounds on log p(x) for 1 to K importance samples, and diagnostics of their weights."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from pvae.analysis.bounds.weights import SMALLEST_TAIL, khat_limit, tail_length
from pvae.analysis.figures.estimate import Estimate, Figures, Row

UNRELIABLE_PROPORTION = 0.1
"""Proportion of data with k-hat above its limit beyond which importance sampling is called not reliable."""


@dataclass(frozen=True, repr=False)
class Bounds(Figures):
    """Lower bounds on the mean log p(x) with 1, ..., `samples` importance samples, nats per datum."""

    heading = "{0.what}, nats per datum (n = {0.n})"
    counts = ("n", "samples")
    what: ClassVar[str]
    """Name of the estimated quantity, for the title of the table."""
    names: ClassVar[tuple[str, str]]
    """Names, in the table, of the bound with one sample and of the others, to which `_K` is appended."""
    first: ClassVar[str]
    """Description, in the table, of the bound with one sample."""
    source: ClassVar[str]
    """Distribution the samples are drawn from."""
    divergence: ClassVar[str]
    """KL divergence of which the gap between the bounds with all samples and with one is a lower bound."""

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
        """Bound with all samples minus the bound with one, nats: a lower bound on `divergence`."""
        return self.curve[-1][1].value - self.curve[0][1].value

    @property
    def khat_limit(self) -> float:
        """Limit of k-hat above which the bound of a datum is not reliable: min(1 - 1 / log10(samples), 0.7)."""
        return khat_limit(self.samples)

    @property
    def khat_share(self) -> float:
        """Proportion of data whose k-hat exceeds `khat_limit`; NaN with too few samples for a tail."""
        if tail_length(self.samples) < SMALLEST_TAIL:
            return math.nan
        return float((self.khat > self.khat_limit).double().mean())

    @property
    def remarks(self) -> tuple[str, ...]:
        return (self.summary(), f"the gap is a lower bound on {self.divergence}", self.trust())

    def rows(self) -> Iterator[Row]:
        """Yield the rows (term, estimate, meaning) in order of K; with a single sample its bound has both names."""
        one, many = self.names
        yield one, self.curve[0][1], self.first
        for k, bound in self.curve[1:] or self.curve:
            yield f"{many}_{k}", bound, f"lower bound on log p(x), K = {k} {self.source}"

    def trust(self) -> str:
        """Return a sentence on the reliability of importance sampling, from k-hat."""
        share = self.khat_share
        if math.isnan(share):
            return "too few samples for k-hat"
        exceeds = f"k-hat exceeds its limit {self.khat_limit:.2g} on"
        if not share:
            return f"importance sampling is reliable: {exceeds} no data point"
        why = "the weights may have infinite variance" if self.khat_limit > 0.5 else "the samples are too few"
        if share > UNRELIABLE_PROPORTION:
            return f"importance sampling is not reliable: {exceeds} {100 * share:.3g} % of data points; there {why}"
        return f"importance sampling is reliable: {exceeds} only {100 * share:.3g} % of data points; there {why}"

    def summary(self) -> str:
        """Return the gap and the median effective sample size, in one line."""
        return f"gap {self.gap:.4f}; effective samples {self.ess.median():.0f} (median)"

    def to_dict(self) -> dict[str, Any]:
        """Return bounds and diagnostics as plain numbers and strings, for JSON; None for values that are not finite."""
        khat = self.khat[~self.khat.isnan()]
        return self.nested(
            curve=[{"samples": k, **e.to_dict()} for k, e in self.curve],
            gap=self.gap,
            ess_median=self.ess.median(),
            ess_min=self.ess.min(),
            khat_limit=self.khat_limit,
            khat_share=self.khat_share,
            khat_median=khat.median() if len(khat) else None,
            khat_max=khat.max() if len(khat) else None,
        )


@dataclass(frozen=True, repr=False)
class Evidence(Bounds):
    """Lower bounds on the mean log p(x) with samples of the guide, nats per datum; the result of `evidence`."""

    what = "evidence"
    names = ("elbo", "iwae")
    first = "lower bound on log p(x) with one sample, averaged over the same samples"
    source = "samples of the guide"
    divergence = "KL(q(z|x) || p(z|x))"

    exact: Estimate | None = None
    """Exact mean log p(x) for flows and for discrete latents of at most 4096 joint states, which are summed; else
    None."""
    joint: bool = False
    """True if the guide samples global latents: every weight is that of the whole data set, and the bounds are on
    log p(x_1, ..., x_n), divided by n."""

    @property
    def remarks(self) -> tuple[str, ...]:
        told = ("global latents are sampled: bounds on log p of all rows together, divided by n",) if self.joint else ()
        return (*super().remarks, *told)

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


@dataclass(frozen=True, repr=False)
class PriorEvidence(Bounds):
    """Lower bounds on the mean log p(x) with samples of the prior, nats per datum; the result of `prior_evidence`."""

    what = "evidence from the prior"
    names = ("jensen", "prior")
    first = "E_p(z) log p(x | z), averaged over the same samples"
    source = "samples of the prior"
    divergence = "KL(p(z) || p(z|x))"

    @property
    def jensen(self) -> Estimate:
        """Jensen's bound E_p(z) log p(x | z), averaged over the same samples as the other bounds."""
        return self.curve[0][1]

    @property
    def evidence(self) -> Estimate:
        """Bound with all S samples of the prior: log (1/S) sum_s p(x | z_s), in expectation at most log p(x)."""
        return self.curve[-1][1]
