"""Pointwise mutual information of samples and rows, also with a part of the components left out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pvae.analysis.aggregate.components import LOG_ZERO


@dataclass(frozen=True)
class Information:
    """Pointwise mutual information log q(z_i | x_i) - log q_agg(z_i) of m samples, `(m,)`, nats."""

    lower: Tensor
    """Lower bound in expectation: the mixture consists of q(z | x_i) and the chosen components only."""
    upper: Tensor
    """Upper bound in expectation, at most log n: the chosen components represent all rows other than x_i."""
    leave_one_out: Tensor
    """Upper bound, in expectation, of the mutual information under the distribution that the data come from: the
    mixture leaves out q(z | x_i)."""
    left_out: Information | None = None
    """The same terms with one of the random groups of components after another left out, `(groups, m)` each."""

    def plus(self, other: Information) -> Information:
        """Return the sums of the terms of two samples."""
        names = ("lower", "upper", "leave_one_out")
        return Information(*(getattr(self, name) + getattr(other, name) for name in names))


def each_left_out(sums: Tensor) -> Tensor:
    """Return log sums without one group after another, `(groups, m)`, of sums by group and of the rest."""
    nothing = torch.full_like(sums[:1], LOG_ZERO)
    before = torch.cat([nothing, sums.logcumsumexp(0)[:-1]])
    after = torch.cat([sums.flip(0).logcumsumexp(0).flip(0)[1:], nothing])
    return torch.logaddexp(before, after)[:-1]
