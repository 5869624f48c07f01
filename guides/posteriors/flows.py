"""Posteriors of transformed values: a normal pushed through a flow given x, or data pulled back by the decoder."""

from abc import abstractmethod
from collections.abc import Mapping
from math import log
from typing import Any, ClassVar, Literal, Self

import pyro.distributions as dist
import torch
from pydantic import Field
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn

from pvae.component import Ints, Shape
from pvae.distributions.base import Batched, Determined, Size
from pvae.errors import DeclarationError
from pvae.graph.site import OBSERVED, Link, Site
from pvae.guides.posteriors.base import Amortised, Linked, Posterior
from pvae.nn.network import MLP, LogVarianceBounds, Network, NetworkModule, NormalHead, diagonal_normal

GATE_OFFSET = 2.0
"""Constant added to the logits of the gates, so that every step is initially close to the identity."""


class GatedStep(nn.Module):
    """Gated autoregressive step z = g u + (1 - g) m; g and m depend on earlier coordinates of u and on a context."""

    def __init__(self, dim: int, context: int, hidden: Ints) -> None:
        super().__init__()
        self.net = ConditionalAutoRegressiveNN(dim, context, list(hidden), permutation=torch.arange(dim))  # type: ignore[arg-type]

    def _gates(self, u: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return m, g and logit g at u, each `(..., D)`."""
        shift, logit = self.net(u, context)
        logit = logit + GATE_OFFSET
        return shift, logit.sigmoid(), logit

    def call(self, u: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return z for u `(..., D)`, and log|det dz/du| `(...)`, nats."""
        shift, gate, logit = self._gates(u, context)
        return gate * u + (1 - gate) * shift, nn.functional.logsigmoid(logit).sum(-1)

    def invert(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return u for z `(..., D)`, exact after D passes, and log|det dz/du| `(...)`, nats."""
        u = torch.zeros_like(z)
        for _ in range(z.shape[-1]):
            shift, gate, _ = self._gates(u, context)
            u = (z - (1 - gate) * shift) / gate
        return u, nn.functional.logsigmoid(self._gates(u, context)[2]).sum(-1)


class Pushed(Batched):
    """Base of distributions of transformed samples; the density of the latest sample is computed with it."""

    support = dist.constraints.real_vector
    has_rsample = True
    _drawn: tuple[Tensor, Tensor, bool] | None = None

    @abstractmethod
    def draw(self, sample_shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Return reparametrised samples `sample_shape + batch_shape + (D,)`, and their log densities, nats."""

    @abstractmethod
    def score(self, value: Tensor) -> Tensor:
        """Return log q(z) of z `(..., D)`, nats; exact."""

    def rsample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return reparametrised samples `sample_shape + batch_shape + (D,)`."""
        z, score = self.draw(torch.Size(sample_shape))
        self._drawn = z, score, torch.is_grad_enabled()
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q(z) of z `(..., D)`, nats; exact."""
        if self._drawn is not None and value is self._drawn[0] and self._drawn[2] >= torch.is_grad_enabled():
            return self._drawn[1]
        return self.score(value)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Self:
        """Return this distribution expanded to `batch_shape`, without its latest sample."""
        if (wide := super().expand(batch_shape)) is not self:
            wide._drawn = None
        return wide


class PushedNormal(Pushed):
    """Distribution of a diagonal normal pushed through gated steps, with the order of coordinates reversed after each.

    A value other than its own latest sample is inverted first, in D passes for each step.

    Arguments:
        base: N(mu, diag sigma^2) with event `(D,)`.
        steps: the steps (`GatedStep`), in the order from the normal to z.
        context: features of x that every step reads, `(..., C)`.
    """

    widened = ("base",)

    def __init__(self, base: dist.TorchDistribution, steps: nn.ModuleList, context: Tensor) -> None:
        self.base, self.steps, self.context = base, steps, context
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def draw(self, sample_shape: torch.Size) -> tuple[Tensor, Tensor]:
        z = self.base.rsample(sample_shape)
        score = self.base.log_prob(z)
        for step in self.steps:
            z, log_det = step.call(z, self.context)  # type: ignore[operator]
            z, score = z.flip(-1), score - log_det
        return z, score

    def score(self, value: Tensor) -> Tensor:
        value = value.expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape) + self.event_shape)
        score = torch.zeros_like(value[..., 0])
        for step in reversed(self.steps):
            value, log_det = step.invert(value.flip(-1), self.context)  # type: ignore[operator]
            score = score - log_det
        # Where a gate underflows u is infinite and the networks give NaN: the density there is 0.
        return (score + self.base.log_prob(value)).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


class FlowPosterior(Amortised):
    """Inverse autoregressive flow posterior over N(mu(x), diag sigma^2(x)): coordinates may be dependent given x.

    A sample and its density take one pass; the density of another value, which the aggregated posterior q_agg needs,
    takes as many passes as there are coordinates.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016),
        https://arxiv.org/abs/1606.04934
    """

    kind: Literal["flow"] = "flow"
    layers: int = Field(default=2, gt=0, le=1000)
    """Number of autoregressive steps."""
    hidden: Ints = (64,)
    """Hidden widths of the network of each step, each at least the dimension of the latent."""
    context: int = Field(default=64, gt=0)
    """Width of the context, a function of the encoder's features that every step reads."""
    log_variance: LogVarianceBounds = (-12.0, 6.0)

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        if (dim := site.event[0]) < 2 or min(self.hidden, default=0) < dim:
            raise DeclarationError.of("guides.posteriors.flow", name=site.name, dim=dim, hidden=self.hidden)
        return FlowHead(self.head(inputs, (2 * dim + self.context,)), dim, self)


class FlowHead(nn.Module):
    """Module of the flow posterior: a network's output is mean and log-variance of the normal, and the context."""

    def __init__(self, network: NetworkModule, dim: int, declared: FlowPosterior) -> None:
        super().__init__()
        self.network, self.dim, self.bounds = network, dim, declared.log_variance
        self.steps = nn.ModuleList(GatedStep(dim, declared.context, declared.hidden) for _ in range(declared.layers))

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the posterior, with batch shape `(...)`, given named inputs `(..., *shape)`."""
        normal, context = self.network(inputs).tensor_split((2 * self.dim,), -1)
        return PushedNormal(diagonal_normal(normal, self.bounds), self.steps, context)


class InverseModule(Linked):
    """Module of the posterior `inverse`: z = g^-1(x), for the model's decoder g."""

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the point mass at z = g^-1(x), with log q(z | x) = -log|det dz/dx|, for x `(..., *event)`."""
        z, log_det = self.link.model.decoder.network.invert(inputs[OBSERVED])  # type: ignore[operator]
        return Determined(z, -log_det)


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
        return InverseModule(site, link, self)


class Dequantised(Pushed):
    """Distribution of z = g^-1((k + u) / levels), with k the level of each element of x and noise u in (0, 1).

    log q(z | x) = log q(u | x) + D log levels - log|det dz/dv| at v = (k + u) / levels. A value other than its own
    latest sample is decoded first, and has density 0 if its v lies in another cell.

    Arguments:
        decoder: the invertible decoder network g, of kind `bijection`.
        x: data, multiples of 1 / (levels - 1), `(batch, *event)`.
        levels: number of values of an element of x.
        logits: normal distribution of logit u, with event `(D,)`; None for uniform noise.
    """

    def __init__(self, decoder: Any, x: Tensor, levels: int, logits: dist.TorchDistribution | None) -> None:
        self.decoder, self.x, self.levels = decoder, x, levels
        self.logits: Any = logits
        self.cell = (x.flatten(1) * (levels - 1)).round()
        super().__init__(self.cell.shape[:1], self.cell.shape[1:], validate_args=False)

    def draw(self, sample_shape: torch.Size) -> tuple[Tensor, Tensor]:
        if self.logits is None:
            u = torch.rand(sample_shape + self.batch_shape + self.event_shape, dtype=self.x.dtype, device=self.x.device)
            noise = torch.zeros_like(u[..., 0])
        else:
            t = self.logits.expand(self.batch_shape).rsample(sample_shape)
            u, noise = t.sigmoid(), self._log_noise(t)
        v = (self.cell + u.clamp(NOISE_EDGE, 1 - NOISE_EDGE)) / self.levels
        z, log_det = self.decoder.invert(v.unflatten(-1, self.x.shape[1:]))
        return z, noise + self.event_shape[0] * log(self.levels) - log_det

    def _log_noise(self, t: Tensor) -> Tensor:
        """Return log q(u | x), nats, from t = logit u, which keeps its precision when u rounds to 0 or 1."""
        return self.logits.log_prob(t) - (nn.functional.logsigmoid(t) + nn.functional.logsigmoid(-t)).sum(-1)

    def score(self, value: Tensor) -> Tensor:
        v = self.decoder({self.decoder.name: value})
        _, log_det = self.decoder.invert(v)
        u = v.flatten(v.dim() - len(self.decoder.output)) * self.levels - self.cell
        inside = ((u > 0) & (u < 1)).all(-1)
        noise = torch.zeros_like(log_det)
        if self.logits is not None:
            noise = self._log_noise(torch.logit(u.clamp(NOISE_EDGE, 1 - NOISE_EDGE)))
        return torch.where(inside, noise + self.event_shape[0] * log(self.levels) - log_det, -torch.inf)


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
        return Dequantised(self.link.model.decoder.network, inputs[OBSERVED], self.levels, logits)


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
        likelihood: Any = link.model.decoder.likelihood
        learned = self.noise == "variational"
        noise = NormalHead(self.network.build(inputs, (2 * site.event[0],)), self.log_variance) if learned else None
        return DequantisedModule(link, likelihood.declared.levels, noise)
