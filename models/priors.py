"""Priors over one latent, `p(z)` or `p(z | parents)`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, final

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.component import Component, Shape
from pvae.event import Event
from pvae.networks import MLP, Network
from pvae.normal import LogVarianceBounds, NormalHead
from pvae.site import Link, Site


class Prior(Component):
    """The density of a latent in the model."""

    values: ClassVar[Literal["real", "index"]] = "real"
    """Whether the latent is a vector (`dim`) or one of `codes`."""
    reads_parents: ClassVar[bool] = False
    """Whether it can be declared for a latent with parents."""
    needs_parents: ClassVar[bool] = False
    """Whether it must have them."""
    reads_guide: ClassVar[bool] = False
    """Whether it asks the guide for the latent's posterior, which must then read x alone."""

    @abstractmethod
    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        """A module from the parents' features `name -> (..., *shape)` to a distribution of event `site.event`."""


class StandardNormalModule(nn.Module):
    """N(0, I) on the device of its buffers."""

    loc: Tensor
    scale: Tensor

    def __init__(self, event: Shape) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(event), persistent=False)
        self.register_buffer("scale", torch.ones(event), persistent=False)

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """N(0, I) with batch shape `()`."""
        return Event(dist.Normal(self.loc, self.scale), self.loc.dim())


@final
class StandardNormal(Prior):
    """N(0, I), the default; it over-regularises, and its marginal KL says by how much."""

    kind: Literal["standard_normal"] = "standard_normal"

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        """See `Prior.build`."""
        return StandardNormalModule(site.event)


@final
class ConditionalNormal(Prior):
    """N(mu(parents), diag sigma^2(parents)), the level of a hierarchy."""

    kind: Literal["conditional_normal"] = "conditional_normal"
    reads_parents: ClassVar[bool] = True
    needs_parents: ClassVar[bool] = True
    network: Network = MLP()
    """From the parents to location and log-variance."""
    log_variance: LogVarianceBounds = (-12.0, 6.0)

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        """See `Prior.build`."""
        return NormalHead(self.network.build(given, (2 * site.event[0],)), self.log_variance)


# ---------------------------------------------------------------------- codes


class CodesModule(nn.Module):
    """One categorical, of learned or even weights."""

    logits: Tensor

    def __init__(self, codes: int, learned: bool) -> None:
        super().__init__()
        logits = torch.zeros(codes)
        if learned:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits, persistent=False)

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """The categorical, with batch shape `()`."""
        return dist.Categorical(logits=self.logits, validate_args=False)


@final
class CategoricalPrior(Prior):
    """Learned weights of the codes."""

    kind: Literal["categorical"] = "categorical"
    values: ClassVar[Literal["real", "index"]] = "index"

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        """See `Prior.build`."""
        assert site.codes is not None  # noqa: S101 - the declaration has been checked
        return CodesModule(site.codes, learned=True)


@final
class UniformPrior(Prior):
    """1 / K for every code: with equal scales, what k-means assumes."""

    kind: Literal["uniform"] = "uniform"
    values: ClassVar[Literal["real", "index"]] = "index"

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        """See `Prior.build`."""
        assert site.codes is not None  # noqa: S101 - the declaration has been checked
        return CodesModule(site.codes, learned=False)
