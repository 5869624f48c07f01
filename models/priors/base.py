"""Priors over one latent, `p(z)` or `p(z | parents)`."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from pvae.component import Component, Shape
from pvae.graph.site import Link, Site, Values


class Prior(Component):
    """Declared prior p(z) or p(z | parents): distribution of one latent in the model."""

    values: ClassVar[tuple[Values, ...]] = ("real",)
    """Kinds of latents that the prior supports: real vectors, code indices, bits or relaxed one-hots."""
    reads_parents: ClassVar[bool] = False
    """True if the prior can be declared for a latent with parents in the model."""
    needs_parents: ClassVar[bool] = False
    """True if the latent must have parents in the model."""
    ignores_parents: ClassVar[bool] = False
    """True if the latent may have parents but this prior ignores them; one fitted later by `refit` may use them."""
    reads_guide: ClassVar[bool] = False
    """True if the prior is made of the latent's posteriors in the guide, which must then depend on x alone."""

    @abstractmethod
    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        """Return the module from parents' features `name -> (..., *shape)` to a distribution of event `site.event`."""


class MixtureWeights(nn.Module):
    """Base of priors over mixture components whose weights have a closed-form M-step, for the objective `em`."""

    def maximise(self, counts: Tensor) -> None:
        """Set the weights, if learned, to the proportions of `counts` `(K,)`, the sums of responsibilities."""
        raise NotImplementedError  # pragma: no cover - abstract
