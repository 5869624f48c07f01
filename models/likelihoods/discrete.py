"""Likelihoods of binary and of unordered categorical elements."""

from __future__ import annotations

from typing import ClassVar, Literal, final

import pyro.distributions as dist
import torch
from pydantic import Field
from torch import Tensor
from torch.distributions import constraints

from pvae.component import Shape
from pvae.distributions.independent import Event
from pvae.models.likelihoods.base import Likelihood, LikelihoodModule
from pvae.models.likelihoods.closed_form import BernoulliForm, CategoricalForm, ClosedForm


class BernoulliModule(LikelihoodModule):
    """Independent Bernoulli elements; the decoder gives logits."""

    def closed_form(self) -> ClosedForm:
        return BernoulliForm(self)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """Logits `(..., *x)` to the distribution."""
        return Event(dist.Bernoulli(logits=h), len(self.x))


@final
class Bernoulli(Likelihood):
    """Independent binary elements."""

    kind: Literal["bernoulli"] = "bernoulli"
    hint: ClassVar[str] = "set data.binarize to 'dynamic', 'static' or 'threshold', or use likelihood 'normal'"
    closed_form: ClassVar[bool] = True

    @property
    def support(self) -> constraints.Constraint:
        """0 or 1."""
        return constraints.boolean

    def build(self, x: Shape) -> LikelihoodModule:
        return BernoulliModule(x, 1)


class CategoricalModule(LikelihoodModule):
    """Independent categorical elements; the decoder gives one logit per level."""

    def closed_form(self) -> ClosedForm:
        return CategoricalForm(self)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """`(..., levels * x[0], *x[1:])` to the distribution."""
        return Event(dist.Categorical(logits=torch.stack(self.split(h), -1)), len(self.x))


@final
class Categorical(Likelihood):
    """Independent elements with unordered levels 0 .. levels - 1."""

    kind: Literal["categorical"] = "categorical"
    closed_form: ClassVar[bool] = True
    levels: int = Field(gt=1)
    """Number of levels."""
    hint: ClassVar[str] = "set data.scale = 'raw' and likelihood.levels to the number of levels"

    @property
    def support(self) -> constraints.Constraint:
        """Integers 0 .. levels - 1."""
        return constraints.integer_interval(0, self.levels - 1)

    @property
    def channels(self) -> int:
        """One logit per level."""
        return self.levels

    def build(self, x: Shape) -> LikelihoodModule:
        return CategoricalModule(x, self.levels)
