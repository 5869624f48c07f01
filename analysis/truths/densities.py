"""Models with exact log p(x) and samples: probabilistic PCA, normals around training data, noise, and mixtures."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from pvae.analysis.samples.fidelity import DISTANCES_PER_BLOCK


class KnownDensity(ABC):
    """Base class of models of data with exact log p(x) and exact samples."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Return log p(x) of rows `(n, D)`, nats, `(n,)`, float64."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Return n independent samples of x, `(n, D)`, float64."""


class FactorNormal(KnownDensity):
    r"""Probabilistic PCA fitted by maximum likelihood: N(mu, C), C = U (L - s^2 I) U' + s^2 I.

    L holds the leading q eigenvalues of the 1/n covariance, s^2 is the mean of the others, and with y = U' (x - mu)

        log p(x) = -1/2 [D log 2 pi + sum_i log l_i + (D - q) log s^2 + sum_i y_i^2 / l_i + (|x - mu|^2 - |y|^2) / s^2].

    References:
        Probabilistic Principal Component Analysis (Tipping, Bishop, 1999), https://doi.org/10.1111/1467-9868.00196
    """

    def __init__(self, x: Tensor, q: int) -> None:
        self.loc = x.mean(0)
        centred = x - self.loc
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
        self.values, self.directions = values.flip(0)[:q], vectors.flip(1)[:, :q]
        self.rest = float(values.flip(0)[q:].mean())
        self.dim = x.shape[1]

    def log_prob(self, x: Tensor) -> Tensor:
        centred = x - self.loc
        y = centred @ self.directions
        outside = (centred.square().sum(1) - y.square().sum(1)) / self.rest
        log_det = self.values.log().sum() + (self.dim - len(self.values)) * math.log(self.rest)
        return -0.5 * (self.dim * math.log(2 * math.pi) + log_det + (y.square() / self.values).sum(1) + outside)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        z = torch.randn(n, len(self.values), generator=generator, dtype=torch.float64)
        noise = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        return self.loc + z * (self.values - self.rest).sqrt() @ self.directions.T + math.sqrt(self.rest) * noise


class TrainingMixture(KnownDensity):
    """Mixture 1/n sum_i N(x_i, eps^2 I) over the training data x_i: a sample is a training datum plus small noise."""

    def __init__(self, x: Tensor, scale: float) -> None:
        self.x, self.scale = x, scale

    def log_prob(self, x: Tensor) -> Tensor:
        return memory_log_prob(x, self.x, [self.scale])[0]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        chosen = self.x[torch.randint(len(self.x), (n,), generator=generator)]
        return chosen + self.scale * torch.randn(chosen.shape, generator=generator, dtype=torch.float64)


def memory_log_prob(x: Tensor, centres: Tensor, scales: Sequence[float]) -> Tensor:
    """Return log 1/n sum_i N(x; x_i, eps^2 I) of rows `(m, D)` for every eps, `(scales, m)`, nats, float64; exact.

    Squared distances to all n centres are computed once for all scales, in blocks of bounded size.
    """
    n, dim = centres.shape
    square = centres.square().sum(1)
    found = []
    for part in x.split(max(1, DISTANCES_PER_BLOCK // n)):
        distance = (part.square().sum(1, keepdim=True) + square).addmm_(part, centres.T, alpha=-2).clamp_(min=0)
        found.append(torch.stack([(-0.5 / s**2 * distance).logsumexp(1) for s in scales]))
    level = 0.5 * dim * (2 * math.pi * torch.tensor(scales, dtype=torch.float64).square()).log() + math.log(n)
    return torch.cat(found, 1) - level[:, None]


class Box(KnownDensity):
    """Uniform noise in the box [low, high]^D."""

    def __init__(self, low: float, high: float, dim: int) -> None:
        self.low, self.high, self.dim = low, high, dim

    def log_prob(self, x: Tensor) -> Tensor:
        inside = ((x >= self.low) & (x <= self.high)).all(1)
        level = x.new_tensor(-self.dim * math.log(self.high - self.low))
        return torch.where(inside, level, -torch.inf)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        u = torch.rand(n, self.dim, generator=generator, dtype=torch.float64)
        return self.low + (self.high - self.low) * u


class Diluted(KnownDensity):
    """Mixture w p + (1 - w) r of a good model p with noise r: log p(x) falls by at most log 1/w nats."""

    def __init__(self, good: KnownDensity, noise: KnownDensity, weight: float) -> None:
        self.good, self.noise, self.weight = good, noise, weight

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.logaddexp(
            math.log(self.weight) + self.good.log_prob(x), math.log1p(-self.weight) + self.noise.log_prob(x)
        )

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        good, noise = self.good.sample(n, generator), self.noise.sample(n, generator)
        kept = torch.rand(n, 1, generator=generator, dtype=torch.float64) < self.weight
        return torch.where(kept, good, noise)
