"""Posteriors of codes and bits: gradients by an exact sum, the score function, a relaxation, or straight through."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, Self

import pyro.distributions as dist
import torch
from pydantic import model_validator
from torch import Tensor, nn

from pvae.component import Shape
from pvae.distributions import KL, RelaxedCodes, bits, code_grid
from pvae.graph.lifecycle import Moving
from pvae.graph.site import Link, Site, Space, Values
from pvae.guides.posteriors.base import Amortised, Linked, PosteriorModule, channels_last
from pvae.nn.network import MLP, Head, NetworkModule

MAX_SUMMED_STATES = 32
"""Largest number of joint states that `estimator = "auto"` sums over; each costs a pass of the decoder."""
Estimator = Literal["auto", "sum", "score"]


class MovingAverage(Moving):
    """Moving-average baseline of a score-function gradient: it follows the mean of the gain (learning signal)."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.value, self.started = nn.Buffer(torch.zeros(())), nn.Buffer(torch.zeros(()))
        self.seen = nn.Buffer(torch.full((), torch.nan), persistent=False)

    def note(self, gain: Tensor) -> None:
        """Store the batch mean of the gain (learning signal) until the optimisation step is done."""
        self.seen.copy_(gain.detach().mean())

    def scratch(self) -> list[Tensor]:
        return [self.seen]

    def contribution(self, share: float, shard: int, shards: int) -> list[Tensor]:
        return [self.seen * share]

    @torch.no_grad()
    def after_step(self) -> None:
        """Update the average with the stored mean gain, if finite; the first one is taken as it is."""
        keep = self.decay * self.started
        sound = self.seen.isfinite()
        self.value.copy_(torch.where(sound, keep * self.value + (1 - keep) * self.seen, self.value))
        self.started.copy_(torch.where(sound, torch.ones_like(self.started), self.started))


class Estimated(Head, PosteriorModule):
    """Module of a posterior whose samples carry no gradient; the `infer` of its Pyro site sets the gradient estimator.

    Arguments:
        network: from the inputs to logits.
        family: from logits to the distribution of codes or bits.
        estimator: "sum" over every joint state, or "score": (gain - baseline) times the gradient of log q.
        baseline: "average", the moving average of the gain, "network", a prediction from the inputs, or "none".
    """

    def __init__(
        self, network: NetworkModule, family: Callable[[Tensor], dist.TorchDistribution], estimator: str, baseline: str
    ) -> None:
        super().__init__(network, family)
        self.estimator, self.learns_baseline = estimator, baseline == "network"
        self.average = MovingAverage(BASELINE_DECAY) if baseline == "average" else None
        self.baseline = MLP(hidden=(100,)).build(network.inputs, (1,)) if baseline == "network" else None

    def infer(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        if self.estimator == "sum":
            return {"enumerate": "parallel"}
        if self.baseline is not None:
            # Detached: an encoder led by its baseline's error would have another gradient than the ELBO's.
            still = {name: value.detach() for name, value in inputs.items()}
            return {"baseline": {"baseline_value": self.baseline(still).squeeze(-1)}}
        if self.average is None:
            return {}
        return {"baseline": {"baseline_value": self.average.value}, "average": self.average}


def codes(logits: Tensor, grid: int) -> dist.TorchDistribution:
    """Return independent codes over a grid of `grid` dimensions, given logits `(..., K, *grid)`."""
    return code_grid(channels_last(logits, grid), grid)


class EstimatedPosterior(Amortised):
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

    def sums(self, log_states: float) -> bool:
        """Return True if the gradient is computed by an exact sum, for a latent of exp(`log_states`) joint states."""
        few = log_states <= math.log(MAX_SUMMED_STATES) + 1e-9
        return self.estimator == "sum" or (self.estimator == "auto" and few)

    @abstractmethod
    def of(self, space: Space) -> tuple[Shape, Callable[[Tensor], dist.TorchDistribution]]:
        """Return the event shape of the logits of a latent, and the function from logits to its distribution."""

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        output, distribution = self.of(site.space)
        estimator = "sum" if self.sums(site.space.log_states) else "score"
        subtracted = self.baseline if estimator == "score" else "none"
        return Estimated(self.head(inputs, output), distribution, estimator, subtracted)


BASELINE_DECAY = 0.9


class CategoricalPosterior(EstimatedPosterior):
    """Amortised posterior of codes, q(c | x) = Categorical(pi(x)), independent at every position of a grid."""

    kind: Literal["categorical"] = "categorical"
    values: ClassVar[Values] = "index"

    def of(self, space: Space) -> tuple[Shape, Callable[[Tensor], dist.TorchDistribution]]:
        return (space.states, *space.grid), partial(codes, grid=len(space.grid))


class BernoulliPosterior(EstimatedPosterior):
    """Amortised posterior of a vector of bits, q(b | x) = prod_d Bernoulli(pi_d(x))."""

    kind: Literal["bernoulli"] = "bernoulli"
    values: ClassVar[Values] = "binary"

    def of(self, space: Space) -> tuple[Shape, Callable[[Tensor], dist.TorchDistribution]]:
        return space.shape, bits


class RelaxedPosterior(Amortised):
    """Base of relaxed (Gumbel-softmax) posteriors; the temperature belongs to the latent, and its prior shares it."""

    values: ClassVar[Values] = "index"
    kl: KL = "relaxed"
    """KL in the training loss: `relaxed`, between the densities of the relaxed one-hots, or `categorical`, between the
    categoricals of the same logits in closed form."""

    @abstractmethod
    def sampled(self, space: Space) -> Space:
        """Return the relaxation of the space of codes."""

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return RelaxedModule(site, link, self, self.head(inputs, (site.space.states, *site.space.grid)))


class RelaxedModule(Linked):
    """Module of relaxed posteriors: a network's output is the logits of relaxed codes, at the latent's temperature."""

    declared: RelaxedPosterior

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Return the distribution of log relaxed one-hots, with batch shape `(...)`, given named inputs."""
        site, grid = self.site, len(self.site.space.grid)
        logits, tau = channels_last(self.network(inputs), grid), self.link.model.temperature(site.name)
        kl, noise = self.declared.kl, getattr(self.declared, "noise", True)
        return RelaxedCodes(logits, tau, grid, kl=kl, noise=noise, has_twin=site.has_twin)


class RelaxedOneHotPosterior(RelaxedPosterior):
    r"""Gumbel-softmax posterior c_k = softmax((log pi_k(x) + g_k) / tau), which the decoder reads as it is.

    References:
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017), https://arxiv.org/abs/1611.01144
        The Concrete Distribution (Maddison, Mnih, Teh, 2017), https://arxiv.org/abs/1611.00712
    """

    kind: Literal["relaxed_onehot"] = "relaxed_onehot"

    def sampled(self, space: Space) -> Space:
        return space.relaxed(is_hard=False)


class StraightThroughPosterior(RelaxedPosterior):
    """Straight-through posterior: the decoder reads a hard one-hot, with the (biased) gradient of the relaxed one-hot.

    The hard one-hot is that of the largest entry. With Gumbel noise the codes are exact samples of q(c | x). Without,
    q is a point mass on the most probable code, and the KL is -log p of it.

    References:
        Estimating or Propagating Gradients Through Stochastic Neurons (Bengio, Leonard, Courville, 2013),
        https://arxiv.org/abs/1308.3432
    """

    kind: Literal["straight_through"] = "straight_through"
    kl: KL = "categorical"
    noise: bool = True
    """Add Gumbel noise to the logits, so that codes are sampled; without, the most probable code is taken."""

    def sampled(self, space: Space) -> Space:
        return space.relaxed(is_hard=True)

    @model_validator(mode="after")
    def _no_density_of_a_point(self) -> Self:
        if not self.noise and self.kl == "relaxed":
            raise ValueError('kl = "categorical" without noise, where q is a point and has no density; got relaxed')
        return self
