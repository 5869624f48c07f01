"""Posteriors over one latent, `q(z | x, ...)`, and their heads: from features to a distribution's parameters."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from pvae.component import Component, Names, Shape
from pvae.graph.site import OBSERVED, Link, Site, Space, Values
from pvae.nn.codebook import Codebook
from pvae.nn.conv import Pointwise
from pvae.nn.network import MLP, Network, NetworkModule


class Posterior(Component):
    """Declared posterior q(z | x, ...): variational distribution of one latent in the guide."""

    default: ClassVar[str] = "normal"
    values: ClassVar[Values] = "real"
    """Kind of latents that the posterior supports: real vectors (`dim`), codes, or bits."""
    carries: ClassVar[bool] = False
    """True if the codebook row of a code is sampled at a site of its own, because an index carries no gradient."""
    reads_features: ClassVar[bool] = True
    """True if the posterior reads the encoder's features, False if it reads x itself."""
    reads_prior: ClassVar[bool] = False
    """True if the posterior uses the model's p(z | parents); it is then conditioned on those parents too."""
    summed: ClassVar[bool] = False
    """True if the model sums the latent out exactly, so that the guide does not sample it."""
    infers: ClassVar[bool] = True
    """True if the posterior depends on x; False for the guide of a GAN."""
    determines: ClassVar[str | None] = None
    """Kind of the likelihood that this posterior requires, one under which z determines x; None if any will do."""
    given: Names = (OBSERVED,)
    """Names of the variables that the posterior is conditioned on: x and, in a hierarchy, other latents."""

    def sampled(self, space: Space) -> Space:
        """Return the space of the values that the posterior samples: `space`, or its relaxation if it relaxes codes."""
        return space

    def follows_prior(self, given: tuple[str, ...]) -> bool:
        """Return True if another prior changes this posterior, for a latent whose parents in the model are `given`."""
        return self.reads_prior or self.summed

    def codebook(self, codes: int, width: int) -> nn.Module:
        """Return a new module with the table of code embeddings `(codes, width)`, which the model holds."""
        return Codebook(codes, width)

    @abstractmethod
    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        """Return the module that computes the posterior distribution of a latent from its inputs.

        The module is called with the inputs, `name -> (..., *inputs[name])`, and with the features of all covariates
        and latents sampled so far, by name; it returns a distribution of event shape `site.event`.
        """


class PosteriorModule(nn.Module):
    """Base of posterior modules whose Pyro sites carry extra `infer` entries: an estimator, a baseline or penalties."""

    learns_baseline = False
    """True if the baseline of its score-function gradient is predicted by a network."""

    def infer(self, inputs: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return the `infer` dictionary of the latent's Pyro site, for the posterior's inputs; None for the default."""
        return None


class Linked(PosteriorModule):
    """Base of modules of posteriors that read the model of the pair.

    Arguments:
        site: the latent.
        link: access to the model.
        declared: the posterior as declared.
        network: network of the posterior; None if it has none.
    """

    def __init__(self, site: Site, link: Link, declared: Posterior, network: nn.Module | None = None) -> None:
        super().__init__()
        self.site, self.link, self.declared = site, link, declared
        self.network: Any = network


def head(network: Network | None, inputs: Mapping[str, Shape], output: Shape) -> NetworkModule:
    """Return the network from a posterior's inputs to its parameters `(..., *output)`.

    The default is one linear map; if features lie on the same grid as the output, one shared by all positions.
    """
    if network is not None:
        return network.build(inputs, output)
    if len(output) == 3 and any(len(shape) == 3 and shape[1:] == output[1:] for shape in inputs.values()):
        return Pointwise(inputs, output)
    return MLP(hidden=()).build(inputs, output)


def channels_last(h: Tensor, grid: int) -> Tensor:
    """Return a tensor `(..., C, *grid)` as `(..., *grid, C)`, for a grid of `grid` dimensions."""
    return h.movedim(-1 - grid, -1) if grid else h
