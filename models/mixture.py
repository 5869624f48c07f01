"""Mixtures of one exponential family as a prior: of learned normals, or of posteriors at learned pseudo-inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

import pyro.distributions as dist
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Shape
from pvae.exponential import FullRankNormals, Members, Normals
from pvae.models.priors import Prior
from pvae.normal import LogVarianceBounds
from pvae.site import Link, Site

Size = torch.Size | list[int] | tuple[int, ...]


class Mixture(dist.TorchDistribution):
    r"""sum_k w_k q_k(z) over members of one exponential family: a matrix product and a logsumexp, differentiable.

    log q_k(z) = <T(z), eta_k> - A(eta_k). The product takes differences of terms of size z^2 / 2 s^2, so it is made
    in float64 whatever the members are; the result has their type.

    Arguments:
        members: K of them, over values `(D,)`.
        log_weights: log w_k, `(K,)`, normalised; None for even weights.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(self, members: Members, log_weights: Tensor | None = None, batch_shape: Size = ()) -> None:
        self.members, self.log_weights = members, log_weights
        super().__init__(torch.Size(batch_shape), torch.Size((members.dim,)), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(z) of `(..., D)`, nats, `(...)`; exact."""
        members = self.members.double()
        eta, constant = members.natural()
        even = constant.new_tensor(-math.log(len(members)))
        weights = even if self.log_weights is None else self.log_weights.double()
        flat = value.reshape(-1, self.event_shape[0]).double()
        scores = torch.addmm(constant + weights, members.statistics(flat, members.origin), eta)
        return scores.logsumexp(-1).to(value.dtype).reshape(value.shape[:-1])

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Ancestral draws `sample_shape + batch_shape + (D,)`."""
        shape = torch.Size(sample_shape) + self.batch_shape
        count = shape.numel()
        with torch.no_grad():
            if self.log_weights is None:
                index = torch.randint(len(self.members), (count,), device=self.members.origin.device)
            else:
                index = torch.multinomial(self.log_weights.exp(), count, replacement=True)
            return self.members.rows(index).sample().reshape(shape + self.event_shape)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Mixture:
        """The same mixture over more batch dimensions."""
        return self if self.batch_shape == tuple(batch_shape) else Mixture(self.members, self.log_weights, batch_shape)


# ---------------------------------------------------------------------- learned normals


class NormalMixtureModule(nn.Module):
    """Weights, means and variances of K normals."""

    def __init__(self, components: int, dim: int, bounds: tuple[float, float]) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.randn(components, dim))
        self.log_variance = nn.Parameter(torch.zeros(components, dim))
        self.logits = nn.Parameter(torch.zeros(components))
        self.bounds = bounds

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """The mixture, with batch shape `()`."""
        scale = self.log_variance.clamp(*self.bounds).mul(0.5).exp()
        return Mixture(Normals(self.loc, scale), self.logits.log_softmax(0))


@final
class MixturePrior(Prior):
    """sum_k w_k N(m_k, diag s_k^2): weights, means and variances are learned."""

    kind: Literal["mixture"] = "mixture"
    components: int = Field(default=500, gt=0)
    """K."""
    log_variance: LogVarianceBounds = (-6.0, 2.0)

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        """See `Prior.build`."""
        return NormalMixtureModule(self.components, site.event[0], self.log_variance)


# ---------------------------------------------------------------------- posteriors at pseudo-inputs


class VampModule(nn.Module):
    """Pseudo-inputs in [0, 1]; the guide, reached through the link, gives its posterior at each."""

    def __init__(self, components: int, x: Shape, name: str, link: Link) -> None:
        super().__init__()
        self.pseudo_inputs = nn.Parameter(torch.rand(components, *x))
        self.name, self.link = name, link

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """The mixture of posteriors, with batch shape `()`."""
        return Mixture(as_members(self.link.guide.posterior(self.name, self.pseudo_inputs.clamp(0.0, 1.0))))


@final
class VampPrior(Prior):
    r"""1/K sum_k q(z | u_k): the guide's own posterior at learned pseudo-inputs u_k in [0, 1].

    Its gradient reaches the encoder too. The latent's posterior must read x alone.

    References:
        VAE with a VampPrior (Tomczak, Welling, 2018), https://arxiv.org/abs/1705.07120
    """

    kind: Literal["vamp"] = "vamp"
    reads_guide: ClassVar[bool] = True
    components: int = Field(default=500, gt=0)
    """K."""

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        """See `Prior.build`."""
        return VampModule(self.components, link.x, site.name, link)


def as_members(fn: Any) -> Members:
    """The distributions of a batch `(K,)` as members, differentiable."""
    while isinstance(fn, torch.distributions.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    if isinstance(fn, torch.distributions.MultivariateNormal):
        return FullRankNormals(fn.loc, fn.scale_tril)
    return Normals(fn.loc, fn.scale)
