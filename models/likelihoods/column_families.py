"""Distribution families for the columns of a table: normal, Student's t, Poisson, Bernoulli and others."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.graph.frame import Law
from pvae.models.likelihoods.standard import HIGHEST_LOG_RATE, LOWEST_LOG_RATE, dispersed

ABSENT_LOGIT = -1e30
"""Logit of the levels that pad a column with fewer levels than another: probability 0, without a NaN in gradients."""


class Pick(nn.Module):
    """Module that selects entries of the last dimension, by index."""

    index: Tensor

    def __init__(self, index: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor(list(index)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the d selected entries of a tensor `(..., D)`, as `(..., d)`."""
        return x.index_select(-1, self.index)


class Family(nn.Module):
    """Base of column families: all columns of a table whose distributions belong to one family.

    Arguments:
        laws: declared distributions of the columns, d of them.
        floor: smallest scale of a continuous column.
    """

    support: constraints.Constraint
    """Constraint on the values of a column, in families where it is the same for all columns (all but categorical)."""
    stand_in: ClassVar[float] = 0.0
    """Placeholder for a missing value, in the support of every column; its log density is discarded."""

    def __init__(self, laws: Sequence[Law], floor: float) -> None:
        super().__init__()
        self.count = len(laws)

    @property
    def outputs(self) -> int:
        """Number of parameters that the decoder outputs for these columns."""
        return self.count

    @abstractmethod
    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the distributions of the columns, batch shape `(..., d)`, for a decoder output `(..., outputs)`."""

    @staticmethod
    def centre(fn: Any) -> Tensor:
        """Return the point prediction of each column, `(..., d)`: the mean of its distribution `fn`."""
        mean: Tensor = fn.mean
        return mean

    @staticmethod
    def read(x: Tensor, laws: Sequence[Law]) -> Tensor:
        """Return columns `(..., d)` encoded as network inputs `(..., r)`; missing values become 0."""
        return x.nan_to_num(0.0)


class NormalColumns(Family):
    """Normal columns: the decoder outputs the means; one standard deviation for each column is learned."""

    support = constraints.real

    def __init__(self, laws: Sequence[Law], floor: float) -> None:
        super().__init__(laws, floor)
        self.floor = floor
        self.log_scale = nn.Parameter(torch.zeros(self.count))

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return dist.Normal(h, self.log_scale.exp().clamp(min=self.floor), validate_args=False)


class StudentTColumns(NormalColumns):
    """Student's t columns: the decoder outputs the locations; scale and degrees of freedom of each column are learned.

    The degrees of freedom are 1 + e^a, initially about 8.
    """

    def __init__(self, laws: Sequence[Law], floor: float) -> None:
        super().__init__(laws, floor)
        self.log_df = nn.Parameter(torch.full((self.count,), 2.0))

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        df, scale = 1 + self.log_df.clamp(max=-LOWEST_LOG_RATE).exp(), self.log_scale.exp().clamp(min=self.floor)
        return dist.StudentT(df.expand(h.shape), h, scale.expand(h.shape), validate_args=False)


class PoissonColumns(Family):
    """Poisson columns: the decoder outputs the logarithms of the rates."""

    support = constraints.nonnegative_integer

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return dist.Poisson(h.clamp(LOWEST_LOG_RATE, HIGHEST_LOG_RATE).exp(), validate_args=False)

    @staticmethod
    def read(x: Tensor, laws: Sequence[Law]) -> Tensor:
        return x.nan_to_num(0.0).clamp(min=0.0).log1p()


class NegativeBinomialColumns(PoissonColumns):
    """Negative binomial columns: the decoder outputs log-means; one dispersion for each column is learned."""

    def __init__(self, laws: Sequence[Law], floor: float) -> None:
        super().__init__(laws, floor)
        self.log_count = nn.Parameter(torch.ones(self.count))

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return dispersed(h, self.log_count, validate_args=False)


class BernoulliColumns(Family):
    """Bernoulli columns: the decoder outputs the logits."""

    support = constraints.boolean

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=h, validate_args=False)


class CategoricalColumns(Family):
    """Categorical columns, each with its own number of levels: the decoder outputs one logit for each level."""

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
        """Return the most probable level of each column, `(..., d)`."""
        return fn.logits.argmax(-1).to(fn.logits.dtype)

    @staticmethod
    def read(x: Tensor, laws: Sequence[Law]) -> Tensor:
        """Return the columns as one-hot vectors, concatenated; a missing value becomes zeros."""
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
    """Return the indices of the columns of each family, by family name; families without a column are left out."""
    found = {name: [i for i, law in enumerate(laws) if law.family == name] for name in FAMILIES}
    return {name: places for name, places in found.items() if places}
