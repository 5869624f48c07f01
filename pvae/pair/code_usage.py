"""Limits of collapse, and codebook usage of discrete latents: sums over the posteriors of a grid of codes."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

from pvae.component import Shape
from pvae.data.streamed import Streamed
from pvae.distributions import Certain, CertainCodes, Codes, Discretised, Members, twin
from pvae.models.graph import GraphModel
from pvae.nn.codebook import Table
from pvae.pair import densities, running
from pvae.pair.layout import Layout, samples, unwrapped
from pvae.pair.pair import Pair
from pvae.util import Record, seeds
from pvae.words import text

DEAD = 1e-3
"""Codes of K count as used if their proportion is at least `DEAD` / K, a thousandth of uniform use."""
Nodes = Mapping[str, Any]
"""Nodes of the sample sites of a Pyro trace, by name."""


class Silence(Record):
    """Limits up to which a latent carries no information: the one table that alerts of fits and reports read."""

    variance: float = 0.01
    """Variance over the data of the posterior mean of a real coordinate (Burda et al., 2015)."""
    coordinate: float = 0.01
    """Mean KL of a real coordinate, nats."""
    latent: float = 0.1
    """Mean KL of a real latent, nats, however many coordinates it has."""
    capacity: float = 0.01
    """I_q or mean KL of one code or bit, as a proportion of the log K nats that K states can carry."""
    positions: float = 0.95
    """Proportion of silent positions from which a whole grid of codes or bits carries no information."""

    def of_real(self, coordinates: int) -> float:
        """Return the mean KL, nats, up to which a whole real latent carries no information."""
        return min(self.coordinate * coordinates, self.latent)

    def of_codes(self, positions: int, states: int) -> float:
        """Return the summed I_q, nats, up to which a whole grid of codes carries no information."""
        return min(self.capacity * positions * math.log(states), self.latent)


SILENT = Silence()


class Tally(Record):
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
    kl: Tensor | None = None
    """Summed KL(q(c_p | x_i) || p(c_p)), `(P,)`, nats; None unless the prior is factorised given its parents."""
    count: int = 1
    """Number of codes that make one vector, along the last axis of the grid."""
    tables: int = 1
    """Number of codebooks T that these codes take in turn."""

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
        """Codes in use, `(T K,)` booleans: those with a pooled proportion of at least 0.001 / (T K)."""
        return in_use(self.pooled)

    @property
    def pooled(self) -> Tensor:
        """Proportion of each code of all codebooks over rows and positions, `(T K,)`: the mean of q_agg(c_p)."""
        return self.share.reshape(-1, self.tables, self.states).mean(0).flatten() / self.tables

    def part(self, i: int) -> "Tally":
        """Return the sums of the i-th (from 0) of the codes that make one vector."""
        own = slice(i, None, self.count)
        prior, kl = (None if t is None else t[own] for t in (self.prior, self.kl))
        return Tally(self.n, self.mass[own], self.entropy[own], self.grid[:-1], prior, self.bits, kl)

    @property
    def information(self) -> Tensor:
        """Mutual information I_q[x, c_p] of every position, `(P,)`, nats: at most log K.

        If the posterior depends on other latents it is that of c_p with x and these; the mean KL, if smaller, bounds
        the information that c_p adds to its parents in the prior, and is returned instead.
        """
        found = entropy_of(self.share) - self.entropy / self.n
        return (found if self.kl is None else found.minimum(self.kl / self.n)).clamp(min=0)

    @property
    def silent(self) -> Tensor:
        """Positions without information, `(P,)` booleans: at most 1 % of log K nats; none for one row, or if K = 1."""
        return (self.information <= SILENT.capacity * math.log(self.states)) & (min(self.n, self.states) > 1)

    @property
    def collapsed(self) -> bool:
        """True if the latent as a whole carries no information: in sum, or as 95 % of its positions are silent."""
        whole = float(self.information.sum()) <= SILENT.of_codes(self.positions, self.states)
        return (whole or int(self.silent.sum()) >= SILENT.positions * self.positions) and min(self.n, self.states) > 1

    def __add__(self, other: "Tally") -> "Tally":
        same = self.prior is not None and other.prior is not None and torch.equal(self.prior, other.prior)
        kl = None if self.kl is None or other.kl is None else self.kl + other.kl
        return Tally(
            self.n + other.n, self.mass + other.mass, self.entropy + other.entropy, self.grid,
            self.prior if same else None, self.bits, kl, self.count, self.tables,
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


def codebook_of(pair: Pair, name: str) -> Table | None:
    """Return the codebook of a latent; None if its codes are read as one-hots, or the pair is hand-written."""
    return dict(pair.model.codebooks).get(name) if isinstance(pair.model, GraphModel) else None  # type: ignore[return-value]


def tally(q: Members | None, p: Members | None = None, **described: Any) -> Tally | None:
    """Return the code-usage sums (a `Tally`, fields as `described`) of a batch of posteriors; None unless discrete."""
    if isinstance(q, CertainCodes):
        n, positions = q.index.shape
        flat = q.index + q.states * torch.arange(positions, device=q.index.device)
        mass = flat.flatten().bincount(minlength=positions * q.states).reshape(positions, -1).double()
        return Tally(n, mass, mass.new_zeros(positions), prior=shared_prior(p), **described)
    if not isinstance(q, Codes):
        return None
    logits = q.logits.double()
    probs = logits.exp()
    entropy = -(probs * logits).sum((0, 2))
    log_p = p.logits if isinstance(p, Codes) and p.logits.shape[1:] == logits.shape[1:] else None
    kl = None if log_p is None else -entropy - (probs * log_p).sum((0, 2))
    return Tally(len(q), probs.sum(0), entropy, prior=shared_prior(p), kl=kl, **described)


def shared_prior(p: Members | None) -> Tensor | None:
    """Return the log prior log p(c_p = k), `(P, K)`, if the rows share one factorised prior; else None."""
    if not isinstance(p, Codes) or not bool((p.logits == p.logits[:1]).all()):
        return None
    return p.logits[0].double().clone()  # not a view of the rows of a batch


def described(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `Tally` that a traced site tells: its grid, and whether it has bits or stacked codes."""
    fn, event = unwrapped(node["fn"]), tuple(node["fn"].event_shape)
    grid = event[:-1] if isinstance(fn, OneHotCategorical) else event
    stack = {"count": fn.count, "tables": fn.tables} if isinstance(fn, Certain) else {}
    return {"grid": grid, "bits": isinstance(fn, Bernoulli), **stack}


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


def tallies(guide: Nodes, layout: Layout, rows: int, model: Nodes | None = None) -> dict[str, Tally]:
    """Return the sums over the posteriors of every code and bit latent of one batch, from the sites of its traces."""
    found = {}
    for name in (name for name in layout.latents if name in guide):  # a batch may lack some
        node, prior = guide[name], (model or {}).get(name)
        p = None if prior is None else densities.members(prior, layout, rows)
        if (made := tally(densities.members(node, layout, rows), p, **described(node))) is not None:
            found[name] = made
    return found


def silence(name: str, use: Tally, book: Table | None) -> str | None:
    """Return sentences on a discrete latent that carries no information as a whole, and on what to set; else None.

    Single silent positions, such as those of a constant background, are no fault of a fit.

    Arguments:
        name: name of the latent.
        use: its sums over the posteriors.
        book: the codebook of the latent; None if its codes are read as one-hots.
    """
    if not use.collapsed:
        return None
    carried, capacity = float(use.information.sum()), use.positions * math.log(use.states)
    amounts = {"silent": int(use.silent.sum()), "carried": carried, "capacity": capacity, "most": SILENT.capacity}
    some = carried > SILENT.of_codes(use.positions, use.states)
    kind = "constant" if float(perplexity(use.share).max()) < 1.01 else "some" if some else "none"
    said = text("pair.code_usage.silence", use=use, kind=kind, **amounts)
    return f"{name} has collapsed: {said} {revival(name, book)}"


def revival(name: str, book: Table | None) -> str:
    """Return a sentence with the settings to change so that silent positions and dead codes come into use."""
    return text("pair.code_usage.revival", name=name, remedy=Table.remedy if book is None else book.remedy)


def code_usage(pair: Pair, x: Tensor | Streamed, seed: int = 0) -> dict[str, float]:
    """Return the perplexity and the number of used codes of every latent with codes on data; runs the guide only.

    Relaxed latents count as the discrete codes of the same logits. Latents that the model sums out have no entry.

    Arguments:
        pair: any pair.
        x: data `(n, *event)`.
        seed: random seed of the samples on which other latents depend; without such dependence it has no effect.

    Returns:
        `perplexity/<name>`, exp of the entropy of q_agg pooled over positions, 1 .. K, and `used/<name>`, the number
        of codes with a pooled proportion of at least 0.001 / K; exact. The codebooks of a residual or grouped latent
        count together: K is the number of all their codes. Empty for a pair without codes.

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
    with running.quiet(pair, first), Discretised(pair.relaxed), undrawn:
        seeds.set_noise(seeds.mix(seed, seeds.VALIDATION), first.device)
        step = pair.structure.rows_at_once()
        for start in range(0, len(x), step):
            rows = pair.accept(x[start : start + step])
            for name, made in tallies(samples(pair.guide_trace(rows)), pair.layout, len(rows)).items():
                if not made.bits:  # bits have no codes to run out of
                    found[name] = found[name] + made if name in found else made
    figures = {name: {"perplexity": perplexity(made.pooled), "used": made.used.sum()} for name, made in found.items()}
    return {f"{what}/{name}": float(value) for name, both in figures.items() for what, value in both.items()}
