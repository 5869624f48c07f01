"""Deterministic posterior of an autoencoder: a point without a density."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, final

import pyro.distributions as dist
from torch import Tensor, nn

from pvae.component import Shape
from pvae.distributions.base import Determined
from pvae.graph.link import Link
from pvae.graph.site import Site
from pvae.guides.posteriors.base import Posterior
from pvae.nn.network import MLP, Network, NetworkModule


class PointHead(nn.Module):
    """Module of the posterior `delta`: a network whose output is the latent."""

    def __init__(self, network: NetworkModule) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the point mass at the network's output given named inputs `(..., *shape)`."""
        return Determined(self.network(inputs))


@final
class DeltaPosterior(Posterior):
    """Deterministic posterior z = mu(x) of an autoencoder; it has no density, and its "ELBO" log p(x, z) is no bound.

    With `objective.beta = 0` the loss does not depend on the prior; `refit` then fits a prior to the latents.
    """

    kind: Literal["delta"] = "delta"
    network: Network | None = None
    """Network from the encoder's features to z; default: one linear map."""

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return PointHead((self.network or MLP(hidden=())).build(inputs, site.event))
