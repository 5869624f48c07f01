"""Likelihoods of independent real, positive or bounded elements, beside the normal."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import pyro.distributions as dist
from pydantic import Field
from torch import Tensor

from pvae.distributions.exact import ExactBeta, ExactContinuousBernoulli, ExactStudentT, open_unit
from pvae.models.likelihoods.standard import Elements

LARGEST_LOG = 12.0
"""Largest |log| of a predicted or learned shape parameter (a clamp)."""
MOST_LOGIT = 30.0
"""Largest |logit| of a mean of continuous values in [0, 1] (a clamp)."""


class ContinuousBernoulli(Elements):
    """Continuous Bernoulli likelihood of elements in [0, 1]: a density, with the constant that a Bernoulli lacks.

    References: The continuous Bernoulli (Loaiza-Ganem, Cunningham, 2019), https://arxiv.org/abs/1907.06845
    """

    kind: Literal["continuous_bernoulli"] = "continuous_bernoulli"
    hint: ClassVar[str] = "set data.scale = 'unit'"
    support: ClassVar[dist.constraints.Constraint] = dist.constraints.unit_interval

    def element(self, *parameters: Tensor) -> dist.TorchDistribution:
        return ExactContinuousBernoulli(logits=parameters[0].clamp(-MOST_LOGIT, MOST_LOGIT))  # type: ignore[call-arg]


class Beta(Elements):
    """Beta likelihood of proportions, above 0 and below 1; the decoder gives the logit of the mean and log(c / 2).

    The concentration c is the sum of the two shape parameters, so that a decoder output of 0 is the uniform density.
    """

    kind: Literal["beta"] = "beta"
    hint: ClassVar[str] = "move values away from 0 and 1, or use likelihood 'continuous_bernoulli'"
    support: ClassVar[dist.constraints.Constraint] = open_unit
    channels: ClassVar[int] = 2

    def element(self, *parameters: Tensor) -> dist.TorchDistribution:
        logit, half = (t.clamp(-LARGEST_LOG, LARGEST_LOG) for t in parameters)
        c = 2 * half.exp()
        return ExactBeta(c * logit.sigmoid(), c * (-logit).sigmoid())


class LogNormal(Elements):
    """Log-normal likelihood of positive elements: the decoder gives the mean of log x, whose scale is learned."""

    kind: Literal["log_normal"] = "log_normal"
    hint: ClassVar[str] = "use data of positive numbers"
    support: ClassVar[dist.constraints.Constraint] = dist.constraints.positive
    learned: ClassVar[Mapping[str, float]] = {"log_scale": 0.0}
    floor: float = Field(default=1e-3, gt=0)
    """Smallest scale of log x."""

    def element(self, *parameters: Tensor) -> dist.TorchDistribution:
        loc, log_scale = parameters
        return dist.LogNormal(loc, log_scale.exp().clamp(min=self.floor))


def heavy_tailed(loc: Tensor, log_scale: Tensor, log_df: Tensor, floor: float, **checked: bool) -> ExactStudentT:
    """Return Student's t distributions at `loc` `(..., d)`, of scale >= `floor` and 1 + e^a degrees of freedom."""
    df, scale = 1 + log_df.clamp(max=LARGEST_LOG).exp(), log_scale.exp().clamp(min=floor)
    return ExactStudentT(df.expand(loc.shape), loc, scale.expand(loc.shape), **checked)


class StudentT(Elements):
    """Student's t likelihood: the decoder gives the locations; scale and degrees of freedom of an element are learned.

    The degrees of freedom are 1 + e^a, initially about 8.
    """

    kind: Literal["student_t"] = "student_t"
    support: ClassVar[dist.constraints.Constraint] = dist.constraints.real
    learned: ClassVar[Mapping[str, float]] = {"log_scale": 0.0, "log_df": 2.0}
    floor: float = Field(default=1e-3, gt=0)
    """Smallest scale."""

    def element(self, *parameters: Tensor) -> dist.TorchDistribution:
        loc, log_scale, log_df = parameters
        return heavy_tailed(loc, log_scale, log_df, self.floor)
