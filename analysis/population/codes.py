"""Priors of discrete codes made of other rows: discounted counts, products of positions, latent classes, and p."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from pvae.analysis.population.classes import CLASSES, LatentClasses, latent_classes, mixture_weights
from pvae.analysis.population.sample import HonestPrior, HonestScores, NewRows

DISCOUNTS = (0.25, 0.5, 0.75, 0.9, 0.99)
"""Discounts t of the counts of a joint code, r(c) = (n_c - t)+ / n + t D / n base(c)."""
FEWEST_BY_CLASS = 50
"""Smallest number of rows that latent classes are fitted to."""


class Grid(NamedTuple):
    """Grid of codes of one latent, as flat values hold them."""

    positions: int
    states: int
    width: int
    """Number of coordinates of a flat value: P of indices, P K of one-hots or their logarithms."""


@dataclass(frozen=True)
class CodeTable:
    """Joint codes of n rows, counted: by joint code, and by position."""

    flat: Tensor
    """Number of every row's code among the codes of all positions, `(n, P)`."""
    position: Tensor
    """Position of each of these codes, `(sum of the positions' states,)`."""
    group: Tensor
    """Number of every row's joint code among the distinct ones, `(n,)`."""
    log_p: Tensor
    """Log prior probability of every row's joint code, `(n,)`."""

    @classmethod
    def of(cls, value: Tensor, log_p: Tensor, grids: Sequence[Grid]) -> CodeTable:
        """Return the table of flat values `(n, D)` with their log prior probabilities."""
        index, sizes = [], []
        for part, grid in zip(value.split([grid.width for grid in grids], 1), grids, strict=True):
            hot = grid.width != grid.positions
            index.append(part.reshape(len(part), -1, grid.states).argmax(2) if hot else part.long())
            sizes += [grid.states] * grid.positions
        codes, size = torch.cat(index, 1), torch.tensor(sizes, device=value.device)
        position = torch.arange(len(sizes), device=value.device).repeat_interleave(size)
        return cls(codes + size.cumsum(0) - size, position, codes.unique(dim=0, return_inverse=True)[1], log_p)

    def counted(self, at: Tensor, of: Tensor) -> Counted:
        """Return how often the codes of the rows `at` occur among the rows `of`, `(n,)` booleans, themselves apart."""
        own = of[at].double()
        joint = torch.bincount(self.group[of], minlength=int(self.group.max()) + 1)
        single = torch.bincount(self.flat[of].flatten(), minlength=len(self.position))
        times = joint[self.group[at]] - own
        distinct = (joint > 0).sum() - own * (times == 0)
        return Counted(of.sum() - own, times, distinct, single[self.flat[at]] - own[:, None])

    def product(self, at: Tensor, found: Counted) -> Tensor:
        """Return the log probability of the rows `at` under a product of positions with add-1/2 counts, `(m,)`."""
        half = torch.bincount(self.position).double() / 2
        return ((found.by_position + 0.5) / (found.total[:, None] + half)).log().sum(1)


class Counted(NamedTuple):
    """Counts of the codes of m rows among other rows."""

    total: Tensor
    """Number of rows counted, `(m,)`."""
    times: Tensor
    """Number of rows with the same joint code, `(m,)`."""
    distinct: Tensor
    """Number of distinct joint codes, `(m,)`."""
    by_position: Tensor
    """Number of rows with the same code at every position, `(m, P)`."""


def terms(bases: Tensor, found: Counted) -> Tensor:
    """Return the log densities of all components, `(m, (1 + T) b)`: the b bases, and counts discounted towards each."""
    out = [bases]
    for t in DISCOUNTS:
        kept, left = (found.times - t).clamp(min=0) / found.total, t * found.distinct / found.total
        out.append(torch.logaddexp(kept.log()[:, None], left.log()[:, None] + bases))
    return torch.cat(out, 1)


@dataclass(frozen=True)
class CodeMixture:
    """Mixture of discounted counts and bases, whose weights and latent classes come from some of the rows."""

    table: CodeTable
    log_weights: Tensor
    classes: LatentClasses | None

    @classmethod
    def chosen(cls, table: CodeTable, of: Tensor) -> CodeMixture:
        """Return the mixture chosen on the rows `of`, `(n,)` booleans: each scored by the others among them."""
        rows = of.nonzero()[:, 0]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).to(rows.device)
        parts = rows[order[::2]], rows[order[1::2]]
        found = table.counted(rows, of)
        bases = [table.log_p[rows], table.product(rows, found)]
        best = _classes(table, *parts)
        if best is not None:
            held = torch.zeros_like(table.log_p)
            held[parts[1]] = best.log_prob(table.flat[parts[1]])
            other = latent_classes(table.flat[parts[1]], table.position, len(best.log_weights))
            held[parts[0]] = other.log_prob(table.flat[parts[0]])
            bases.append(held[rows])
            best = latent_classes(table.flat[rows], table.position, len(best.log_weights))
        given = terms(torch.stack(bases, 1), found)
        towards_p = torch.zeros_like(given[0])
        towards_p[0] = 1.0
        return cls(table, mixture_weights(given, torch.ones_like(given[:, 0]), towards_p), best)

    def scored(self, at: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        """Return log r of the rows `at`, `(m,)`, from counts of the rows `of` (themselves apart), and their influence.

        The influence is the derivative of the sum of log r in the weight of every row that is counted, `(n,)`; what
        latent classes and weights owe to their rows is not in it.
        """
        table, found = self.table, self.table.counted(at, of)
        bases = [table.log_p[at], table.product(at, found)]
        bases += [self.classes.log_prob(table.flat[at])] if self.classes is not None else []
        base = torch.stack(bases, 1)
        log_r = (terms(base, found) + self.log_weights).logsumexp(1)
        fewer = found._replace(times=(found.times - 1).clamp(min=0), distinct=found.distinct - (found.times == 1).double())
        same = log_r - (terms(base, fewer) + self.log_weights).logsumexp(1)
        apart, *discounted = self.log_weights.exp().split(base.shape[1])
        ratio = (base - log_r[:, None]).exp()
        fresh, by_base = torch.zeros_like(log_r), apart * ratio
        for t, weight in zip(DISCOUNTS, discounted, strict=True):
            left = t / found.total[:, None] * weight * ratio
            fresh, by_base = fresh + left.sum(1), by_base + found.distinct[:, None] * left
        return log_r, self._influence(at, of, found, same, fresh, by_base[:, 1])

    def _influence(
        self, at: Tensor, of: Tensor, found: Counted, same: Tensor, fresh: Tensor, product: Tensor
    ) -> Tensor:
        """Return the sum over the rows `at` of the derivatives of log r in the weight of every row of `of`, `(n,)`."""
        table, zero = self.table, torch.zeros_like(self.table.log_p)
        by_code = zero.index_add(0, table.group[at], same)[table.group].index_add(0, at, -same)
        alone = (torch.bincount(table.group[of], minlength=len(zero))[table.group] == 1).double()
        share = product[:, None] / (found.by_position + 0.5)
        by_state = torch.zeros(len(table.position), device=zero.device).double()
        by_state.index_add_(0, table.flat[at].flatten(), share.flatten())
        by_position = by_state[table.flat].sum(1).index_add(0, at, -share.sum(1))
        singles = alone * (fresh.sum() - zero.index_add(0, at, fresh))
        return (by_code + singles + by_position) * of


@final
class CodePrior(HonestPrior):
    """Mixture of discounted counts of joint codes, a product of positions, latent classes and the prior p.

    r(c) = (n_c - t)+ / n + t D / n base(c) with D distinct codes among n rows. The bases stand also for themselves; the
    weights of all components are fitted by EM to rows that are scored by the others.
    """

    def __init__(self, grids: Sequence[Grid]) -> None:
        self.grids = tuple(grids)

    def crossed(self, rows: NewRows, half: Tensor) -> HonestScores:
        table = CodeTable.of(rows.value, rows.log_p, self.grids)
        log_r, halves, influence = (torch.zeros_like(rows.log_p) for _ in range(3))
        everyone, words = torch.ones_like(half, dtype=torch.bool), ""
        for side in (0, 1):
            mine, others = (half == side).nonzero()[:, 0], half != side
            mixture = CodeMixture.chosen(table, others)
            log_r[mine], moved = mixture.scored(mine, everyone)
            halves[mine], _ = mixture.scored(mine, others)
            influence += moved
            words = _words(mixture)
        return HonestScores(log_r, influence, halves, words)

    def trained(self, train: NewRows, rows: NewRows) -> HonestScores:
        value, log_p = torch.cat([train.value, rows.value]), torch.cat([train.log_p, rows.log_p])
        table = CodeTable.of(value, log_p, self.grids)
        number = torch.arange(len(value), device=value.device)
        mixture = CodeMixture.chosen(table, number < len(train))
        log_r, _ = mixture.scored(number[len(train) :], number < len(train))
        return HonestScores(log_r, torch.zeros_like(log_r), log_r, _words(mixture))


def _classes(table: CodeTable, fitted: Tensor, held: Tensor) -> LatentClasses | None:
    """Return the latent class model of the rows `fitted` that is best on the rows `held`; None for a single class."""
    if len(fitted) < FEWEST_BY_CLASS or table.flat.shape[1] == 1:
        return None
    best, value = None, latent_classes(table.flat[fitted], table.position, 1).log_prob(table.flat[held]).mean()
    for number in CLASSES:
        found = latent_classes(table.flat[fitted], table.position, number)
        score = found.log_prob(table.flat[held]).mean()
        if score <= value:
            break
        best, value = found, score
    return best


def _words(mixture: CodeMixture) -> str:
    """Return the components of a mixture in words, with their weights."""
    apart, *discounted = mixture.log_weights.exp().split(2 + (mixture.classes is not None))
    names = ["the prior itself", "a product of positions"]
    names += [f"{len(mixture.classes.log_weights)} latent classes"] if mixture.classes is not None else []
    shares = {"counts of the codes of other rows": float(sum(part.sum() for part in discounted))}
    shares |= {name: float(weight) for name, weight in zip(names, apart, strict=True)}
    return ", ".join(f"{name} ({100 * share:.0f} %)" for name, share in shares.items() if share >= 0.005)
