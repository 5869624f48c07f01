"""Interval for what a better prior can win on new data, and for the information of the codes about new data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.population.levels import mixed_by_group
from pvae.analysis.population.result import FLAT, Population, SubsetInformation
from pvae.analysis.population.sample import HonestPrior, HonestScores, NewRows, folds
from pvae.analysis.population.sweep import PairCritic, PointwiseInformation, counted_twice, spread, sweep

FEWEST = 20
"""Smallest number of rows for which an interval is given."""
ALIKE = 22.5
"""Two new rows are alike with a probability of at most 22.5 / n^2 if n rows show no repeat with a probability of at
least 5 %: (1 + t) e^-t = 0.05 at t = 4.74, one row of mass t / n."""
NEARLY_ALL = 0.25
"""A quarter of the rows is told apart nearly wholly, log n - I_n below this: the clip of the bound from pairs then is
the stricter one."""
FRACTIONS = (64, 16, 4)
"""Parts of the rows, nested, of which the information is given as well: n/64, n/16, n/4."""
SMALLEST = 25
"""Smallest number of rows of such a part."""
WORK = 4e11
"""Largest number of multiplications in a pass over all pairs of rows; above it the interval is that of fewer rows."""
SETTLED = 0.3
"""Gap, nats, between I_n and leave-one-out from which their middle is not given."""


@dataclass(frozen=True)
class PairsBound:
    """Lower bound of I_pi from all pairs of a sample and a row that r does not know (Donsker, Varadhan)."""

    value: float
    psi: Tensor
    """Pointwise terms, whose spread is that of the bound, `(n,)`."""
    twice: float
    """Part of the variance of psi that is noise of single pairs counted twice."""
    seen: float
    largest: float

    @classmethod
    def of(cls, critic: PairCritic, own: Tensor, sums: Tensor) -> PairsBound:
        """Return the bound from log q(z_i | x_i), `(n,)`, and the sums over all pairs."""
        n, t = len(own), critic(own - critic.apart)
        alike = t.exp()
        groups = sums.sum(0) * n / critic.pairs
        reach = groups.sum(1)
        m = max(float(reach.mean()) / 2, 1e-300)  # no two rows may share a code
        g = ALIKE / n**2 * float(alike.mean())
        seen = m / (m + g)
        psi = t - seen * (reach / m - 2) - (1 - seen) * (alike / alike.mean() - 1)
        twice = (seen / m) ** 2 * counted_twice(groups)
        largest = float(sums.sum(2).max()) / (m * critic.pairs)
        return cls(float(t.mean()) - math.log(m + g), psi, twice, seen, largest)


def interval(rows: NewRows, prior: HonestPrior, *, train: NewRows | None = None, seed: int = 0) -> Population | str:
    """Return the interval for the gain of a better prior on new data, or the reason why there is none.

    The lower end is the mean of log r - log p of a prior r that does not know the rows it is scored on. The upper
    end is the least of KL - I_n and KL - I_pairs. With covariates y (the `group` of the rows) r(z | y) is made of the
    rows of one covariate value, where enough have it, mixed with one of all rows.

    Arguments:
        rows: rows that neither encoder nor prior was fitted on, `n` of them.
        prior: the way to make priors that do not know the rows they are scored on.
        train: other rows, of which the prior is made where at least 20 are given.
        seed: seed of the random folds.

    References:
        Formal Limitations on the Measurement of Mutual Information (McAllester, Stratos, 2020),
        https://arxiv.org/abs/1811.04251
        On Variational Bounds of Mutual Information (Poole et al., 2019), https://arxiv.org/abs/1905.06922
        The Infinitesimal Jackknife (Jaeckel, 1972), Bell Laboratories memorandum
    """
    accepted = in_folds(rows, seed)
    if isinstance(accepted, str):
        return accepted
    rows, fold = accepted
    if train is not None and len(train) < FEWEST:
        train = None
    by_group = rows.group is not None and len(rows.group.unique()) > 1
    if by_group:
        prior = mixed_by_group(prior, rows if train is None else train)
    found = prior.crossed(rows, fold) if train is None else prior.trained(train, rows)
    gains = (found.log_r - rows.log_p, rows.kl - rows.own + found.log_r)
    value, error = min(((float(d.mean()), spread(d + found.influence)) for d in gains), key=lambda pair: pair[1])
    if not math.isfinite(value):
        return "on new data: log r(z) is not finite"
    above = rows.own - found.log_r
    upper = Estimate(float(above.mean()), spread(above - found.influence), "upper_bound")
    out = Population(len(rows), Estimate(value, error, "lower_bound"), None, None, upper, found.words)
    if by_group:
        return _by_group(rows, out)
    if rows.q is None:
        return _of_draws(rows, out)
    law = _parts(rows)
    critic = _critic(law, found, (len(rows),) if train is not None else tuple(fold.bincount().tolist()))
    whole, sums = sweep(rows.q, rows.value, rows.own, critic)
    bound = PairsBound.of(critic, rows.own, sums)
    by_pairs = Estimate(bound.value, spread(bound.psi, bound.twice), "lower_bound")
    slope = _slope(law, whole)
    figures = [(len(part), info.figures()) for part, info in law] + [(len(rows), whole.figures())]
    by_rows = figures[-1][1][0]
    ends = (
        _less(rows.kl, by_rows.value, whole.inside - whole.inside_shares, whole.twice),
        _less(rows.kl, bound.value, bound.psi, bound.twice),
    )
    return replace(
        out,
        gain_upper=min(ends, key=lambda e: e.value + 2 * e.standard_error),
        information=max(by_rows, by_pairs, key=lambda e: e.value - 2 * e.standard_error),
        seen=bound.seen,
        largest=bound.largest,
        sizes=tuple(SubsetInformation(n, *both) for n, both in figures),
        slope=slope,
        midpoint=_middle(whole, slope),
    )


def in_folds(rows: NewRows, seed: int) -> tuple[NewRows, Tensor] | str:
    """Return rows in random order, as many as time allows, with the fold of each; or the reason why there are none."""
    if len(rows) < FEWEST:
        return f"on new data: expected at least {FEWEST} rows for an interval; got {len(rows)}"
    if not bool(rows.value.isfinite().all() & rows.log_p.isfinite().all()):
        return "on new data: samples of the latents or their log p(z) are not finite"
    work = 2 * rows.value.shape[1] if rows.q is None else rows.q.work
    n = min(len(rows), math.isqrt(int(WORK / work)))
    shuffled, fold = folds(len(rows), seed, rows.value.device, n)
    return replace(rows.rows(shuffled), information=rows.information), fold


def _less(kl: Tensor, information: float, terms: Tensor, twice: float = 0.0) -> Estimate:
    """Return KL less a lower bound of the information, whose pointwise terms are `terms`: an upper end for M."""
    return Estimate(float(kl.mean()) - information, spread(kl - terms, twice), "upper_bound")


def _by_group(rows: NewRows, out: Population) -> Population:
    """Return the interval for M = E_y KL(q_pi(z | y) || p(z | y)), what a better prior p(z | y) can win.

    Its upper end is KL - I_n with I_q[x, z | y] within each covariate value; it is the KL where all values differ.
    """
    assert rows.group is not None  # noqa: S101 - asked before
    values = rows.group.unique().tolist()
    inside, shares = torch.zeros_like(rows.own), torch.zeros_like(rows.own)
    for value in values if rows.q is not None else ():
        mine = (rows.group == value).nonzero()[:, 0]
        part = rows.rows(mine)
        if len(mine) > 1 and part.q is not None:
            some, _ = sweep(part.q, part.value, part.own)
            inside[mine], shares[mine] = some.inside, some.inside_shares
    information = Estimate(float(inside.mean()), spread(inside - shares), "lower_bound")
    return replace(
        out,
        gain_upper=_less(rows.kl, information.value, inside - shares),
        information=None if rows.q is None else information,
        notes=(f"new data have the covariates of these rows, {len(values)} values: no bound from pairs of rows",),
    )


def _of_draws(rows: NewRows, out: Population) -> Population:
    """Return the interval where pairs of a value and a row are scored by the guide alone, for some rows."""
    above, information = None, None
    if rows.information is not None and len(rows.information) > 1:
        information = Estimate(float(rows.information.mean()), spread(rows.information), "lower_bound")
        error = math.hypot(information.standard_error, spread(rows.kl))
        above = Estimate(float(rows.kl.mean()) - information.value, error, "upper_bound")
    notes = ("no bound from pairs: the posteriors are of no exponential family",)
    return replace(out, gain_upper=above, information=information, notes=notes)


# ---------------------------------------------------------------------- the law in n


def _parts(rows: NewRows) -> list[tuple[Tensor, PointwiseInformation]]:
    """Return nested random subsets of the rows, from small to large, and their information."""
    generator = torch.Generator().manual_seed(len(rows))
    shuffled, out = torch.randperm(len(rows), generator=generator).to(rows.value.device), []
    for size in (len(rows) // fraction for fraction in FRACTIONS):
        if size >= SMALLEST:
            chosen = shuffled[:size]
            part = rows.rows(chosen)
            assert part.q is not None  # noqa: S101 - asked before
            out.append((chosen, sweep(part.q, part.value, part.own)[0]))
    return out


def _critic(
    parts: list[tuple[Tensor, PointwiseInformation]], found: HonestScores, sizes: tuple[int, ...]
) -> PairCritic:
    """Return the clip of the bound from pairs: the stricter one where a quarter of the rows is told apart wholly."""
    saturated = not parts or math.log(len(parts[-1][0])) - float(parts[-1][1].inside.mean()) < NEARLY_ALL
    slope, less = (0.75, 5.5) if saturated else (1.0, 4.0)
    return PairCritic(found.apart, sizes, slope, 2 * math.log(sum(sizes)) - less)


def _slope(parts: list[tuple[Tensor, PointwiseInformation]], whole: PointwiseInformation) -> float | None:
    """Return the slope of I_n in log n from the largest subset to all rows, on the samples of the subset; else None."""
    if not parts:
        return None
    chosen, part = parts[-1]
    return float((whole.inside[chosen] - part.inside).mean()) / math.log(len(whole.inside) / len(chosen))


def _middle(found: PointwiseInformation, slope: float | None) -> Estimate | None:
    """Return the middle of I_n and leave-one-out where n rows can tell: both near, and I_n flat in log n."""
    gap = float((found.outside - found.inside).mean())
    if gap >= SETTLED or slope is None or slope > FLAT:
        return None
    terms = 0.5 * (found.inside + found.outside - found.inside_shares - found.outside_shares)
    return Estimate(0.5 * float((found.inside + found.outside).mean()), spread(terms))
