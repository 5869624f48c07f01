"""Prior that is a variational autoencoder of the latent itself: a VAE on latents, real, codes or bits."""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar, Literal

import pyro.distributions as dist
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Shape
from pvae.distributions import Batched, bits, code_grid
from pvae.distributions.codes import Enumerated
from pvae.graph.site import Link, Site, Values
from pvae.models.priors.base import Prior
from pvae.nn.network import MLP, LogVarianceBounds, Network, NormalHead, diagonal_normal
from pvae.util.types import Size

U = "u"
"""Name of the inner latent among the inputs of the decoder's network."""


class VAEPrior(Prior):
    """Prior p(z) = int p(z | u) N(u; 0, I) du of a VAE over z, with an encoder q(u | z); fitted by `refit` or jointly.

    log p(z) is a lower bound: in training the ELBO of one sample of u, elsewhere that of `samples` importance weights.
    The KL of z and its marginal KL are therefore upper bounds, ELBO and evidence remain lower bounds. The weights are
    unbiased: the mean of exp log p(z) over the draws of u is p(z).

    References:
        Diagnosing and Enhancing VAE Models (Dai, Wipf, 2019), https://arxiv.org/abs/1903.05789
        Importance Weighted Autoencoders (Burda et al., 2015), https://arxiv.org/abs/1509.00519
    """

    kind: Literal["vae"] = "vae"
    values: ClassVar[tuple[Values, ...]] = ("real", "index", "binary")
    dim: int = Field(default=16, gt=0, le=10_000)
    """Number of coordinates of u."""
    encoder: Network = MLP()
    """Network from the features of z to mean and log-variance of q(u | z)."""
    network: Network = MLP()
    """Network from u to the parameters of p(z | u): mean and log-variance, or the logits of every code or bit."""
    samples: int = Field(default=16, gt=0, le=10_000)
    """Number of importance weights of the bound on log p(z), outside training."""
    log_variance: LogVarianceBounds = (-12.0, 6.0)

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return VAEModule(site, self)


class VAEModule(nn.Module):
    """Encoder q(u | z) and decoder p(z | u) of the prior `vae` of a latent z."""

    def __init__(self, site: Site, declared: VAEPrior) -> None:
        super().__init__()
        self.space, self.dim, self.samples = site.space, declared.dim, declared.samples
        self.bounds = declared.log_variance
        per = {"real": 2, "binary": 1}.get(site.space.values, site.space.states)
        # Codes are read as one-hots: the codebook belongs to the model, which may not be trained with the prior.
        seen = (per, *site.space.grid) if site.space.is_code else site.event
        self.encoder = NormalHead(declared.encoder.build({site.name: seen}, (2 * self.dim,)), self.bounds)
        self.decoder = declared.network.build({U: (self.dim,)}, (per * math.prod(site.event),))
        self.name = site.name
        self.zero = nn.Buffer(torch.zeros(self.dim), persistent=False)

    def forward(self, _given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the distribution of z, with batch shape `()`."""
        return VAEDensity(self) if self.space.values == "real" else CodesVAEDensity(self)

    def decode(self, u: Tensor) -> dist.TorchDistribution:
        """Return p(z | u) of u `(..., dim)`, of batch shape `(...)`."""
        h = self.decoder({U: u})
        if self.space.values == "real":
            return diagonal_normal(h, self.bounds)
        grid = self.space.grid
        return code_grid(h.unflatten(-1, (*grid, -1)), len(grid)) if self.space.is_code else bits(h)

    @property
    def inner(self) -> dist.TorchDistribution:
        """Standard normal distribution of u, event shape `(dim,)`."""
        return dist.Normal(self.zero, torch.ones_like(self.zero), validate_args=False).to_event(1)


class VAEDensity(Batched):
    """Distribution p(z) of the prior `vae`, for any batch shape; its density is a bound."""

    is_bound = True
    """Marks a distribution whose `log_prob` is a lower bound on the log density, by samples of its own."""

    def __init__(self, module: VAEModule) -> None:
        self.module = module
        super().__init__(torch.Size(), torch.Size(module.space.event), validate_args=False)

    @cached_property
    def support(self) -> constraints.Constraint | None:
        """Support of p(z | u), the same for every u."""
        return self.module.decode(self.module.zero).support

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the bound on log p(z) of z `(..., *event)`, nats, `(...)`, by fresh samples of u."""
        module, space = self.module, self.module.space
        lead = torch.broadcast_shapes(value.shape[: value.dim() - len(space.event)], self.batch_shape)
        value = value.expand(lead + self.event_shape)
        q = module.encoder({module.name: space.see(value, module.zero)})
        u = q.rsample(torch.Size([1 if module.training else module.samples]))
        log_w = module.inner.log_prob(u) + module.decode(u).log_prob(value) - q.log_prob(u)
        return log_w.logsumexp(0) - math.log(len(u))

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return samples `sample_shape + batch_shape + event`: u ~ N(0, I), then z ~ p(z | u)."""
        with torch.no_grad():
            u = self.module.inner.sample(torch.Size(sample_shape) + self.batch_shape)
            return self.module.decode(u).sample()


class CodesVAEDensity(Enumerated, VAEDensity):  # type: ignore[override]
    """Distribution p(z) of the prior `vae` over codes or bits, whose joint states can be enumerated if few."""

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """Values of one element, `(K,)`: the codes 0 .. K - 1, or 0 and 1."""
        states = torch.arange(self.module.space.states, device=self.module.zero.device)
        return states if self.module.space.is_code else states.to(self.module.zero)
