r"""Autoregressive priors over a grid of codes: each code is predicted from those before it, in raster order.

log p(c | parents) = sum_p log p(c_p | c_1 .. c_{p-1}, parents) is exact. One pass of the network scores all positions,
because its output at a position depends on earlier positions only. Samples are drawn one position at a time; those of
the transformer, decoder-only after a prompt of the parents, with a key-value cache.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, ClassVar, Literal, Self

import pyro.distributions as dist
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pvae.component import Names, Shape
from pvae.distributions.base import Size
from pvae.distributions.codes import Conditional, Enumerated, codes_below
from pvae.errors import misdeclared
from pvae.graph.site import Link, Site, Space, Values
from pvae.models.priors.base import Prior
from pvae.nn.network import AttentionBlock, KeyValueCache

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
        site: the latent, a grid of codes of at most `axes` axes.
        parents: shapes of the parents' features, by name: `(D,)`, `(C, L)` or `(C, H, W)`.
        kind: kind of the prior, for messages.
        width: width of the embedding of a code.

    Raises:
        DeclarationError: a shape is not supported; the message names the latent and the shape.
    """

    context_dims: ClassVar[int]
    """Number of dimensions of a context (the encoded parents) after its leading dimensions."""
    axes: ClassVar[int] = 2
    """Largest number of axes of a grid."""

    def __init__(self, site: Site, parents: Mapping[str, Shape], kind: str, width: int) -> None:
        super().__init__()
        self.grid, self.codes, self.width = site.space.grid, site.space.states, width
        misdeclared(len(self.grid) > self.axes, "models.priors.grid", site=site, kind=kind, axes=self.axes)
        for name, shape in parents.items():
            misdeclared(not 1 <= len(shape) <= 3, "models.priors.parents", at=site, kind=kind, name=name, shape=shape)
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
        return nn.functional.embedding(value, self.table)

    def forward(self, given: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the distribution of the codes, with the parents' leading dimensions as batch shape."""
        seen = {name: cast(given[name], self.start.dtype) for name in self.parents}
        lead = torch.broadcast_shapes(*(value.shape[: -len(self.parents[name])] for name, value in seen.items()))
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

    @dist.constraints.dependent_property(is_discrete=True)
    def support(self) -> dist.constraints.Constraint:
        """Support: codes 0 .. K - 1 at every position."""
        return codes_below(self.network.codes, len(self.event_shape))

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


class PositionEmbedding(nn.Module):
    """Learned embeddings of the p positions of a grid, `(p, width)`: each is the sum of one vector for every axis."""

    def __init__(self, grid: Shape, width: int) -> None:
        super().__init__()
        self.axes = nn.ParameterList(0.1 * torch.randn(size, width) for size in grid)

    def forward(self) -> Tensor:
        """Return the embeddings of all positions in raster order, `(p, width)`."""
        total, *others = self.axes
        for axis in others:
            total = total.unsqueeze(-2) + axis
        return total.reshape(-1, total.shape[-1])


class Tokens(nn.Module):
    """Embedding of one parent as prompt tokens: one for a vector, one for each position of a sequence or a grid."""

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        self.shape = shape
        self.token = nn.Linear(shape[0], width, bias=len(shape) == 1)
        self.positions = PositionEmbedding(shape[1:], width) if len(shape) > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the tokens `(..., tokens, width)` of a parent `(..., *shape)`."""
        columns = x.unsqueeze(-1) if self.positions is None else x.flatten(x.dim() + 1 - len(self.shape))
        tokens = self.token(columns.mT)
        return tokens if self.positions is None else tokens + self.positions()


class TransformerPrior(Prior):
    r"""Decoder-only transformer prior: prod_p p(c_p | prompt, c_1 .. c_{p-1}), by causal attention.

    The parents are the prompt: a vector is one token, a sequence (words as one-hots over their vocabulary) or a grid of
    embeddings one token for each position. The prompt itself is not scored: it adds nothing to log p. A caption with
    `scored = true` is its end, and has a term of its own in the same sequence: p(caption) p(codes | caption).

    References:
        Attention Is All You Need (Vaswani et al., 2017), https://arxiv.org/abs/1706.03762
        Improving Language Understanding by Generative Pre-Training (Radford et al., 2018),
        https://cdn.openai.com/research-covers/language-unsupervised/language_understanding_paper.pdf
        Zero-Shot Text-to-Image Generation (Ramesh et al., 2021), https://arxiv.org/abs/2102.12092
    """

    kind: Literal["transformer"] = "transformer"
    values: ClassVar[tuple[Values, ...]] = ("index",)
    reads_parents: ClassVar[bool] = True
    scores_captions: ClassVar[bool] = True
    width: int = Field(default=128, gt=0)
    """Width of a token; a multiple of `heads`."""
    layers: int = Field(default=4, gt=0, le=1000)
    """Number of transformer blocks."""
    heads: int = Field(default=4, gt=0)
    """Number of attention heads."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate of the attention weights and of the residual branches in training."""

    @model_validator(mode="after")
    def _even_heads(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"a width that {self.heads} heads share evenly; got {self.width}")
        return self

    def build(self, site: Site, given: Mapping[str, Shape], link: Link) -> nn.Module:
        return TransformerModule(site, given, self, tuple(n for n in given if link.scored.get(n) == site.name))


class TransformerModule(TokenModule):
    """Decoder-only transformer, whose input is the prompt, a start token and all codes but the last.

    The prompt of codes may end with a caption that is scored. Its words are the tokens of a module of their own, of the
    same blocks. The padding word ends a text: after it, all tokens are padding with probability 1.
    """

    context_dims = 2
    axes = 3
    ends = False
    """True if the tokens are words, which padding ends."""

    def __init__(self, site: Site, parents: Mapping[str, Shape], declared: TransformerPrior, texts: Names = ()) -> None:
        width, heads, dropout = declared.width, declared.heads, declared.dropout
        super().__init__(site, parents, declared.kind, width)
        self.prompts = nn.ModuleDict({n: Tokens(shape, width) for n, shape in self.parents.items() if not texts})
        self.places = PositionEmbedding(self.grid, width) if self.positions > 1 else None
        self.blocks: Any = nn.ModuleList(AttentionBlock(width, heads, dropout) for _ in range(declared.layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.codes))
        self.captions: Any = nn.ModuleDict()
        for name in texts:
            (words, *length), others = parents[name], {n: shape for n, shape in parents.items() if n != name}
            text = Site(name, Space.codes(words, (*length,)))
            self.captions[name] = caption = TransformerModule(text, others, declared)
            del caption.blocks
            caption.ends, vars(caption)["blocks"] = True, self.blocks  # registered once

    def encode(self, given: Mapping[str, Tensor], lead: torch.Size) -> Tensor | None:
        """Return the tokens of the prompt, made of the parents, and the start token, `(*lead, tokens + 1, width)`."""
        prompt = [module(given[name]) for name, module in self.prompts.items()]
        for name, words in self.captions.items():
            before = words.encode({n: value for n, value in given.items() if n != name}, lead)
            prompt += [before, words.embed(given[name].argmax(-2)) + words.places()]
        return torch.cat([part.expand(*lead, *part.shape[-2:]) for part in (*prompt, self.start.unsqueeze(0))], -2)

    def inputs(self, value: Tensor) -> Tensor:
        """Return the embeddings of all codes but the last, plus those of their positions, `(n, p - 1, width)`."""
        h = self.embed(value[:, :-1])
        return h if self.places is None else h + self.places()[:-1]

    def logits(self, value: Tensor, context: Any) -> Tensor:
        h = torch.cat([context, self.inputs(value)], 1)
        for block in self.blocks:
            h = block(h)
        logits = self.head(h[:, context.shape[1] - 1 :])
        return ended(logits, nn.functional.pad(value[:, :-1], (1, 0), value=1)) if self.ends else logits

    def draw(self, count: int, context: Any, choose: Choose) -> Tensor:
        """Return codes `(count, p)` chosen in raster order, with cached keys and values of the positions before."""
        h = context
        memories = [KeyValueCache(h.shape[1] + self.positions - 1) for _ in self.blocks]
        places = None if self.places is None else self.places()
        drawn: list[Tensor] = []
        while True:
            for block, memory in zip(self.blocks, memories, strict=True):
                h = block.extend(h, memory)
            logits = self.head(h[:, -1])
            drawn.append(choose(ended(logits, drawn[-1]) if self.ends and drawn else logits))
            if places is None or len(drawn) == self.positions:
                return torch.stack(drawn, 1)
            h = self.embed(drawn[-1][:, None]) + places[len(drawn) - 1]


def ended(logits: Tensor, before: Tensor) -> Tensor:
    """Return logits `(..., words)`, -inf of all words but padding where the token `before` `(...)` is padding."""
    words = torch.arange(logits.shape[-1], device=logits.device) > 0
    return logits.masked_fill((before == 0).unsqueeze(-1) & words, -torch.inf)
