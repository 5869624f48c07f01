"""log p(x) from below: importance-weighted bounds with one to many samples, and how far to trust their weights."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any, ClassVar, final

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pvae.analysis.draws import accept, quiet
from pvae.analysis.estimate import CONSERVATIVE, Estimate
from pvae.analysis.psis import FEWEST, khat_limit, pareto_k, tail_length
from pvae.errors import DataError
from pvae.pair import PARTICLES, Pair, Terms
from pvae.traces import log_prob, sum_over
from pvae.traces import samples as sample_sites

if TYPE_CHECKING:
    from rich.table import Table

Draw = Callable[[Tensor, int], Tensor]
"""Of a batch and a number of draws, log weights: `(draws, batch)`, or `(batch,)` for one draw."""
Progress = Callable[[int, int], None]

POINTS = 10
"""Most points of the curve."""
ELEMENTS, ELEMENTS_ON_GPU = 2**20, 2**25
"""Elements of x that a block of draws may decode; on a CPU, activations beyond its cache cost more than calls."""
GATHERED = 16
"""Blocks whose weights are summed at once: there are many small sums."""
FEWEST_DRAWS, MOST_DRAWS = 256, 20_000
"""Of a block, whatever the size of x: fewer are all calls, more save nothing."""
ROUNDING = 64
"""Error of a log weight in units of its last place: it is a sum of many terms."""


def _silent(_done: int, _total: int) -> None:
    """Tell nobody."""


# ---------------------------------------------------------------------- results


@dataclass(frozen=True, repr=False)
class Bounds:
    """Lower bounds on the mean log p(x) with 1, ..., `samples` importance samples, nats per datum."""

    title: ClassVar[str]
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

    def rows(self) -> Iterator[tuple[str, Estimate, str]]:
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
            "figures": {name: _plain_estimate(e) for name, e, _ in self.rows()},
            "curve": [{"samples": k, **_plain_estimate(e)} for k, e in self.curve],
            "gap": _plain(self.gap),
            "ess_median": float(self.ess.median()),
            "ess_min": float(self.ess.min()),
            "khat_limit": self.khat_limit,
            "khat_share": _plain(self.khat_share),
            "khat_median": _plain(khat.median()) if len(khat) else None,
            "khat_max": _plain(khat.max()) if len(khat) else None,
        }

    def table(self) -> Table:
        """The figures as a rich table."""
        from rich.table import Table
        from rich.text import Text

        caption = (self.summary(), f"the gap is a lower bound on {self.divergence}", self.trust())
        table = Table(
            title=Text(f"{self.title}, nats per datum (n = {self.n})"),
            caption=Text("\n".join(caption)),  # Text: no markup in what stands in brackets
            caption_justify="left",
        )
        for column, justify in (("term", "left"), ("value", "right"), ("std error", "right"), ("kind", "left")):
            table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        table.add_column("what it is")
        for name, e, meaning in self.rows():
            kind = e.kind.replace("_", " ") + (f", {e.note}" if e.note else "")
            table.add_row(name, f"{e.value:.4f}", f"{e.standard_error:.4f}", kind, Text(meaning))
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [f"{self.title}, nats per datum, n = {self.n}"]
        lines += [f"{name:28s} {e}" for name, e, _ in self.rows()]
        return "\n".join([*lines, self.summary(), self.trust()])

    def _repr_html_(self) -> str:
        body = "".join(f"<tr><th>{html.escape(n)}</th><td>{html.escape(str(e))}</td></tr>" for n, e, _ in self.rows())
        return f"<table><caption>n = {self.n}</caption>{body}</table><p>{html.escape(self.trust())}</p>"


def _plain(value: float | Tensor) -> float | None:
    """A number that JSON knows."""
    return float(value) if math.isfinite(value) else None


def _plain_estimate(e: Estimate) -> dict[str, Any]:
    return {key: _plain(value) if isinstance(value, float) else value for key, value in e.to_dict().items()}


@final
@dataclass(frozen=True, repr=False)
class Evidence(Bounds):
    """Bounds on the mean log p(x) with samples of the guide, nats per datum."""

    title = "evidence"
    names = ("elbo", "iwae")
    first = "log p(x) from below, the same draws one by one"
    source = "draws of the guide"
    divergence = "KL(q(z|x) || p(z|x))"

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

    title = "evidence from the prior"
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

        def weights(x: Tensor, count: int) -> Tensor:
            return log_weights(pair.terms(x, particles=count), given)

        draw = weights if vectorises(pair, x) else _repeated(weights)
        found = _stream(x, samples, draw, on_progress)
    return Evidence(len(x), samples, found.curve(), found.log_p, found.ess, found.khat)


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

        def weights(x: Tensor, count: int) -> Tensor:
            return _likelihood(pair, x, count, given)

        draw = weights if _takes_particles(weights, x) else _repeated(weights)
        found = _stream(x, samples, draw, on_progress)
    return PriorEvidence(len(x), samples, found.curve(), found.log_p, found.ess, found.khat)


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
    spread = [name for name in pair.layout.shared if not _is_point(nodes[name]["fn"])]
    if spread:
        raise DataError(
            f"{caller}: expected latents of single data only, or global ones that the guide sets to points; "
            f"got global {', '.join(spread)}. Sample them from Delta in the guide, or use surgery."
        )
    return {name: nodes[name]["value"] for name in pair.layout.shared}


def _is_point(fn: Any) -> bool:
    while isinstance(fn, (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


# ---------------------------------------------------------------------- the stream of weights


def group_sizes(samples: int) -> tuple[int, ...]:
    """1 = K_0 < K_1 < ... = samples, each dividing the next: prime factors taken from both ends in turn.

    >>> group_sizes(5000)
    (1, 5, 10, 50, 100, 500, 1000, 5000)
    """
    primes = _prime_factors(samples)
    order = [primes.pop(-1 if i % 2 == 0 else 0) for i in range(len(primes))]
    sizes = list(accumulate(order, mul, initial=1))
    stride = -(-len(sizes) // POINTS)
    return (*sizes[:1], *sizes[:0:-stride][::-1])


def _prime_factors(number: int) -> list[int]:
    """Rising, with repetitions."""
    factors, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return factors + [number] * (number > 1)


class Moments:
    """Mean and variance over what was pushed so far, per datum."""

    def __init__(self) -> None:
        self.count = 0

    def push(self, values: Tensor) -> None:
        """Take in `(any number, rows)`."""
        if not self.count:
            # Squares of differences from a value seen keep their digits where the spread is far below the mean.
            self.shift = torch.where(values[0].isfinite(), values[0], 0.0)
            self.total = self.squares = torch.zeros_like(self.shift)
        apart = values - self.shift
        self.total = self.total + apart.sum(0)
        self.squares = self.squares + apart.square().sum(0)
        self.count += len(values)

    @property
    def mean(self) -> Tensor:
        """`(rows,)`."""
        return self.shift + self.total / self.count

    @property
    def squared_error(self) -> Tensor:
        """Variance of the mean, `(rows,)`; infinite where a value was."""
        spread = (self.squares - self.total.square() / self.count).clamp(min=0).nan_to_num(nan=math.inf)
        return spread / max(self.count - 1, 1) / self.count


class Level:
    """Log mean weights of groups of K, made of `ratio` groups of the level below; a group may span many blocks."""

    def __init__(self, size: int, ratio: int) -> None:
        self.log_size, self.ratio = math.log(size), ratio
        self.moments = Moments()
        self.open: Tensor
        self.filled = 0

    def push(self, sums: Tensor) -> Tensor:
        """Log sums of the level below `(any number, rows)` to those of the groups now complete."""
        if self.ratio > 1:
            sums = self._closed(sums)
        if len(sums):
            self.moments.push(sums - self.log_size)
        return sums

    def _closed(self, sums: Tensor) -> Tensor:
        missing = self.ratio - self.filled if self.filled else 0
        head, rest = sums[:missing], sums[missing:]
        whole = len(rest) // self.ratio * self.ratio
        closed = rest[:whole].unflatten(0, (-1, self.ratio)).logsumexp(1) if whole else rest[:0]
        if missing:
            self.open = torch.logaddexp(self.open, head.logsumexp(0))
            self.filled += len(head)
            if self.filled < self.ratio:
                return closed
            closed = torch.cat([self.open[None], closed])
        self.open, self.filled = rest[whole:].logsumexp(0), len(rest) - whole
        return closed


@dataclass(frozen=True)
class Sums:
    """What is known of a set of data when all weights are drawn: data along the last dimension, float64."""

    sizes: tuple[int, ...]
    bounds: Tensor
    """L_K, `(sizes, n)`."""
    squared_errors: Tensor
    """Squares of their Monte Carlo errors, `(sizes, n)`."""
    ess: Tensor
    khat: Tensor

    @property
    def log_p(self) -> Tensor:
        """The bound with all samples, `(n,)`."""
        return self.bounds[-1]

    def curve(self) -> tuple[tuple[int, Estimate], ...]:
        """Means over the data."""
        return tuple(zip(self.sizes, map(self._mean, self.bounds, self.squared_errors), strict=True))

    def _mean(self, values: Tensor, squared_errors: Tensor) -> Estimate:
        n = len(values)
        spread = float(values.std() / math.sqrt(n)) if n > 1 else math.nan
        if self.sizes[-1] == 1:  # one draw cannot tell noise from spread
            return Estimate(float(values.mean()), spread, "lower_bound", spread, CONSERVATIVE)
        return Estimate(float(values.mean()), float(squared_errors.sum().sqrt() / n), "lower_bound", spread)


class Stream:
    """Sums over the log weights of some rows, taken block by block and forgotten but for the largest."""

    def __init__(self, samples: int, precision: float) -> None:
        self.sizes = group_sizes(samples)
        below = (1, *self.sizes[:-1])
        self.levels = [Level(size, size // last) for size, last in zip(self.sizes, below, strict=True)]
        self.kept = min(tail_length(samples) + 1, samples)
        self.precision = precision

    def push(self, weights: Tensor) -> None:
        """Take in log weights `(any number, rows)`, float64."""
        self._keep(weights)
        for level in self.levels:
            weights = level.push(weights)

    def _keep(self, weights: Tensor) -> None:
        doubled = (2 * weights).logsumexp(0)
        if not self.levels[0].moments.count:
            self.largest, self.doubled = weights[:0], doubled
        else:
            self.doubled = torch.logaddexp(self.doubled, doubled)
        candidates = torch.cat([self.largest, weights])
        self.largest = candidates.topk(min(self.kept, len(candidates)), 0).values

    def sums(self) -> Sums:
        """What the weights pushed, as many as announced, amount to."""
        samples = self.sizes[-1]
        bounds = torch.stack([level.moments.mean for level in self.levels])
        # sum w^2 / (sum w)^2; without any weight above zero there is no effective sample.
        inverse_ess = (self.doubled - 2 * (bounds[-1] + math.log(samples))).exp().nan_to_num(nan=math.inf)
        errors = [level.moments.squared_error for level in self.levels[:-1]]
        errors.append((inverse_ess - 1 / samples).clamp(min=0))
        resolution = ROUNDING * self.precision * (1 + self.largest[0].abs())
        khat = pareto_k(self.largest, samples, resolution)
        return Sums(self.sizes, bounds.cpu(), torch.stack(errors).cpu(), 1 / inverse_ess.cpu(), khat.cpu())


def _stream(x: Tensor, samples: int, draw: Draw, on_progress: Progress) -> Sums:
    """Draw and sum the weights of all data: some rows at a time, their draws in equal blocks."""
    block = block_size(x)
    rows = max(1, min(len(x), block, GATHERED * block // samples))
    parts = []
    for start in range(0, len(x), rows):
        chunk = x[start : start + rows]
        parts.append(_stream_chunk(chunk, samples, block // len(chunk), draw))
        on_progress(start + len(chunk), len(x))
    return _joined(parts)


def _stream_chunk(x: Tensor, samples: int, most: int, draw: Draw) -> Sums:
    stream = Stream(samples, torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0)
    counts = _even_parts(samples, most)
    for start in range(0, len(counts), GATHERED):
        blocks = [draw(x, count).reshape(count, len(x)) for count in counts[start : start + GATHERED]]
        stream.push(torch.cat(blocks))
    return stream.sums()


def block_size(x: Tensor) -> int:
    """Draws, of all rows together, that are decoded at a time."""
    elements = ELEMENTS_ON_GPU if x.is_cuda else ELEMENTS
    return min(MOST_DRAWS, max(FEWEST_DRAWS, elements // max(1, x[0].numel())))


def _even_parts(total: int, most: int) -> list[int]:
    """`total` in as few parts as go, none above `most`, equal but for one."""
    parts = -(-total // most)
    return [total // parts + (i < total % parts) for i in range(parts)]


def _joined(parts: list[Sums]) -> Sums:
    """Parts of a data set in a row."""
    columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Sums)[1:]}
    return Sums(parts[0].sizes, **{name: torch.cat(column, -1) for name, column in columns.items()})
