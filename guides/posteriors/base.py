"""Posteriors over one latent, `q(z | x, ...)`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, final

import pyro.distributions as dist
from torch import Tensor, nn

from pvae.component import Component, Names, Shape
from pvae.distributions.determined import Determined
from pvae.graph.site import OBSERVED, Link, Site, Values
from pvae.nn.codebook import Codebook
from pvae.nn.dense import MLP, Network, NetworkModule
from pvae.nn.heads import LogVarianceBounds, NormalHead, lower_factor


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


@final
class NormalPosterior(Posterior):
    """N(mu(x), diag sigma^2(x)), the amortised mean-field posterior.

    References:
        Auto-Encoding Variational Bayes (Kingma, Welling, 2013), https://arxiv.org/abs/1312.6114
    """

    kind: Literal["normal"] = "normal"
    log_variance: LogVarianceBounds = (-12.0, 6.0)
    network: Network | None = None
    """Between the encoder's features and the parameters; default: one linear map."""

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        network = self.network or MLP(hidden=())
        return NormalHead(network.build(inputs, (2 * site.event[0],)), self.log_variance)


class FullRankHead(nn.Module):
    """A network whose output is read as location, log-variances and the rows of a unit lower triangle."""

    def __init__(self, network: NetworkModule, dim: int, bounds: tuple[float, float]) -> None:
        super().__init__()
        self.network, self.dim, self.bounds = network, dim, bounds

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Named tensors `(..., *shape)` to N(loc, L L^T) with batch shape `(...)`."""
        d = self.dim
        loc, log_variance, below = self.network(inputs).split([d, d, d * (d - 1) // 2], -1)
        scale = log_variance.clamp(*self.bounds).mul(0.5).exp()
        return dist.MultivariateNormal(loc, scale_tril=lower_factor(scale, below), validate_args=False)


@final
class FullRankNormalPosterior(Posterior):
    r"""N(mu(x), L(x) L(x)^T), L = diag(s) (I + strictly lower triangle): coordinates may depend given x.

    References:
        An Introduction to Variational Autoencoders (Kingma, Welling, 2019), https://arxiv.org/abs/1906.02691, 2.5.1
    """

    kind: Literal["full_rank_normal"] = "full_rank_normal"
    log_variance: LogVarianceBounds = (-12.0, 6.0)
    """Of a coordinate given those before it."""
    network: Network | None = None
    """Between the encoder's features and the parameters; default: one linear map."""

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        d = site.event[0]
        network = (self.network or MLP(hidden=())).build(inputs, (2 * d + d * (d - 1) // 2,))
        return FullRankHead(network, d, self.log_variance)


# ---------------------------------------------------------------------- points


class PointHead(nn.Module):
    """A network whose output is the latent."""

    def __init__(self, network: NetworkModule) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Named tensors `(..., *shape)` to the point."""
        return Determined(self.network(inputs))


@final
class DeltaPosterior(Posterior):
    """A point z = mu(x): the code of an autoencoder. It has no density: its "ELBO" log p(x, z) bounds nothing.

    With `objective.beta = 0` the prior plays no part; `refit` then fits one to the codes.
    """

    kind: Literal["delta"] = "delta"
    network: Network | None = None
    """Between the encoder's features and the point; default: one linear map."""

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return PointHead((self.network or MLP(hidden=())).build(inputs, site.event))


# ---------------------------------------------------------------------- nothing to sample


@final
class ExactPosterior(Posterior):
    """p(c | x) by Bayes, over all codes: the model sums the latent out, and its ELBO is log p(x) (exact E-step).

    Its gradient is that of Pyro's `TraceEnum_ELBO`; with the objective `em` both steps are in closed form.
    """

    kind: Literal["exact"] = "exact"
    values: ClassVar[Values] = "index"
    reads_features: ClassVar[bool] = False
    summed: ClassVar[bool] = True

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        """Nothing: the guide has no such site."""
        return nn.Identity()
