"""Rows of data: the datum, and the covariates after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import pyro
import torch
from torch import Tensor

from pvae.component import Shape
from pvae.errors import DataError
from pvae.graph.prompts import Vocabulary
from pvae.graph.space import one_hot


@dataclass(frozen=True)
class Frame:
    """Layout of a row of data: the datum, and after it (where any are declared) the covariates.

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
