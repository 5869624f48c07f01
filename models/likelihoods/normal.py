"""Normal likelihoods: independent elements, or one covariance over all of them."""

from __future__ import annotations

import math
from math import prod
from typing import ClassVar, Literal, final

import pyro.distributions as dist
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Shape
from pvae.distributions.factored_normal import FactoredNormal
from pvae.distributions.independent import Event
from pvae.errors import DataError
from pvae.models.likelihoods.base import Likelihood, LikelihoodModule
from pvae.models.likelihoods.closed_form import NormalForm
from pvae.nn.heads import lower_factor


class NormalModule(NormalForm):
    """Independent normal elements with a fixed, a shared learned, or a predicted scale."""

    log_scale: Tensor

    def __init__(self, x: Shape, mode: str, scale: float, floor: float) -> None:
        super().__init__(x, 2 if mode == "per_datum" else 1)
        self.floor = 0.0 if mode == "fixed" else floor
        self.offset = torch.tensor(scale).log().item()
        if mode == "shared":
            self.log_scale = nn.Parameter(torch.tensor(self.offset))
        elif mode == "fixed":
            self.register_buffer("log_scale", torch.tensor(self.offset), persistent=False)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """`(..., channels * x[0], *x[1:])` to the distribution."""
        if self.channels == 1:
            loc, log_scale = h, self.log_scale
        else:
            loc, offset = self.split(h)
            log_scale = offset + self.offset
        return Event(dist.Normal(loc, log_scale.exp().clamp(min=self.floor)), len(self.x))

    def statistics(self, x: Tensor, origin: Tensor) -> Tensor:
        """x and, where a scale is learned, its square."""
        y = x.flatten(1) - origin
        return torch.cat([y, y.square()], 1) if self.learns_scale else y

    @property
    def learns_scale(self) -> bool:
        """True if the scale is learned or predicted."""
        return self.channels == 2 or isinstance(self.log_scale, nn.Parameter)

    def maximise(self, counts: Tensor, sums: Tensor, origin: Tensor) -> Tensor:
        """See `ClosedForm.maximise`; scales are at least `floor`."""
        mean, *square = (sums / counts[:, None]).split(len(origin), 1)
        if not square:
            return mean + origin
        variance = (square[0] - mean.square()).clamp(min=self.floor**2)
        if self.channels == 2:
            return torch.cat([mean + origin, 0.5 * variance.log() - self.offset], 1)
        pooled = counts @ (square[0] - mean.square()) / counts.sum()
        self.log_scale.copy_(0.5 * pooled.mean().clamp(min=self.floor**2).log())
        return mean + origin


@final
class Normal(Likelihood):
    """Independent normal elements; a fixed scale makes the reconstruction a scaled squared error."""

    kind: Literal["normal"] = "normal"
    closed_form: ClassVar[bool] = True
    scale: Literal["fixed", "shared", "per_datum"] = "shared"
    """`fixed`: the declared `value`; `shared`: one learned number; `per_datum`: predicted for every element."""
    value: float = Field(default=0.3, gt=0)
    """The fixed scale, or where learning starts."""
    floor: float = Field(default=1e-3, gt=0)
    """Smallest scale: the density of a learned scale has no upper bound otherwise."""

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers."""
        return constraints.real

    @property
    def channels(self) -> int:
        """Location, and log-scale when it is predicted."""
        return 2 if self.scale == "per_datum" else 1

    def build(self, x: Shape) -> LikelihoodModule:
        return NormalModule(x, self.scale, self.value, self.floor)


class MultivariateNormalModule(NormalForm):
    """One normal over all elements of x; the decoder gives its mean and (if `full`) the factor of its covariance.

    The factor is diag(s) (I + strictly lower triangle) with s^2 = value^2 exp(2 a) + floor: any a and any triangle
    will do, and no conditional variance is below `floor`.
    """

    def __init__(self, x: Shape, covariance: str, value: float, floor: float) -> None:
        super().__init__(x, 1)
        self.size = d = prod(self.x)
        self.full, self.offset, self.floor = covariance == "full", math.log(value), floor
        if not self.full:
            self.factor = nn.Parameter(torch.zeros(d * (d + 1) // 2))

    @property
    def inputs(self) -> Shape:
        """The event's shape or, with a full covariance, D (D + 3) / 2 numbers."""
        return (self.size * (self.size + 3) // 2,) if self.full else self.x

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """`(..., *inputs)` to the distribution."""
        d = self.size
        if self.full:
            loc, log_scale, below = h.split([d, d, d * (d - 1) // 2], -1)
        else:
            loc = h.flatten(h.dim() - len(self.x))
            log_scale, below = self.factor.split([d, d * (d - 1) // 2])
        scale = (2 * (log_scale + self.offset)).exp().add(self.floor).sqrt()
        return FactoredNormal(loc, lower_factor(scale, below), self.x)

    def statistics(self, x: Tensor, origin: Tensor) -> Tensor:
        """x and the lower triangle of x x^T."""
        y = x.flatten(1) - origin
        row, column = torch.tril_indices(self.size, self.size, device=y.device)
        return torch.cat([y, y[:, row] * y[:, column]], 1)

    def maximise(self, counts: Tensor, sums: Tensor, origin: Tensor) -> Tensor:
        """See `ClosedForm.maximise`; `floor` is added to the variances."""
        d = self.size
        row, column = torch.tril_indices(d, d, device=sums.device)
        mean, packed = (sums / counts[:, None]).split([d, len(row)], 1)
        packed = packed - mean[:, row] * mean[:, column]
        if not self.full:
            packed = (counts @ packed / counts.sum())[None]
        covariance = packed.new_zeros(len(packed), d, d)
        covariance[:, row, column] = covariance[:, column, row] = packed
        covariance.diagonal(dim1=1, dim2=2).add_(self.floor)
        square = mean.square() if self.full else mean.square().amax(0)
        noise = 8 * d * torch.finfo(sums.dtype).eps * (covariance.diagonal(dim1=1, dim2=2) + square)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        scale = factor.diagonal(dim1=1, dim2=2)
        pivots = scale.square().masked_fill(failed[:, None] > 0, 0.0)
        self._require_regular(pivots, noise, counts)
        log_scale = 0.5 * (pivots - self.floor).clamp(min=torch.finfo(sums.dtype).tiny).log() - self.offset
        row, column = torch.tril_indices(d, d, -1, device=sums.device)
        free = torch.cat([log_scale, factor[:, row, column] / scale[:, row]], 1)
        if self.full:
            return torch.cat([mean + origin, free], 1)
        self.factor.copy_(free[0])
        return mean + origin

    def _require_regular(self, pivots: Tensor, noise: Tensor, counts: Tensor) -> None:
        """Refuse covariances whose pivots, the conditional variances, may be rounding: they have no density."""
        bad = (pivots <= noise).any(1).nonzero().flatten().tolist()
        if bad:
            which, weight = (f"component {bad[0]}", counts[bad[0]]) if self.full else ("all components", counts.sum())
            remedy = "declare fewer codes, or covariance = 'tied'" if self.full else "or leave out constant features"
            least = max(1e-6, 2 * float(noise[bad[0]].max()))
            raise DataError(
                f"likelihood multivariate_normal: expected a covariance of full rank for {which}; got a singular one, "
                f"of {weight:.6g} data in {self.size} dimensions. Set likelihood.floor to {least:.1g}, {remedy}."
            )


@final
class MultivariateNormal(Likelihood):
    """One normal over all elements of x, of any covariance: with a `table`, the Gaussian mixture."""

    kind: Literal["multivariate_normal"] = "multivariate_normal"
    closed_form: ClassVar[bool] = True
    covariance: Literal["full", "tied"] = "full"
    """`full`: predicted for every datum (one for each component of a mixture); `tied`: one learned for all."""
    value: float = Field(default=0.3, gt=0)
    """Standard deviation of every element where gradient learning starts."""
    floor: float = Field(default=1e-6, ge=0)
    """Least variance. The objective `em` adds it to the diagonal, as scikit-learn does with `reg_covar`."""

    @property
    def support(self) -> constraints.Constraint:
        """Real numbers."""
        return constraints.real

    def build(self, x: Shape) -> LikelihoodModule:
        return MultivariateNormalModule(x, self.covariance, self.value, self.floor)
