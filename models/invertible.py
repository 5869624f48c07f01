"""Invertible decoders, which make a normalising flow a VAE."""

from __future__ import annotations

from collections.abc import Mapping
from math import log, prod
from typing import Annotated, Literal, final

import torch
from pydantic import Field, WithJsonSchema, field_validator
from torch import Tensor
from torch.distributions import constraints

from pvae.component import Shape
from pvae.errors import DeclarationError
from pvae.graph.link import Link
from pvae.graph.site import Site, Space
from pvae.models.priors.base import Prior
from pvae.models.priors.flows import FlowModule, FlowPrior, RealNVP
from pvae.nn.network import InvertibleModule, Network, NetworkModule, flatten


class Squash:
    """Stretched logistic map v = (sigmoid(h) - edge) / (1 - 2 edge), whose range is a little wider than [0, 1]."""

    def __init__(self, edge: float) -> None:
        self.edge = edge

    def call(self, h: Tensor) -> Tensor:
        """Return v for h, elementwise."""
        return (h.sigmoid() - self.edge) / (1 - 2 * self.edge)

    def invert(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return h for v in [0, 1], and log|dh/dv| summed over the last dimension, nats."""
        s = self.edge + (1 - 2 * self.edge) * v
        slope = log(1 - 2 * self.edge) - s.log() - (-s).log1p()
        return torch.logit(s), slope.sum(-1)


class BijectionModule(InvertibleModule):
    """Invertible decoder x = g(z), made of a flow's bijections, with the log determinant of its inverse."""

    def __init__(self, inputs: Mapping[str, Shape], output: Shape, flow: FlowModule, squash: Squash | None) -> None:
        super().__init__(inputs, output)
        self.name = next(iter(inputs))
        self.flow, self.squash = flow, squash

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return x = g(z), `(..., *output)`, for z `(..., D)` or of any event shape of D elements."""
        x = self.flow.push(flatten(inputs[self.name], self.inputs[self.name]))
        if self.squash is not None:
            x = self.squash.call(x)
        return x.unflatten(-1, self.output)

    def invert(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z = g^-1(x), `(..., D)`, and log|det dz/dx|, nats, `(...)`."""
        x = x.flatten(x.dim() - len(self.output))
        outer = torch.zeros_like(x[..., 0])
        if self.squash is not None:
            x, outer = self.squash.invert(x)
        z, log_det = self.flow.pull(x)
        return z, outer + log_det


FLOW_SCHEMA = WithJsonSchema({"type": ["string", "object"], "description": "A flow: a prior such as realnvp."})
"""JSON schema of the field `flow`, not expanded, because priors contain networks and this network a prior."""


@final
class BijectionNetwork(Network):
    """Invertible decoder made of a flow's bijections; the latent has as many coordinates as x has elements.

    With the likelihood `determined` and the posterior `inverse` the VAE is a normalising flow, with ELBO = log p(x).
    """

    kind: Literal["bijection"] = "bijection"
    flow: Annotated[Prior, FLOW_SCHEMA] = RealNVP(layers=8)
    """Flow that maps z to x: `realnvp`, `maf`, ..."""
    squash: Literal["none", "logit"] = "none"
    """`logit`: x in [0, 1] is a logistic function of the flow's output; `none`: x is the flow's output."""
    edge: float = Field(default=0.01, gt=0, lt=0.5)
    """Margin of `squash = "logit"`: x is mapped to [edge, 1 - edge] before the logit, so that 0 and 1 stay finite."""

    @property
    def support(self) -> constraints.Constraint | None:
        return None if self.squash == "none" else constraints.unit_interval

    @field_validator("flow")
    @classmethod
    def _is_flow(cls, flow: Prior) -> Prior:
        if not isinstance(flow, FlowPrior):
            kinds = ", ".join(k for k, member in Prior.members.items() if issubclass(member, FlowPrior))
            raise ValueError(f"a flow: one of {kinds}; got {flow.kind!r}")
        return flow

    def build(self, inputs: Mapping[str, Shape], output: Shape | None) -> NetworkModule:
        """Build the decoder module; the output must have as many elements as the only input."""
        sizes = {name: prod(shape) for name, shape in inputs.items()}
        if output is None or list(sizes.values()) != [prod(output)]:
            wanted = "a decoder" if output is None else f"one latent of dim = {prod(output)}"
            raise DeclarationError(f"network bijection: expected {wanted}; got inputs {sizes}.")
        squash = Squash(self.edge) if self.squash == "logit" else None
        name, size = next(iter(sizes.items()))
        flow = self.flow.build(Site(name, Space.real(size)), {}, Link())
        assert isinstance(flow, FlowModule)  # noqa: S101 - narrows the type
        return BijectionModule(inputs, output, flow, squash)
