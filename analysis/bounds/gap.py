"""Why the ELBO lies below log p(x): the guide's family, or the network that picks a member of it for every datum."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, TransformedDistribution

from pvae.analysis.decompose.draws import accept, quiet, require_likelihood
from pvae.analysis.figures.estimate import CONSERVATIVE, Estimate, Kind, over_draws
from pvae.analysis.figures.table import Figures, Row
from pvae.errors import DataError
from pvae.pair.layout import samples as sample_sites
from pvae.pair.pair import Pair
from pvae.util import seeds

Draw = Callable[[Tensor, int], Tensor]
"""Of rows and a number of draws, log p(x, z) - log q(z | x), `(draws, rows)`, float64."""

LEARNING_RATE = 0.1
"""Of Adam at the start, in scales of the guide; it falls to zero along a half cosine."""
STATES = 4000
"""Most draws (particles times rows) that the optimiser holds at once."""
DRAWS = 20_000
"""Most draws held at once without gradients."""
OPTIMISE, CHOOSE, MEASURE, EVIDENCE = range(1, 5)
"""Streams of noise: the refined member is chosen on other draws than it is measured on."""


@final
@dataclass(frozen=True, repr=False)
class Gap(Figures):
    """What keeps the ELBO below log p(x), nats per datum: `inference = approximation + amortisation`, exactly."""

    n: int
    steps: int
    samples: int
    evidence_samples: int
    log_p: Estimate
    """The importance-weighted bound with the refined guide as its proposal."""
    refined_elbo: Estimate
    """L(q*), q* the best member of the guide's family for every datum, as far as it was found."""
    elbo: Estimate
    """L(q), the guide as it is."""
    approximation: Estimate
    """log p(x) - L(q*): what no member of the family can win."""
    amortisation: Estimate
    """L(q*) - L(q): what a better network could win within the family."""
    inference: Estimate
    """log p(x) - L(q), their sum."""
    per_datum: Mapping[str, Tensor]
    """`log_p`, `refined_elbo`, `elbo`, `approximation`, `amortisation`, `inference` and the effective sample size
    `ess` of the weights behind `log_p`: of every datum, `(n,)`, float64 on the CPU."""
    refined: float
    """Share of the data whose refined member was the better; the others keep the guide's own."""

    @property
    def title(self) -> str:
        """What the figures are of."""
        return f"inference gap, nats per datum (n = {self.n})"

    def rows(self) -> Iterator[Row]:
        """(term, figure, what it means) in reading order."""
        yield "log_p", self.log_p, f"log p(x) from below, {self.evidence_samples} samples of the refined guide"
        yield "refined_elbo", self.refined_elbo, "the ELBO of the best member of the guide's family for every datum"
        yield "elbo", self.elbo, "the ELBO of the guide"
        yield "inference", self.inference, "log_p - elbo = approximation + amortisation"
        yield "approximation", self.approximation, "log_p - refined_elbo: what a richer family could win"
        yield "amortisation", self.amortisation, "refined_elbo - elbo: what a better encoder could win"

    @property
    def remarks(self) -> tuple[str, ...]:
        """How often refining helped, and how far the weights can be trusted."""
        ess = f"effective samples {self.per_datum['ess'].median():.0f} of {self.evidence_samples} (median)"
        return (f"{100 * self.refined:.0f} % of data refined in {self.steps} steps; {ess}",)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {
            "unit": "nats per datum",
            "n": self.n,
            "steps": self.steps,
            "samples": self.samples,
            "evidence_samples": self.evidence_samples,
            "figures": self.figures(),
            "refined": self.refined,
            "ess_median": float(self.per_datum["ess"].median()),
            "ess_min": float(self.per_datum["ess"].min()),
        }


def gap(
    pair: Pair,
    x: Tensor,
    *,
    steps: int = 300,
    samples: int = 100,
    evidence_samples: int = 5000,
    particles: int = 8,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Gap:
    r"""Split log p(x) - ELBO into approximation gap and amortisation gap.

    log p(x) - L(q) = [log p(x) - L(q*)] + [L(q*) - L(q)], L(q) = E_q[log p(x, z) - log q(z)],

    where q* is found for every datum by gradient ascent on parameters of its own, starting at the guide: each
    latent N(m, s^2) becomes N(m + s a, (s exp b)^2), and a full-rank N(m, L L^T) becomes N(m + L a, (L B)(L B)^T), B
    lower triangular with a positive diagonal; inside of transforms (a flow, LogNormal) the base is so changed. For a
    latent that reads nothing but x this is its whole family. For one that reads other latents, only shift and
    scale vary with the datum and the way it reads them stays: L(q*) is then the best of a smaller family, which
    holds the guide. The better of q* and q is kept for every datum, chosen on draws that nothing is measured on.

    Warning: `amortisation` misses what the optimiser did not find, and `approximation` holds it; it also lacks what
    the bound on log p(x) lacks. A q* narrower than the posterior gives weights of large variance: see `ess`, and
    `ais` for another bound.

    References:
        Inference Suboptimality in Variational Autoencoders (Cremer, Li, Duvenaud, 2018),
        https://arxiv.org/abs/1801.03558

    Arguments:
        pair: any Pyro pair whose guide is built on normals, diagonal or full-rank.
        x: data `(n, *event)`.
        steps: of Adam, for every datum.
        samples: draws per datum that the ELBOs are measured on, the same noise for both.
        evidence_samples: draws per datum behind log p(x).
        particles: draws per datum in each step.
        seed: of the draws; the same seed, the same numbers.
        on_progress: called with (steps done, steps in all), over all chunks of rows.

    Returns:
        Gap, nats per datum: `log_p` and the ELBOs are lower bounds; `amortisation` and `inference` are, in
        expectation, lower bounds of the gaps they are named after; `approximation` is an estimate.

    Raises:
        DataError: no rows, a count below one, global latents, or a latent that is not built on a normal.
    """
    counts = {"steps": steps, "samples": samples, "evidence_samples": evidence_samples, "particles": particles}
    for name, count in counts.items():
        if count < 1:
            raise DataError(f"gap: expected {name} of at least 1; got {count}.")
    x = accept(pair, x)
    if pair.layout.shared:
        names = ", ".join(pair.layout.shared)
        raise DataError(f"gap: expected latents of single data only; got global {names}.")
    if not pair.layout.latents:
        names = ", ".join(pair.layout.enumerated)
        raise DataError(f"gap: expected latents in the guide; {names} are summed out exactly, so there is no gap.")
    chunks = x.split(max(1, STATES // particles))
    done = iter(range(1, steps * len(chunks) + 1))
    plan = Plan(steps, samples, evidence_samples, particles, lambda: on_progress(next(done), steps * len(chunks)))
    with quiet(pair, x, seed):
        require_likelihood(pair, "gap")
        draw = _drawer(pair, x)
        parts = [_measure(pair, rows, draw, plan, Noise(seed, i)) for i, rows in enumerate(chunks)]
    return _assemble(parts, plan)


@final
@dataclass(frozen=True)
class Plan:
    """How much to do."""

    steps: int
    samples: int
    evidence_samples: int
    particles: int
    tick: Callable[[], None]


@final
@dataclass(frozen=True)
class Noise:
    """The noise of one chunk."""

    seed: int
    chunk: int

    def set(self, stream: int, x: Tensor) -> None:
        """Start a stream of noise, always the same."""
        seeds.set_noise(seeds.mix(self.seed, seeds.ANALYSIS, 4 * self.chunk + stream), x.device)


# ---------------------------------------------------------------------- per-datum members of the guide's family


class Edit(Protocol):
    """Changes the innermost normal of a distribution."""

    def __call__(self, base: Normal | MultivariateNormal) -> dist.TorchDistribution:
        """The changed normal."""


def rebuild(site: str, fn: Any, edit: Edit) -> Any:
    """A distribution like `fn` with its innermost normal changed.

    Raises:
        DataError: there is no normal, or it is seen through a map that is no bijection (HalfNormal).
    """
    if isinstance(fn, Normal | MultivariateNormal):
        return edit(fn)
    if isinstance(fn, Independent):
        return dist.Independent(rebuild(site, fn.base_dist, edit), fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.MaskedDistribution):
        return dist.MaskedDistribution(rebuild(site, fn.base_dist, edit), fn._mask)
    if isinstance(fn, TransformedDistribution) and all(t.bijective for t in fn.transforms):
        return dist.TransformedDistribution(rebuild(site, fn.base_dist, edit), fn.transforms)
    if isinstance(fn, dist.ExpandedDistribution):
        whole = fn.base_dist.expand(fn.batch_shape)
        if not isinstance(whole, dist.ExpandedDistribution):
            return rebuild(site, whole, edit)
        fn = whole.base_dist
    raise DataError(
        f"gap: expected a guide whose {site} is built on a normal; got {type(fn).__name__}. Use ais, or "
        "evidence where the posterior has a density."
    )


@final
class Pathwise(dist.TorchDistribution):
    """Samples from one member, scores under the same member held fixed: a gradient without the score function.

    The expected score is zero, so the gradient of the ELBO stays unbiased; its variance goes to zero where the
    member nears the posterior.

    References:
        Sticking the Landing (Roeder, Wu, Duvenaud, 2017), https://arxiv.org/abs/1703.09194

    Arguments:
        live: samples.
        fixed: scores.
    """

    arg_constraints = {}
    has_rsample = True

    def __init__(self, live: Any, fixed: Any) -> None:
        self.live, self.fixed = live, fixed
        super().__init__(live.batch_shape, live.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """Of both."""
        return self.live.support

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = torch.Size()) -> Tensor:
        """Draws of the live member."""
        return self.live.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log density under the fixed member, nats."""
        return self.fixed.log_prob(value)


@final
class Diagonal:
    """N(m + s a, (s exp b)^2): shift and log ratio of the scales of every element."""

    def __init__(self, base: Normal, axis: int) -> None:
        shape = base.batch_shape
        self.axis = axis
        self.shift, self.log_ratio = base.loc.new_zeros(shape), base.loc.new_zeros(shape)
        self.free = [self.shift, self.log_ratio]

    def __call__(self, base: Normal | MultivariateNormal) -> dist.TorchDistribution:
        """The changed normal."""
        return self.edit(base, self.shift, self.log_ratio)

    def fixed(self, base: Normal | MultivariateNormal) -> dist.TorchDistribution:
        """The same, without gradients to what is optimised."""
        return self.edit(base, self.shift.detach(), self.log_ratio.detach())

    def edit(self, base: Any, shift: Tensor, log_ratio: Tensor) -> dist.TorchDistribution:
        """The normal with given changes."""
        return dist.Normal(base.loc + base.scale * shift, base.scale * log_ratio.exp())


@final
class FullRank:
    """N(m + L a, (L B)(L B)^T): shift, and a lower triangular factor with positive diagonal."""

    def __init__(self, base: MultivariateNormal, axis: int) -> None:
        shape = (*base.batch_shape, *base.event_shape)
        self.axis = axis
        self.shift = base.loc.new_zeros(shape)
        self.factor = base.loc.new_zeros((*shape, base.event_shape[0]))
        self.free = [self.shift, self.factor]

    def __call__(self, base: Normal | MultivariateNormal) -> dist.TorchDistribution:
        """The changed normal."""
        return self.edit(base, self.shift, self.factor)

    def fixed(self, base: Normal | MultivariateNormal) -> dist.TorchDistribution:
        """The same, without gradients to what is optimised."""
        return self.edit(base, self.shift.detach(), self.factor.detach())

    def edit(self, base: Any, shift: Tensor, factor: Tensor) -> dist.TorchDistribution:
        """The normal with given changes."""
        ratio = factor.tril(-1) + torch.diag_embed(factor.diagonal(dim1=-2, dim2=-1).exp())
        loc = base.loc + (base.scale_tril @ shift[..., None])[..., 0]
        return dist.MultivariateNormal(loc, scale_tril=base.scale_tril @ ratio)


Member = Diagonal | FullRank


class Refined(Messenger):
    """Gives the guide's latents members of their families that belong to single data; at first the guide's own.

    Arguments:
        members: of every latent of the guide, for the rows of one batch.
    """

    def __init__(self, members: Mapping[str, Member]) -> None:
        super().__init__()
        self.members = members

    @property
    def free(self) -> list[Tensor]:
        """What is optimised: every tensor has the rows among its dimensions."""
        return [t for member in self.members.values() for t in member.free]

    def _pyro_sample(self, msg: Any) -> None:
        # Model sites bear the same names; replay, which acts before an outer handler, has given them values already.
        if msg["name"] in self.members and not msg["done"] and not msg["is_observed"]:
            name, fn, member = msg["name"], msg["fn"], self.members[msg["name"]]
            msg["fn"] = Pathwise(rebuild(name, fn, member), rebuild(name, fn, member.fixed))

    def keep(self, rows: Tensor) -> None:
        """Put all rows but those `(n,)` back to the guide's own member."""
        for member in self.members.values():
            for t in member.free:
                shape = [1] * t.dim()
                shape[member.axis] = len(rows)
                t.mul_(rows.reshape(shape))


def refined(pair: Pair, x: Tensor) -> Refined:
    """The guide's own members of the rows of `x`, ready to be optimised.

    Raises:
        DataError: a latent that is not built on a normal.
    """
    sites, members = sample_sites(pair.guide_trace(x)), {}
    for name in pair.layout.latents:
        found: list[Normal | MultivariateNormal] = []
        fn = sites[name]["fn"]
        rebuild(name, fn, lambda base, found=found: found.append(base) or base)
        members[name] = _member(found[0], len(fn.batch_shape) + pair.layout.dim)
    return Refined(members)


def _member(base: Normal | MultivariateNormal, axis: int) -> Member:
    return Diagonal(base, axis) if isinstance(base, Normal) else FullRank(base, axis)


# ---------------------------------------------------------------------- drawing


def _drawer(pair: Pair, x: Tensor) -> Draw:
    """Draws along a plate of their own where the pair takes one, else one by one."""
    try:
        if _together(pair, x[:2], 3).shape == (3, len(x[:2])):
            return lambda x, count: _together(pair, x, count)
    except (ValueError, RuntimeError, IndexError):
        pass
    return lambda x, count: torch.cat([_together(pair, x, 1) for _ in range(count)])


def _together(pair: Pair, x: Tensor, count: int) -> Tensor:
    terms = pair.terms(x, particles=count)
    weights = terms.reconstruction.double() - sum(kl.double() for kl in terms.kl.values())
    return weights if count > 1 else weights[None]


def _blocks(x: Tensor, samples: int) -> list[int]:
    """Sizes of the blocks that `samples` draws of every row are taken in."""
    most = max(1, DRAWS // len(x))
    return [min(most, samples - done) for done in range(0, samples, most)]


def _sample(x: Tensor, samples: int, draw: Draw) -> Tensor:
    """Log weights `(samples, n)`."""
    return torch.cat([draw(x, count) for count in _blocks(x, samples)])


def _log_mean(x: Tensor, samples: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """log of the mean weight and 1 / ess of every row, `(n,)`, weights summed as they are drawn."""
    first = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
    second = first
    for count in _blocks(x, samples):
        weights = draw(x, count)
        first = torch.logaddexp(first, weights.logsumexp(0))
        second = torch.logaddexp(second, (2 * weights).logsumexp(0))
    return first - math.log(samples), (second - 2 * first).exp()


# ---------------------------------------------------------------------- refining and measuring


def _optimise(x: Tensor, handler: Refined, draw: Draw, plan: Plan) -> None:
    """Gradient ascent on the ELBO of every row; rows share nothing, as Adam is elementwise and the loss a sum."""
    optimiser = torch.optim.Adam(handler.free, lr=LEARNING_RATE)
    for step in range(plan.steps):
        optimiser.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / plan.steps)) / 2
        with torch.enable_grad(), handler:
            for t in handler.free:
                t.requires_grad_()
            loss = -draw(x, plan.particles).mean(0).sum()
            gradients = torch.autograd.grad(loss, handler.free)
        for t, gradient in zip(handler.free, gradients, strict=True):
            t.requires_grad_(False)
            t.grad = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        optimiser.step()
        plan.tick()


def _measure(pair: Pair, x: Tensor, draw: Draw, plan: Plan, noise: Noise) -> dict[str, Tensor]:
    """Everything that is measured on a chunk of rows, float64 on the CPU."""
    handler = refined(pair, x)
    noise.set(OPTIMISE, x)
    _optimise(x, handler, draw, plan)

    def both(stream: int) -> tuple[Tensor, Tensor]:
        noise.set(stream, x)
        own = _sample(x, plan.samples, draw)
        noise.set(stream, x)
        with handler:
            return own, _sample(x, plan.samples, draw)

    own, other = both(CHOOSE)
    better = other.mean(0) > own.mean(0)
    handler.keep(better)
    own, other = both(MEASURE)
    noise.set(EVIDENCE, x)
    with handler:
        log_p, inverse_ess = _log_mean(x, plan.evidence_samples, draw)
    found = {"elbo": own, "refined_elbo": other, "log_p": log_p, "inverse_ess": inverse_ess, "better": better.double()}
    return {name: t.cpu() for name, t in found.items()}


def _assemble(parts: list[dict[str, Tensor]], plan: Plan) -> Gap:
    found = {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}
    own, other, log_p, inverse_ess = (found[name] for name in ("elbo", "refined_elbo", "log_p", "inverse_ess"))
    error = (inverse_ess - 1 / plan.evidence_samples).clamp(min=0).sum().sqrt() / len(log_p)
    log_p_figure = over_draws(log_p[None], "lower_bound")
    if plan.evidence_samples > 1:  # one draw cannot tell noise from spread
        log_p_figure = Estimate(log_p_figure.value, float(error), "lower_bound", log_p_figure.data_error)
    data = {"log_p": log_p, "refined_elbo": other.mean(0), "elbo": own.mean(0)}
    data["approximation"] = data["log_p"] - data["refined_elbo"]
    data["amortisation"] = data["refined_elbo"] - data["elbo"]
    data["inference"] = data["log_p"] - data["elbo"]
    refined_elbo, elbo = over_draws(other, "lower_bound"), over_draws(own, "lower_bound")
    return Gap(
        n=len(log_p),
        steps=plan.steps,
        samples=plan.samples,
        evidence_samples=plan.evidence_samples,
        log_p=log_p_figure,
        refined_elbo=refined_elbo,
        elbo=elbo,
        approximation=_difference(data["approximation"], log_p_figure, refined_elbo, "estimate"),
        amortisation=over_draws(other - own, "lower_bound"),
        inference=_difference(data["inference"], log_p_figure, elbo, "lower_bound"),
        per_datum={**data, "ess": 1 / inverse_ess},
        refined=float(found["better"].mean()),
    )


def _difference(values: Tensor, one: Estimate, other: Estimate, kind: Kind) -> Estimate:
    """The mean of differences `(n,)` of two figures with independent noise."""
    error = math.hypot(one.standard_error, other.standard_error)
    note = CONSERVATIVE if CONSERVATIVE in (one.note, other.note) else ""
    return Estimate(float(values.mean()), error, kind, over_draws(values[None]).data_error, note)
