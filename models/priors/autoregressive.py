r"""Priors over a grid of codes that price every code given those before it, in raster order.

log p(c given parents) = sum_p log p(c_p given c_1 .. c_{p-1}, parents): exact, and one pass scores all positions,
because the network's output at a position reads earlier positions alone. Draws are made one position at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from pvae.component import Shape
from pvae.distributions.codes import MAX_STATES, Conditional, joint_states
from pvae.errors import DeclarationError
from pvae.graph.site import Site
from pvae.util.types import Size

Choose = Callable[[Tensor], Tensor]
"""From logits `(n, K)` of one position to its codes `(n,)`."""

DRAW_ROWS = 1024
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
            counts = [min(DRAW_ROWS, shape.numel() - start) for start in range(0, max(1, shape.numel()), DRAW_ROWS)]
            contexts = [None] * len(counts) if context is None else context.split(DRAW_ROWS)
            drawn = [self.network.draw(n, part, categorical) for n, part in zip(counts, contexts, strict=True)]
        return torch.cat(drawn).reshape(shape + self.event_shape)

    def expand(self, batch_shape: Size, _instance: Any = None) -> Autoregressive:
        """The same distribution over more batch dimensions."""
        if self.batch_shape == tuple(batch_shape):
            return self
        return Autoregressive(self.network, self.context, batch_shape)

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """True if there are at most `MAX_STATES` joint states."""
        return self.network.codes**self.network.positions <= MAX_STATES

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All S = K^positions joint states, `(S, *batch_shape, *grid)`; batch dimensions of size 1 unless expanded.

        Raises:
            NotImplementedError: there are more than `MAX_STATES`.
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
    if len(site.space.grid) > 2:
        raise DeclarationError(
            f"latents.{site.name}.prior {kind}: expected a grid of at most 2 axes; got {list(site.space.grid)}."
        )
    for name, shape in given.items():
        if len(shape) not in (1, 2, 3):
            raise DeclarationError(
                f"latents.{site.name}.prior {kind}: expected parents of shape (D), (C, L) or (C, H, W); "
                f"got {name} of shape {list(shape)}."
            )
    return site.space.states
