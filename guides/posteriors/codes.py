"""Posteriors of codes and bits: gradients by an exact sum, by the score function, by a relaxation, or straight through.

The last is that of vector quantisation: the code whose embedding is nearest to a network's output.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, Self

import pyro.distributions as dist
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pvae.component import Shape
from pvae.distributions import KL, Certain, RelaxedCodes, bits, code_grid
from pvae.graph.lifecycle import Begun, FirstRows, Moving
from pvae.graph.site import Link, Site, Space, Values, embedded
from pvae.guides.posteriors.base import Linked, Posterior, PosteriorModule, channels_last, head
from pvae.nn.codebook import START_VECTORS, NearestCodebook
from pvae.nn.network import MLP, Head, Network, NetworkModule

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
        few = log_states <= math.log(MAX_SUMMED_STATES) + 1e-9
        return self.estimator == "sum" or (self.estimator == "auto" and few)

    @abstractmethod
    def of(self, space: Space) -> tuple[Shape, Callable[[Tensor], dist.TorchDistribution]]:
        """Return the event shape of the logits of a latent, and the function from logits to its distribution."""

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        output, distribution = self.of(site.space)
        estimator = "sum" if self.sums(site.space.log_states) else "score"
        subtracted = self.baseline if estimator == "score" else "none"
        return Estimated(head(self.network, inputs, output), distribution, estimator, subtracted)


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


class RelaxedPosterior(Posterior):
    """Base of relaxed (Gumbel-softmax) posteriors; the temperature belongs to the latent, and its prior shares it."""

    values: ClassVar[Values] = "index"
    kl: KL = "relaxed"
    """KL in the training loss: `relaxed`, between the densities of the relaxed one-hots, or `categorical`, between the
    categoricals of the same logits in closed form."""
    network: Network | None = None
    """Network from the encoder's features to the logits; default: one linear map."""

    @abstractmethod
    def sampled(self, space: Space) -> Space:
        """Return the relaxation of the space of codes."""

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return RelaxedModule(site, link, self, head(self.network, inputs, (site.space.states, *site.space.grid)))


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


class NearestCodes(Certain):
    """Point mass on the nearest codes, with the encoder's vectors before the lookup, `(..., E, *grid)`, as `point`."""

    point: Tensor


class NearestCodePosterior(Posterior):
    r"""Vector-quantisation posterior: point mass on k* = argmin_k |z(x) - e_k| at every position, with KL -log p(k*).

    The decoder reads e_k*, and its gradient is passed to z unchanged (straight-through). The loss adds to the negative
    ELBO commitment |z - sg e|^2 (sg: stop-gradient) and, if the codebook is learned by gradients, |sg z - e|^2.

    References:
        Neural Discrete Representation Learning (van den Oord, Vinyals, Kavukcuoglu, 2017),
        https://arxiv.org/abs/1711.00937
    """

    kind: Literal["nearest_code"] = "nearest_code"
    values: ClassVar[Values] = "index"
    carries: ClassVar[bool] = True
    commitment: float = Field(default=0.25, ge=0)
    """Weight of the commitment loss |z - sg e|^2 of a datum, summed over positions and coordinates."""
    decay: float = Field(default=0.99, gt=0, lt=1)
    """Decay of the moving averages of the vectors assigned to a code: nearer to 1, slower. Unused with `gradient`."""
    gradient: bool = False
    """Learn the codebook by the gradient of the codebook loss, as first published, instead of moving averages."""
    start: Literal["kmeans", "random"] = "kmeans"
    """Initial codebook: the centres of k-means on the encoder's vectors of training rows, or random rows."""
    restart: float = Field(default=0.05, ge=0, le=1)
    """Proportion of uniform use below which a code (on average) is reset to a vector of the batch; 0 resets none."""
    unit: bool = False
    """Normalise vectors and codes to the unit sphere, so that the nearest code has the largest cosine similarity.

    References:
        Vector-quantized Image Modeling with Improved VQGAN (Yu et al., 2022), https://arxiv.org/abs/2110.04627
    """
    evenness: float = Field(default=0.0, ge=0)
    """Weight of the penalty positions * (log K - entropy of the mean soft assignment), nats, for uniform code usage.

    References:
        Language Model Beats Diffusion (Yu et al., 2024), https://arxiv.org/abs/2310.05737
    """
    softness: float = Field(default=0.02, gt=0)
    """Temperature of the soft assignment in the evenness penalty, in units of the mean squared norm of z."""
    network: Network | None = None
    """Network from the encoder's features to the vectors z; default: one linear map."""

    def codebook(self, codes: int, width: int) -> nn.Module:
        return NearestCodebook(codes, width, None if self.gradient else self.decay, self.restart, self.unit)

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return NearestModule(site, link, self, head(self.network, inputs, site.features))


class NearestModule(Linked, Begun):
    """Module of the posterior `nearest_code`: replaces a network's output vectors by the nearest codes of the model."""

    declared: NearestCodePosterior

    @property
    def grid(self) -> int:
        """Number of dimensions of the grid."""
        return len(self.site.space.grid)

    @property
    def codebook(self) -> NearestCodebook:
        """Codebook of this latent, which the model holds."""
        return self.link.model.codebooks[self.site.name]  # type: ignore[return-value]

    def begin(self, rows: FirstRows) -> None:
        """Initialise the codebook at k-means centres of the encoder's vectors for training rows, if `start` says so."""
        if self.declared.start == "kmeans":
            positions = math.prod(self.site.space.grid)
            found = rows.inferred(embedded(self.site.name), max(1, START_VECTORS // positions), stream=1)
            z = torch.cat([self.vectors(infer["point"]) for infer in found])
            self.codebook.start(z, rows.seed, rows.batch * positions)

    def vectors(self, point: Tensor) -> Tensor:
        """Return vectors `(..., E, *grid)` of all positions as rows `(m, E)`."""
        return channels_last(point, self.grid).reshape(-1, self.site.features[0])

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> NearestCodes:
        """Return the point mass on the nearest codes, with batch shape `(...)`, given named inputs."""
        book = self.codebook
        z = book.place(channels_last(self.network(inputs), self.grid))
        found = NearestCodes(book.nearest(z), len(book.counts), self.grid)
        found.point = z.movedim(-1, -1 - self.grid) if self.grid else z
        return found

    def penalties(self, found: NearestCodes, row: Tensor) -> dict[str, Tensor]:
        """Return penalties by name, `(...)`, which the loss adds to the negative ELBO.

        They are the commitment and, if declared, those of the codebook and of evenness.

        Arguments:
            found: the posterior, whose `point` holds the encoder's vectors before the lookup.
            row: the codebook row of the nearest code, `(..., *features)`.
        """
        event = tuple(range(-1 - self.grid, 0))
        out = {"commitment": self.declared.commitment * (found.point - row.detach()).square().sum(event)}
        if self.declared.gradient:
            out["codebook"] = (found.point.detach() - row).square().sum(event)
        if self.declared.evenness:
            out["evenness"] = self._unevenness(channels_last(found.point, self.grid))
        return out

    def _unevenness(self, z: Tensor) -> Tensor:
        """Return the penalty evenness * positions * (log K - entropy of the mean soft assignment), nats."""
        flat = z.reshape(-1, z.shape[-1])
        scores = self.codebook.scores(flat)
        spread = flat.detach().square().sum(1).mean() + 1e-6
        share = (scores / (self.declared.softness * spread)).softmax(1).mean(0)
        gap = math.log(len(share)) + (share * (share + 1e-12).log()).sum()
        lead = z.shape[: z.dim() - 1 - self.grid]
        return (self.declared.evenness * math.prod(z.shape[len(lead) : -1]) * gap).expand(lead)
