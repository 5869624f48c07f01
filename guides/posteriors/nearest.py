"""Vector-quantisation posterior: the code whose embedding is nearest to a network's output."""

import math
from collections.abc import Mapping
from math import prod
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pvae.component import Shape
from pvae.distributions.codes import Certain
from pvae.graph.lifecycle import Begun, FirstRows
from pvae.graph.site import Link, Site, Values, embedded
from pvae.guides.posteriors.base import Linked, Posterior, channels_last, head
from pvae.nn.codebook import START_VECTORS, NearestCodebook
from pvae.nn.network import Network


class NearestCodes(Certain):
    """Point mass on the nearest codes, with the encoder's vectors before the lookup, `(..., E, *grid)`, as `point`."""

    point: Tensor


class NearestCodePosterior(Posterior):
    r"""Vector-quantisation posterior: point mass on k* = argmin_k |z(x) - e_k| at every position, with KL -log p(k*).

    The decoder reads e_k*, and its gradient is passed to z unchanged (straight-through). The loss adds to the negative
    ELBO commitment |z - sg e|^2 (sg: stop-gradient) and, if the codebook is learned by gradients, |sg z - e|^2.

    References:
        Neural Discrete Representation Learning (van den Oord, Vinyals, Kavukcuoglu, 2017),
        https://arxiv.org/abs/1711.00937
    """

    kind: Literal["nearest_code"] = "nearest_code"
    values: ClassVar[Values] = "index"
    carries: ClassVar[bool] = True
    commitment: float = Field(default=0.25, ge=0)
    """Weight of the commitment loss |z - sg e|^2 of a datum, summed over positions and coordinates."""
    decay: float = Field(default=0.99, gt=0, lt=1)
    """Decay of the moving averages of the vectors assigned to a code: nearer to 1, slower. Unused with `gradient`."""
    gradient: bool = False
    """Learn the codebook by the gradient of the codebook loss, as first published, instead of moving averages."""
    start: Literal["kmeans", "random"] = "kmeans"
    """Initial codebook: the centres of k-means on the encoder's vectors of training rows, or random rows."""
    restart: float = Field(default=0.05, ge=0, le=1)
    """Proportion of uniform use below which a code (on average) is reset to a vector of the batch; 0 resets none."""
    unit: bool = False
    """Normalise vectors and codes to the unit sphere, so that the nearest code has the largest cosine similarity.

    References:
        Vector-quantized Image Modeling with Improved VQGAN (Yu et al., 2022), https://arxiv.org/abs/2110.04627
    """
    evenness: float = Field(default=0.0, ge=0)
    """Weight of the penalty positions * (log K - entropy of the mean soft assignment), nats, for uniform code usage.

    References:
        Language Model Beats Diffusion (Yu et al., 2024), https://arxiv.org/abs/2310.05737
    """
    softness: float = Field(default=0.02, gt=0)
    """Temperature of the soft assignment in the evenness penalty, in units of the mean squared norm of z."""
    network: Network | None = None
    """Network from the encoder's features to the vectors z; default: one linear map."""

    def codebook(self, codes: int, width: int) -> nn.Module:
        return NearestCodebook(codes, width, None if self.gradient else self.decay, self.restart, self.unit)

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return NearestModule(site, link, self, head(self.network, inputs, site.features))


class NearestModule(Linked, Begun):
    """Module of the posterior `nearest_code`: replaces a network's output vectors by the nearest codes of the model."""

    declared: NearestCodePosterior

    @property
    def grid(self) -> int:
        """Number of dimensions of the grid."""
        return len(self.site.space.grid)

    @property
    def codebook(self) -> NearestCodebook:
        """Codebook of this latent, which the model holds."""
        return self.link.model.codebooks[self.site.name]  # type: ignore[return-value]

    def begin(self, rows: FirstRows) -> None:
        """Initialise the codebook at k-means centres of the encoder's vectors for training rows, if `start` says so."""
        if self.declared.start == "kmeans":
            positions = prod(self.site.space.grid)
            found = rows.inferred(embedded(self.site.name), max(1, START_VECTORS // positions), stream=1)
            z = torch.cat([self.vectors(infer["point"]) for infer in found])
            self.codebook.start(z, rows.seed, rows.batch * positions)

    def vectors(self, point: Tensor) -> Tensor:
        """Return vectors `(..., E, *grid)` of all positions as rows `(m, E)`."""
        return channels_last(point, self.grid).reshape(-1, self.site.features[0])

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> NearestCodes:
        """Return the point mass on the nearest codes, with batch shape `(...)`, given named inputs."""
        book = self.codebook
        z = book.place(channels_last(self.network(inputs), self.grid))
        found = NearestCodes(book.nearest(z), len(book.counts), self.grid)
        found.point = z.movedim(-1, -1 - self.grid) if self.grid else z
        return found

    def penalties(self, found: NearestCodes, row: Tensor) -> dict[str, Tensor]:
        """Return penalties by name, `(...)`, which the loss adds to the negative ELBO.

        They are the commitment and, if declared, those of the codebook and of evenness.

        Arguments:
            found: the posterior, whose `point` holds the encoder's vectors before the lookup.
            row: the codebook row of the nearest code, `(..., *features)`.
        """
        event = tuple(range(-1 - self.grid, 0))
        out = {"commitment": self.declared.commitment * (found.point - row.detach()).square().sum(event)}
        if self.declared.gradient:
            out["codebook"] = (found.point.detach() - row).square().sum(event)
        if self.declared.evenness:
            out["evenness"] = self._unevenness(channels_last(found.point, self.grid))
        return out

    def _unevenness(self, z: Tensor) -> Tensor:
        """Return the penalty evenness * positions * (log K - entropy of the mean soft assignment), nats."""
        flat = z.reshape(-1, z.shape[-1])
        scores = self.codebook.scores(flat)
        spread = flat.detach().square().sum(1).mean() + 1e-6
        share = (scores / (self.declared.softness * spread)).softmax(1).mean(0)
        gap = math.log(len(share)) + (share * (share + 1e-12).log()).sum()
        lead = z.shape[: z.dim() - 1 - self.grid]
        return (self.declared.evenness * prod(z.shape[len(lead) : -1]) * gap).expand(lead)
