"""The decoder: latents to the distribution of a datum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyro.distributions as dist
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Names, Section, Shape
from pvae.graph.column_law import Law
from pvae.models.likelihoods.base import Likelihood
from pvae.models.likelihoods.discrete import Bernoulli
from pvae.nn.dense import MLP
from pvae.nn.network import Network


class Decoder(Section):
    """p(x | latents): a network and a likelihood."""

    network: Network = MLP()
    """From the latents to the likelihood's parameters."""
    likelihood: Likelihood = Bernoulli()
    given: Names | None = None
    """Latents the decoder reads; default: those that no other latent depends on."""

    def over(self, laws: Sequence[Law]) -> Decoder:
        """The decoder of a table of such columns; the same where its likelihood asks for none."""
        return self.model_copy(update={"likelihood": self.likelihood.over(laws)})

    @property
    def support(self) -> constraints.Constraint:
        """Values a datum may take, elementwise."""
        own = self.likelihood.support
        return own if own.is_discrete or not self.likelihood.is_point else self.network.support or own

    def build(self, given: Mapping[str, Shape], x: Shape) -> DecoderModule:
        """A module from the latents' features to a distribution of event shape `x`."""
        return DecoderModule(self, given, x)


class DecoderModule(nn.Module):
    """Network and likelihood in a row."""

    def __init__(self, declared: Decoder, given: Mapping[str, Shape], x: Shape) -> None:
        super().__init__()
        self.likelihood = declared.likelihood.build(x)
        self.network = declared.network.build(given, self.likelihood.inputs)

    def forward(self, seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Features `name -> (..., *shape)` to p(x | features) with batch shape `(...)`."""
        return self.likelihood(self.network(seen))
