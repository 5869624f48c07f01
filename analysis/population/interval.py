"""Interval for what a better prior can win on new data, and for the information of the codes about new data."""

import math
from dataclasses import fields, replace
from typing import Annotated, Any, NamedTuple, Self

import torch
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate, Figures, short, text, texts
from pvae.analysis.population.sample import FOLDS, HonestPrior, NewRows, folds, mixed_by_group
from pvae.analysis.population.sweep import PairCritic, PointwiseInformation, counted_twice, mean, spread, sweep
from pvae.distributions import Members
from pvae.util import Record, plain

ON_NEW_DATA = "on new data"
"""Words that a remark on a missing interval contains."""
FLAT = 0.1
"""Slope of I_n in log n above which n rows cannot tell I_pi, and nothing is extrapolated."""
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
FEWEST_PAIRED = 200
"""Smallest number of rows with one covariate value that have a bound from their pairs: the log of a mean over few pairs
is too small on average, and over many values that does not cancel."""
SMALLEST = 25
"""Smallest number of rows of such a part."""
WORK = 4e11
"""Largest number of multiplications in a pass over all pairs of rows; above it the interval is that of fewer rows."""
SETTLED = 0.3
"""Gap, nats, between I_n and leave-one-out from which their middle is not given."""


class SubsetInformation(Record):
    """Mutual information from a nested subset of the rows, nats: the law in n."""

    n: int
    information: Estimate
    """I_n = E[log q(z|x) - log q_agg(z)] with the own posterior among the n components: at most log n."""
    leave_one_out: Estimate | None
    """The same without the own posterior: an upper bound of I_pi in expectation."""


class Population(Figures):
    """Interval for M = KL(q_pi || p), what a better prior can win on new data with this encoder; nats per datum.

    q_pi(z) = E_pi q(z | x) is the aggregated posterior under the distribution pi that the rows were drawn from, and
    I_pi = E log q(z | x) - log q_pi(z) the mutual information under it. E KL(q(z | x) || p) = I_pi + M.
    """

    n: int
    gain: Annotated[Estimate, "new_gain", "new data: a better prior wins at least this"]
    """Lower bound of M: E[log r(z) - log p(z)] of a prior r that does not know the rows it is scored on."""
    gain_upper: Annotated[Estimate | None, "new_gain_upper", "and at most this, if new codes overlap as these do"]
    """Upper bound of M, the least of KL - I_n and KL - I_pairs; None where there is none below the KL."""
    information: Annotated[Estimate | None, "new_information", "I_pi[x, z] of new data, from below"]
    """Lower bound of I_pi, the largest of I_n and I_pairs."""
    information_upper: Annotated[Estimate, "new_information_upper", "I_pi[x, z] of new data, from above"]
    """Upper bound of I_pi: E[log q(z | x) - log r(z)]."""
    prior: str
    """The prior r in words, such as "kernels on the other rows, widened by 0.2, mixed with a normal"."""
    seen: float | None = None
    """Share of the pairs bound that comes from the pairs themselves, m / (m + g); below one half the upper end is that
    of the guard, not of the data. None without a pairs bound."""
    largest: float | None = None
    """Largest share of one row in m."""
    sizes: tuple[SubsetInformation, ...] = ()
    """The law in n, from small subsets to all rows."""
    slope: float | None = None
    """Slope of I_n in log n between the two largest sizes; above 0.1 nothing is extrapolated."""
    midpoint: Annotated[Estimate | None, "new_midpoint", "the same, where these rows can tell it"] = None
    """Estimate of I_pi, the middle of I_n and leave-one-out; None where they are 0.3 nats apart or more."""
    notes: tuple[str, ...] = ()

    @property
    def ends(self) -> tuple[float, float | None]:
        """Interval for M of a level of about 95 %: both bounds, each widened by two of its standard errors; nats."""
        low = max(self.gain.value - 2 * self.gain.standard_error, 0.0)
        above = self.gain_upper
        return low, None if above is None else max(above.value + 2 * above.standard_error, low)

    @property
    def interval(self) -> str:
        """The interval `ends` in words, "1.98 to 4.10"; "at least 1.98" without an upper end."""
        low, high = self.ends
        return f"at least {short(low)}" if high is None else f"{short(low)} to {short(high)}"

    def sentence(self, known: Estimate | None = None) -> str:
        """Return the interval in words, beside `known`, the marginal KL on these rows alone, nats, if it is given."""
        above, knowing = self.gain_upper, ""
        if known is not None and above is not None:
            if not above.value + 2 * math.hypot(above.standard_error, known.standard_error) >= known.value:
                knowing = "most" if self.gain.value + above.value < known.value else "part"
        return text("population.sentence", new=self, known=known, knowing=knowing)

    @property
    def remarks(self) -> tuple[str, ...]:
        return (*texts("population.remarks", new=self, flat=FLAT, ceiling=2 * math.log(self.n)), *self.notes)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain numbers and strings for JSON; `sizes` is a list of the figures of each subset."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}


# ---------------------------------------------------------------------- from rows to the interval


class PairsBound(NamedTuple):
    """Lower bound of I_pi from all pairs of a sample and a row that r does not know (Donsker, Varadhan)."""

    terms: Tensor
    """Terms whose mean is the bound, and whose spread is its error, `(n,)`."""
    twice: float
    """Part of the variance of the terms that is noise of single pairs counted twice."""
    seen: float
    largest: float

    @classmethod
    def of(cls, critic: PairCritic, own: Tensor, sums: Tensor) -> Self:
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
        return cls(psi - math.log(m + g), twice, seen, float(sums.sum(2).max()) / (m * critic.pairs))


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
    if rows.group is not None and len(rows.group.unique()) > 1:
        prior = mixed_by_group(prior, rows if train is None else train)
    found = prior.scored(rows, fold, train)
    moved = found.influence - found.influence.mean()
    gains = [mean(d + moved, "lower_bound") for d in (found.log_r - rows.log_p, rows.kl - rows.own + found.log_r)]
    gain = min(gains, key=lambda e: e.standard_error)
    if not math.isfinite(gain.value):
        return "on new data: log r(z) is not finite"
    out = Population(len(rows), gain, None, None, mean(rows.own - found.log_r - moved, "upper_bound"), found.words)
    if rows.q is None:
        return _of_draws(rows, out)
    return _of_pairs(rows, found.apart, fold if train is None else None, out)


def in_folds(rows: NewRows, seed: int) -> tuple[NewRows, Tensor] | str:
    """Return rows in random order, as many as time allows, with the fold of each; or the reason why there are none."""
    if len(rows) < FEWEST:
        return f"on new data: expected at least {FEWEST} rows for an interval; got {len(rows)}"
    if not bool(rows.value.isfinite().all() & rows.log_p.isfinite().all()):
        return "on new data: samples of the latents or their log p(z) are not finite"
    work = 2 * rows.value.shape[1] if rows.q is None else rows.q.work
    shuffled, fold = folds(len(rows), seed, rows.value.device, min(len(rows), math.isqrt(int(WORK / work))))
    return replace(rows.rows(shuffled), information=rows.information), fold


def _of_pairs(rows: NewRows, apart: Tensor, fold: Tensor | None, out: Population) -> Population:
    """Return the interval where all pairs of a sample and a row are scored, within each covariate value.

    With covariates y it is that of M = E_y KL(q_pi(z | y) || p(z | y)), and the information is I_q[x, z | y]. Values of
    fewer rows than `FEWEST_PAIRED` have I_n in both bounds, and a single row no information: its upper end is the KL.
    """
    group = torch.zeros_like(rows.own) if rows.group is None else rows.group
    values, n = group.unique().tolist(), len(rows)
    terms, twice, paired = rows.own.new_zeros(2, n), [0.0, 0.0], list[tuple[float, PairsBound]]()
    for mine in ((group == value).nonzero()[:, 0] for value in values):
        part, critic = rows if len(values) == 1 else rows.rows(mine), None
        if len(mine) < 2 or (q := part.q) is None:
            continue
        if len(values) == 1 or len(mine) >= FEWEST_PAIRED:
            law, sizes = _law(part, q), [len(mine)] if fold is None else fold[mine].bincount(minlength=FOLDS).tolist()
            critic = _critic(law, apart[mine], tuple(sizes))
        whole, sums = sweep(q, part.value, part.own, critic)
        if len(values) == 1:
            out = _of_one_law(out, law, whole)
        if critic is not None:
            paired.append((len(mine) / n, PairsBound.of(critic, part.own, sums)))
        for k, bound in enumerate((whole, whole if critic is None else paired[-1][1])):
            terms[k, mine], twice[k] = bound.terms, twice[k] + len(mine) / n * bound.twice
    ends, bounds, share = [], [], sum(size for size, _ in paired)
    for bound, noise in list(zip(terms, twice, strict=True))[: 1 + bool(paired)]:
        bounds.append(mean(bound, "lower_bound", noise))
        above = [mean(kl - bound, "upper_bound", noise) for kl in (rows.kl, rows.own - rows.log_p)]
        ends.append(min(above, key=lambda e: e.standard_error))
    upper = min(ends, key=lambda e: e.value + 2 * e.standard_error)
    lower = max(bounds, key=lambda e: e.value - 2 * e.standard_error)
    seen = sum(size * bound.seen for size, bound in paired) / share if paired else None
    largest = max((size / share * bound.largest for size, bound in paired), default=None)
    said = text("population.by_covariate", values=len(values), fewest=FEWEST_PAIRED, share=share)
    out = replace(out, gain_upper=upper, information=lower, seen=seen, largest=largest)
    return replace(out, notes=(said,)) if len(values) > 1 else out


def _of_draws(rows: NewRows, out: Population) -> Population:
    """Return the interval where pairs of a value and a row are scored by the guide alone, for some rows."""
    out = replace(out, notes=("no bound from pairs: the posteriors are of no exponential family",))
    if rows.information is None or len(rows.information) < 2:
        return out
    information = mean(rows.information, "lower_bound")
    error = math.hypot(information.standard_error, spread(rows.kl))
    above = Estimate(float(rows.kl.mean()) - information.value, error, "upper_bound")
    return replace(out, gain_upper=above, information=information)


# ---------------------------------------------------------------------- the law in n

Subset = tuple[Tensor, PointwiseInformation]
"""Indices of some of the rows, and their information."""


def _law(rows: NewRows, q: Members) -> list[Subset]:
    """Return nested random subsets of the rows, from small to large, and their information."""
    generator = torch.Generator().manual_seed(len(rows))
    shuffled = torch.randperm(len(rows), generator=generator).to(rows.value.device)
    parts = (shuffled[:size] for size in (len(rows) // fraction for fraction in FRACTIONS) if size >= SMALLEST)
    return [(part, sweep(q.rows(part), rows.value[part], rows.own[part])[0]) for part in parts]


def _critic(law: list[Subset], apart: Tensor, sizes: tuple[int, ...]) -> PairCritic:
    """Return the clip of the bound from pairs: the stricter one where a quarter of the rows is told apart wholly."""
    saturated = not law or math.log(len(law[-1][0])) - float(law[-1][1].inside.mean()) < NEARLY_ALL
    slope, less = (0.75, 5.5) if saturated else (1.0, 4.0)
    return PairCritic(apart, sizes, slope, 2 * math.log(sum(sizes)) - less)


def _of_one_law(out: Population, law: list[Subset], whole: PointwiseInformation) -> Population:
    """Return the interval with I_n by n, its slope in log n from the largest subset to all rows, and the middle.

    The slope is on the samples of the subset. The middle of I_n and leave-one-out is given where n rows can tell: both
    near, and I_n flat in log n.
    """
    figures = [(len(chosen), part.figures()) for chosen, part in law] + [(len(whole.inside), whole.figures())]
    slope, middle = None, None
    if law:
        chosen, part = law[-1]
        slope = float((whole.inside[chosen] - part.inside).mean()) / math.log(len(whole.inside) / len(chosen))
    if slope is not None and slope <= FLAT and float((whole.outside - whole.inside).mean()) < SETTLED:
        both = whole.inside + whole.outside
        middle = Estimate(0.5 * float(both.mean()), 0.5 * spread(both - whole.inside_shares - whole.outside_shares))
    return replace(out, sizes=tuple(SubsetInformation(n, *both) for n, both in figures), slope=slope, midpoint=middle)
