"""Networks as declared parts: from named tensors to one tensor, leading dimensions broadcast."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Component, Shape

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
}
Activation = Literal["relu", "elu", "gelu", "silu", "tanh", "softplus"]


class Network(Component):
    """A neural network from several named inputs to one output."""

    @property
    def support(self) -> constraints.Constraint | None:
        """Values of the output, elementwise, where they are not all real numbers."""
        return None

    def features_on(self, grid: Shape) -> Shape | None:
        """Event shape of features laid out on a grid of codes; None where a network gives but a vector."""
        return None

    @abstractmethod
    def build(self, inputs: Mapping[str, Shape], output: Shape | None) -> NetworkModule:
        """A module from tensors `name -> (..., *inputs[name])` to one tensor `(..., *output)`.

        Arguments:
            inputs: event shape of every input, by name.
            output: event shape of the result; `None` leaves the width to the network (a vector of features).

        Returns:
            The module; its `output` says the event shape it produces.
        """


class NetworkModule(nn.Module):
    """Module of a network: `forward` takes named tensors, broadcasts leading dimensions, and returns one tensor."""

    def __init__(self, inputs: Mapping[str, Shape], output: Shape) -> None:
        super().__init__()
        self.inputs = {name: tuple(shape) for name, shape in inputs.items()}
        self.output = tuple(output)

    @property
    def width(self) -> int:
        """Width of `features`."""
        raise NotImplementedError(f"{type(self).__name__} has no features")

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features before the last layer, `(..., width)`."""
        raise NotImplementedError(f"{type(self).__name__} has no features")


class InvertibleModule(NetworkModule):
    """A network of one input with a way back."""

    name: str
    """The input's name."""

    def invert(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z with `forward({name: z}) = x`, `(..., D)`, and log|det dz/dx|, nats, `(...)`."""
        raise NotImplementedError  # pragma: no cover - abstract


def flatten(x: Tensor, shape: Shape) -> Tensor:
    """`(..., *shape)` to `(..., prod(shape))`."""
    return x if len(shape) == 1 else x.flatten(x.dim() - len(shape)) if shape else x.unsqueeze(-1)


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate vectors along the last dimension after broadcasting their leading dimensions."""
    if len(parts) == 1:
        return parts[0]
    lead = torch.broadcast_shapes(*(p.shape[:-1] for p in parts))
    return torch.cat([p.expand(*lead, p.shape[-1]) for p in parts], -1)
