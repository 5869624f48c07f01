"""Importance-weighted bounds on log p(x) from the log weights of many samples, accumulated in constant memory."""

import math
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from pvae.analysis.bounds.weights import WeightSampler, pareto_k, squared_error, tail_length
from pvae.analysis.figures.estimate import Estimate, over_noisy_rows
from pvae.records import Record
from pvae.util import Progress, group, seeds

CURVE_POINTS = 10
"""Largest number of sample sizes K at which the bounds L_K are computed, apart from K = 1."""
ELEMENTS, ELEMENTS_ON_GPU = 2**20, 2**25
"""Number of elements of x decoded per block; on a CPU, activations that exceed its cache cost more than function
calls."""
BLOCKS_PER_SUM = 16
"""Number of blocks of samples whose weights are accumulated together, because a single sum is small."""
SMALLEST_BLOCK, LARGEST_BLOCK = 256, 20_000
"""Smallest and largest number of samples per block, for any size of x: smaller blocks are slow, larger ones save
nothing."""
WEIGHT_ROUNDING = 64
"""Assumed relative rounding error of a log weight, a sum of many terms, in units of machine epsilon."""


def group_sizes(samples: int) -> tuple[int, ...]:
    """Return the numbers of samples 1 = K_0 < K_1 < ... = `samples` of the bounds L_K, each dividing the next.

    >>> group_sizes(5000)
    (1, 5, 10, 50, 100, 500, 1000, 5000)
    """
    primes = _prime_factors(samples)
    sizes = list(accumulate([primes.pop(-1 if i % 2 == 0 else 0) for i in range(len(primes))], mul, initial=1))
    stride = -(-len(sizes) // CURVE_POINTS)
    return (*sizes[:1], *sizes[:0:-stride][::-1])


def _prime_factors(number: int) -> list[int]:
    """Return the prime factors of a number in ascending order, with repetitions."""
    divisor = next((d for d in range(2, math.isqrt(number) + 1) if number % d == 0), number)
    return [divisor, *_prime_factors(number // divisor)] if number > 1 else []


class Level:
    """Estimate of one bound L_K: groups of K samples, each merged from `ratio` groups of the next smaller size.

    It keeps the mean and variance of the groups' log mean weights; a group may extend over several blocks of samples.
    """

    def __init__(self, size: int, ratio: int) -> None:
        self.log_size, self.ratio = math.log(size), ratio
        self.open: Tensor
        self.filled = self.count = 0

    def push(self, sums: Tensor) -> Tensor:
        """Add log sums of weights of smaller groups, `(any number, rows)`; return those of the completed groups."""
        if self.ratio > 1:
            sums = self._closed(sums)
        if len(sums):
            values = sums - self.log_size
            if not self.count:
                # Squares of differences from a value seen keep their digits where the spread is far below the mean.
                self.shift = torch.where(values[0].isfinite(), values[0], 0.0)
                self.total = self.squares = torch.zeros_like(self.shift)
            apart = values - self.shift
            self.total = self.total + apart.sum(0)
            self.squares = self.squares + apart.square().sum(0)
            self.count += len(values)
        return sums

    @property
    def mean(self) -> Tensor:
        """Mean over groups of their log mean weights, `(rows,)`."""
        return self.shift + self.total / self.count

    @property
    def squared_error(self) -> Tensor:
        """Variance of the mean, `(rows,)`; infinite where a value was infinite."""
        spread = (self.squares - self.total.square() / self.count).clamp(min=0).nan_to_num(nan=math.inf)
        return spread / max(self.count - 1, 1) / self.count

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


class Accumulated(Record):
    """Importance-weighted bounds and weight diagnostics of a data set, with data along the last dimension; float64."""

    sizes: tuple[int, ...]
    bounds: Tensor
    """Bound L_K of every number of samples and datum, `(sizes, n)`, nats."""
    squared_errors: Tensor
    """Squared Monte Carlo standard errors of the bounds, `(sizes, n)`."""
    ess: Tensor
    """Effective sample size of the importance weights, `(n,)`."""
    khat: Tensor
    """Pareto shape k-hat of the largest importance weights, `(n,)`."""
    means: Tensor
    """Self-normalised importance-weighted means of the V values that the sampler gave beside its weights, `(V, n)`:
    estimates of their posterior means. NaN where all weights are zero, and without such values."""

    @property
    def log_p(self) -> Tensor:
        """Bound on log p(x) with all samples, `(n,)`, nats."""
        return self.bounds[-1]

    def curve(self) -> tuple[tuple[int, Estimate], ...]:
        """Return pairs (K, mean over the data of the bound with K samples) for every number of samples K."""
        known = 1.0 if self.sizes[-1] > 1 else math.nan  # one sample cannot separate noise from spread
        errors = self.squared_errors.sum(1).sqrt() / len(self.ess) * known
        figures = zip(self.bounds, errors.tolist(), strict=True)
        return tuple(zip(self.sizes, (over_noisy_rows(v, e, "lower_bound") for v, e in figures), strict=True))


class Accumulator:
    """Accumulator of the importance weights of some rows: blocks are summed, and only the largest weights are kept."""

    def __init__(self, samples: int, precision: float) -> None:
        self.sizes = group_sizes(samples)
        self.levels = [Level(size, size // last) for size, last in zip(self.sizes, (1, *self.sizes[:-1]), strict=True)]
        self.kept = min(tail_length(samples) + 1, samples)
        self.precision = precision
        self.largest, self.means = torch.empty(0), torch.zeros(1, 1)
        self.total = self.doubled = torch.tensor(-math.inf, dtype=torch.float64)

    def average(self, weights: Tensor, values: Tensor) -> None:
        """Add values `(any number, rows, V)` of some further samples, with their log weights, to the weighted means."""
        total = torch.logaddexp(self.total, weights.logsumexp(0))
        known = total.masked_fill(total == -math.inf, 0.0)  # so far no sample explains these rows
        share = (weights - known).exp()[..., None]
        here = (share * values.double().masked_fill(share == 0, 0.0)).sum(0)
        self.means, self.total = self.means.to(here) * (self.total - known).exp()[..., None] + here, total

    def push(self, weights: Tensor) -> None:
        """Add log weights of some further samples, `(any number, rows)`, float64."""
        self.doubled = torch.logaddexp(self.doubled, (2 * weights).logsumexp(0))
        candidates = torch.cat([self.largest.to(weights), weights])
        self.largest = candidates.topk(min(self.kept, len(candidates)), 0).values
        for level in self.levels:
            weights = level.push(weights)

    def result(self) -> Accumulated:
        """Return bounds and diagnostics; to be called after the weights of all `samples` were pushed."""
        samples = self.sizes[-1]
        bounds = torch.stack([level.mean for level in self.levels])
        # sum w^2 / (sum w)^2; without any weight above zero there is no effective sample.
        inverse_ess = (self.doubled - 2 * (bounds[-1] + math.log(samples))).exp().nan_to_num(nan=math.inf)
        errors = [level.squared_error for level in self.levels[:-1]]
        errors.append(squared_error(self.largest, bounds[-1], inverse_ess, samples))
        khat = pareto_k(self.largest, samples, WEIGHT_ROUNDING * self.precision * (1 + self.largest[0].abs()))
        means = self.means.where(self.total[..., None] > -math.inf, math.nan)
        figures = bounds, torch.stack(errors), 1 / inverse_ess, khat, means.mT
        return Accumulated(self.sizes, *(figure.cpu() for figure in figures))


def accumulate_weights(
    x: Tensor, samples: int, draw: WeightSampler, on_progress: Progress, *, together: bool = False
) -> Accumulated:
    """Sample and accumulate the importance weights of all data, in chunks of rows and blocks of samples.

    With `together` all rows are one chunk, for programs that run on all rows only. Every chunk has noise of its own, so
    that several processes (`group`) find what one does.
    """
    block = max(block_size(x), len(x)) if together else block_size(x)
    rows = len(x) if together else max(1, min(len(x), block, BLOCKS_PER_SUM * block // samples))
    seed = seeds.drawn()

    def of(number: int) -> dict[str, Tensor]:
        chunk = x[number * rows : (number + 1) * rows]
        seeds.set_noise(seeds.mix(seed, seeds.ANALYSIS, number), x.device)
        accumulator = Accumulator(samples, torch.finfo(x.dtype if x.is_floating_point() else torch.float32).eps)
        blocks = -(-samples // (block // len(chunk)))
        counts = [len(part) for part in torch.empty(samples).tensor_split(blocks)]  # as even as possible
        for start in range(0, len(counts), BLOCKS_PER_SUM):
            parts = []
            for count in counts[start : start + BLOCKS_PER_SUM]:
                weights, *values = drawn if isinstance(drawn := draw(chunk, count), tuple) else (drawn,)
                parts.append(weights.reshape(count, len(chunk)))
                for value in values:
                    accumulator.average(parts[-1], value.reshape(count, len(chunk), -1))
            accumulator.push(torch.cat(parts))
        on_progress(number * rows + len(chunk), len(x))
        return {name: value for name, value in vars(accumulator.result()).items() if name != "sizes"}

    parts = group.dealt(-(-len(x) // rows), of)
    seeds.set_noise(seeds.mix(seed, seeds.ANALYSIS, len(parts)), x.device)
    columns = {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}
    return Accumulated(group_sizes(samples), **columns)


def block_size(x: Tensor) -> int:
    """Return the number of samples, over all rows together, that are decoded at a time."""
    elements = ELEMENTS_ON_GPU if x.is_cuda else ELEMENTS
    return min(LARGEST_BLOCK, max(SMALLEST_BLOCK, elements // max(1, x[0].numel())))
