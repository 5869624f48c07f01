"""Networks from named inputs to one output: base, dense networks, heads of diagonal normals; blocks of attention."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from math import prod
from typing import Annotated, Any, Literal

import pyro.distributions as dist
import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from pvae.component import Component, Ints, Shape
from pvae.distributions.base import Event, PlainNormal
from pvae.errors import DeclarationError, refuse

Act = Callable[[], nn.Module]
"""Function that makes an activation."""
ACTIVATIONS: dict[str, Act] = {k.__name__.lower(): k for k in (nn.ReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Softplus)}
Activation = Literal["relu", "elu", "gelu", "silu", "tanh", "softplus"]


class NetworkModule(nn.Module):
    """Module of a network: `forward` takes named tensors, broadcasts leading dimensions, and returns one tensor."""

    def __init__(self, inputs: Mapping[str, Shape], output: Shape) -> None:
        super().__init__()
        self.inputs, self.output = {name: tuple(shape) for name, shape in inputs.items()}, tuple(output)

    width: int = 0
    """Width of the feature vector that `features` returns; 0 if the network has no features."""

    def shaped(self, h: Tensor) -> Tensor:
        """Return vectors `(..., prod(output))` in the shape of the output, `(..., *output)`."""
        return h if len(self.output) == 1 else h.unflatten(-1, self.output)

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the features of the inputs before the last layer, `(..., width)`."""
        raise NotImplementedError(f"{type(self).__name__} has no features")


class Network(Component):
    """Declaration of a neural network from several named inputs to one output."""

    @property
    def support(self) -> dist.constraints.Constraint | None:
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


def flatten(x: Tensor, shape: Shape) -> Tensor:
    """Return a tensor `(..., *shape)` with its event dimensions flattened, `(..., prod(shape))`."""
    return x if len(shape) == 1 else x.flatten(x.dim() - len(shape)) if shape else x.unsqueeze(-1)


def join(parts: Sequence[Tensor]) -> Tensor:
    """Return vectors concatenated along the last dimension, after broadcasting their leading dimensions."""
    if len(parts) == 1:
        return parts[0]
    lead = torch.broadcast_shapes(*(p.shape[:-1] for p in parts))
    return torch.cat([p.expand(*lead, p.shape[-1]) for p in parts], -1)


class Gated(nn.Module):
    """A gated dense layer, `(W h + b) * sigmoid(V h + c)`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.both = nn.Linear(inputs, 2 * outputs)

    def forward(self, h: Tensor) -> Tensor:
        """Return the layer's output `(..., outputs)` for input `(..., inputs)`."""
        return nn.functional.glu(self.both(h), -1)


Layer = Callable[[int, int], nn.Module]
"""Function from the widths of the input and of the output of a hidden layer to the layer."""


class Dense(NetworkModule):
    """Dense network whose first hidden layer has one branch per named input; the branches are concatenated."""

    def __init__(self, inputs: Mapping[str, Shape], output: Shape | None, hidden: Ints, layer: Layer) -> None:
        widths = [prod(shape) for shape in inputs.values()]
        joined = len(widths) * hidden[0] if hidden else sum(widths)
        last = hidden[-1] if len(hidden) > 1 else joined
        super().__init__(inputs, (last,) if output is None else output)
        self.branches = nn.ModuleList(layer(width, hidden[0]) for width in widths) if hidden else None
        sizes = [joined, *hidden[1:]]
        self.trunk = nn.Sequential(*(layer(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)))
        layers = [*(self.branches or ()), *self.trunk]
        self.chain = [part for layer in layers for part in (layer if isinstance(layer, nn.Sequential) else [layer])]
        """Layers from a single input to the features: every Module called within another takes time of its own."""
        self.width = sizes[-1]
        self.head = nn.Identity() if output is None else nn.Linear(self.width, prod(output))

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        flat = [flatten(inputs[name], shape) for name, shape in self.inputs.items()]
        if len(flat) == 1:
            return reduce(lambda h, layer: layer(h), self.chain, flat[0])
        if self.branches is not None:
            flat = [branch(part) for branch, part in zip(self.branches, flat, strict=True)]
        return self.trunk(join(flat))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the output `(..., *output)` for named inputs `(..., *shape)`; leading dimensions broadcast."""
        return self.shaped(self.head(self.features(inputs)))


class MLP(Network):
    """Multilayer perceptron: dense layers with an activation; `hidden = []` is a linear map.

    The first hidden layer has a branch for each input: with one hidden layer the output is a sum of functions of one
    input each. Inputs interact from the second hidden layer on.
    """

    kind: Literal["mlp"] = "mlp"
    hidden: Ints = (300, 300)
    """Widths of the hidden layers."""
    activation: Activation = "relu"

    def build(self, inputs: Mapping[str, Shape], output: Shape | None) -> NetworkModule:
        act = ACTIVATIONS[self.activation]
        return Dense(inputs, output, self.hidden, lambda a, b: nn.Sequential(nn.Linear(a, b), act()))


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
        return self.shaped(flatten(inputs[self.name], self.inputs[self.name]).to(self.weight) @ self.weight)


class TableNetwork(Network):
    """Lookup table with one learned output for every code, such as the parameters of mixture components."""

    kind: Literal["table"] = "table"

    def build(self, inputs: Mapping[str, Shape], output: Shape | None) -> NetworkModule:
        """Return the table module; it needs exactly one input, and an output shape."""
        if len(inputs) != 1 or output is None:
            raise DeclarationError.of("nn.network.table", inputs=inputs, output=output)
        return TableModule(inputs, output)


def check_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    """Return the bounds unchanged; raise ValueError unless the floor is below the ceiling."""
    low, high = bounds
    refuse(low >= high, f"a floor below a ceiling, e.g. [-12.0, 6.0]; got [{low}, {high}]", ValueError)
    return bounds


LogVarianceBounds = Annotated[tuple[float, float], Field(strict=False), AfterValidator(check_bounds)]
"""Lower and upper bound to which a predicted log-variance is clipped."""


def diagonal_normal(parameters: Tensor, bounds: tuple[float, float]) -> dist.TorchDistribution:
    """Return N(loc, diag(exp(log_variance))), event shape `(dim,)`, of (loc, log_variance) `(..., 2 dim)`."""
    loc, log_variance = parameters.chunk(2, -1)
    return Event(PlainNormal(loc, log_variance.clamp(*bounds).mul(0.5).exp()), 1)


def lower_factor(scale: Tensor, below: Tensor) -> Tensor:
    """Return the Cholesky factor diag(scale) (I + strictly lower triangle), `(..., d, d)`, of a covariance matrix.

    Arguments:
        scale: the positive diagonal, `(..., d)`: standard deviation of each coordinate given those before it.
        below: the strictly lower triangle of the unit factor, row by row, `(..., d (d - 1) / 2)`.
    """
    d = scale.shape[-1]
    row, column = torch.tril_indices(d, d, -1, device=scale.device)
    unit = torch.diag_embed(torch.ones_like(scale))
    unit[..., row, column] = below
    return scale[..., None] * unit


class Head(nn.Module):
    """Module of a prior or posterior whose distribution is a function of the output of one network.

    Arguments:
        network: from named inputs to the parameters of the distribution.
        distribution: from parameters with batch shape `(...)` to the distribution.
    """

    def __init__(self, network: NetworkModule, distribution: Callable[[Tensor], dist.TorchDistribution]) -> None:
        super().__init__()
        self.network, self.distribution = network, distribution

    def forward(self, inputs: Mapping[str, Tensor], _seen: Any = None) -> dist.TorchDistribution:
        """Return the distribution, with batch shape `(...)`, given named inputs `(..., *shape)`."""
        return self.distribution(self.network(inputs))


class NormalHead(Head):
    """Network that outputs the location and log-variance of a diagonal normal."""

    def __init__(self, network: NetworkModule, bounds: tuple[float, float]) -> None:
        super().__init__(network, partial(diagonal_normal, bounds=bounds))
        self.bounds = bounds


class KeyValueCache:
    """Key-value cache of one attention block, allocated once for all positions."""

    def __init__(self, length: int) -> None:
        self.length, self.filled = length, 0
        self.room: Tensor | None = None

    def extend(self, new: Tensor) -> Tensor:
        """Append keys and values `(2, n, heads, m, d)`; return all of them so far, `(2, n, heads, filled, d)`."""
        if self.room is None:
            self.room = new.new_empty(*new.shape[:3], self.length, new.shape[-1])
        start, self.filled = self.filled, self.filled + new.shape[3]
        self.room[:, :, :, start : self.filled] = new
        return self.room[:, :, :, : self.filled]


class AttentionBlock(nn.Module):
    """Transformer block: causal self-attention, then an MLP of one hidden layer, each pre-normalised and residual."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        """Return the block's output for all positions at once, `(n, t, width)`."""
        q, k, v = self._projected(h)
        return self._mixed(h, q, k, v, is_causal=True)

    def extend(self, h: Tensor, memory: KeyValueCache) -> Tensor:
        """Return the output of the first positions `(n, t, width)`, or of one more `(n, 1, width)` after the cached."""
        q, *new = self._projected(h)
        k, v = memory.extend(torch.stack(new))
        return self._mixed(h, q, k, v, is_causal=h.shape[1] > 1)  # a single new one may read all that is there

    def _projected(self, h: Tensor) -> Sequence[Tensor]:
        """Return queries, keys and values, each `(n, heads, t, d)`."""
        return self.project(self.first(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _mixed(self, h: Tensor, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        rate = self.dropout if self.training else 0.0
        read = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=is_causal)
        h = h + self._dropped(self.out(read.transpose(1, 2).flatten(2)))
        return h + self._dropped(self.perceptron(self.second(h)))

    def _dropped(self, h: Tensor) -> Tensor:
        return nn.functional.dropout(h, self.dropout, self.training)
