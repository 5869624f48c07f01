"""Posteriors of codes and bits: one latent, several engines.

What differs is how a gradient passes a discrete choice: an exact sum, a score function, a relaxation, a hard choice
with the gradient of a soft one, or the nearest row of a codebook.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from math import prod
from typing import Any, ClassVar, Literal, Self, final

import pyro.distributions as dist
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pvae.component import Shape
from pvae.distributions.codes import KL, Certain, RelaxedCodes, bits, code_grid
from pvae.graph.lifecycle import Begun, FirstRows, Moving
from pvae.graph.site import Link, Site, Values, embedded
from pvae.guides.posteriors.base import Posterior, PosteriorModule
from pvae.nn.codebook import START_VECTORS, NearestCodebook
from pvae.nn.dense import MLP, Network, NetworkModule, Pointwise

SMALL = 32
"""Joint states up to which `estimator = "auto"` sums over all of them: each costs a pass of the decoder."""
Estimator = Literal["auto", "sum", "score"]


def head(network: Network | None, inputs: Mapping[str, Shape], output: Shape) -> NetworkModule:
    """From a posterior's inputs to numbers `(..., *output)`.

    Unless said it is one linear map, and on a grid of features one for all positions.
    """
    if network is not None:
        return network.build(inputs, output)
    if len(output) == 3 and any(len(shape) == 3 and shape[1:] == output[1:] for shape in inputs.values()):
        return Pointwise(inputs, output)
    return MLP(hidden=()).build(inputs, output)


def channels_last(h: Tensor, grid: int) -> Tensor:
    """`(..., C, *grid)` to `(..., *grid, C)`."""
    return h.movedim(-1 - grid, -1) if grid else h


# ---------------------------------------------------------------------- sums and score functions


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
        baseline: a network that foretells the gain from the inputs, or None.
    """

    def __init__(
        self, network: NetworkModule, estimator: str, average: MovingAverage | None, baseline: NetworkModule | None
    ) -> None:
        super().__init__()
        self.network, self.estimator, self.average, self.baseline = network, estimator, average, baseline
        self.learns_baseline = baseline is not None

    def infer(self, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """What a site says of itself, in Pyro's own terms (`TraceEnum_ELBO`, `TraceGraph_ELBO`)."""
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


class CategoricalModule(Estimated):
    """A network's output as logits of codes."""

    grid: int

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Named tensors to codes over a grid, with batch shape `(...)`."""
        return code_grid(channels_last(self.network(inputs), self.grid), self.grid)


class BernoulliModule(Estimated):
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
    """How the gradient is made."""
    baseline: Literal["average", "network", "none"] = "average"
    """What is taken off the gain of a score function: its average so far, what a network foretells of it from the
    encoder's features, or nothing. Under `iwae` none is needed: `average` rests, `network` is refused."""
    network: Network | None = None
    """Between the encoder's features and the logits; default: one linear map."""

    def sums(self, log_states: float) -> bool:
        """Whether its gradient is that of a sum, for a latent of so many joint states, given as a logarithm."""
        return self.estimator == "sum" or (self.estimator == "auto" and log_states <= math.log(SMALL) + 1e-9)

    def parts(self, log_states: float, inputs: Mapping[str, Shape], output: Shape) -> dict[str, Any]:
        """What an `Estimated` is made of."""
        estimator = "sum" if self.sums(log_states) else "score"
        scores = estimator == "score"
        return {
            "network": head(self.network, inputs, output),
            "estimator": estimator,
            "average": MovingAverage(DECAY) if scores and self.baseline == "average" else None,
            "baseline": MLP(hidden=(100,)).build(inputs, (1,)) if scores and self.baseline == "network" else None,
        }


DECAY = 0.9


@final
class CategoricalPosterior(EstimatedPosterior):
    """q(c | x) = Categorical(pi(x)), at every position of a grid: the amortised posterior of a code."""

    kind: Literal["categorical"] = "categorical"
    values: ClassVar[Values] = "index"

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        assert site.codes is not None  # noqa: S101 - the declaration has been checked
        log_states = prod(site.grid) * math.log(site.codes)
        module = CategoricalModule(**self.parts(log_states, inputs, (site.codes, *site.grid)))
        module.grid = len(site.grid)
        return module


@final
class BernoulliPosterior(EstimatedPosterior):
    """q(b | x) = prod_d Bernoulli(pi_d(x)): the amortised posterior of a vector of bits."""

    kind: Literal["bernoulli"] = "bernoulli"
    values: ClassVar[Values] = "binary"

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return BernoulliModule(**self.parts(site.event[0] * math.log(2), inputs, site.event))


# ---------------------------------------------------------------------- relaxations


class RelaxedModule(nn.Module):
    """A network's output as logits of relaxed codes, at the temperature of the latent."""

    def __init__(self, network: NetworkModule, site: Site, link: Link, kl: KL, noise: bool) -> None:
        super().__init__()
        self.network, self.link, self.kl, self.noise = network, link, kl, noise
        self.name, self.grid, self.has_twin = site.name, len(site.grid), site.has_twin

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> dist.TorchDistribution:
        """Named tensors to log relaxed one-hots, with batch shape `(...)`."""
        logits = channels_last(self.network(inputs), self.grid)
        tau = self.link.model.temperature(self.name)
        return RelaxedCodes(logits, tau, self.grid, kl=self.kl, noise=self.noise, has_twin=self.has_twin)


class RelaxedPosterior(Posterior):
    """What relaxations share. The temperature is the latent's own: prior and posterior have one."""

    values: ClassVar[Values] = "index"
    is_relaxed: ClassVar[bool] = True
    kl: KL = "relaxed"
    """The KL that is trained: of the densities of the relaxed variables, or in closed form of the categoricals under
    them."""
    network: Network | None = None
    """Between the encoder's features and the logits; default: one linear map."""

    def _build(self, site: Site, inputs: Mapping[str, Shape], link: Link, noise: bool) -> nn.Module:
        assert site.codes is not None  # noqa: S101 - the declaration has been checked
        return RelaxedModule(head(self.network, inputs, (site.codes, *site.grid)), site, link, self.kl, noise)


@final
class RelaxedOneHotPosterior(RelaxedPosterior):
    r"""Gumbel-softmax: c_k = softmax((log pi_k(x) + g_k) / tau), seen as it is.

    References:
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017), https://arxiv.org/abs/1611.01144
        The Concrete Distribution (Maddison, Mnih, Teh, 2017), https://arxiv.org/abs/1611.00712
    """

    kind: Literal["relaxed_onehot"] = "relaxed_onehot"

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return self._build(site, inputs, link, noise=True)


@final
class StraightThroughPosterior(RelaxedPosterior):
    """Seen as the one-hot of the largest entry, with the gradient of the relaxed one-hot: biased, hard, cheap.

    With Gumbel noise the codes seen are exact draws of q(c | x). Without, the most probable code is taken for certain:
    q is a point, and the KL is -log p of it.

    References:
        Estimating or Propagating Gradients Through Stochastic Neurons (Bengio, Leonard, Courville, 2013),
        https://arxiv.org/abs/1308.3432
    """

    kind: Literal["straight_through"] = "straight_through"
    is_hard: ClassVar[bool] = True
    kl: KL = "categorical"
    noise: bool = True
    """Draw Gumbel noise."""

    @model_validator(mode="after")
    def _no_density_of_a_point(self) -> Self:
        if not self.noise and self.kl == "relaxed":
            raise ValueError('kl = "categorical" without noise, where q is a point and has no density; got relaxed')
        return self

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return self._build(site, inputs, link, noise=self.noise)


# ---------------------------------------------------------------------- the nearest code


class NearestCodes(Certain):
    """Codes for certain, and the vectors `(..., E, *grid)` that were looked up."""

    point: Tensor


class NearestModule(PosteriorModule, Begun):
    """A network's output, looked up in the model's codebook."""

    def __init__(self, network: NetworkModule, site: Site, link: Link, declared: NearestCodePosterior) -> None:
        super().__init__()
        self.network, self.link, self.site, self.grid = network, link, site, len(site.grid)
        self.declared = declared

    @property
    def codebook(self) -> NearestCodebook:
        """The model's."""
        return self.link.model.codebooks[self.site.name]  # type: ignore[return-value]

    def begin(self, rows: FirstRows) -> None:
        """Put the codebook at the centres of the first vectors, which see the rows of earlier latents' codebooks."""
        if self.declared.start == "kmeans":
            positions = prod(self.site.grid)
            found = rows.inferred(embedded(self.site.name), max(1, START_VECTORS // positions), stream=1)
            z = torch.cat([self.vectors(infer["point"]) for infer in found])
            self.codebook.start(z, rows.seed, rows.batch * positions)

    def vectors(self, point: Tensor) -> Tensor:
        """Vectors `(..., E, *grid)` in a row, `(m, E)`."""
        return channels_last(point, self.grid).reshape(-1, self.site.features[0])

    def forward(self, inputs: Mapping[str, Tensor], _seen: Mapping[str, Tensor]) -> NearestCodes:
        """Named tensors to the nearest codes, with batch shape `(...)`."""
        book = self.codebook
        z = book.place(channels_last(self.network(inputs), self.grid))
        found = NearestCodes(book.nearest(z), len(book.counts), self.grid)
        found.point = z.movedim(-1, -1 - self.grid) if self.grid else z
        return found

    def penalties(self, found: NearestCodes, row: Tensor) -> dict[str, Tensor]:
        """What is added to the loss beside the ELBO, `(...)`: squared distances, summed over positions."""
        event = tuple(range(-1 - self.grid, 0))
        out = {"commitment": self.declared.commitment * (found.point - row.detach()).square().sum(event)}
        if self.declared.gradient:
            out["codebook"] = (found.point.detach() - row).square().sum(event)
        if self.declared.evenness:
            out["evenness"] = self._unevenness(channels_last(found.point, self.grid))
        return out

    def _unevenness(self, z: Tensor) -> Tensor:
        """evenness * positions * (log K - entropy of the mean soft assignment), nats."""
        flat = z.reshape(-1, z.shape[-1])
        scores = self.codebook.scores(flat)
        spread = flat.detach().square().sum(1).mean() + 1e-6
        share = (scores / (self.declared.softness * spread)).softmax(1).mean(0)
        gap = math.log(len(share)) + (share * (share + 1e-12).log()).sum()
        lead = z.shape[: z.dim() - 1 - self.grid]
        return (self.declared.evenness * prod(z.shape[len(lead) : -1]) * gap).expand(lead)


@final
class NearestCodePosterior(Posterior):
    r"""k* = argmin_k |z(x) - e_k| at every position: vector quantisation. log q = 0, and the KL is -log p(k*).

    The decoder sees e_k*, and its gradient there goes to z unchanged (straight through). Beside the ELBO the loss has
    commitment |z - sg e|^2 and, where gradients move the codebook, |sg z - e|^2.

    References:
        Neural Discrete Representation Learning (van den Oord, Vinyals, Kavukcuoglu, 2017),
        https://arxiv.org/abs/1711.00937
    """

    kind: Literal["nearest_code"] = "nearest_code"
    values: ClassVar[Values] = "index"
    carries: ClassVar[bool] = True
    commitment: float = Field(default=0.25, ge=0)
    """Weight of |z - sg e|^2, per datum, summed over positions and coordinates."""
    decay: float = Field(default=0.99, gt=0, lt=1)
    """Of the averages of what is assigned to a code, which it follows: nearer to 1, slower. Ignored by `gradient`."""
    gradient: bool = False
    """Codes learn by the gradient of the codebook loss, as first published, in place of averages."""
    start: Literal["kmeans", "random"] = "kmeans"
    """Codes begin at the centres of a k-means of the first vectors, or near 0."""
    restart: float = Field(default=0.05, ge=0, le=1)
    """A code that is used less than this share of an even use, on average, moves to a vector of the batch; 0 leaves it.
    """
    unit: bool = False
    """Vectors and codes on the unit sphere: the largest cosine is the nearest.

    References:
        Vector-quantized Image Modeling with Improved VQGAN (Yu et al., 2022), https://arxiv.org/abs/2110.04627
    """
    evenness: float = Field(default=0.0, ge=0)
    """Weight of positions * (log K - entropy of the mean soft assignment), nats: draws the use of codes together.

    References:
        Language Model Beats Diffusion (Yu et al., 2024), https://arxiv.org/abs/2310.05737
    """
    softness: float = Field(default=0.02, gt=0)
    """Temperature of that assignment, in mean squared lengths of z."""
    network: Network | None = None
    """Between the encoder's features and the vectors; default: one linear map."""

    def codebook(self, codes: int, width: int) -> nn.Module:
        return NearestCodebook(codes, width, None if self.gradient else self.decay, self.restart, self.unit)

    def build(self, site: Site, inputs: Mapping[str, Shape], link: Link) -> nn.Module:
        return NearestModule(head(self.network, inputs, site.features), site, link, self)
