"""Sample spaces of latent variables: real vectors, grids of discrete codes, and vectors of bits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from pvae.component import Shape

Values = Literal["real", "index", "binary", "relaxed"]
"""Form of a sampled value: a real vector, indices of codes, a vector of 0 and 1, or log relaxed one-hots."""


@dataclass(frozen=True)
class Space:
    """Sample space of a latent variable, and the features that child priors and the decoder receive as input."""

    values: Values
    """Form of a sampled value: "real", "index", "binary" or "relaxed"."""
    shape: Shape
    """Shape of the elements: `(D,)` of a real vector or of bits, the shape of the grid of codes."""
    states: int = 0
    """Number of values of one element: K of a code, 2 of a bit, 0 for a real number."""
    embedding: int | None = None
    """Width of the codebook vectors that stand for codes in features; None if features are one-hots."""
    is_hard: bool = False
    """True for straight-through features: the one-hot of the largest entry, with the relaxed value's gradient."""

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
        """Return the space of codes 0 .. `states` - 1 at every position of a grid, a single code by default."""
        return cls("index", tuple(grid), states, embedding)

    def relaxed(self, is_hard: bool) -> Space:
        """Return the space of the relaxed one-hots of these codes."""
        return replace(self, values="relaxed", is_hard=is_hard)

    @property
    def is_code(self) -> bool:
        """True for discrete codes, relaxed or not; False for real vectors and bits."""
        return self.values in ("index", "relaxed")

    @property
    def grid(self) -> Shape:
        """Shape of the grid of codes; () for a single code, a real vector or bits."""
        return self.shape if self.is_code else ()

    @property
    def event(self) -> Shape:
        """Event shape of one sampled value; with a last dimension K if relaxed."""
        return (*self.shape, self.states) if self.values == "relaxed" else self.shape

    @property
    def features(self) -> Shape:
        """Event shape of the features that child priors and the decoder receive; of codes, channels first."""
        return (self.embedding or self.states, *self.shape) if self.is_code else self.shape

    @property
    def log_states(self) -> float:
        """Logarithm of the number of joint states, nats; infinite for real vectors."""
        return prod(self.shape) * math.log(self.states) if self.states else math.inf

    def see(self, value: Tensor, like: Tensor, codebook: Tensor | None = None) -> Tensor:
        """Return the features of a sampled value that child priors and the decoder receive, `(..., *features)`.

        Arguments:
            value: sampled values `(..., *event)`; of codes, indices `(..., *grid)` if of an integer type, else
                logarithms of relaxed one-hots `(..., *grid, K)`.
            like: a tensor of the type and device wanted.
            codebook: one vector for each code, `(K, embedding)`; None for one-hots.
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
    """Return one-hot vectors `(..., codes)` of indices `(...)`, with the type and device of the tensor `like`."""
    return (index.unsqueeze(-1) == torch.arange(codes, device=index.device)).to(like)
