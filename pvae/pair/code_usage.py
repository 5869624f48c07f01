"""Codebook usage of discrete latents: sums over the posteriors of a grid of codes, accumulated batch by batch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

from pvae.component import Shape
from pvae.data.streamed import Streamed
from pvae.distributions.exponential import Members
from pvae.distributions.exponential_codes import CertainCodes, Codes
from pvae.distributions.relaxed import Discretised, twin
from pvae.models.graph import GraphModel
from pvae.nn.codebook import Codebook, NearestCodebook
from pvae.pair.densities import members
from pvae.pair.layout import Layout, samples, unwrapped
from pvae.pair.pair import Pair
from pvae.pair.running import quiet
from pvae.util import seeds

DEAD = 1e-3
"""Codes of K count as used if their proportion is at least `DEAD` / K, a thousandth of uniform use."""


@dataclass(frozen=True)
class Tally:
    """Sums over the posteriors of a grid of P codes with K states, per position; float64, exact."""

    n: int
    """Number of rows of data summed over, n."""
    mass: Tensor
    """Expected counts sum_i q(c_p = k | x_i) of each code, `(P, K)`."""
    entropy: Tensor
    """Summed posterior entropies sum_i H(q(c_p | x_i)), `(P,)`, nats."""
    grid: Shape = ()
    """Shape of the grid of codes; () for a single code."""
    prior: Tensor | None = None
    """Log prior log p(c_p = k), `(P, K)`; None unless it is factorised and the same for all rows."""
    bits: bool = False
    """True if each position is a bit rather than a code of one shared codebook."""

    @property
    def positions(self) -> int:
        """Number of positions of the grid, P."""
        return len(self.mass)

    @property
    def states(self) -> int:
        """Number of codes at each position, K."""
        return self.mass.shape[1]

    @property
    def share(self) -> Tensor:
        """Aggregated posterior q_agg(c_p = k), `(P, K)`: mean of the posteriors over the rows."""
        return self.mass / self.n

    @property
    def used(self) -> Tensor:
        """Codes in use, `(K,)` booleans: those with a pooled proportion of at least 0.001 / K."""
        return in_use(self.pooled)

    @property
    def pooled(self) -> Tensor:
        """Proportion of each code over all rows and positions, `(K,)`: the mean of q_agg(c_p) over positions."""
        return self.share.mean(0)

    def __add__(self, other: Tally) -> Tally:
        same = self.prior is not None and other.prior is not None and torch.equal(self.prior, other.prior)
        return Tally(
            self.n + other.n, self.mass + other.mass, self.entropy + other.entropy, self.grid,
            self.prior if same else None, self.bits,
        )  # fmt: skip


def entropy_of(share: Tensor) -> Tensor:
    """Return the entropy -sum p log p of probabilities along the last dimension, nats."""
    return torch.special.entr(share).sum(-1)


def perplexity(share: Tensor) -> Tensor:
    """Return exp(entropy) of probabilities along the last dimension: the effective number of codes."""
    return entropy_of(share).exp()


def in_use(share: Tensor) -> Tensor:
    """Return for each of K codes whether its proportion is at least 0.001 / K, booleans of the shape of `share`."""
    return share >= DEAD / share.shape[-1]


def codebook_of(pair: Pair, name: str) -> Codebook | NearestCodebook | None:
    """Return the codebook of a latent; None if its codes are read as one-hots, or the pair is hand-written."""
    if not isinstance(pair.model, GraphModel) or name not in pair.model.codebooks:
        return None
    found = pair.model.codebooks[name]
    return found if isinstance(found, Codebook | NearestCodebook) else None


def tally(q: Members | None, p: Members | None = None, grid: Shape = (), *, bits: bool = False) -> Tally | None:
    """Return the code-usage sums (`Tally`) of a batch of posteriors; None unless the latent is discrete."""
    if isinstance(q, CertainCodes):
        n, positions = q.index.shape
        flat = q.index + q.states * torch.arange(positions, device=q.index.device)
        mass = flat.flatten().bincount(minlength=positions * q.states).reshape(positions, -1).double()
        return Tally(n, mass, mass.new_zeros(positions), grid, shared_prior(p))
    if not isinstance(q, Codes):
        return None
    logits = q.logits.double()
    probs = logits.exp()
    return Tally(len(q), probs.sum(0), -(probs * logits).sum((0, 2)), grid, shared_prior(p), bits)


def shared_prior(p: Members | None) -> Tensor | None:
    """Return the log prior log p(c_p = k), `(P, K)`, if the rows share one factorised prior; else None."""
    if not isinstance(p, Codes) or not bool((p.logits == p.logits[:1]).all()):
        return None
    return p.logits[0].double().clone()  # not a view of the rows of a batch


def grid_of(node: Mapping[str, Any]) -> Shape:
    """Return the shape of the grid of codes of a traced site."""
    event = tuple(node["fn"].event_shape)
    return event[:-1] if isinstance(unwrapped(node["fn"]), OneHotCategorical) else event


class Undrawn(Messenger):
    """Pyro handler that sets categorical sites to 0 instead of sampling, where only distributions are needed."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names and msg["value"] is None and not msg["is_observed"]:
            fn = twin(msg["fn"])
            if isinstance(unwrapped(fn), Categorical):
                shape = fn.batch_shape + fn.event_shape
                msg["value"] = torch.zeros(shape, dtype=torch.int64, device=unwrapped(fn).logits.device)


def tallies(pair: Pair, x: Tensor, layout: Layout) -> dict[str, Tally]:
    """Return the code-usage sums of every code latent of the guide on one batch, given samples of its parents."""
    nodes, found = samples(pair.guide_trace(x)), {}
    for name in layout.latents:
        if isinstance(unwrapped(nodes[name]["fn"]), Bernoulli):
            continue  # bits have no codes to run out of
        made = tally(members(nodes[name], layout, len(x)), None, grid_of(nodes[name]))
        if made is not None:
            found[name] = made
    return found


def code_usage(pair: Pair, x: Tensor | Streamed, seed: int = 0) -> dict[str, float]:
    """Return the perplexity and the number of used codes of every latent with codes on data; runs the guide only.

    Relaxed latents count as the discrete codes of the same logits. Latents that the model sums out have no entry.

    Arguments:
        pair: any pair.
        x: data `(n, *event)`.
        seed: random seed of the samples on which other latents depend; without such dependence it has no effect.

    Returns:
        `perplexity/<name>`, exp of the entropy of q_agg pooled over positions, 1 .. K, and `used/<name>`, the number
        of codes with a pooled proportion of at least 0.001 / K; exact. Empty for a pair without codes.

    Example:
        >>> from pvae import Experiment
        >>> pair = Experiment.load("vae").build((1, 8, 8))
        >>> code_usage(pair, torch.zeros(4, 1, 8, 8))
        {}
    """
    found: dict[str, Tally] = {}
    first = pair.accept(x[:2])
    if not pair.structure.codes:
        return {}
    # With several latents, one may depend on the sample of another.
    undrawn = Undrawn(pair.layout.latents if len(pair.layout.latents) == 1 else ())
    with quiet(pair, first), Discretised(pair.relaxed), undrawn:
        seeds.set_noise(seeds.mix(seed, seeds.VALIDATION), first.device)
        step = pair.structure.rows_at_once()
        for start in range(0, len(x), step):
            for name, made in tallies(pair, pair.accept(x[start : start + step]), pair.layout).items():
                found[name] = found[name] + made if name in found else made
    out = {}
    for name, made in found.items():
        out[f"perplexity/{name}"] = float(perplexity(made.pooled))
        out[f"used/{name}"] = float(made.used.sum())
    return out
