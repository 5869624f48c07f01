"""Networks: from named tensors to one tensor, leading dimensions broadcast."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Component, Ints, Shape
from pvae.errors import DeclarationError

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
    """What a network builds: `forward` takes named tensors, broadcasts their leading dimensions, gives one."""

    def __init__(self, inputs: Mapping[str, Shape], output: Shape) -> None:
        super().__init__()
        self.inputs = {name: tuple(shape) for name, shape in inputs.items()}
        self.output = tuple(output)

    @property
    def width(self) -> int:
        """Width of `features`."""
        raise NotImplementedError(f"{type(self).__name__} has no features")

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What comes before the last layer, `(..., width)`."""
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


class Gated(nn.Module):
    """A gated dense layer, `(W h + b) * sigmoid(V h + c)`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.both = nn.Linear(inputs, 2 * outputs)

    def forward(self, h: Tensor) -> Tensor:
        """`(..., inputs)` to `(..., outputs)`."""
        return nn.functional.glu(self.both(h), -1)


class Dense(NetworkModule):
    """Dense layers: the first hidden layer is one branch per input; the branches are concatenated."""

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
        """Named tensors `(..., *shape)` to `(..., *output)`."""
        h = self.head(self.features(inputs))
        return h if len(self.output) == 1 else h.unflatten(-1, self.output)


@final
class MLP(Network):
    """Dense layers with an activation; `hidden = []` is a linear map."""

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
    """`he`: normal weights of variance 2 / fan-in, zero biases."""

    def build(self, inputs: Mapping[str, Shape], output: Shape | None) -> NetworkModule:
        module = Dense(inputs, output, self.hidden, Gated)
        if self.init == "he":
            module.apply(he_initialise)
        return module


def he_initialise(module: nn.Module) -> None:
    """Normal weights of variance 2 / fan-in and zero biases, for a linear layer; others are left alone."""
    if isinstance(module, nn.Linear):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


class TableModule(NetworkModule):
    """`(..., codes)` one-hot to the row of its code; of any other vector, a linear map without a bias."""

    def __init__(self, inputs: Mapping[str, Shape], output: Shape) -> None:
        super().__init__(inputs, output)
        ((self.name, shape),) = self.inputs.items()
        self.weight = nn.Parameter(0.1 * torch.randn(prod(shape), prod(self.output)))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Named tensors `(..., *shape)` to `(..., *output)`."""
        h = flatten(inputs[self.name], self.inputs[self.name]).to(self.weight) @ self.weight
        return h if len(self.output) == 1 else h.unflatten(-1, self.output)


@final
class Table(Network):
    """One learned row for every code: the parameters of the components of a mixture."""

    kind: Literal["table"] = "table"

    def build(self, inputs: Mapping[str, Shape], output: Shape | None) -> NetworkModule:
        """See `Network.build`; of one input, and never for features."""
        if len(inputs) != 1 or output is None:
            found = ", ".join(inputs) + (" and no output" if output is None else "")
            raise DeclarationError(
                f"network table: expected one input (a latent with codes) and an output, as a decoder has; "
                f"got {found}. Use kind = 'mlp'."
            )
        return TableModule(inputs, output)


def halvings(size: int, times: int) -> list[int]:
    """Sizes of one image side before and after each stride-2 convolution: 28, 14, 7, 4 ..."""
    sizes = [size]
    for _ in range(times):
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


class Down(nn.Module):
    """Stride-2 convolutions from an image `(..., C, H, W)` to a vector."""

    def __init__(self, image: Shape, channels: Sequence[int], act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.image = image
        layers: list[nn.Module] = []
        for a, b in zip((image[0], *channels[:-1]), channels, strict=True):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), act()]
        self.layers = nn.Sequential(*layers)
        height, width = (halvings(side, len(channels))[-1] for side in image[1:])
        self.features = channels[-1] * height * width

    def forward(self, x: Tensor) -> Tensor:
        """`(..., C, H, W)` to `(..., features)`."""
        lead = x.shape[:-3]
        return self.layers(x.reshape(-1, *self.image)).reshape(*lead, self.features)


class Up(nn.Module):
    """Transposed convolutions from a vector to an image `(..., C, H, W)` of any size: the mirror of `Down`."""

    def __init__(self, features: int, image: Shape, channels: Sequence[int], act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.image = image
        heights, widths = (halvings(side, len(channels))[::-1] for side in image[1:])
        self.start = (channels[-1], heights[0], widths[0])
        self.first = nn.Sequential(nn.Linear(features, prod(self.start)), act())
        layers: list[nn.Module] = []
        outputs = (*reversed(channels[:-1]), image[0])
        for level, (a, b) in enumerate(zip(reversed(channels), outputs, strict=True)):
            even = (1 - heights[level + 1] % 2, 1 - widths[level + 1] % 2)
            layers += [nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=even), act()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, h: Tensor) -> Tensor:
        """`(..., features)` to `(..., C, H, W)`."""
        lead = h.shape[:-1]
        return self.layers(self.first(h).reshape(-1, *self.start)).reshape(*lead, *self.image)


class ConvModule(NetworkModule):
    """Images are encoded, vectors taken as they are; the joined vector goes through a dense layer to the output."""

    def __init__(
        self, inputs: Mapping[str, Shape], output: Shape | None, channels: Ints, dense: int, activation: Activation
    ) -> None:
        super().__init__(inputs, (dense,) if output is None else output)
        act = ACTIVATIONS[activation]
        encoders = {name: Down(shape, channels, act) for name, shape in inputs.items() if len(shape) == 3}
        widths = [encoders[name].features if name in encoders else prod(shape) for name, shape in inputs.items()]
        self.encoders = nn.ModuleDict(encoders)
        self.size = dense
        self.dense = nn.Sequential(nn.Linear(sum(widths), dense), act())
        self.head: nn.Module = nn.Identity()
        if output is not None:
            image = len(output) == 3
            self.head = Up(dense, output, channels, act) if image else nn.Linear(dense, prod(output))
        self.unflat = None if output is None or len(output) in (1, 3) else self.output

    @property
    def width(self) -> int:
        return self.size

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        flat = [
            self.encoders[name](inputs[name]) if name in self.encoders else flatten(inputs[name], shape)
            for name, shape in self.inputs.items()
        ]
        return self.dense(join(flat))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Named tensors `(..., *shape)` to `(..., *output)`."""
        h = self.head(self.features(inputs))
        return h if self.unflat is None else h.unflatten(-1, self.unflat)


@final
class Conv(Network):
    """Stride-2 convolutions for an image input, their mirror for an image output; images of any size.

    An input or output is an image when its event shape is `(channels, height, width)`.
    """

    kind: Literal["conv"] = "conv"
    channels: Ints = Field(default=(32, 64), min_length=1)
    """Channels after each stride-2 convolution; every one halves height and width."""
    dense: int = Field(default=256, gt=0)
    """Width of the dense layer between the convolutions and a vector."""
    activation: Activation = "relu"

    def build(self, inputs: Mapping[str, Shape], output: Shape | None) -> NetworkModule:
        """See `Network.build`; at least one side must be an image."""
        shapes = [*inputs.values(), *([output] if output is not None else [])]
        if not any(len(shape) == 3 for shape in shapes):
            found = ", ".join(f"{name} {list(shape)}" for name, shape in inputs.items())
            raise DeclarationError(
                f"network conv: expected an image (channels, height, width) among its inputs or its output; "
                f"got {found}. Declare data.shape, e.g. [1, 28, 28], or use kind = 'mlp'."
            )
        return ConvModule(inputs, output, self.channels, self.dense, self.activation)


# ---------------------------------------------------------------------- residual


class Pointwise(NetworkModule):
    """One linear map at every position of a grid; what is not laid out on the grid is the same for all positions."""

    def __init__(self, inputs: Mapping[str, Shape], output: Shape) -> None:
        super().__init__(inputs, output)
        self.maps = nn.ModuleDict(
            {
                name: nn.Conv2d(shape[0], output[0], 1)
                if shape[1:] == output[1:]
                else nn.Linear(prod(shape), output[0])
                for name, shape in inputs.items()
            }
        )

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Named tensors `(..., *shape)` to `(..., *output)`."""
        first, *others = (self._at(name, inputs[name]) for name in self.inputs)
        return sum(others, first)

    def _at(self, name: str, x: Tensor) -> Tensor:
        layer, shape = self.maps[name], self.inputs[name]
        if isinstance(layer, nn.Linear):
            return layer(flatten(x, shape))[..., None, None]
        return batched(layer, x)


def batched(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A layer over images `(b, C, H, W)` on images of any leading dimensions."""
    if x.dim() == 4:
        return layer(x)
    y = layer(x.reshape(-1, *x.shape[-3:]))
    return y.reshape(*x.shape[:-3], *y.shape[1:])


class Residual(nn.Module):
    """h + W2 relu(W1 relu(h)): a 3 x 3 and a 1 x 1 convolution."""

    def __init__(self, channels: int, inner: int, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            act(), nn.Conv2d(channels, inner, 3, padding=1), act(), nn.Conv2d(inner, channels, 1)
        )

    def forward(self, h: Tensor) -> Tensor:
        """`(b, C, H, W)` to the same."""
        return h + self.layers(h)


class Resize(nn.Module):
    """Convolutions from images of one size to another: strided down, transposed up, one power of two at a time.

    Sizes that are no powers of two apart are padded with zeros before, or cropped after, where that is at most one
    element of the smaller in all (28 goes down to 8 through 32); else they are averaged before, or interpolated after.
    """

    def __init__(self, image: Shape, channels: int, size: Shape, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.size, self.image = size, image
        down = [doublings(b, a) for a, b in zip(image[1:], size, strict=True)]
        up = [doublings(a, b) for a, b in zip(image[1:], size, strict=True)]
        layers: list[nn.Module] = []
        width = image[0]
        steps = max(down)
        for i in range(steps):
            stride = tuple(2 if i < d else 1 for d in down)
            kernel = tuple(4 if s == 2 else 3 for s in stride)
            wide = channels if i == steps - 1 else max(channels // 2, min(channels, 16))
            layers += [act()] if layers else []
            layers.append(nn.Conv2d(width, wide, kernel, stride, 1))  # type: ignore[arg-type]
            width = wide
        if not steps:
            layers.append(nn.Conv2d(width, channels, 3, padding=1))
        for i in range(max(up)):
            stride = tuple(2 if i < u else 1 for u in up)
            kernel = tuple(4 if s == 2 else 3 for s in stride)
            layers += [act(), nn.ConvTranspose2d(channels, channels, kernel, stride, 1)]  # type: ignore[arg-type]
        self.layers = nn.Sequential(*layers)
        self.padded = tuple(b * 2**d if a > b else a for a, b, d in zip(image[1:], size, down, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """`(b, C, H, W)` to `(b, channels, *size)`."""
        return cropped(self.layers(padded(x, self.padded)), self.size)


def doublings(small: int, large: int) -> int:
    """Times that a size is doubled to reach a larger one: past it by one element in all at most, else short of it."""
    if large <= small:
        return 0
    times = math.ceil(math.log2(large / small))
    return times if small * 2**times - large <= 2**times else times - 1


def padded(x: Tensor, size: Shape) -> Tensor:
    """Images `(b, C, H, W)` in the middle of larger ones; averaged to smaller ones."""
    if x.shape[-2:] == tuple(size):
        return x
    tall, wide = (max(have, want) for have, want in zip(x.shape[-2:], size, strict=True))
    (height, width), top, left = x.shape[-2:], (tall - x.shape[-2]) // 2, (wide - x.shape[-1]) // 2
    x = nn.functional.pad(x, (left, wide - width - left, top, tall - height - top))
    return x if x.shape[-2:] == tuple(size) else nn.functional.adaptive_avg_pool2d(x, (size[0], size[1]))


def cropped(x: Tensor, size: Shape) -> Tensor:
    """The middle of images `(b, C, H, W)`; interpolated to larger ones."""
    if x.shape[-2:] == tuple(size):
        return x
    tall, wide = (min(have, want) for have, want in zip(x.shape[-2:], size, strict=True))
    top, left = (x.shape[-2] - tall) // 2, (x.shape[-1] - wide) // 2
    x = x[..., top : top + tall, left : left + wide]
    return x if x.shape[-2:] == tuple(size) else nn.functional.interpolate(x, list(size), mode="bilinear")


class ResnetModule(NetworkModule):
    """Every input is brought to one working size, where residual blocks run; from there to the output."""

    def __init__(self, inputs: Mapping[str, Shape], output: Shape | None, declared: Resnet) -> None:
        images = {name: shape for name, shape in inputs.items() if len(shape) == 3}
        channels, act = declared.channels, ACTIVATIONS[declared.activation]
        highest = (max(s[1] for s in images.values()), max(s[2] for s in images.values())) if images else None
        spatial = output is not None and len(output) == 3
        if spatial and output is not None:
            least = highest or tuple(-(-side // 2**declared.halvings) for side in output[1:])
            work = tuple(min(a, b) for a, b in zip(least, output[1:], strict=True))
        else:
            assert highest is not None  # noqa: S101 - `Resnet.build` has looked
            work = tuple(-(-side // 2**declared.halvings) for side in highest)
        size = channels * prod(work)
        super().__init__(inputs, (size,) if output is None else output)
        self.work, self.channels, self.size = work, channels, size
        self.lead = nn.ModuleDict(
            {
                name: Resize(shape, channels, work, act) if name in images else nn.Linear(prod(shape), self._start)
                for name, shape in inputs.items()
            }
        )
        inner = declared.inner or channels // 2
        self.blocks = nn.Sequential(*(Residual(channels, inner, act) for _ in range(declared.blocks)), act())
        self.head: nn.Module
        if not spatial:
            self.head = nn.Identity() if output is None else nn.Linear(size, prod(output))
        elif output is not None and output[1:] == work:
            self.head = nn.Conv2d(channels, output[0], 1)
        else:
            assert output is not None  # noqa: S101 - narrows the type
            self.head = Upscale(channels, work, output, act)
        self.spatial = spatial

    @property
    def _start(self) -> int:
        return self.channels * prod(self.work)

    @property
    def width(self) -> int:
        return self.size

    def _worked(self, inputs: Mapping[str, Tensor]) -> Tensor:
        parts = []
        for name, shape in self.inputs.items():
            layer = self.lead[name]
            if isinstance(layer, nn.Linear):
                parts.append(layer(flatten(inputs[name], shape)).unflatten(-1, (self.channels, *self.work)))
            else:
                parts.append(batched(layer, inputs[name]))
        return batched(self.blocks, sum(parts[1:], parts[0]))

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self._worked(inputs).flatten(-3)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Named tensors `(..., *shape)` to `(..., *output)`."""
        if self.spatial:
            return batched(self.head, self._worked(inputs))
        h = self.head(self.features(inputs))
        return h if len(self.output) == 1 else h.unflatten(-1, self.output)


class Upscale(nn.Module):
    """Transposed convolutions from the working size to an image, cropped to it."""

    def __init__(self, channels: int, work: Shape, output: Shape, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.size = output[1:]
        ups = [doublings(a, b) for a, b in zip(work, output[1:], strict=True)]
        layers: list[nn.Module] = []
        width, steps = channels, max(ups)
        for i in range(steps):
            stride = tuple(2 if i < u else 1 for u in ups)
            kernel = tuple(4 if s == 2 else 3 for s in stride)
            wide = max(channels // 2, min(channels, 16)) if i < steps - 1 or output[0] > 4 else output[0]
            layers.append(nn.ConvTranspose2d(width, wide, kernel, stride, 1))  # type: ignore[arg-type]
            width = wide
            if i < steps - 1 or width != output[0]:
                layers.append(act())
        if width != output[0] or not steps:
            layers.append(nn.Conv2d(width, output[0], 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, h: Tensor) -> Tensor:
        """`(b, channels, *work)` to `(b, *output)`."""
        return cropped(self.layers(h), self.size)


@final
class Resnet(Network):
    """Residual convolutions between images, grids of codes and vectors, of any sizes.

    Images are brought to the working size by strided (down) or transposed (up) convolutions: the size of the output, or
    of the largest input where that is smaller. Residual blocks run there. An encoder's features lie on the grid of the
    codes that read them; without a grid they are a vector.

    References:
        Neural Discrete Representation Learning (van den Oord, Vinyals, Kavukcuoglu, 2017),
        https://arxiv.org/abs/1711.00937, section 4.1
    """

    kind: Literal["resnet"] = "resnet"
    channels: int = Field(default=64, gt=1)
    """Of the blocks."""
    blocks: int = Field(default=2, ge=0, le=1000)
    """Residual blocks."""
    inner: int | None = Field(default=None, gt=0)
    """Channels inside a block; half of `channels` unless said."""
    halvings: int = Field(default=2, ge=0, le=30)
    """Times that sizes are halved where no grid says how large the working size is."""
    activation: Activation = "relu"

    def features_on(self, grid: Shape) -> Shape | None:
        return (self.channels, *grid) if len(grid) == 2 else None

    def build(self, inputs: Mapping[str, Shape], output: Shape | None) -> NetworkModule:
        """See `Network.build`; at least one side must be an image or a grid."""
        shapes = [*inputs.values(), *([output] if output is not None else [])]
        if not any(len(shape) == 3 for shape in shapes) or output is None and max(map(len, inputs.values())) < 3:
            found = ", ".join(f"{name} {list(shape)}" for name, shape in inputs.items())
            raise DeclarationError(
                f"network resnet: expected an image (channels, height, width) or a grid among its inputs or its "
                f"output; got {found}. Declare data.shape, e.g. [1, 28, 28], or use kind = 'mlp'."
            )
        return ResnetModule(inputs, output, self)
