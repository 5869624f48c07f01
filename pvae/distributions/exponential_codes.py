"""Exponential-family members over grids of discrete codes, categorical and deterministic, and products of members."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pvae.distributions.exponential import Members, Normals, Scorer

IMPOSSIBLE = -1e30
"""Finite stand-in for the log of probability zero, because 0 * -inf is NaN in a product."""
SPARSE_STATES = 8
"""Number of states K from which summing selected rows is faster than a product with one-hots."""
ROW_COST = 16
"""Cost of adding one selected row entry, in multiplications of a matrix product."""
Form = Literal["index", "one_hot", "log_one_hot"]


def one_hots(index: Tensor, states: int) -> Tensor:
    """Return code indices `(m, P)` as one-hots `(m, P K)`, int64; those out of range as the nearest code."""
    return torch.nn.functional.one_hot(index.long().clamp(0, states - 1), states).flatten(1)


class Grids:
    """Sizes of members over grids of P codes, each one of K states."""

    tensors: ClassVar[tuple[str, ...]]
    states: Any
    """Number of codes at each position, K."""

    @property
    def positions(self) -> int:
        """Number of positions of the grid, P."""
        return getattr(self, self.tensors[0]).shape[1]

    @property
    def features(self) -> int:
        """Width F of the sufficient statistics."""
        return self.positions * self.states


class Codes(Grids, Members):
    """Batch of grids of P independent categoricals over K states: T(z) = one-hot, eta = log probabilities.

    `form` is the encoding of a flat value: P indices (0 and 1 of a Bernoulli too), P x K one-hots, or their logarithms.
    """

    tensors = ("logits",)
    logits: Tensor
    """Log probabilities, `(n, P, K)`; normalised, and clamped to finite values, on construction."""
    form: Form = "index"
    """Encoding of a flat value: "index" (P indices), "one_hot" (P x K) or its logarithm, "log_one_hot"."""
    normalised: bool = False
    """True if the logits given are already normalised and finite."""

    def __post_init__(self) -> None:
        if not self.normalised:
            object.__setattr__(self, "logits", self.logits.log_softmax(-1).clamp(min=IMPOSSIBLE))
            object.__setattr__(self, "normalised", True)

    @property
    def states(self) -> int:
        """Number of codes at each position, K."""
        return self.logits.shape[2]

    @property
    def dim(self) -> int:
        return self.positions if self.form == "index" else self.features

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
        if self.form == "index":
            return one_hots(value, self.states).to(self.logits)
        return value if self.form == "one_hot" else value.exp()

    def scorer(self) -> Scorer:
        if not self.is_sparse:
            return super().scorer()
        eta = self.logits.flatten(1).T.contiguous()
        first = self.states * torch.arange(self.positions, device=eta.device)

        def score(value: Tensor, out: Tensor) -> None:
            at = value.long().clamp(0, self.states - 1) + first
            out.copy_(torch.nn.functional.embedding_bag(at, eta, mode="sum"))

        return score

    def log_prob(self, value: Tensor) -> Tensor:
        if self.form != "index":
            return (self.logits.flatten(1) * self.statistics(value, self.origin)).sum(-1)
        index = value.long().unsqueeze(-1)
        shape = torch.broadcast_shapes(index.shape[:-1], self.logits.shape[:-1])
        return self.logits.expand(*shape, self.states).gather(-1, index.expand(*shape, 1)).squeeze(-1).sum(-1)

    def sample(self) -> Tensor:
        return self.write((self.logits - torch.empty_like(self.logits).exponential_().log()).argmax(-1))

    def write(self, index: Tensor) -> Tensor:
        """Return code indices `(m, P)` in the encoding of flat values, `(m, D)`."""
        value = (index if self.form == "index" else one_hots(index, self.states)).to(self.logits)
        return torch.where(value > 0, 0.0, IMPOSSIBLE).to(value) if self.form == "log_one_hot" else value

    def map(self, change: Any) -> "Codes":
        changed = change(self.logits)
        return self if changed is self.logits else Codes(changed, self.form)


class CertainCodes(Grids, Members):
    """Batch of deterministic grids of P codes: each member has probability 1 at one joint code, 0 elsewhere.

    As a family it is `Codes` with log probabilities 0 and `IMPOSSIBLE`; mixtures of it are scored by counting.
    """

    tensors = ("index",)
    index: Tensor
    """Codes of every member, `(n, P)`, int64."""
    states: int
    """Number of codes at each position, K."""

    @property
    def dim(self) -> int:
        return self.positions

    work = dim

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
        return one_hots(value, self.states).double()

    def scorer(self) -> Scorer:
        return self.codes().scorer()

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where((value.long() == self.index).all(-1), 0.0, IMPOSSIBLE).double()

    def sample(self) -> Tensor:
        return self.index.double()

    def write(self, index: Tensor) -> Tensor:
        """Return code indices `(m, P)` in the encoding of flat values, `(m, D)`."""
        return index.double()

    def map(self, change: Any) -> "CertainCodes":
        return CertainCodes(change(self.index).long(), self.states)


def total(name: str) -> Any:
    """Return a property of a product: the sum of the property `name` of its parts."""
    return property(lambda members: sum(getattr(part, name) for part in members.parts))


class Product(Members):
    """Members that are products of independent parts over concatenated values; one row of every part per member.

    Statistics and natural parameters are concatenated, log normalisers added.
    """

    parts: tuple[Members, ...]
    """Independent factors, each with the same number of members."""

    def __len__(self) -> int:
        return len(self.parts[0])

    dim, features, numbers, work = map(total, ("dim", "features", "numbers", "work"))

    def rows(self, index: slice | Tensor) -> "Product":
        return Product(tuple(part.rows(index) for part in self.parts))

    @property
    def origin(self) -> Tensor:
        return torch.cat([part.origin for part in self.parts])

    def split(self, value: Tensor) -> tuple[Tensor, ...]:
        """Return flat values `(..., D)` split into the values of every part."""
        return value.split([part.dim for part in self.parts], -1)

    def natural(self) -> tuple[Tensor, Tensor]:
        etas, constants = zip(*(part.natural() for part in self.parts), strict=True)
        return torch.cat(etas), torch.stack(constants).sum(0)

    def statistics(self, value: Tensor, origin: Tensor) -> Tensor:
        pieces = zip(self.parts, self.split(value), self.split(origin), strict=True)
        return torch.cat([part.statistics(z, at) for part, z, at in pieces], 1)

    def scorer(self) -> Scorer:
        first, *rest = (part.scorer() for part in self.parts)

        def score(value: Tensor, out: Tensor) -> None:
            head, *others = self.split(value)
            first(head, out)
            for part, z in zip(rest, others, strict=True):
                more = torch.empty_like(out, memory_format=torch.contiguous_format)
                part(z, more)
                out += more

        return score

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.stack([part.log_prob(z) for part, z in zip(self.parts, self.split(value), strict=True)]).sum(0)

    def sample(self) -> Tensor:
        return torch.cat([part.sample() for part in self.parts], 1)

    def joined(self, others: Sequence["Product"]) -> "Product":
        if not others:
            return self
        columns = zip(*(p.parts for p in others), strict=True)
        return Product(tuple(part.joined(rest) for part, rest in zip(self.parts, columns, strict=True)))

    def map(self, change: Any) -> "Product":
        return Product(tuple(part.map(change) for part in self.parts))


def product(parts: Sequence[Any]) -> Members:
    """Return the product of independent members, merged if all are diagonal normals or codes, else as `Product`."""
    if len(parts) == 1:
        return parts[0]
    if (kinds := {type(part) for part in parts}) == {Normals}:
        return Normals(torch.cat([p.loc for p in parts], 1), torch.cat([p.scale for p in parts], 1))
    if kinds == {Codes} and len({(p.form, p.states) for p in parts}) == 1:
        return Codes(torch.cat([p.logits for p in parts], 1), parts[0].form, normalised=True)
    if kinds == {CertainCodes}:
        return CertainCodes(torch.cat([p.index for p in parts], 1), max(p.states for p in parts))
    return Product(tuple(parts))
