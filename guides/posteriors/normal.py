"""Normal posteriors: diagonal, or with a covariance of full rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, final

import pyro.distributions as dist
from torch import Tensor, nn

from pvae.component import Shape
from pvae.graph.link import Link
from pvae.graph.site import Site
from pvae.guides.posteriors.base import Posterior
from pvae.nn.network import MLP, LogVarianceBounds, Network, NetworkModule, NormalHead, lower_factor


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
        network = self.network or MLP(hidden=())
        return NormalHead(network.build(inputs, (2 * site.event[0],)), self.log_variance)


class FullRankHead(nn.Module):
    """Module of the full-rank normal posterior: a network's output is mean, log-variances and a unit lower triangle."""

    def __init__(self, network: NetworkModule, dim: int, bounds: tuple[float, float]) -> None:
        super().__init__()
        self.network, self.dim, self.bounds = network, dim, bounds

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return N(loc, L L^T), with batch shape `(...)`, given named inputs `(..., *shape)`."""
        d = self.dim
        loc, log_variance, below = self.network(inputs).split([d, d, d * (d - 1) // 2], -1)
        scale = log_variance.clamp(*self.bounds).mul(0.5).exp()
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
        network = (self.network or MLP(hidden=())).build(inputs, (2 * d + d * (d - 1) // 2,))
        return FullRankHead(network, d, self.log_variance)
