"""Split of log p(x) - ELBO into the gap of the variational family and the gap of the encoder."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from pvae.analysis.aggregate.entry import accept, quiet, require_counts, require_likelihood
from pvae.analysis.bounds import accumulate, ais
from pvae.analysis.bounds.refine import Refined, refined
from pvae.analysis.bounds.weights import WeightSampler, log_weights, one_by_one
from pvae.analysis.figures.estimate import CONSERVATIVE, Estimate, Figures, Kind, over_draws, over_noisy_rows, refuse
from pvae.nn.schedules import LeanAdam
from pvae.pair import Pair, PairData
from pvae.util import Progress, Record, group, replace, seeds, silent

LEARNING_RATE = 0.1
"""Initial learning rate of Adam, in standard deviations of the guide; it falls to zero along a half cosine."""
OPTIMISED_SAMPLES = 4000
"""Largest number of samples (particles times rows) that the optimiser holds at once."""
MEASURED_SAMPLES = 20_000
"""Largest number of samples (samples times rows) in one run without gradients, for the ELBOs and log p(x)."""
OPTIMISE, CHOOSE, MEASURE, EVIDENCE = range(1, 5)
"""Numbers of the noise streams: the refined posterior is selected on other samples than its ELBO is measured on."""


class Gap(Figures):
    """Gaps between the ELBO and log p(x), nats per datum; `inference = approximation + amortisation`, exactly."""

    n: int
    """Number of data."""
    steps: int
    """Number of optimiser steps for every datum."""
    samples: int
    """Number of samples per datum from which the two ELBOs are estimated."""
    evidence_samples: int
    """Number of importance samples per datum for `log_p`."""
    log_p: Annotated[Estimate, "lower bound on log p(x), {0.evidence_samples} samples of the refined guide"]
    """Importance-weighted lower bound on log p(x) with the refined guide as its proposal."""
    refined_elbo: Annotated[Estimate, "ELBO of the best member of the variational family for every datum"]
    """L(q*): ELBO of the best member q* of the variational family that was found for every datum."""
    elbo: Annotated[Estimate, "ELBO of the guide"]
    """L(q): ELBO of the guide."""
    inference: Annotated[Estimate, "log_p - elbo = approximation + amortisation"]
    """log p(x) - L(q): sum of the two gaps."""
    approximation: Annotated[Estimate, "log_p - refined_elbo: a richer variational family could close it"]
    """log p(x) - L(q*): gap that only a richer variational family can close."""
    amortisation: Annotated[Estimate, "refined_elbo - elbo: a better encoder could close it"]
    """L(q*) - L(q): gap that a better encoder could close within the family."""
    per_datum: Mapping[str, Tensor]
    """Values of every datum by name, `(n,)`, float64 on the CPU: `log_p`, `refined_elbo`, `elbo`, `approximation`,
    `amortisation`, `inference`, nats, and `ess`, the effective sample size of the weights of `log_p`."""
    refined: float
    """Proportion of data whose refined posterior has a higher ELBO than the guide's; the others keep the guide's."""
    unconverged: float
    """Estimated mean gain, nats, that further steps of refinement would bring; part of the errors of `refined_elbo`,
    `amortisation` and `approximation`."""

    def to_dict(self) -> dict[str, Any]:
        ess = self.per_datum["ess"]
        return self.nested(ess_median=ess.median(), ess_min=ess.min())


def gap(
    pair: Pair, x: PairData, *, steps: int = 300, samples: int = 100, evidence_samples: int = 5000, particles: int = 8,
    seed: int = 0, on_progress: Progress = silent,
) -> Gap:  # fmt: skip
    r"""Split log p(x) - ELBO into approximation gap and amortisation gap.

    With L(q) = E_q[log p(x, z) - log q(z)],

        log p(x) - L(q) = [log p(x) - L(q*)] + [L(q*) - L(q)],

    where q* is found for every datum by gradient ascent on parameters of its own, starting at the guide: each
    latent N(m, s^2) becomes N(m + s a, (s exp b)^2), and a full-rank N(m, L L^T) becomes N(m + L a, (L B)(L B)^T), B
    lower triangular with a positive diagonal (so does a low-rank normal, whose q* may be of full rank); inside
    transforms (a flow, LogNormal) the base distribution is changed in this way. For a latent whose posterior depends on
    x alone, this is its whole family. If it depends on other latents, only shift and scale vary with the datum, and
    that dependence stays: L(q*) is then the best of a smaller family
    that contains the guide. The better of q* and q is kept for every datum, selected on other samples than the ELBOs
    are measured on.

    Warning: an imperfect optimum makes `amortisation` too small and `approximation` too large by about `unconverged`,
    which their errors include (so that they are up to twice the spread over seeds), and the bias of the bound on log
    p(x) makes `approximation` too small. A q* narrower than the posterior gives weights of large variance: see
    `per_datum["ess"]`, and `ais` for another bound.

    References:
        Inference Suboptimality in Variational Autoencoders (Cremer, Li, Duvenaud, 2018),
        https://arxiv.org/abs/1801.03558

    Arguments:
        pair: any Pyro pair whose guide is built on normals, diagonal or full-rank.
        x: data `(n, *event)`.
        steps: steps of Adam, for every datum.
        samples: samples per datum from which both ELBOs are estimated, with the same noise.
        evidence_samples: importance samples per datum for log p(x).
        particles: samples per datum in each step of Adam.
        seed: seed of the samples; the same seed gives the same numbers.
        on_progress: called with (steps done, steps in all), over all chunks of rows.

    Returns:
        Gap, nats per datum: `log_p` and the ELBOs are lower bounds; `amortisation` and `inference` are, in
        expectation, lower bounds of the gaps they are named after; `approximation` is an estimate.

    Raises:
        DataError: there are no rows, a count is below one, latents are global, or a latent is not built on a normal.

    Example:
        >>> from pvae.analysis.truths.example import example_pair
        >>> pair, x = example_pair()
        >>> found = gap(pair, x[:4], steps=5, samples=10, evidence_samples=20, particles=2)
        >>> abs(found.inference.value - found.approximation.value - found.amortisation.value) < 1e-9
        True
    """
    require_counts("gap", steps=steps, samples=samples, evidence_samples=evidence_samples, particles=particles)
    x = accept(pair, x, known=False)
    refuse(names := ", ".join(pair.layout.shared), f"gap: expected latents of single data only; got global {names}.")
    refuse(not pair.layout.latents, "refused.no_gap", names=pair.layout.enumerated)
    chunks = x.split(pair.structure.rows or max(1, OPTIMISED_SAMPLES // particles))
    plan = RefinePlan(steps, samples, evidence_samples, particles, seed, ais.counter(steps * len(chunks), on_progress))
    with quiet(pair, x, seed):
        require_likelihood(pair, "gap")

        def weights(x: Tensor, count: int) -> Tensor:
            """Return log weights with a plate of particles or, where the pair accepts none, of one run."""
            return log_weights(pair.terms(x, particles=count)).reshape(count, len(x))

        draw = weights if pair.way_of_particles(x) == "plate" else one_by_one(weights)
        return _assemble(group.dealt(len(chunks), lambda i: _measure(pair, chunks[i], draw, plan, i)), plan)


class RefinePlan(Record):
    """Settings of the refinement and of the measurements."""

    steps: int
    samples: int
    evidence_samples: int
    particles: int
    seed: int
    tick: Callable[[], None]

    def set_noise(self, chunk: int, stream: int, x: Tensor) -> None:
        """Seed the random number generator for one chunk of rows and one noise stream (`OPTIMISE` and so on)."""
        seeds.set_noise(seeds.mix(self.seed, seeds.ANALYSIS, 4 * chunk + stream), x.device)


def _sample(x: Tensor, samples: int, draw: WeightSampler) -> Tensor:
    """Return `samples` log weights of every row, `(samples, n)`, at most `MEASURED_SAMPLES` of all rows at a time."""
    most = max(1, MEASURED_SAMPLES // len(x))
    return torch.cat([draw(x, min(most, samples - done)) for done in range(0, samples, most)])


def _slopes(x: Tensor, handler: Refined, draw: WeightSampler, particles: int) -> list[Tensor]:
    """Return the gradients of the ELBOs of all rows with respect to `handler.free`, zero where they are not finite."""
    with torch.enable_grad(), handler:
        for t in handler.free:
            t.requires_grad_()
        found = torch.autograd.grad(draw(x, particles).mean(0).sum(), handler.free)
    for t in handler.free:
        t.requires_grad_(False)
    return [slope.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for slope in found]


def _optimise(x: Tensor, handler: Refined, draw: WeightSampler, plan: RefinePlan) -> None:
    """Maximise every row's ELBO over its own posterior parameters (`handler.free`, in place), model and encoder fixed.

    Rows do not affect each other: Adam is elementwise and the loss a sum.
    """
    optimiser = LeanAdam(handler.free)
    for step in range(plan.steps):
        downhill = [-slope for slope in _slopes(x, handler, draw, plan.particles)]
        optimiser.step(downhill, LEARNING_RATE * (1 + math.cos(math.pi * step / plan.steps)) / 2)
        plan.tick()


def _unconverged(x: Tensor, handler: Refined, draw: WeightSampler, particles: int) -> Tensor:
    """Return an estimate of the nats that each row's refined posterior still lacks of its best, `(n,)`.

    A natural-gradient step gains 1/2 g^T F^-1 g, with F = 1 for a shift in standard deviations and 2 for the logarithm
    of a scale; the product of two independent gradients has no bias by their noise.
    """
    slopes = [_slopes(x, handler, draw, particles) for _ in range(2)]
    axes = [member.axis for member in handler.members.values() for _ in member.free]
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for i, (axis, one, other) in enumerate(zip(axes, *slopes, strict=True)):
        total += (one.double() * other.double()).movedim(axis, 0).reshape(len(x), -1).sum(1) * (0.25 if i % 2 else 0.5)
    return total


def _measure(pair: Pair, x: Tensor, draw: WeightSampler, plan: RefinePlan, chunk: int) -> dict[str, Tensor]:
    """Refine the posteriors of a chunk of rows; return its ELBOs, log p(x) and inverse ess, float64 on the CPU."""
    handler = refined(pair, x)
    plan.set_noise(chunk, OPTIMISE, x)
    _optimise(x, handler, draw, plan)

    def both(stream: int) -> tuple[Tensor, Tensor]:
        plan.set_noise(chunk, stream, x)
        own = _sample(x, plan.samples, draw)
        plan.set_noise(chunk, stream, x)
        with handler:
            return own, _sample(x, plan.samples, draw)

    own, other = both(CHOOSE)
    better = other.mean(0) > own.mean(0)
    handler.keep(better)
    own, other = both(MEASURE)
    lacks = _unconverged(x, handler, draw, plan.particles)
    plan.set_noise(chunk, EVIDENCE, x)
    with handler:
        last = accumulate.accumulated(_sample(x, plan.evidence_samples, draw), torch.finfo(torch.float64).eps)
    found = {"elbo": own, "refined_elbo": other, "better": better.double(), "lacks": lacks}
    found |= {"log_p": last.log_p, "squared_error": last.squared_errors[-1], "ess": last.ess}
    return {name: t.cpu() for name, t in found.items()}


def _assemble(parts: list[dict[str, Tensor]], plan: RefinePlan) -> Gap:
    found = {name: torch.cat([part[name] for part in parts], -1) for name in parts[0]}
    own, other, log_p = (found[name] for name in ("elbo", "refined_elbo", "log_p"))
    error = float(found["squared_error"].sum().sqrt() / len(log_p))
    # one sample cannot separate noise from spread
    log_p_figure = over_noisy_rows(log_p, error if plan.evidence_samples > 1 else math.nan, "lower_bound")
    best, guide = other.mean(0), own.mean(0)
    data = {"log_p": log_p, "refined_elbo": best, "elbo": guide}
    data |= {"approximation": log_p - best, "amortisation": best - guide, "inference": log_p - guide}
    lacks = max(0.0, float(found["lacks"].mean()))
    refined_elbo, elbo = _with(over_draws(other, "lower_bound"), lacks), over_draws(own, "lower_bound")
    return Gap(
        *(len(log_p), plan.steps, plan.samples, plan.evidence_samples), log_p=log_p_figure, refined_elbo=refined_elbo,
        elbo=elbo, approximation=_difference(data["approximation"], log_p_figure, refined_elbo, "estimate"),
        amortisation=_with(over_draws(other - own, "lower_bound"), lacks),
        inference=_difference(data["inference"], log_p_figure, elbo, "lower_bound"),
        per_datum={**data, "ess": found["ess"]}, refined=float(found["better"].mean()), unconverged=lacks,
    )  # fmt: skip


def _with(estimate: Estimate, lacks: float) -> Estimate:
    """Return an estimate whose standard error includes what the refinement still lacks of its optimum."""
    return replace(estimate, standard_error=math.hypot(estimate.standard_error, lacks))


def _difference(values: Tensor, one: Estimate, other: Estimate, kind: Kind) -> Estimate:
    """Return the mean of `values` `(n,)`, the differences by datum of two estimates with independent noise."""
    note = CONSERVATIVE if CONSERVATIVE in (one.note, other.note) else ""
    return replace(over_noisy_rows(values, math.hypot(one.standard_error, other.standard_error), kind), note=note)
