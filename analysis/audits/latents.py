"""Figures of latents: scale, moments, correlations, intrinsic dimension; and the vectors of codes."""

import math
from collections.abc import Iterator

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate, Row, over_rows

CHANNELS = 64
"""Largest number of channels that have figures of their own."""
COORDINATES = 512
"""Largest number of coordinates whose moments and correlations are computed: of more, evenly spaced ones."""
NEIGHBOUR_ROWS, NEIGHBOUR_WORK = 5000, 2e10
"""Largest number of rows among which neighbours are sought, and of multiplications that this may take."""
SHARED_NEIGHBOURS = 1.3
"""Factor of the error of an intrinsic dimension, as rows share their neighbours: 1.15 to 1.35 in 1 to 5 dimensions."""


def by_channel(z: Tensor) -> Tensor:
    """Return latents `(n, C, H, W)`, `(n, T, C)` or `(n, C)` as `(n, C, R)`, float64."""
    axis = 1 if z.dim() == 4 else -1
    return z.movedim(axis, 1).reshape(len(z), z.shape[axis], -1).double()


def units(mean: Tensor, variance: Tensor) -> Iterator[Row]:
    """Yield the shift and scale that make latents unit, (z - shift) * scale: of all elements, and of up to 64 channels.

    Given are means and variances of the posteriors, `(n, C, R)`; errors are those of the mean and of the variance.
    """
    for c in range(-1, mean.shape[1] * (mean.shape[1] <= CHANNELS)):
        m, v = (part if c < 0 else part[:, c : c + 1] for part in (mean, variance))
        end, whose = ("", "all elements") if c < 0 else (f".{c}", f"channel {c}")
        shift, square = over_rows(m.mean((1, 2))), over_rows(((m - m.mean()) ** 2 + v).mean((1, 2)))
        error = 0.5 * square.standard_error * square.value**-1.5
        yield f"shift{end}", shift, f"mean of {whose} of the latents: subtract it"
        yield f"scale{end}", Estimate(square.value**-0.5, error), f"1 / standard deviation of {whose}: multiply by it"


def moments(z: Tensor, coordinates: dict[str, Tensor]) -> Iterator[Row]:
    """Yield means over coordinates that vary, `(n, d)`, of |skewness|, excess kurtosis and distance to a normal.

    And the total correlation of a normal of their covariance, -1/2 log det R, unbiased for normal coordinates, and the
    largest correlation. Errors are those of influence functions, that of the distance (Kolmogorov-Smirnov, to the
    normal of the same mean and variance) is a bound. Figures of each coordinate are added to `coordinates`.

    References:
        An Introduction to Multivariate Statistical Analysis (Anderson, 2003), theorem 7.5.3
    """
    chosen = (z.std(0) > 1e-9 * z.std()).nonzero()[:, 0]
    chosen = chosen[torch.linspace(0, len(chosen) - 1, min(len(chosen), COORDINATES)).long()]
    u, n, d = (z - z.mean(0))[:, chosen] / z[:, chosen].std(0, correction=0), len(z), len(chosen)
    normal, steps, r = torch.special.ndtr(u.sort(0).values), torch.arange(n)[:, None] / n, u.T @ u / n
    skewness, fourth = (u**3).mean(0), (u**4).mean(0)
    distance = torch.maximum(normal - steps, steps + 1 / n - normal).amax(0)
    coordinates |= {"skewness": skewness, "kurtosis": fourth - 3, "distance": distance}
    signed = (u**3 - 3 * u - 1.5 * skewness * (u**2 - 1)) * skewness.sign()
    yield "skewness", over_rows(signed.mean(1)), "mean |skewness| of a coordinate"
    tails = u**4 - 4 * skewness * u - 2 * fourth * (u**2 - 1) - 3
    yield "kurtosis", over_rows(tails.mean(1)), "mean excess kurtosis of a coordinate"
    said = f"mean KS distance of a coordinate to a normal, about {0.6 / math.sqrt(n):.3f} for a normal one"
    yield "distance", Estimate(float(distance.mean()), 0.5 / math.sqrt(n)), said
    if n >= 2 * d:
        free = (n - torch.arange(1, d + 1).double()) / 2
        total = 0.5 * ((torch.digamma(free) - torch.digamma(free[0])).sum() - torch.linalg.slogdet(r).logabsdet)
        terms = total + 0.5 * ((u**2).sum(1) - (u * torch.linalg.lstsq(r, u.T).solution.T).sum(1))
        yield "gaussian_correlation", over_rows(terms), "total correlation of a normal of their covariance, nats"
    i, j = divmod(int(r.fill_diagonal_(0).abs().argmax()), d)
    largest = Estimate(float(r[i, j].abs()), (1 - float(r[i, j]) ** 2) / math.sqrt(n))
    yield "correlation", largest, f"largest |correlation|: coordinates {int(chosen[i])} and {int(chosen[j])}"


def intrinsic_dimension(x: Tensor) -> Estimate | None:
    """Return the dimension of the manifold near which values `(n, D)` lie, by the ratios of two neighbours' distances.

    The ratio of the distances to the second and to the first neighbour is Pareto with exponent d (TwoNN); the estimate
    is that of most likelihood. Curvature and boundaries make it too small in many dimensions: by 7 % for a sphere of 10
    and by 20 % for a normal of 20 dimensions with 2000 rows. None where fewer than 40 values are distinct.

    References:
        Estimating the intrinsic dimension of datasets by a minimal neighborhood information (Facco et al., 2017),
        https://doi.org/10.1038/s41598-017-11873-y

    Example:
        >>> line = torch.rand(500, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(1, 3)
        >>> 0.9 < intrinsic_dimension(line).value < 1.1
        True
    """
    rows = x[: min(NEIGHBOUR_ROWS, math.isqrt(int(NEIGHBOUR_WORK / x.shape[1])))].double().unique(dim=0)
    if len(rows) < 40:
        return None
    distance = NearestNeighbors(n_neighbors=2).fit(rows.numpy()).kneighbors()[0]
    value = (len(rows) - 1) / float(torch.from_numpy(distance[:, 1] / distance[:, 0]).log().sum())
    return Estimate(value, SHARED_NEIGHBOURS * value / math.sqrt(len(rows)))


def vectors_of(index: Tensor, vectors: Tensor, states: int) -> Tensor | None:
    """Return the vector of every code, `(K, d)`, 0 for codes that do not occur; None where shapes do not fit.

    Codes are `(n, *grid)`, quantised vectors `(n, d, *grid)` or `(n, *grid, d)`, as `by_channel` reads them.
    """
    index = index.reshape(len(index), -1)
    if not vectors.is_floating_point() or (found := by_channel(vectors).mT).shape[:-1] != index.shape:
        return None
    table = found.new_zeros(states, found.shape[-1])
    table[index] = found
    return table
