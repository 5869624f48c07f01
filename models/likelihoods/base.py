"""Likelihoods p(x | h), from the decoder's output to a distribution over one datum; their closed-form M-steps."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from pvae.component import Component, Shape
from pvae.errors import DataError
from pvae.graph.site import Law

if TYPE_CHECKING:
    from pvae.models.likelihoods.standard import MultivariateNormalModule, NormalModule

BLOCK_NUMBERS = 2**22
"""Largest number of elements of a temporary tensor, when data are processed in pieces."""


class Likelihood(Component):
    """Declared likelihood p(x | h): distribution of a datum x given the decoder's output h."""

    hint: ClassVar[str] = ""
    of_tables: ClassVar[bool] = False
    """True if the likelihood is for tables only, and scores each column by a distribution of its own."""
    closed_form: ClassVar[type[ClosedForm] | None] = None
    """Closed form of its M-step, with which the objective `em` fits it; None if it has none."""
    conditions: ClassVar[tuple[str, ...]] = ()
    """Names of the entries of a row that the likelihood reads itself: the size of a datum, covariates."""
    is_point: ClassVar[bool] = False
    """True if z determines x, x = g(z); the posterior must then invert the decoder, except in a GAN."""

    @property
    @abstractmethod
    def support(self) -> torch.distributions.constraints.Constraint:
        """Constraint on each element of x (real numbers, 0 or 1, ...)."""

    @property
    def channels(self) -> int:
        """Number of parameters that the decoder outputs for each element of x."""
        return 1

    def over(self, laws: Sequence[Law]) -> Likelihood:
        """Return this likelihood bound to table columns with the given distributions; itself if it scores no tables."""
        return self

    def within(self, shapes: Mapping[str, Shape]) -> Self:
        """Return this likelihood bound to the shapes `(d,)` of the entries of a row that it reads, by name."""
        return self

    def reader(self, x: Shape) -> ReaderModule | None:
        """Return the module that prepares data of event shape `x` for the guide; None if it reads x itself."""
        return None

    @abstractmethod
    def build(self, x: Shape) -> LikelihoodModule:
        """Return a module from the decoder's output `(..., channels * x[0], *x[1:])` to a distribution of event `x`."""


class ReaderModule(nn.Module):
    """Base of fixed encodings (no parameters) of data `(..., *x)` as inputs `(..., *output)` of guide networks."""

    output: Shape


class IndicatorReader(ReaderModule):
    """Encoding of data with missing elements (NaN) for a network: as 0, and with an indicator for every element.

    The indicators, 1 for a missing element and else 0, are further entries of the first dimension: of an image as many
    channels as it has.

    Arguments:
        x: event shape of a datum.
        own: encoding of complete data, in which a missing element is 0; None for the data as they are.
    """

    def __init__(self, x: Shape, own: ReaderModule | None = None) -> None:
        super().__init__()
        self.own, self.dims = own, len(x)
        self.output = tuple(self(torch.zeros(1, *x)).shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """Return the network inputs `(..., *output)` of data `(..., *x)`."""
        missing = x.isnan()
        filled = x.masked_fill(missing, 0.0)
        return torch.cat([filled if self.own is None else self.own(filled), missing.to(x)], -self.dims)


class LikelihoodModule(nn.Module):
    """Base of the modules of likelihoods: splits the decoder's output into the parameters of each element of x."""

    form: type[ClosedForm] | None = None
    """Closed form of the M-step; None if there is none."""
    is_point: bool = False
    """True if x is a deterministic function of z."""

    def __init__(self, x: Shape, channels: int) -> None:
        super().__init__()
        self.x = tuple(x)
        self.channels = channels

    @property
    def inputs(self) -> Shape:
        """Event shape of the decoder's output, which holds the parameters of the likelihood."""
        return (self.channels * self.x[0], *self.x[1:])

    def split(self, h: Tensor) -> tuple[Tensor, ...]:
        """Return the decoder's output as `channels` tensors of parameters, each `(..., *x)`."""
        if self.channels == 1:
            return (h,)
        return h.unflatten(-len(self.x), (self.channels, self.x[0])).unbind(-len(self.x) - 1)

    def closed_form(self) -> ClosedForm | None:
        """Return the closed-form M-step of this likelihood; None if it has none."""
        return None if self.form is None else self.form(self)

    def implicit(self) -> LikelihoodModule:
        """Return this likelihood without its density, for a GAN, in which x is sampled but never scored."""
        raise NotImplementedError  # pragma: no cover - declarations ask only a likelihood under which z determines x


# ---------------------------------------------------------------------- closed forms, for the objective `em`

LEAST_LOG_ODDS = -12.0
"""Smallest log-odds or log-probability that an M-step sets, so that values absent from the data stay possible."""


class ClosedForm:
    """Base of closed-form M-steps: decoder outputs of maximum likelihood for weighted data, in an exponential family.

    Sufficient statistics are summed over data in float64, so that they add up over batches; those of normal families
    are centred at `origin` `(prod(x),)`, the mean of the data, to avoid cancellation.

    Arguments:
        module: the likelihood; parameters that all mixture components share, such as a tied covariance, are set on it.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def statistics(self, x: Tensor, origin: Tensor) -> Tensor:
        """Return the sufficient statistics `(n, F)` of data `(n, *x)`; here x itself, flattened."""
        return x.flatten(1)

    def sums(self, weights: Tensor, x: Tensor, origin: Tensor) -> Tensor:
        """Return the sums `(K, F)` of the `statistics` of data `(n, *x)` with weights `(K, n)`, in bounded memory.

        F grows with the square of the size of x where covariances are full, so that few rows are taken at a time.
        """
        rows = max(1, BLOCK_NUMBERS // self.statistics(x[:1], origin).shape[1])
        parts = zip(weights.split(rows, 1), x.split(rows), strict=True)
        return sum((w @ self.statistics(part, origin) for w, part in parts), weights.new_zeros(()))

    def maximise(self, counts: Tensor, sums: Tensor, origin: Tensor) -> Tensor:
        """Return the decoder outputs that maximise the likelihood of weighted data; set the parameters that they share.

        Arguments:
            counts: sum of the responsibilities of each component, `(K,)`; none is zero.
            sums: sums of the `statistics` weighted by responsibilities, `(K, F)`.
            origin: point at which the statistics are centred, `(prod(x),)`.

        Returns:
            One decoder output for each component, flattened, `(K, prod(inputs))`.

        Raises:
            DataError: there is no maximum: a covariance is singular.
        """
        raise NotImplementedError  # pragma: no cover - abstract

    def around(self, x: Tensor, mean: Tensor, origin: Tensor) -> Tensor:
        """Return statistics `(m, F)` of components restarted at data `(m, *x)`: half way between theirs and `mean`.

        Arguments:
            x: one datum for each restarted component.
            mean: the mean statistics of all data, `(F,)`.
            origin: point at which the statistics are centred, `(prod(x),)`.
        """
        return (self.statistics(x, origin) + mean) / 2


class BernoulliForm(ClosedForm):
    """M-step of Bernoulli elements: the logits of the weighted means."""

    def maximise(self, counts: Tensor, sums: Tensor, origin: Tensor) -> Tensor:
        return torch.logit(sums / counts[:, None], eps=1 / (1 + math.exp(-LEAST_LOG_ODDS)))


class CategoricalForm(ClosedForm):
    """M-step of categorical elements: the logarithm of the weighted proportion of each level."""

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
    """M-step of Poisson elements: the logarithms of the weighted means."""

    def maximise(self, counts: Tensor, sums: Tensor, origin: Tensor) -> Tensor:
        return (sums / counts[:, None]).log().clamp(*self.module.declared.bounds)


class NormalFamilyForm(ClosedForm):
    """Base of the M-steps of normal likelihoods: the statistics are x - origin, then its second moments."""

    def around(self, x: Tensor, mean: Tensor, origin: Tensor) -> Tensor:
        """Return statistics `(m, F)` of components restarted with means at data `x` and the covariance of all data."""
        centre = mean[None, : len(origin)] + origin
        return self.statistics(x, origin) + mean - self.statistics(centre, origin)


class NormalForm(NormalFamilyForm):
    """M-step of independent normal elements: weighted means and, if the scale is learned, variances >= `floor`^2."""

    module: NormalModule

    def statistics(self, x: Tensor, origin: Tensor) -> Tensor:
        y = x.flatten(1) - origin
        is_fixed = self.module.channels == 1 and not isinstance(self.module.log_scale, nn.Parameter)
        return y if is_fixed else torch.cat([y, y.square()], 1)

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
    """M-step of a multivariate normal: weighted means and covariances, with `floor` added to the variances."""

    module: MultivariateNormalModule

    def statistics(self, x: Tensor, origin: Tensor) -> Tensor:
        """Return y = x - origin and the lower triangle of y y^T, `(n, D + D (D + 1) / 2)`."""
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
        """Raise DataError for singular covariances: a conditional variance (Cholesky pivot) may be a rounding error."""
        if not (bad := (pivots <= noise).any(1).nonzero().flatten().tolist()):
            return
        which = bad[0] if self.module.full else None
        rows = {"rows": float(counts.sum() if which is None else counts[which]), "size": self.module.size}
        least = max(1e-6, 2 * float(noise[bad[0]].max()))
        raise DataError.of("models.likelihoods.singular", which=which, least=least, **rows)
