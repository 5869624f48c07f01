"""Factorised priors of codes (categorical) and of bits (Bernoulli), with learned or uniform probabilities."""

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
from pvae.graph.site import Site, Values
from pvae.models.priors.base import MixtureWeights, Prior


class CodesModule(MixtureWeights):
    """Independent categoricals over a grid of codes, learned or uniform; relaxed one-hots if the latent is relaxed."""

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
        """Return the distribution of the codes, with batch shape `()`."""
        if self.is_relaxed:
            return RelaxedCodes(self.logits, self.link.model.temperature(self.name), self.grid)
        return code_grid(self.logits, self.grid)


class RelaxingModule(nn.Module):
    """Adapter that gives a relaxed latent a prior over discrete codes, for losses with the KL of the categoricals."""

    def __init__(self, codes: nn.Module, states: int) -> None:
        super().__init__()
        self.codes, self.states = codes, states

    def forward(self, given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the prior of the codes as a distribution over relaxed one-hots, which scores the codes alone."""
        return Relaxing(self.codes(given), self.states)


def prior_of(prior: Prior, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
    """Return the module of a prior; for a relaxed latent and a prior over discrete codes, one that scores the codes."""
    module = prior.build(site, given, link)
    if site.space.values != "relaxed" or "relaxed" in prior.values:
        return module
    return RelaxingModule(module, site.space.states)


class BitsModule(nn.Module):
    """Module of independent Bernoulli bits, with learned probabilities or 1 / 2 each."""

    logits: Tensor

    def __init__(self, site: Site, learned: bool) -> None:
        super().__init__()
        logits = torch.zeros(site.event)
        if learned:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits, persistent=False)

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the distribution of the bits, with batch shape `()`."""
        return bits(self.logits)


@final
class CategoricalPrior(Prior):
    """Categorical prior with learned probabilities, separate for each position of a grid; it ignores the parents."""

    kind: Literal["categorical"] = "categorical"
    reads_parents: ClassVar[bool] = True
    ignores_parents: ClassVar[bool] = True
    values: ClassVar[tuple[Values, ...]] = ("index", "relaxed")

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return CodesModule(site, learned=True, link=link)


@final
class BernoulliPrior(Prior):
    """Bernoulli prior with one learned probability for each bit; it ignores the parents of the latent."""

    kind: Literal["bernoulli"] = "bernoulli"
    reads_parents: ClassVar[bool] = True
    ignores_parents: ClassVar[bool] = True
    values: ClassVar[tuple[Values, ...]] = ("binary",)

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return BitsModule(site, learned=True)


@final
class UniformPrior(Prior):
    """Uniform prior: 1 / K for each of K codes, 1 / 2 for each bit; it ignores the parents of the latent.

    The KL of a point-mass posterior is then log K nats for each code. k-means assumes this prior and equal scales of
    the components.
    """

    kind: Literal["uniform"] = "uniform"
    reads_parents: ClassVar[bool] = True
    ignores_parents: ClassVar[bool] = True
    values: ClassVar[tuple[Values, ...]] = ("index", "relaxed", "binary")

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return CodesModule(site, learned=False, link=link) if site.space.is_code else BitsModule(site, learned=False)
