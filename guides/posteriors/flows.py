"""A normalising flow as the posterior: a normal pushed through autoregressive steps that see x."""

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
from pvae.nn.dense import MLP
from pvae.nn.heads import LogVarianceBounds, diagonal_normal
from pvae.nn.network import Network, NetworkModule
from pvae.util.types import Size

GATE_OFFSET = 2.0
"""Added to the gates' logits: at the start a step leaves nearly everything as it is."""


class GatedStep(nn.Module):
    """z = g u + (1 - g) m with m and the gate g read off the coordinates of u before each one, and a context."""

    def __init__(self, dim: int, context: int, hidden: Ints) -> None:
        super().__init__()
        self.net = ConditionalAutoRegressiveNN(dim, context, list(hidden), permutation=torch.arange(dim))  # type: ignore[arg-type]

    def _gates(self, u: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        shift, logit = self.net(u, context)
        return shift, logit + GATE_OFFSET

    def call(self, u: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """z of u `(..., D)` and log|det dz/du| `(...)`."""
        shift, logit = self._gates(u, context)
        gate = logit.sigmoid()
        return gate * u + (1 - gate) * shift, nn.functional.logsigmoid(logit).sum(-1)

    def invert(self, z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """u of z, exact after as many passes as there are coordinates, and log|det dz/du|."""
        u = torch.zeros_like(z)
        for _ in range(z.shape[-1]):
            shift, logit = self._gates(u, context)
            gate = logit.sigmoid()
            u = (z - (1 - gate) * shift) / gate
        return u, nn.functional.logsigmoid(self._gates(u, context)[1]).sum(-1)


class PushedNormal(dist.TorchDistribution):
    """A diagonal normal pushed through `GatedStep`s, coordinates reversed between them.

    Its own draw is scored on the way; any other value is inverted first, in D passes for each step.

    Arguments:
        base: N(mu, diag sigma^2) with event `(D,)`.
        steps: in the order from the normal to z.
        context: what every step reads beside the coordinates, `(..., C)`.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, base: dist.TorchDistribution, steps: nn.ModuleList, context: Tensor) -> None:
        self.base, self.steps, self.context = base, steps, context
        self._drawn: tuple[Tensor, Tensor, bool] | None = None
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def rsample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Reparametrised draws `sample_shape + batch_shape + (D,)`."""
        z = self.base.rsample(torch.Size(sample_shape))
        score = self.base.log_prob(z)
        for step in self.steps:
            z, log_det = step.call(z, self.context)  # type: ignore[operator]
            z, score = z.flip(-1), score - log_det
        self._drawn = z, score, torch.is_grad_enabled()
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(z), nats; exact."""
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
        """The same distribution over more batch dimensions."""
        if self.batch_shape == tuple(batch_shape):
            return self
        return PushedNormal(self.base.expand(torch.Size(batch_shape)), self.steps, self.context)


class FlowHead(nn.Module):
    """A network whose output is read as location, log-variance and context."""

    def __init__(self, network: NetworkModule, dim: int, steps: list[GatedStep], bounds: tuple[float, float]) -> None:
        super().__init__()
        self.network, self.dim, self.bounds = network, dim, bounds
        self.steps = nn.ModuleList(steps)

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Named tensors `(..., *shape)` to the pushed normal with batch shape `(...)`."""
        parameters = self.network(inputs)
        normal, context = parameters[..., : 2 * self.dim], parameters[..., 2 * self.dim :]
        return PushedNormal(diagonal_normal(normal, self.bounds), self.steps, context)


@final
class FlowPosterior(Posterior):
    """An inverse autoregressive flow over N(mu(x), diag sigma^2(x)): any dependence between coordinates given x.

    A draw and its own density take one pass; the density of another value, which surgery needs for q_agg, takes as
    many passes as there are coordinates.

    References:
        Improving Variational Inference with Inverse Autoregressive Flow (Kingma et al., 2016),
        https://arxiv.org/abs/1606.04934
    """

    kind: Literal["flow"] = "flow"
    layers: int = Field(default=2, gt=0, le=1000)
    """Number of autoregressive steps."""
    hidden: Ints = (64,)
    """Hidden widths of the network of each; every one at least as wide as the latent."""
    context: int = Field(default=64, gt=0)
    """Numbers that the encoder hands to every step."""
    log_variance: LogVarianceBounds = (-12.0, 6.0)
    network: Network | None = None
    """Between the encoder's features and the parameters; default: one linear map."""

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
