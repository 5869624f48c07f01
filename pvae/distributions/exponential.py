"""Batches of distributions of one exponential family: sufficient statistics, natural parameters, densities; mixtures.

log q_i(z) = <T(z), eta_i> - A(eta_i), so the density of m points under n members is one matrix product. A mixture of
posteriors (aggregated posterior, learned mixtures as priors) is scored this way, whatever the family. With one-hot
statistics the product is a sum of selected rows of the natural parameters, one for each position.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import pyro.distributions as dist
import torch
from torch import Tensor

from pvae.distributions.base import Batched, Size
from pvae.util import Record, replace

Scorer = Callable[[Tensor, Tensor], None]
"""Function that writes log q_j(z_i) of m values `(m, D)` under n members into a given tensor `(m, n)`, nats."""


class Members(Record, ABC):
    """Batch of n distributions (members) of one exponential family over flat values `(..., D)`."""

    tensors: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that hold parameters, with one row for each member."""

    def __len__(self) -> int:
        """Return the number of members, n."""
        return len(getattr(self, self.tensors[0]))

    @property
    @abstractmethod
    def dim(self) -> int:
        """Width D of a flat value."""

    @property
    @abstractmethod
    def features(self) -> int:
        """Width F of the sufficient statistics."""

    @property
    def numbers(self) -> int:
        """Number of parameters of one member."""
        return sum(getattr(self, name).shape[1:].numel() for name in self.tensors)

    @property
    def work(self) -> int:
        """Cost of one log density, in multiplications."""
        return self.features

    def rows(self, index: slice | Tensor) -> Self:
        """Return the members selected by a slice or an index tensor."""
        return replace(self, **{name: getattr(self, name)[index] for name in self.tensors})

    @abstractmethod
    def natural(self) -> tuple[Tensor, Tensor]:
        """Return natural parameters eta `(F, n)` and -A(eta) `(n,)`, for statistics of values minus `origin`."""

    @property
    @abstractmethod
    def origin(self) -> Tensor:
        """Point `(D,)` subtracted from values before the statistics: near the members, which limits cancellation."""

    @abstractmethod
    def statistics(self, value: Tensor, origin: Tensor) -> Tensor:
        """Return the sufficient statistics T(z - origin) of values `(m, D)`, `(m, F)`."""

    def scorer(self) -> Scorer:
        """Return a function that writes log densities of values under all members, nats.

        The natural parameters are computed once, here; here the densities are one matrix product.
        """
        (eta, constant), origin = self.natural(), self.origin

        def score(value: Tensor, out: Tensor) -> None:
            statistics = self.statistics(value, origin)
            if out.is_contiguous():
                torch.addmm(constant, statistics, eta, out=out)
            else:
                out.copy_(torch.addmm(constant, statistics, eta))

        return score

    @abstractmethod
    def log_prob(self, value: Tensor) -> Tensor:
        """Return log q_i(z_i) of values `(..., n, D)`, each under its own member, `(..., n)`, nats; exact."""

    @abstractmethod
    def sample(self) -> Tensor:
        """Return one sample of every member, `(n, D)`."""

    def joined(self, others: Sequence[Any]) -> Self:
        """Return the concatenation of these members and those of other batches of the same family."""
        return replace(self, **{n: torch.cat([getattr(part, n) for part in (self, *others)]) for n in self.tensors})

    def double(self) -> Self:
        """Return the same members with parameters in float64."""
        return self.map(lambda t: t.double())

    def map(self, change: Any) -> Self:
        """Return the same members with a function applied to every parameter."""
        return replace(self, **{name: change(getattr(self, name)) for name in self.tensors})


class Located(Members):
    """Members of a location family (normals), scored by a matrix product."""

    loc: Tensor
    """Location (mean) of every member, `(n, D)`."""

    @property
    def dim(self) -> int:
        return self.loc.shape[1]

    @property
    def origin(self) -> Tensor:
        return self.loc.mean(0)


class Normals(Located):
    """Diagonal normals N(loc_i, diag scale_i^2): T(z) = (z^2, z), eta = (-1 / 2 s^2, m / s^2)."""

    tensors = ("loc", "scale")
    scale: Tensor
    """Standard deviation of every coordinate, `(n, D)`."""

    @property
    def features(self) -> int:
        return 2 * self.dim

    def natural(self) -> tuple[Tensor, Tensor]:
        precision, loc = self.scale**-2, self.loc - self.origin
        normaliser = 0.5 * (loc**2 * precision).sum(1) + self.scale.log().sum(1)
        return torch.cat([-0.5 * precision, loc * precision], 1).T, -normaliser - 0.5 * self.dim * math.log(2 * math.pi)

    def statistics(self, value: Tensor, origin: Tensor) -> Tensor:
        z = value - origin
        return torch.cat([z * z, z], 1)

    def log_prob(self, value: Tensor) -> Tensor:
        return dist.Normal(self.loc, self.scale, validate_args=False).log_prob(value).sum(-1)

    def sample(self) -> Tensor:
        return torch.normal(self.loc, self.scale)


class FullRankNormals(Located):
    """Full-covariance normals N(loc_i, L_i L_i^T).

    T(z) = (z_a z_b for a <= b, z) and eta = (-P_ab (halved where a = b), P m), with P the precision matrix.
    """

    tensors = ("loc", "scale_tril")
    scale_tril: Tensor
    """Lower-triangular Cholesky factor L of the covariance, `(n, D, D)`."""

    @property
    def scale(self) -> Tensor:
        """Standard deviation of every coordinate, `(n, D)`."""
        return self.scale_tril.square().sum(-1).sqrt()

    @property
    def features(self) -> int:
        return self.dim * (self.dim + 1) // 2 + self.dim

    def _upper(self) -> Tensor:
        return torch.triu_indices(self.dim, self.dim, device=self.loc.device)

    def natural(self) -> tuple[Tensor, Tensor]:
        precision, loc = torch.cholesky_inverse(self.scale_tril), self.loc - self.origin
        slope = (precision @ loc[..., None])[..., 0]
        halved = precision - 0.5 * torch.diag_embed(precision.diagonal(dim1=-2, dim2=-1))
        a, b = self._upper()
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        normaliser = 0.5 * (slope * loc).sum(1) + log_det
        return torch.cat([-halved[:, a, b], slope], 1).T, -normaliser - 0.5 * self.dim * math.log(2 * math.pi)

    def statistics(self, value: Tensor, origin: Tensor) -> Tensor:
        z = value - origin
        a, b = self._upper()
        return torch.cat([z[:, a] * z[:, b], z], 1)

    def log_prob(self, value: Tensor) -> Tensor:
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril, validate_args=False).log_prob(value)

    def sample(self) -> Tensor:
        return self.loc + (self.scale_tril @ torch.randn_like(self.loc)[..., None])[..., 0]


class Mixture(Batched):
    r"""Mixture sum_k w_k q_k(z) of distributions of one exponential family, scored by one matrix product.

    The log density is a log-sum-exp of log q_k(z) = <T(z), eta_k> - A(eta_k), differentiable. The product takes
    differences of terms of size z^2 / 2 s^2, so it is computed in float64 whatever the type of the members; the result
    has the type of the values.

    Arguments:
        members: the K mixture components, over values `(D,)`.
        log_weights: normalised log mixture weights log w_k, `(K,)`; None for uniform weights.
        left_out: components excluded from the mixture of each row, `(batch, K)` booleans (leave-one-out); None for no
            exclusion.
    """

    support = dist.constraints.real_vector

    def __init__(self, members: Members, log_weights: Tensor | None = None, left_out: Tensor | None = None) -> None:
        self.members, self.log_weights, self.left_out = members, log_weights, left_out
        super().__init__(torch.Size(), torch.Size((members.dim,)), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the exact log density of values `(..., D)`, nats, `(...)`."""
        members = self.members.double()
        eta, constant = members.natural()
        even = constant.new_full((), -math.log(len(members)))
        constant = constant + (even if self.log_weights is None else self.log_weights.double())
        flat = value.reshape(-1, self.event_shape[0]).double()
        if torch.is_grad_enabled():
            return self._scored(flat, members, eta, constant).to(value.dtype).reshape(value.shape[:-1])
        size = max(1, BLOCK_SCORES // len(members))
        if self.left_out is not None:  # a block holds whole batches
            size = max(1, size // len(self.left_out)) * len(self.left_out)
        blocks = [self._scored(block, members, eta, constant) for block in flat.split(size)]
        return torch.cat(blocks).to(value.dtype).reshape(value.shape[:-1])

    def _scored(self, flat: Tensor, members: Members, eta: Tensor, constant: Tensor) -> Tensor:
        scores = torch.addmm(constant, members.statistics(flat, members.origin), eta)
        if self.left_out is None:
            return scores.logsumexp(-1)
        rows, count = self.left_out.shape
        scores = scores.reshape(-1, rows, count).masked_fill(self.left_out, -torch.inf)
        share = torch.log1p(-self.left_out.double().mean(-1))  # renormalises the weights of the other components
        return (scores.logsumexp(-1) - share).flatten()

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Return samples `sample_shape + batch_shape + (D,)` of the whole mixture, without gradient."""
        shape = torch.Size(sample_shape) + self.batch_shape
        count = shape.numel()
        with torch.no_grad():
            if self.log_weights is None:
                index = torch.randint(len(self.members), (count,), device=self.members.origin.device)
            else:
                index = torch.multinomial(self.log_weights.exp(), count, replacement=True)
            return self.members.rows(index).sample().reshape(shape + self.event_shape)


BLOCK_SCORES = 2**23
"""Largest number of component log densities computed at a time, when no gradient is recorded."""
