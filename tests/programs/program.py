"""A program of the table: a pair in the manner of Pyro's examples or pyroVED's, its data, and log p(x) where known."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pvae.pair.pair import Pair


@dataclass(frozen=True)
class Program:
    """Pair, data and truth of a row of the table."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    data: Any
    log_p: float | None = None
    """Exact mean log p(x), nats per datum; None where there is no closed form."""
    elbo: Callable[[], Tensor | float] | None = None
    """Exact ELBO per datum, in place of a mean of Pyro's losses; None where there is none."""
    bound: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    """Model and guide without the penalties of the training loss, which Pyro runs; default: those of the pair."""
    plates: int = 1
    """Number of nested plates, for `TraceEnum_ELBO`."""
    size: int | None = None
    """Number of rows that the program declares, by which Pyro's loss is divided; default: those of the data."""
    options: tuple[str, ...] = field(default=())
    """Overrides of the fit."""

    @property
    def rows(self) -> int:
        """Number of rows of the data."""
        return len(self.data[0] if isinstance(self.data, tuple) else self.data)

    @property
    def pair(self) -> Pair:
        return Pair(model=self.model, guide=self.guide)


def normal(shape: tuple[int, ...] | int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Fixed normal numbers."""
    shape = (shape,) if isinstance(shape, int) else shape
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits(shape: tuple[int, ...], seed: int = 0, p: float = 0.5) -> Tensor:
    """Fixed random bits, as floats."""
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < p).float()


def counts(shape: tuple[int, ...], rate: float, seed: int = 0) -> Tensor:
    """Fixed Poisson counts, as floats."""
    return torch.poisson(torch.full(shape, rate), generator=torch.Generator().manual_seed(seed))


def gaussian_log_p(x: Tensor, covariance: Tensor, loc: Tensor | float = 0.0) -> float:
    """Mean log density of rows under a multivariate normal, float64."""
    x = x.double()
    mean = torch.as_tensor(loc, dtype=torch.float64).expand(x.shape[-1])
    return float(dist.MultivariateNormal(mean, covariance.double()).log_prob(x).mean())
