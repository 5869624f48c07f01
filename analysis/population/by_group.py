"""Interval on new data for a model with covariates y: what a better prior p(z | y) can win."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.population.interval import ends, in_folds
from pvae.analysis.population.levels import FEWEST_OF_GROUP, GroupPrior, MixedPrior
from pvae.analysis.population.result import Population
from pvae.analysis.population.sample import HonestPrior, NewRows
from pvae.analysis.population.sweep import spread, sweep


def interval_by_group(
    rows: NewRows, prior: HonestPrior, *, train: NewRows | None = None, seed: int = 0
) -> Population | str:
    """Return the interval for M = E_y KL(q_pi(z | y) || p(z | y)), or the reason why there is none.

    The new prior r(z | y) is made of the rows of one covariate value, where enough have it, mixed with one of all rows.
    The upper end is KL - I_n with I_q[x, z | y] within each covariate value; it is the KL where all values differ.

    Arguments:
        rows: rows that neither encoder nor prior was fitted on, with their `group`.
        prior: the way to make priors of z that do not know the rows they are scored on.
        train: other rows, of which the prior is made where they are given.
        seed: seed of the random folds.
    """
    accepted = in_folds(rows, seed)
    if isinstance(accepted, str):
        return accepted
    rows, fold = accepted
    assert rows.group is not None  # noqa: S101 - made for rows with covariates
    known = rows.group if train is None else train.group
    assert known is not None  # noqa: S101 - as above
    if int(known.unique(return_counts=True)[1].max()) >= FEWEST_OF_GROUP:
        prior = MixedPrior([prior, GroupPrior(prior)])
    found = prior.crossed(rows, fold) if train is None else prior.trained(train, rows)
    lower, upper = ends(rows, found)
    information, above = None, Estimate(float(rows.kl.mean()), spread(rows.kl), "upper_bound")
    if rows.q is not None:
        inside = shares = torch.zeros_like(rows.own)
        for value in rows.group.unique().tolist():
            mine = (rows.group == value).nonzero()[:, 0]
            if len(mine) > 1:
                part = rows.rows(mine)
                assert part.q is not None  # noqa: S101 - asked above
                some, _ = sweep(part.q, part.value, part.own)
                inside, shares = inside.index_add(0, mine, some.inside), shares.index_add(0, mine, some.inside_shares)
        information = Estimate(float(inside.mean()), spread(inside - shares), "lower_bound")
        above = replace(above, value=above.value - information.value, standard_error=spread(rows.kl - inside + shares))
    if not math.isfinite(lower.value):
        return "on new data: log r(z) is not finite"
    count = len(rows.group.unique())
    return Population(
        n=len(rows), gain=lower, gain_upper=above, information=information, information_upper=upper, prior=found.words,
        notes=(f"new data have the covariates of these rows, {count} values: no bound from pairs of rows",),
    )  # fmt: skip
