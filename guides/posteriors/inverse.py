"""Posteriors that invert the decoder, so that a normalising flow is a VAE, for continuous or quantised data."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from typing import Any, ClassVar, Literal, final

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from pvae.component import Shape
from pvae.distributions.base import Determined
from pvae.errors import DeclarationError
from pvae.graph.link import Link
from pvae.graph.site import OBSERVED, Site
from pvae.guides.posteriors.base import Posterior
from pvae.nn.network import MLP, InvertibleModule, LogVarianceBounds, Network, NormalHead
from pvae.util.types import Size


def decoder_of(link: Link, site: Site) -> InvertibleModule:
    """Return the model's decoder network, which must be invertible.

    Raises:
        DeclarationError: the network is not invertible.
    """
    network = link.model.decoder.network
    if not isinstance(network, InvertibleModule):
        raise DeclarationError(
            f"latents.{site.name}.posterior: expected a decoder that can be run backwards, "
            f'decoder.network.kind = "bijection"; got {type(network).__name__}.'
        )
    return network


class InverseModule(nn.Module):
    """Module of the posterior `inverse`: z = g^-1(x), for the model's decoder g."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self.link = link

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the point mass at z = g^-1(x), with log q(z | x) = -log|det dz/dx|, for x `(..., *event)`."""
        z, log_det = self.link.model.decoder.network.invert(inputs[OBSERVED])  # type: ignore[operator]
        return Determined(z, -log_det)


@final
class InversePosterior(Posterior):
    """Deterministic posterior z = g^-1(x), the inverted decoder: the ELBO equals log p(x) = log p(z) + log|det dz/dx|.

    It requires the network `bijection` and the likelihood `determined`. The guide has no parameters of its own.

    References:
        SurVAE Flows (Nielsen et al., 2020), https://arxiv.org/abs/2007.02731
    """

    kind: Literal["inverse"] = "inverse"
    reads_features: ClassVar[bool] = False
    determines: ClassVar[str | None] = "determined"

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        decoder_of(link, site)
        return InverseModule(link)


class Dequantised(dist.TorchDistribution):
    """Distribution of z = g^-1((k + u) / levels), with k the level of each element of x and noise u in (0, 1).

    log q(z | x) = log q(u | x) + D log levels - log|det dz/dv| at v = (k + u) / levels. A value other than its own
    latest sample is decoded first, and has density 0 if its v lies in another cell.

    Arguments:
        decoder: the invertible decoder g.
        x: data, multiples of 1 / (levels - 1), `(batch, *event)`.
        levels: number of values of an element of x.
        logits: normal distribution of logit u, with event `(D,)`; None for uniform noise.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        decoder: InvertibleModule,
        x: Tensor,
        levels: int,
        logits: dist.TorchDistribution | None,
        batch_shape: Size | None = None,
    ) -> None:
        self.decoder, self.x, self.levels, self.logits = decoder, x, levels, logits
        self.cell = (x.flatten(1) * (levels - 1)).round()
        self._drawn: tuple[Tensor, Tensor, bool] | None = None
        shape = torch.Size(self.cell.shape[:1] if batch_shape is None else batch_shape)
        super().__init__(shape, self.cell.shape[1:], validate_args=False)

    def rsample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return reparametrised samples of z, `sample_shape + batch_shape + (D,)`."""
        shape = torch.Size(sample_shape) + self.batch_shape
        if self.logits is None:
            u = torch.rand(shape + self.event_shape, dtype=self.x.dtype, device=self.x.device)
            noise = torch.zeros_like(u[..., 0])
        else:
            t = self.logits.expand(self.batch_shape).rsample(torch.Size(sample_shape))
            u, noise = t.sigmoid(), self._log_noise(t)
        v = (self.cell + u.clamp(NOISE_EDGE, 1 - NOISE_EDGE)) / self.levels
        z, log_det = self.decoder.invert(v.unflatten(-1, self.x.shape[1:]))
        self._drawn = z, noise + self.event_shape[0] * log(self.levels) - log_det, torch.is_grad_enabled()
        return z

    def _log_noise(self, t: Tensor) -> Tensor:
        """Return log q(u | x), nats, from t = logit u, which keeps its precision when u rounds to 0 or 1."""
        assert self.logits is not None  # noqa: S101 - the caller has asked
        return self.logits.log_prob(t) - (logsigmoid(t) + logsigmoid(-t)).sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q(z | x) of z `(..., D)`, nats; exact."""
        if self._drawn is not None and value is self._drawn[0] and self._drawn[2] >= torch.is_grad_enabled():
            return self._drawn[1]
        v = self.decoder({self.decoder.name: value})
        _, log_det = self.decoder.invert(v)
        u = v.flatten(v.dim() - len(self.decoder.output)) * self.levels - self.cell
        inside = ((u > 0) & (u < 1)).all(-1)
        noise = torch.zeros_like(log_det)
        if self.logits is not None:
            noise = self._log_noise(torch.logit(u.clamp(NOISE_EDGE, 1 - NOISE_EDGE)))
        return torch.where(inside, noise + self.event_shape[0] * log(self.levels) - log_det, -torch.inf)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Dequantised:
        """Return the same distribution with more batch dimensions."""
        if self.batch_shape == tuple(batch_shape):
            return self
        return Dequantised(self.decoder, self.x, self.levels, self.logits, batch_shape)


NOISE_EDGE = 1e-6
"""Smallest distance of the noise u from 0 and 1, where its logit is infinite."""


class DequantisedModule(nn.Module):
    """Module of the posterior `dequantised`: adds uniform or learned noise to x, then inverts the decoder."""

    def __init__(self, link: Link, levels: int, noise: NormalHead | None) -> None:
        super().__init__()
        self.link, self.levels, self.noise = link, levels, noise

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return q(z | x) for quantised data x `(batch, *event)`."""
        logits = None if self.noise is None else self.noise(inputs)
        network = self.link.model.decoder.network
        assert isinstance(network, InvertibleModule)  # noqa: S101 - `build` has looked
        return Dequantised(network, inputs[OBSERVED], self.levels, logits)


@final
class DequantisedPosterior(Posterior):
    """Dequantisation posterior z = g^-1((k + u) / levels) of data on levels k, noise u: the ELBO bounds log P(x).

    P(x) is the probability that the flow gives the cell of x. With `uniform` noise the bound is E_u log p(k + u);
    `variational` noise, logit-normal with parameters predicted from x, makes it tighter. It requires the network
    `bijection` and the likelihood `rounded`.

    References:
        A note on the evaluation of generative models (Theis, van den Oord, Bethge, 2015),
        https://arxiv.org/abs/1511.01844 (uniform)
        Flow++ (Ho et al., 2019), https://arxiv.org/abs/1902.00275 (variational)
    """

    kind: Literal["dequantised"] = "dequantised"
    reads_features: ClassVar[bool] = False
    determines: ClassVar[str | None] = "rounded"
    noise: Literal["uniform", "variational"] = "uniform"
    network: Network = MLP(hidden=(64,))
    """Network from x to mean and log-variance of the logit of the noise, if it is `variational`."""
    log_variance: LogVarianceBounds = (-6.0, 4.0)

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        decoder_of(link, site)
        levels = link.model.decoder.likelihood.declared.levels
        noise = None
        if self.noise == "variational":
            noise = NormalHead(self.network.build(inputs, (2 * site.event[0],)), self.log_variance)
        return DequantisedModule(link, int(levels), noise)  # type: ignore[arg-type]
