"""Layout of a row of data: the data point x, then the covariates that model and guide are conditioned on."""

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
    """Layout of a row of data: the data point x, followed by the covariates if any are declared.

    A row with covariates is one vector: x flattened, then the entries of each covariate: one integer for a label, one
    for each token of a prompt.
    """

    x: Shape
    """Event shape of a data point x."""
    covariates: Mapping[str, int] = field(default_factory=dict)
    """Number of categories of every covariate by name; of a prompt, the size of its vocabulary."""
    prompts: Mapping[str, Vocabulary] = field(default_factory=dict)
    """Vocabularies of the covariates that are text prompts, by name."""

    @property
    def row(self) -> Shape:
        """Event shape of a row: that of x, or `(prod(x) + sum(widths),)` with covariates."""
        return (prod(self.x) + sum(self.widths),) if self.covariates else self.x

    @property
    def widths(self) -> list[int]:
        """Number of entries of each covariate in a row: 1 for a label, the number of tokens for a prompt."""
        return [self.prompts[name].length if name in self.prompts else 1 for name in self.covariates]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Event shapes of the covariates as one-hots: `(codes,)` of a label, `(codes, length)` of a prompt."""
        return {
            name: (codes, self.prompts[name].length) if name in self.prompts else (codes,)
            for name, codes in self.covariates.items()
        }

    def columns(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the covariates of rows `(..., *row)` by name: labels `(...)`, prompts `(..., length)`."""
        if not self.covariates:
            return {}
        parts = rows[..., prod(self.x) :].split(self.widths, -1)
        return {
            name: part if name in self.prompts else part.squeeze(-1)
            for name, part in zip(self.covariates, parts, strict=True)
        }

    def split(self, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the data points `(..., *x)` of rows `(..., *row)`, and covariates as one-hots of shapes `shapes`."""
        if not self.covariates:
            return rows, {}
        seen = {}
        for name, column in self.columns(rows).items():
            hot = one_hot(column, self.covariates[name], rows)
            seen[name] = hot.movedim(-1, -2) if name in self.prompts else hot
        return rows[..., : prod(self.x)].reshape(*rows.shape[:-1], *self.x), seen

    def join(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return rows `(n, *row)` with their data points replaced by `x` `(n, *x)` and their covariates kept."""
        return torch.cat([x.reshape(len(rows), -1).to(rows), rows[:, prod(self.x) :]], 1) if self.covariates else x

    def require(self, rows: Tensor) -> None:
        """Check that every covariate of the rows is an integer in 0 .. codes - 1.

        Raises:
            DataError: a covariate has another value; the message names both.
        """
        for name, column in self.columns(rows).items():
            codes = self.covariates[name]
            wrong = column[(column != column.round()) | (column < 0) | (column >= codes)]
            if len(wrong):
                raise DataError(
                    f"{name}: expected integers 0 .. {codes - 1} in the last column of x; got {float(wrong[0]):g}."
                )

    def groups(self, rows: Tensor) -> Tensor | None:
        """Return an integer per row, `(n,)`, that identifies its joint covariate value; None without covariates."""
        if not self.covariates:
            return None
        number = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for name, column in self.columns(rows).items():
            for token in column.long().reshape(len(rows), -1).unbind(-1):
                number = number * self.covariates[name] + token
        return number


@lru_cache(maxsize=16)
def data_plate(count: int) -> pyro.plate:
    """Return the Pyro plate over a batch of `count` rows at dim -1, cached: making one costs as much as a layer."""
    return pyro.plate("data", count, dim=-1)
