"""Passes over all pairs of a value and a row, tile by tile: information with its errors, and the bound from pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.distributions.exponential import Members

TILE = 2**19
"""Largest number of pairs in a tile of some values and all rows."""
FLOOR = -80.0
"""Differences of log densities are clamped here, e^-80 of the largest term: exp is slow where its result underflows."""
NOTHING = -1e300
"""Finite stand-in for log 0."""


def tiles(members: Members, value: Tensor, own: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yield log q(z_i | x_j) of some values under all members, `(k, n)`, float64, with the slice of these values.

    Arguments:
        members: the n posteriors, float64.
        value: values `(m, D)`.
        own: for each value the member that is left out (`NOTHING` in the tile), `(m,)`; None for none.
    """
    rows = max(8, min(512, TILE // len(members)))
    score, tile = members.scorer(), value.new_empty(rows, len(members))
    for start in range(0, len(value), rows):
        at = slice(start, min(start + rows, len(value)))
        block = tile[: at.stop - start]
        score(value[at], block)
        if own is not None:
            block.scatter_(1, own[at, None], NOTHING)
        yield at, block


def relative(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest entry of every row `(k,)`, and exp of the entries less that, in float32, `(k, n)`."""
    top = tile.amax(1)
    return top, (tile - top[:, None]).float().clamp_(min=FLOOR).exp_()


def log_sum(tile: Tensor) -> Tensor:
    """Return the log of the sum of exp of every row, `(k,)`."""
    top, e = relative(tile)
    return top + e.sum(1, dtype=torch.float64).log()


@dataclass(frozen=True)
class Information:
    """Pointwise information of n samples, nats, and the weight of every row as a component."""

    inside: Tensor
    """log q(z_i | x_i) - log 1/n sum_j q(z_i | x_j), `(n,)`."""
    outside: Tensor
    """The same without the own posterior among the components, `(n,)`."""
    inside_shares: Tensor
    """Sum over samples of the share of row j in the mixture, `(n,)`."""
    outside_shares: Tensor

    @property
    def inside_error(self) -> float:
        """Standard error of the mean of `inside`: every row counts as sample and as component."""
        return spread(self.inside - self.inside_shares)

    @property
    def outside_error(self) -> float:
        """Standard error of the mean of `outside`."""
        return spread(self.outside - self.outside_shares)


@dataclass(frozen=True)
class PairSums:
    """Sums of e^T_ij over pairs of rows i != j, once more by two random groups of the other row."""

    by_value: Tensor
    """Sums over the j of a group, `(n, 2)`."""
    by_row: Tensor
    """Sums over the i of a group, `(n, 2)`."""


@dataclass(frozen=True)
class Critic:
    """T_ij = min(b (log q(z_i | x_j) - log r(z_i)), tau) with an r that knows neither i nor j; the clip is fixed.

    The rows are sorted by fold. With `apart` of one column r is of other rows altogether.
    """

    apart: Tensor
    """log r_k(z_i) with r_k made of fold k alone, `(n, K)`."""
    sizes: tuple[int, ...]
    """Number of rows of each of the K folds, in order."""
    slope: float
    """b."""
    ceiling: float
    """tau, nats."""

    def clip(self, ratio: Tensor) -> Tensor:
        """Return T of log q - log r."""
        return (ratio * self.slope).clamp_(FLOOR, self.ceiling)

    def blocks(self) -> list[tuple[slice, slice, int]]:
        """Return blocks of values and rows, and the fold whose r is used in each: one that holds neither."""
        starts = [sum(self.sizes[:k]) for k in range(len(self.sizes) + 1)]
        parts = [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]
        if len(parts) == 1:
            return [(parts[0], parts[0], 0)]
        three = range(3)
        return [(parts[a], parts[b], (a + 1) % 3 if a == b else 3 - a - b) for a in three for b in three]

    def own(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return T_ii and e^T_ii from log q(z_i | x_i), averaged over the r that are used for z_i, `(n,)` each."""
        mean, power = torch.zeros_like(own), torch.zeros_like(own)
        for rows, columns, k in self.blocks():
            pairs = columns.stop - columns.start - (rows == columns)
            t = self.clip(own[rows] - self.apart[rows, k])
            mean[rows] += t * pairs / (len(own) - 1)
            power[rows] += t.exp() * pairs / (len(own) - 1)
        return mean, power


def sweep(q: Members, value: Tensor, own: Tensor, critic: Critic | None = None) -> tuple[Information, PairSums | None]:
    """Return the information of n samples under the mixture of all rows, and the sums of the bound from pairs.

    Time grows with n^2, memory with n.

    Arguments:
        q: posteriors of the n rows, float64.
        value: a sample of each, `(n, D)`.
        own: log q(z_i | x_i), `(n,)`.
        critic: None for no sums over pairs.
    """
    n = len(value)
    index = torch.arange(n, device=own.device)
    others, shares = torch.empty_like(own), own.new_zeros(2, n)
    group = torch.nn.functional.one_hot(index % 2, 2).float()
    sums = PairSums(own.new_zeros(n, 2), own.new_zeros(n, 2))
    for at, tile in tiles(q, value, index):
        top = tile.amax(1)
        apart = (tile - top[:, None]).float()
        if critic is not None:
            _pairs(apart, top, at, critic, group, sums)
        e = apart.clamp_(min=FLOOR).exp_()
        total = e.sum(1, dtype=torch.float64)
        others[at] = top + total.log()
        whole = torch.logaddexp(others[at], own[at])
        weights = torch.stack([(top - whole).exp(), 1 / total])
        shares += (weights.float() @ e).double()
        shares[0, at] += (own[at] - whole).exp()
    inside = own - torch.logaddexp(others, own) + math.log(n)
    found = Information(inside, own - others + math.log(max(n - 1, 1)), *shares)
    return found, None if critic is None else sums


def _pairs(apart: Tensor, top: Tensor, at: slice, critic: Critic, group: Tensor, sums: PairSums) -> None:
    """Add e^T_ij of a tile, log densities less `top`, to the sums."""
    for rows, columns, k in critic.blocks():
        mine = slice(max(at.start, rows.start), min(at.stop, rows.stop))
        if mine.start >= mine.stop:
            continue
        local = slice(mine.start - at.start, mine.stop - at.start)
        level = (top[local] - critic.apart[mine, k]).float()
        e = critic.clip(apart[local, columns] + level[:, None]).exp_()
        sums.by_value[mine] += e @ group[columns]
        sums.by_row[columns] += e.T @ group[mine]


def spread(terms: Tensor) -> float:
    """Return the standard error of the mean of terms `(n,)`."""
    return float(terms.std() / math.sqrt(len(terms)))
