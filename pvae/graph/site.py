"""Latent variables of a declared graphical model (space, parents, order), the layout of a row of data, and links."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Shape
from pvae.errors import DataError, DeclarationError, near

if TYPE_CHECKING:
    from pvae.guides.graph import GraphGuide
    from pvae.models.graph import GraphModel

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
    def real(cls, dim: int) -> Self:
        """Return the space of real vectors `(dim,)`."""
        return cls("real", (dim,))

    @classmethod
    def bits(cls, count: int) -> Self:
        """Return the space of vectors of 0 and 1, `(count,)`."""
        return cls("binary", (count,), 2)

    @classmethod
    def codes(cls, states: int, grid: Shape = (), embedding: int | None = None) -> Self:
        """Return the space of codes 0 .. `states` - 1 at every position of a grid, a single code by default."""
        return cls("index", tuple(grid), states, embedding)

    def relaxed(self, is_hard: bool) -> Self:
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


OBSERVED = "x"
"""Name of the observed site, and of the data among the inputs of a posterior."""
EMBEDDED: Any = {"_embedded": True}
"""Entry of `infer` that marks the site of a quantised latent's codebook vector, which is no latent of its own."""


def embedded(name: str) -> str:
    """Return the name of the site with the codebook vector of a quantised latent; no declared latent can have it."""
    return f"{name}/embedded"


@dataclass(frozen=True)
class Site:
    """One latent variable of a declared graphical model, with its parents in model and guide."""

    name: str
    space: Space
    """Space of the values that the posterior samples: relaxed one-hots if the posterior relaxes codes."""
    given: tuple[str, ...] = ()
    """Parents in the model, p(name | given)."""
    guide_given: tuple[str, ...] = (OBSERVED,)
    """Parents in the guide, q(name | guide_given)."""
    carries: bool = False
    """True for a nearest-code (VQ) latent, whose codebook vector carries the gradient that its index cannot."""
    has_twin: bool = True
    """False for a relaxed latent whose prior is a density of relaxed one-hots, with no discrete counterpart."""
    summed: bool = False
    """True if the model sums the latent out exactly, so that the guide does not sample it."""

    @property
    def event(self) -> Shape:
        """Event shape of one sampled value."""
        return self.space.event

    @property
    def features(self) -> Shape:
        """Event shape of the features that child priors and the decoder receive; of codes, channels first."""
        return self.space.features


def topological(parents: Mapping[str, Iterable[str]], what: str) -> list[str]:
    """Return the names in topological order, parents first; ties keep the order of declaration.

    Raises:
        DeclarationError: the graph has a cycle; the message names its members.
    """
    order: list[str] = []
    waiting = {name: [p for p in above if p in parents] for name, above in parents.items()}
    while waiting:
        if not (ready := [name for name, above in waiting.items() if all(p in order for p in above)]):
            raise DeclarationError.of("graph.site.cycle", what=what, sites=sorted(waiting))
        order.append(ready[0])
        del waiting[ready[0]]
    return order


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
                raise DeclarationError.of("graph.site.word", words=self.words, word=word, hint=near(word, self.words))
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
        x = rows[..., : prod(self.x)].reshape(*rows.shape[:-1], *self.x)
        return x, self.one_hots(self.columns(rows), rows)

    def one_hots(self, columns: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """Return covariates, labels `(...)` and prompts `(..., length)`, as one-hots of shapes `shapes`, by name."""
        hot = {name: one_hot(column, self.covariates[name], like) for name, column in columns.items()}
        return {name: t.movedim(-1, -2) if name in self.prompts else t for name, t in hot.items()}

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
                raise DataError.of("graph.site.label", name=name, most=codes - 1, found=float(wrong[0]))

    def groups(self, rows: Tensor) -> Tensor | None:
        """Return an integer per row, `(n,)`, that identifies its joint covariate value; None without covariates."""
        if not self.covariates:
            return None
        number = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for name, column in self.columns(rows).items():
            for token in column.long().reshape(len(rows), -1).unbind(-1):
                number = number * self.covariates[name] + token
        return number


class Link:
    """Reference from one program of a pair to the other; not a Module, so that no parameter is registered twice."""

    model: GraphModel
    guide: GraphGuide
    frame: Frame
    """Layout of a row of data: the data point, then its covariates."""
    support: constraints.Constraint = constraints.real
    """Support of one element of a data point under the declared likelihood."""
    building: bool = False
    """True while the pair is being built, when Modules that keep the training data have not received them yet."""
