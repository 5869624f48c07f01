"""Latent variables of a declared graphical model (space, parents, order), laws of columns, and links."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from pvae.component import Shape
from pvae.errors import DeclarationError
from pvae.util import Record, replace

if TYPE_CHECKING:
    from pvae.graph.frame import Frame
    from pvae.guides.graph import GraphGuide
    from pvae.models.graph import GraphModel

Values = Literal["real", "index", "binary", "relaxed"]
"""Form of a sampled value: a real vector, indices of codes, a vector of 0 and 1, or log relaxed one-hots."""


class Space(Record):
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
    joined: Literal["sum", "concatenation"] | None = None
    """Way in which the codes along the last axis make one vector: their rows are added, or lie side by side."""

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

    def joining(self, count: int, way: Literal["sum", "concatenation"]) -> Space:
        """Return the space in which `count` codes, along one more last axis, make the vector of a position."""
        return replace(self, shape=(*self.shape, count), joined=way)

    @property
    def is_code(self) -> bool:
        """True for discrete codes, relaxed or not; False for real vectors and bits."""
        return self.values in ("index", "relaxed")

    @property
    def grid(self) -> Shape:
        """Shape of the grid of codes; () for a single code, a real vector or bits."""
        return self.shape if self.is_code else ()

    @property
    def plane(self) -> Shape:
        """Shape of the grid of vectors that stand for codes: `grid`, without the axis of codes that make one vector."""
        return self.grid[:-1] if self.joined else self.grid

    @property
    def groups(self) -> int:
        """Number of codes whose rows lie side by side in one vector; 1 unless they do."""
        return self.shape[-1] if self.joined == "concatenation" else 1

    @property
    def event(self) -> Shape:
        """Event shape of one sampled value; with a last dimension K if relaxed."""
        return (*self.shape, self.states) if self.values == "relaxed" else self.shape

    @property
    def features(self) -> Shape:
        """Event shape of the features that child priors and the decoder receive; of codes, channels first."""
        return (self.embedding or self.states, *self.plane) if self.is_code else self.shape

    @property
    def log_states(self) -> float:
        """Logarithm of the number of joint states, nats; infinite for real vectors."""
        return math.prod(self.shape) * math.log(self.states) if self.states else math.inf

    def see(self, value: Tensor, like: Tensor, codebook: Tensor | None = None) -> Tensor:
        """Return the features of a sampled value that child priors and the decoder receive, `(..., *features)`.

        Arguments:
            value: sampled values `(..., *event)`; of codes, indices `(..., *grid)` if of an integer type, else
                logarithms of relaxed one-hots `(..., *grid, K)`.
            like: a tensor of the type and device wanted.
            codebook: one vector for each code, `(K, embedding)`, or as `rows` reads it; None for one-hots.
        """
        if not self.is_code:
            return value
        if not value.is_floating_point():
            seen = one_hot(value, self.states, like) if codebook is None else self.rows(value, codebook)
        else:
            soft = value.exp()
            if self.is_hard:
                soft = one_hot(value.argmax(-1), self.states, soft).detach() + (soft - soft.detach())
            seen = soft if codebook is None else soft @ codebook
        if self.joined:
            seen = seen.sum(-2) if self.joined == "sum" else seen.flatten(-2)
        return self.channels_first(seen)

    def channels_first(self, vectors: Tensor) -> Tensor:
        """Return vectors `(..., *plane, E)` as features, `(..., E, *plane)`."""
        return vectors.movedim(-1, -1 - len(self.plane)) if self.plane else vectors

    def rows(self, index: Tensor, codebook: Tensor) -> Tensor:
        """Return the rows of codes `(..., *grid)`, `(..., *grid, E)`.

        Arguments:
            index: the codes.
            codebook: their table, `(K, E)`; or T of them, `(T, K, E)`, which codes along the last axis take in turn.
        """
        if codebook.dim() == 3:
            which = torch.arange(index.shape[-1], device=index.device) % len(codebook)
            index, codebook = index + codebook.shape[1] * which, codebook.flatten(0, 1)
        return nn.functional.embedding(index, codebook)


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


class Site(Record):
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


class Law(Record):
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


class Link:
    """Reference from one program of a pair to the other; not a Module, so that no parameter is registered twice."""

    model: GraphModel
    guide: GraphGuide
    frame: Frame
    """Layout of a row of data: the data point, then its covariates."""
    support: torch.distributions.constraints.Constraint = torch.distributions.constraints.real
    """Support of one element of a data point under the declared likelihood."""
    scored: Mapping[str, str] = {}
    """Captions that the model scores, each with the latent whose prior does."""
    building: bool = False
    """True while the pair is being built, when Modules that keep the training data have not received them yet."""
