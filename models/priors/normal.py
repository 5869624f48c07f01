"""Normal priors: standard normal, or with mean and variance that a network computes from the latent's parents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.component import Shape
from pvae.distributions.base import Event
from pvae.graph.link import Link
from pvae.graph.site import Site
from pvae.models.priors.base import Prior
from pvae.nn.network import MLP, LogVarianceBounds, Network, NormalHead


class StandardNormalModule(nn.Module):
    """Module of the standard normal prior N(0, I), on the device of its buffers."""

    loc: Tensor
    scale: Tensor

    def __init__(self, event: Shape) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(event), persistent=False)
        self.register_buffer("scale", torch.ones(event), persistent=False)

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return N(0, I) with batch shape `()`."""
        return Event(dist.Normal(self.loc, self.scale), self.loc.dim())


@final
class StandardNormal(Prior):
    """Standard normal prior N(0, I), the default; its marginal KL(q_agg || p) measures how much it over-regularises."""

    kind: Literal["standard_normal"] = "standard_normal"

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return StandardNormalModule(site.event)


@final
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
