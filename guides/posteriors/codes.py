"""Posteriors that sample codes and bits themselves, with gradients by an exact sum or by the score function.

Posteriors in other modules pass the gradient through a discrete choice by a relaxation, by straight-through estimation,
or by the nearest row of a codebook.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pvae.component import Shape
from pvae.distributions.codes import bits, code_grid
from pvae.graph.lifecycle import Moving
from pvae.graph.link import Link
from pvae.graph.site import Site, Values
from pvae.guides.posteriors.base import Posterior, PosteriorModule
from pvae.guides.posteriors.heads import channels_last, head
from pvae.nn.network import MLP, Network, NetworkModule

MAX_SUMMED_STATES = 32
"""Largest number of joint states that `estimator = "auto"` sums over; each costs a pass of the decoder."""
Estimator = Literal["auto", "sum", "score"]


class MovingAverage(Moving):
    """Moving-average baseline of a score-function gradient: it follows the mean of the gain (learning signal)."""

    value: Tensor
    started: Tensor
    seen: Tensor

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("value", torch.zeros(()))
        self.register_buffer("started", torch.zeros(()))
        self.register_buffer("seen", torch.full((), torch.nan), persistent=False)

    def note(self, gain: Tensor) -> None:
        """Store the batch mean of the gain (learning signal) until the optimisation step is done."""
        self.seen.copy_(gain.detach().mean())

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the average with the stored mean gain, if finite; the first one is taken as it is."""
        keep = self.decay * self.started
        sound = self.seen.isfinite()
        self.value.copy_(torch.where(sound, keep * self.value + (1 - keep) * self.seen, self.value))
        self.started.copy_(torch.where(sound, torch.ones_like(self.started), self.started))


class Estimated(PosteriorModule):
    """Module of a posterior whose samples carry no gradient; the `infer` of its Pyro site sets the gradient estimator.

    Arguments:
        network: from the inputs to logits.
        estimator: "sum" over every joint state, or "score": (gain - baseline) times the gradient of log q.
        average: moving-average baseline, or None.
        baseline: network that predicts the gain from the inputs, as a baseline, or None.
    """

    def __init__(
        self, network: NetworkModule, estimator: str, average: MovingAverage | None, baseline: NetworkModule | None
    ) -> None:
        super().__init__()
        self.network, self.estimator, self.average, self.baseline = network, estimator, average, baseline
        self.learns_baseline = baseline is not None

    def infer(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        if self.estimator == "sum":
            return {"enumerate": "parallel"}
        told: dict[str, Any] = {}
        if self.baseline is not None:
            # Detached: an encoder led by its baseline's error would have another gradient than the ELBO's.
            still = {name: value.detach() for name, value in inputs.items()}
            told["baseline"] = {"baseline_value": self.baseline(still).squeeze(-1)}
        elif self.average is not None:
            told["baseline"] = {"baseline_value": self.average.value}
            told["average"] = self.average
        return told


class EstimatedCodes(Estimated):
    """Module of a posterior of codes on a grid of `grid` dimensions, whose logits are a network's output."""

    def __init__(self, grid: int, **parts: Any) -> None:
        super().__init__(**parts)
        self.grid = grid

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the distribution of the codes over the grid, with batch shape `(...)`, given named inputs."""
        return code_grid(channels_last(self.network(inputs), self.grid), self.grid)


class EstimatedBits(Estimated):
    """Module of a posterior of independent bits, whose logits are a network's output."""

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the distribution of the independent bits, with batch shape `(...)`, given named inputs."""
        return bits(self.network(inputs))


class EstimatedPosterior(Posterior):
    """Base of discrete posteriors that sample codes or bits themselves, without a relaxation.

    `sum` computes the ELBO's expectation under q exactly, over every joint state (Pyro's `TraceEnum_ELBO`). `score`
    samples once and weights the gradient of log q by the gain, log p(x | z) - KL, minus a baseline (Pyro's
    `TraceGraph_ELBO`); with several particles the mean gain of the others is subtracted as well. `auto` is `sum` for at
    most 32 joint states, else `score`. Under `iwae`, which does not sum, the gain is the bound, and its baseline is
    made of the importance weights of the other particles (VIMCO).

    References:
        Simple Statistical Gradient-Following Algorithms (Williams, 1992), https://doi.org/10.1007/BF00992696
        Neural Variational Inference and Learning in Belief Networks (Mnih, Gregor, 2014),
        https://arxiv.org/abs/1402.0030
        Variational Inference for Monte Carlo Objectives (Mnih, Rezende, 2016), https://arxiv.org/abs/1602.06725
    """

    estimator: Estimator = "auto"
    """Estimator of the gradient: `sum`, `score`, or `auto` by the number of joint states."""
    baseline: Literal["average", "network", "none"] = "average"
    """Baseline subtracted from the gain of a score function: its moving average, a network's prediction of it from the
    encoder's features, or none. Under `iwae` none is needed: `average` is not used, `network` is refused."""
    network: Network | None = None
    """Network from the encoder's features to the logits; default: one linear map."""

    def sums(self, log_states: float) -> bool:
        """Return True if the gradient is computed by an exact sum, for a latent of exp(`log_states`) joint states."""
        return self.estimator == "sum" or (
            self.estimator == "auto" and log_states <= math.log(MAX_SUMMED_STATES) + 1e-9
        )

    def parts(self, log_states: float, inputs: Mapping[str, Shape], output: Shape) -> dict[str, Any]:
        """Return the arguments of the constructor of an `Estimated` module, by name."""
        estimator = "sum" if self.sums(log_states) else "score"
        scores = estimator == "score"
        return {
            "network": head(self.network, inputs, output),
            "estimator": estimator,
            "average": MovingAverage(BASELINE_DECAY) if scores and self.baseline == "average" else None,
            "baseline": MLP(hidden=(100,)).build(inputs, (1,)) if scores and self.baseline == "network" else None,
        }


BASELINE_DECAY = 0.9


@final
class CategoricalPosterior(EstimatedPosterior):
    """Amortised posterior of codes, q(c | x) = Categorical(pi(x)), independent at every position of a grid."""

    kind: Literal["categorical"] = "categorical"
    values: ClassVar[Values] = "index"

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        output = (site.space.states, *site.space.grid)
        return EstimatedCodes(len(site.space.grid), **self.parts(site.space.log_states, inputs, output))


@final
class BernoulliPosterior(EstimatedPosterior):
    """Amortised posterior of a vector of bits, q(b | x) = prod_d Bernoulli(pi_d(x))."""

    kind: Literal["bernoulli"] = "bernoulli"
    values: ClassVar[Values] = "binary"

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return EstimatedBits(**self.parts(site.space.log_states, inputs, site.event))
