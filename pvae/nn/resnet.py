"""Residual convolutional networks between images, grids of codes and vectors of any size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from math import prod
from typing import Literal, final

from pydantic import Field
from torch import Tensor, nn

from pvae.component import Shape
from pvae.errors import DeclarationError
from pvae.nn.network import ACTIVATIONS, Activation, Network, NetworkModule, flatten


class Pointwise(NetworkModule):
    """Linear map at every position of a grid (1 x 1 convolution); inputs without the grid are broadcast to it."""

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
        """Return the output `(..., *output)` for named inputs `(..., *shape)`; leading dimensions broadcast."""
        first, *others = (self._at(name, inputs[name]) for name in self.inputs)
        return sum(others, first)

    def _at(self, name: str, x: Tensor) -> Tensor:
        layer, shape = self.maps[name], self.inputs[name]
        if isinstance(layer, nn.Linear):
            return layer(flatten(x, shape))[..., None, None]
        return batched(layer, x)


def batched(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the output of a layer over images `(b, C, H, W)` for images with any leading dimensions."""
    if x.dim() == 4:
        return layer(x)
    y = layer(x.reshape(-1, *x.shape[-3:]))
    return y.reshape(*x.shape[:-3], *y.shape[1:])


class Residual(nn.Module):
    """Residual block h + W2 act(W1 act(h)), with a 3 x 3 convolution W1 and a 1 x 1 convolution W2."""

    def __init__(self, channels: int, inner: int, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            act(), nn.Conv2d(channels, inner, 3, padding=1), act(), nn.Conv2d(inner, channels, 1)
        )

    def forward(self, h: Tensor) -> Tensor:
        """Return the output of the block for `h` `(b, C, H, W)`, of the same shape."""
        return h + self.layers(h)


class Resize(nn.Module):
    """Convolutions that resize images: stride-2 convolutions down, transposed ones up, a factor of two at a time.

    If the ratio of sizes is no power of two, images are padded with zeros before, or cropped after, as long as that is
    at most one element of the smaller size in total (28 goes down to 8 through 32); else they are average-pooled
    before, or interpolated after.
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
        """Return images `(b, C, H, W)` resized to `(b, channels, *size)`."""
        return cropped(self.layers(padded(x, self.padded)), self.size)


def doublings(small: int, large: int) -> int:
    """Return the number of doublings from a small to a large size; overshoots by at most one small element."""
    if large <= small:
        return 0
    times = math.ceil(math.log2(large / small))
    return times if small * 2**times - large <= 2**times else times - 1


def padded(x: Tensor, size: Shape) -> Tensor:
    """Return images `(b, C, H, W)` at another size: zero-padded to a larger, average-pooled to a smaller one."""
    if x.shape[-2:] == tuple(size):
        return x
    tall, wide = (max(have, want) for have, want in zip(x.shape[-2:], size, strict=True))
    (height, width), top, left = x.shape[-2:], (tall - x.shape[-2]) // 2, (wide - x.shape[-1]) // 2
    x = nn.functional.pad(x, (left, wide - width - left, top, tall - height - top))
    return x if x.shape[-2:] == tuple(size) else nn.functional.adaptive_avg_pool2d(x, (size[0], size[1]))


def cropped(x: Tensor, size: Shape) -> Tensor:
    """Return images `(b, C, H, W)` at another size: centre-cropped to a smaller, interpolated to a larger one."""
    if x.shape[-2:] == tuple(size):
        return x
    tall, wide = (min(have, want) for have, want in zip(x.shape[-2:], size, strict=True))
    top, left = (x.shape[-2] - tall) // 2, (x.shape[-1] - wide) // 2
    x = x[..., top : top + tall, left : left + wide]
    return x if x.shape[-2:] == tuple(size) else nn.functional.interpolate(x, list(size), mode="bilinear")


class ResnetModule(NetworkModule):
    """Network of `Resnet`: inputs are resized to one working size, pass residual blocks, then go to the output."""

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
        """Return the output `(..., *output)` for named inputs `(..., *shape)`; leading dimensions broadcast."""
        if self.spatial:
            return batched(self.head, self._worked(inputs))
        h = self.head(self.features(inputs))
        return h if len(self.output) == 1 else h.unflatten(-1, self.output)


class Upscale(nn.Module):
    """Transposed convolutions from the working size up to an image, centre-cropped to its size."""

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
        """Return images `(b, *output)` from features `(b, channels, *work)`."""
        return cropped(self.layers(h), self.size)


@final
class Resnet(Network):
    """Residual convolutional network between images, grids of codes and vectors of any size.

    Images are resized by strided (down) or transposed (up) convolutions to a working size, at which residual blocks
    run: the size of the output, or of the largest input if that is smaller. The features of an encoder have the grid of
    the codes that they are input to; without a grid they are a vector.

    References:
        Neural Discrete Representation Learning (van den Oord, Vinyals, Kavukcuoglu, 2017),
        https://arxiv.org/abs/1711.00937, section 4.1
    """

    kind: Literal["resnet"] = "resnet"
    channels: int = Field(default=64, gt=1)
    """Number of channels of the residual blocks."""
    blocks: int = Field(default=2, ge=0, le=1000)
    """Number of residual blocks."""
    inner: int | None = Field(default=None, gt=0)
    """Number of channels inside a residual block; default: half of `channels`."""
    halvings: int = Field(default=2, ge=0, le=30)
    """Number of times that image sides are halved to the working size, unless a grid of codes sets that size."""
    activation: Activation = "relu"

    def features_on(self, grid: Shape) -> Shape | None:
        return (self.channels, *grid) if len(grid) == 2 else None

    def build(self, inputs: Mapping[str, Shape], output: Shape | None) -> NetworkModule:
        """Return the network module; at least one input or the output must be an image or a grid."""
        shapes = [*inputs.values(), *([output] if output is not None else [])]
        if not any(len(shape) == 3 for shape in shapes) or output is None and max(map(len, inputs.values())) < 3:
            found = ", ".join(f"{name} {list(shape)}" for name, shape in inputs.items())
            raise DeclarationError(
                f"network resnet: expected an image (channels, height, width) or a grid among its inputs or its "
                f"output; got {found}. Declare data.shape, e.g. [1, 28, 28], or use kind = 'mlp'."
            )
        return ResnetModule(inputs, output, self)
