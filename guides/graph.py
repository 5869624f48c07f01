"""The Pyro guide of a declared graph: encode x, walk the latents in inference order, sample each posterior."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pvae.guides.encoders import EncoderModule
from pvae.site import Site, data_plate


class GraphGuide(nn.Module):
    """q(z | x) = prod_l q(z_l | x, latents before it), as a Pyro program.

    Arguments:
        sites: the latents in the guide's own order, those it conditions on first.
        encoder: prepares what every posterior reads.
        posteriors: one module per latent.
    """

    def __init__(self, sites: tuple[Site, ...], encoder: EncoderModule, posteriors: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.sites = sites
        self.encoder = encoder
        self.posteriors = nn.ModuleDict(posteriors)

    def posterior(self, name: str, x: Tensor) -> dist.TorchDistribution:
        """q(z_name | x) of a latent that reads x alone, as a function of any x `(batch, *event)`; differentiable."""
        site = next(site for site in self.sites if site.name == name)
        return self.posteriors[name](self.encoder.inputs_of(site, self.encoder(x), {}))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Sample every latent of a batch `(batch, *event)`; returns their features by name."""
        seen: dict[str, Tensor] = {}
        with data_plate(x.shape[0]):
            features = self.encoder(x)
            for site in self.sites:
                inputs = self.encoder.inputs_of(site, features, seen)
                seen[site.name] = pyro.sample(site.name, self.posteriors[site.name](inputs))
        return seen
