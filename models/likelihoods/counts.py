"""Likelihoods of counts: their sizes and dispersions, the encoding that networks read, and closed-form densities."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import pyro.distributions as dist
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from pvae.component import Shape
from pvae.distributions.base import Event
from pvae.distributions.exact import ExactNegativeBinomial, ExactPoisson, ZeroInflated
from pvae.models.likelihoods import base

LOWEST_LOG_RATE = -12.0
"""Smallest log-rate or log-mean (a clamp), so that counts absent from the data stay possible."""
HIGHEST_LOG_RATE = 24 * math.log(2) + 1
"""Largest log-rate or log-mean (a clamp): single precision represents all integers up to 2^24."""
LARGEST_LOG_COUNT = 7.0
"""Largest |log r| of a negative binomial (a clamp), r its dispersion parameter."""
LIBRARY = "library"
"""Size of a datum that is the sum of its counts, and the name of this entry of a row."""
OWNERS = ("learned", "shared", "feature", "decoder")
"""Names of sizes and dispersions that are no entries of a row."""


def poisson(log_mean: Tensor, validate_args: bool | None = None) -> dist.TorchDistribution:
    """Return Poisson distributions of the given log-means `(...)`."""
    return ExactPoisson(log_mean.clamp(LOWEST_LOG_RATE, HIGHEST_LOG_RATE).exp(), validate_args=validate_args)


def dispersed(log_mean: Tensor, log_count: Tensor, validate_args: bool | None = None) -> dist.TorchDistribution:
    """Return negative binomials of mean m and variance m + m^2 / r, given log m `(..., d)` and log r `(d,)`."""
    log_count = log_count.clamp(-LARGEST_LOG_COUNT, LARGEST_LOG_COUNT)  # beyond, a Poisson
    logits = log_mean.clamp(LOWEST_LOG_RATE, HIGHEST_LOG_RATE) - log_count
    return ExactNegativeBinomial(log_count.exp().expand(logits.shape), logits=logits, validate_args=validate_args)


def logged(x: Tensor) -> Tensor:
    """Return counts `(...)` as network inputs log(1 + x); missing values (NaN) become 0."""
    return x.nan_to_num(0.0).clamp(min=0.0).log1p()


class CountsReader(base.ReaderModule):
    """Encoding of counts `(..., *x)` for a network as log(1 + x), as table columns of counts are read."""

    def __init__(self, x: Shape) -> None:
        super().__init__()
        self.output = tuple(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the network inputs, `(..., *x)`."""
        return logged(x)


class Counts(base.Likelihood):
    """Base of likelihoods of independent counts, of log-means that the decoder gives, or shares of a size."""

    hint: ClassVar[str] = "set data.scale = 'raw', or use likelihood 'normal'"
    support: ClassVar[dist.constraints.Constraint] = dist.constraints.nonnegative_integer
    size: str | None = None
    """Number of counts of a datum, of which the decoder gives the shares, mean = size * softmax(h): `library`, the sum
    of the counts of the datum, on which log p(x | z) is then conditional; `learned`, e^s of one more output s of the
    decoder; or the name of a covariate that holds the size. Without it the mean is e^h."""
    reads: Literal["log", "raw"] = "log"
    """Counts as the guide's networks read them: log(1 + x), or x itself, as in runs of earlier versions."""
    _levels: int = PrivateAttr(default=0)

    @property
    def dispersed_by(self) -> str:
        """Owner of the dispersion parameter: "shared", "feature", "decoder" or a covariate; "" if there is none."""
        return ""

    @property
    def channels(self) -> int:
        """Number of parameters of each element: the log-mean and, if it is predicted, the log-dispersion."""
        return 1 + (self.dispersed_by == "decoder")

    @property
    def conditions(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the entries of a row that hold the size, and the levels of dispersions, if they do."""
        return tuple(name for name in (self.size, self.dispersed_by) if name and name not in OWNERS)

    def within(self, shapes: Mapping[str, Shape]) -> Self:
        bound = self.model_copy()
        bound._levels = shapes[self.dispersed_by][0] if self.dispersed_by in shapes else 0
        return bound

    def reader(self, x: Shape) -> base.ReaderModule | None:
        return CountsReader(x) if self.reads == "log" else None

    def build(self, x: Shape) -> base.LikelihoodModule:
        return CountsModule(x, self, self._levels)

    @abstractmethod
    def element(self, log_mean: Tensor, *shape: Tensor) -> dist.TorchDistribution:
        """Return the distribution of every element, batch shape `(..., *x)`.

        Arguments:
            log_mean: logarithms of the means, `(..., *x)`.
            shape: the log-dispersion log r if the family has one, then further outputs of the decoder.
        """


class CountsModule(base.LikelihoodModule):
    """Module of a likelihood of counts: its log-means, of a size if there is one, and its learned dispersions.

    Arguments:
        x: event shape of a datum.
        declared: the likelihood.
        levels: number of levels of the covariate by which dispersions differ, if there is one.
    """

    log_count: nn.Parameter

    def __init__(self, x: Shape, declared: Counts, levels: int) -> None:
        super().__init__(x, declared.channels)
        self.declared, self.form = declared, None if declared.size else declared.closed_form
        shapes: dict[str, Shape] = {"shared": (), "feature": self.x}
        if (owner := declared.dispersed_by) not in ("", "decoder"):
            self.log_count = nn.Parameter(torch.ones(shapes.get(owner, (levels, *self.x))))

    @property
    def inputs(self) -> Shape:
        """Event shape of the decoder's output: for a learned size flattened, with one number more."""
        found = super().inputs
        return (math.prod(found) + 1,) if self.declared.size == "learned" else found

    def forward(self, h: Tensor, beside: Mapping[str, Tensor] | None = None) -> dist.TorchDistribution:
        """Return the distribution of x.

        Arguments:
            h: output of the decoder, `(..., *inputs)`.
            beside: sizes `(..., 1)` and one-hots `(..., levels)` of the `conditions`, by name.
        """
        size, owner, given, dims = self.declared.size, self.declared.dispersed_by, beside or {}, len(self.x)
        log_size = None if size is None else h[..., -1:] if size == "learned" else given[size].log()
        log_mean, *rest = self.split(h[..., :-1].unflatten(-1, super().inputs) if size == "learned" else h)
        if log_size is not None:
            log_mean = (log_mean.flatten(-dims).log_softmax(-1) + log_size).unflatten(-1, self.x)
        if owner in given:
            rest.insert(0, (given[owner] @ self.log_count.flatten(1)).unflatten(-1, self.x))
        elif owner not in ("", "decoder"):
            rest.insert(0, self.log_count)
        return Event(self.declared.element(log_mean, *rest), dims)


class Poisson(Counts):
    """Poisson likelihood: elements of x are independent counts 0, 1, 2, ..."""

    kind: Literal["poisson"] = "poisson"
    closed_form: ClassVar[type[base.ClosedForm] | None] = base.PoissonForm
    bounds: ClassVar[tuple[float, float]] = (LOWEST_LOG_RATE, HIGHEST_LOG_RATE)
    """Smallest and largest log-rate."""

    def element(self, log_mean: Tensor, *shape: Tensor) -> dist.TorchDistribution:
        return poisson(log_mean)


class Overdispersed(Counts):
    """Base of likelihoods of counts of variance m + m^2 / r, with dispersion parameters r."""

    dispersion: str = "feature"
    """Owner of r: `feature`, one learned for each element; `shared`, one for all; `decoder`, predicted with the mean;
    or the name of a categorical covariate: one for each element and level."""

    @property
    def dispersed_by(self) -> str:
        return self.dispersion


class NegativeBinomial(Overdispersed):
    """Negative binomial likelihood of independent counts (RNA, say): variance m + m^2 / r, r by default per element.

    References: Deep generative modeling for single-cell transcriptomics (Lopez et al., 2018),
        https://doi.org/10.1038/s41592-018-0229-2
    """

    kind: Literal["negative_binomial"] = "negative_binomial"

    def element(self, log_mean: Tensor, *shape: Tensor) -> dist.TorchDistribution:
        return dispersed(log_mean, shape[0])


class ZeroInflatedNegativeBinomial(Overdispersed):
    """Negative binomial likelihood of counts that are 0 with a further probability, which the decoder gives.

    References: Deep generative modeling for single-cell transcriptomics (Lopez et al., 2018),
        https://doi.org/10.1038/s41592-018-0229-2
    """

    kind: Literal["zero_inflated_negative_binomial"] = "zero_inflated_negative_binomial"

    @property
    def channels(self) -> int:
        """Number of parameters of each element: those of a negative binomial, and the logit of further zeros."""
        return super().channels + 1

    def element(self, log_mean: Tensor, *shape: Tensor) -> dist.TorchDistribution:
        log_count, gate = shape
        return ZeroInflated(dispersed(log_mean, log_count), gate)
