"""Declarations and Modules of networks, which map named input tensors to one output tensor."""

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
    """Declaration of a neural network from several named inputs to one output."""

    @property
    def support(self) -> constraints.Constraint | None:
        """Constraint that every element of the output satisfies; None if it can be any real number."""
        return None

    def features_on(self, grid: Shape) -> Shape | None:
        """Return the event shape of features on a grid of codes; None if the network gives only a feature vector."""
        return None

    @abstractmethod
    def build(self, inputs: Mapping[str, Shape], output: Shape | None) -> NetworkModule:
        """Return a Module that maps tensors `name -> (..., *inputs[name])` to one tensor `(..., *output)`.

        Arguments:
            inputs: event shape of every input, by name.
            output: event shape of the result; `None` leaves the width to the network (a vector of features).

        Returns:
            The Module; its attribute `output` is the event shape of its result.
        """


class NetworkModule(nn.Module):
    """Module of a network: `forward` takes named tensors, broadcasts leading dimensions, and returns one tensor."""

    def __init__(self, inputs: Mapping[str, Shape], output: Shape) -> None:
        super().__init__()
        self.inputs = {name: tuple(shape) for name, shape in inputs.items()}
        self.output = tuple(output)

    @property
    def width(self) -> int:
        """Width of the feature vector that `features` returns."""
        raise NotImplementedError(f"{type(self).__name__} has no features")

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the features of the inputs before the last layer, `(..., width)`."""
        raise NotImplementedError(f"{type(self).__name__} has no features")


class InvertibleModule(NetworkModule):
    """Base of invertible networks, with one named input and an exact inverse."""

    name: str
    """Name of the input."""

    def invert(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the z with `forward({name: z}) = x`, `(..., D)`, and log|det dz/dx|, nats, `(...)`."""
        raise NotImplementedError  # pragma: no cover - abstract


def flatten(x: Tensor, shape: Shape) -> Tensor:
    """Return a tensor `(..., *shape)` with its event dimensions flattened, `(..., prod(shape))`."""
    return x if len(shape) == 1 else x.flatten(x.dim() - len(shape)) if shape else x.unsqueeze(-1)


def join(parts: Sequence[Tensor]) -> Tensor:
    """Return vectors concatenated along the last dimension, after broadcasting their leading dimensions."""
    if len(parts) == 1:
        return parts[0]
    lead = torch.broadcast_shapes(*(p.shape[:-1] for p in parts))
    return torch.cat([p.expand(*lead, p.shape[-1]) for p in parts], -1)
