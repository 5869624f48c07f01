"""Factorised priors of codes and of bits, with learned or even weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.component import Shape
from pvae.distributions.codes import bits, code_grid
from pvae.distributions.relaxed import RelaxedCodes, Relaxing
from pvae.graph.link import Link
from pvae.graph.site import Site
from pvae.graph.space import Values
from pvae.models.priors.base import MixtureWeights, Prior


class CodesModule(MixtureWeights):
    """Categoricals over a grid, of learned or even weights; relaxed where the latent is."""

    logits: Tensor

    def __init__(self, site: Site, learned: bool, link: Link) -> None:
        super().__init__()
        self.name, self.grid, self.link = site.name, len(site.space.grid), link
        self.is_relaxed = site.space.values == "relaxed"
        logits = torch.zeros(*site.space.grid, site.space.states)
        if learned:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits, persistent=False)

    @torch.no_grad()
    def maximise(self, counts: Tensor) -> None:
        if isinstance(self.logits, nn.Parameter):
            self.logits.copy_((counts / counts.sum()).log())

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """The codes, with batch shape `()`."""
        if self.is_relaxed:
            return RelaxedCodes(self.logits, self.link.model.temperature(self.name), self.grid)
        return code_grid(self.logits, self.grid)


class RelaxingModule(nn.Module):
    """A prior of codes as that of a relaxed latent, for a loss that takes the KL of the categoricals."""

    def __init__(self, codes: nn.Module, states: int) -> None:
        super().__init__()
        self.codes, self.states = codes, states

    def forward(self, given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the distribution of the codes as one of relaxed values."""
        return Relaxing(self.codes(given), self.states)


def prior_of(prior: Prior, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
    """Build a prior's module; where the latent is relaxed and the prior is not, it scores the codes alone."""
    module = prior.build(site, given, link)
    if site.space.values != "relaxed" or "relaxed" in prior.values:
        return module
    return RelaxingModule(module, site.space.states)


class BitsModule(nn.Module):
    """Independent bits, of learned or even odds."""

    logits: Tensor

    def __init__(self, site: Site, learned: bool) -> None:
        super().__init__()
        logits = torch.zeros(site.event)
        if learned:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits, persistent=False)

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """The bits, with batch shape `()`."""
        return bits(self.logits)


@final
class CategoricalPrior(Prior):
    """Learned weights of the codes, at every position of a grid its own; parents, if any, play no part."""

    kind: Literal["categorical"] = "categorical"
    reads_parents: ClassVar[bool] = True
    ignores_parents: ClassVar[bool] = True
    values: ClassVar[tuple[Values, ...]] = ("index", "relaxed")

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return CodesModule(site, learned=True, link=link)


@final
class BernoulliPrior(Prior):
    """Learned odds of the bits; parents, if any, play no part."""

    kind: Literal["bernoulli"] = "bernoulli"
    reads_parents: ClassVar[bool] = True
    ignores_parents: ClassVar[bool] = True
    values: ClassVar[tuple[Values, ...]] = ("binary",)

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return BitsModule(site, learned=True)


@final
class UniformPrior(Prior):
    """1 / K for every code, 1 / 2 for every bit: a certain code costs log K nats. Parents, if any, play no part.

    With equal scales of the components it is what k-means assumes.
    """

    kind: Literal["uniform"] = "uniform"
    reads_parents: ClassVar[bool] = True
    ignores_parents: ClassVar[bool] = True
    values: ClassVar[tuple[Values, ...]] = ("index", "relaxed", "binary")

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return CodesModule(site, learned=False, link=link) if site.space.is_code else BitsModule(site, learned=False)
