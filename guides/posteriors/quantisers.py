"""Posteriors of quantised codes without lookup, of a frozen codebook under a learned map, of several codes a vector.

The codes of a vector are residual, so that their rows are added, or grouped, so that they lie side by side.
"""

import math
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pvae.graph.site import Space
from pvae.guides.posteriors.base import channels_last
from pvae.guides.posteriors.nearest import (
    LookedUpPosterior,
    QuantisedCodes,
    QuantisedModule,
    QuantisedPosterior,
    attached,
)
from pvae.nn.quantisers import CodebookStack, LevelCodebook, MappedCodebook, SignCodebook


def of_width(space: Space, codes: int, width: int, rule: str) -> Space:
    """Return the space of `codes` codes of vectors of `width`, where a declared one agrees.

    Raises:
        ValueError: the space has another number of codes, or another embedding.
    """
    if space.states != codes:
        raise ValueError(f"codes = {codes}, {rule}; got {space.states}")
    if space.embedding not in (None, width):
        raise ValueError(f"embedding = {width}, {rule}, or none; got {space.embedding}")
    return replace(space, embedding=width)


class FiniteScalarPosterior(QuantisedPosterior):
    r"""Finite scalar quantisation (FSQ): every one of E bounded scalars is rounded to one of L_i levels.

    z_i is bounded to the range of its levels by a tanh and rounded, straight-through; a code is the combination of all
    levels, K = prod_i L_i, and its row the levels themselves, between -1 and 1. There is no codebook to learn, no
    penalty, and no code that can die for want of a gradient.

    References:
        Finite Scalar Quantization: VQ-VAE Made Simple (Mentzer et al., 2023), https://arxiv.org/abs/2309.15505
    """

    kind: Literal["finite_scalar"] = "finite_scalar"
    levels: Annotated[tuple[Annotated[int, Field(gt=2, le=1000)], ...], Field(strict=False, min_length=1)] = (8, 6, 5)
    """Number of levels of every scalar; their product is the latent's `codes`. For two levels take `lookup_free`."""

    def sampled(self, space: Space) -> Space:
        rule = "the product of posterior.levels" if space.states != math.prod(self.levels) else "one for each level"
        return of_width(space, math.prod(self.levels), len(self.levels), rule)

    def codebook(self, space: Space) -> LevelCodebook:
        return LevelCodebook(self.levels)

    def penalties(self, module: QuantisedModule, found: QuantisedCodes, row: Tensor) -> dict[str, Tensor]:
        return {}


class LookupFreePosterior(QuantisedPosterior):
    r"""Lookup-free quantisation (LFQ): the code is the signs of E scalars, K = 2^E; nothing is looked up.

    The loss adds commitment |z - sg e|^2 and, at every position, entropy (H(b | z) - diversity H(b) + diversity E log
    2) for soft signs b_i, 1 with probability 1 / (1 + exp(-4 sharpness z_i)): each is to be certain, all of them to be
    evenly used over the batch. Both entropies are sums over the E signs: that is exact for H(b | z); for H(b), of the
    mean over the batch, it is an upper bound, exact where the signs are independent. No sum runs over the K codes.

    References:
        Language Model Beats Diffusion (Yu et al., 2024), https://arxiv.org/abs/2310.05737
        Image and Video Tokenization with Binary Spherical Quantization (Zhao et al., 2024),
        https://arxiv.org/abs/2406.07548 (the sum over signs)
    """

    kind: Literal["lookup_free"] = "lookup_free"
    commitment: float = Field(default=0.25, ge=0)
    """Weight of the commitment loss |z - sg e|^2 of a datum, summed over positions and coordinates."""
    entropy: float = Field(default=0.1, ge=0)
    """Weight of the entropy penalty."""
    diversity: float = Field(default=1.0, ge=0)
    """Weight of the entropy over the batch within the entropy penalty."""
    sharpness: float = Field(default=100.0, gt=0)
    """Inverse temperature of the soft signs."""

    def sampled(self, space: Space) -> Space:
        width = space.embedding or round(math.log2(space.states))
        return of_width(space, 2 ** min(width, 64), width, "2^embedding, because a code is a vector of signs")

    def codebook(self, space: Space) -> SignCodebook:
        return SignCodebook(space.features[0])

    def penalties(self, module: QuantisedModule, found: QuantisedCodes, row: Tensor) -> dict[str, Tensor]:
        out = attached(found.point, row, 1 + module.plane, self.commitment, learned=False)
        if self.entropy:
            out["entropy"] = self.entropy * self._entropies(channels_last(found.point, module.plane), module.plane)
        return out

    def _entropies(self, z: Tensor, plane: int) -> Tensor:
        """Return H(b | z) + diversity (E log 2 - H(b)) of `(..., *plane, E)`, summed over positions, `(...)`, nats."""
        logits = 4 * self.sharpness * z
        own = nn.functional.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none")
        share = logits.sigmoid().flatten(0, -2).mean(0).clamp(1e-6, 1 - 1e-6)  # entropy has no slope at 0
        gap = share.numel() * math.log(2) - (torch.special.entr(share) + torch.special.entr(1 - share)).sum()
        positions = math.prod(z.shape[z.dim() - 1 - plane : -1])
        return own.sum(tuple(range(-1 - plane, 0))) + self.diversity * positions * gap


class MappedCodePosterior(QuantisedPosterior):
    r"""SimVQ: nearest codes of a frozen random codebook, all of whose rows one learned linear map moves together.

    A step moves every row, used or not, so that no code dies. The loss adds commitment |z - sg e|^2 + |sg z - e|^2.

    References:
        Addressing Representation Collapse in Vector Quantized Models with One Linear Layer (Zhu et al., 2024),
        https://arxiv.org/abs/2411.02038
    """

    kind: Literal["simvq"] = "simvq"
    commitment: float = Field(default=0.25, ge=0)
    """Weight of the commitment loss |z - sg e|^2 of a datum, summed over positions and coordinates."""
    passes: Literal["straight", "rotation"] = "straight"
    """Gradient at z: that at e unchanged (`straight`), or turned by the `rotation` from z to e (as in nearest_code)."""

    def codebook(self, space: Space) -> MappedCodebook:
        return MappedCodebook(space.states, space.features[0])

    def penalties(self, module: QuantisedModule, found: QuantisedCodes, row: Tensor) -> dict[str, Tensor]:
        return attached(found.point, row, 1 + module.plane, self.commitment, learned=True)


# ---------------------------------------------------------------------- several codes that make one vector


class ResidualPosterior(LookedUpPosterior):
    r"""Residual quantisation (RVQ): d codes a position, each the nearest to what the rows before it leave of z.

    The codes are one more, last axis of the latent's grid, coarse to fine: k_i = argmin_k |z - S_(i-1) - e_k|^2, where
    S_i is the sum of the first i rows. The decoder reads S_d, and the KL is -log p of all d codes; a token prior reads
    them position by position, coarse to fine. The loss adds sum_i commitment |z - sg S_i|^2 and, if codebooks are
    learned by gradients, sum_i |sg(z - S_(i-1)) - e_ki|^2.

    With `dropout` the decoder reads the first codes alone in some training rows. The codes that it does not read are
    inferred all the same: they count in the KL, in the penalties and in the averages of the codebooks. Evaluation and
    analyses read all codes, so that the ELBO is that of the whole stack.

    References:
        SoundStream: An End-to-End Neural Audio Codec (Zeghidour et al., 2021), https://arxiv.org/abs/2107.03312
        Autoregressive Image Generation using Residual Quantization (Lee et al., 2022),
        https://arxiv.org/abs/2203.01941 (a shared codebook)
    """

    kind: Literal["residual"] = "residual"
    depth: int = Field(default=4, gt=1, le=64)
    """Number of codes a position, d."""
    shared: bool = False
    """Use one codebook for all depths, instead of one for each."""
    dropout: float = Field(default=0.0, ge=0, le=1)
    """Proportion of training rows of which the decoder reads the first 1 .. d codes alone, a number drawn evenly."""

    def sampled(self, space: Space) -> Space:
        return super().sampled(space).joining(self.depth, "sum")

    def codebook(self, space: Space) -> CodebookStack:
        books = [self.rows(space.states, space.features[0]) for _ in range(1 if self.shared else self.depth)]
        return CodebookStack(books, self.depth, residual=True)

    def read(self, module: QuantisedModule, found: QuantisedCodes, row: Tensor) -> Tensor:
        if not self.dropout or not module.training:
            return row
        space, lead, device = module.site.space, found.batch_shape, row.device
        count = torch.randint(1, self.depth + 1, lead, device=device)
        count = torch.where(torch.rand(lead, device=device) < self.dropout, count, self.depth)
        kept = torch.arange(self.depth, device=device) < count.reshape(*lead, *(1,) * module.plane, 1)
        rows = space.rows(found.index, module.codebook.table)
        return space.channels_first((rows * kept.unsqueeze(-1)).sum(-2))

    def penalties(self, module: QuantisedModule, found: QuantisedCodes, row: Tensor) -> dict[str, Tensor]:
        rows = module.site.space.rows(found.index, module.codebook.table)
        z, before = channels_last(found.point, module.plane).unsqueeze(-2), rows.detach().cumsum(-2) - rows.detach()
        return attached(z - before, rows, 2 + module.plane, self.commitment, self.gradient)


class GroupedPosterior(LookedUpPosterior):
    r"""Grouped (product) quantisation: the vector z is cut into g parts, each replaced by its own nearest code.

    The codes are one more, last axis of the latent's grid, and their rows of width E / g lie side by side: the decoder
    reads one of K^g vectors, with KL -log p of all g codes. Penalties are those of `nearest_code`.

    References:
        Product Quantization for Nearest Neighbor Search (Jegou, Douze, Schmid, 2011),
        https://doi.org/10.1109/TPAMI.2010.57
        HiFi-Codec: Group-residual Vector quantization (Yang et al., 2023), https://arxiv.org/abs/2305.02765
    """

    kind: Literal["grouped"] = "grouped"
    groups: int = Field(default=2, gt=1, le=1000)
    """Number of parts of a vector, g, which divides the embedding."""
    shared: bool = False
    """Use one codebook for all parts, instead of one for each."""

    def sampled(self, space: Space) -> Space:
        if (space.embedding or 0) % self.groups:
            raise ValueError(f"embedding = a multiple of posterior.groups = {self.groups}; got {space.embedding}")
        return super().sampled(space).joining(self.groups, "concatenation")

    def codebook(self, space: Space) -> CodebookStack:
        width = space.features[0] // self.groups
        books = [self.rows(space.states, width) for _ in range(1 if self.shared else self.groups)]
        return CodebookStack(books, self.groups, residual=False)

    def penalties(self, module: QuantisedModule, found: QuantisedCodes, row: Tensor) -> dict[str, Tensor]:
        return attached(found.point, row, 1 + module.plane, self.commitment, self.gradient)
