"""Spaces of latent variables: real vectors, codes on a grid, and bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from pvae.component import Shape

Values = Literal["real", "index", "binary", "relaxed"]
"""A vector of real numbers; indices of codes; a vector of 0 and 1; logarithms of relaxed one-hots."""


@dataclass(frozen=True)
class Space:
    """Values that a latent variable takes, and the features by which children and the decoder see them."""

    values: Values
    """The form of a sampled value."""
    shape: Shape
    """Elements: `(D,)` of a real vector or of bits, the grid of codes."""
    states: int = 0
    """Values of one element: K of a code, 2 of a bit, 0 of a real number."""
    embedding: int | None = None
    """Width of the row of a codebook by which a code is seen; None for a one-hot."""
    is_hard: bool = False
    """True where a relaxed one-hot is seen as the one-hot of its largest entry, with its own gradient."""

    @classmethod
    def real(cls, dim: int) -> Space:
        """Return the space of real vectors `(dim,)`."""
        return cls("real", (dim,))

    @classmethod
    def bits(cls, count: int) -> Space:
        """Return the space of vectors of 0 and 1, `(count,)`."""
        return cls("binary", (count,), 2)

    @classmethod
    def codes(cls, states: int, grid: Shape = (), embedding: int | None = None) -> Space:
        """Return the space of codes 0 .. `states` - 1 at every position of a grid."""
        return cls("index", tuple(grid), states, embedding)

    def relaxed(self, is_hard: bool) -> Space:
        """Return the space of the relaxed one-hots of these codes."""
        return replace(self, values="relaxed", is_hard=is_hard)

    @property
    def is_code(self) -> bool:
        """True for codes, relaxed or not."""
        return self.values in ("index", "relaxed")

    @property
    def grid(self) -> Shape:
        """Grid of codes; () for a single one, and for vectors."""
        return self.shape if self.is_code else ()

    @property
    def event(self) -> Shape:
        """Shape of one sampled value."""
        return (*self.shape, self.states) if self.values == "relaxed" else self.shape

    @property
    def features(self) -> Shape:
        """Shape that children and the decoder see."""
        return (self.embedding or self.states, *self.shape) if self.is_code else self.shape

    @property
    def log_states(self) -> float:
        """Logarithm of the number of joint states; infinite for real vectors."""
        return prod(self.shape) * math.log(self.states) if self.states else math.inf

    def see(self, value: Tensor, like: Tensor, codebook: Tensor | None = None) -> Tensor:
        """Return a sampled value as children and the decoder see it, `(..., *features)`.

        Arguments:
            value: numbers `(..., *event)`; of codes, indices `(..., *grid)` or logarithms of relaxed one-hots
                `(..., *grid, K)`: integers or not says which.
            like: a tensor of the type and device wanted.
            codebook: a row for each code, `(K, embedding)`; None for one-hots.
        """
        if not self.is_code:
            return value
        if not value.is_floating_point():
            seen = one_hot(value, self.states, like) if codebook is None else nn.functional.embedding(value, codebook)
        else:
            soft = value.exp()
            if self.is_hard:
                soft = one_hot(value.argmax(-1), self.states, soft).detach() + (soft - soft.detach())
            seen = soft if codebook is None else soft @ codebook
        return seen.movedim(-1, -1 - len(self.shape)) if self.shape else seen


def one_hot(index: Tensor, codes: int, like: Tensor) -> Tensor:
    """Return indices `(...)` of any type as one-hot rows `(..., codes)` of the type of another tensor."""
    return (index.unsqueeze(-1) == torch.arange(codes, device=index.device)).to(like)
