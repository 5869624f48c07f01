"""Posteriors of quantised codes: a network's vectors replaced by codebook rows, and the nearest row of a codebook."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pvae.component import Shape
from pvae.distributions import Certain
from pvae.graph.lifecycle import Begun, FirstRows
from pvae.graph.site import Link, Site, Space, Values, embedded
from pvae.guides.posteriors.base import Amortised, Linked, channels_last
from pvae.nn.codebook import START_VECTORS, NearestCodebook, Table


class QuantisedCodes(Certain):
    """Point mass on codes, with the encoder's vectors before the quantisation, `(..., *features)`, as `point`."""

    point: Tensor


class QuantisedPosterior(Amortised):
    """Base of posteriors that replace a network's vectors z by rows e of a table: point masses, with KL -log p(code).

    The decoder reads e; the gradient at e is passed on to z.
    """

    values: ClassVar[Values] = "index"
    carries: ClassVar[bool] = True

    def sampled(self, space: Space) -> Space:
        """Return the space of the codes: by default `space`, whose embedding is the width of the codebook.

        Raises:
            ValueError: the space does not suit the posterior.
        """
        if space.embedding is None:
            raise ValueError(f"embedding, the width of the codebook, with the posterior {self.kind}; got none")
        return space

    def read(self, module: "QuantisedModule", found: QuantisedCodes, row: Tensor) -> Tensor:
        """Return the rows that the decoder reads, `(..., *features)`: by default those of the codes, `row`."""
        return row

    @abstractmethod
    def codebook(self, space: Space) -> Table:
        """Return a new table of the rows of all codes, which the model holds and by which vectors are quantised."""

    @abstractmethod
    def penalties(self, module: "QuantisedModule", found: QuantisedCodes, row: Tensor) -> dict[str, Tensor]:
        """Return penalties by name, `(...)`, which the loss adds to the negative ELBO.

        Arguments:
            module: the posterior's module.
            found: the posterior, whose `point` holds the encoder's vectors before the quantisation.
            row: the rows of its codes, `(..., *features)`.
        """

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return QuantisedModule(site, link, self, self.head(inputs, site.features))


class QuantisedModule(Linked, Begun):
    """Module of quantised posteriors: replaces a network's output vectors by rows of a table that the model holds."""

    declared: QuantisedPosterior

    @property
    def plane(self) -> int:
        """Number of dimensions of the grid of vectors."""
        return len(self.site.space.plane)

    @property
    def codebook(self) -> Any:
        """Codebook of this latent, which the model holds."""
        return self.link.model.codebooks[self.site.name]

    def begin(self, rows: FirstRows) -> None:
        """Initialise the codebook at k-means centres of the encoder's vectors for training rows, if `start` says so."""
        if getattr(self.declared, "start", "random") == "kmeans":
            positions = math.prod(self.site.space.plane)
            found = rows.inferred(embedded(self.site.name), max(1, START_VECTORS // positions), stream=1)
            z = torch.cat([self.vectors(infer["point"]) for infer in found])
            self.codebook.start(z, rows.seed, rows.batch * positions)

    def vectors(self, point: Tensor) -> Tensor:
        """Return vectors `(..., E, *plane)` of all positions as rows `(m, E)`."""
        return channels_last(point, self.plane).reshape(-1, self.site.features[0])

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> QuantisedCodes:
        """Return the point mass on the codes, with batch shape `(...)`, given named inputs."""
        book, space = self.codebook, self.site.space
        z = book.place(channels_last(self.network(inputs), self.plane))
        found = QuantisedCodes(book.nearest(z), space.states, len(space.grid))
        found.point, found.count, found.tables = space.channels_first(z), book.count, book.tables
        return found

    def through(self, found: QuantisedCodes, row: Tensor) -> Tensor:
        """Return the rows `(..., *features)`, exactly, with a gradient that goes on to the encoder's vectors.

        Arguments:
            found: the posterior, whose `point` holds the encoder's vectors before the quantisation.
            row: the rows of its codes, `(..., *features)`.
        """
        z, row = found.point, self.declared.read(self, found, row).detach()
        if getattr(self.declared, "passes", "straight") == "rotation":
            dim, groups = -1 - self.plane, self.site.space.groups
            z, e = (t.unflatten(dim, (groups, -1)) for t in (z, row))
            z = rotated(z, e, dim).flatten(dim - 1, dim)
        return row + (z - z.detach())

    def penalties(self, found: QuantisedCodes, row: Tensor) -> dict[str, Tensor]:
        """Return penalties by name, `(...)`, which the loss adds to the negative ELBO."""
        return self.declared.penalties(self, found, row)


def rotated(z: Tensor, e: Tensor, dim: int) -> Tensor:
    """Return vectors z, rotated and scaled onto e by a map that carries no gradient of its own (the rotation trick).

    With z^, e^ of length one and w the direction of z^ + e^, the map is |e| / |z| (1 - 2 w w' + 2 e^ z^'), so that the
    angle between the gradient at e and e is that between the gradient at z and z.

    References:
        Restructuring Vector Quantization with the Rotation Trick (Fifty et al., 2024),
        https://arxiv.org/abs/2410.06424, section 4.2

    Arguments:
        z: vectors along the dimension `dim`, `(...)`.
        e: the vectors that they are moved to, `(...)`.
        dim: dimension of the coordinates.

    Returns:
        Vectors equal to e within rounding, `(...)`; the gradient of z is that of the map at z.
    """
    still, unit = z.detach(), partial(nn.functional.normalize, dim=dim, eps=1e-6)
    start, end = unit(still), unit(e)
    w = unit(start + end)
    length = e.norm(dim=dim, keepdim=True) / still.norm(dim=dim, keepdim=True).clamp(min=1e-6)
    return length * (z - 2 * w * (w * z).sum(dim, keepdim=True) + 2 * end * (start * z).sum(dim, keepdim=True))


class LookedUpPosterior(QuantisedPosterior):
    """Base of posteriors whose codes are the nearest rows of codebooks that are learned."""

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
    passes: Literal["straight", "rotation"] = "straight"
    """Gradient at z: that at e unchanged (`straight`), or turned by the `rotation` from z to e and scaled by |e| / |z|.

    References:
        Restructuring Vector Quantization with the Rotation Trick (Fifty et al., 2024),
        https://arxiv.org/abs/2410.06424
    """

    def rows(self, codes: int, width: int, unit: bool = False) -> NearestCodebook:
        """Return a new codebook of `codes` rows of width `width`."""
        return NearestCodebook(codes, width, None if self.gradient else self.decay, self.restart, unit)


def attached(point: Tensor, row: Tensor, dims: int, commitment: float, learned: bool) -> dict[str, Tensor]:
    """Return the penalties commitment |z - sg e|^2 and, if the rows are `learned`, |sg z - e|^2, each `(...)`.

    Arguments:
        point: the encoder's vectors z, `(..., *event)`.
        row: the rows e, of the same shape.
        dims: number of dimensions of an event.
        commitment: weight of the commitment.
        learned: True to learn the rows by the gradient of the second penalty.
    """
    event = tuple(range(-dims, 0))
    out = {"commitment": commitment * (point - row.detach()).square().sum(event)}
    if learned:
        out["codebook"] = (point.detach() - row).square().sum(event)
    return out


class NearestCodePosterior(LookedUpPosterior):
    r"""Vector-quantisation posterior: point mass on k* = argmin_k |z(x) - e_k| at every position, with KL -log p(k*).

    The decoder reads e_k*, and its gradient is passed to z unchanged (straight-through) or rotated. The loss adds to
    the negative ELBO commitment |z - sg e|^2 (sg: stop-gradient) and, if the codebook is learned by gradients,
    |sg z - e|^2.

    References:
        Neural Discrete Representation Learning (van den Oord, Vinyals, Kavukcuoglu, 2017),
        https://arxiv.org/abs/1711.00937
    """

    kind: Literal["nearest_code"] = "nearest_code"
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

    def codebook(self, space: Space) -> NearestCodebook:
        return self.rows(space.states, space.features[0], self.unit)

    def penalties(self, module: QuantisedModule, found: QuantisedCodes, row: Tensor) -> dict[str, Tensor]:
        out = attached(found.point, row, 1 + module.plane, self.commitment, self.gradient)
        if self.evenness:
            out["evenness"] = self._unevenness(module.codebook, channels_last(found.point, module.plane), module.plane)
        return out

    def _unevenness(self, book: NearestCodebook, z: Tensor, plane: int) -> Tensor:
        """Return the penalty evenness * positions * (log K - entropy of the mean soft assignment), nats."""
        flat = z.reshape(-1, z.shape[-1])
        spread = flat.detach().square().sum(1).mean() + 1e-6
        share = (book.scores(flat) / (self.softness * spread)).softmax(1).mean(0)
        gap = math.log(len(share)) + (share * (share + 1e-12).log()).sum()
        lead = z.shape[: z.dim() - 1 - plane]
        return (self.evenness * math.prod(z.shape[len(lead) : -1]) * gap).expand(lead)
