"""Posteriors over one latent, `q(z | x, ...)`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, final

from torch import nn

from pvae.component import Component, Names, Shape
from pvae.networks import MLP, Network
from pvae.normal import LogVarianceBounds, NormalHead
from pvae.site import OBSERVED, Link, Site


class Posterior(Component):
    """The density of a latent in the guide."""

    default: ClassVar[str] = "normal"

    given: Names = (OBSERVED,)
    """What it is conditioned on: x and, in a hierarchy, other latents."""

    @abstractmethod
    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        """A module from named tensors `name -> (..., *inputs[name])` to a distribution of event `site.event`."""


@final
class NormalPosterior(Posterior):
    """N(mu(x), diag sigma^2(x)), the amortised mean-field posterior.

    References:
        Auto-Encoding Variational Bayes (Kingma, Welling, 2013), https://arxiv.org/abs/1312.6114
    """

    kind: Literal["normal"] = "normal"
    log_variance: LogVarianceBounds = (-12.0, 6.0)
    network: Network | None = None
    """Between the encoder's features and the parameters; default: one linear map."""

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        """See `Posterior.build`."""
        network = self.network or MLP(hidden=())
        return NormalHead(network.build(inputs, (2 * site.event[0],)), self.log_variance)
