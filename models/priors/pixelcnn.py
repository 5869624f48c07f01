"""A gated PixelCNN over a grid of codes: causal by padding, so that no weight is masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pvae.component import Shape
from pvae.graph.link import Link
from pvae.graph.site import Site
from pvae.graph.space import Values
from pvae.models.priors.autoregressive import Choose, TokenModule, require_shapes
from pvae.models.priors.base import Prior


def gate(h: Tensor) -> Tensor:
    """tanh(a) * sigmoid(b) of the two halves of channels, `(n, 2 C, H, W)` to `(n, C, H, W)`."""
    a, b = h.chunk(2, 1)
    return a.tanh() * b.sigmoid()


class GatedLayer(nn.Module):
    """One layer of both stacks. Padding before, and none after, is what makes it causal: no weight is masked.

    Arguments:
        channels: C.
        kernel: K, odd; a position reads K // 2 rows above, as many columns before, and columns aside in rows above.
        rows: whether there are rows above.
        conditioned: whether there is a context.
        last: whether no layer follows, which a residual would reach.
        dropout: share of gated features that are dropped in training.
    """

    def __init__(
        self, channels: int, kernel: int, *, rows: bool, conditioned: bool, last: bool, dropout: float
    ) -> None:
        super().__init__()
        reach = kernel // 2
        self.reach = reach
        self.horizontal = nn.Conv2d(channels, 2 * channels, (1, reach + 1))
        self.vertical = nn.Conv2d(channels, 2 * channels, (reach + 1, kernel), padding=(0, reach)) if rows else None
        self.down = nn.Conv2d(2 * channels, 2 * channels, 1, bias=False) if rows else None
        stacks = 2 if rows else 1
        self.condition = nn.Conv2d(channels, 2 * stacks * channels, 1, bias=False) if conditioned else None
        self.out = nn.Conv2d(channels, channels if last else 2 * channels, 1)
        self.dropout = nn.Dropout(dropout)

    def above(self, v: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """The vertical stack: what goes on, and what goes to the row below, `(n, C, ...)` and `(n, 2 C, ...)`."""
        assert self.vertical is not None and self.down is not None  # noqa: S101, PT018 - there are rows above
        h = self.vertical(F.pad(v, (0, 0, self.reach, 0)))
        if condition is not None:
            h = h + condition.chunk(2, 1)[1]
        return gate(h), self.down(h)

    def before(self, h: Tensor, above: Tensor | None, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The horizontal stack: what goes to the output, and the residual of the next layer, `(n, C, ...)`."""
        pre = self.horizontal(F.pad(h, (self.reach, 0, 0, 0)))
        if condition is not None:
            pre = pre + condition[:, : pre.shape[1]]
        if above is not None:
            pre = pre + above
        skip, *residual = self.out(self.dropout(gate(pre))).split(h.shape[1], 1)
        return skip, residual[0] if residual else None


class ResizedMap(nn.Module):
    """A map `(..., h, w)` over another grid `(..., H, W)`: every new cell is the mean of the area that it covers."""

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
        """See the class."""
        return ((x @ self.columns.mT).mT @ self.rows.mT).mT


class Map(nn.Module):
    """One parent `(..., *shape)` as a map over the grid, or as one vector for all positions: `(..., C, H | 1, W | 1)`.

    Of a sequence the mean over its length is seen.
    """

    def __init__(self, shape: Shape, channels: int, plane: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.layers: nn.Module = nn.Linear(shape[0], channels)
        if len(shape) == 3:
            small = nn.Conv2d(shape[0], channels, 3, padding=1)
            self.layers = nn.Sequential(
                small, nn.SiLU(), ResizedMap(shape[1:], plane), nn.Conv2d(channels, channels, 3, padding=1)
            )

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if len(self.shape) < 3:
            return self.layers(x.mean(-1) if len(self.shape) == 2 else x)[..., None, None]
        h = self.layers(x.reshape(-1, *self.shape))
        return h.reshape(*x.shape[:-3], *h.shape[1:])


class PixelCNNModule(TokenModule):
    """Gated convolutions over two stacks: rows above, which have no blind spot, and columns before.

    A sequence `(L,)` is one row, and has no vertical stack.
    """

    context_dims = 3
    layers: Any
    """`GatedLayer`s."""

    def __init__(
        self,
        grid: Shape,
        codes: int,
        parents: Mapping[str, Shape],
        *,
        channels: int,
        layers: int,
        kernel: int,
        dropout: float,
    ) -> None:
        super().__init__(grid, codes, parents, channels)
        self.plane = (*[1] * (2 - len(grid)), *grid)
        self.maps = nn.ModuleDict({name: Map(shape, channels, self.plane) for name, shape in self.parents.items()})
        self.layers = nn.ModuleList(
            GatedLayer(
                channels,
                kernel,
                rows=self.plane[0] > 1,
                conditioned=bool(parents),
                last=layer == layers - 1,
                dropout=dropout,
            )
            for layer in range(layers)
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 1), nn.ReLU(), nn.Conv2d(channels, codes, 1))

    def encode(self, given: Mapping[str, Tensor], lead: torch.Size) -> Tensor | None:
        """See `TokenModule.encode`: `(*lead, C, H | 1, W | 1)`."""
        maps = [self.maps[name](value) for name, value in given.items()]
        return F.silu(sum(maps[1:], maps[0])) if maps else None

    def conditions(self, context: Tensor | None) -> list[Tensor | None]:
        """Return every layer's projection of the parents, `(n, 2 C or 4 C, H | 1, W | 1)`."""
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
        """Features of every position, `(n, C, rows, columns)`, from embedded codes `(n, rows, columns, C)`.

        The last column is not read.
        """
        h = self._shifted(x, 2)
        total: Tensor | None = None
        for layer, told, condition in zip(self.layers, above, conditions, strict=True):
            skip, residual = layer.before(h, told, condition)
            total = skip if total is None else total + skip
            h = h if residual is None else h + residual
        assert total is not None  # noqa: S101 - there is a layer
        return total

    def _shifted(self, x: Tensor, axis: int) -> Tensor:
        """Codes moved on by one along an axis, the start before them; channels last in memory, which is faster."""
        start = self.start.expand_as(x.narrow(axis, 0, 1))
        return torch.cat([start, x.narrow(axis, 0, x.shape[axis] - 1)], axis).permute(0, 3, 1, 2)

    def logits(self, value: Tensor, context: Tensor | None) -> Tensor:
        x = self.embed(value).unflatten(1, self.plane)
        conditions = self.conditions(context)
        return self.head(self.before(x, self.above(x, conditions), conditions)).flatten(2).mT

    def draw(self, count: int, context: Tensor | None, choose: Choose) -> Tensor:
        """See `TokenModule.draw`: rows above are read once a row, a row itself up to the position drawn."""
        height, width = self.plane
        x = self.start.new_zeros(count, height, width, self.width)
        drawn = []
        conditions = [c if c is None else c.expand(-1, -1, height, width) for c in self.conditions(context)]
        for i in range(height):
            told = self.above(x[:, : i + 1], [c if c is None else c[:, :, : i + 1] for c in conditions])
            for j in range(width):
                h = self.before(
                    x[:, i : i + 1, : j + 1],
                    [t if t is None else t[:, :, i:, : j + 1] for t in told],
                    [c if c is None else c[:, :, i : i + 1, : j + 1] for c in conditions],
                )
                drawn.append(choose(self.head(h[..., -1:]).flatten(1)))
                x[:, i, j] = self.embed(drawn[-1][:, None])[:, 0]
        return torch.stack(drawn, 1)


@final
class PixelCNNPrior(Prior):
    r"""A gated PixelCNN: prod_p p(c_p given codes above and before it, parents), by convolutions.

    A vector (a label as one-hot, a latent) shifts every layer by the same at all positions; a grid of embeddings by a
    map over the positions, resized to this grid; of a sequence the mean is read. Every layer reaches kernel // 2
    further: codes beyond the reach of all layers are not read.

    References:
        Conditional Image Generation with PixelCNN Decoders (van den Oord et al., 2016),
        https://arxiv.org/abs/1606.05328
    """

    kind: Literal["pixelcnn"] = "pixelcnn"
    values: ClassVar[tuple[Values, ...]] = ("index",)
    reads_parents: ClassVar[bool] = True
    channels: int = Field(default=64, gt=0)
    """Channels of both stacks."""
    layers: int = Field(default=6, gt=0, le=1000)
    """Gated layers."""
    kernel: int = Field(default=5, gt=1)
    """Side of the window whose earlier half a layer reads; odd."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of gated features that are dropped in training."""

    @model_validator(mode="after")
    def _odd(self) -> Self:
        if self.kernel % 2 == 0:
            raise ValueError(f"an odd kernel, which has a middle; got {self.kernel}")
        return self

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return PixelCNNModule(
            site.space.grid,
            require_shapes(site, given, self.kind),
            given,
            channels=self.channels,
            layers=self.layers,
            kernel=self.kernel,
            dropout=self.dropout,
        )
