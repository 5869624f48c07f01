"""Likelihood of tables: every column has its own distribution; columns of one family are scored together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar, Literal, NamedTuple

import pyro.distributions as dist
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from pvae.component import Shape
from pvae.distributions.base import Batched, Size
from pvae.errors import misdeclared
from pvae.graph.site import Law
from pvae.models.likelihoods.base import Likelihood, LikelihoodModule, ReaderModule
from pvae.models.likelihoods.continuous import heavy_tailed
from pvae.models.likelihoods.counts import dispersed, logged, poisson

ABSENT_LOGIT = -1e30
"""Logit of the levels that pad a column with fewer levels than another: probability 0, without a NaN in gradients."""


class Pick(nn.Module):
    """Module that selects entries of the last dimension, by index."""

    def __init__(self, index: Sequence[int]) -> None:
        super().__init__()
        self.index = nn.Buffer(torch.tensor(list(index), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the d selected entries of a tensor `(..., D)`, as `(..., d)`."""
        return x.index_select(-1, self.index)


class Family(NamedTuple):
    """Kind of distribution that columns of a table have: its parameters, and the columns as networks read them."""

    support: dist.constraints.Constraint
    """Constraint on the values of a column; of categories of any number of levels."""
    learned: Mapping[str, float]
    """Parameters that are learned, one for each column, by name, with their initial values."""
    law: Callable[..., dist.TorchDistribution]
    """Function from the decoder's output `(..., d)`, the smallest scale and the learned parameters, `(d,)` each."""
    read: Callable[[Tensor, Sequence[Law]], Tensor] = lambda x, _laws: x.nan_to_num(0.0)
    """Function from columns `(..., d)` to network inputs `(..., r)`; missing values become 0."""
    centre: Callable[[Any], Tensor] = attrgetter("mean")
    """Function from the distributions to the point prediction of each column, `(..., d)`."""


def one_hots(x: Tensor, laws: Sequence[Law]) -> Tensor:
    """Return columns of categories as one-hot vectors, concatenated; a missing value becomes zeros."""
    hot = [x[..., i, None] == torch.arange(law.levels, device=x.device) for i, law in enumerate(laws)]
    return torch.cat(hot, -1).to(x.dtype)


COUNTS, REAL = dist.constraints.nonnegative_integer, dist.constraints.real
UNCHECKED: dict[str, Any] = {"validate_args": False}
FAMILIES = {
    # The decoder gives the means; one standard deviation for each column is learned.
    "normal": Family(REAL, {"log_scale": 0.0}, lambda h, floor, log_scale:
        dist.Normal(h, log_scale.exp().clamp(min=floor), **UNCHECKED)),
    # The decoder gives the locations; scale and 1 + e^a degrees of freedom, initially about 8, are learned.
    "student_t": Family(REAL, {"log_scale": 0.0, "log_df": 2.0}, lambda h, floor, log_scale, log_df:
        heavy_tailed(h, log_scale, log_df, floor, **UNCHECKED)),
    # The decoder gives the logarithms of the rates.
    "poisson": Family(COUNTS, {}, lambda h, _: poisson(h, **UNCHECKED), lambda x, _: logged(x)),
    # The decoder gives the logarithms of the means; one dispersion for each column is learned.
    "negative_binomial": Family(COUNTS, {"log_count": 1.0}, lambda h, _, log_count:
        dispersed(h, log_count, **UNCHECKED), lambda x, _: logged(x)),
    # The decoder gives the logits, of categories one for each level.
    "bernoulli": Family(dist.constraints.boolean, {}, lambda h, _: dist.Bernoulli(logits=h, **UNCHECKED)),
    "categorical": Family(COUNTS, {}, lambda h, _: dist.Categorical(logits=h, **UNCHECKED), one_hots,
        lambda fn: fn.logits.argmax(-1).to(fn.logits.dtype)),
}  # fmt: skip
"""Families of distributions by name, in the order of their columns in the decoder's output."""


class FamilyColumns(nn.Module):
    """All columns of a table whose distributions belong to one family, with their learned parameters.

    Arguments:
        laws: declared distributions of the columns, d of them.
        places: indices of the columns in a row.
        floor: smallest scale of a continuous column.
    """

    def __init__(self, laws: Sequence[Law], places: Sequence[int], floor: float) -> None:
        super().__init__()
        self.count = self.outputs = len(laws)
        self.name, self.floor, self.pick = laws[0].family, floor, Pick(places)
        for name, start in self.family.learned.items():
            self.register_parameter(name, nn.Parameter(torch.full((len(laws),), start)))

    @property
    def family(self) -> Family:
        """Family of the columns."""
        return FAMILIES[self.name]

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the distributions of the columns, batch shape `(..., d)`, for a decoder output `(..., outputs)`."""
        return self.family.law(h, self.floor, *self.parameters())


class CategoricalColumns(FamilyColumns):
    """Categorical columns, each with its own number of levels: the decoder outputs one logit for each level."""

    def __init__(self, laws: Sequence[Law], places: Sequence[int], floor: float) -> None:
        super().__init__(laws, places, floor)
        levels = torch.tensor([law.levels for law in laws])
        self.most, self.outputs = int(levels.max()), int(levels.sum())
        every = (levels.cumsum(0) - levels)[:, None] + torch.arange(self.most)
        absent = torch.arange(self.most) >= levels[:, None]  # these read a last entry, appended to the logits
        self.logits = Pick(every.masked_fill(absent, self.outputs).flatten().tolist())

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        full = torch.cat([h, torch.full_like(h[..., :1], ABSENT_LOGIT)], -1)
        return super().forward(self.logits(full).unflatten(-1, (self.count, self.most)))


def grouped(laws: Sequence[Law]) -> dict[str, list[int]]:
    """Return the indices of the columns of each family, by family name; families without a column are left out."""
    found = {name: [i for i, law in enumerate(laws) if law.family == name] for name in FAMILIES}
    return {name: places for name, places in found.items() if places}


def support_of(law: Law) -> dist.constraints.Constraint:
    """Return the constraint on the values of a column that are not missing."""
    if law.family == "categorical":
        return dist.constraints.integer_interval(0, law.levels - 1)
    return FAMILIES[law.family].support


class columns(dist.constraints.Constraint):  # noqa: N801 - named as torch names its constraints
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
        inside = [support_of(law).check(part) for law, part in zip(self.laws, value.unbind(-1), strict=True)]
        return torch.stack(inside, -1) | (value.isnan() & masked)

    def named(self, place: int) -> str:
        """Return the name of the column at index `place`, for messages."""
        return f"column {self.laws[place].column!r}"

    def of(self, place: int) -> str:
        """Return a description of the values allowed in the column at index `place`, for messages."""
        law = self.laws[place]
        return f"a value in {support_of(law)}".removesuffix("()") + (", or NaN" if law.masked else "")


class ColumnsModule(LikelihoodModule):
    """Module of the likelihood `columns`: splits the decoder's output among the families of the columns."""

    def __init__(self, x: Shape, laws: Sequence[Law], floor: float) -> None:
        misdeclared(not laws, "likelihood: expected data.columns, which say how each is scored; got none.")
        misdeclared(tuple(x) != (len(laws),), "models.likelihoods.shape", laws=laws, x=x)
        super().__init__(x, 1)
        self.laws = tuple(laws)
        places = grouped(laws)
        made = {name: CategoricalColumns if name == "categorical" else FamilyColumns for name in places}
        families = {name: made[name]([laws[i] for i in at], at, floor) for name, at in places.items()}
        self.families = nn.ModuleDict(families)
        order = [i for at in places.values() for i in at]
        self.order = Pick([order.index(i) for i in range(len(laws))])
        self.sizes = [family.outputs for family in families.values()]

    @property
    def inputs(self) -> Shape:
        """Event shape of the decoder's output: one vector with the parameters of all columns."""
        return (sum(self.sizes),)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the distribution of a row for a decoder output `(..., *inputs)`."""
        return ColumnsDistribution([family(part) for family, part in self.each(h.split(self.sizes, -1))], self)

    def each(self, parts: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """Iterate over (family, its item of `parts`), one for each family."""
        return zip(self.families.values(), parts, strict=True)

    def in_order(self, values: Sequence[Tensor]) -> Tensor:
        """Return the values `(..., d)` of all families merged into rows `(..., D)`, in the table's column order."""
        dtype = torch.promote_types(values[0].dtype, torch.float32)
        return self.order(torch.cat([value.to(dtype) for value in values], -1))


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
    def support(self) -> dist.constraints.Constraint:
        return dist.constraints.independent(columns(self.module.laws), 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of the columns that are not missing, nats, `(...)`; exact."""
        if self._validate_args:
            self._validate_sample(value)
        scores = [score.sum(-1) for score in self._scores(value)]
        return sum(scores[1:], scores[0])

    @property
    def element_supports(self) -> list[dist.constraints.Constraint]:
        """Constraint on the values of each column."""
        return [support_of(law) for law in self.module.laws]

    def element_log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of every column, nats, `(..., D)`; exact, 0 for a missing value."""
        return self.module.in_order(self._scores(value))

    def _scores(self, value: Tensor) -> list[Tensor]:
        """Return the log densities of the columns of each family, `(..., d)`; 0 for missing values."""
        scores = []
        for family, part in self.module.each(self.parts):
            given = family.pick(value)
            missing = given.isnan()
            score = part.log_prob(given.masked_fill(missing, 0.0))  # in every support; its density is discarded
            scores.append(torch.where(missing, 0.0, score))
        return scores

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return sampled rows without missing values, `sample_shape + (..., D)`."""
        with torch.no_grad():
            return self.module.in_order([part.sample(torch.Size(sample_shape)) for part in self.parts])

    @property
    def mean(self) -> Tensor:
        """Mean of every column, or the most probable level of a categorical one, `(..., D)`."""
        return self.module.in_order([own.family.centre(part) for own, part in self.module.each(self.parts)])


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
        self.masked = Pick([i for i, law in enumerate(laws) if law.masked])
        self.output = tuple(self(torch.zeros(1, len(laws))).shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Return the network inputs `(..., *output)` for rows `(..., D)`."""
        parts = [FAMILIES[name].read(pick(x), self.laws[name]) for name, pick in self.picks.items()]
        return torch.cat([*parts, self.masked(x).isnan().to(x.dtype)], -1)


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
    def support(self) -> dist.constraints.Constraint:
        """Constraint on a row: each element lies in the support of its own column."""
        return columns(self._laws)

    def reader(self, x: Shape) -> ReaderModule:
        return Reader(self._laws)

    def build(self, x: Shape) -> LikelihoodModule:
        return ColumnsModule(x, self._laws, self.floor)
