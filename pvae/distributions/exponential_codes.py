"""Exponential-family members over grids of discrete codes: categorical and deterministic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pvae.distributions.exponential import Members, Scorer, product_scorer

IMPOSSIBLE = -1e30
"""Finite stand-in for the log of probability zero, because 0 * -inf is NaN in a product."""
SPARSE_STATES = 8
"""Number of states K from which summing selected rows is faster than a product with one-hots."""
ROW_COST = 16
"""Cost of adding one selected row entry, in multiplications of a matrix product."""
Form = Literal["index", "one_hot"]


@dataclass(frozen=True)
class Codes(Members):
    """Batch of grids of P independent categoricals over K states: T(z) = one-hot, eta = log probabilities.

    `form` is the encoding of a flat value: P indices (also 0 and 1 of a Bernoulli), or P x K one-hots.
    """

    tensors = ("logits",)
    logits: Tensor
    """Log probabilities, `(n, P, K)`; normalised, and clamped to finite values, on construction."""
    form: Form = "index"
    """Encoding of a flat value: "index" (P indices) or "one_hot" (P x K)."""
    normalised: bool = False
    """True if the logits given are already normalised and finite."""

    def __post_init__(self) -> None:
        if not self.normalised:
            object.__setattr__(self, "logits", self.logits.log_softmax(-1).clamp(min=IMPOSSIBLE))
            object.__setattr__(self, "normalised", True)

    @property
    def positions(self) -> int:
        """Number of positions of the grid, P."""
        return self.logits.shape[1]

    @property
    def states(self) -> int:
        """Number of codes at each position, K."""
        return self.logits.shape[2]

    @property
    def dim(self) -> int:
        return self.positions if self.form == "index" else self.features

    @property
    def features(self) -> int:
        return self.positions * self.states

    @property
    def numbers(self) -> int:
        return self.features

    @property
    def work(self) -> int:
        return self.positions * ROW_COST if self.is_sparse else self.features

    @property
    def is_sparse(self) -> bool:
        """True if log densities are computed by summing selected rows of the natural parameters."""
        return self.form == "index" and self.states >= SPARSE_STATES

    @property
    def origin(self) -> Tensor:
        return self.logits.new_zeros(self.dim)

    def natural(self) -> tuple[Tensor, Tensor]:
        return self.logits.flatten(1).T, self.logits.new_zeros(len(self))

    def statistics(self, value: Tensor, origin: Tensor) -> Tensor:
        if self.form == "one_hot":
            return value
        index = value.long().clamp(0, self.states - 1)
        return torch.nn.functional.one_hot(index, self.states).to(self.logits).flatten(1)

    def scorer(self) -> Scorer:
        if not self.is_sparse:
            return product_scorer(self)
        eta = self.logits.flatten(1).T.contiguous()
        first = self.states * torch.arange(self.positions, device=eta.device)

        def score(value: Tensor, out: Tensor) -> None:
            at = value.long().clamp(0, self.states - 1) + first
            out.copy_(torch.nn.functional.embedding_bag(at, eta, mode="sum"))

        return score

    def log_prob(self, value: Tensor) -> Tensor:
        if self.form == "one_hot":
            return (self.logits.flatten(1) * value).sum(-1)
        index = value.long().unsqueeze(-1)
        shape = torch.broadcast_shapes(index.shape[:-1], self.logits.shape[:-1])
        logits = self.logits.expand(*shape, self.states)
        return logits.gather(-1, index.expand(*shape, 1)).squeeze(-1).sum(-1)

    def sample(self) -> Tensor:
        gumbel = -torch.empty_like(self.logits).exponential_().log()
        return self.write((self.logits + gumbel).argmax(-1))

    def write(self, index: Tensor) -> Tensor:
        """Return code indices `(m, P)` in the encoding of flat values, `(m, D)`."""
        if self.form == "index":
            return index.to(self.logits)
        return torch.nn.functional.one_hot(index, self.states).to(self.logits).flatten(1)

    def map(self, change: Any) -> Codes:
        changed = change(self.logits)
        return self if changed is self.logits else Codes(changed, self.form)


@dataclass(frozen=True)
class CertainCodes(Members):
    """Batch of deterministic grids of P codes: each member has probability 1 at one joint code, 0 elsewhere.

    As a family it is `Codes` with log probabilities 0 and `IMPOSSIBLE`; mixtures of it are scored by counting.
    """

    tensors = ("index",)
    index: Tensor
    """Codes of every member, `(n, P)`, int64."""
    states: int
    """Number of codes at each position, K."""

    @property
    def positions(self) -> int:
        """Number of positions of the grid, P."""
        return self.index.shape[1]

    @property
    def dim(self) -> int:
        return self.positions

    @property
    def features(self) -> int:
        return self.positions * self.states

    @property
    def numbers(self) -> int:
        return self.positions

    @property
    def work(self) -> int:
        return self.positions

    @property
    def origin(self) -> Tensor:
        return torch.zeros(self.dim, dtype=torch.float64, device=self.index.device)

    def codes(self) -> Codes:
        """Return the same members as categoricals (`Codes`) with log probabilities in float64."""
        hit = self.index.unsqueeze(-1) == torch.arange(self.states, device=self.index.device)
        return Codes(torch.where(hit, 0.0, IMPOSSIBLE).double())

    def natural(self) -> tuple[Tensor, Tensor]:
        return self.codes().natural()

    def statistics(self, value: Tensor, origin: Tensor) -> Tensor:
        index = value.long().clamp(0, self.states - 1)
        return torch.nn.functional.one_hot(index, self.states).flatten(1).double()

    def scorer(self) -> Scorer:
        return self.codes().scorer()

    def log_prob(self, value: Tensor) -> Tensor:
        same = (value.long() == self.index).all(-1)
        return torch.where(same, 0.0, IMPOSSIBLE).double()

    def sample(self) -> Tensor:
        return self.index.double()

    def write(self, index: Tensor) -> Tensor:
        """Return code indices `(m, P)` in the encoding of flat values, `(m, D)`."""
        return index.double()

    def map(self, change: Any) -> CertainCodes:
        return CertainCodes(change(self.index).long(), self.states)
