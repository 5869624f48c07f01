"""Fréchet and kernel distance between features of samples and of data."""

import math
from typing import Annotated

import torch
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate, Figures, refuse
from pvae.analysis.samples.fidelity import blocks
from pvae.util import seeds

HALVINGS = 5
"""Number of random splits of the data into halves, from which the floor of the Fréchet distance is estimated."""
ZERO_EIGENVALUE = 1e-12
"""Fraction of the largest eigenvalue below which an eigenvalue counts as zero."""


class Distances(Figures):
    """Distances of samples from data in a feature space, estimates; the result of `distances`.

    The Fréchet distances have the squared unit of the features, the kernel distance has none.
    """

    frechet: Annotated[Estimate, "between normals fitted to features of samples and data; too large on average"]
    """Squared Fréchet distance between normals fitted to features of samples and of data, see `frechet`."""
    frechet_floor: Annotated[Estimate, "the value for as many samples of the distribution of the data"]
    """Squared Fréchet distance that m samples of the data distribution itself would have, see `frechet_floor`."""
    kernel: Annotated[Estimate, "distances.kernel"]
    """Squared kernel distance (MMD^2) between features of samples and of data, see `kernel_distance`."""
    n: int
    """Number of data."""
    m: int
    """Number of samples."""


def distances(data: Tensor, samples: Tensor, seed: int = 0) -> Distances:
    """Estimate the Fréchet and kernel distances between features of data and of samples.

    Arguments:
        data: features `(n, F)`, as `Features.embed` gives them.
        samples: features `(m, F)`.
        seed: seed of the random halves of the data from which the floor is estimated.

    Returns:
        Distances: estimates, see `frechet`, `frechet_floor` and `kernel_distance`.

    Raises:
        DataError: there are fewer than four rows of data or two samples, or widths differ.

    References:
        See `frechet` and `kernel_distance`.

    Example:
        >>> a, b = torch.randn(50, 2), torch.randn(50, 2) + 3
        >>> found = distances(a, b)
        >>> found.frechet.value > found.frechet_floor.value
        True
    """
    few = data.shape[1:] != samples.shape[1:] or len(data) < 4 or len(samples) < 2
    refuse(few, "refused.other_features", data=list(data.shape), samples=list(samples.shape))
    data, samples = data.double(), samples.double()
    floor = frechet_floor(data, len(samples), seed)
    return Distances(frechet(data, samples), floor, kernel_distance(data, samples), len(data), len(samples))


# ---------------------------------------------------------------------- Fréchet


def frechet(a: Tensor, b: Tensor) -> Estimate:
    """Estimate the squared Fréchet distance between normals fitted to features `(n, F)` and `(m, F)`; float64.

    The standard error is that of the first order (delta method): each row moves the distance by the derivative of
    `normal_frechet` in the direction of its outer product, and the rows are independent.

    Warning: an estimate that is too large on average, by a term of order F^2 (1/n + 1/m): compare it with
    `frechet_floor`, and with others of equal n, m and space only.

    References:
        GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017), https://arxiv.org/abs/1706.08500

    Arguments:
        a: features of one kind, `(n, F)`, float64.
        b: features of the other kind, `(m, F)`, float64.

    Returns:
        An estimate, in squared units of the features.

    Example:
        >>> rows = torch.randn(200, 3).double()
        >>> round(frechet(rows, rows + 2).value, 6)
        12.0
    """
    (loc_a, cov_a), (loc_b, cov_b) = moments(a), moments(b)
    value = normal_frechet(loc_a, cov_a, loc_b, cov_b)
    pulls = (_pull(a - loc_a, loc_a - loc_b, cov_a, cov_b), _pull(b - loc_b, loc_b - loc_a, cov_b, cov_a))
    error = math.sqrt(sum(float(pull.var()) / len(pull) for pull in pulls))
    return Estimate(value, error, "estimate", note="too large on average")


def normal_frechet(loc_a: Tensor, cov_a: Tensor, loc_b: Tensor, cov_b: Tensor) -> float:
    """Return W_2^2 between two normals; exact: |loc_a - loc_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    The trace of that root is computed as the sum of the singular values of A^1/2 B^1/2, which stays real under
    rounding.

    References:
        The Fréchet distance between multivariate normal distributions (Dowson, Landau, 1982)

    Arguments:
        loc_a: mean, `(F,)`.
        cov_a: covariance, `(F, F)`, may be singular.
        loc_b: mean, `(F,)`.
        cov_b: covariance, `(F, F)`, may be singular.
    """
    cross = torch.linalg.matrix_norm(_power(cov_a, 0.5) @ _power(cov_b, 0.5), "nuc")
    return float((loc_a - loc_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def frechet_floor(data: Tensor, m: int, seed: int = 0) -> Estimate:
    """Estimate `frechet` between n data and m samples of the same distribution, from random halves of the data.

    Two halves of h = n/2 rows have a distance of c 2/h to the first order, n and m rows one of c (1/n + 1/m): for m = n
    half the distance between the halves.

    Warning: valid to the first order in F / n: a rough value if a half has no more rows than features.

    Arguments:
        data: features `(n, F)`, n at least 4.
        m: number of samples.
        seed: seed of the halves.

    Returns:
        An estimate; its standard error is the standard deviation of one such distance, not that of their mean, and is
        known from a few halvings only.
    """
    half = len(data) // 2
    generator = seeds.generator(seed, seeds.ANALYSIS, 14)
    found = []
    for _ in range(HALVINGS):
        order = torch.randperm(len(data), generator=generator).to(data.device)
        found.append(normal_frechet(*moments(data[order[:half]]), *moments(data[order[half : 2 * half]])))
    values = torch.tensor(found, dtype=torch.float64) * (1 / len(data) + 1 / m) / (2 / half)
    return Estimate(float(values.mean()), float(values.std()), "estimate", note="spread of one set of samples")


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean `(F,)` and covariance `(F, F)` of rows `(n, F)`."""
    return rows.mean(0), torch.atleast_2d(rows.T.cov())


def _pull(centred: Tensor, shift: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """Return the first-order effect of each row `(n, F)` on the squared Fréchet distance, `(n,)`, up to a constant."""
    root = _power(other, 0.5)
    onto = root @ _power(root @ own @ root, -0.5) @ root  # linear map that transports one normal to the other
    return 2 * centred @ shift + (centred.square() - (centred @ onto) * centred).sum(1)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Return a power of a symmetric, positive semidefinite matrix `(F, F)`; zero on its null space."""
    values, vectors = torch.linalg.eigh(matrix)
    is_zero = values <= ZERO_EIGENVALUE * values.max().clamp(min=0)
    return (vectors * values.masked_fill(is_zero, 1.0).pow(exponent).masked_fill(is_zero, 0.0)) @ vectors.T


# ---------------------------------------------------------------------- kernel


def kernel_distance(a: Tensor, b: Tensor) -> Estimate:
    """Estimate MMD^2 of features `(n, F)` and `(m, F)` under the kernel (<x, y> / F + 1)^3, float64.

    The estimate is unbiased, hence negative about half of the time for samples of the distribution of the data, where
    MMD is 0. The standard error is that of the jackknife over the rows of both kinds: too large on average (Efron,
    Stein, 1981), by up to a factor of the root of 2 for equal distributions.

    References:
        Demystifying MMD GANs (Bińkowski et al., 2018), https://arxiv.org/abs/1801.01401

    Arguments:
        a: features of one kind, `(n, F)`, float64.
        b: features of the other kind, `(m, F)`, float64.

    Returns:
        An estimate, without a unit.

    Example:
        >>> rows = torch.randn(200, 3).double()
        >>> kernel_distance(rows, rows + 2).value > 1
        True
    """
    n, m, width = len(a), len(b), a.shape[1]
    own = [(_kernel_sums(x, x) - (x.square().sum(1) / width + 1) ** 3) / (len(x) - 1) for x in (a, b)]
    across = [_kernel_sums(a, b) / m, _kernel_sums(b, a) / n]
    value = float(own[0].mean() + own[1].mean() - 2 * across[0].mean())
    variance = sum(_jackknifed(inside, beside) for inside, beside in zip(own, across, strict=True))
    return Estimate(value, math.sqrt(variance), "estimate")


def _kernel_sums(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of the kernel of every row of a `(n, F)` with all rows of b `(m, F)`, `(n,)`."""
    return torch.cat([(block @ b.T).div_(a.shape[1]).add_(1).pow_(3).sum(1) for _, block in blocks(a, len(b))])


def _jackknifed(inside: Tensor, beside: Tensor) -> float:
    """Return the jackknife variance of MMD^2 over one set of rows, data or samples.

    Arguments:
        inside: mean kernel of every row with the other rows of its own set, `(n,)`.
        beside: mean kernel of every row with the rows of the other set, `(n,)`.
    """
    if (n := len(inside)) < 3:
        return math.nan
    moved = 2 * (inside.mean() - inside) / (n - 2) - 2 * (beside.mean() - beside) / (n - 1)
    return float(moved.square().sum()) * (n - 1) / n
