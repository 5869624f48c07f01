"""What model and guide know of a latent (`Site`), and how each side reaches the other (`Link`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Shape
from pvae.errors import DataError, DeclarationError
from pvae.graph.prompts import Vocabulary

if TYPE_CHECKING:
    from pvae.guides.graph import GraphGuide
    from pvae.models.graph import GraphModel

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


@dataclass(frozen=True)
class Frame:
    """What one row of data holds: the datum, and after it (where any are declared) the covariates.

    A row with covariates is one vector: the datum flattened, then the numbers of each covariate: one for a label, one
    for each token of a prompt.
    """

    x: Shape
    """Event shape of the datum."""
    covariates: Mapping[str, int] = field(default_factory=dict)
    """Number of values of every covariate, or of each of its tokens."""
    prompts: Mapping[str, Vocabulary] = field(default_factory=dict)
    """The vocabularies of those that are prompts."""

    @property
    def row(self) -> Shape:
        """Event shape of a row."""
        return (prod(self.x) + sum(self.widths),) if self.covariates else self.x

    @property
    def widths(self) -> list[int]:
        """Numbers that every covariate takes of a row."""
        return [self.prompts[name].length if name in self.prompts else 1 for name in self.covariates]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Event shapes by which parts of a pair see the covariates: one-hots, of a prompt one for each token."""
        return {
            name: (codes, self.prompts[name].length) if name in self.prompts else (codes,)
            for name, codes in self.covariates.items()
        }

    def columns(self, rows: Tensor) -> dict[str, Tensor]:
        """The covariates of rows `(..., *row)`: labels `(...)`, prompts `(..., length)`."""
        if not self.covariates:
            return {}
        parts = rows[..., prod(self.x) :].split(self.widths, -1)
        return {
            name: part if name in self.prompts else part.squeeze(-1)
            for name, part in zip(self.covariates, parts, strict=True)
        }

    def split(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Rows `(..., *row)` to the data `(..., *x)` and the covariates as `shapes` says."""
        if not self.covariates:
            return rows, {}
        seen = {}
        for name, column in self.columns(rows).items():
            hot = one_hot(column, self.covariates[name], rows)
            seen[name] = hot.movedim(-1, -2) if name in self.prompts else hot
        return rows[..., : prod(self.x)].reshape(*rows.shape[:-1], *self.x), seen

    def join(self, x: Tensor, rows: Tensor) -> Tensor:
        """Rows `(n, *row)` with other data `(n, *x)` and their own covariates."""
        return torch.cat([x.reshape(len(rows), -1).to(rows), rows[:, prod(self.x) :]], 1) if self.covariates else x

    def require(self, rows: Tensor) -> None:
        """Refuse rows whose covariates are no numbers 0 .. codes - 1.

        Raises:
            DataError: naming the covariate and what was found.
        """
        for name, column in self.columns(rows).items():
            codes = self.covariates[name]
            wrong = column[(column != column.round()) | (column < 0) | (column >= codes)]
            if len(wrong):
                raise DataError(
                    f"{name}: expected integers 0 .. {codes - 1} in the last column of x; got {float(wrong[0]):g}."
                )

    def groups(self, rows: Tensor) -> Tensor | None:
        """The joint value of the covariates of every row, numbered, `(n,)`; None where there are none."""
        if not self.covariates:
            return None
        number = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for name, column in self.columns(rows).items():
            for token in column.long().reshape(len(rows), -1).unbind(-1):
                number = number * self.covariates[name] + token
        return number


@lru_cache(maxsize=16)
def data_plate(count: int) -> pyro.plate:
    """The plate over the rows of a batch, dim -1; making one costs as much as a layer, so it is made once."""
    return pyro.plate("data", count, dim=-1)


class Link:
    """Gives one side of a pair the other at run time; not a Module, so nothing is registered twice."""

    model: GraphModel
    guide: GraphGuide
    frame: Frame
    """What a row of data holds."""
    support: constraints.Constraint = constraints.real
    """Values that an element of a datum may take."""
    building: bool = False
    """Whether the pair is being made: parts made of data have none yet."""

    @property
    def x(self) -> Shape:
        """Event shape of a datum."""
        return self.frame.x


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
