"""Decoder-only transformer prior over a grid of codes after a prompt, sampled with a key-value cache."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from pvae.component import Shape
from pvae.graph.site import Link, Site, Values
from pvae.models.priors.autoregressive import Choose, TokenModule
from pvae.models.priors.base import Prior


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


class KeyValueCache:
    """Key-value cache of one attention block, allocated once for all positions."""

    def __init__(self, length: int) -> None:
        self.length, self.filled = length, 0
        self.room: Tensor | None = None

    def extend(self, new: Tensor) -> Tensor:
        """Append keys and values `(2, n, heads, m, d)`; return all of them so far, `(2, n, heads, filled, d)`."""
        if self.room is None:
            self.room = new.new_empty(*new.shape[:3], self.length, new.shape[-1])
        start, self.filled = self.filled, self.filled + new.shape[3]
        self.room[:, :, :, start : self.filled] = new
        return self.room[:, :, :, : self.filled]


class AttentionBlock(nn.Module):
    """Transformer block: causal self-attention, then an MLP of one hidden layer, each pre-normalised and residual."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        """Return the block's output for all positions at once, `(n, t, width)`."""
        q, k, v = self._projected(h)
        return self._mixed(h, q, k, v, is_causal=True)

    def extend(self, h: Tensor, memory: KeyValueCache) -> Tensor:
        """Return the output of the first positions `(n, t, width)`, or of one more `(n, 1, width)` after the cached."""
        q, *new = self._projected(h)
        k, v = memory.extend(torch.stack(new))
        return self._mixed(h, q, k, v, is_causal=h.shape[1] > 1)  # a single new one may read all that is there

    def _projected(self, h: Tensor) -> Sequence[Tensor]:
        """Return queries, keys and values, each `(n, heads, t, d)`."""
        return self.project(self.first(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _mixed(self, h: Tensor, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        rate = self.dropout if self.training else 0.0
        read = F.scaled_dot_product_attention(q, k, v, dropout_p=rate, is_causal=is_causal)
        h = h + self._dropped(self.out(read.transpose(1, 2).flatten(2)))
        return h + self._dropped(self.perceptron(self.second(h)))

    def _dropped(self, h: Tensor) -> Tensor:
        return F.dropout(h, self.dropout, self.training)


class TransformerPrior(Prior):
    r"""Decoder-only transformer prior: prod_p p(c_p | prompt, c_1 .. c_{p-1}), by causal attention.

    The parents are the prompt: a vector is one token, a sequence (words as one-hots over their vocabulary) or a grid of
    embeddings one token for each position. The prompt itself is not scored: it adds nothing to log p.

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
        return TransformerModule(site, given, self)


class TransformerModule(TokenModule):
    """Decoder-only transformer, whose input is the prompt, a start token and all codes but the last."""

    context_dims = 2

    def __init__(self, site: Site, parents: Mapping[str, Shape], declared: TransformerPrior) -> None:
        width, heads, dropout = declared.width, declared.heads, declared.dropout
        super().__init__(site, parents, declared.kind, width)
        self.prompts = nn.ModuleDict({name: Tokens(shape, width) for name, shape in self.parents.items()})
        self.places = PositionEmbedding(self.grid, width) if self.positions > 1 else None
        self.blocks: Any = nn.ModuleList(AttentionBlock(width, heads, dropout) for _ in range(declared.layers))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, self.codes))

    def encode(self, given: Mapping[str, Tensor], lead: torch.Size) -> Tensor | None:
        """Return the tokens of the prompt, made of the parents, and the start token, `(*lead, tokens + 1, width)`."""
        prompt = [*(self.prompts[name](value) for name, value in given.items()), self.start.unsqueeze(0)]
        return torch.cat([part.expand(*lead, *part.shape[-2:]) for part in prompt], -2)

    def inputs(self, value: Tensor) -> Tensor:
        """Return the embeddings of all codes but the last, plus those of their positions, `(n, p - 1, width)`."""
        h = self.embed(value[:, :-1])
        return h if self.places is None else h + self.places()[:-1]

    def logits(self, value: Tensor, context: Any) -> Tensor:
        h = torch.cat([context, self.inputs(value)], 1)
        for block in self.blocks:
            h = block(h)
        return self.head(h[:, context.shape[1] - 1 :])

    def draw(self, count: int, context: Any, choose: Choose) -> Tensor:
        """Return codes `(count, p)` chosen in raster order, with cached keys and values of the positions before."""
        h = context
        memories = [KeyValueCache(h.shape[1] + self.positions - 1) for _ in self.blocks]
        places = None if self.places is None else self.places()
        drawn: list[Tensor] = []
        while True:
            for block, memory in zip(self.blocks, memories, strict=True):
                h = block.extend(h, memory)
            drawn.append(choose(self.head(h[:, -1])))
            if places is None or len(drawn) == self.positions:
                return torch.stack(drawn, 1)
            h = self.embed(drawn[-1][:, None]) + places[len(drawn) - 1]
