"""Posteriors over one latent, `q(z | x, ...)`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from pvae.component import Component, Names, Shape
from pvae.graph.link import Link
from pvae.graph.site import OBSERVED, Site, Values
from pvae.nn.codebook import Codebook


class Posterior(Component):
    """The density of a latent in the guide."""

    default: ClassVar[str] = "normal"
    values: ClassVar[Values] = "real"
    """Whether the latent is a vector (`dim`), made of `codes`, or of `bits`."""
    is_relaxed: ClassVar[bool] = False
    """Whether it draws relaxed one-hots in place of codes."""
    is_hard: ClassVar[bool] = False
    """Whether these are seen as one-hots."""
    carries: ClassVar[bool] = False
    """Whether it looks codes up, and needs an embedding to do so."""
    reads_features: ClassVar[bool] = True
    """Whether it reads the encoder's features; else x itself."""
    reads_prior: ClassVar[bool] = False
    """Whether it asks the model for p(z | parents): it is then given those parents too."""
    summed: ClassVar[bool] = False
    """Whether the latent is summed out by the model, so that the guide does not sample it."""
    infers: ClassVar[bool] = True
    """Whether x has anything to do with it."""
    determines: ClassVar[str | None] = None
    """The kind of likelihood under which z determines x, if it needs one."""
    given: Names = (OBSERVED,)
    """What it is conditioned on: x and, in a hierarchy, other latents."""

    def follows_prior(self, given: tuple[str, ...]) -> bool:
        """Whether another prior would move this posterior, for a latent with these parents in the model."""
        return self.reads_prior or self.summed

    def codebook(self, codes: int, width: int) -> nn.Module:
        """The table of a code's embeddings, of which the model will read the rows."""
        return Codebook(codes, width)

    @abstractmethod
    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        """A module from what the latent is given to its distribution.

        It is called with the prepared inputs, `name -> (..., *inputs[name])`, and with the features of all latents
        sampled so far, and gives a distribution of event `site.event`.
        """


class PosteriorModule(nn.Module):
    """Base of what posteriors build that say more of themselves than their distribution."""

    learns_baseline = False
    """Whether a network foretells the gain of its score function."""
