"""Posterior of an autoencoder: a point without a density."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, final

import pyro.distributions as dist
from torch import Tensor, nn

from pvae.component import Shape
from pvae.distributions.determined import Determined
from pvae.graph.link import Link
from pvae.graph.site import Site
from pvae.guides.posteriors.base import Posterior
from pvae.nn.dense import MLP
from pvae.nn.network import Network, NetworkModule


class PointHead(nn.Module):
    """A network whose output is the latent."""

    def __init__(self, network: NetworkModule) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Named tensors `(..., *shape)` to the point."""
        return Determined(self.network(inputs))


@final
class DeltaPosterior(Posterior):
    """A point z = mu(x): the code of an autoencoder. It has no density: its "ELBO" log p(x, z) bounds nothing.

    With `objective.beta = 0` the prior plays no part; `refit` then fits one to the codes.
    """

    kind: Literal["delta"] = "delta"
    network: Network | None = None
    """Between the encoder's features and the point; default: one linear map."""

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return PointHead((self.network or MLP(hidden=())).build(inputs, site.event))
