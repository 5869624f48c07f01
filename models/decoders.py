"""The decoder: from the latents to the distribution p(x | z) of a datum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyro.distributions as dist
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Names, Section, Shape
from pvae.graph.frame import Law
from pvae.models.likelihoods.base import Likelihood
from pvae.models.likelihoods.discrete import Bernoulli
from pvae.nn.dense import MLP
from pvae.nn.network import Network


class Decoder(Section):
    """Declared decoder p(x | latents): a network and a likelihood."""

    network: Network = MLP()
    """Network from the latents' features to the parameters of the likelihood."""
    likelihood: Likelihood = Bernoulli()
    given: Names | None = None
    """Names of the latents that the decoder reads; default: those that no other latent depends on."""

    def over(self, laws: Sequence[Law]) -> Decoder:
        """Return this decoder with its likelihood bound to the columns of a table; unchanged if it scores no tables."""
        return self.model_copy(update={"likelihood": self.likelihood.over(laws)})

    @property
    def support(self) -> constraints.Constraint:
        """Constraint on each element of x: the likelihood's or, if z determines x, that of the network's output."""
        own = self.likelihood.support
        return own if own.is_discrete or not self.likelihood.is_point else self.network.support or own

    def build(self, given: Mapping[str, Shape], x: Shape) -> DecoderModule:
        """Return the module from the latents' features to a distribution of event shape `x`."""
        return DecoderModule(self, given, x)


class DecoderModule(nn.Module):
    """Module of a decoder: the network, then the likelihood of its output."""

    def __init__(self, declared: Decoder, given: Mapping[str, Shape], x: Shape) -> None:
        super().__init__()
        self.likelihood = declared.likelihood.build(x)
        self.network = declared.network.build(given, self.likelihood.inputs)

    def forward(self, seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return p(x | features), with batch shape `(...)`, for features `name -> (..., *shape)`."""
        return self.likelihood(self.network(seen))
