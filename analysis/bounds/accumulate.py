"""Importance-weighted bounds on log p(x) from the log weights of many samples, of one chunk of rows after another."""

import math
from itertools import accumulate
from operator import mul

import torch
from torch import Tensor

from pvae.analysis.bounds.weights import WeightSampler, pareto_k, squared_error, tail_length
from pvae.analysis.figures.estimate import Estimate, over_noisy_rows
from pvae.util import Progress, Record, group, seeds

CURVE_POINTS = 10
"""Largest number of sample sizes K at which the bounds L_K are computed, apart from K = 1."""
ELEMENTS, ELEMENTS_ON_GPU = 2**20, 2**25
"""Number of elements of x decoded per block; on a CPU, activations that exceed its cache cost more than function
calls."""
BLOCKS_PER_SUM = 16
"""Number of blocks of samples after which the rows of a chunk have all their samples, unless it is one row."""
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


def accumulated(weights: Tensor, precision: float, means: Tensor | None = None) -> Accumulated:
    """Return the bounds and diagnostics of the log weights `(samples, rows)`, float64, of all samples of some rows.

    A bound L_K is the mean over groups of K samples of their log mean weight; groups of one size are merged to those of
    the next. Errors are infinite where a group has no weight.

    Arguments:
        weights: log weights, float64.
        precision: machine epsilon of the densities that the weights are made of.
        means: weighted means of further values, `(V, rows)`.
    """
    samples, sums, sizes = len(weights), [weights], group_sizes(len(weights))
    for size, last in zip(sizes[1:], sizes[:-1], strict=True):
        sums.append(sums[-1].unflatten(0, (-1, size // last)).logsumexp(1))
    bounds = torch.stack([each.mean(0) - math.log(size) for each, size in zip(sums, sizes, strict=True)])
    # sum w^2 / (sum w)^2; without any weight above zero there is no effective sample.
    inverse_ess = ((2 * weights).logsumexp(0) - 2 * sums[-1][0]).exp().nan_to_num(nan=math.inf)
    largest = weights.topk(min(tail_length(samples) + 1, samples), 0).values
    errors = [each.var(0).nan_to_num(nan=math.inf) / len(each) for each in sums[:-1]]
    errors.append(squared_error(largest, bounds[-1], inverse_ess, samples))
    khat = pareto_k(largest, samples, WEIGHT_ROUNDING * precision * (1 + largest[0].abs()))
    means = torch.full_like(weights[:1], math.nan) if means is None else means
    figures = bounds, torch.stack(errors), 1 / inverse_ess, khat, means
    return Accumulated(sizes, *(figure.cpu() for figure in figures))


class Average:
    """Weighted means `(rows, V)` of values of some rows, added up over blocks of samples."""

    def __init__(self) -> None:
        self.total, self.means = torch.tensor(-math.inf, dtype=torch.float64), torch.zeros(1, 1)

    def add(self, weights: Tensor, values: Tensor) -> None:
        """Add values `(any number, rows, V)` of some further samples, with their log weights."""
        total = torch.logaddexp(self.total, weights.logsumexp(0))
        known = total.masked_fill(total == -math.inf, 0.0)  # so far no sample explains these rows
        share = (weights - known).exp()[..., None]
        here = (share * values.double().masked_fill(share == 0, 0.0)).sum(0)
        self.means, self.total = self.means.to(here) * (self.total - known).exp()[..., None] + here, total


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
        average, parts, blocks = Average(), list[Tensor](), -(-samples // (block // len(chunk)))
        for count in (len(part) for part in torch.empty(samples).tensor_split(blocks)):  # as even as possible
            weights, *values = drawn if isinstance(drawn := draw(chunk, count), tuple) else (drawn,)
            parts.append(weights.reshape(count, len(chunk)))
            for value in values:
                average.add(parts[-1], value.reshape(count, len(chunk), -1))
        means = average.means.where(average.total[..., None] > -math.inf, math.nan).mT
        precision = torch.finfo(x.dtype if x.is_floating_point() else torch.float32).eps
        found = accumulated(torch.cat(parts), precision, means)
        on_progress(number * rows + len(chunk), len(x))
        return {name: value for name, value in vars(found).items() if name != "sizes"}

    parts = group.dealt(-(-len(x) // rows), of)
    seeds.set_noise(seeds.mix(seed, seeds.ANALYSIS, len(parts)), x.device)
    columns = {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}
    return Accumulated(group_sizes(samples), **columns)


def block_size(x: Tensor) -> int:
    """Return the number of samples, over all rows together, that are decoded at a time."""
    elements = ELEMENTS_ON_GPU if x.is_cuda else ELEMENTS
    return min(LARGEST_BLOCK, max(SMALLEST_BLOCK, elements // max(1, x[0].numel())))
