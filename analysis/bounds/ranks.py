"""Uniformity of ranks: a test of every coordinate, the width and shift that its ranks show, and a verdict in words."""

import math
from collections.abc import Sequence
from typing import Self

import numpy as np
from scipy.special import ndtr, ndtri, owens_t
from scipy.stats import chi2

from pvae.analysis.figures.estimate import Estimate
from pvae.util import Record, replace

LEVEL = 0.05
"""Proportion of exact posteriors for which any coordinate, or all of them jointly, is not called fine."""
ORDERS = 4
"""Number of polynomials of the rank whose means are tested together: location, spread, skewness and tails."""
SURE = 2.5
"""Number of standard errors from which a width differs from 1, and a shift from 0, in words."""
FINE = "fine"


class RankTest(Record):
    """Ranks of the true values of one coordinate among samples, uniform for an exact posterior, and what they show."""

    name: str
    """Name of the coordinate."""
    counts: tuple[int, ...]
    """Number of rows in which 0, 1, ..., L of the L samples lie below the true value."""
    p: float
    """p-value of uniformity, of this coordinate alone."""
    adjusted: float
    """p-value adjusted by Holm's method for all coordinates that are tested together."""
    width: Estimate
    """Standard deviation of q in units of that of the posterior, if both are normal; of a code, the proportion of pairs
    of samples that differ over that of samples that differ from the true one; of all jointly, as if distances were
    normal. 1 for an exact posterior."""
    shift: Estimate
    """Mean of q minus that of the posterior, in standard deviations of the posterior, if both are normal."""
    verdict: str
    """"fine", or "too narrow", "too wide", "shifted" (or two of them), or "of another shape"."""

    def within(self, level: float) -> Estimate:
        """Return the proportion of ranks in the lowest `level` of all ranks, with its standard error."""
        n, edge = sum(self.counts), level * len(self.counts)
        share = sum(count * min(1.0, max(0.0, edge - rank)) for rank, count in enumerate(self.counts)) / n
        return Estimate(share, math.sqrt(max(share * (1 - share), 1 / n) / n))

    def of_distances(self, width: Estimate) -> Self:
        """Return the test of ranks that are high for true values far off: "too narrow", or "too wide"; no shift."""
        beyond = self.within(0.5).value < 0.5 or self.within(0.9).value < 0.9
        verdict = FINE if self.verdict == FINE else "too narrow" if beyond else "too wide"
        return replace(self, verdict=verdict, width=width, shift=Estimate(0.0))


def rank_tests(ranks: np.ndarray, samples: int, names: Sequence[str]) -> tuple[RankTest, ...]:
    r"""Test whether ranks are uniform on 0 .. L, independently over the rows, for several coordinates together.

    The test of one coordinate is Neyman's smooth test: with polynomials h_1, ..., h_4 that are orthonormal under the
    uniform distribution on 0 .. L, the sum over k of (sum_i h_k(r_i))^2 / n has a chi-squared distribution with four
    degrees of freedom. Holm's method holds the probability that any coordinate of an exact posterior is not called fine
    at 5 %, however the coordinates depend on each other.

    References:
        "Smooth test" for goodness of fit (Neyman, 1937), https://doi.org/10.1080/03461238.1937.10404821

    Arguments:
        ranks: ranks `(n, D)`, integers from 0 to `samples`.
        samples: number L of samples, at least 2.
        names: names of the D coordinates.
    """
    n, grid = len(ranks), np.arange(samples + 1)
    counts = np.stack([np.bincount(column, minlength=samples + 1) for column in ranks.T])
    powers = np.vander(grid / samples - 0.5, min(ORDERS, samples) + 1, increasing=True)
    polynomials = np.linalg.qr(powers)[0][:, 1:] * math.sqrt(samples + 1)
    p = chi2.sf(((counts @ polynomials) ** 2).sum(1) / n, polynomials.shape[1])
    adjusted, (width, shift) = holm(p), _moments(counts, samples)
    verdicts = [_verdict(w, s) if p < LEVEL else FINE for w, s, p in zip(width, shift, adjusted, strict=True)]
    figures = p.tolist(), adjusted.tolist(), width, shift, verdicts
    return tuple(map(RankTest, names, map(tuple, counts.tolist()), *figures))


def holm(p: np.ndarray) -> np.ndarray:
    """Return p-values `(m,)` adjusted by Holm's method, which holds under any dependence."""
    order = np.argsort(p, kind="stable")
    return np.maximum.accumulate(np.minimum(1.0, p[order] * np.arange(len(p), 0, -1)))[order.argsort()]


def _verdict(width: Estimate, shift: Estimate) -> str:
    words = []
    if abs(shift.value) > SURE * shift.standard_error:
        words.append("shifted")
    if abs(width.value - 1) > SURE * width.standard_error:
        words.append("too narrow" if width.value < 1 else "too wide")
    return " and ".join(words) or "of another shape"


# ---------------------------------------------------------------------- width and shift


def _moments(counts: np.ndarray, samples: int) -> tuple[list[Estimate], list[Estimate]]:
    """Return width and shift of every coordinate, from the first two moments of its ranks, with delta-method errors.

    With m = P(z' < z) and a = P(z', z'' < z), of which r / L and r (r - 1) / (L (L - 1)) are unbiased estimates.
    """
    n, grid = counts.sum(1), np.arange(samples + 1)
    each = np.stack([grid / samples, grid * (grid - 1) / (samples * (samples - 1))])  # (2, L + 1)
    mean = counts @ each.T / n[:, None]  # (D, 2)
    spread = np.einsum("dr,ir,jr->dij", counts, each, each) / n[:, None, None] - mean[:, :, None] * mean[:, None]
    value, out = _normals(*mean.T), []
    slopes = [(np.subtract(_normals(*(mean + step).T), _normals(*(mean - step).T))) / 2e-4 for step in 1e-4 * np.eye(2)]
    for figure, slope in zip(value, np.stack(slopes, 1), strict=True):
        errors = np.sqrt(np.einsum("id,dij,jd->d", slope, spread, slope).clip(0) / n)
        out.append([Estimate(float(v), float(e)) for v, e in zip(figure, errors, strict=True)])
    return out[0], out[1]


def _normals(m: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return width and shift of normals q and posterior with these m and a, `(D,)`.

    For h = ndtri(m) and the correlation rho = 1 / (1 + width^2) of z - z' and z - z'' it holds that
    m - a = 2 T(h, b), with Owen's T and b = sqrt((1 - rho) / (1 + rho)), which is found by bisection.
    """
    h = ndtri(np.clip(m, 1e-6, 1 - 1e-6))
    low, high = np.full_like(h, 1e-4), np.full_like(h, 1 - 1e-4)
    for _ in range(40):
        b = (low + high) / 2
        small = 2 * owens_t(h, b) < ndtr(h) - a
        low, high = np.where(small, b, low), np.where(small, high, b)
    squared = 2 * b**2 / (1 - b**2)
    return np.sqrt(squared), -h * np.sqrt(1 + squared)
