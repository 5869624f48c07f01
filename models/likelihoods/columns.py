"""Likelihood of tables: every column has its own distribution; columns of one family are scored together."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

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


class Family(nn.Module):
    """Base of column families: all columns of a table whose distributions belong to one family.

    Arguments:
        laws: declared distributions of the columns, d of them.
        places: indices of the columns in a row.
        floor: smallest scale of a continuous column.
    """

    support: dist.constraints.Constraint
    """Constraint on the values of a column, in families where it is the same for all columns (all but categorical)."""
    outputs: int
    """Number of parameters that the decoder outputs for these columns."""
    learned: ClassVar[Mapping[str, float]] = {}
    """Parameters that are learned, one for each column, by name, with their initial values."""

    def __init__(self, laws: Sequence[Law], places: Sequence[int], floor: float) -> None:
        super().__init__()
        self.count = self.outputs = len(laws)
        self.floor, self.pick = floor, Pick(places)
        for name, start in self.learned.items():
            self.register_parameter(name, nn.Parameter(torch.full((len(laws),), start)))

    @abstractmethod
    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the distributions of the columns, batch shape `(..., d)`, for a decoder output `(..., outputs)`."""

    @staticmethod
    def centre(fn: Any) -> Tensor:
        """Return the point prediction of each column, `(..., d)`: the mean of its distribution `fn`."""
        return fn.mean

    @staticmethod
    def read(x: Tensor, laws: Sequence[Law]) -> Tensor:
        """Return columns `(..., d)` encoded as network inputs `(..., r)`; missing values become 0."""
        return x.nan_to_num(0.0)


class NormalColumns(Family):
    """Normal columns: the decoder outputs the means; one standard deviation for each column is learned."""

    support = dist.constraints.real
    learned = {"log_scale": 0.0}
    log_scale: nn.Parameter

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return dist.Normal(h, self.log_scale.exp().clamp(min=self.floor), validate_args=False)


class StudentTColumns(NormalColumns):
    """Student's t columns: the decoder outputs the locations; scale and degrees of freedom of each column are learned.

    The degrees of freedom are 1 + e^a, initially about 8.
    """

    learned = {"log_scale": 0.0, "log_df": 2.0}
    log_df: nn.Parameter

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return heavy_tailed(h, self.log_scale, self.log_df, self.floor, validate_args=False)


class PoissonColumns(Family):
    """Poisson columns: the decoder outputs the logarithms of the rates."""

    support = dist.constraints.nonnegative_integer

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return poisson(h, validate_args=False)

    @staticmethod
    def read(x: Tensor, laws: Sequence[Law]) -> Tensor:
        return logged(x)


class NegativeBinomialColumns(PoissonColumns):
    """Negative binomial columns: the decoder outputs log-means; one dispersion for each column is learned."""

    learned = {"log_count": 1.0}
    log_count: nn.Parameter

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return dispersed(h, self.log_count, validate_args=False)


class BernoulliColumns(Family):
    """Bernoulli columns: the decoder outputs the logits."""

    support = dist.constraints.boolean

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=h, validate_args=False)


class CategoricalColumns(Family):
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
        return dist.Categorical(logits=self.logits(full).unflatten(-1, (self.count, self.most)), validate_args=False)

    @staticmethod
    def centre(fn: Any) -> Tensor:
        """Return the most probable level of each column, `(..., d)`."""
        return fn.logits.argmax(-1).to(fn.logits.dtype)

    @staticmethod
    def read(x: Tensor, laws: Sequence[Law]) -> Tensor:
        """Return the columns as one-hot vectors, concatenated; a missing value becomes zeros."""
        hot = [x[..., i, None] == torch.arange(law.levels, device=x.device) for i, law in enumerate(laws)]
        return torch.cat(hot, -1).to(x.dtype)


FAMILIES: dict[str, type[Family]] = {
    "normal": NormalColumns, "student_t": StudentTColumns, "poisson": PoissonColumns,
    "negative_binomial": NegativeBinomialColumns, "bernoulli": BernoulliColumns, "categorical": CategoricalColumns,
}  # fmt: skip


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
        families = {name: FAMILIES[name]([laws[i] for i in at], at, floor) for name, at in places.items()}
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
        return self.module.in_order([family.centre(part) for family, part in self.module.each(self.parts)])


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
