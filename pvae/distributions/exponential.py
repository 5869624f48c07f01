"""Many distributions of one exponential family at once: sufficient statistics, natural parameters, densities.

log q_i(z) = <T(z), eta_i> - A(eta_i), so the density of m points under n members is one matrix product. A mixture of
posteriors (aggregated posterior, learned mixtures as priors) is scored this way, whatever the family. One-hot
statistics pick one row of the parameters for each position: there the product is a sum of rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import pyro.distributions as dist
import torch
from torch import Tensor

IMPOSSIBLE = -1e30
"""The logarithm of a probability of zero: finite, because 0 * -inf is NaN in a product."""
SPARSE = 8
"""States from which a sum of rows is quicker than the product with one-hots."""
ROW_COST = 16
"""Multiplications of a matrix product that take as long as one number in a sum of rows."""
Scorer = Callable[[Tensor, Tensor], None]
"""Writes log q_j(z_i) of `(m, D)` values into a tile `(m, n)`."""


class Members(ABC):
    """n members of one exponential family over flat values `(..., D)`."""

    @abstractmethod
    def __len__(self) -> int:
        """n."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """D, the width of a flat value."""

    @property
    @abstractmethod
    def features(self) -> int:
        """F, the width of the sufficient statistics."""

    @property
    @abstractmethod
    def numbers(self) -> int:
        """How many numbers hold the parameters of one member."""

    @property
    @abstractmethod
    def work(self) -> int:
        """Multiplications of one density, or what takes as long."""

    @abstractmethod
    def rows(self, index: slice | Tensor) -> Self:
        """Some of the members."""

    @abstractmethod
    def natural(self) -> tuple[Tensor, Tensor]:
        """eta `(F, n)` and -A(eta) `(n,)`, relative to `origin`."""

    @property
    @abstractmethod
    def origin(self) -> Tensor:
        """Point `(D,)` from which the statistics are taken: near the members, so that less cancels."""

    @abstractmethod
    def statistics(self, value: Tensor, origin: Tensor) -> Tensor:
        """T(z) of `(m, D)` values, `(m, F)`."""

    @abstractmethod
    def scorer(self) -> Scorer:
        """What writes log densities of values under all members, nats; natural parameters are made once for it."""

    @abstractmethod
    def log_prob(self, value: Tensor) -> Tensor:
        """log q_i(z_i) of `(..., n, D)`, each value under its own member, `(..., n)`, nats; without cancellation."""

    @abstractmethod
    def sample(self) -> Tensor:
        """One draw of every member, `(n, D)`."""

    @abstractmethod
    def joined(self, others: Sequence[Any]) -> Self:
        """These members, then those of others of the same kind."""

    def double(self) -> Self:
        """The same in float64."""
        return self.map(lambda t: t.double())

    @abstractmethod
    def map(self, change: Any) -> Self:
        """The same with a function applied to every parameter."""


def product_scorer(members: Members) -> Scorer:
    """The matrix product of sufficient statistics and natural parameters."""
    (eta, constant), origin = members.natural(), members.origin

    def score(value: Tensor, out: Tensor) -> None:
        statistics = members.statistics(value, origin)
        if out.is_contiguous():
            torch.addmm(constant, statistics, eta, out=out)
        else:
            out.copy_(torch.addmm(constant, statistics, eta))

    return score


@dataclass(frozen=True)
class Normals(Members):
    """N(loc_i, diag scale_i^2): T(z) = (z^2, z), eta = (-1 / 2 s^2, m / s^2)."""

    loc: Tensor
    """`(n, D)`."""
    scale: Tensor
    """`(n, D)`."""

    def __len__(self) -> int:
        return len(self.loc)

    @property
    def dim(self) -> int:
        return self.loc.shape[1]

    @property
    def features(self) -> int:
        return 2 * self.dim

    @property
    def numbers(self) -> int:
        return 2 * self.dim

    @property
    def work(self) -> int:
        return self.features

    def rows(self, index: slice | Tensor) -> Normals:
        return Normals(self.loc[index], self.scale[index])

    @property
    def origin(self) -> Tensor:
        return self.loc.mean(0)

    def natural(self) -> tuple[Tensor, Tensor]:
        precision, loc = self.scale**-2, self.loc - self.origin
        normaliser = 0.5 * (loc**2 * precision).sum(1) + self.scale.log().sum(1)
        eta = torch.cat([-0.5 * precision, loc * precision], 1).T
        return eta, -normaliser - 0.5 * self.dim * math.log(2 * math.pi)

    def statistics(self, value: Tensor, origin: Tensor) -> Tensor:
        z = value - origin
        return torch.cat([z * z, z], 1)

    def scorer(self) -> Scorer:
        return product_scorer(self)

    def log_prob(self, value: Tensor) -> Tensor:
        return dist.Normal(self.loc, self.scale, validate_args=False).log_prob(value).sum(-1)

    def sample(self) -> Tensor:
        return torch.normal(self.loc, self.scale)

    def joined(self, others: Sequence[Normals]) -> Normals:
        parts = [self, *others]
        return Normals(torch.cat([p.loc for p in parts]), torch.cat([p.scale for p in parts]))

    def map(self, change: Any) -> Normals:
        return Normals(change(self.loc), change(self.scale))


@dataclass(frozen=True)
class FullRankNormals(Members):
    """N(loc_i, L_i L_i^T): T(z) = (z_a z_b for a <= b, z), eta = (-P_ab (halved where a = b), P m), P the precision."""

    loc: Tensor
    """`(n, D)`."""
    scale_tril: Tensor
    """Lower triangular L, `(n, D, D)`."""

    def __len__(self) -> int:
        return len(self.loc)

    @property
    def dim(self) -> int:
        return self.loc.shape[1]

    @property
    def scale(self) -> Tensor:
        """Standard deviation of every coordinate, `(n, D)`."""
        return self.scale_tril.square().sum(-1).sqrt()

    @property
    def features(self) -> int:
        return self.dim * (self.dim + 1) // 2 + self.dim

    @property
    def numbers(self) -> int:
        return self.dim * (self.dim + 1)

    @property
    def work(self) -> int:
        return self.features

    def rows(self, index: slice | Tensor) -> FullRankNormals:
        return FullRankNormals(self.loc[index], self.scale_tril[index])

    @property
    def origin(self) -> Tensor:
        return self.loc.mean(0)

    def _upper(self) -> Tensor:
        return torch.triu_indices(self.dim, self.dim, device=self.loc.device)

    def natural(self) -> tuple[Tensor, Tensor]:
        precision, loc = torch.cholesky_inverse(self.scale_tril), self.loc - self.origin
        slope = (precision @ loc[..., None])[..., 0]
        halved = precision - 0.5 * torch.diag_embed(precision.diagonal(dim1=-2, dim2=-1))
        a, b = self._upper()
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        normaliser = 0.5 * (slope * loc).sum(1) + log_det
        eta = torch.cat([-halved[:, a, b], slope], 1).T
        return eta, -normaliser - 0.5 * self.dim * math.log(2 * math.pi)

    def statistics(self, value: Tensor, origin: Tensor) -> Tensor:
        z = value - origin
        a, b = self._upper()
        return torch.cat([z[:, a] * z[:, b], z], 1)

    def scorer(self) -> Scorer:
        return product_scorer(self)

    def log_prob(self, value: Tensor) -> Tensor:
        q = dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False)
        return q.log_prob(value)

    def sample(self) -> Tensor:
        return self.loc + (self.scale_tril @ torch.randn_like(self.loc)[..., None])[..., 0]

    def joined(self, others: Sequence[FullRankNormals]) -> FullRankNormals:
        parts = [self, *others]
        return FullRankNormals(torch.cat([p.loc for p in parts]), torch.cat([p.scale_tril for p in parts]))

    def map(self, change: Any) -> FullRankNormals:
        return FullRankNormals(change(self.loc), change(self.scale_tril))


Form = Literal["index", "one_hot"]


@dataclass(frozen=True)
class Codes(Members):
    """A grid of P independent categoricals over K states: T(z) = one-hot, eta = log probabilities.

    `form` says how a value is written: P indices (also 0 and 1 of a Bernoulli), or P x K one-hots.
    """

    logits: Tensor
    """Log probabilities, `(n, P, K)`; made normalised and finite."""
    form: Form = "index"
    normalised: bool = False
    """Whether the logits given are normalised and finite already."""

    def __post_init__(self) -> None:
        if not self.normalised:
            object.__setattr__(self, "logits", self.logits.log_softmax(-1).clamp(min=IMPOSSIBLE))
            object.__setattr__(self, "normalised", True)

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def positions(self) -> int:
        """P."""
        return self.logits.shape[1]

    @property
    def states(self) -> int:
        """K."""
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
        """Whether values are scored by a sum of rows."""
        return self.form == "index" and self.states >= SPARSE

    def rows(self, index: slice | Tensor) -> Codes:
        return Codes(self.logits[index], self.form, normalised=True)

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
        """State indices `(m, P)` as flat values `(m, D)`."""
        if self.form == "index":
            return index.to(self.logits)
        return torch.nn.functional.one_hot(index, self.states).to(self.logits).flatten(1)

    def joined(self, others: Sequence[Codes]) -> Codes:
        return Codes(torch.cat([self.logits, *(p.logits for p in others)]), self.form, normalised=True)

    def map(self, change: Any) -> Codes:
        changed = change(self.logits)
        return self if changed is self.logits else Codes(changed, self.form)


@dataclass(frozen=True)
class CertainCodes(Members):
    """A grid of P codes known for certain: probability 1 of one joint code, 0 of all others.

    As a family it is `Codes` with log probabilities 0 and `IMPOSSIBLE`; a mixture of them is counted, not multiplied.
    """

    index: Tensor
    """`(n, P)`, int64."""
    states: int
    """K."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def positions(self) -> int:
        """P."""
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

    def rows(self, index: slice | Tensor) -> CertainCodes:
        return CertainCodes(self.index[index], self.states)

    @property
    def origin(self) -> Tensor:
        return torch.zeros(self.dim, dtype=torch.float64, device=self.index.device)

    def codes(self) -> Codes:
        """The same as probabilities, float64."""
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
        """State indices `(m, P)` as flat values `(m, D)`."""
        return index.double()

    def joined(self, others: Sequence[CertainCodes]) -> CertainCodes:
        return CertainCodes(torch.cat([self.index, *(p.index for p in others)]), self.states)

    def map(self, change: Any) -> CertainCodes:
        return CertainCodes(change(self.index).long(), self.states)


@dataclass(frozen=True)
class Product(Members):
    """Independent parts side by side: statistics and natural parameters are joined, normalisers added."""

    parts: tuple[Members, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def dim(self) -> int:
        return sum(part.dim for part in self.parts)

    @property
    def features(self) -> int:
        return sum(part.features for part in self.parts)

    @property
    def numbers(self) -> int:
        return sum(part.numbers for part in self.parts)

    @property
    def work(self) -> int:
        return sum(part.work for part in self.parts)

    def rows(self, index: slice | Tensor) -> Product:
        return Product(tuple(part.rows(index) for part in self.parts))

    @property
    def origin(self) -> Tensor:
        return torch.cat([part.origin for part in self.parts])

    def split(self, value: Tensor) -> tuple[Tensor, ...]:
        """A flat value's part for every part."""
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
        pieces = zip(self.parts, self.split(value), strict=True)
        return torch.stack([part.log_prob(z) for part, z in pieces]).sum(0)

    def sample(self) -> Tensor:
        return torch.cat([part.sample() for part in self.parts], 1)

    def joined(self, others: Sequence[Product]) -> Product:
        if not others:
            return self
        columns = zip(*(p.parts for p in others), strict=True)
        return Product(tuple(part.joined(rest) for part, rest in zip(self.parts, columns, strict=True)))

    def map(self, change: Any) -> Product:
        return Product(tuple(part.map(change) for part in self.parts))


def _side_by_side(parts: Sequence[Codes]) -> Codes:
    """Grids of the same states as one of all their positions."""
    return Codes(torch.cat([part.logits for part in parts], 1), parts[0].form, normalised=True)


def product(parts: Sequence[Members]) -> Members:
    """One part as it is, diagonal normals and certain codes as one, several kinds as a `Product`."""
    if all(isinstance(part, Normals) for part in parts):
        normals = [part for part in parts if isinstance(part, Normals)]
        return Normals(torch.cat([p.loc for p in normals], 1), torch.cat([p.scale for p in normals], 1))
    if all(isinstance(part, Codes) for part in parts):
        codes = [part for part in parts if isinstance(part, Codes)]
        if len({(p.form, p.states) for p in codes}) == 1:
            return codes[0] if len(codes) == 1 else _side_by_side(codes)
    if all(isinstance(part, CertainCodes) for part in parts):
        certain = [part for part in parts if isinstance(part, CertainCodes)]
        return CertainCodes(torch.cat([p.index for p in certain], 1), max(p.states for p in certain))
    return parts[0] if len(parts) == 1 else Product(tuple(parts))
