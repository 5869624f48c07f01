"""Priors over one latent, `p(z)` or `p(z | parents)`: their bases, and those of independent coordinates.

The latter are normal (standard, or given parents), categorical, Bernoulli and uniform.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.component import Component, Shape
from pvae.distributions import Event, RelaxedCodes, UnitNormal, bits, code_grid, relaxed
from pvae.graph.site import Link, Site, Values
from pvae.nn.network import MLP, LogVarianceBounds, Network, NormalHead


class Prior(Component):
    """Declared prior p(z) or p(z | parents): distribution of one latent in the model."""

    values: ClassVar[tuple[Values, ...]] = ("real",)
    """Kinds of latents that the prior supports: real vectors, code indices, bits or relaxed one-hots."""
    reads_parents: ClassVar[bool] = False
    """True if the prior can be declared for a latent with parents in the model."""
    needs_parents: ClassVar[bool] = False
    """True if the latent must have parents in the model."""
    ignores_parents: ClassVar[bool] = False
    """True if the latent may have parents but this prior ignores them; one fitted later by `refit` may use them."""
    scores_captions: ClassVar[bool] = False
    """True if the prior can score a caption that the latent is given, as one sequence with its codes."""
    reads_guide: ClassVar[bool] = False
    """True if the prior is made of the latent's posteriors in the guide, which must then depend on x alone."""

    @abstractmethod
    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        """Return the module from parents' features `name -> (..., *shape)` to a distribution of event `site.event`."""


class StandardNormalModule(nn.Module):
    """Module of the standard normal prior N(0, I), on the device of its buffers."""

    def __init__(self, event: Shape) -> None:
        super().__init__()
        self.loc = nn.Buffer(torch.zeros(event), persistent=False)
        self.scale = nn.Buffer(torch.ones(event), persistent=False)
        self.fixed: Event | None = None

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return N(0, I) with batch shape `()`, the same one every time unless it is compiled."""
        if self.fixed is None or self.fixed.base_dist.loc is not self.loc or torch.compiler.is_compiling():
            fixed = Event(UnitNormal(self.loc, self.scale), self.loc.dim())
            if torch.compiler.is_compiling():
                return fixed
            self.fixed = fixed.wide = fixed
        return self.fixed


class StandardNormal(Prior):
    """Standard normal prior N(0, I), the default."""

    kind: Literal["standard_normal"] = "standard_normal"

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return StandardNormalModule(site.event)


class ConditionalNormal(Prior):
    """Diagonal normal prior N(mu(parents), diag sigma^2(parents)), for the latents below the top of a hierarchy."""

    kind: Literal["conditional_normal"] = "conditional_normal"
    reads_parents: ClassVar[bool] = True
    needs_parents: ClassVar[bool] = True
    network: Network = MLP()
    """Network from the parents' features to mean and log-variance."""
    log_variance: LogVarianceBounds = (-12.0, 6.0)

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return NormalHead(self.network.build(given, (2 * site.event[0],)), self.log_variance)


class WeightsModule(nn.Module):
    """Independent codes over a grid, or bits, of learned or equal probabilities; relaxed codes if the latent is."""

    def __init__(self, site: Site, learned: bool, link: Link) -> None:
        super().__init__()
        self.name, self.space, self.link = site.name, site.space, link
        logits = torch.zeros(*site.space.shape, site.space.states) if site.space.is_code else torch.zeros(site.event)
        self.logits: Tensor = nn.Parameter(logits) if learned else nn.Buffer(logits, persistent=False)

    @torch.no_grad()
    def maximise(self, counts: Tensor) -> None:
        """Set the weights, if learned, to the proportions of `counts` `(K,)`, the sums of responsibilities.

        This is the M-step of the objective `em`.
        """
        if isinstance(self.logits, nn.Parameter):
            self.logits.copy_((counts / counts.sum()).log())

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the distribution of the codes or bits, with batch shape `()`."""
        if self.space.values == "relaxed":
            return RelaxedCodes(self.logits, self.link.model.temperature(self.name), len(self.space.grid))
        return code_grid(self.logits, len(self.space.grid)) if self.space.is_code else bits(self.logits)


class WeightsPrior:
    """Mixin of priors of independent codes or bits, which ignore the parents of the latent."""

    reads_parents: ClassVar[bool] = True
    ignores_parents: ClassVar[bool] = True
    learned: ClassVar[bool] = True
    """True if the probabilities are learned, False if they are equal."""

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        """Return the module of independent codes or bits."""
        return WeightsModule(site, self.learned, link)


class CategoricalPrior(WeightsPrior, Prior):
    """Categorical prior with learned probabilities, separate for each position of a grid; it ignores the parents."""

    kind: Literal["categorical"] = "categorical"
    values: ClassVar[tuple[Values, ...]] = ("index", "relaxed")


class BernoulliPrior(WeightsPrior, Prior):
    """Bernoulli prior with one learned probability for each bit; it ignores the parents of the latent."""

    kind: Literal["bernoulli"] = "bernoulli"
    values: ClassVar[tuple[Values, ...]] = ("binary",)


class UniformPrior(WeightsPrior, Prior):
    """Uniform prior: 1 / K for each of K codes, 1 / 2 for each bit; it ignores the parents of the latent.

    The KL of a point-mass posterior is then log K nats for each code. k-means assumes this prior and equal scales of
    the components.
    """

    kind: Literal["uniform"] = "uniform"
    values: ClassVar[tuple[Values, ...]] = ("index", "relaxed", "binary")
    learned: ClassVar[bool] = False


class RelaxingModule(nn.Module):
    """Adapter that gives a relaxed latent a prior over discrete codes, for losses with the KL of the categoricals."""

    def __init__(self, codes: nn.Module, states: int) -> None:
        super().__init__()
        self.codes, self.states = codes, states

    def forward(self, given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the prior of the codes as a distribution over relaxed one-hots, which scores the codes alone."""
        return relaxed.Relaxing(self.codes(given), self.states)


def prior_of(prior: Prior, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
    """Return the module of a prior; for a relaxed latent and a prior over discrete codes, one that scores the codes."""
    module = prior.build(site, given, link)
    fits = site.space.values != "relaxed" or "relaxed" in prior.values
    return module if fits else RelaxingModule(module, site.space.states)
