"""Encoders of x, and the Pyro guide of a declared graph: encode x, then sample each posterior in inference order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
from torch import Tensor, nn

from pvae.component import Component, Shape
from pvae.distributions import Determined, observed
from pvae.graph.frame import Frame
from pvae.graph.site import EMBEDDED, OBSERVED, Link, Site, embedded
from pvae.graph.statements import data_plate, sample
from pvae.guides.posteriors.base import PosteriorModule
from pvae.nn.network import MLP, Network, NetworkModule

FEATURES = "features"
"""Name of the output of an encoder's network among the inputs of a posterior."""


class EncoderModule(nn.Module):
    """Module of an encoder: `forward` runs once per batch, then `inputs_of` for each latent in turn."""

    shapes: dict[str, dict[str, Shape]]
    """Event shapes of the inputs of each latent's posterior: latent name -> input name -> shape."""

    def inputs_of(self, site: Site, features: Any, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs of a posterior, by name, from the result of `forward` and the latents sampled so far.

        Here the features take the place of x.
        """
        return {name: features if name == OBSERVED else seen[name] for name in site.guide_given}


class Encoder(Component):
    """Declared encoder: the networks from x to the features that the posteriors of the guide read."""

    default: ClassVar[str] = "shared"

    module: ClassVar[type[EncoderModule]]
    network: Network = MLP()
    """Network from x to features."""

    def build(self, known: Mapping[str, Shape], sites: Sequence[Site]) -> EncoderModule:
        """Return the module that computes the inputs of every posterior.

        Arguments:
            known: event shapes of x (named `x`), of the covariates and of all latents, by name.
            sites: the latents whose posteriors read features, in the guide's order.
        """
        return self.module(self, known, sites)


def laid_out(network: Network, inputs: Mapping[str, Shape], sites: Sequence[Site]) -> NetworkModule:
    """Return the feature network of `inputs`; features lie on the finest grid of the latents if it supports grids."""
    grids = [site.space.plane for site in sites if site.space.plane]
    return network.build(inputs, network.features_on(max(grids, key=prod)) if grids else None)


def shapes_of(site: Site, known: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the event shapes of all variables that the posterior of `site` is conditioned on, by name."""
    return {name: known[name] for name in site.guide_given}


class SharedModule(EncoderModule):
    """Module of the encoder `shared`: one network on x, whose features all posteriors read in place of x."""

    def __init__(self, declared: Any, known: Mapping[str, Shape], sites: Sequence[Site]) -> None:
        super().__init__()
        self.network = laid_out(declared.network, {OBSERVED: known[OBSERVED]}, sites)
        known = {**known, OBSERVED: self.network.output}
        self.shapes = {site.name: shapes_of(site, known) for site in sites}

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of x `(..., *event)`: `(..., width)` or, on a grid of codes, `(..., C, *grid)`."""
        return self.network({OBSERVED: x})


class SharedEncoder(Encoder):
    """One network on x for all latents; each posterior adds its own head."""

    kind: Literal["shared"] = "shared"
    module: ClassVar[type[EncoderModule]] = SharedModule


class PerLatentModule(EncoderModule):
    """Module of the encoder `per_latent`: one network per latent, on x and the latents that its posterior reads."""

    def __init__(self, declared: Any, known: Mapping[str, Shape], sites: Sequence[Site]) -> None:
        super().__init__()
        networks = {site.name: laid_out(declared.network, shapes_of(site, known), [site]) for site in sites}
        self.networks = nn.ModuleDict(networks)
        self.shapes = {name: {FEATURES: module.output} for name, module in self.networks.items()}  # type: ignore[dict-item]

    def forward(self, x: Tensor) -> Tensor:
        """Return x itself: the networks run for each latent in `inputs_of`."""
        return x

    def inputs_of(self, site: Site, features: Tensor, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {FEATURES: self.networks[site.name](super().inputs_of(site, features, seen))}


class PerLatentEncoder(Encoder):
    """One network per latent, on x and the latents that its posterior is conditioned on.

    References:
        VAE with a VampPrior (Tomczak, Welling, 2018), https://arxiv.org/abs/1705.07120 (its two-level form)
    """

    kind: Literal["per_latent"] = "per_latent"
    module: ClassVar[type[EncoderModule]] = PerLatentModule


class BottomUpModule(EncoderModule):
    """Module of the encoder `bottom_up`: networks from x upwards, each from the features of a level to the next."""

    def __init__(self, declared: Any, known: Mapping[str, Shape], sites: Sequence[Site]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict()
        self.shapes = {}
        below = {OBSERVED: known[OBSERVED]}
        for site in reversed(sites):
            others = {name: known[name] for name in site.guide_given if name != OBSERVED}
            if OBSERVED in site.guide_given:
                built = laid_out(declared.levels if self.networks else declared.network, below, [site])
                self.networks[site.name] = built
                below = {FEATURES: built.output}
                others = {**below, **others}
            self.shapes[site.name] = others

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


class BottomUpEncoder(Encoder):
    """Deterministic features of x, level by level from the lowest latent to the top, for ladder or top-down posteriors.

    `network` computes the features of the lowest level from x, `levels` those of each level from the level below. A
    latent whose posterior is not conditioned on x has no level.

    References:
        Ladder Variational Autoencoders (Sonderby et al., 2016), https://arxiv.org/abs/1602.02282
    """

    kind: Literal["bottom_up"] = "bottom_up"
    module: ClassVar[type[EncoderModule]] = BottomUpModule
    levels: Network = MLP(hidden=(300,))
    """Network from a level's features to those of the level above."""


class GraphGuide(nn.Module):
    """Pyro guide q(z | x) = prod_l q(z_l | x, earlier latents), conditional on the covariates of a row if any.

    Arguments:
        sites: the latents in the guide's order, those it conditions on first; none that the model sums out.
        encoder: computes the inputs of the posteriors; None if all of them read x itself.
        posteriors: one module per latent.
        frame: the layout of a row of data: the datum x, then the covariates.
        link: access to the model, which holds the priors and the embeddings of codes.
        reader: fixed encoding of x; None if encoder and posteriors read x as it is.
        classification: weight of the penalty -log q(value | x) of latents whose values are known in some rows.
    """

    def __init__(
        self, sites: tuple[Site, ...], encoder: EncoderModule | None, posteriors: Mapping[str, nn.Module], frame: Frame,
        link: Link, reader: nn.Module | None = None, classification: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sites, self.frame, self.link, self.classification = sites, frame, link, classification
        self.encoder, self.posteriors, self.reader = encoder, nn.ModuleDict(posteriors), reader

    def posterior(self, name: str, x: Tensor) -> dist.TorchDistribution:
        """Return q(z_name | x), for any x `(batch, *event)`, of a latent conditioned on x alone; differentiable."""
        site = next(site for site in self.sites if site.name == name)
        x, features = self._encoded(x)
        return self.posteriors[name](self._inputs(site, x, features, {}), {})

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        """Sample the latents of rows `(batch, *row)`; return the features of covariates and latents by name.

        A latent whose value a row holds has that value there, instead of a sample of its posterior.
        """
        x, seen = self.frame.split(rows)
        known = self.frame.known(rows, every=self.training)
        with data_plate(rows.shape[0]):
            x, features = self._encoded(x)
            for site in self.sites:
                posterior, inputs = self.posteriors[site.name], self._inputs(site, x, features, seen)
                fn = posterior(inputs, seen)
                infer: Any = posterior.infer(inputs) if isinstance(posterior, PosteriorModule) else None
                if site.name in known:
                    fn, log_q = observed.observed(fn, known[site.name])
                    weighed = {"classification": -self.classification * log_q} if self.classification else {}
                    infer = {**(infer or {}), "penalties": weighed}
                seen[site.name] = self.link.model.see(site, sample(site.name, fn, infer=infer), x)
                if site.carries:
                    seen[site.name] = self._carried(site, posterior, fn, seen[site.name])
        return seen

    def along(
        self, x: Tensor, seen: dict[str, Tensor], take: Callable[[dist.TorchDistribution], Tensor]
    ) -> Iterator[dist.TorchDistribution]:
        """Yield q(z | x, earlier latents) of every latent in order, each latent set to the value `take` gives for it.

        Arguments:
            x: data `(batch, *event)`.
            seen: features of the covariates by name, to which those of the latents are added.
            take: from a posterior to a value of its latent, `(batch, *event)`.
        """
        x, features = self._encoded(x)
        for site in self.sites:
            yield (fn := self.posteriors[site.name](self._inputs(site, x, features, seen), seen))
            seen[site.name] = self.link.model.see(site, take(fn), x)

    @staticmethod
    def _carried(site: Site, posterior: Any, found: Any, row: Tensor) -> Tensor:
        """Return the row of a quantised code, with a gradient that goes on to the encoder's vector.

        The row is a Pyro site of its own, a point mass in model and guide, because an index carries no gradient.
        """
        infer: Any = {**EMBEDDED, "penalties": posterior.penalties(found, row), "point": found.point}
        point = Determined(posterior.through(found, row), event_dim=len(site.features))
        return sample(embedded(site.name), point, infer=infer)

    def _encoded(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return x as encoder and posteriors read it, and its features."""
        x = x if self.reader is None else self.reader(x)
        return x, x if self.encoder is None else self.encoder(x)

    def _inputs(self, site: Site, x: Tensor, features: Tensor, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.encoder is not None and site.name in self.encoder.shapes:
            return self.encoder.inputs_of(site, features, seen)
        return {name: x if name == OBSERVED else seen[name] for name in site.guide_given}
