"""Convolutional networks with stride 2 between images and vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Literal, final

from pydantic import Field
from torch import Tensor, nn

from pvae.component import Ints, Shape
from pvae.errors import DeclarationError
from pvae.nn.network import ACTIVATIONS, Activation, Network, NetworkModule, flatten, join


def halvings(size: int, times: int) -> list[int]:
    """Return the sizes of an image side before and after each of `times` stride-2 convolutions: 28, 14, 7, 4 ..."""
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
        """Return the features `(..., features)` of images `(..., C, H, W)`."""
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
        """Return images `(..., C, H, W)` from vectors `(..., features)`."""
        lead = h.shape[:-1]
        return self.layers(self.first(h).reshape(-1, *self.start)).reshape(*lead, *self.image)


class ConvModule(NetworkModule):
    """Network of `Conv`: image inputs are encoded, concatenated with vector inputs, and mapped to the output."""

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
        """Return the output `(..., *output)` for named inputs `(..., *shape)`; leading dimensions broadcast."""
        h = self.head(self.features(inputs))
        return h if self.unflat is None else h.unflatten(-1, self.unflat)


@final
class Conv(Network):
    """Convolutional network: stride-2 convolutions for image inputs, transposed ones for an image output; any size.

    An input or output is an image when its event shape is `(channels, height, width)`.
    """

    kind: Literal["conv"] = "conv"
    channels: Ints = Field(default=(32, 64), min_length=1)
    """Number of channels after each stride-2 convolution; each convolution halves height and width."""
    dense: int = Field(default=256, gt=0)
    """Width of the dense layer after the joined inputs, before the output."""
    activation: Activation = "relu"

    def build(self, inputs: Mapping[str, Shape], output: Shape | None) -> NetworkModule:
        """Return the network module; at least one input or the output must be an image."""
        shapes = [*inputs.values(), *([output] if output is not None else [])]
        if not any(len(shape) == 3 for shape in shapes):
            found = ", ".join(f"{name} {list(shape)}" for name, shape in inputs.items())
            raise DeclarationError(
                f"network conv: expected an image (channels, height, width) among its inputs or its output; "
                f"got {found}. Declare data.shape, e.g. [1, 28, 28], or use kind = 'mlp'."
            )
        return ConvModule(inputs, output, self.channels, self.dense, self.activation)
