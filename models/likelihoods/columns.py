"""The likelihood of a table: one distribution for every column, columns of one kind scored together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, final

import pyro.distributions as dist
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Shape
from pvae.errors import DeclarationError
from pvae.graph.column_law import Law
from pvae.models.likelihoods.base import Likelihood, LikelihoodModule, ReaderModule
from pvae.models.likelihoods.column_families import FAMILIES, Pick, grouped
from pvae.util.types import Size


def support_of(law: Law) -> constraints.Constraint:
    """Values that one column may hold, but for missing ones."""
    if law.family == "categorical":
        return constraints.integer_interval(0, law.levels - 1)
    return FAMILIES[law.family].support


class columns(constraints.Constraint):  # noqa: N801 - named as torch names its constraints
    """Every element in its own column's support, or NaN where it may be missing.

    Arguments:
        laws: of the columns.
    """

    def __init__(self, laws: Sequence[Law]) -> None:
        self.laws = tuple(laws)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Elementwise membership of rows `(..., D)`."""
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
        """A column by its name."""
        return f"column {self.laws[place].column!r}"

    def of(self, place: int) -> str:
        """Return the values that one column may hold, in words."""
        law = self.laws[place]
        return f"a value in {support_of(law)}".removesuffix("()") + (", or NaN" if law.masked else "")


class ColumnsDistribution(dist.TorchDistribution):
    """Independent columns of several kinds over rows `(D,)`; a NaN adds nothing to the density of a row.

    Arguments:
        parts: distributions of batch shape `(..., d)`, one for each family.
        module: where the columns of each stand.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self, parts: Sequence[dist.TorchDistribution], module: ColumnsModule, validate_args: bool | None = None
    ) -> None:
        self.parts, self.module = list(parts), module
        super().__init__(parts[0].batch_shape[:-1], torch.Size(module.x), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(columns(self.module.laws), 1)

    def expand(self, batch_shape: Size, _instance: Any = None) -> ColumnsDistribution:
        """The same distribution over more batch dimensions."""
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        parts = [part.expand(shape + part.batch_shape[-1:]) for part in self.parts]
        return ColumnsDistribution(parts, self.module, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of what is there, nats, `(...)`; exact."""
        if self._validate_args:
            self._validate_sample(value)
        scores = []
        for family, pick, part in self.module.each(self.parts):
            given = pick(value)
            missing = given.isnan()
            score = part.log_prob(given.masked_fill(missing, family.stand_in))
            scores.append(torch.where(missing, 0.0, score).sum(-1))
        total = scores[0]
        for score in scores[1:]:
            total = total + score
        return total

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Whole rows `sample_shape + (..., D)`."""
        with torch.no_grad():
            draws = [part.sample(torch.Size(sample_shape)) for part in self.parts]
            return self.module.in_order(draws)

    @property
    def mean(self) -> Tensor:
        """Mean of every column, or the most probable level of a categorical one, `(..., D)`."""
        return self.module.in_order([family.centre(part) for family, _, part in self.module.each(self.parts)])


class ColumnsModule(LikelihoodModule):
    """A family for each kind of column; the decoder's output is split among them."""

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
        """The parameters of all columns, in one row."""
        return (sum(self.sizes),)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """`(..., *inputs)` to the distribution."""
        pieces = h.split(self.sizes, -1)
        parts = [family(piece) for family, piece in zip(self.families.values(), pieces, strict=True)]
        return ColumnsDistribution(parts, self)

    def each(self, parts: Sequence[Any]) -> Iterator[tuple[Any, Any, Any]]:
        """(family, its columns, its distribution) of every family."""
        return zip(self.families.values(), self.picks.values(), parts, strict=True)

    def in_order(self, values: Sequence[Tensor]) -> Tensor:
        """Values `(..., d)` of every family as rows `(..., D)`."""
        dtype = torch.promote_types(values[0].dtype, torch.float32)
        whole: Tensor = self.order(torch.cat([value.to(dtype) for value in values], -1))
        return whole


class Reader(ReaderModule):
    """A row of a table as a network reads it: counts as log(1 + x), levels as one-hots, and what is missing as 0.

    After them stands, for every column that may have missing values, 1 where one is missing.

    Arguments:
        laws: of the columns.
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
        """`(..., D)` to `(..., *output)`."""
        parts = [FAMILIES[name].read(pick(x), self.laws[name]) for name, pick in self.picks.items()]
        if self.masked is not None:
            parts.append(self.masked(x).isnan().to(x.dtype))
        return torch.cat(parts, -1)


@final
class ColumnsLikelihood(Likelihood):
    """Columns of a table, each with the distribution that `data.columns` declares; a missing value adds nothing."""

    kind: Literal["columns"] = "columns"
    floor: float = Field(default=1e-3, gt=0)
    """Smallest scale of a continuous column, in units of its transform."""
    hint: ClassVar[str] = "See data.columns."
    of_tables: ClassVar[bool] = True
    _laws: tuple[Law, ...] = PrivateAttr(default=())

    def over(self, laws: Sequence[Law]) -> Likelihood:
        bound = self.model_copy()
        bound._laws = tuple(laws)
        return bound

    @property
    def support(self) -> constraints.Constraint:
        """Every column's own."""
        return columns(self._laws)

    def reader(self) -> ReaderModule:
        return Reader(self._laws)

    def build(self, x: Shape) -> LikelihoodModule:
        return ColumnsModule(x, self._laws, self.floor)
