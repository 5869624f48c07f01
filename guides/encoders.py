"""Encoders: networks from x (and latents already sampled) to the features that the posteriors read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar, Literal, final

from torch import Tensor, nn

from pvae.component import Component, Shape
from pvae.graph.site import OBSERVED, Site
from pvae.nn.network import MLP, Network, NetworkModule

FEATURES = "features"
"""Name of the output of an encoder's network among the inputs of a posterior."""


class Encoder(Component):
    """Declared encoder: the networks from x to the features that the posteriors of the guide read."""

    default: ClassVar[str] = "shared"

    network: Network = MLP()
    """Network from x to features."""

    @abstractmethod
    def build(self, known: Mapping[str, Shape], sites: Sequence[Site]) -> EncoderModule:
        """Return the module that computes the inputs of every posterior.

        Arguments:
            known: event shapes of x (named `x`), of the covariates and of all latents, by name.
            sites: the latents whose posteriors read features, in the guide's order.
        """


class EncoderModule(nn.Module):
    """Module of an encoder: `forward` runs once per batch, then `inputs_of` for each latent in turn."""

    shapes: dict[str, dict[str, Shape]]
    """Event shapes of the inputs of each latent's posterior: latent name -> input name -> shape."""

    def inputs_of(self, site: Site, features: Any, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs of a posterior, by name, from the result of `forward` and the latents sampled so far."""
        raise NotImplementedError  # pragma: no cover - abstract


def laid_out(network: Network, inputs: Mapping[str, Shape], sites: Sequence[Site]) -> NetworkModule:
    """Return the feature network of `inputs`; features lie on the finest grid of the latents if it supports grids."""
    grids = [site.space.grid for site in sites if site.space.grid]
    return network.build(inputs, network.features_on(max(grids, key=prod)) if grids else None)


def shapes_of(site: Site, known: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the event shapes of all variables that the posterior of `site` is conditioned on, by name."""
    return {name: known[name] for name in site.guide_given}


class SharedModule(EncoderModule):
    """Module of the encoder `shared`: one network on x, whose features all posteriors read in place of x."""

    def __init__(self, network: Network, known: Mapping[str, Shape], sites: Sequence[Site]) -> None:
        super().__init__()
        self.network = laid_out(network, {OBSERVED: known[OBSERVED]}, sites)
        known = {**known, OBSERVED: self.network.output}
        self.shapes = {site.name: shapes_of(site, known) for site in sites}

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of x `(..., *event)`: `(..., width)` or, on a grid of codes, `(..., C, *grid)`."""
        return self.network({OBSERVED: x})

    def inputs_of(self, site: Site, features: Tensor, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: features if name == OBSERVED else seen[name] for name in site.guide_given}


@final
class SharedEncoder(Encoder):
    """One network on x for all latents; each posterior adds its own head."""

    kind: Literal["shared"] = "shared"

    def build(self, known: Mapping[str, Shape], sites: Sequence[Site]) -> EncoderModule:
        return SharedModule(self.network, known, sites)


class PerLatentModule(EncoderModule):
    """Module of the encoder `per_latent`: one network per latent, on x and the latents that its posterior reads."""

    def __init__(self, network: Network, known: Mapping[str, Shape], sites: Sequence[Site]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({site.name: laid_out(network, shapes_of(site, known), [site]) for site in sites})
        self.shapes = {name: {FEATURES: module.output} for name, module in self.networks.items()}  # type: ignore[dict-item]

    def forward(self, x: Tensor) -> Tensor:
        """Return x itself: the networks run for each latent in `inputs_of`."""
        return x

    def inputs_of(self, site: Site, features: Tensor, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name: features if name == OBSERVED else seen[name] for name in site.guide_given}
        return {FEATURES: self.networks[site.name](inputs)}


@final
class PerLatentEncoder(Encoder):
    """One network per latent, on x and the latents that its posterior is conditioned on.

    References:
        VAE with a VampPrior (Tomczak, Welling, 2018), https://arxiv.org/abs/1705.07120 (its two-level form)
    """

    kind: Literal["per_latent"] = "per_latent"

    def build(self, known: Mapping[str, Shape], sites: Sequence[Site]) -> EncoderModule:
        return PerLatentModule(self.network, known, sites)


class BottomUpModule(EncoderModule):
    """Module of the encoder `bottom_up`: networks from x upwards, each from the features of a level to the next."""

    def __init__(self, network: Network, levels: Network, known: Mapping[str, Shape], sites: Sequence[Site]) -> None:
        super().__init__()
        upward = [site for site in reversed(sites) if OBSERVED in site.guide_given]
        self.networks = nn.ModuleDict()
        self.shapes = {}
        below = {OBSERVED: known[OBSERVED]}
        for site in upward:
            built = laid_out(levels if self.shapes else network, below, [site])
            self.networks[site.name] = built
            self.shapes[site.name] = {FEATURES: built.output}
            below = {FEATURES: built.output}
        for site in sites:
            others = {name: known[name] for name in site.guide_given if name != OBSERVED}
            self.shapes[site.name] = {**self.shapes.get(site.name, {}), **others}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the features `(..., width)` of every level for x `(..., *event)`, by the name of its latent."""
        features: dict[str, Tensor] = {}
        below = {OBSERVED: x}
        for name, network in self.networks.items():
            features[name] = network(below)
            below = {FEATURES: features[name]}
        return features

    def inputs_of(self, site: Site, features: dict[str, Tensor], seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        others = {name: seen[name] for name in site.guide_given if name != OBSERVED}
        return {FEATURES: features[site.name], **others} if site.name in features else others


@final
class BottomUpEncoder(Encoder):
    """Deterministic features of x, level by level from the lowest latent to the top, for ladder or top-down posteriors.

    `network` computes the features of the lowest level from x, `levels` those of each level from the level below. A
    latent whose posterior is not conditioned on x has no level.

    References:
        Ladder Variational Autoencoders (Sonderby et al., 2016), https://arxiv.org/abs/1602.02282
    """

    kind: Literal["bottom_up"] = "bottom_up"
    levels: Network = MLP(hidden=(300,))
    """Network from a level's features to those of the level above."""

    def build(self, known: Mapping[str, Shape], sites: Sequence[Site]) -> EncoderModule:
        return BottomUpModule(self.network, self.levels, known, sites)
