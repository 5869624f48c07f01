"""The Pyro guide of a declared graph: encode x, walk the latents in inference order, sample each posterior."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pvae.guides.encoders import EncoderModule
from pvae.site import OBSERVED, Frame, Site, data_plate


class GraphGuide(nn.Module):
    """q(z | x) = prod_l q(z_l | x, latents before it), as a Pyro program; all of it given the covariates of a row.

    Arguments:
        sites: the latents in the guide's own order, those it conditions on first; none that the model sums out.
        encoder: prepares what every posterior reads; None where all read x itself.
        posteriors: one module per latent.
        frame: what a row of data holds.
    """

    def __init__(
        self,
        sites: tuple[Site, ...],
        encoder: EncoderModule | None,
        posteriors: Mapping[str, nn.Module],
        frame: Frame,
    ) -> None:
        super().__init__()
        self.sites = sites
        self.encoder = encoder
        self.posteriors = nn.ModuleDict(posteriors)
        self.frame = frame

    def posterior(self, name: str, x: Tensor) -> dist.TorchDistribution:
        """q(z_name | x) of a latent that reads x alone, as a function of any x `(batch, *event)`; differentiable."""
        site = next(site for site in self.sites if site.name == name)
        return self._posterior(site, x, self._encoded(x), {})

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        """Sample every latent of a batch of rows `(batch, *row)`; returns their features by name."""
        x, seen = self.frame.split(rows)
        with data_plate(rows.shape[0]):
            features = self._encoded(x)
            for site in self.sites:
                seen[site.name] = site.see(pyro.sample(site.name, self._posterior(site, x, features, seen)), x)
        return seen

    def _encoded(self, x: Tensor) -> Tensor:
        return x if self.encoder is None else self.encoder(x)

    def _posterior(self, site: Site, x: Tensor, features: Tensor, seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        if self.encoder is not None and site.name in self.encoder.shapes:
            inputs = self.encoder.inputs_of(site, features, seen)
        else:
            inputs = {name: x if name == OBSERVED else seen[name] for name in site.guide_given}
        return self.posteriors[site.name](inputs, seen)
