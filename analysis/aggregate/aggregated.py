"""Aggregated posterior q_agg(z) = 1/n sum_i q(z | x_i): density, leave-one-out, bounds from a subset, samples."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import pyro.distributions as dist
import torch
from torch import Tensor, distributions

from pvae.analysis.aggregate.components import LOG_ZERO, Components, Reread, held, members_of, nothing_as_infinite
from pvae.analysis.aggregate.entry import accept, quiet
from pvae.analysis.aggregate.pairwise import GuideRuns
from pvae.analysis.figures.estimate import jackknife, misdeclared, refuse
from pvae.distributions.base import Size
from pvae.distributions.exponential import Members
from pvae.pair import Pair, Undrawn
from pvae.util import Record, replace, seeds

MEMORY = 2**29
"""Default number of bytes that an aggregated posterior may take in addition to the data and the scored values."""
PER_SCALE = 8
"""Number of grid points per standard deviation of the narrowest component in an octave of scales."""
REACH = 8.5
"""Number of standard deviations beyond which a component is neglected (2e-16 of its peak)."""
CELLS = 2**23
"""Largest number of points of one grid; a coordinate that needs more is computed by the exact sum over all
components."""
DRAWS_CHECKED = 32
"""Number of samples for which interpolated densities are compared with exact sums over all components."""
PAIRS_IN_A_BLOCK = 2**21
"""Largest number of pairs of value and component that are computed at once."""


class Information(Record):
    """Pointwise mutual information log q(z_i | x_i) - log q_agg(z_i) of m samples, `(m,)`, nats."""

    lower: Tensor
    """Lower bound in expectation: the mixture consists of q(z | x_i) and the chosen components only."""
    upper: Tensor
    """Upper bound in expectation, at most log n: the chosen components represent all rows other than x_i."""
    leave_one_out: Tensor
    """Upper bound, in expectation, of the mutual information under the distribution that the data come from: the
    mixture leaves out q(z | x_i)."""
    left_out: Self | None = None
    """The same terms with one of the random groups of components after another left out, `(groups, m)` each."""

    def plus(self, other: Self) -> Self:
        """Return the sums of the terms of two samples."""
        names = ("lower", "upper", "leave_one_out")
        return type(self)(*(getattr(self, name) + getattr(other, name) for name in names))


def each_left_out(sums: Tensor) -> Tensor:
    """Return log sums without one group after another, `(groups, m)`, of sums by group and of the rest."""
    nothing = torch.full_like(sums[:1], LOG_ZERO)
    before = torch.cat([nothing, sums.logcumsumexp(0)[:-1]])
    after = torch.cat([sums.flip(0).logcumsumexp(0).flip(0)[1:], nothing])
    return torch.logaddexp(before, after)[:-1]


class AggregatedPosterior(dist.TorchDistribution):
    r"""The mixture 1/n sum_i q(z | x_i) of a guide's posteriors over a data set.

    Posteriors of an exponential family (normal, full-rank normal, categorical and one-hot grids, Bernoulli, products
    of them) are scored by a matrix product and a logsumexp in float64: log q(z | x_i) = <T(z), eta_i> - A(eta_i).
    Deterministic codes (nearest codebook rows) are counted: q_agg is the proportion of rows with the same joint code.
    Any other guide, and latents that depend on each other, are scored by the guide's own `log_prob` on every pair of
    value and row. Values are flat: the event dimensions of all latents, concatenated in the guide's order.

    Memory: in addition to the data and the values, at most about `memory` bytes for any n (and no less than a block of
    16 rows needs); the guide recomputes larger parameters in every pass.

    Arguments:
        components: posteriors of an exponential family, one member per row, or `Components`.
        total: number of rows n that the components represent, when they are a random subset of M rows.
        index: indices of these M rows, `(M,)`, when they are a subset.
        memory: bytes that keeping and scoring the components may take.

    Example:
        >>> from pvae.distributions.exponential import Normals
        >>> q = AggregatedPosterior(Normals(torch.zeros(3, 2), torch.ones(3, 2)))
        >>> bool(torch.isclose(q.log_prob(torch.zeros(2)), torch.tensor(-math.log(2 * math.pi)).double()))
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = distributions.constraints.real_vector

    def __init__(
        self, components: Members | Components, total: int | None = None, index: Tensor | None = None,
        memory: int = MEMORY,
    ) -> None:  # fmt: skip
        self.components = held(components, memory) if isinstance(components, Members) else components
        misdeclared(not len(self.components), "AggregatedPosterior: expected at least one component; got none.")
        self.total = len(self.components) if total is None else total
        self.index = index
        super().__init__(torch.Size(), torch.Size((self.components.dim,)), validate_args=False)

    @classmethod
    def of(
        cls, pair: Pair, x: Tensor, *, latents: Sequence[str] | None = None, components: int | None = None,
        seed: int = 0, memory: int = MEMORY,
    ) -> Self:  # fmt: skip
        """Return the aggregated posterior of a guide over a data set.

        Arguments:
            pair: any Pyro pair.
            x: data `(n, *event)`.
            latents: names of the latents; default: all latents of the guide, jointly.
            components: number of rows, chosen at random, whose posteriors form the mixture; default: all.
            seed: seed of that choice.
            memory: bytes that keeping and scoring the components may take.

        Returns:
            The mixture over the rows (or the chosen ones).

        Raises:
            DataError: a latent that the guide does not have, or a number of components out of range.
        """
        x = accept(pair, x)
        names = pair.layout.latents if latents is None else tuple(latents)
        refuse(not names or {*names} - {*pair.layout.latents}, "refused.some_latents", pair=pair, names=names)
        rows = choose(len(x), components, seed, x.device)
        chosen = x if rows is None else x[rows]
        alone = set(names) <= pair.dependencies(x).guide_roots
        with quiet(pair, x, 0):
            first = members_of(pair, chosen[:2], names) if alone else None
        if first is None or 8 * first.numbers * len(chosen) > memory // 2:
            return cls((GuideRuns if first is None else Reread)(pair, chosen, names, memory), len(x), rows, memory)
        with quiet(pair, x, 0), Undrawn(names):
            parts = [members_of(pair, part, names) for part in chosen.split(pair.structure.rows_at_once())]
        return cls(parts[0].joined(parts[1:]), len(x), rows, memory)  # type: ignore[union-attr]

    def __len__(self) -> int:
        return len(self.components)

    def _flat(self, value: Tensor) -> Tensor:
        return value.detach().reshape(-1, self.event_shape[0])

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q_agg(z) of `(..., D)`, nats, `(...)`; exact over all components."""
        return (self.components.log_sum(self._flat(value)) - math.log(len(self))).reshape(value.shape[:-1])

    def log_prob_left_out(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return log q_agg of `(m, D)`, and without one of the groups of components after another, `(groups, m)`."""
        sums, fewer = self.components.log_sums(self._flat(value)), len(self) - self.components.groups.size
        whole = nothing_as_infinite(sums.logsumexp(0)) - math.log(len(self))
        return whole, each_left_out(sums) - math.log(max(fewer, 1))

    def _others(self, value: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return log sums of densities over the components but row `index_i`, by group, and their number, `(m,)`.

        And the group that row `index_i` is in as a component, -1 for none.
        """
        skip = index
        if self.index is not None:
            where = torch.full((self.total,), -1, device=index.device)
            where[self.index] = torch.arange(len(self), device=index.device)
            skip = where[index]
        count = len(self) - (skip >= 0).double()
        return self.components.log_sums(value, skip), count, torch.where(skip < 0, -1, self.components.groups.of[skip])

    def information(self, value: Tensor, index: Tensor, own: Tensor) -> Information:
        r"""Return the pointwise mutual information of samples z_i ~ q(z | x_index_i), or bounds of it.

        With n rows, own density q_i and M others chosen at random,

        - upper: log q_i - log(q_i / n + (n-1)/n * mean of the others): the argument of the logarithm is unbiased
          for q_agg(z_i), so by Jensen the mean is at least I_q; no term exceeds log n.
        - lower: log q_i - log((q_i + sum of the others) / (M + 1)), the information within random subsets of rows,
          which mutual information, concave in the distribution of x, exceeds on average.

        They are equal, and exact, when every row is a component. Leave-one-out drops q_i from the mixture: for data
        drawn from a distribution it bounds the information under it from above, while I_q bounds it from below.

        References:
            On Variational Bounds of Mutual Information (Poole et al., 2019), https://arxiv.org/abs/1905.06922

        Arguments:
            value: `(m, D)`.
            index: the row each value was drawn for, `(m,)`.
            own: log q(z_i | x_index_i), `(m,)`, float64.

        Returns:
            Information, nats, `(m,)` each.
        """
        if self.total == 1:
            zero = torch.zeros_like(own)
            return Information(zero, zero, zero + math.inf)
        sums, count, group = self._others(value, index)
        without = torch.arange(self.components.groups.count, device=group.device)[:, None]
        fewer = count - self.components.groups.size + (group == without)
        left_out = self._terms(own, each_left_out(sums), fewer)
        return replace(self._terms(own, sums.logsumexp(0), count), left_out=left_out)

    def _terms(self, own: Tensor, others: Tensor, count: Tensor) -> Information:
        n, others = self.total, nothing_as_infinite(others)
        mean = others - count.clamp(min=1).log()
        lower = own - (torch.logaddexp(own, others) - (count + 1).log())
        upper = own - torch.logaddexp(own - math.log(n), mean + math.log((n - 1) / n))
        return Information(lower, lower if len(self) == n else upper, own - mean)

    def error(self, left_out: Tensor) -> float:
        """Return the error that the components add to a mean, from its values `(groups,)` without one of the groups.

        It is that of a random subset of `total` rows; if all rows are components, of rows drawn from a distribution.
        """
        size, n = self.components.groups.size, len(self)
        chosen = 1.0 if n == self.total else 1 - n / self.total
        return jackknife(left_out, size, n) * math.sqrt(chosen)

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return ancestral samples, `sample_shape + (D,)`."""
        index = torch.randint(len(self), (math.prod(sample_shape),), device=self.components.device)
        return self.components.sample(index).reshape(*sample_shape, *self.event_shape)

    def expand(self, batch_shape: Size, _instance: Any = None) -> dist.TorchDistribution:
        return dist.ExpandedDistribution(self, batch_shape)


def choose(n: int, most: int | None, seed: int, device: torch.device) -> Tensor | None:
    """Return the indices of `most` of n rows, chosen at random and sorted; None if all rows are taken."""
    refuse(most is not None and most < 2, f"components: expected at least 2; got {most}.")
    return None if most is None or most >= n else seeds.subset(n, most, seeds.mix(seed, seeds.ANALYSIS, 3)).to(device)


# ---------------------------------------------------------------------- single coordinates of a normal latent


def marginal_log_prob(loc: Tensor, scale: Tensor, value: Tensor) -> Tensor:
    r"""Return log q_agg(z_d) = log 1/n sum_i N(z_d; loc_id, scale_id^2) for every coordinate d.

    All pairs cost n m D exponentials. Here the components of a coordinate are sorted by octave of scale, every
    octave is summed on a grid of its own (`PER_SCALE` points to its narrowest standard deviation, each component
    only where it is not zero), and the density at z is read off by cubic interpolation: time grows with n + m.

    The error is that of the interpolation, (h / s)^4 of a density's fourth derivative: at most 2e-5 of a component's
    peak; `tests/bench/qagg.py` and `Surgery.notes` give what it is on the data.

    Arguments:
        loc: posterior means of the n components, `(n, D)`.
        scale: posterior standard deviations, `(n, D)`.
        value: samples to score, `(m, D)`.

    Returns:
        log q_agg(z_d), `(m, D)`, nats, an approximation of the exact sum.
    """
    columns = zip(loc.T, scale.T, value.T, strict=True)
    return torch.stack([_coordinate(*(t.contiguous() for t in column)) for column in columns], 1)


def grid_error(loc: Tensor, scale: Tensor, value: Tensor, found: Tensor) -> float:
    """Return the largest error of log densities `found`, nats, against exact sums for a few rows and coordinates."""
    few, dims = (torch.linspace(0, k - 1, min(DRAWS_CHECKED, k), device=value.device).long() for k in value.shape)
    exact = torch.stack([all_pairs(loc[:, d], scale[:, d], value[few, d]) for d in dims], 1)
    return float((exact - found[few][:, dims]).abs().max())


def all_pairs(loc: Tensor, scale: Tensor, value: Tensor) -> Tensor:
    """Return log q_agg(z) of one coordinate at values `(m,)`, nats, by the exact sum over all n normal components."""
    constant = -scale.log() - 0.5 * math.log(2 * math.pi) - math.log(len(loc))
    rows = max(1, PAIRS_IN_A_BLOCK // len(loc))
    return torch.cat([(constant - 0.5 * ((z[:, None] - loc) / scale) ** 2).logsumexp(1) for z in value.split(rows)])


def _coordinate(loc: Tensor, scale: Tensor, value: Tensor) -> Tensor:
    scale = scale.clamp(min=1e-150)
    octave = scale.log2().floor()
    total = torch.zeros_like(value)
    for k in octave.unique().tolist():
        chosen = octave == k
        step, m, s = 2.0**k / PER_SCALE, loc[chosen], scale[chosen]
        reach = math.ceil(REACH * 2 * PER_SCALE) + 2
        low = float(m.min()) - reach * step
        if (float(m.max()) - low) / step + reach + 3 > CELLS:
            return all_pairs(loc, scale, value)
        total += _interpolated(_grid(m, s, low, step, reach), (value - low) / step)
    return (total / len(loc)).log()


def _grid(loc: Tensor, scale: Tensor, low: float, step: float, reach: int) -> Tensor:
    """Return the sum of the normal densities of all components at the grid points `low + step * j`."""
    nearest = ((loc - low) / step).round().long()
    grid = loc.new_zeros(int(nearest.max()) + reach + 3)
    offsets = torch.arange(-reach, reach + 1, device=loc.device)
    for rows in torch.arange(len(loc), device=loc.device).split(max(1, PAIRS_IN_A_BLOCK // len(offsets))):
        at = nearest[rows, None] + offsets
        inverse = 1 / scale[rows, None]
        u = (at.to(loc) * step).add_(low - loc[rows, None]).mul_(inverse)
        density = u.square_().mul_(-0.5).exp_().mul_(inverse / math.sqrt(2 * math.pi))
        grid.index_add_(0, at.reshape(-1), density.reshape(-1))
    return grid


def _interpolated(grid: Tensor, position: Tensor) -> Tensor:
    """Return grid values at fractional positions by cubic Lagrange interpolation; zero off the grid."""
    base = position.floor()
    t, left = position - base, base.long() - 1
    inside = (left >= 0) & (left + 3 < len(grid))
    left = left.clamp(0, len(grid) - 4)
    a, b, c = t + 1, t - 1, t - 2
    weights = (-t * b * c / 6, a * b * c / 2, -a * t * c / 2, a * t * b / 6)
    value = sum(w * grid[left + j] for j, w in enumerate(weights))
    return torch.where(inside, torch.as_tensor(value).clamp(min=0), 0.0)
