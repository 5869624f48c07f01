"""Normal posteriors, diagonal or with a covariance of full rank, and the point of an autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal, final

import pyro.distributions as dist
from torch import Tensor, nn

from pvae.component import Shape
from pvae.distributions.base import Determined
from pvae.graph.link import Link
from pvae.graph.site import Site
from pvae.guides.posteriors.base import Head, Posterior, head
from pvae.nn.network import LogVarianceBounds, Network, NormalHead, lower_factor


@final
class NormalPosterior(Posterior):
    """Amortised mean-field normal posterior N(mu(x), diag sigma^2(x)).

    References:
        Auto-Encoding Variational Bayes (Kingma, Welling, 2013), https://arxiv.org/abs/1312.6114
    """

    kind: Literal["normal"] = "normal"
    log_variance: LogVarianceBounds = (-12.0, 6.0)
    network: Network | None = None
    """Network from the encoder's features to the parameters of the normal; default: one linear map."""

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return NormalHead(head(self.network, inputs, (2 * site.event[0],)), self.log_variance)


def full_rank_normal(parameters: Tensor, dim: int, bounds: tuple[float, float]) -> dist.TorchDistribution:
    """Return N(loc, L L^T) of `dim` coordinates, given its mean, log-variances and unit lower triangle `(..., P)`."""
    loc, log_variance, below = parameters.split([dim, dim, dim * (dim - 1) // 2], -1)
    scale = log_variance.clamp(*bounds).mul(0.5).exp()
    return dist.MultivariateNormal(loc, scale_tril=lower_factor(scale, below), validate_args=False)


@final
class FullRankNormalPosterior(Posterior):
    r"""Normal posterior N(mu(x), L(x) L(x)^T) of full covariance, with L = diag(s) (I + strictly lower triangle).

    References:
        An Introduction to Variational Autoencoders (Kingma, Welling, 2019), https://arxiv.org/abs/1906.02691, 2.5.1
    """

    kind: Literal["full_rank_normal"] = "full_rank_normal"
    log_variance: LogVarianceBounds = (-12.0, 6.0)
    """Bounds of the log-variance of a coordinate given those before it."""
    network: Network | None = None
    """Network from the encoder's features to the parameters of the normal; default: one linear map."""

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        d = site.event[0]
        network = head(self.network, inputs, (2 * d + d * (d - 1) // 2,))
        return Head(network, partial(full_rank_normal, dim=d, bounds=self.log_variance))


@final
class DeltaPosterior(Posterior):
    """Deterministic posterior z = mu(x) of an autoencoder; it has no density, and its "ELBO" log p(x, z) is no bound.

    With `objective.beta = 0` the loss does not depend on the prior; `refit` then fits a prior to the latents.
    """

    kind: Literal["delta"] = "delta"
    network: Network | None = None
    """Network from the encoder's features to z; default: one linear map."""

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return Head(head(self.network, inputs, site.event), Determined)
