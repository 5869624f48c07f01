"""Priors over one latent, `p(z)` or `p(z | parents)`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from pvae.component import Component, Shape
from pvae.graph.link import Link
from pvae.graph.site import Site
from pvae.graph.space import Values


class Prior(Component):
    """The density of a latent in the model."""

    values: ClassVar[tuple[Values, ...]] = ("real",)
    """Values of the latents it is for."""
    reads_parents: ClassVar[bool] = False
    """True if it can be declared for a latent with parents."""
    needs_parents: ClassVar[bool] = False
    """True if it must have them."""
    ignores_parents: ClassVar[bool] = False
    """True if parents may be declared and are not used; a `refit` may use them."""
    reads_guide: ClassVar[bool] = False
    """True if it asks the guide for the latent's posterior, which must then read x alone."""

    @abstractmethod
    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        """A module from the parents' features `name -> (..., *shape)` to a distribution of event `site.event`."""


class MixtureWeights(nn.Module):
    """Base of priors of the component of a mixture whose weights have a closed-form maximum."""

    def maximise(self, counts: Tensor) -> None:
        """Set the weights to the proportions of sums of responsibilities `(K,)`, where weights are learned."""
        raise NotImplementedError  # pragma: no cover - abstract
