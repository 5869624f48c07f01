"""Likelihood of tables: every column has its own distribution; columns of one family are scored together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, final

import pyro.distributions as dist
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Shape
from pvae.distributions.base import Batched
from pvae.errors import DeclarationError
from pvae.graph.frame import Law
from pvae.models.likelihoods.base import Likelihood, LikelihoodModule, ReaderModule
from pvae.models.likelihoods.column_families import FAMILIES, Pick, grouped
from pvae.util.types import Size


def support_of(law: Law) -> constraints.Constraint:
    """Return the constraint on the values of a column that are not missing."""
    if law.family == "categorical":
        return constraints.integer_interval(0, law.levels - 1)
    return FAMILIES[law.family].support


class columns(constraints.Constraint):  # noqa: N801 - named as torch names its constraints
    """Constraint on rows of a table: every element lies in its column's support, or is NaN if it may be missing.

    Arguments:
        laws: declared distributions of the columns.
    """

    def __init__(self, laws: Sequence[Law]) -> None:
        self.laws = tuple(laws)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Return booleans `(..., D)`: True for each element of rows `(..., D)` that is valid for its column."""
        masked = torch.tensor([law.masked for law in self.laws], device=value.device)
        found = torch.empty(value.shape, dtype=torch.bool, device=value.device)
        for name, places in grouped(self.laws).items():
            part = value[..., places]
            if name == "categorical":
                levels = torch.tensor([self.laws[i].levels for i in places], device=value.device)
                found[..., places] = (part % 1 == 0) & (part >= 0) & (part < levels)
            else:
                found[..., places] = FAMILIES[name].support.check(part)
        return found | (value.isnan() & masked)

    def named(self, place: int) -> str:
        """Return the name of the column at index `place`, for messages."""
        return f"column {self.laws[place].column!r}"

    def of(self, place: int) -> str:
        """Return a description of the values allowed in the column at index `place`, for messages."""
        law = self.laws[place]
        return f"a value in {support_of(law)}".removesuffix("()") + (", or NaN" if law.masked else "")


class ColumnsDistribution(Batched):
    """Distribution of table rows `(D,)` with independent columns; a missing value (NaN) adds 0 to the log density.

    Arguments:
        parts: distributions of batch shape `(..., d)`, one for each family.
        module: the likelihood, which knows the columns of each family.
    """

    widened = ("parts",)

    def __init__(self, parts: list[dist.TorchDistribution], module: ColumnsModule) -> None:
        self.parts, self.module = parts, module
        super().__init__(parts[0].batch_shape[:-1], torch.Size(module.x))

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(columns(self.module.laws), 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of the columns that are not missing, nats, `(...)`; exact."""
        if self._validate_args:
            self._validate_sample(value)
        scores = []
        for family, pick, part in self.module.each(self.parts):
            given = pick(value)
            missing = given.isnan()
            score = part.log_prob(given.masked_fill(missing, family.stand_in))
            scores.append(torch.where(missing, 0.0, score).sum(-1))
        return sum(scores[1:], scores[0])

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return sampled rows without missing values, `sample_shape + (..., D)`."""
        with torch.no_grad():
            draws = [part.sample(torch.Size(sample_shape)) for part in self.parts]
            return self.module.in_order(draws)

    @property
    def mean(self) -> Tensor:
        """Mean of every column, or the most probable level of a categorical one, `(..., D)`."""
        return self.module.in_order([family.centre(part) for family, _, part in self.module.each(self.parts)])


class ColumnsModule(LikelihoodModule):
    """Module of the likelihood `columns`: splits the decoder's output among the families of the columns."""

    def __init__(self, x: Shape, laws: Sequence[Law], floor: float) -> None:
        if not laws:
            raise DeclarationError("likelihood: expected data.columns, which say how each is scored; got none.")
        if tuple(x) != (len(laws),):
            raise DeclarationError(
                f"likelihood: expected rows of the {len(laws)} columns that data.columns declares; got shape {list(x)}."
            )
        super().__init__(x, 1)
        self.laws = tuple(laws)
        places = grouped(laws)
        families = {name: FAMILIES[name]([laws[i] for i in at], floor) for name, at in places.items()}
        self.families = nn.ModuleDict(families)
        self.picks = nn.ModuleDict({name: Pick(at) for name, at in places.items()})
        order = [i for at in places.values() for i in at]
        self.order = Pick([order.index(i) for i in range(len(laws))])
        self.sizes = [family.outputs for family in families.values()]

    @property
    def inputs(self) -> Shape:
        """Event shape of the decoder's output: one vector with the parameters of all columns."""
        return (sum(self.sizes),)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the distribution of a row for a decoder output `(..., *inputs)`."""
        pieces = h.split(self.sizes, -1)
        parts = [family(piece) for family, piece in zip(self.families.values(), pieces, strict=True)]
        return ColumnsDistribution(parts, self)

    def each(self, parts: Sequence[Any]) -> Iterator[tuple[Any, Any, Any]]:
        """Iterate over (family, module that picks its columns, its item of `parts`), one for each family."""
        return zip(self.families.values(), self.picks.values(), parts, strict=True)

    def in_order(self, values: Sequence[Tensor]) -> Tensor:
        """Return the values `(..., d)` of all families merged into rows `(..., D)`, in the table's column order."""
        dtype = torch.promote_types(values[0].dtype, torch.float32)
        whole: Tensor = self.order(torch.cat([value.to(dtype) for value in values], -1))
        return whole


class Reader(ReaderModule):
    """Encoding of table rows for a network: counts as log(1 + x), categories as one-hots, missing values as 0.

    For every column that may have missing values an indicator is appended: 1 if the value is missing, else 0.

    Arguments:
        laws: declared distributions of the columns.
    """

    def __init__(self, laws: Sequence[Law]) -> None:
        super().__init__()
        places = grouped(laws)
        self.laws = {name: [laws[i] for i in at] for name, at in places.items()}
        self.picks = nn.ModuleDict({name: Pick(at) for name, at in places.items()})
        masked = [i for i, law in enumerate(laws) if law.masked]
        self.masked = Pick(masked) if masked else None
        self.output = tuple(self(torch.zeros(1, len(laws))).shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Return the network inputs `(..., *output)` for rows `(..., D)`."""
        parts = [FAMILIES[name].read(pick(x), self.laws[name]) for name, pick in self.picks.items()]
        if self.masked is not None:
            parts.append(self.masked(x).isnan().to(x.dtype))
        return torch.cat(parts, -1)


@final
class ColumnsLikelihood(Likelihood):
    """Likelihood of table rows: each column has the distribution declared in `data.columns`; missing values add 0."""

    kind: Literal["columns"] = "columns"
    floor: float = Field(default=1e-3, gt=0)
    """Smallest learned scale of a normal or Student's t column, in the units of the transformed column."""
    hint: ClassVar[str] = "See data.columns."
    of_tables: ClassVar[bool] = True
    _laws: tuple[Law, ...] = PrivateAttr(default=())

    def over(self, laws: Sequence[Law]) -> Likelihood:
        bound = self.model_copy()
        bound._laws = tuple(laws)
        return bound

    @property
    def support(self) -> constraints.Constraint:
        """Constraint on a row: each element lies in the support of its own column."""
        return columns(self._laws)

    def reader(self) -> ReaderModule:
        return Reader(self._laws)

    def build(self, x: Shape) -> LikelihoodModule:
        return ColumnsModule(x, self._laws, self.floor)
