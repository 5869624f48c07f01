"""Gated PixelCNN prior over a grid of codes; padding makes its convolutions causal, so that no weight is masked."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pvae.component import Shape
from pvae.graph.site import Link, Site, Values
from pvae.models.priors import autoregressive, base


def gate(h: Tensor) -> Tensor:
    """Return tanh(a) * sigmoid(b), `(n, C, H, W)`, of the two halves a, b of the channels of `h` `(n, 2 C, H, W)`."""
    a, b = h.chunk(2, 1)
    return a.tanh() * b.sigmoid()


class PixelCNNPrior(base.Prior):
    r"""Gated PixelCNN prior: prod_p p(c_p | codes above and before it, parents), by causal convolutions.

    A parent that is a vector (a one-hot label, a latent) adds one bias to each layer at all positions; a grid of
    embeddings adds a map over the positions, resized to this grid; a sequence is averaged over its length. Every layer
    extends the receptive field by kernel // 2; p(c_p) does not depend on codes outside it.

    References:
        Conditional Image Generation with PixelCNN Decoders (van den Oord et al., 2016),
        https://arxiv.org/abs/1606.05328
    """

    kind: Literal["pixelcnn"] = "pixelcnn"
    values: ClassVar[tuple[Values, ...]] = ("index",)
    reads_parents: ClassVar[bool] = True
    channels: int = Field(default=64, gt=0)
    """Number of channels of both stacks."""
    layers: int = Field(default=6, gt=0, le=1000)
    """Number of gated layers."""
    kernel: int = Field(default=5, gt=1)
    """Kernel size of the convolutions, odd; a layer reads only the part of the window before a position."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Proportion of gated features that are dropped in training."""

    @model_validator(mode="after")
    def _odd(self) -> Self:
        if self.kernel % 2 == 0:
            raise ValueError(f"an odd kernel, which has a middle; got {self.kernel}")
        return self

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return PixelCNNModule(site, given, self)


class GatedLayer(nn.Module):
    """Layer of a gated PixelCNN (vertical and horizontal stack), causal because its inputs are padded only before.

    Arguments:
        declared: the prior, with C channels and an odd kernel size K; a layer reads K // 2 rows above (K columns wide)
            and K // 2 columns before.
        rows: True if the grid has several rows, which a vertical stack reads.
        conditioned: True if there is a context, the encoded parents.
        last: True for the last layer, which has no residual output.
    """

    def __init__(self, declared: PixelCNNPrior, *, rows: bool, conditioned: bool, last: bool) -> None:
        super().__init__()
        channels, kernel, reach = declared.channels, declared.kernel, declared.kernel // 2
        self.reach = reach
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, reach + 1))
        self.vertical = nn.Conv2d(channels, 2 * channels, (reach + 1, kernel), padding=(0, reach)) if rows else None
        self.down = nn.Conv2d(2 * channels, 2 * channels, 1, bias=False) if rows else None
        stacks = 2 if rows else 1
        self.condition = nn.Conv2d(channels, 2 * stacks * channels, 1, bias=False) if conditioned else None
        self.out = nn.Conv2d(channels, channels if last else 2 * channels, 1)
        self.dropout = nn.Dropout(declared.dropout)

    def above(self, v: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the vertical stack's output `(n, C, ...)`, and its input to the horizontal stack `(n, 2 C, ...)`."""
        assert self.vertical is not None and self.down is not None  # noqa: S101, PT018 - there are rows above
        h = self.vertical(nn.functional.pad(v, (0, 0, self.reach, 0)))
        if condition is not None:
            h = h + condition.chunk(2, 1)[1]
        return gate(h), self.down(h)

    def before(self, h: Tensor, above: Tensor | None, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the horizontal stack's skip output and its residual for the next layer (or None), `(n, C, ...)`."""
        pre = self.horizontal(nn.functional.pad(h, (self.reach, 0, 0, 0)))
        if condition is not None:
            pre = pre + condition[:, : pre.shape[1]]
        if above is not None:
            pre = pre + above
        skip, *residual = self.out(self.dropout(gate(pre))).split(h.shape[1], 1)
        return skip, residual[0] if residual else None


class ResizedMap(nn.Module):
    """Resampling of feature maps `(..., h, w)` to another grid, `(..., H, W)`: each cell is the mean of its area."""

    rows: Tensor
    columns: Tensor

    def __init__(self, old: Shape, new: Shape) -> None:
        super().__init__()
        for name, a, b in zip(("rows", "columns"), old, new, strict=True):
            # Both sides cut into a * b parts: a new cell holds a of them, an old one b.
            low, high = torch.arange(b)[:, None] * a, torch.arange(1, b + 1)[:, None] * a
            shared = torch.minimum(high, torch.arange(1, a + 1) * b) - torch.maximum(low, torch.arange(a) * b)
            self.register_buffer(name, shared.clamp(min=0) / a, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return feature maps `(..., h, w)` resampled to `(..., H, W)`."""
        return ((x @ self.columns.mT).mT @ self.rows.mT).mT


class Map(nn.Module):
    """Encoder of one parent `(..., *shape)` as a map over the grid, `(..., C, H, W)`, or as a vector, `(..., C, 1, 1)`.

    A parent that is a grid gives a map; a vector, or the mean of a sequence over its length, one vector for all cells.
    """

    def __init__(self, shape: Shape, channels: int, plane: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.layers: nn.Module = nn.Linear(shape[0], channels)
        if len(shape) == 3:
            first, last = (nn.Conv2d(width, channels, 3, padding=1) for width in (shape[0], channels))
            self.layers = nn.Sequential(first, nn.SiLU(), ResizedMap(shape[1:], plane), last)

    def forward(self, x: Tensor) -> Tensor:
        """Return the encoded parent, `(..., C, H, W)` or `(..., C, 1, 1)`."""
        if len(self.shape) < 3:
            return self.layers(x.mean(-1) if len(self.shape) == 2 else x)[..., None, None]
        h = self.layers(x.reshape(-1, *self.shape))
        return h.reshape(*x.shape[:-3], *h.shape[1:])


class PixelCNNModule(autoregressive.TokenModule):
    """Gated PixelCNN of two stacks: a vertical one over the rows above, without blind spot, and a horizontal one.

    The horizontal stack reads the columns before a position. A sequence `(L,)` is one row, and has no vertical stack.
    """

    context_dims = 3

    def __init__(self, site: Site, parents: Mapping[str, Shape], declared: PixelCNNPrior) -> None:
        channels, last = declared.channels, declared.layers - 1
        super().__init__(site, parents, declared.kind, channels)
        self.plane = (*[1] * (2 - len(self.grid)), *self.grid)
        self.maps = nn.ModuleDict({name: Map(shape, channels, self.plane) for name, shape in self.parents.items()})
        told = {"rows": self.plane[0] > 1, "conditioned": bool(parents)}
        layers = (GatedLayer(declared, **told, last=layer == last) for layer in range(declared.layers))
        self.layers: Any = nn.ModuleList(layers)
        hidden, head = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, self.codes, 1)
        self.head = nn.Sequential(nn.ReLU(), hidden, nn.ReLU(), head)

    def encode(self, given: Mapping[str, Tensor], lead: torch.Size) -> Tensor | None:
        """Return the sum of the encoded parents, after SiLU, `(*lead, C, H | 1, W | 1)`; None without parents."""
        maps = [self.maps[name](value) for name, value in given.items()]
        return nn.functional.silu(sum(maps[1:], maps[0])) if maps else None

    def conditions(self, context: Tensor | None) -> list[Tensor | None]:
        """Return every layer's projection of the encoded parents, `(n, 2 C or 4 C, H | 1, W | 1)`."""
        if context is None:
            return [None] * len(self.layers)
        context = context.contiguous(memory_format=torch.channels_last)
        return [layer.condition(context) for layer in self.layers]

    def above(self, x: Tensor, conditions: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return every layer's features of the rows above, `(n, 2 C, rows, W)`, from embedded codes `(n, rows, W, C)`.

        The last row is not read.
        """
        if self.plane[0] == 1:
            return [None] * len(self.layers)
        v = self._shifted(x, 1)
        told: list[Tensor | None] = []
        for layer, condition in zip(self.layers, conditions, strict=True):
            v, down = layer.above(v, condition)
            told.append(down)
        return told

    def before(self, x: Tensor, above: Sequence[Tensor | None], conditions: Sequence[Tensor | None]) -> Tensor:
        """Return features of every position, `(n, C, rows, columns)`, from embedded codes `(n, rows, columns, C)`.

        The last column is not read.
        """
        h = self._shifted(x, 2)
        total: Any = None
        for layer, told, condition in zip(self.layers, above, conditions, strict=True):
            skip, residual = layer.before(h, told, condition)
            total = skip if total is None else total + skip
            h = h if residual is None else h + residual
        return total

    def _shifted(self, x: Tensor, axis: int) -> Tensor:
        """Return embedded codes shifted by one along an axis, start vector first; channels last in memory (faster)."""
        start = self.start.expand_as(x.narrow(axis, 0, 1))
        return torch.cat([start, x.narrow(axis, 0, x.shape[axis] - 1)], axis).permute(0, 3, 1, 2)

    def logits(self, value: Tensor, context: Tensor | None) -> Tensor:
        x = self.embed(value).unflatten(1, self.plane)
        conditions = self.conditions(context)
        return self.head(self.before(x, self.above(x, conditions), conditions)).flatten(2).mT

    def draw(self, count: int, context: Tensor | None, choose: autoregressive.Choose) -> Tensor:
        """Return codes `(count, p)` chosen in raster order; the vertical stack runs once per row of the grid."""
        height, width = self.plane
        x = self.start.new_zeros(count, height, width, self.width)
        drawn = []
        conditions = [c if c is None else c.expand(-1, -1, height, width) for c in self.conditions(context)]
        for i in range(height):
            told = self.above(x[:, : i + 1], [c if c is None else c[:, :, : i + 1] for c in conditions])
            for j in range(width):
                above = [t if t is None else t[:, :, i:, : j + 1] for t in told]
                here = [c if c is None else c[:, :, i : i + 1, : j + 1] for c in conditions]
                h = self.before(x[:, i : i + 1, : j + 1], above, here)
                drawn.append(choose(self.head(h[..., -1:]).flatten(1)))
                x[:, i, j] = self.embed(drawn[-1][:, None])[:, 0]
        return torch.stack(drawn, 1)
