"""What model and guide know of a latent (`Site`), and how each side reaches the other (`Link`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pvae.component import Shape
from pvae.errors import DeclarationError

if TYPE_CHECKING:
    pass


OBSERVED = "x"
"""The name of the observed site, and of the data among a posterior's inputs."""
EMBEDDED: Any = {"_embedded": True}
"""Marks the site of a nearest code's row: part of the code, no latent of its own."""


def embedded(name: str) -> str:
    """The site that holds the row of a latent's nearest code; no latent can be declared by this name."""
    return f"{name}/embedded"


@dataclass(frozen=True)
class Site:
    """One latent variable of a declared graph."""

    name: str
    event: Shape
    """Shape of one sampled value."""
    features: Shape
    """Shape that children and the decoder see."""
    given: tuple[str, ...] = ()
    """Parents in the model, p(name | given)."""
    guide_given: tuple[str, ...] = (OBSERVED,)
    """Parents in the guide, q(name | guide_given)."""
    codes: int | None = None
    """Number of values of a code."""
    grid: Shape = ()
    """Shape of a grid of codes; () for a single one."""
    values: Values = "real"
    """What is sampled."""
    hard: bool = False
    """Whether a relaxed one-hot is seen as the one-hot of its largest entry, with the gradient of the relaxed one."""
    carries: bool = False
    """Whether the guide's embedding carries a gradient that the value cannot: of a nearest code."""
    has_twin: bool = True
    """Whether a relaxed latent has a discrete twin, of the same logits: unless its prior is a density of relaxed
    one-hots."""
    summed: bool = False
    """Whether the model sums it out exactly, and the guide does not sample it."""

    def see(self, value: Tensor, like: Tensor, codebook: Tensor | None = None) -> Tensor:
        """A sampled value as children and the decoder see it, `(..., *features)`: a code as its row of a table.

        Arguments:
            value: numbers `(..., *event)`; of codes, indices `(..., *grid)` or logarithms of relaxed one-hots
                `(..., *grid, K)`: integers or not says which.
            like: a tensor of the type and device wanted.
            codebook: a row for each code, `(K, embedding)`; None for one-hots.
        """
        if self.codes is None:
            return value
        if not value.is_floating_point():
            seen = one_hot(value, self.codes, like) if codebook is None else nn.functional.embedding(value, codebook)
        else:
            soft = value.exp()
            if self.hard:
                soft = one_hot(value.argmax(-1), self.codes, soft).detach() + (soft - soft.detach())
            seen = soft if codebook is None else soft @ codebook
        return seen.movedim(-1, -1 - len(self.grid)) if self.grid else seen


Values = Literal["real", "index", "binary", "relaxed"]
"""A vector of real numbers; indices of codes; a vector of 0 and 1; logarithms of relaxed one-hots."""


def one_hot(index: Tensor, codes: int, like: Tensor) -> Tensor:
    """Indices `(...)` of any type as one-hot rows `(..., codes)` of the type of another tensor."""
    return (index.unsqueeze(-1) == torch.arange(codes, device=index.device)).to(like)


def topological(parents: Mapping[str, Iterable[str]], what: str) -> list[str]:
    """Names in an order where parents come first; declaration order where the graph leaves it open.

    Raises:
        DeclarationError: the graph has a cycle; the message names its members.
    """
    order: list[str] = []
    waiting = {name: [p for p in above if p in parents] for name, above in parents.items()}
    while waiting:
        ready = [name for name, above in waiting.items() if all(p in order for p in above)]
        if not ready:
            raise DeclarationError(
                f"{what}: expected an acyclic graph; got a cycle among {', '.join(sorted(waiting))}. "
                f"Remove one of their `given` entries."
            )
        order.append(ready[0])
        del waiting[ready[0]]
    return order
