"""Convolutional networks between images, grids of codes and vectors: stride-2 convolutions, or residual blocks."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, pairwise
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from pvae.component import Ints, Shape
from pvae.errors import DeclarationError
from pvae.nn.network import ACTIVATIONS, Act, Activation, Network, NetworkModule, flatten, join


def halvings(size: int, times: int) -> list[int]:
    """Return the sizes of an image side before and after each of `times` stride-2 convolutions: 28, 14, 7, 4 ..."""
    return [-(-size // 2**time) for time in range(times + 1)]


class Down(nn.Module):
    """Stride-2 convolutions from an image `(..., C, H, W)` to a vector."""

    def __init__(self, image: Shape, channels: Sequence[int], act: Act) -> None:
        super().__init__()
        pairs = ((nn.Conv2d(a, b, 3, stride=2, padding=1), act()) for a, b in pairwise((image[0], *channels)))
        self.layers = nn.Sequential(*chain.from_iterable(pairs))
        height, width = (halvings(side, len(channels))[-1] for side in image[1:])
        self.features = channels[-1] * height * width

    def forward(self, x: Tensor) -> Tensor:
        """Return the features `(..., features)` of images `(..., C, H, W)`."""
        return batched(self.layers, x).flatten(-3)


class Up(nn.Module):
    """Transposed convolutions from a vector to an image `(..., C, H, W)` of any size: the mirror of `Down`."""

    def __init__(self, features: int, image: Shape, channels: Sequence[int], act: Act) -> None:
        super().__init__()
        self.image = image
        heights, widths = (halvings(side, len(channels))[::-1] for side in image[1:])
        self.start = (channels[-1], heights[0], widths[0])
        self.first = nn.Sequential(nn.Linear(features, math.prod(self.start)), act())
        layers: list[nn.Module] = []
        outputs = (*reversed(channels[:-1]), image[0])
        for level, (a, b) in enumerate(zip(reversed(channels), outputs, strict=True)):
            even = (1 - heights[level + 1] % 2, 1 - widths[level + 1] % 2)
            layers += [nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=even), act()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, h: Tensor) -> Tensor:
        """Return images `(..., C, H, W)` from vectors `(..., features)`."""
        return self.layers(self.first(h).reshape(-1, *self.start)).reshape(*h.shape[:-1], *self.image)


def require_image(wanted: str, inputs: Mapping[str, Shape], output: Shape | None) -> None:
    """Check that a network has an image among its inputs, or as its output.

    Raises:
        DeclarationError: there is none; the message names the inputs.
    """
    if all(len(shape) != 3 for shape in (*inputs.values(), output or ())):
        raise DeclarationError.of("nn.conv.image", wanted=wanted, inputs=inputs)


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
        require_image("network conv: expected an image (channels, height, width)", inputs, output)
        return ConvModule(inputs, output, self)


class ConvModule(NetworkModule):
    """Network of `Conv`: image inputs are encoded, concatenated with vector inputs, and mapped to the output."""

    def __init__(self, inputs: Mapping[str, Shape], output: Shape | None, declared: Conv) -> None:
        channels, dense, act = declared.channels, declared.dense, ACTIVATIONS[declared.activation]
        super().__init__(inputs, (dense,) if output is None else output)
        encoders = {name: Down(shape, channels, act) for name, shape in inputs.items() if len(shape) == 3}
        widths = [encoders[name].features if name in encoders else math.prod(shape) for name, shape in inputs.items()]
        self.encoders = nn.ModuleDict(encoders)
        self.width = dense
        self.dense = nn.Sequential(nn.Linear(sum(widths), dense), act())
        self.head: nn.Module = nn.Identity()
        if output is not None:
            self.head = Up(dense, output, channels, act) if len(output) == 3 else nn.Linear(dense, math.prod(output))

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        flat = [
            self.encoders[name](inputs[name]) if name in self.encoders else flatten(inputs[name], shape)
            for name, shape in self.inputs.items()
        ]
        return self.dense(join(flat))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the output `(..., *output)` for named inputs `(..., *shape)`; leading dimensions broadcast."""
        h = self.head(self.features(inputs))
        return h if isinstance(self.head, Up) else self.shaped(h)


class Pointwise(NetworkModule):
    """Linear map at every position of a grid (1 x 1 convolution); inputs without the grid are broadcast to it."""

    def __init__(self, inputs: Mapping[str, Shape], output: Shape) -> None:
        super().__init__(inputs, output)
        self.maps = nn.ModuleDict()
        for name, shape in inputs.items():
            on_grid = shape[1:] == output[1:]
            self.maps[name] = nn.Conv2d(shape[0], output[0], 1) if on_grid else nn.Linear(math.prod(shape), output[0])

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the output `(..., *output)` for named inputs `(..., *shape)`; leading dimensions broadcast."""
        return mapped(self.maps, self, inputs, (self.output[0], 1, 1))


def batched(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the output of a layer over images `(b, C, H, W)` for images with any leading dimensions."""
    if x.dim() == 4:
        return layer(x)
    y = layer(x.reshape(-1, *x.shape[-3:]))
    return y.reshape(*x.shape[:-3], *y.shape[1:])


def mapped(layers: nn.ModuleDict, network: NetworkModule, inputs: Mapping[str, Tensor], image: Shape) -> Tensor:
    """Return the sum of all inputs as images: vectors pass linear layers with outputs of shape `image`."""
    first, *others = (
        layer(flatten(inputs[name], network.inputs[name])).unflatten(-1, image)
        if isinstance(layer, nn.Linear)
        else batched(layer, inputs[name])
        for name, layer in layers.items()
    )
    return sum(others, first)


class Residual(nn.Module):
    """Residual block h + W2 act(W1 act(h)), with a 3 x 3 convolution W1 and a 1 x 1 convolution W2."""

    def __init__(self, channels: int, inner: int, act: Act) -> None:
        super().__init__()
        spread, back = nn.Conv2d(channels, inner, 3, padding=1), nn.Conv2d(inner, channels, 1)
        self.layers = nn.Sequential(act(), spread, act(), back)

    def forward(self, h: Tensor) -> Tensor:
        """Return the output of the block for `h` `(b, C, H, W)`, of the same shape."""
        return h + self.layers(h)


def strides(kind: type[nn.Module], widths: Sequence[int], times: Sequence[int], act: Act) -> list[nn.Module]:
    """Return convolutions of class `kind` between successive `widths`, an activation after each.

    Their stride is 2 along the axes that are still resized at that step, those with more `times`, else 1.
    """
    layers: list[nn.Module] = []
    for step, (a, b) in enumerate(pairwise(widths)):
        stride = tuple(2 if step < count else 1 for count in times)
        layers += [kind(a, b, tuple(s + 2 for s in stride), stride, 1), act()]
    return layers


class Resize(nn.Module):
    """Convolutions that resize images: stride-2 convolutions down, transposed ones up, a factor of two at a time.

    If the ratio of sizes is no power of two, images are padded with zeros before, or cropped after, as long as that is
    at most one element of the smaller size in total (28 goes down to 8 through 32); else they are average-pooled
    before, or interpolated after.
    """

    def __init__(self, image: Shape, channels: int, size: Shape, act: Act) -> None:
        super().__init__()
        self.size = size
        down = [doublings(b, a) for a, b in zip(image[1:], size, strict=True)]
        up = [doublings(a, b) for a, b in zip(image[1:], size, strict=True)]
        widths = [image[0], *[narrow(channels)] * (max(down) - 1), channels]
        layers = strides(nn.Conv2d, widths, down, act) if max(down) else [nn.Conv2d(image[0], channels, 3, 1, 1), act()]
        layers += strides(nn.ConvTranspose2d, [channels] * (max(up) + 1), up, act)
        self.layers = nn.Sequential(*layers[:-1])
        self.padded = tuple(b * 2**d if a > b else a for a, b, d in zip(image[1:], size, down, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Return images `(b, C, H, W)` resized to `(b, channels, *size)`."""
        return cropped(self.layers(padded(x, self.padded)), self.size)


def narrow(channels: int) -> int:
    """Return the number of channels of images larger than the working size: half, at least 16 where there are 16."""
    return max(channels // 2, min(channels, 16))


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


class Upscale(nn.Module):
    """Transposed convolutions from the working size up to an image, centre-cropped to its size."""

    def __init__(self, channels: int, work: Shape, output: Shape, act: Act) -> None:
        super().__init__()
        self.size = output[1:]
        ups = [doublings(a, b) for a, b in zip(work, output[1:], strict=True)]
        last = narrow(channels) if output[0] > 4 else output[0]
        widths = [channels, *[*[narrow(channels)] * (max(ups) - 1), last][: max(ups)]]
        if (layers := strides(nn.ConvTranspose2d, widths, ups, act)) and widths[-1] == output[0]:
            layers.pop()
        else:
            layers.append(nn.Conv2d(widths[-1], output[0], 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, h: Tensor) -> Tensor:
        """Return images `(b, *output)` from features `(b, channels, *work)`."""
        return cropped(self.layers(h), self.size)


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
        require_image("network resnet: expected an image (channels, height, width) or a grid", inputs, output)
        return ResnetModule(inputs, output, self)


class ResnetModule(NetworkModule):
    """Network of `Resnet`: inputs are resized to one working size, pass residual blocks, then go to the output."""

    def __init__(self, inputs: Mapping[str, Shape], output: Shape | None, declared: Resnet) -> None:
        images = [shape for shape in inputs.values() if len(shape) == 3]
        channels, act = declared.channels, ACTIVATIONS[declared.activation]
        highest = tuple(max(sides) for sides in zip(*(shape[1:] for shape in images), strict=True))
        self.spatial = output is not None and len(output) == 3
        if output is not None and self.spatial:
            least = highest or tuple(-(-side // 2**declared.halvings) for side in output[1:])
            work = tuple(min(a, b) for a, b in zip(least, output[1:], strict=True))
        else:
            work = tuple(-(-side // 2**declared.halvings) for side in highest)
        size = channels * math.prod(work)
        super().__init__(inputs, (size,) if output is None else output)
        self.start, self.width = (channels, *work), size
        self.lead = nn.ModuleDict()
        for name, shape in inputs.items():
            is_image = len(shape) == 3
            self.lead[name] = Resize(shape, channels, work, act) if is_image else nn.Linear(math.prod(shape), size)
        inner = declared.inner or channels // 2
        self.blocks = nn.Sequential(*(Residual(channels, inner, act) for _ in range(declared.blocks)), act())
        self.head: nn.Module = nn.Identity()
        if output is not None and self.spatial:
            there = output[1:] == work
            self.head = nn.Conv2d(channels, output[0], 1) if there else Upscale(channels, work, output, act)
        elif output is not None:
            self.head = nn.Linear(size, math.prod(output))

    def _worked(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return batched(self.blocks, mapped(self.lead, self, inputs, self.start))

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self._worked(inputs).flatten(-3)

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the output `(..., *output)` for named inputs `(..., *shape)`; leading dimensions broadcast."""
        if self.spatial:
            return batched(self.head, self._worked(inputs))
        return self.shaped(self.head(self.features(inputs)))
