r"""Autoregressive priors over a grid of codes: each code is predicted from those before it, in raster order.

log p(c | parents) = sum_p log p(c_p | c_1 .. c_{p-1}, parents) is exact. One pass of the network scores all positions,
because its output at a position depends on earlier positions only. Samples are drawn one position at a time.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from math import prod
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional as F

from pvae.component import Shape
from pvae.distributions.codes import Conditional, Enumerated
from pvae.errors import DeclarationError
from pvae.graph.site import Site
from pvae.util.types import Size

Choose = Callable[[Tensor], Tensor]
"""Function that chooses (usually samples) the codes `(n,)` of one position from their logits `(n, K)`."""

DRAW_ROWS = 1024
"""Number of grids sampled at a time, so that the caches of a large sample fit in memory."""


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor as `dtype`, itself if it has that type: a needless cast breaks the graph of an exported step."""
    return x if x.dtype == dtype else x.to(dtype)


def precise(x: Tensor) -> Tensor:
    """Return a tensor in single precision (float32) or better."""
    return x.float() if x.dtype.itemsize < 4 else x


def categorical(logits: Tensor) -> Tensor:
    """Return codes `(...)` sampled from logits `(..., K)` by the Gumbel-max trick, with torch's default generator."""
    logits = precise(logits)
    return (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)


class TokenModule(nn.Module):
    """Base of autoregressive networks: from the parents' features to the distribution of a grid of codes.

    Arguments:
        site: the latent, a grid of codes of at most 2 axes.
        parents: shapes of the parents' features, by name: `(D,)`, `(C, L)` or `(C, H, W)`.
        kind: kind of the prior, for messages.
        width: width of the embedding of a code.

    Raises:
        DeclarationError: a shape is not supported; the message names the latent and the shape.
    """

    context_dims: ClassVar[int]
    """Number of dimensions of a context (the encoded parents) after its leading dimensions."""

    def __init__(self, site: Site, parents: Mapping[str, Shape], kind: str, width: int) -> None:
        super().__init__()
        self.grid, self.codes, self.width = site.space.grid, site.space.states, width
        if len(self.grid) > 2:
            raise DeclarationError.of("models.priors.grid", name=site.name, kind=kind, grid=self.grid)
        for name, shape in parents.items():
            if len(shape) not in (1, 2, 3):
                raise DeclarationError.of("models.priors.parents", latent=site.name, kind=kind, name=name, shape=shape)
        self.positions = prod(self.grid)
        self.parents = {name: tuple(shape) for name, shape in parents.items()}
        self.start = nn.Parameter(0.1 * torch.randn(width))
        # Nothing reads the last code: the only one needs no embedding, and would get no gradient.
        self.table = nn.Parameter(0.1 * torch.randn(self.codes, width)) if self.positions > 1 else None

    def embed(self, value: Tensor) -> Tensor:
        """Return embeddings `(n, p, width)` of indices `(n, p)` or of logarithms of relaxed one-hots `(n, p, K)`."""
        if self.table is None:
            return self.start.new_zeros(*value.shape[:2], self.width)
        if value.is_floating_point():
            return cast(value.exp(), self.table.dtype) @ self.table
        return F.embedding(value, self.table)

    def forward(self, given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the distribution of the codes, with the parents' leading dimensions as batch shape."""
        seen = {name: cast(given[name], self.start.dtype) for name in self.parents}
        leads = [value.shape[: value.dim() - len(self.parents[name])] for name, value in seen.items()]
        lead = torch.broadcast_shapes(*leads)
        return Autoregressive(self, self.encode(seen, lead), lead)

    @abstractmethod
    def encode(self, given: Mapping[str, Tensor], lead: torch.Size) -> Tensor | None:
        """Return the context, the encoded parents, `(*lead, ...)` or a shape that broadcasts to it; None if empty."""

    @abstractmethod
    def logits(self, value: Tensor, context: Tensor | None) -> Tensor:
        """Return the logits of every position given the codes before it, `(n, p, K)`, in one pass.

        Arguments:
            value: indices `(n, p)`, or logarithms of relaxed one-hots `(n, p, K)`.
            context: the encoded parents, `(n, ...)`.
        """

    @abstractmethod
    def draw(self, count: int, context: Tensor | None, choose: Choose) -> Tensor:
        """Return codes `(count, p)`, each chosen by `choose` from its logits given the codes before it."""


class Autoregressive(Enumerated, Conditional):  # type: ignore[override]
    r"""Distribution p(c | parents) of a grid of codes, factorised over its positions in raster order.

    Values are indices `(..., *grid)`. Leading dimensions of values and parents broadcast.

    Arguments:
        network: from codes and context to the logits of every position.
        context: the parents as encoded by the network, `(*batch, ...)`; None without parents.
        batch_shape: leading dimensions; those of the context broadcast to it.
    """

    def __init__(self, network: TokenModule, context: Tensor | None, batch_shape: Size) -> None:
        self.network, self.context = network, context
        super().__init__(torch.Size(batch_shape), torch.Size(network.grid), validate_args=False)

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> constraints.Constraint:
        """Support: codes 0 .. K - 1 at every position."""
        return constraints.independent(constraints.integer_interval(0, self.network.codes - 1), len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(c | parents) of indices `(..., *grid)`, nats, `(...)`; exact, in single precision or better."""
        logits = self.conditional_logits(value)
        scores = logits.gather(-1, value.expand(logits.shape[:-1]).unsqueeze(-1)).squeeze(-1)
        return scores.flatten(scores.dim() - len(self.event_shape)).sum(-1) if self.event_shape else scores

    def conditional_logits(self, value: Tensor) -> Tensor:
        """Return log p(c_p = k | c_1 .. c_{p-1}, parents), nats, `(..., *grid, K)`; exact and normalised over k.

        Arguments:
            value: indices `(..., *grid)`; or, in floating point, logarithms of relaxed one-hots `(..., *grid, K)`,
                which weight the embeddings of the codes that the network reads (differentiable).
        """
        grid, codes = self.network.grid, self.network.codes
        event = (*grid, codes) if value.is_floating_point() else grid
        own = torch.Size() if self.context is None else self.context.shape[: -self.network.context_dims]
        lead = torch.broadcast_shapes(value.shape[: value.dim() - len(event)], own)
        flat = value.expand((*lead, *event)).reshape(-1, self.network.positions, *event[len(grid) :])
        logits = self.network.logits(flat, self._context(lead))
        logits = precise(logits).log_softmax(-1)
        whole = torch.broadcast_shapes(lead, self.batch_shape)
        return logits.reshape((*lead, *grid, codes)).expand((*whole, *grid, codes))

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return ancestral samples `sample_shape + batch_shape + grid`, with torch's default generator."""
        shape = torch.Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            context = self._context(shape)
            counts = [min(DRAW_ROWS, shape.numel() - start) for start in range(0, max(1, shape.numel()), DRAW_ROWS)]
            contexts = [None] * len(counts) if context is None else context.split(DRAW_ROWS)
            drawn = [self.network.draw(n, part, categorical) for n, part in zip(counts, contexts, strict=True)]
        return torch.cat(drawn).reshape(shape + self.event_shape)

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """Codes 0 .. K - 1, `(K,)`."""
        return torch.arange(self.network.codes, device=self.network.start.device)

    def _context(self, lead: torch.Size) -> Tensor | None:
        """Return the context broadcast to the leading dimensions `lead`, flattened into one; None without a context."""
        if self.context is None:
            return None
        shape = self.context.shape[-self.network.context_dims :]
        return self.context.expand((*lead, *shape)).reshape(-1, *shape)
