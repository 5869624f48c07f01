"""Posteriors of several codes that make one vector: residual codes, whose rows are added, and grouped codes."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pvae.graph.site import Space
from pvae.guides.posteriors.base import channels_last
from pvae.guides.posteriors.nearest import LookedUpPosterior, QuantisedCodes, QuantisedModule, attached
from pvae.nn.quantisers import CodebookStack


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
        tables = 1 if self.shared else self.depth
        books = [self.rows(space.states, space.features[0]) for _ in range(tables)]
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
        tables = 1 if self.shared else self.groups
        books = [self.rows(space.states, space.features[0] // self.groups) for _ in range(tables)]
        return CodebookStack(books, self.groups, residual=False)

    def penalties(self, module: QuantisedModule, found: QuantisedCodes, row: Tensor) -> dict[str, Tensor]:
        return attached(found.point, row, 1 + module.plane, self.commitment, self.gradient)
