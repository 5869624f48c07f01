"""Terms: the parts of a batch's ELBO, from a trace of each program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pvae.errors import DeclarationError
from pvae.pair.densities import closed_kl, full_size, log_prob, plate_scale, priced_kl, sum_over
from pvae.pair.enumeration import read_joint_states, require_summable
from pvae.pair.layout import Layout, samples


@dataclass(frozen=True)
class Terms:
    """The parts of a batch's ELBO, nats; a leading dimension `particles` where more than one sample was asked for."""

    reconstruction: Tensor
    """log p(x | z), `(batch,)`."""
    kl: dict[str, Tensor]
    """log q - log p (or its closed form) of every latent, `(batch,)`; a global latent's divided by n, `(1,)`."""
    penalties: dict[str, Tensor] = field(default_factory=dict)
    """Terms that are added to the loss and are no part of the ELBO, `(batch,)`."""
    scores: dict[str, Score] = field(default_factory=dict)
    """Score-function terms of every latent whose sample carries no gradient."""

    @cached_property
    def means(self) -> list[Tensor]:
        """Batch means of the reconstruction, then of every KL: taken once, for the loss and the metrics."""
        return [self.reconstruction.mean(), *(kl.mean() for kl in self.kl.values())]


@dataclass(frozen=True)
class Score:
    """Score-function gradient of a latent's sample: E[(gain - baseline) grad log q], or as `IWAE` says."""

    log_q: Tensor
    """log q of the sample, `(batch,)`, with its gradient and without the scale of poutine.scale."""
    weighed: Tensor
    """The same times the weight of its site (`poutine.scale`), as the latent's own KL holds it, without gradient."""
    own_kl: bool
    """True where the gain holds the latent's own KL; False where that KL is in closed form."""
    baseline: Tensor | None
    """Baseline subtracted from the gain, `(batch,)` or a number; None for none."""
    learns: bool
    """True where the baseline has parameters, which are fitted to the gain."""
    note: Callable[[Tensor], None]
    """Called with the gain, to update a moving-average baseline."""


def terms_of(
    guide_trace: Trace, model_trace: Trace, layout: Layout, particles: int, closed_form: bool, rows: int | None
) -> Terms:
    """Return the terms of a batch from one sample of every latent; `particles` is 0 where there is no such plate."""
    size = full_size(model_trace, layout, rows)
    if layout.enumerated:
        return _summed_terms(guide_trace, model_trace, layout, particles, size)
    reconstruction = sum_over([log_prob(model_trace.nodes[name], layout, particles, size) for name in layout.observed])
    kl: dict[str, Tensor] = {}
    scores: dict[str, Score] = {}
    for name in (*layout.latents, *layout.shared):
        q, p = guide_trace.nodes[name], model_trace.nodes.get(name)
        known = _known_kl(q, p, layout, particles, size, closed_form)
        scored = name in layout.scored or name in layout.expected
        if scored or known is None:
            log_q = log_prob(q, layout, particles, size)
        if scored:
            scores[name] = _score(q, layout, particles, log_q, known is None)
            log_q = log_q.detach()
        if known is None:
            known = log_q - (0.0 if p is None else log_prob(p, layout, particles, size))
        kl[name] = known
    return Terms(reconstruction, kl, penalties_of(guide_trace), scores)


def expected_terms(
    guide_trace: Trace, model_trace: Trace, layout: Layout, particles: int, closed_form: bool, rows: int | None
) -> Terms:
    """Return E_q(c|x) of every term, by the sum over all joint states c of the latents that are marked for it."""
    if layout.enumerated:
        raise DeclarationError(
            f"{', '.join(layout.expected)}: expected draws beside {', '.join(layout.enumerated)}, which the model "
            f"sums out given them; got a sum over their states too. Set estimator = 'score', or relax them."
        )
    for name in layout.expected:
        require_summable(name, guide_trace.nodes[name], layout)
    size = full_size(model_trace, layout, rows)
    log_q = [log_prob(guide_trace.nodes[name], layout, particles) for name in layout.expected]
    weights = sum_over(log_q).exp()
    width = 2 if particles else 1

    def mean(value: Tensor) -> Tensor:
        total = weights * value
        total = total.sum(tuple(range(total.dim() - width)))
        return total.expand(particles, -1) if particles else total

    observed = sum_over([log_prob(model_trace.nodes[name], layout, particles, size) for name in layout.observed])
    kl: dict[str, Tensor] = {}
    for name in (*layout.latents, *layout.shared):
        q, p = guide_trace.nodes[name], model_trace.nodes.get(name)
        known = _known_kl(q, p, layout, particles, size, closed_form)
        if name in layout.scored:
            raise DeclarationError(
                f"{name}: expected a draw with a gradient, or a sum over its states too, beside "
                f"{', '.join(layout.expected)}, which are summed over; got a score function."
            )
        if known is None:
            known = _sampled_kl(q, p, layout, particles, size)
        kl[name] = mean(known) if name in layout.latents else known
    return Terms(mean(observed), kl, penalties_of(guide_trace))


def _summed_terms(guide_trace: Trace, model_trace: Trace, layout: Layout, particles: int, size: int) -> Terms:
    """Return terms in expectation under p(c | x, z) of the enumerated sites.

    Their sum is log sum_c p(x, z, c) - log q. The KL of a relaxed latent that is priced by its codes stands in the
    place of its own part of the sum.
    """
    table = read_joint_states(samples(model_trace), layout, particles)
    kl, scores = {}, {}
    for name in layout.latents:
        log_q = log_prob(guide_trace.nodes[name], layout, particles)
        if name in layout.scored:
            scores[name] = _score(guide_trace.nodes[name], layout, particles, log_q, own_kl=True)
            log_q = log_q.detach()
        priced = _known_kl(guide_trace.nodes[name], model_trace.nodes.get(name), layout, particles, size, False)
        if priced is None:
            priced = log_q - (table.expected(name) if name in table.logs else 0.0)
        kl[name] = priced
    for name in layout.shared:
        kl[name] = _sampled_kl(guide_trace.nodes[name], model_trace.nodes.get(name), layout, particles, size)
    observed = [
        table.expected(name) if name in table.logs else log_prob(model_trace.nodes[name], layout, particles, size)
        for name in layout.observed
    ]
    return Terms(sum_over(observed), {**kl, **table.kl()}, penalties_of(guide_trace), scores)


def _known_kl(
    q: Mapping[str, Any], p: Mapping[str, Any] | None, layout: Layout, particles: int, size: int, closed_form: bool
) -> Tensor | None:
    """Return the KL of a site where it is not log q - log p at a sample; else None."""
    if p is None:
        return None
    priced = priced_kl(q, p, layout, particles)
    return closed_kl(q, p, layout, particles, size) if priced is None and closed_form else priced


def _sampled_kl(q: Mapping[str, Any], p: Mapping[str, Any] | None, layout: Layout, particles: int, size: int) -> Tensor:
    """Return log q - log p of a site at its sample; log q alone where the model has no such site."""
    return log_prob(q, layout, particles, size) - (0.0 if p is None else log_prob(p, layout, particles, size))


def _score(node: Mapping[str, Any], layout: Layout, particles: int, weighed: Tensor, own_kl: bool) -> Score:
    """Read the score-function term of a site off its `infer`, as Pyro's `TraceGraph_ELBO` does."""
    infer, scale = node["infer"], plate_scale(node)
    usual = node["scale"].__class__ is float and node["scale"] == scale
    log_q = weighed if usual else log_prob({**node, "scale": scale}, layout, particles)
    told, average = infer.get("baseline", {}), infer.get("average")
    baseline = told.get("baseline_value")
    if "nn_baseline" in told:
        baseline = told["nn_baseline"](told["nn_baseline_input"].detach())
    learns = baseline is not None and baseline.requires_grad
    return Score(log_q, weighed, own_kl, baseline, learns, _no_average if average is None else average.note)


def _no_average(_gain: Tensor) -> None:
    """Do nothing: the latent has no moving-average baseline."""


def penalties_of(guide_trace: Trace) -> dict[str, Tensor]:
    """Return the penalties that sites of a guide declare in `infer["penalties"]`, named `<site>/<penalty>`."""
    out: dict[str, Tensor] = {}
    for name, node in guide_trace.nodes.items():
        infer: Any = node["infer"] if node["type"] == "sample" else {}
        if "penalties" in infer:
            out |= {f"{name.removesuffix('/embedded')}/{what}": v for what, v in infer["penalties"].items()}
    return out
