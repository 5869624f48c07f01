"""Maximisation steps in closed form, which the objective `em` asks of a likelihood."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pvae.errors import DataError

if TYPE_CHECKING:
    from pvae.models.likelihoods.normal import MultivariateNormalModule, NormalModule

LEAST_LOG_ODDS = -12.0
"""Least log-odds or log-probability that a closed form gives: a value never seen stays possible."""


class ClosedForm:
    """Weighted maximum of a likelihood in closed form: an exponential family of the decoder's output.

    Statistics are float64 sums over data, so that they add up over batches; those of normal families are about
    `origin`, `(prod(x),)`, the mean of the data, against cancellation.

    Arguments:
        module: the likelihood; parameters that the components share are set on it.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def statistics(self, x: Tensor, origin: Tensor) -> Tensor:
        """Return the sufficient statistics of data `(n, *x)`, `(n, F)`; here x itself."""
        return x.flatten(1)

    def maximise(self, counts: Tensor, sums: Tensor, origin: Tensor) -> Tensor:
        """Return the decoder's outputs under which weighted data are most likely; set what the components share.

        Arguments:
            counts: sums of the weights, `(K,)`; none is zero.
            sums: weighted sums of `statistics`, `(K, F)`.
            origin: as in `statistics`.

        Returns:
            One output for each component, flattened, `(K, prod(inputs))`.

        Raises:
            DataError: there is no maximum: a covariance is singular.
        """
        raise NotImplementedError  # pragma: no cover - abstract

    def around(self, x: Tensor, mean: Tensor, origin: Tensor) -> Tensor:
        """Return statistics of a component moved to data `(m, *x)`, `(m, F)`: half way from the mean over all data."""
        return (self.statistics(x, origin) + mean) / 2


class BernoulliForm(ClosedForm):
    """Bernoulli elements: log-odds of weighted means."""

    def maximise(self, counts: Tensor, sums: Tensor, origin: Tensor) -> Tensor:
        return torch.logit(sums / counts[:, None], eps=1 / (1 + math.exp(-LEAST_LOG_ODDS)))


class CategoricalForm(ClosedForm):
    """Categorical elements: logarithms of weighted proportions, level by level."""

    def statistics(self, x: Tensor, origin: Tensor) -> Tensor:
        levels = torch.arange(self.module.channels, device=x.device)[:, None]
        return (x.flatten(1)[:, None] == levels).to(origin).flatten(1)

    def maximise(self, counts: Tensor, sums: Tensor, origin: Tensor) -> Tensor:
        p = (sums / counts[:, None]).unflatten(1, (self.module.channels, -1))
        least = math.exp(LEAST_LOG_ODDS)
        rare = p < least
        kept = (1 - least * rare.sum(1, keepdim=True)) / p.masked_fill(rare, 0.0).sum(1, keepdim=True)
        return (p * kept).masked_fill(rare, least).log().flatten(1)


class PoissonForm(ClosedForm):
    """Poisson elements: logarithms of weighted means."""

    def maximise(self, counts: Tensor, sums: Tensor, origin: Tensor) -> Tensor:
        return (sums / counts[:, None]).log().clamp(*self.module.bounds)


class NormalFamilyForm(ClosedForm):
    """A normal family: its first statistics are x - origin, the others its second moments."""

    def around(self, x: Tensor, mean: Tensor, origin: Tensor) -> Tensor:
        """Return statistics located at `x`, with the spread of all data."""
        centre = mean[None, : len(origin)] + origin
        return self.statistics(x, origin) + mean - self.statistics(centre, origin)


class NormalForm(NormalFamilyForm):
    """Independent normal elements: weighted means and, where a scale is learned, variances of at least `floor`^2."""

    module: NormalModule

    @property
    def learns_scale(self) -> bool:
        """True if the scale is learned or predicted."""
        return self.module.channels == 2 or isinstance(self.module.log_scale, nn.Parameter)

    def statistics(self, x: Tensor, origin: Tensor) -> Tensor:
        y = x.flatten(1) - origin
        return torch.cat([y, y.square()], 1) if self.learns_scale else y

    def maximise(self, counts: Tensor, sums: Tensor, origin: Tensor) -> Tensor:
        least = self.module.floor**2
        mean, *square = (sums / counts[:, None]).split(len(origin), 1)
        if not square:
            return mean + origin
        variance = (square[0] - mean.square()).clamp(min=least)
        if self.module.channels == 2:
            return torch.cat([mean + origin, 0.5 * variance.log() - self.module.offset], 1)
        pooled = counts @ (square[0] - mean.square()) / counts.sum()
        self.module.log_scale.copy_(0.5 * pooled.mean().clamp(min=least).log())
        return mean + origin


class MultivariateNormalForm(NormalFamilyForm):
    """One normal over all elements: weighted means and covariances, with `floor` added to the variances."""

    module: MultivariateNormalModule

    def statistics(self, x: Tensor, origin: Tensor) -> Tensor:
        """Return x and the lower triangle of x x^T, about the origin."""
        y = x.flatten(1) - origin
        row, column = torch.tril_indices(self.module.size, self.module.size, device=y.device)
        return torch.cat([y, y[:, row] * y[:, column]], 1)

    def maximise(self, counts: Tensor, sums: Tensor, origin: Tensor) -> Tensor:
        d, full, floor = self.module.size, self.module.full, self.module.floor
        row, column = torch.tril_indices(d, d, device=sums.device)
        mean, packed = (sums / counts[:, None]).split([d, len(row)], 1)
        packed = packed - mean[:, row] * mean[:, column]
        if not full:
            packed = (counts @ packed / counts.sum())[None]
        covariance = packed.new_zeros(len(packed), d, d)
        covariance[:, row, column] = covariance[:, column, row] = packed
        covariance.diagonal(dim1=1, dim2=2).add_(floor)
        square = mean.square() if full else mean.square().amax(0)
        noise = 8 * d * torch.finfo(sums.dtype).eps * (covariance.diagonal(dim1=1, dim2=2) + square)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        scale = factor.diagonal(dim1=1, dim2=2)
        pivots = scale.square().masked_fill(failed[:, None] > 0, 0.0)
        self._require_regular(pivots, noise, counts)
        log_scale = 0.5 * (pivots - floor).clamp(min=torch.finfo(sums.dtype).tiny).log() - self.module.offset
        row, column = torch.tril_indices(d, d, -1, device=sums.device)
        free = torch.cat([log_scale, factor[:, row, column] / scale[:, row]], 1)
        if full:
            return torch.cat([mean + origin, free], 1)
        self.module.factor.copy_(free[0])
        return mean + origin

    def _require_regular(self, pivots: Tensor, noise: Tensor, counts: Tensor) -> None:
        """Refuse covariances whose pivots, the conditional variances, may be rounding errors: they have no density."""
        bad = (pivots <= noise).any(1).nonzero().flatten().tolist()
        if not bad:
            return
        if self.module.full:
            which, weight = f"component {bad[0]}", counts[bad[0]]
            remedy = "declare fewer codes, or covariance = 'tied'"
        else:
            which, weight, remedy = "all components", counts.sum(), "or leave out constant features"
        least = max(1e-6, 2 * float(noise[bad[0]].max()))
        raise DataError(
            f"likelihood multivariate_normal: expected a covariance of full rank for {which}; got a singular one, "
            f"of {weight:.6g} data in {self.module.size} dimensions. Set likelihood.floor to {least:.1g}, {remedy}."
        )
