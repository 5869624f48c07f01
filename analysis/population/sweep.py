"""Passes over all pairs of a value and a row, tile by tile: information with its errors, and the bound from pairs."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate, Kind
from pvae.distributions import IMPOSSIBLE, CertainCodes, Codes, Members, Product
from pvae.util import group

TILE = 2**20
"""Largest number of pairs in a tile of some values and all rows."""
FLOOR = -80.0
"""Differences of log densities are clamped here, e^-80 of the largest term: exp is slow where its result underflows."""


def tiles(members: Members, value: Tensor, own: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Yield log q(z_i | x_j) of this process's share of some values, under all members, `(k, n)`, with their slice.

    Arguments:
        members: the n posteriors, whose precision is that of the tiles.
        value: values `(m, D)`.
        own: for each value the member that is left out (the lowest number in the tile), `(m,)`; None for none.
    """
    rows, value = max(8, min(512, TILE // len(members))), value.to(members.origin)
    score, tile = members.scorer(), value.new_empty(rows, len(members))
    for number, start in enumerate(range(0, len(value), rows)):
        if not group.is_mine(number):
            continue
        at = slice(start, min(start + rows, len(value)))
        block = tile[: at.stop - start]
        score(value[at], block)
        if own is not None:
            block.scatter_(1, own[at, None], torch.finfo(block.dtype).min)
        yield at, block


def relative(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest entry of every row `(k,)`, and exp of the entries less that, float32; spoils the tile."""
    top = tile.amax(1)
    return top.double(), tile.sub_(top[:, None]).float().clamp_(min=FLOOR).exp_()


def log_mean(members: Members, value: Tensor, own: Tensor | None = None) -> Tensor:
    """Return the log mean of the densities of values `(m, D)` under all members but `own`, `(m,)`, nats."""
    found = value.new_zeros(len(value), dtype=torch.float64)
    for at, tile in tiles(members, value, own):
        top, e = relative(tile)
        found[at] = top + e.sum(1, dtype=torch.float64).log()
    group.add_up(found)
    return found - math.log(len(members) - (own is not None))


class PointwiseInformation(NamedTuple):
    """Pointwise information of n samples, nats, and the weight of every row as a component."""

    inside: Tensor
    """log q(z_i | x_i) - log 1/n sum_j q(z_i | x_j), `(n,)`."""
    outside: Tensor
    """The same without the own posterior among the components, `(n,)`."""
    inside_shares: Tensor
    """Sum over the other samples of the share of row j in the mixture, `(n,)`."""
    outside_shares: Tensor
    twice: float
    """Part of the variance of `inside - inside_shares` that is noise of single pairs counted twice."""

    @property
    def terms(self) -> Tensor:
        """Terms `(n,)` whose mean is I_n, and whose spread is its error: a row counts as sample and component."""
        return self.inside - self.inside_shares + self.inside_shares.mean()

    def figures(self) -> tuple[Estimate, Estimate | None]:
        """Return I_n and leave-one-out (None where infinite), with their errors."""
        above, error = float(self.outside.mean()), spread(self.outside - self.outside_shares)
        leave_one_out = Estimate(above, error, "upper_bound") if above < -IMPOSSIBLE / len(self.outside) else None
        return mean(self.terms, "lower_bound", self.twice), leave_one_out


class PairCritic(NamedTuple):
    """T_ij = min(b (log q(z_i | x_j) - log r(z_i)), tau) with an r that knows neither i nor j; the clip is fixed.

    The rows are sorted by fold; z_i is paired with the rows of its own fold and of the one before.
    """

    apart: Tensor
    """log r(z_i) with an r made of the fold after that of row i, or of other rows altogether, `(n,)`."""
    sizes: tuple[int, ...]
    """Number of rows of each fold, in order; one for all rows where r is of other rows."""
    slope: float
    """b."""
    ceiling: float
    """tau, nats."""

    def __call__(self, ratio: Tensor) -> Tensor:
        """Return T of log q - log r, in place."""
        return ratio.mul_(self.slope).clamp_(FLOOR, self.ceiling)

    @property
    def pairs(self) -> int:
        """Number of pairs of a sample and another row."""
        return sum((a.stop - a.start) * (b.stop - b.start - (a == b)) for a, b in self.blocks())

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Yield blocks of samples and rows that are paired."""
        stops = [sum(self.sizes[: k + 1]) for k in range(len(self.sizes))]
        parts = [slice(stop - size, stop) for stop, size in zip(stops, self.sizes, strict=True)]
        for k, part in enumerate(parts):
            yield part, part
            if len(parts) > 1:
                yield part, parts[k - 1]


def sweep(
    q: Members, value: Tensor, own: Tensor, critic: PairCritic | None = None
) -> tuple[PointwiseInformation, Tensor]:
    """Return the information of n samples under the mixture of all rows, and the sums of the bound from pairs.

    These are sums of e^T_ij over pairs i != j, `(2, n, 2)`: for every sample i over two random groups of the other
    row, then for every row j over two groups of the samples; 0 without a critic. Time grows with n^2, memory with n.

    Arguments:
        q: posteriors of the n rows in random order, float64.
        value: a sample of each, `(n, D)`.
        own: log q(z_i | x_i), `(n,)`.
        critic: T of the pairs.
    """
    if isinstance(q, CertainCodes):
        return counted(q, own, critic)
    if all(isinstance(part, Codes) for part in (q.parts if isinstance(q, Product) else [q])):
        q = q.map(Tensor.float)  # their log densities are sums of terms of one sign
    n = len(value)
    index = torch.arange(n, device=own.device)
    halves = torch.stack([index < n // 2, index >= n // 2], 1).double()
    others, shares = torch.zeros_like(own), own.new_zeros(3, n)
    reach, sums = own.new_zeros(n, 2), own.new_zeros(2, n, 2)
    for at, tile in tiles(q, value, index):
        top = tile.amax(1)
        apart, top = tile.sub_(top[:, None]).float(), top.double()
        if critic is not None:
            _pairs(apart, top, at, critic, sums)
        e = apart.clamp_(min=FLOOR).exp_()
        total = in_groups(e, n // 2)
        others[at] = top + total.sum(1).log()
        level = (top - torch.logaddexp(others[at], own[at])).exp()[:, None]
        reach[at] += level * total
        shares += (torch.cat([level * halves[at], 1 / total.sum(1, keepdim=True)], 1).float().T @ e).double()
    group.add_up(others, shares, reach, sums)
    inside = own - torch.logaddexp(others, own) + math.log(n)
    outside, twice = own - others + math.log(max(n - 1, 1)), counted_twice(reach + shares[:2].T)
    return PointwiseInformation(inside, outside, shares[:2].sum(0), shares[2], twice), sums


def in_groups(e: Tensor, first: int) -> Tensor:
    """Return the sums of the first columns and of the others, `(k, 2)`, float64."""
    return torch.stack([e[:, :first].sum(1), e[:, first:].sum(1)], 1).double()


def _pairs(apart: Tensor, top: Tensor, at: slice, critic: PairCritic, sums: Tensor) -> None:
    """Add e^T_ij of a tile, log densities less `top`, to the sums; the groups are halves of every fold."""
    for rows, columns in critic.blocks():
        start, stop = max(at.start, rows.start), min(at.stop, rows.stop)
        if start >= stop:
            continue
        mine, local = slice(start, stop), slice(start - at.start, stop - at.start)
        e = critic(apart[local, columns] + (top[local] - critic.apart[mine]).float()[:, None]).exp_()
        sums[0, mine] += in_groups(e, (columns.stop - columns.start) // 2)
        cut = min(max((rows.start + rows.stop) // 2 - start, 0), len(e))
        sums[1, columns] += torch.stack([e[:cut].sum(0), e[cut:].sum(0)], 1)


def counted(q: CertainCodes, own: Tensor, critic: PairCritic | None = None) -> tuple[PointwiseInformation, Tensor]:
    """Return the same as `sweep` for deterministic codes, by counting rows with the same joint code; O(n log n).

    Leave-one-out is infinite for a code that only one row has. The shares of a row are what leaving it out takes from
    the other rows of its code: derivatives are too small where most rows have a code of their own.
    """
    n, code = len(own), q.index.unique(dim=0, return_inverse=True)[1]
    times = code.bincount()[code].double()
    outside = math.log(max(n - 1, 1)) - (times - 1).log()
    lost = (times - 1) * (times.log() - (times - 1).clamp(min=1).log())
    found = PointwiseInformation(math.log(n) - times.log(), outside, lost, (times > 1).double(), 0.0)
    sums, index = own.new_zeros(2, n, 2), torch.arange(n, device=code.device)
    if critic is None:
        return found, sums
    for rows, columns in critic.blocks():
        e, itself = critic(own[rows] - critic.apart[rows]).exp_(), float(rows == columns)
        mine, theirs = (2 * code[b] + (index[b] >= (b.start + b.stop) // 2) for b in (rows, columns))  # as in `_pairs`
        number = theirs.bincount(minlength=2 * n).double().reshape(n, 2)[code[rows]]
        mass = own.new_zeros(2 * n).index_add_(0, mine, e).reshape(n, 2)[code[columns]]
        half = torch.nn.functional.one_hot(mine % 2, 2) * itself
        sums[0, rows] += e[:, None] * (number - half)
        sums[1, columns] += mass - e[:, None] * half if itself else mass
    return found, sums


def counted_twice(groups: Tensor) -> float:
    """Return the part of the variance of row sums over pairs that is noise of single pairs, which is counted twice.

    The spread of the sums over rows holds the noise of a pair once for each of its two rows. Sums over two random
    groups of other rows share what belongs to the row, and none of that noise.

    Arguments:
        groups: for each row the sums of a pair's two terms over the other rows of a group, `(n, 2)`.
    """
    return max(float(groups.sum(1).var()) - 4 * max(float(torch.cov(groups.T)[0, 1]), 0.0), 0.0) / 2


def spread(terms: Tensor, twice: float = 0.0) -> float:
    """Return the standard error of the mean of terms `(n,)`, less a variance that was counted twice in them."""
    variance = float(terms.var())
    return math.sqrt(max(variance - twice, variance / 2) / len(terms))


def mean(terms: Tensor, kind: Kind, twice: float = 0.0) -> Estimate:
    """Return the mean of terms `(n,)` with its standard error."""
    return Estimate(float(terms.mean()), spread(terms, twice), kind)
