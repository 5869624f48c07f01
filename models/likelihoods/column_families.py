"""Families of distributions that columns of a table may have."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.graph.column_law import Law
from pvae.models.likelihoods.counts import HIGHEST_LOG_RATE, LOWEST_LOG_RATE, dispersed

ABSENT_LOGIT = -1e30
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
        """Return the value of a column without noise, `(..., d)`: its mean."""
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
        df, scale = 1 + self.log_df.clamp(max=-LOWEST_LOG_RATE).exp(), self.log_scale.exp().clamp(min=self.floor)
        return dist.StudentT(df.expand(h.shape), h, scale.expand(h.shape), validate_args=False)


class PoissonColumns(Family):
    """Poisson; the decoder gives log-rates."""

    support = constraints.nonnegative_integer

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return dist.Poisson(h.clamp(LOWEST_LOG_RATE, HIGHEST_LOG_RATE).exp(), validate_args=False)

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
        full = torch.cat([h, torch.full_like(h[..., :1], ABSENT_LOGIT)], -1)
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
