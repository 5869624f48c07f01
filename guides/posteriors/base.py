"""Posteriors over one latent, `q(z | x, ...)`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from pvae.component import Component, Names, Shape
from pvae.graph.link import Link
from pvae.graph.site import OBSERVED, Site
from pvae.graph.space import Space, Values
from pvae.nn.codebook import Codebook


class Posterior(Component):
    """The density of a latent in the guide."""

    default: ClassVar[str] = "normal"
    values: ClassVar[Values] = "real"
    """Values of the latents it is for: a real vector (`dim`), codes, or bits."""
    carries: ClassVar[bool] = False
    """True if it looks codes up in an embedding, whose gradient an index cannot carry."""
    reads_features: ClassVar[bool] = True
    """True if it reads the encoder's features, False if it reads x itself."""
    reads_prior: ClassVar[bool] = False
    """True if it asks the model for p(z | parents): it is then given those parents too."""
    summed: ClassVar[bool] = False
    """True if the model sums the latent out, so that the guide does not sample it."""
    infers: ClassVar[bool] = True
    """False if it does not depend on x."""
    determines: ClassVar[str | None] = None
    """Kind of the likelihood under which z determines x, if it needs one."""
    given: Names = (OBSERVED,)
    """Conditions: x and, in a hierarchy, other latents."""

    def sampled(self, space: Space) -> Space:
        """Return the space of the values it samples, for a latent of some space: another one if it relaxes codes."""
        return space

    def follows_prior(self, given: tuple[str, ...]) -> bool:
        """True if another prior would change this posterior, for a latent with these parents in the model."""
        return self.reads_prior or self.summed

    def codebook(self, codes: int, width: int) -> nn.Module:
        """Return the table of embeddings `(codes, width)` that the model reads."""
        return Codebook(codes, width)

    @abstractmethod
    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        """Return a module from what the latent is given to its distribution.

        It is called with the prepared inputs, `name -> (..., *inputs[name])`, and with the features of all latents
        sampled so far, and gives a distribution of event `site.event`.
        """


class PosteriorModule(nn.Module):
    """Base of the modules of posteriors whose Pyro sites hold more than a distribution."""

    learns_baseline = False
    """True if a network predicts the gain of its score function."""

    def infer(self, inputs: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return the `infer` entry of its Pyro site, for prepared inputs as in `Posterior.build`."""
        return None

    def penalties(self, found: Any, row: Tensor) -> dict[str, Tensor]:
        """Return penalties `(...)` by name, which the loss adds to minus the ELBO.

        Arguments:
            found: its distribution, which has the looked-up vectors as `point`.
            row: the embedding of the code found, `(..., *features)`.
        """
        raise NotImplementedError  # pragma: no cover - only of posteriors that look codes up
