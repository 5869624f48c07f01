"""Distances between features of samples and of data: Fréchet's, with what it would be of one law, and a kernel's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.figures.table import Figures, Row
from pvae.analysis.samples.fidelity import blocks
from pvae.errors import DataError
from pvae.util import seeds

HALVINGS = 5
"""Random halves of the data that the floor of the Fréchet distance is averaged over."""
TINY = 1e-12
"""Share of the largest eigenvalue below which one counts as zero."""


@dataclass(frozen=True, repr=False)
class Distances(Figures):
    """How far samples are from data in a feature space; the unit is that of the features, squared, or none."""

    frechet: Estimate
    frechet_floor: Estimate
    kernel: Estimate
    n: int
    """Data."""
    m: int
    """Samples."""

    @property
    def title(self) -> str:
        """See `Figures.title`."""
        return f"Distances of {self.m} samples from {self.n} data"

    @property
    def unit(self) -> str:
        """See `Figures.unit`."""
        return "features"

    def rows(self) -> Iterator[Row]:
        """See `Figures.rows`."""
        yield "frechet", self.frechet, "between normals fitted to features of samples and of data; too large on average"
        yield "frechet_floor", self.frechet_floor, "what it comes to for as many samples of the data's own law"
        yield (
            "kernel",
            self.kernel,
            "squared, of all moments up to the third: 0 for the data's own law, may be negative",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {"n": self.n, "m": self.m, **self.figures()}


def distances(data: Tensor, samples: Tensor, seed: int = 0) -> Distances:
    """Fréchet and kernel distance between features of data and of samples.

    Arguments:
        data: features `(n, F)`, as `Features.embed` gives them.
        samples: features `(m, F)`.
        seed: of the halves that the floor is taken from.

    Returns:
        Distances, all estimates: see `frechet`, `frechet_floor` and `kernel_distance`.

    Raises:
        DataError: fewer than four rows of data or two samples, or features of different widths.
    """
    if data.shape[1:] != samples.shape[1:] or len(data) < 4 or len(samples) < 2:
        raise DataError(
            f"distances: expected at least 4 rows of data and 2 samples, of one width; got features "
            f"{list(data.shape)} and {list(samples.shape)}."
        )
    data, samples = data.double(), samples.double()
    floor = frechet_floor(data, len(samples), seed)
    return Distances(frechet(data, samples), floor, kernel_distance(data, samples), len(data), len(samples))


# ---------------------------------------------------------------------- Fréchet


def frechet(a: Tensor, b: Tensor) -> Estimate:
    """Fréchet distance, squared, between normals fitted to features `(n, F)` and `(m, F)`; float64.

    Its standard error is that of the first order: each row moves the distance by what its outer product adds along the
    derivative of `normal_frechet`, and the rows are independent.

    Warning: an estimate that is too large on average, by a term of order F^2 (1/n + 1/m): compare it with
    `frechet_floor`, and with others of equal n, m and space only.

    References:
        GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017), https://arxiv.org/abs/1706.08500
    """
    (loc_a, cov_a), (loc_b, cov_b) = moments(a), moments(b)
    value = normal_frechet(loc_a, cov_a, loc_b, cov_b)
    pulls = (_pull(a - loc_a, loc_a - loc_b, cov_a, cov_b), _pull(b - loc_b, loc_b - loc_a, cov_b, cov_a))
    error = math.sqrt(sum(float(pull.var()) / len(pull) for pull in pulls))
    return Estimate(value, error, "estimate", note="too large on average")


def normal_frechet(loc_a: Tensor, cov_a: Tensor, loc_b: Tensor, cov_b: Tensor) -> float:
    """W_2^2 between two normals, exact: |loc_a - loc_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2).

    The trace of that root is the sum of the singular values of A^1/2 B^1/2, which needs no root of a product that
    rounding has made indefinite.

    References:
        The Fréchet distance between multivariate normal distributions (Dowson, Landau, 1982)

    Arguments:
        loc_a: `(F,)`.
        cov_a: `(F, F)`; it may be singular.
        loc_b: `(F,)`.
        cov_b: `(F, F)`.
    """
    cross = torch.linalg.matrix_norm(_power(cov_a, 0.5) @ _power(cov_b, 0.5), "nuc")
    return float((loc_a - loc_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def frechet_floor(data: Tensor, m: int, seed: int = 0) -> Estimate:
    """What `frechet` between n data and m samples of their own law comes to, from random halves of the data.

    Two halves of n data are 2h = n rows of one law, at a distance of c 2/h to the first order; n and m rows are at
    c (1/n + 1/m). Half the distance between halves, where m = n.

    Warning: of the first order in F / n: with no more rows in a half than features it is rough.

    Arguments:
        data: features `(n, F)`, n at least 4.
        m: samples.
        seed: of the halves.

    Returns:
        An estimate; its standard error is the spread of one such distance, not of the mean over `HALVINGS` of them.
    """
    half = len(data) // 2
    generator = torch.Generator().manual_seed(seeds.mix(seed, seeds.ANALYSIS, 14))
    found = []
    for _ in range(HALVINGS):
        order = torch.randperm(len(data), generator=generator).to(data.device)
        found.append(normal_frechet(*moments(data[order[:half]]), *moments(data[order[half : 2 * half]])))
    values = torch.tensor(found, dtype=torch.float64) * (1 / len(data) + 1 / m) / (2 / half)
    return Estimate(float(values.mean()), float(values.std()), "estimate", note="spread of one set of samples")


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(F,)` and covariance `(F, F)` of rows `(n, F)`."""
    return rows.mean(0), torch.atleast_2d(rows.T.cov())


def _pull(centred: Tensor, shift: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """How much each row `(n, F)` moves the distance to another normal, `(n,)`, up to a constant."""
    root = _power(other, 0.5)
    onto = root @ _power(root @ own @ root, -0.5) @ root  # the linear map that carries the one normal to the other
    return 2 * centred @ shift + (centred.square() - (centred @ onto) * centred).sum(1)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric, positive semidefinite matrix `(F, F)`; its null space stays one."""
    values, vectors = torch.linalg.eigh(matrix)
    is_zero = values <= TINY * values.max().clamp(min=0)
    return (vectors * values.masked_fill(is_zero, 1.0).pow(exponent).masked_fill(is_zero, 0.0)) @ vectors.T


# ---------------------------------------------------------------------- kernel


def kernel_distance(a: Tensor, b: Tensor) -> Estimate:
    """MMD^2 of features `(n, F)` and `(m, F)` under the kernel (<x, y> / F + 1)^3, float64, in blocks.

    Unbiased, hence negative half of the time for samples of the data's own law, where it is 0. The standard error is
    the jackknife's over rows of both kinds, from sums of rows of the kernel: too large on average (Efron, Stein, 1981),
    by up to the root of 2 where the laws are the same.

    References:
        Demystifying MMD GANs (Bińkowski et al., 2018), https://arxiv.org/abs/1801.01401
    """
    n, m, width = len(a), len(b), a.shape[1]
    own = [(_kernel_sums(x, x) - (x.square().sum(1) / width + 1) ** 3) / (len(x) - 1) for x in (a, b)]
    across = [_kernel_sums(a, b) / m, _kernel_sums(b, a) / n]
    value = float(own[0].mean() + own[1].mean() - 2 * across[0].mean())
    variance = sum(_jackknifed(inside, beside) for inside, beside in zip(own, across, strict=True))
    return Estimate(value, math.sqrt(variance), "estimate")


def _kernel_sums(a: Tensor, b: Tensor) -> Tensor:
    """Sum of the kernel of every row `(n, F)` with all of the others `(m, F)`, `(n,)`."""
    return torch.cat([(block @ b.T).div_(a.shape[1]).add_(1).pow_(3).sum(1) for _, block in blocks(a, len(b))])


def _jackknifed(inside: Tensor, beside: Tensor) -> float:
    """Variance of MMD^2 as rows of one kind are left out, from every row's mean kernel with its own and the other."""
    n = len(inside)
    if n < 3:
        return math.nan
    moved = 2 * (inside.mean() - inside) / (n - 2) - 2 * (beside.mean() - beside) / (n - 1)
    return float(moved.square().sum()) * (n - 1) / n
