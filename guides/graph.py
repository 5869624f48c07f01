"""The Pyro guide of a declared graph: encode x, walk the latents in inference order, sample each posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from pvae.distributions.base import Determined
from pvae.graph.frame import Frame, data_plate
from pvae.graph.link import Link
from pvae.graph.site import EMBEDDED, OBSERVED, Site, embedded
from pvae.guides.encoders import EncoderModule
from pvae.guides.posteriors.base import PosteriorModule


class GraphGuide(nn.Module):
    """Pyro guide q(z | x) = prod_l q(z_l | x, earlier latents), conditional on the covariates of a row if any.

    Arguments:
        sites: the latents in the guide's order, those it conditions on first; none that the model sums out.
        encoder: computes the inputs of the posteriors; None if all of them read x itself.
        posteriors: one module per latent.
        frame: the layout of a row of data: the datum x, then the covariates.
        link: access to the model, which holds the priors and the embeddings of codes.
        reader: fixed encoding of x; None if encoder and posteriors read x as it is.
    """

    def __init__(
        self,
        sites: tuple[Site, ...],
        encoder: EncoderModule | None,
        posteriors: Mapping[str, nn.Module],
        frame: Frame,
        link: Link,
        reader: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.sites = sites
        self.encoder = encoder
        self.posteriors = nn.ModuleDict(posteriors)
        self.frame = frame
        self.link = link
        self.reader = reader

    def posterior(self, name: str, x: Tensor) -> dist.TorchDistribution:
        """Return q(z_name | x), for any x `(batch, *event)`, of a latent conditioned on x alone; differentiable."""
        site = next(site for site in self.sites if site.name == name)
        x = self._read(x)
        return self.posteriors[name](self._inputs(site, x, self._encoded(x), {}), {})

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        """Sample the latents of rows `(batch, *row)`; return the features of covariates and latents by name."""
        x, seen = self.frame.split(rows)
        x = self._read(x)
        with data_plate(rows.shape[0]):
            features = self._encoded(x)
            for site in self.sites:
                posterior, inputs = self.posteriors[site.name], self._inputs(site, x, features, seen)
                fn = posterior(inputs, seen)
                infer: Any = posterior.infer(inputs) if isinstance(posterior, PosteriorModule) else None
                seen[site.name] = self.link.model.see(site, pyro.sample(site.name, fn, infer=infer), x)
                if site.carries:
                    seen[site.name] = self._carried(site, posterior, fn, seen[site.name])
        return seen

    @staticmethod
    def _carried(site: Site, posterior: Any, found: Any, row: Tensor) -> Tensor:
        """Return the codebook row of a nearest code, with the straight-through gradient of the encoder's vector.

        The row is a Pyro site of its own, a point mass in model and guide, because an index carries no gradient.
        """
        through = row.detach() + (found.point - found.point.detach())
        infer: Any = {**EMBEDDED, "penalties": posterior.penalties(found, row), "point": found.point}
        return pyro.sample(embedded(site.name), Determined(through, event_dim=len(site.features)), infer=infer)

    def _read(self, x: Tensor) -> Tensor:
        return x if self.reader is None else self.reader(x)

    def _encoded(self, x: Tensor) -> Tensor:
        return x if self.encoder is None else self.encoder(x)

    def _inputs(self, site: Site, x: Tensor, features: Tensor, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.encoder is not None and site.name in self.encoder.shapes:
            return self.encoder.inputs_of(site, features, seen)
        return {name: x if name == OBSERVED else seen[name] for name in site.guide_given}
