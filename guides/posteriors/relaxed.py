"""Relaxed posteriors of codes: Gumbel-softmax, which the decoder reads as it is or as a hard one-hot."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self, final

import pyro.distributions as dist
from pydantic import model_validator
from torch import Tensor, nn

from pvae.component import Shape
from pvae.distributions.relaxed import KL, RelaxedCodes
from pvae.graph.link import Link
from pvae.graph.site import Site, Space, Values
from pvae.guides.posteriors.base import Posterior
from pvae.guides.posteriors.heads import channels_last, head
from pvae.nn.network import Network, NetworkModule


class RelaxedModule(nn.Module):
    """Module of relaxed posteriors: a network's output is the logits of relaxed codes, at the latent's temperature."""

    def __init__(self, network: NetworkModule, site: Site, link: Link, kl: KL, noise: bool) -> None:
        super().__init__()
        self.network, self.link, self.kl, self.noise = network, link, kl, noise
        self.name, self.grid, self.has_twin = site.name, len(site.space.grid), site.has_twin

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the distribution of log relaxed one-hots, with batch shape `(...)`, given named inputs."""
        logits = channels_last(self.network(inputs), self.grid)
        tau = self.link.model.temperature(self.name)
        return RelaxedCodes(logits, tau, self.grid, kl=self.kl, noise=self.noise, has_twin=self.has_twin)


class RelaxedPosterior(Posterior):
    """Base of relaxed (Gumbel-softmax) posteriors; the temperature belongs to the latent, and its prior shares it."""

    values: ClassVar[Values] = "index"
    kl: KL = "relaxed"
    """KL in the training loss: `relaxed`, between the densities of the relaxed one-hots, or `categorical`, between the
    categoricals of the same logits in closed form."""
    network: Network | None = None
    """Network from the encoder's features to the logits; default: one linear map."""

    def sampled(self, space: Space) -> Space:
        return space.relaxed(is_hard=False)

    def _build(self, site: Site, inputs: Mapping[str, Shape], link: Link, noise: bool) -> nn.Module:
        network = head(self.network, inputs, (site.space.states, *site.space.grid))
        return RelaxedModule(network, site, link, self.kl, noise)


@final
class RelaxedOneHotPosterior(RelaxedPosterior):
    r"""Gumbel-softmax posterior c_k = softmax((log pi_k(x) + g_k) / tau), which the decoder reads as it is.

    References:
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017), https://arxiv.org/abs/1611.01144
        The Concrete Distribution (Maddison, Mnih, Teh, 2017), https://arxiv.org/abs/1611.00712
    """

    kind: Literal["relaxed_onehot"] = "relaxed_onehot"

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return self._build(site, inputs, link, noise=True)


@final
class StraightThroughPosterior(RelaxedPosterior):
    """Straight-through posterior: the decoder reads a hard one-hot, with the (biased) gradient of the relaxed one-hot.

    The hard one-hot is that of the largest entry. With Gumbel noise the codes are exact samples of q(c | x). Without,
    q is a point mass on the most probable code, and the KL is -log p of it.

    References:
        Estimating or Propagating Gradients Through Stochastic Neurons (Bengio, Leonard, Courville, 2013),
        https://arxiv.org/abs/1308.3432
    """

    kind: Literal["straight_through"] = "straight_through"
    kl: KL = "categorical"
    noise: bool = True
    """Add Gumbel noise to the logits, so that codes are sampled; without, the most probable code is taken."""

    def sampled(self, space: Space) -> Space:
        return space.relaxed(is_hard=True)

    @model_validator(mode="after")
    def _no_density_of_a_point(self) -> Self:
        if not self.noise and self.kl == "relaxed":
            raise ValueError('kl = "categorical" without noise, where q is a point and has no density; got relaxed')
        return self

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return self._build(site, inputs, link, noise=self.noise)
