"""Dense networks (MLP, gated MLP, lookup table) from several named inputs to one output tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Literal, final

import torch
from torch import Tensor, nn

from pvae.component import Ints, Shape
from pvae.errors import DeclarationError
from pvae.nn.network import ACTIVATIONS, Activation, Network, NetworkModule, flatten, join


class Gated(nn.Module):
    """A gated dense layer, `(W h + b) * sigmoid(V h + c)`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.both = nn.Linear(inputs, 2 * outputs)

    def forward(self, h: Tensor) -> Tensor:
        """Return the layer's output `(..., outputs)` for input `(..., inputs)`."""
        return nn.functional.glu(self.both(h), -1)


class Dense(NetworkModule):
    """Dense network whose first hidden layer has one branch per named input; the branches are concatenated."""

    def __init__(
        self,
        inputs: Mapping[str, Shape],
        output: Shape | None,
        hidden: Sequence[int],
        layer: Callable[[int, int], nn.Module],
    ) -> None:
        widths = [prod(shape) for shape in inputs.values()]
        joined = len(widths) * hidden[0] if hidden else sum(widths)
        last = hidden[-1] if len(hidden) > 1 else joined
        super().__init__(inputs, (last,) if output is None else output)
        self.branches = nn.ModuleList(layer(width, hidden[0]) for width in widths) if hidden else None
        sizes = [joined, *hidden[1:]]
        self.trunk = nn.Sequential(*(layer(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)))
        self.size = sizes[-1]
        self.head = nn.Identity() if output is None else nn.Linear(self.size, prod(output))

    @property
    def width(self) -> int:
        return self.size

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        flat = [flatten(inputs[name], shape) for name, shape in self.inputs.items()]
        if self.branches is not None:
            flat = [branch(part) for branch, part in zip(self.branches, flat, strict=True)]
        return self.trunk(join(flat))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the output `(..., *output)` for named inputs `(..., *shape)`; leading dimensions broadcast."""
        h = self.head(self.features(inputs))
        return h if len(self.output) == 1 else h.unflatten(-1, self.output)


@final
class MLP(Network):
    """Multilayer perceptron: dense layers with an activation; `hidden = []` is a linear map."""

    kind: Literal["mlp"] = "mlp"
    hidden: Ints = (300, 300)
    """Widths of the hidden layers."""
    activation: Activation = "relu"

    def build(self, inputs: Mapping[str, Shape], output: Shape | None) -> NetworkModule:
        act = ACTIVATIONS[self.activation]
        return Dense(inputs, output, self.hidden, lambda a, b: nn.Sequential(nn.Linear(a, b), act()))


@final
class GatedMLP(Network):
    """Gated dense layers, `(W h + b) * sigmoid(V h + c)`: the networks of the VampPrior papers.

    References:
        Language Modeling with Gated Convolutional Networks (Dauphin et al., 2017), https://arxiv.org/abs/1612.08083
        VAE with a VampPrior (Tomczak, Welling, 2018), https://arxiv.org/abs/1705.07120
    """

    kind: Literal["gated_mlp"] = "gated_mlp"
    hidden: Ints = (300, 300)
    """Widths of the hidden layers."""
    init: Literal["default", "he"] = "default"
    """Weight initialisation: torch's default, or `he` for normal weights of variance 2 / fan-in and zero biases."""

    def build(self, inputs: Mapping[str, Shape], output: Shape | None) -> NetworkModule:
        module = Dense(inputs, output, self.hidden, Gated)
        if self.init == "he":
            module.apply(he_initialise)
        return module


def he_initialise(module: nn.Module) -> None:
    """Initialise a linear layer by normal weights of variance 2 / fan-in and zero biases; ignore other Modules."""
    if isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


class TableModule(NetworkModule):
    """Learned table applied to a one-hot code `(..., codes)`: returns its row; a linear map of other vectors."""

    def __init__(self, inputs: Mapping[str, Shape], output: Shape) -> None:
        super().__init__(inputs, output)
        ((self.name, shape),) = self.inputs.items()
        self.weight = nn.Parameter(0.1 * torch.randn(prod(shape), prod(self.output)))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the output `(..., *output)` for named inputs `(..., *shape)`; leading dimensions broadcast."""
        h = flatten(inputs[self.name], self.inputs[self.name]).to(self.weight) @ self.weight
        return h if len(self.output) == 1 else h.unflatten(-1, self.output)


@final
class TableNetwork(Network):
    """Lookup table with one learned output for every code, such as the parameters of mixture components."""

    kind: Literal["table"] = "table"

    def build(self, inputs: Mapping[str, Shape], output: Shape | None) -> NetworkModule:
        """Return the table module; it needs exactly one input, and an output shape."""
        if len(inputs) != 1 or output is None:
            found = ", ".join(inputs) + (" and no output" if output is None else "")
            raise DeclarationError(
                f"network table: expected one input (a latent with codes) and an output, as a decoder has; "
                f"got {found}. Use kind = 'mlp'."
            )
        return TableModule(inputs, output)
