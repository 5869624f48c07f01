"""Interval for what a better prior can win on new data, and for the information of the codes about new data."""

from __future__ import annotations

from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.population.result import Population
from pvae.analysis.population.sample import HonestPrior, NewRows, halves

FEWEST = 20
"""Smallest number of rows for which an interval is given."""


def interval(rows: NewRows, prior: HonestPrior, *, train: NewRows | None = None, seed: int = 0) -> Population | str:
    """Return the interval for the gain of a better prior on new data, or the reason why there is none.

    Arguments:
        rows: rows that neither encoder nor prior was fitted on, `n` of them.
        prior: the way to make priors that do not know the rows they are scored on.
        train: other rows, of which the prior is made where they are given.
        seed: seed of the random halves.
    """
    n = len(rows)
    if n < FEWEST:
        return f"on new data: expected at least {FEWEST} rows for an interval; got {n}"
    found = prior.crossed(rows, halves(n, seed, rows.value.device)) if train is None else prior.trained(train, rows)
    gains = found.log_r - rows.log_p
    error = float((gains + found.influence).std() / n**0.5)
    lower = Estimate(float(gains.mean()), error, "lower_bound")
    upper = Estimate(float((rows.own - found.log_r).mean()), error, "upper_bound")
    return Population(n=n, gain=lower, gain_upper=None, information=None, information_upper=upper, prior=found.words)
