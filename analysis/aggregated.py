"""The aggregated posterior q_agg(z) = 1/n sum_i q(z | x_i) and its fast density."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from pvae.errors import DeclarationError

ROWS, COLUMNS = 512, 2048
Size = torch.Size | list[int] | tuple[int, ...]


def normal_parameters(fn: Any) -> tuple[Tensor, Tensor] | None:
    """Location and scale `(n, event)` of a (wrapped) diagonal normal, or None for any other distribution."""
    while isinstance(fn, torch.distributions.Independent | dist.ExpandedDistribution):
        fn = fn.base_dist
    if not isinstance(fn, torch.distributions.Normal):
        return None
    return fn.loc, fn.scale


class AggregatedPosterior(dist.TorchDistribution):
    r"""The mixture 1/n sum_i N(loc_i, diag scale_i^2), scored by a matrix product and a logsumexp.

    For a member of the exponential family log q(z|x_i) = <T(z), eta_i> - A(eta_i) + h(z); for the diagonal
    normal T(z) = (z^2, z), eta = (-1/(2 s^2), m/s^2), A = sum(m^2/(2 s^2) + log s) + D/2 log 2 pi. The densities
    of m points under n components are one product `(m, 2D) x (2D, n)`, taken tile by tile in preallocated
    memory: `ROWS x COLUMNS` numbers whatever n. Differences of large terms are taken, so float64 is the default.

    Arguments:
        loc: `(n, D)`.
        scale: `(n, D)`.
        dtype: of the computation.

    Example:
        >>> q = AggregatedPosterior(torch.zeros(3, 2), torch.ones(3, 2))
        >>> bool(torch.isclose(q.log_prob(torch.zeros(2)), torch.tensor(-math.log(2 * math.pi)).double()))
        True
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.real_vector

    def __init__(
        self, loc: Tensor, scale: Tensor, dtype: torch.dtype = torch.float64, validate_args: bool | None = None
    ) -> None:
        if loc.dim() != 2 or loc.shape != scale.shape or not len(loc):
            raise DeclarationError(
                f"AggregatedPosterior: expected loc and scale of one shape (n, D); got {list(loc.shape)} and "
                f"{list(scale.shape)}."
            )
        self.loc, self.scale = loc.detach().to(dtype), scale.detach().to(dtype)
        precision = self.scale**-2
        self._eta = torch.cat([-0.5 * precision, self.loc * precision], 1).T.contiguous()
        log_normaliser = 0.5 * (self.loc**2 * precision).sum(1) + self.scale.log().sum(1)
        self._constant = -log_normaliser - 0.5 * loc.shape[1] * math.log(2 * math.pi)
        super().__init__(torch.Size(), loc.shape[1:], validate_args=validate_args)

    def __len__(self) -> int:
        return len(self.loc)

    @torch.no_grad()
    def log_prob(self, value: Tensor) -> Tensor:
        """log q_agg(z) of `(..., D)`, nats, `(...)`; exact over all n components."""
        flat = value.detach().to(self.loc).reshape(-1, self.loc.shape[1])
        out = torch.empty(len(flat), dtype=self.loc.dtype, device=self.loc.device)
        for start in range(0, len(flat), ROWS):
            rows = slice(start, start + ROWS)
            out[rows] = self._log_sum(flat[rows]) - math.log(len(self))
        return out.reshape(value.shape[:-1])

    def _log_sum(self, z: Tensor) -> Tensor:
        """log sum_i q(z | x_i) of a block of rows, components tile by tile with a running maximum."""
        statistics = torch.cat([z * z, z], 1)
        tile = torch.empty(len(z), min(COLUMNS, len(self)), dtype=z.dtype, device=z.device)
        top = torch.full((len(z), 1), -math.inf, dtype=z.dtype, device=z.device)
        total = torch.zeros_like(top)
        # exp is many times slower where its result underflows; what is clamped adds less than n * tiny to a sum above 1
        floor = math.log(torch.finfo(z.dtype).tiny) + 1
        for start in range(0, len(self), COLUMNS):
            columns = slice(start, start + COLUMNS)
            constant = self._constant[columns]
            block = tile[:, : len(constant)]
            if len(constant) < tile.shape[1]:
                block = torch.addmm(constant, statistics, self._eta[:, columns])
            else:
                torch.addmm(constant, statistics, self._eta[:, columns], out=tile)
            higher = torch.maximum(top, block.amax(1, keepdim=True))
            total.mul_((top - higher).exp_())
            total += block.sub_(higher).clamp_(min=floor).exp_().sum(1, keepdim=True)
            top = higher
        return (top + total.log_()).squeeze(1)

    def component_log_prob(self, value: Tensor) -> Tensor:
        """log q(z_i | x_i), nats: row i of `value` `(..., n, D)` under component i, `(..., n)`; exact."""
        return dist.Normal(self.loc, self.scale, validate_args=False).log_prob(value.to(self.loc)).sum(-1)

    def sample(self, sample_shape: Size = torch.Size()) -> Tensor:
        """Ancestral draws `sample_shape + (D,)`."""
        index = torch.randint(len(self), sample_shape, device=self.loc.device)
        return torch.normal(self.loc[index], self.scale[index])

    def expand(self, batch_shape: Size, _instance: Any = None) -> dist.TorchDistribution:
        """The same mixture over more batch dimensions."""
        return dist.ExpandedDistribution(self, batch_shape)
