"""Posterior equal to the prior, which infers nothing from x: for generators without a likelihood (GANs)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import pyro.distributions as dist
from pydantic import field_validator
from torch import Tensor, nn

from pvae.component import Names, Shape
from pvae.graph.link import Link
from pvae.graph.site import Site
from pvae.guides.posteriors.base import Posterior


class UninferredModule(nn.Module):
    """Module of the posterior `prior`: the model's own p(z | parents)."""

    def __init__(self, site: Site, link: Link) -> None:
        super().__init__()
        self.site, self.link = site, link

    def forward(self, _inputs: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return p(z | parents), given the features of the covariates and latents sampled so far, by name."""
        return self.link.model.prior(self.site.name, seen)


@final
class PriorPosterior(Posterior):
    """Posterior equal to the prior, q(z | x) = p(z | parents): nothing is inferred from x. For objective `gan` only.

    The guide has no parameters of its own. It makes a model that can only be sampled a Pyro model/guide pair.
    """

    kind: Literal["prior"] = "prior"
    reads_features: ClassVar[bool] = False
    reads_prior: ClassVar[bool] = True
    infers: ClassVar[bool] = False
    given: Names = ()
    """Variables that the posterior is conditioned on: none, since the parents reach it through the model's prior."""

    @field_validator("given")
    @classmethod
    def _given_nothing(cls, given: Names) -> Names:
        if given:
            raise ValueError(f"nothing, because the posterior prior infers nothing; got {list(given)}")
        return given

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return UninferredModule(site, link)
