"""Priors of real latents made of other rows: posteriors widened into kernels, mixed with a normal and the prior p."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from pvae.analysis.population.sample import HonestPrior, HonestScores, NewRows


@final
class KernelPrior(HonestPrior):
    """Mixture of kernels on the other rows, their posteriors widened, with one normal and the prior p."""

    def crossed(self, rows: NewRows, half: Tensor) -> HonestScores:
        zero = torch.zeros_like(rows.own)  # a start: p itself
        return HonestScores(rows.log_p, zero, rows.log_p, "the prior itself")

    def trained(self, train: NewRows, rows: NewRows) -> HonestScores:
        return self.crossed(rows, rows.own)
