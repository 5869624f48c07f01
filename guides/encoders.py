"""Encoders: from x (and latents already inferred) to what each posterior reads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, final

from torch import Tensor, nn

from pvae.component import Component, Shape
from pvae.networks import MLP, Network
from pvae.site import OBSERVED, Site

FEATURES = "features"
"""Name of a network's output among a posterior's inputs."""


class Encoder(Component):
    """The amortised part of the guide."""

    default: ClassVar[str] = "shared"

    network: Network = MLP()
    """From x to features."""

    @abstractmethod
    def build(self, x: Shape, sites: Sequence[Site]) -> EncoderModule:
        """A module that prepares every posterior's inputs.

        Arguments:
            x: event shape of a datum.
            sites: the latents in the guide's order.
        """


class EncoderModule(nn.Module):
    """What an encoder builds: `forward` once per batch, then `inputs_of` for each latent in turn."""

    shapes: dict[str, dict[str, Shape]]
    """For every latent, the named event shapes that its posterior will read."""

    def inputs_of(self, site: Site, features: Tensor, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the posterior of `site` reads, given the batch's features and the latents already inferred."""
        raise NotImplementedError  # pragma: no cover - abstract


def shapes_of(site: Site, sites: Sequence[Site], x: Shape) -> dict[str, Shape]:
    """Event shapes of everything that the posterior of `site` is conditioned on; `x` stands for the data."""
    known = {OBSERVED: x} | {other.name: other.features for other in sites}
    return {name: known[name] for name in site.guide_given}


class SharedModule(EncoderModule):
    """One network on x; every posterior reads its features beside its latents."""

    def __init__(self, network: Network, x: Shape, sites: Sequence[Site]) -> None:
        super().__init__()
        self.network = network.build({OBSERVED: x}, None)
        self.shapes = {site.name: shapes_of(site, sites, self.network.output) for site in sites}

    def forward(self, x: Tensor) -> Tensor:
        """x `(..., *event)` to features `(..., width)`."""
        return self.network({OBSERVED: x})

    def inputs_of(self, site: Site, features: Tensor, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `EncoderModule.inputs_of`."""
        return {name: features if name == OBSERVED else seen[name] for name in site.guide_given}


@final
class SharedEncoder(Encoder):
    """One network on x for all latents; each posterior adds its own head."""

    kind: Literal["shared"] = "shared"

    def build(self, x: Shape, sites: Sequence[Site]) -> EncoderModule:
        """See `Encoder.build`."""
        return SharedModule(self.network, x, sites)


class PerLatentModule(EncoderModule):
    """One network per latent, on x and the latents it is conditioned on."""

    def __init__(self, network: Network, x: Shape, sites: Sequence[Site]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({site.name: network.build(shapes_of(site, sites, x), None) for site in sites})
        self.shapes = {name: {FEATURES: module.output} for name, module in self.networks.items()}  # type: ignore[dict-item]

    def forward(self, x: Tensor) -> Tensor:
        """x itself: the work is done per latent."""
        return x

    def inputs_of(self, site: Site, features: Tensor, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `EncoderModule.inputs_of`."""
        inputs = {name: features if name == OBSERVED else seen[name] for name in site.guide_given}
        return {FEATURES: self.networks[site.name](inputs)}


@final
class PerLatentEncoder(Encoder):
    """One network per latent, on x and the latents that its posterior is conditioned on.

    References:
        VAE with a VampPrior (Tomczak, Welling, 2018), https://arxiv.org/abs/1705.07120 (its two-level form)
    """

    kind: Literal["per_latent"] = "per_latent"

    def build(self, x: Shape, sites: Sequence[Site]) -> EncoderModule:
        """See `Encoder.build`."""
        return PerLatentModule(self.network, x, sites)
