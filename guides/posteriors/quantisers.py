"""Posteriors of quantised codes without lookup (levels, signs), and of a frozen codebook under a learned map."""

import math
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pvae.graph.site import Space
from pvae.guides.posteriors.base import channels_last
from pvae.guides.posteriors.nearest import QuantisedCodes, QuantisedModule, QuantisedPosterior, attached
from pvae.nn.quantisers import LevelCodebook, MappedCodebook, SignCodebook


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
