"""A hand-written pair of two numbers, which a marked row breaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pvae
from tests.runs_shared import fit


class Fragile(nn.Module):
    """A decoder whose scale overflows for the marked row."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))

    def model(self, x: Tensor) -> None:
        """z ~ N(0, 1), x ~ N(z + loc, 1), with a NaN density for rows that hold 99."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            bad = torch.where((x == 99).any(-1, keepdim=True), torch.nan, 0.0)
            pyro.sample("x", dist.Normal(z + self.loc + bad, 1.0, validate_args=False).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x) around loc."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc.expand(len(x), 2), 1.0).to_event(1))

    def pair(self) -> pvae.Pair:
        """Model and guide."""
        return pvae.Pair(model=self.model, guide=self.guide)


def fit_pair(part: Fragile, where: Path, *overrides: str, **options: Any) -> pvae.Run:
    """A silent fit of a hand-written pair, to sixty rows of noise unless data are given."""
    return fit(part.pair(), where, *overrides, **{"data": torch.randn(60, 2), **options})
