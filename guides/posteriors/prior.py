"""A guide that infers nothing: what a generator without a likelihood is paired with."""

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
    """The model's own p(z | parents)."""

    def __init__(self, site: Site, link: Link) -> None:
        super().__init__()
        self.site, self.link = site, link

    def forward(self, _inputs: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Features by name to p(z | parents)."""
        return self.link.model.prior(self.site.name, seen)


@final
class PriorPosterior(Posterior):
    """q(z | x) = p(z | parents): nothing is inferred, and x tells nothing of z. For the objective `gan` alone.

    The guide has no parameters of its own. With it a model that can only be drawn from is a Pyro pair like any other.
    """

    kind: Literal["prior"] = "prior"
    reads_features: ClassVar[bool] = False
    reads_prior: ClassVar[bool] = True
    infers: ClassVar[bool] = False
    given: Names = ()
    """Nothing: the parents in the model reach it through the model."""

    @field_validator("given")
    @classmethod
    def _given_nothing(cls, given: Names) -> Names:
        if given:
            raise ValueError(f"nothing, because the posterior prior infers nothing; got {list(given)}")
        return given

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return UninferredModule(site, link)
