"""log p(x) from below: importance-weighted bounds with one to many samples, and how far to trust their weights."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, final

import pyro
from torch import Tensor

from pvae.analysis.bounds.accumulate import Draw, Progress, stream
from pvae.analysis.bounds.psis import FEWEST, khat_limit, tail_length
from pvae.analysis.decompose.codes import log_evidence
from pvae.analysis.decompose.draws import accept, quiet, require_likelihood
from pvae.analysis.figures.estimate import Estimate, exact_mean
from pvae.analysis.figures.table import Figures, Row
from pvae.errors import DataError
from pvae.pair.densities import log_prob, sum_over
from pvae.pair.layout import is_point
from pvae.pair.layout import samples as sample_sites
from pvae.pair.pair import Pair
from pvae.pair.running import PARTICLES
from pvae.pair.terms import Terms


def _silent(_done: int, _total: int) -> None:
    """Tell nobody."""


# ---------------------------------------------------------------------- results


@dataclass(frozen=True, repr=False)
class Bounds(Figures):
    """Lower bounds on the mean log p(x) with 1, ..., `samples` importance samples, nats per datum."""

    what: ClassVar[str]
    """Of the title."""
    names: ClassVar[tuple[str, str]]
    """Of the bound with one sample, and of those with more (`_K` is added)."""
    first: ClassVar[str]
    """What the bound with one sample is."""
    source: ClassVar[str]
    """Whence the samples come."""
    divergence: ClassVar[str]
    """What the gap is a lower bound on."""

    n: int
    samples: int
    curve: tuple[tuple[int, Estimate], ...]
    """(K, bound with K samples), K from 1 to `samples`, all of the same draws: rises with K, surely."""
    log_p: Tensor
    """The bound with all samples of every datum, `(n,)`."""
    ess: Tensor
    """Effective sample size of the importance weights of every datum, `(n,)`, at most `samples`."""
    khat: Tensor
    """Pareto shape of the largest weights of every datum, `(n,)`; NaN where there is no tail: see `psis.pareto_k`."""

    @property
    def gap(self) -> float:
        """The bound with all samples less that with one, nats: a lower bound on `divergence`."""
        return self.curve[-1][1].value - self.curve[0][1].value

    @property
    def khat_limit(self) -> float:
        """The k-hat above which a datum's bound is not reliable: min(1 - 1 / log10(samples), 0.7)."""
        return khat_limit(self.samples)

    @property
    def khat_share(self) -> float:
        """Share of the data with k-hat above `khat_limit`; NaN with too few samples for a tail."""
        if tail_length(self.samples) < FEWEST:
            return math.nan
        return float((self.khat > self.khat_limit).double().mean())

    @property
    def title(self) -> str:
        """See `Figures.title`."""
        return f"{self.what}, nats per datum (n = {self.n})"

    @property
    def remarks(self) -> tuple[str, ...]:
        """See `Figures.remarks`."""
        return (self.summary(), f"the gap is a lower bound on {self.divergence}", self.trust())

    def rows(self) -> Iterator[Row]:
        """(term, figure, what it means), K rising; a single sample bears both names."""
        one, many = self.names
        yield one, self.curve[0][1], self.first
        for k, bound in self.curve[1:] or self.curve:
            yield f"{many}_{k}", bound, f"log p(x) from below, K = {k} {self.source}"

    def trust(self) -> str:
        """What k-hat says of the weights, in one sentence."""
        share = self.khat_share
        if math.isnan(share):
            return "too few samples for k-hat"
        where = f"k-hat above {self.khat_limit:.2g} for"
        if not share:
            return f"{where} no datum"
        why = "the weights' variance may be infinite" if self.khat_limit > 0.5 else "the samples are too few"
        return f"{where} {100 * share:.3g} % of data: there {why} and the bound loose"

    def summary(self) -> str:
        """Gap and effective samples, in one line."""
        return f"gap {self.gap:.4f}; effective samples {self.ess.median():.0f} (median)"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON; None for what is not defined or not finite."""
        khat = self.khat[~self.khat.isnan()]
        return {
            "unit": "nats per datum",
            "n": self.n,
            "samples": self.samples,
            "figures": self.figures(),
            "curve": [{"samples": k, **e.to_dict()} for k, e in self.curve],
            "gap": _plain(self.gap),
            "ess_median": float(self.ess.median()),
            "ess_min": float(self.ess.min()),
            "khat_limit": self.khat_limit,
            "khat_share": _plain(self.khat_share),
            "khat_median": _plain(khat.median()) if len(khat) else None,
            "khat_max": _plain(khat.max()) if len(khat) else None,
        }


def _plain(value: float | Tensor) -> float | None:
    """A number that JSON knows."""
    return float(value) if math.isfinite(value) else None


@final
@dataclass(frozen=True, repr=False)
class Evidence(Bounds):
    """Bounds on the mean log p(x) with samples of the guide, nats per datum."""

    what = "evidence"
    names = ("elbo", "iwae")
    first = "log p(x) from below, the same draws one by one"
    source = "draws of the guide"
    divergence = "KL(q(z|x) || p(z|x))"

    exact: Estimate | None = None
    """log p(x) itself: of a flow, and where all latents are codes of at most 4096 joint states that can be summed."""

    def rows(self) -> Iterator[Row]:
        """See `Bounds.rows`."""
        yield from super().rows()
        if self.exact is not None:
            yield "log_p", self.exact, "log p(x) itself: summed over every state of a code, or a flow's"

    @property
    def elbo(self) -> Estimate:
        """The bound with one sample, averaged over the same draws."""
        return self.curve[0][1]

    @property
    def iwae(self) -> Estimate:
        """The bound with all samples; the tightest."""
        return self.curve[-1][1]


@final
@dataclass(frozen=True, repr=False)
class PriorEvidence(Bounds):
    """Bounds on the mean log p(x) with draws of the prior, nats per datum."""

    what = "evidence from the prior"
    names = ("jensen", "prior")
    first = "E_p(z) log p(x | z), the same draws one by one"
    source = "draws of the prior"
    divergence = "KL(p(z) || p(z|x))"

    @property
    def jensen(self) -> Estimate:
        """Jensen's bound E_p(z) log p(x | z), averaged over the same draws."""
        return self.curve[0][1]

    @property
    def evidence(self) -> Estimate:
        """log (1/S) sum_s p(x | z_s): in expectation below log p(x)."""
        return self.curve[-1][1]


# ---------------------------------------------------------------------- the two bounds


def evidence(pair: Pair, x: Tensor, samples: int = 5000, seed: int = 0, *, on_progress: Progress = _silent) -> Evidence:
    r"""The importance-weighted bounds L_K = E log 1/K sum_k p(x, z_k) / q(z_k | x) <= log p(x), K from 1 to `samples`.

    The draws of a datum are split in groups of K; L_K is the mean over groups of log mean w, unbiased for the bound
    with K samples. Groups nest, so that L_K never falls with K. Weights are summed as they are drawn: memory does
    not grow with `samples`. The Monte Carlo error of one datum comes from the variance over groups, for the one
    group of all samples from the delta method, sqrt(sum w^2 / (sum w)^2 - 1/K).

    Global latents that the guide sets to points (Delta) are taken as given: the bound is on log p(x | points), and
    their own KL is no part of it.

    Warning: where the guide is narrower than the posterior the weights may have infinite variance; the error is
    then too small, and a low `ess` or a high `khat` is the sign of it.

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2015), https://arxiv.org/abs/1509.00519
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646

    Arguments:
        pair: any Pyro pair.
        x: data `(n, *event)`.
        samples: the largest K.
        seed: of the draws.
        on_progress: called with (rows done, rows in all).

    Returns:
        Evidence; `curve` (of which `elbo` and `iwae` are the ends) holds lower bounds in nats per datum, each with
        its Monte Carlo error; one that no z drawn explains has log p = -inf.

    Raises:
        DataError: no rows, no samples, or global latents with a spread.
    """
    _check_samples(samples, "evidence")
    x = accept(pair, x)
    with quiet(pair, x, seed):
        given = _points(pair, x, "evidence")
        certain = _require_bound(pair)

        def weights(x: Tensor, count: int) -> Tensor:
            return log_weights(pair.terms(x, particles=count), given)

        draw = weights if vectorises(pair, x) else _repeated(weights)
        found = stream(x, samples, draw, on_progress)
        summed = None if pair.layout.shared or pair.layout.enumerated else log_evidence(pair, x)
    if certain:
        summed = found.log_p
    exact = None if summed is None else exact_mean(summed.cpu())
    return Evidence(len(x), samples, found.curve(), found.log_p, found.ess, found.khat, exact)


def prior_evidence(
    pair: Pair, x: Tensor, samples: int = 5000, seed: int = 0, *, on_progress: Progress = _silent
) -> PriorEvidence:
    r"""The naive Monte Carlo bound E log 1/K sum_k p(x | z_k) <= log p(x), z_k ~ p(z), K from 1 to `samples`.

    With K = 1 it is Jensen's bound E_p(z) log p(x | z), which lies KL(p(z) || p(z|x)) below log p(x). The guide
    plays no part, so that this checks a guide's evidence in few dimensions; in many, hardly a draw explains x.
    Errors, memory and global latents are as in `evidence`.

    Warning: where the posterior is much narrower than the prior few draws carry all weight; the bound is then loose
    and its error too small, and a low `ess` or a high `khat` is the sign of it.

    References:
        On the Quantitative Analysis of Decoder-Based Generative Models (Wu, Burda, Salakhutdinov, Grosse, 2016),
        https://arxiv.org/abs/1611.04273

    Arguments:
        pair: any Pyro pair.
        x: data `(n, *event)`.
        samples: the largest K.
        seed: of the draws.
        on_progress: called with (rows done, rows in all).

    Returns:
        PriorEvidence; `curve` (of which `jensen` and `evidence` are the ends) holds lower bounds in nats per datum.

    Raises:
        DataError: no rows, no samples, or global latents with a spread.
    """
    _check_samples(samples, "prior_evidence")
    x = accept(pair, x)
    with quiet(pair, x, seed):
        given = _points(pair, x, "prior_evidence")
        require_likelihood(pair, "prior_evidence")

        def weights(x: Tensor, count: int) -> Tensor:
            return _likelihood(pair, x, count, given)

        draw = weights if _takes_particles(weights, x) else _repeated(weights)
        found = stream(x, samples, draw, on_progress)
    return PriorEvidence(len(x), samples, found.curve(), found.log_p, found.ess, found.khat)


def _require_bound(pair: Pair) -> bool:
    """Refuse a posterior without a density, unless z determines x as x determines z (a flow).

    Returns:
        Whether log p(x) is known exactly: in a flow, and where the model sums all its latents out.
    """
    points = [name for name in pair.layout.latents if name in pair.structure.points]
    if points and not pair.structure.determined:
        raise DataError(
            f"evidence: expected posterior densities; got a point for {', '.join(points)}, as in an autoencoder: its "
            f"log p(x, z) bounds nothing. Use prior_evidence or ais, which do without the guide."
        )
    return len(points) == len(pair.layout.latents)


def _check_samples(samples: int, caller: str) -> None:
    if samples < 1:
        raise DataError(f"{caller}: expected at least one sample; got samples={samples}. Pass samples=5000, say.")


# ---------------------------------------------------------------------- log weights


def log_weights(terms: Terms, given: Collection[str] = ()) -> Tensor:
    """log p(x, z) - log q(z | x) of terms, `(particles, batch)`, float64; latents `given` count as known."""
    kl = (value.double() for name, value in terms.kl.items() if name not in given)
    return terms.reconstruction.double() - sum(kl)


def vectorises(pair: Pair, x: Tensor) -> bool:
    """Whether both programs accept a leading plate of particles; a foreign one that reshapes may not."""
    return _takes_particles(lambda x, count: pair.terms(x, particles=count).reconstruction, x)


def _takes_particles(draw: Draw, x: Tensor) -> bool:
    try:
        return draw(x[:2], 3).shape == (3, len(x[:2]))
    except (ValueError, RuntimeError, IndexError):
        return False


def _repeated(draw: Draw) -> Draw:
    """Draws side by side in one batch, for programs that take no particles."""
    return lambda x, count: draw(x.repeat(count, *(1,) * (x.dim() - 1)), 1).reshape(count, len(x))


def _likelihood(pair: Pair, x: Tensor, count: int, given: dict[str, Tensor]) -> Tensor:
    """log p(x | z) with z from the prior, `(count, batch)`."""
    particles = count if count > 1 else 0
    with pyro.plate(PARTICLES, count, dim=-1 - pair.layout.nesting) if particles else nullcontext():
        trace = pair.model_trace(x, given)
    return sum_over([log_prob(trace.nodes[name], pair.layout, particles).double() for name in pair.layout.observed])


def _points(pair: Pair, x: Tensor, caller: str) -> dict[str, Tensor]:
    """The values of the global latents, all of them points of the guide.

    Raises:
        DataError: one has a spread.
    """
    if not pair.layout.shared:
        return {}
    nodes = sample_sites(pair.guide_trace(x[:2]))
    spread = [name for name in pair.layout.shared if not is_point(nodes[name]["fn"])]
    if spread:
        raise DataError(
            f"{caller}: expected latents of single data only, or global ones that the guide sets to points; "
            f"got global {', '.join(spread)}. Sample them from Delta in the guide, or use surgery."
        )
    return {name: nodes[name]["value"] for name in pair.layout.shared}
