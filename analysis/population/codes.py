"""Priors of discrete codes made of other rows: discounted counts, products of positions, latent classes, and p."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from pvae.analysis.population.sample import FOLDS, HonestPrior, HonestScores, NewRows, mixture_weights
from pvae.analysis.population.sweep import relative
from pvae.distributions.exponential_codes import Codes, Product
from pvae.util import seeds

CENTRES, TABLE = 1024, 2**21
"""Largest numbers of rows that have a kernel, random ones, and of probabilities of all kernels."""
ROWS_AT_ONCE, ROWS_TRIED = 2048, 500
"""Numbers of rows that are scored at once, and of rows (at most half) that weights and smoothing are chosen on."""
SMOOTHINGS = (0.02, 0.1, 0.25, 0.5)
"""Smoothings of the kernels that are tried."""
NOTHING = -1e30
"""Finite stand-in for log 0."""
DISCOUNTS = (0.4, 0.8, 0.97)
"""Discounts t of the counts of a joint code, r(c) = (n_c - t)+ / n + t D / n base(c)."""
TOWARDS_P = 2.0
"""Pseudo-count of the prior p in the fit of the weights."""
FEWEST_BY_CLASS, ROWS_BY_CLASS, CLASS_STEPS = 50, 2000, 12
"""Smallest and largest number of rows that latent classes are fitted to, and number of EM steps."""
CLASSES = (4, 16, 32)
"""Numbers of classes that are tried, until one does no better on held-out rows than the one before."""


class Grid(NamedTuple):
    """Grid of codes of one latent, as flat values hold them."""

    positions: int
    states: int
    width: int
    """Number of coordinates of a flat value: P of indices, P K of one-hots or their logarithms."""


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


class CodeTable(NamedTuple):
    """Joint codes of n rows, counted: by joint code, and by position."""

    flat: Tensor
    """Number of every row's code among the S codes seen at all positions, `(n, P)`."""
    position: Tensor
    """Position of each of these codes, `(S,)`."""
    states: Tensor
    """Number of codes that there are at each position, `(P,)`, float64."""
    group: Tensor
    """Number of every row's joint code among the distinct ones, `(n,)`."""
    log_p: Tensor
    """Log prior probability of every row's joint code, `(n,)`."""
    centres: Tensor
    """Numbers of the rows that have a kernel, `(m,)`: all, or as many at random as time allows."""
    probability: Tensor
    """Posterior probability of every code at its position for these rows, `(S, m)`, float32; where posteriors are not
    kept, 1 for the row's own codes."""

    @classmethod
    def of(cls, rows: NewRows, grids: Sequence[Grid]) -> Self:
        """Return the table of the codes of some rows."""
        value = rows.value
        index, sizes = [], []
        for part, grid in zip(value.split([grid.width for grid in grids], 1), grids, strict=True):
            hot = grid.width != grid.positions
            index.append(part.reshape(len(part), -1, grid.states).argmax(2) if hot else part.long())
            sizes += [grid.states] * grid.positions
        codes, size = torch.cat(index, 1), torch.tensor(sizes, device=value.device)
        first = size.cumsum(0) - size
        seen, flat = (codes + first).unique(return_inverse=True)
        position = torch.bucketize(seen, first, right=True) - 1
        centres = seeds.subset(len(value), max(1, min(CENTRES, TABLE // len(seen))), 0).to(value.device)
        parts = rows.q.parts if isinstance(rows.q, Product) else [rows.q]
        known = [part.rows(centres).logits.flatten(1) for part in parts if isinstance(part, Codes)]
        if len(known) == len(parts):
            table = torch.cat(known, 1)[:, seen].exp().float()
        else:
            table = torch.zeros(len(centres), len(seen), device=value.device).scatter_(1, flat[centres], 1.0)
        joint = codes.unique(dim=0, return_inverse=True)[1]
        return cls(flat, position, size.double(), joint, rows.log_p, centres, table.T.contiguous())

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
        return ((found.by_position + 0.5) / (found.total[:, None] + self.states / 2)).log().sum(1)

    def shares(self, of: Tensor) -> Tensor:
        """Return the proportion of every code at its position among the rows `of`, with add-1/2 counts, float32."""
        flat = self.flat[of]
        counts = torch.bincount(flat.flatten(), minlength=len(self.position)).double() + 0.5
        return (counts / (len(flat) + self.states / 2)[self.position]).float()

    def kernels(self, at: Tensor, of: Tensor, smoothing: float, shares: Tensor) -> Tensor:
        """Return log kernels of the rows `at` around the centres `of`, `(m, c)`; float32.

        Every position keeps the posterior (or the code) of its row with probability 1 - smoothing, else it has the
        proportions `shares` of all rows. The kernel of a row around itself is left out (`NOTHING`).
        """
        table = self.probability.index_select(1, of.nonzero()[:, 0]).mul_(1 - smoothing)
        table.add_(smoothing * shares[:, None]).log_()
        tile = torch.nn.functional.embedding_bag(self.flat[at], table, mode="sum")
        return tile.masked_fill_(at[:, None] == self.centres[of], NOTHING)


def terms(bases: Tensor, found: Counted) -> Tensor:
    """Return the log densities of all components, `(m, (1 + T) b)`: the b bases, and counts discounted towards each."""
    out = [bases]
    for t in DISCOUNTS:
        kept, left = (found.times - t).clamp(min=0) / found.total, t * found.distinct / found.total
        out.append(torch.logaddexp(kept.log()[:, None], left.log()[:, None] + bases))
    return torch.cat(out, 1)


class LatentClasses(NamedTuple):
    """Mixture of products over positions, r(c) = sum_k w_k prod_p theta_k[p, c_p]; float32."""

    log_weights: Tensor
    """Log weights of the classes, `(C,)`."""
    log_theta: Tensor
    """Log probabilities of the S codes of all positions by class, `(S, C)`."""

    def joint(self, flat: Tensor) -> Tensor:
        """Return log w_k + log theta_k(c) of codes `(m, P)`, given as rows of `log_theta`, `(m, C)`, nats."""
        return self.log_weights + torch.nn.functional.embedding_bag(flat, self.log_theta, mode="sum")


def latent_classes(flat: Tensor, shares: Tensor, classes: int) -> LatentClasses:
    """Return the latent class model of codes fitted by EM, from classes that start at random rows.

    A class takes one pseudo-count at every position, spread as all rows are there.

    Arguments:
        flat: codes of the rows, `(m, P)`: the number of a code among the S codes of all positions.
        shares: proportion of each of these codes at its position, `(S,)`.
        classes: number of classes.
    """
    flat = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))[:ROWS_BY_CLASS].to(flat.device)]
    near = (flat[:, None] == flat[None, :classes]).float().mean(2)  # rows of a class resemble its first row
    posterior = (flat.shape[1] * near).softmax(1) if classes > 1 else torch.ones_like(near)
    for step in range(CLASS_STEPS if classes > 1 else 1):
        weights = posterior.sum(0) + 1 / classes
        theta = shares[:, None].repeat(1, classes)
        for column in flat.T:
            theta.index_add_(0, column, posterior)
        model = LatentClasses((weights / weights.sum()).log(), (theta / (posterior.sum(0) + 1)).log())
        if step < CLASS_STEPS - 1:
            posterior = model.joint(flat).softmax(1)
    return model


class CodeMixture(NamedTuple):
    """Mixture of discounted counts and bases, whose parameters come from some of the rows."""

    table: CodeTable
    log_weights: Tensor
    classes: LatentClasses | None
    smoothing: float
    shares: Tensor

    @classmethod
    def chosen(cls, table: CodeTable, of: Tensor, *, classes: bool = True) -> Self:
        """Return the mixture chosen on the rows `of`, `(n,)` booleans: each is scored by others of them."""
        rows = of.nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).to(rows.device)]
        tried, rest = rows.tensor_split([min(ROWS_TRIED, len(rows) // 2)])
        found, shares = table.counted(tried, of), table.shares(rest)
        kernel = {smoothing: _kernel(table, tried, of, smoothing, shares) for smoothing in SMOOTHINGS}
        smoothing = max(kernel, key=lambda each: float(kernel[each].mean()))
        best = _classes(table, rest, tried) if classes else None
        given = terms(_bases(table, tried, found, kernel[smoothing], best), found)
        towards_p = torch.zeros_like(given[0])
        towards_p[0] = TOWARDS_P
        return cls(table, mixture_weights(given, towards_p), best, smoothing, shares)

    def scored(self, at: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        """Return log r of the rows `at`, `(m,)`, from the rows `of` (themselves apart), and their influence.

        The influence is the derivative of the sum of log r in the weight of every row that is counted or has a kernel,
        `(n,)`; what latent classes, weights and the smoothing owe to their rows is not in it.
        """
        pieces = [self._scored(part, of) for part in at.split(ROWS_AT_ONCE)]
        return torch.cat([log_r for log_r, _ in pieces]), torch.stack([influence for _, influence in pieces]).sum(0)

    def _scored(self, at: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        table, found, near = self.table, self.table.counted(at, of), of[self.table.centres]
        top, e = relative(table.kernels(at, near, self.smoothing, self.shares))
        total, centres = e.sum(1), table.centres[near]
        base = _bases(table, at, found, top + total.double().log() - _others(at, centres), self.classes)
        log_r = self._log_r(base, found)
        fresh, by_base = self._responsibility(base, found, log_r)
        fewer = found.times - 1
        less = found._replace(times=fewer.clamp(min=0), distinct=found.distinct - (fewer == 0).double())
        influence = self._influence(at, of, found, log_r - self._log_r(base, less), fresh, by_base[:, 1])
        return log_r, influence.index_add_(0, centres, ((by_base[:, 2] / total).float() @ e).double())

    def _log_r(self, base: Tensor, found: Counted) -> Tensor:
        return (terms(base, found) + self.log_weights).logsumexp(1)

    def _responsibility(self, base: Tensor, found: Counted, log_r: Tensor) -> tuple[Tensor, Tensor]:
        """Return the derivative of log r in the number of distinct codes, `(m,)`, and the proportion of each base."""
        apart, *discounted = self.log_weights.exp().split(base.shape[1])
        ratio = (base - log_r[:, None]).exp()
        fresh, by_base = torch.zeros_like(log_r), apart * ratio
        for t, weight in zip(DISCOUNTS, discounted, strict=True):
            left = t / found.total[:, None] * weight * ratio
            fresh, by_base = fresh + left.sum(1), by_base + found.distinct[:, None] * left
        return fresh, by_base

    def _influence(self, at: Tensor, of: Tensor, found: Counted, same: Tensor, fresh: Tensor, base: Tensor) -> Tensor:
        """Return the sum over the rows `at` of the derivatives of log r in the weight of every row of `of`, `(n,)`."""
        table, zero = self.table, torch.zeros_like(self.table.log_p)
        by_code = zero.index_add(0, table.group[at], same)[table.group].index_add(0, at, -same)
        alone = (torch.bincount(table.group[of], minlength=len(zero))[table.group] == 1).double()
        share = base[:, None] / (found.by_position + 0.5)
        by_state = torch.zeros(len(table.position), device=zero.device).double()
        by_state.index_add_(0, table.flat[at].flatten(), share.flatten())
        by_position = by_state[table.flat].sum(1).index_add(0, at, -share.sum(1))
        return (by_code + alone * (fresh.sum() - zero.index_add(0, at, fresh)) + by_position) * of

    def words(self) -> str:
        """Return the components in words, with their weights."""
        apart, *discounted = self.log_weights.exp().split(3 + (self.classes is not None))
        names = ["the prior itself", "a product of positions", f"kernels on other rows, smoothed by {self.smoothing:g}"]
        names += [f"{len(self.classes.log_weights)} latent classes"] if self.classes is not None else []
        shares = {"counts of the codes of other rows": float(sum(part.sum() for part in discounted))}
        shares |= {name: float(weight) for name, weight in zip(names, apart, strict=True)}
        return ", ".join(f"{name} ({100 * share:.0f} %)" for name, share in shares.items() if share >= 0.005)


class CodePrior(HonestPrior):
    """Mixture of discounted counts of joint codes, a product of positions, latent classes and the prior p.

    r(c) = (n_c - t)+ / n + t D / n base(c) with D distinct codes among n rows. The bases stand also for themselves; the
    weights of all components are fitted by EM to rows that are scored by the others.
    """

    grids: Sequence[Grid]
    """Grid of codes of each discrete latent, in the order of the values."""

    def scored(self, rows: NewRows, fold: Tensor, train: NewRows | None = None) -> HonestScores:
        if train is not None:
            table = CodeTable.of(train.joined(rows), self.grids)
            number = torch.arange(len(train) + len(rows), device=rows.value.device)
            mixture = CodeMixture.chosen(table, number < len(train))
            log_r, _ = mixture.scored(number[len(train) :], number < len(train))
            return HonestScores(log_r, torch.zeros_like(log_r), log_r, mixture.words())
        table, words = CodeTable.of(rows, self.grids), ""
        log_r, influence, apart = (torch.zeros_like(rows.own) for _ in range(3))
        for k in range(FOLDS):
            mine, before = (fold == k).nonzero()[:, 0], (fold == (k - 1) % FOLDS).nonzero()[:, 0]
            mixture = CodeMixture.chosen(table, fold != k)
            log_r[mine], moved = mixture.scored(mine, torch.ones_like(fold, dtype=torch.bool))
            apart[before], _ = CodeMixture.chosen(table, fold == k, classes=False).scored(before, fold == k)
            influence, words = influence + moved, mixture.words()
        return HonestScores(log_r, influence, apart, words)


def _classes(table: CodeTable, fitted: Tensor, held: Tensor) -> LatentClasses | None:
    """Return the latent class model of the rows `fitted` that is best on the rows `held`; None for a single class."""
    if len(fitted) < FEWEST_BY_CLASS or table.flat.shape[1] == 1:
        return None
    best, value = None, -math.inf
    for number in (1, *CLASSES):
        found = latent_classes(table.flat[fitted], table.shares(fitted), number)
        if (score := float(found.joint(table.flat[held]).logsumexp(1).mean())) <= value:
            break
        best, value = found, score
    return best if best is not None and len(best.log_weights) > 1 else None


def _bases(table: CodeTable, at: Tensor, found: Counted, kernel: Tensor, classes: LatentClasses | None) -> Tensor:
    """Return the log densities of the rows `at` under p, a product of positions, kernels and latent classes."""
    known = [table.log_p[at], table.product(at, found), kernel]
    known += [] if classes is None else [classes.joint(table.flat[at]).logsumexp(1)]
    return torch.stack(known, 1)


def _kernel(table: CodeTable, at: Tensor, of: Tensor, smoothing: float, shares: Tensor) -> Tensor:
    """Return the log mean of the kernels of the rows `at` around the rows `of`, themselves apart, `(m,)`, nats."""
    near = of[table.centres]
    return table.kernels(at, near, smoothing, shares).double().logsumexp(1) - _others(at, table.centres[near])


def _others(at: Tensor, centres: Tensor) -> Tensor:
    """Return the log number of centres other than each of the rows `at`, `(m,)`."""
    return (len(centres) - torch.isin(at, centres).double()).log()
