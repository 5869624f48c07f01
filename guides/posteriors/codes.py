"""Posteriors of codes and bits: one latent, several engines.

What differs is how a gradient passes a discrete choice: an exact sum, a score function, a relaxation, a hard choice
with the gradient of a soft one, or the nearest row of a codebook.
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
from pvae.graph.site import Site
from pvae.graph.space import Values
from pvae.guides.posteriors.base import Posterior, PosteriorModule
from pvae.guides.posteriors.heads import channels_last, head
from pvae.nn.dense import MLP
from pvae.nn.network import Network, NetworkModule

MAX_SUMMED_STATES = 32
"""Joint states up to which `estimator = "auto"` sums over all of them: each costs a pass of the decoder."""
Estimator = Literal["auto", "sum", "score"]


class MovingAverage(Moving):
    """A baseline that follows the mean of what it stands for."""

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
        """Remember the mean of a batch until the step is done."""
        self.seen.copy_(gain.detach().mean())

    @torch.no_grad()
    def after_step(self) -> None:
        """Move towards it; the first one is taken as it is."""
        keep = self.decay * self.started
        sound = self.seen.isfinite()
        self.value.copy_(torch.where(sound, keep * self.value + (1 - keep) * self.seen, self.value))
        self.started.copy_(torch.where(sound, torch.ones_like(self.started), self.started))


class Estimated(PosteriorModule):
    """A posterior whose draws carry no gradient: its site says how one is made.

    Arguments:
        network: from the inputs to logits.
        estimator: "sum" over every joint state, or "score": (gain - baseline) times the gradient of log q.
        average: a baseline that follows the mean gain; or None.
        baseline: a network that predicts the gain from the inputs, or None.
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
    """A network's output as logits of codes on a grid of some dimensions."""

    def __init__(self, grid: int, **parts: Any) -> None:
        super().__init__(**parts)
        self.grid = grid

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Named tensors to codes over a grid, with batch shape `(...)`."""
        return code_grid(channels_last(self.network(inputs), self.grid), self.grid)


class EstimatedBits(Estimated):
    """A network's output as logits of bits."""

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Named tensors to independent bits, with batch shape `(...)`."""
        return bits(self.network(inputs))


class EstimatedPosterior(Posterior):
    """A discrete posterior from which codes themselves are drawn.

    `sum` takes the ELBO in expectation under q, exactly, over every joint state (Pyro's `TraceEnum_ELBO`). `score`
    draws once and weighs the gradient of log q by the gain, log p(x | z) - KL, less a baseline (Pyro's
    `TraceGraph_ELBO`); with several particles the mean of the others is taken off as well. `auto` sums where there are
    at most 32 joint states. Under `iwae`, which does not sum, the gain is the bound, and the weights of the other
    particles make its baseline.

    References:
        Simple Statistical Gradient-Following Algorithms (Williams, 1992), https://doi.org/10.1007/BF00992696
        Neural Variational Inference and Learning in Belief Networks (Mnih, Gregor, 2014),
        https://arxiv.org/abs/1402.0030
        Variational Inference for Monte Carlo Objectives (Mnih, Rezende, 2016), https://arxiv.org/abs/1602.06725
    """

    estimator: Estimator = "auto"
    """Estimator of the gradient."""
    baseline: Literal["average", "network", "none"] = "average"
    """Baseline subtracted from the gain of a score function: its moving average, a network's prediction of it from the
    encoder's features, or none. Under `iwae` none is needed: `average` rests, `network` is refused."""
    network: Network | None = None
    """Between the encoder's features and the logits; default: one linear map."""

    def sums(self, log_states: float) -> bool:
        """True if the gradient is that of a sum, for a latent of exp(`log_states`) joint states."""
        return self.estimator == "sum" or (
            self.estimator == "auto" and log_states <= math.log(MAX_SUMMED_STATES) + 1e-9
        )

    def parts(self, log_states: float, inputs: Mapping[str, Shape], output: Shape) -> dict[str, Any]:
        """Return the arguments of an `Estimated` module."""
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
    """q(c | x) = Categorical(pi(x)), at every position of a grid: the amortised posterior of a code."""

    kind: Literal["categorical"] = "categorical"
    values: ClassVar[Values] = "index"

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        output = (site.space.states, *site.space.grid)
        return EstimatedCodes(len(site.space.grid), **self.parts(site.space.log_states, inputs, output))


@final
class BernoulliPosterior(EstimatedPosterior):
    """q(b | x) = prod_d Bernoulli(pi_d(x)): the amortised posterior of a vector of bits."""

    kind: Literal["bernoulli"] = "bernoulli"
    values: ClassVar[Values] = "binary"

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return EstimatedBits(**self.parts(site.space.log_states, inputs, site.event))
