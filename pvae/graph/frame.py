"""Layout of a row of data: the data point x with its columns, then the covariates: labels and prompts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Self

import torch
from torch import Tensor

from pvae.component import Shape
from pvae.errors import DataError, DeclarationError, near
from pvae.graph.site import one_hot

PADDING = ""
"""Padding word, token 0, that fills prompts shorter than the longest."""


@dataclass(frozen=True)
class Vocabulary:
    """Word-level vocabulary of a set of prompts: the padding word, then all words in alphabetical order."""

    words: tuple[str, ...]
    """Word of every token, the padding word first."""
    length: int
    """Number of tokens of every encoded prompt."""

    @classmethod
    def of(cls, texts: Sequence[str]) -> Self:
        """Return the vocabulary of some texts; its prompt length is that of the longest text."""
        found = [split(text) for text in texts]
        return cls((PADDING, *sorted({word for words in found for word in words})), max(map(len, found), default=0))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Return the token numbers of a text, padded to `length`.

        Raises:
            DeclarationError: a word is not in the vocabulary, or the text has more than `length` words.
        """
        found = split(text)
        for word in found:
            if word not in self.words:
                known = ", ".join(self.words[1:])
                raise DeclarationError(f"prompt: expected words among {known}; got {word!r}{near(word, self.words)}.")
        if len(found) > self.length:
            raise DeclarationError(f"prompt: expected at most {self.length} words; got {len(found)} in {text[:60]!r}.")
        return [self.words.index(word) for word in found] + [0] * (self.length - len(found))


def split(text: str) -> list[str]:
    """Return the lower-case words and numbers of a text: `T-shirt/top` gives t, shirt, top."""
    return re.findall(r"[a-z0-9]+", text.lower())


@dataclass(frozen=True)
class Law:
    """Declared distribution family of one column of a table.

    Arguments:
        family: "normal", "student_t", "poisson", "negative_binomial", "bernoulli" or "categorical".
        levels: number of levels of a categorical column.
        masked: True if values may be missing, as NaN.
        column: name of the column, for error messages.
    """

    family: str
    levels: int = 1
    masked: bool = False
    column: str = ""


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
