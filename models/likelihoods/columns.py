"""The likelihood of a table: one distribution for every column, columns of one kind scored together."""

from __future__ import annotations

from abc import abstractmethod
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
from pvae.models.likelihoods.base import HIGHEST, LOWEST, Likelihood, LikelihoodModule, ReaderModule, Size, dispersed

FAR = -1e30
"""The logit of a level that a column does not have: no gradient, no NaN."""


class Pick(nn.Module):
    """Some entries of the last dimension."""

    index: Tensor

    def __init__(self, index: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor(list(index)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` to `(..., d)`."""
        return x.index_select(-1, self.index)


# ---------------------------------------------------------------------- columns of one family


class Family(nn.Module):
    """Columns of one kind of distribution.

    Arguments:
        laws: of the columns, d of them.
    """

    support: constraints.Constraint
    """Values of an element, where it is one constraint for all columns."""
    stand_in: ClassVar[float] = 0.0
    """A value in every column's support, scored in the place of what is missing and then left out."""

    def __init__(self, laws: Sequence[Law], floor: float) -> None:
        super().__init__()
        self.count = len(laws)

    @property
    def outputs(self) -> int:
        """Numbers it needs of the decoder."""
        return self.count

    @abstractmethod
    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """`(..., outputs)` to distributions of single numbers, of batch shape `(..., d)`."""

    @staticmethod
    def centre(fn: Any) -> Tensor:
        """What a row shows of a column without noise, `(..., d)`: the mean."""
        mean: Tensor = fn.mean
        return mean

    @staticmethod
    def read(x: Tensor, laws: Sequence[Law]) -> Tensor:
        """Columns as a network reads them, `(..., d)` to `(..., r)`; missing values are 0."""
        return x.nan_to_num(0.0)


class NormalColumns(Family):
    """Normal; the decoder gives locations, one scale for each column is learned."""

    support = constraints.real

    def __init__(self, laws: Sequence[Law], floor: float) -> None:
        super().__init__(laws, floor)
        self.floor = floor
        self.log_scale = nn.Parameter(torch.zeros(self.count))

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return dist.Normal(h, self.log_scale.exp().clamp(min=self.floor), validate_args=False)


class StudentTColumns(NormalColumns):
    """Student's t with more than one degree of freedom, which are learned too: 1 + e^a, at first about 8."""

    def __init__(self, laws: Sequence[Law], floor: float) -> None:
        super().__init__(laws, floor)
        self.log_df = nn.Parameter(torch.full((self.count,), 2.0))

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        df, scale = 1 + self.log_df.clamp(max=-LOWEST).exp(), self.log_scale.exp().clamp(min=self.floor)
        return dist.StudentT(df.expand(h.shape), h, scale.expand(h.shape), validate_args=False)


class PoissonColumns(Family):
    """Poisson; the decoder gives log-rates."""

    support = constraints.nonnegative_integer

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return dist.Poisson(h.clamp(LOWEST, HIGHEST).exp(), validate_args=False)

    @staticmethod
    def read(x: Tensor, laws: Sequence[Law]) -> Tensor:
        return x.nan_to_num(0.0).clamp(min=0.0).log1p()


class NegativeBinomialColumns(PoissonColumns):
    """Negative binomial; the decoder gives logarithms of means, one dispersion for each column is learned."""

    def __init__(self, laws: Sequence[Law], floor: float) -> None:
        super().__init__(laws, floor)
        self.log_count = nn.Parameter(torch.ones(self.count))

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return dispersed(h, self.log_count, validate_args=False)


class BernoulliColumns(Family):
    """Bernoulli; the decoder gives logits."""

    support = constraints.boolean

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=h, validate_args=False)


class CategoricalColumns(Family):
    """Categorical, each column with levels of its own; the decoder gives a logit for each."""

    def __init__(self, laws: Sequence[Law], floor: float) -> None:
        super().__init__(laws, floor)
        self.levels = [law.levels for law in laws]
        self.most = max(self.levels)
        starts = [sum(self.levels[:i]) for i in range(len(laws))]
        absent = sum(self.levels)  # a last entry, appended to the logits
        self.pick = Pick(
            [
                start + level if level < size else absent
                for start, size in zip(starts, self.levels, strict=True)
                for level in range(self.most)
            ]
        )

    @property
    def outputs(self) -> int:
        return sum(self.levels)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        full = torch.cat([h, torch.full_like(h[..., :1], FAR)], -1)
        return dist.Categorical(logits=self.pick(full).unflatten(-1, (self.count, self.most)), validate_args=False)

    @staticmethod
    def centre(fn: Any) -> Tensor:
        """The most probable level."""
        return fn.logits.argmax(-1).to(fn.logits.dtype)

    @staticmethod
    def read(x: Tensor, laws: Sequence[Law]) -> Tensor:
        """One-hot rows; of a missing value, zeros."""
        hot = [x[..., i, None] == torch.arange(law.levels, device=x.device) for i, law in enumerate(laws)]
        return torch.cat(hot, -1).to(x.dtype)


FAMILIES: dict[str, type[Family]] = {
    "normal": NormalColumns,
    "student_t": StudentTColumns,
    "poisson": PoissonColumns,
    "negative_binomial": NegativeBinomialColumns,
    "bernoulli": BernoulliColumns,
    "categorical": CategoricalColumns,
}


def grouped(laws: Sequence[Law]) -> dict[str, list[int]]:
    """Places of the columns of every family that there is."""
    found = {name: [i for i, law in enumerate(laws) if law.family == name] for name in FAMILIES}
    return {name: places for name, places in found.items() if places}


# ---------------------------------------------------------------------- support


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
        """What one column expects, in words."""
        law = self.laws[place]
        return f"a value in {support_of(law)}".removesuffix("()") + (", or NaN" if law.masked else "")


# ---------------------------------------------------------------------- the distribution


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
        """Of every column its mean, of a categorical one its most probable level; `(..., D)`."""
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
