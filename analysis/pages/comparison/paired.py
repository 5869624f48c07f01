"""Paired differences of the ELBO and of bounds on log p(x) between two runs on the same data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.analysis.decompose.entry import accept, quiet
from pvae.analysis.decompose.posterior_draws import draw
from pvae.analysis.figures.estimate import Estimate, Figures, Row, over_rows
from pvae.errors import DataError
from pvae.pair.densities import sum_over
from pvae.pair.pair import Pair


@dataclass(frozen=True, repr=False)
class Paired(Figures):
    """Mean paired differences, run minus reference, on the same data; nats per datum, positive if the run is better."""

    n: int
    elbo: Estimate
    log_p: Estimate | None
    """Difference of the importance-weighted bounds on log p(x); None if either run has no such bound."""
    wins: Estimate
    """Proportion of data whose bound on log p(x), or ELBO if there is no bound, is higher than under the reference.

    Ties count half.
    """

    @property
    def title(self) -> str:
        return f"Paired differences, nats per datum (n = {self.n})"

    def rows(self) -> Iterator[Row]:
        yield "elbo", self.elbo, "ELBO less that of the reference, datum by datum"
        yield "log_p", self.log_p, "bound on log p(x) less that of the reference, datum by datum"
        yield "wins", self.wins, "proportion of data that are more probable than under the reference"

    def to_dict(self) -> dict[str, Any]:
        """Return the number of data and the estimates as plain numbers and strings, for JSON."""
        return {"n": self.n, **self.figures()}


def elbos(pair: Pair, x: Tensor, samples: int = 8, seed: int = 0) -> Tensor:
    """Return unbiased estimates of the ELBO of every datum from `samples` posterior samples: `(n,)`, nats, float64.

    The KL of global latents is not included, as it belongs to the data set as a whole.

    Raises:
        DataError: `x` has no rows, or `samples` is below 1.
    """
    if not len(x) or samples < 1:
        raise DataError(f"elbos: expected rows and at least one draw; got {len(x)} rows, samples={samples}.")
    x = accept(pair, x)
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    with quiet(pair, x, seed):
        for _ in range(samples):
            drawn = draw(pair, x)
            total += drawn.reconstruction - sum_over([z.log_q - z.log_p for z in drawn.latents.values()])
    return total / samples


def paired(elbo: Tensor, other: Tensor, log_p: Tensor | None = None, other_log_p: Tensor | None = None) -> Paired:
    r"""Return the mean paired differences between a run and a reference, with standard errors over the data.

    The mean of d_i = a_i - b_i has the standard error sd(d) / sqrt(n), which covers the choice of data and the Monte
    Carlo noise. The variation between easy and hard data cancels, so that it is far smaller than that of either mean.

    Arguments:
        elbo: ELBO of every datum under the run, `(n,)`, nats.
        other: ELBO of the same data under the reference, `(n,)`, nats.
        log_p: bounds on log p(x) under the run, of these data or of a subset, `(m,)`, nats.
        other_log_p: bounds on log p(x) of the same `m` data under the reference.

    Raises:
        DataError: the numbers of data of the two runs differ, or are below two.
    """
    if len(elbo) != len(other) or len(elbo) < 2:
        raise DataError(f"paired: expected the same two or more data of both runs; got {len(elbo)} and {len(other)}.")
    bound = None
    if log_p is not None and other_log_p is not None:
        if len(log_p) != len(other_log_p):
            raise DataError(f"paired: expected bounds on the same data; got {len(log_p)} and {len(other_log_p)}.")
        bound = (log_p - other_log_p).double().cpu()
    difference = (elbo - other).double().cpu()
    judged = difference if bound is None else bound
    wins = (judged > 0).double() + 0.5 * (judged == 0)
    return Paired(len(elbo), over_rows(difference), None if bound is None else over_rows(bound), over_rows(wins))
