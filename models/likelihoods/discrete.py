"""Likelihoods of binary and of unordered categorical elements."""

from __future__ import annotations

from typing import ClassVar, Literal, final

import pyro.distributions as dist
import torch
from pydantic import Field
from torch import Tensor
from torch.distributions import constraints

from pvae.component import Shape
from pvae.distributions.base import Event
from pvae.models.likelihoods.base import Likelihood, LikelihoodModule
from pvae.models.likelihoods.closed_form import BernoulliForm, CategoricalForm, ClosedForm


class BernoulliModule(LikelihoodModule):
    """Module of the Bernoulli likelihood: independent elements, whose logits are the decoder's output."""

    def closed_form(self) -> ClosedForm:
        return BernoulliForm(self)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the distribution of x for logits `(..., *x)`."""
        return Event(dist.Bernoulli(logits=h), len(self.x))


@final
class Bernoulli(Likelihood):
    """Bernoulli likelihood: elements of x are independent and binary."""

    kind: Literal["bernoulli"] = "bernoulli"
    hint: ClassVar[str] = "set data.binarize to 'dynamic', 'static' or 'threshold', or use likelihood 'normal'"
    closed_form: ClassVar[bool] = True

    @property
    def support(self) -> constraints.Constraint:
        """Support of each element: 0 or 1."""
        return constraints.boolean

    def build(self, x: Shape) -> LikelihoodModule:
        return BernoulliModule(x, 1)


class CategoricalModule(LikelihoodModule):
    """Module of the categorical likelihood: independent elements; the decoder outputs one logit for each level."""

    def closed_form(self) -> ClosedForm:
        return CategoricalForm(self)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Return the distribution of x for logits `(..., levels * x[0], *x[1:])`."""
        return Event(dist.Categorical(logits=torch.stack(self.split(h), -1)), len(self.x))


@final
class Categorical(Likelihood):
    """Categorical likelihood: elements of x are independent, with unordered levels 0 .. levels - 1."""

    kind: Literal["categorical"] = "categorical"
    closed_form: ClassVar[bool] = True
    levels: int = Field(gt=1)
    """Number of levels of an element."""
    hint: ClassVar[str] = "set data.scale = 'raw' and likelihood.levels to the number of levels"

    @property
    def support(self) -> constraints.Constraint:
        """Support of each element: integers 0 .. levels - 1."""
        return constraints.integer_interval(0, self.levels - 1)

    @property
    def channels(self) -> int:
        """Number of parameters of each element: one logit for each level."""
        return self.levels

    def build(self, x: Shape) -> LikelihoodModule:
        return CategoricalModule(x, self.levels)
