"""Exact posterior of a code by Bayes' rule: the model sums the latent out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, final

from torch import nn

from pvae.component import Shape
from pvae.graph.link import Link
from pvae.graph.site import Site, Values
from pvae.guides.posteriors.base import Posterior


@final
class ExactPosterior(Posterior):
    """Exact posterior p(c | x) by Bayes' rule: the model sums over all codes, and the ELBO is log p(x) (exact E-step).

    Its gradient is that of Pyro's `TraceEnum_ELBO`; with the objective `em` both steps are in closed form.
    """

    kind: Literal["exact"] = "exact"
    values: ClassVar[Values] = "index"
    reads_features: ClassVar[bool] = False
    summed: ClassVar[bool] = True

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        """Return an empty module: the guide does not sample this latent."""
        return nn.Identity()
