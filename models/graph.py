"""The Pyro model of a declared graph: walk the latents in generative order, then observe x."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
from torch import Tensor, nn

from pvae.models.decoders import DecoderModule
from pvae.site import OBSERVED, Site, data_plate


class GraphModel(nn.Module):
    """p(x, z) = prod_l p(z_l | parents) p(x | z), as a Pyro program.

    Arguments:
        sites: the latents, parents first.
        priors: one module per latent.
        decoder: from the latents to p(x | z).
    """

    def __init__(self, sites: tuple[Site, ...], priors: Mapping[str, nn.Module], decoder: DecoderModule) -> None:
        super().__init__()
        self.sites = sites
        self.priors = nn.ModuleDict(priors)
        self.decoder = decoder

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Sample (or observe) x.

        Arguments:
            x: data `(batch, *event)`; None to sample from the model.
            size: batch size when x is None (1 unless said).

        Returns:
            x `(batch, *event)`.
        """
        count = x.shape[0] if x is not None else size or 1
        seen: dict[str, Tensor] = {}
        with data_plate(count):
            for site in self.sites:
                seen[site.name] = pyro.sample(site.name, self.priors[site.name](seen))
            return pyro.sample(OBSERVED, self.decoder(seen), obs=x)
