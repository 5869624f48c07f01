"""Products of independent exponential-family distributions over concatenated values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.distributions.exponential import Members, Normals, Scorer
from pvae.distributions.exponential_codes import CertainCodes, Codes


@dataclass(frozen=True)
class Product(Members):
    """Members that are products of independent parts over concatenated values; one row of every part per member.

    Statistics and natural parameters are concatenated, log normalisers added.
    """

    parts: tuple[Members, ...]
    """Independent factors, each with the same number of members."""

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
    """Return one grid of codes with the positions of all given grids, which have the same number of states."""
    return Codes(torch.cat([part.logits for part in parts], 1), parts[0].form, normalised=True)


def product(parts: Sequence[Members]) -> Members:
    """Return the product of independent members, merged if all are diagonal normals or codes, else as `Product`."""
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
