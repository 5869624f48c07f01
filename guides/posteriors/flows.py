"""Normalising-flow posterior: a normal pushed through autoregressive steps that depend on x."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

import pyro.distributions as dist
import torch
from pydantic import Field
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Ints, Shape
from pvae.errors import DeclarationError
from pvae.graph.link import Link
from pvae.graph.site import Site
from pvae.guides.posteriors.base import Posterior
from pvae.nn.network import MLP, LogVarianceBounds, Network, NetworkModule, diagonal_normal
from pvae.util.types import Size

GATE_OFFSET = 2.0
"""Constant added to the logits of the gates, so that every step is initially close to the identity."""


class GatedStep(nn.Module):
    """Gated autoregressive step z = g u + (1 - g) m; g and m depend on earlier coordinates of u and on a context."""

    def __init__(self, dim: int, context: int, hidden: Ints) -> None:
        super().__init__()
        self.net = ConditionalAutoRegressiveNN(dim, context, list(hidden), permutation=torch.arange(dim))  # type: ignore[arg-type]

    def _gates(self, u: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        shift, logit = self.net(u, context)
        return shift, logit + GATE_OFFSET

    def call(self, u: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return z for u `(..., D)`, and log|det dz/du| `(...)`, nats."""
        shift, logit = self._gates(u, context)
        gate = logit.sigmoid()
        return gate * u + (1 - gate) * shift, nn.functional.logsigmoid(logit).sum(-1)

    def invert(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return u for z `(..., D)`, exact after D passes, and log|det dz/du| `(...)`, nats."""
        u = torch.zeros_like(z)
        for _ in range(z.shape[-1]):
            shift, logit = self._gates(u, context)
            gate = logit.sigmoid()
            u = (z - (1 - gate) * shift) / gate
        return u, nn.functional.logsigmoid(self._gates(u, context)[1]).sum(-1)


class PushedNormal(dist.TorchDistribution):
    """Distribution of a diagonal normal pushed through gated steps, with the order of coordinates reversed after each.

    The density of its own latest sample is computed while sampling; another value is inverted first, in D passes for
    each step.

    Arguments:
        base: N(mu, diag sigma^2) with event `(D,)`.
        steps: the steps (`GatedStep`), in the order from the normal to z.
        context: features of x that every step reads, `(..., C)`.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, base: dist.TorchDistribution, steps: nn.ModuleList, context: Tensor) -> None:
        self.base, self.steps, self.context = base, steps, context
        self._drawn: tuple[Tensor, Tensor, bool] | None = None
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def rsample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return reparametrised samples `sample_shape + batch_shape + (D,)`."""
        z = self.base.rsample(torch.Size(sample_shape))
        score = self.base.log_prob(z)
        for step in self.steps:
            z, log_det = step.call(z, self.context)  # type: ignore[operator]
            z, score = z.flip(-1), score - log_det
        self._drawn = z, score, torch.is_grad_enabled()
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q(z) of z `(..., D)`, nats; exact."""
        if self._drawn is not None and value is self._drawn[0] and self._drawn[2] >= torch.is_grad_enabled():
            return self._drawn[1]
        value = value.expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape) + self.event_shape)
        score = torch.zeros_like(value[..., 0])
        for step in reversed(self.steps):
            value, log_det = step.invert(value.flip(-1), self.context)  # type: ignore[operator]
            score = score - log_det
        # Where a gate underflows u is infinite and the networks give NaN: the density there is 0.
        return (score + self.base.log_prob(value)).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)

    def expand(self, batch_shape: Size, _instance: Any = None) -> PushedNormal:
        """Return the same distribution with more batch dimensions."""
        if self.batch_shape == tuple(batch_shape):
            return self
        return PushedNormal(self.base.expand(torch.Size(batch_shape)), self.steps, self.context)


class FlowHead(nn.Module):
    """Module of the flow posterior: a network's output is mean and log-variance of the normal, and the context."""

    def __init__(self, network: NetworkModule, dim: int, steps: list[GatedStep], bounds: tuple[float, float]) -> None:
        super().__init__()
        self.network, self.dim, self.bounds = network, dim, bounds
        self.steps = nn.ModuleList(steps)

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the posterior, with batch shape `(...)`, given named inputs `(..., *shape)`."""
        parameters = self.network(inputs)
        normal, context = parameters[..., : 2 * self.dim], parameters[..., 2 * self.dim :]
        return PushedNormal(diagonal_normal(normal, self.bounds), self.steps, context)


@final
class FlowPosterior(Posterior):
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
    network: Network | None = None
    """Network from the encoder's features to mean, log-variance and context; default: one linear map."""

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        dim = site.event[0]
        if dim < 2 or min(self.hidden, default=0) < dim:
            raise DeclarationError(
                f"latents.{site.name}.posterior.hidden: expected a latent of at least 2 coordinates and one hidden "
                f"layer or more, each at least as wide; got dim = {dim} and {list(self.hidden)}."
            )
        network = (self.network or MLP(hidden=())).build(inputs, (2 * dim + self.context,))
        steps = [GatedStep(dim, self.context, self.hidden) for _ in range(self.layers)]
        return FlowHead(network, dim, steps, self.log_variance)
