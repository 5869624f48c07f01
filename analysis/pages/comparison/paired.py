"""Two runs on the same data: differences datum by datum, and their mean."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.analysis.decompose.entry import accept, quiet
from pvae.analysis.decompose.posterior_draws import draw
from pvae.analysis.figures.estimate import Estimate, over_rows
from pvae.analysis.figures.table import Figures, Row
from pvae.errors import DataError
from pvae.pair.densities import sum_over
from pvae.pair.pair import Pair


@dataclass(frozen=True, repr=False)
class Paired(Figures):
    """Figures of a run less those of another on the same data; nats per datum, above 0 where the run is better."""

    n: int
    elbo: Estimate
    log_p: Estimate | None
    """Difference of the importance-weighted bounds; None where one of the two has none."""
    wins: Estimate
    """Proportion of the data whose bound on log p(x) (else whose ELBO) is higher; ties count half."""

    @property
    def title(self) -> str:
        return f"Paired differences, nats per datum (n = {self.n})"

    def rows(self) -> Iterator[Row]:
        yield "elbo", self.elbo, "ELBO less that of the reference, datum by datum"
        yield "log_p", self.log_p, "bound on log p(x) less that of the reference, datum by datum"
        yield "wins", self.wins, "proportion of data that are more probable than under the reference"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {"n": self.n, **self.figures()}


def elbos(pair: Pair, x: Tensor, samples: int = 8, seed: int = 0) -> Tensor:
    """Return the ELBO of every datum, the mean over `samples` samples: `(n,)`, nats, float64, an unbiased estimate.

    Global latents are left out: theirs is one KL for all data.

    Raises:
        DataError: x has no rows, or samples below 1.
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
    r"""Compare two runs datum by datum.

    The mean of d_i = a_i - b_i has the standard error sd(d) / sqrt(n), over the choice of data and Monte Carlo noise
    together: data that are hard for both runs cancel, so that it is far smaller than that of either mean.

    Arguments:
        elbo: ELBO of every datum under the run, `(n,)`, nats.
        other: under the reference.
        log_p: bounds on log p(x) under the run, of the same or of fewer data, `(m,)`, nats.
        other_log_p: under the reference.

    Raises:
        DataError: other numbers of data, or fewer than two.
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
