r"""Priors over a grid of codes that price every code given those before it, in raster order.

log p(c given parents) = sum_p log p(c_p given c_1 .. c_{p-1}, parents): exact, and one pass scores all positions,
because the network's output at a position reads earlier positions alone. Draws are made one position at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, ClassVar, Literal, Self, final

import pyro.distributions as dist
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from pvae.component import Shape
from pvae.discrete import STATES, Conditional, joint_states
from pvae.errors import DeclarationError
from pvae.models.priors import Prior
from pvae.site import Link, Site, Values

Size = torch.Size | list[int] | tuple[int, ...]
Choose = Callable[[Tensor], Tensor]
"""From logits `(n, K)` of one position to its codes `(n,)`."""

DRAWN = 1024
"""Rows drawn at a time: caches of all rows of a large draw would not fit."""


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of some type; a cast to the type it has already would break the graph of an exported step."""
    return x if x.dtype == dtype else x.to(dtype)


def precise(x: Tensor) -> Tensor:
    """A tensor in single precision or better."""
    return x.float() if x.dtype.itemsize < 4 else x


def categorical(logits: Tensor) -> Tensor:
    """Codes `(...)` drawn from logits `(..., K)`: the largest after Gumbel noise, of the default generator."""
    logits = precise(logits)
    return (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)


class Autoregressive(Conditional):
    r"""p(c given parents) of a grid of codes, as a product over its positions in raster order.

    Values are indices `(..., *grid)`. Leading dimensions of values and parents broadcast.

    Arguments:
        network: from codes and context to the logits of every position.
        context: what the network makes of the parents, `(*batch, ...)`; None without parents.
        batch_shape: leading dimensions; those of the context broadcast to it.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(self, network: TokenModule, context: Tensor | None, batch_shape: Size) -> None:
        self.network, self.context = network, context
        super().__init__(torch.Size(batch_shape), torch.Size(network.grid), validate_args=False)

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> constraints.Constraint:
        """Integers 0 .. K - 1 at every position."""
        return constraints.independent(constraints.integer_interval(0, self.network.codes - 1), len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(c given parents) of indices `(..., *grid)`, nats, `(...)`; exact, in single precision or better."""
        logits = self.conditional_logits(value)
        index = value.expand(logits.shape[:-1]).unsqueeze(-1)
        scores = logits.gather(-1, index).squeeze(-1)
        return scores.flatten(scores.dim() - len(self.event_shape)).sum(-1) if self.event_shape else scores

    def conditional_logits(self, value: Tensor) -> Tensor:
        """log p(c_p = k given c_1 .. c_{p-1}, parents), nats, `(..., *grid, K)`; exact and normalised over k.

        Arguments:
            value: indices `(..., *grid)`; or logarithms of relaxed one-hots `(..., *grid, K)`, floating, which the
                network sees as the mean of its embeddings, differentiable.
        """
        grid, codes = self.network.grid, self.network.codes
        event = (*grid, codes) if value.is_floating_point() else grid
        lead = torch.broadcast_shapes(value.shape[: value.dim() - len(event)], self._context_shape)
        flat = value.expand((*lead, *event)).reshape(-1, self.network.positions, *event[len(grid) :])
        logits = self.network.logits(flat, self._context(lead))
        logits = precise(logits).log_softmax(-1)
        whole = torch.broadcast_shapes(lead, self.batch_shape)
        return logits.reshape((*lead, *grid, codes)).expand((*whole, *grid, codes))

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Ancestral draws `sample_shape + batch_shape + grid`, of the default generator."""
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            context = self._context(shape)
            counts = [min(DRAWN, shape.numel() - start) for start in range(0, max(1, shape.numel()), DRAWN)]
            contexts = [None] * len(counts) if context is None else context.split(DRAWN)
            drawn = [self.network.draw(n, part, categorical) for n, part in zip(counts, contexts, strict=True)]
        return torch.cat(drawn).reshape(shape + self.event_shape)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Autoregressive:
        """The same distribution over more batch dimensions."""
        if self.batch_shape == tuple(batch_shape):
            return self
        return Autoregressive(self.network, self.context, batch_shape)

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether the joint states are few enough to be written down."""
        return self.network.codes**self.network.positions <= STATES

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All S = K^positions joint states, `(S, *batch_shape, *grid)`; batch dimensions of size 1 unless expanded.

        Raises:
            NotImplementedError: there are more than `STATES`.
        """
        states = joint_states(self.network.codes, self.event_shape, self.network.start.device)
        states = states.reshape(-1, *[1] * len(self.batch_shape), *self.event_shape)
        return states.expand(-1, *self.batch_shape, *self.event_shape) if expand else states

    @property
    def _context_shape(self) -> torch.Size:
        """Leading dimensions of the context."""
        return torch.Size() if self.context is None else self.context.shape[: -self.network.context_dims]

    def _context(self, lead: torch.Size) -> Tensor | None:
        """The context with one leading dimension, which stands for `lead`."""
        if self.context is None:
            return None
        shape = self.context.shape[-self.network.context_dims :]
        return self.context.expand((*lead, *shape)).reshape(-1, *shape)


class TokenModule(nn.Module):
    """From the parents' features to the distribution of a grid of codes.

    Arguments:
        grid: shape of the grid; () for a single code.
        codes: K.
        parents: shapes of the parents' features, by name: `(D,)`, `(C, L)` or `(C, H, W)`.
        width: of an embedded code.
    """

    context_dims: ClassVar[int]
    """Dimensions of a context beside the leading ones."""

    def __init__(self, grid: Shape, codes: int, parents: Mapping[str, Shape], width: int) -> None:
        super().__init__()
        self.grid, self.codes, self.width = tuple(grid), codes, width
        self.positions = prod(grid)
        self.parents = {name: tuple(shape) for name, shape in parents.items()}
        self.start = nn.Parameter(0.1 * torch.randn(width))
        # Nothing reads the last code: the only one needs no embedding, and would get no gradient.
        self.table = nn.Parameter(0.1 * torch.randn(codes, width)) if self.positions > 1 else None

    def embed(self, value: Tensor) -> Tensor:
        """Indices `(n, p)` or logarithms of relaxed one-hots `(n, p, K)` as vectors `(n, p, width)`."""
        if self.table is None:
            return self.start.new_zeros(*value.shape[:2], self.width)
        return (
            cast(value.exp(), self.table.dtype) @ self.table
            if value.is_floating_point()
            else F.embedding(value, self.table)
        )

    def forward(self, given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """The distribution of the codes, with the parents' leading dimensions as batch shape."""
        seen = {name: cast(given[name], self.start.dtype) for name in self.parents}
        leads = [value.shape[: value.dim() - len(self.parents[name])] for name, value in seen.items()]
        lead = torch.broadcast_shapes(*leads)
        return Autoregressive(self, self.encode(seen, lead), lead)

    @abstractmethod
    def encode(self, given: Mapping[str, Tensor], lead: torch.Size) -> Tensor | None:
        """The context that the parents make, `(*lead, ...)` or what broadcasts to it; None without parents."""

    @abstractmethod
    def logits(self, value: Tensor, context: Tensor | None) -> Tensor:
        """Logits of every position given those before it, `(n, p, K)`, in one pass.

        Arguments:
            value: indices `(n, p)`, or logarithms of relaxed one-hots `(n, p, K)`.
            context: `(n, ...)`.
        """

    @abstractmethod
    def draw(self, count: int, context: Tensor | None, choose: Choose) -> Tensor:
        """Codes `(count, p)`, each chosen from its logits given those chosen before."""


def require_shapes(site: Site, given: Mapping[str, Shape], kind: str) -> int:
    """K of a site whose grid and parents have shapes that a prior of codes can read.

    Raises:
        DeclarationError: naming the latent and what was found.
    """
    assert site.codes is not None  # noqa: S101 - the declaration has been checked
    if len(site.grid) > 2:
        raise DeclarationError(
            f"latents.{site.name}.prior {kind}: expected a grid of at most 2 axes; got {list(site.grid)}."
        )
    for name, shape in given.items():
        if len(shape) not in (1, 2, 3):
            raise DeclarationError(
                f"latents.{site.name}.prior {kind}: expected parents of shape (D), (C, L) or (C, H, W); "
                f"got {name} of shape {list(shape)}."
            )
    return site.codes


# ---------------------------------------------------------------------- pixelcnn


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


class Resize(nn.Module):
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
                small, nn.SiLU(), Resize(shape[1:], plane), nn.Conv2d(channels, channels, 3, padding=1)
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
        """What every layer is told of the parents, `(n, 2 C or 4 C, H | 1, W | 1)`."""
        if context is None:
            return [None] * len(self.layers)
        context = context.contiguous(memory_format=torch.channels_last)
        return [layer.condition(context) for layer in self.layers]

    def above(self, x: Tensor, conditions: Sequence[Tensor | None]) -> list[Tensor | None]:
        """What the rows above tell every layer, `(n, 2 C, rows, W)`, from embedded codes `(n, rows, W, C)`.

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
        """See `TokenModule.logits`."""
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
    layers: int = Field(default=6, gt=0)
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
        """See `Prior.build`."""
        return PixelCNNModule(
            site.grid,
            require_shapes(site, given, self.kind),
            given,
            channels=self.channels,
            layers=self.layers,
            kernel=self.kernel,
            dropout=self.dropout,
        )


# ---------------------------------------------------------------------- transformer


class Positions(nn.Module):
    """A learned vector for every position of a grid, the sum of one for each axis: `(p, width)`."""

    def __init__(self, grid: Shape, width: int) -> None:
        super().__init__()
        self.axes = nn.ParameterList(0.1 * torch.randn(size, width) for size in grid)

    def forward(self) -> Tensor:
        """See the class."""
        first, *others = self.axes
        total = first
        for axis in others:
            total = total.unsqueeze(-2) + axis
        return total.reshape(-1, first.shape[-1])


class Tokens(nn.Module):
    """One parent as tokens of the prompt: a vector is one, a sequence or grid one for each position."""

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        self.shape = shape
        self.token = nn.Linear(shape[0], width, bias=len(shape) == 1)
        self.positions = Positions(shape[1:], width) if len(shape) > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """`(..., *shape)` to `(..., tokens, width)`."""
        columns = x.unsqueeze(-1) if self.positions is None else x.flatten(x.dim() + 1 - len(self.shape))
        tokens = self.token(columns.mT)
        return tokens if self.positions is None else tokens + self.positions()


class Memory:
    """Keys and values of the positions so far, in room made once for all positions to come."""

    def __init__(self, length: int) -> None:
        self.length, self.filled = length, 0
        self.room: Tensor | None = None

    def extend(self, new: Tensor) -> Tensor:
        """All keys and values `(2, n, heads, filled, d)` after the new ones `(2, n, heads, m, d)`."""
        if self.room is None:
            self.room = new.new_empty(*new.shape[:3], self.length, new.shape[-1])
        start, self.filled = self.filled, self.filled + new.shape[3]
        self.room[:, :, :, start : self.filled] = new
        return self.room[:, :, :, : self.filled]


class Block(nn.Module):
    """Causal attention and a perceptron of one hidden layer, each after a norm and with a residual."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        """All positions at once, `(n, t, width)`."""
        q, k, v = self._projected(h)
        return self._mixed(h, F.scaled_dot_product_attention(q, k, v, dropout_p=self._rate, is_causal=True))

    def extend(self, h: Tensor, memory: Memory) -> Tensor:
        """The first positions `(n, t, width)`, or one more `(n, 1, width)` after those in the memory."""
        q, *new = self._projected(h)
        k, v = memory.extend(torch.stack(new))
        causal = h.shape[1] > 1  # a single new one may read all that is there
        return self._mixed(h, F.scaled_dot_product_attention(q, k, v, dropout_p=self._rate, is_causal=causal))

    @property
    def _rate(self) -> float:
        return self.dropout if self.training else 0.0

    def _projected(self, h: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, `(n, heads, t, d)`."""
        return self.project(self.first(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _mixed(self, h: Tensor, read: Tensor) -> Tensor:
        h = h + self._dropped(self.out(read.transpose(1, 2).flatten(2)))
        return h + self._dropped(self.perceptron(self.second(h)))

    def _dropped(self, h: Tensor) -> Tensor:
        return F.dropout(h, self.dropout, self.training)


class TransformerModule(TokenModule):
    """The prompt, a start token and the codes but the last, under causal attention."""

    context_dims = 2
    blocks: Any
    """`Block`s."""

    def __init__(
        self,
        grid: Shape,
        codes: int,
        parents: Mapping[str, Shape],
        *,
        width: int,
        layers: int,
        heads: int,
        dropout: float,
    ) -> None:
        super().__init__(grid, codes, parents, width)
        self.prompts = nn.ModuleDict({name: Tokens(shape, width) for name, shape in self.parents.items()})
        self.places = Positions(grid, width) if self.positions > 1 else None
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, codes))

    def encode(self, given: Mapping[str, Tensor], lead: torch.Size) -> Tensor | None:
        """See `TokenModule.encode`: the prompt and the start token, `(*lead, tokens + 1, width)`."""
        prompt = [*(self.prompts[name](value) for name, value in given.items()), self.start.unsqueeze(0)]
        return torch.cat([part.expand(*lead, *part.shape[-2:]) for part in prompt], -2)

    def inputs(self, value: Tensor) -> Tensor:
        """The codes but the last with their positions, `(n, p - 1, width)`."""
        h = self.embed(value[:, :-1])
        return h if self.places is None else h + self.places()[:-1]

    def logits(self, value: Tensor, context: Tensor | None) -> Tensor:
        """See `TokenModule.logits`."""
        assert context is not None  # noqa: S101 - there is always a start token
        h = torch.cat([context, self.inputs(value)], 1)
        for block in self.blocks:
            h = block(h)
        return self.head(h[:, context.shape[1] - 1 :])

    def draw(self, count: int, context: Tensor | None, choose: Choose) -> Tensor:
        """See `TokenModule.draw`: every code costs one position; keys and values of those before it are kept."""
        assert context is not None  # noqa: S101 - there is always a start token
        h = context
        memories = [Memory(h.shape[1] + self.positions - 1) for _ in self.blocks]
        places = None if self.places is None else self.places()
        drawn: list[Tensor] = []
        while True:
            for block, memory in zip(self.blocks, memories, strict=True):
                h = block.extend(h, memory)
            drawn.append(choose(self.head(h[:, -1])))
            if places is None or len(drawn) == self.positions:
                return torch.stack(drawn, 1)
            h = self.embed(drawn[-1][:, None]) + places[len(drawn) - 1]


@final
class TransformerPrior(Prior):
    r"""A decoder-only transformer: prod_p p(c_p given prompt, c_1 .. c_{p-1}), by causal attention.

    The parents are the prompt: a vector is one token, a sequence (words as one-hots over their vocabulary) or a grid of
    embeddings one token for each position. The prompt itself has no price.

    References:
        Attention Is All You Need (Vaswani et al., 2017), https://arxiv.org/abs/1706.03762
        Improving Language Understanding by Generative Pre-Training (Radford et al., 2018),
        https://cdn.openai.com/research-covers/language-unsupervised/language_understanding_paper.pdf
        Zero-Shot Text-to-Image Generation (Ramesh et al., 2021), https://arxiv.org/abs/2102.12092
    """

    kind: Literal["transformer"] = "transformer"
    values: ClassVar[tuple[Values, ...]] = ("index",)
    reads_parents: ClassVar[bool] = True
    width: int = Field(default=128, gt=0)
    """Width of a token; a multiple of `heads`."""
    layers: int = Field(default=4, gt=0)
    """Blocks of attention and perceptron."""
    heads: int = Field(default=4, gt=0)
    """Heads of attention."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of attention and of residuals that is dropped in training."""

    @model_validator(mode="after")
    def _even_heads(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"a width that {self.heads} heads share evenly; got {self.width}")
        return self

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        """See `Prior.build`."""
        return TransformerModule(
            site.grid,
            require_shapes(site, given, self.kind),
            given,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            dropout=self.dropout,
        )
