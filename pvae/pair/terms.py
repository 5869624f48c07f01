"""Terms of the ELBO of a batch (log-likelihood, KLs, penalties, score functions), from one trace of each program."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pvae.distributions.exact import log_density
from pvae.errors import DeclarationError
from pvae.pair.densities import closed_kl, full_size, log_prob, plate_scale, priced_kl, share, sum_over
from pvae.pair.enumeration import Expectations, eliminated, read_joint_states, require_expectable
from pvae.pair.layout import Layout, is_point, samples


@dataclass(frozen=True)
class Terms:
    """Terms of the ELBO of a batch, nats; with several samples per row they have a leading dimension `particles`."""

    reconstruction: Tensor
    """Log-likelihood log p(x | z) of every row, `(batch,)`."""
    kl: dict[str, Tensor]
    """KL of every latent by name, log q - log p or closed form, `(batch,)`; of a global one divided by n, `(1,)`."""
    penalties: dict[str, Tensor] = field(default_factory=dict)
    """Penalties added to the loss beside the ELBO, such as the commitment loss of VQ-VAE, `(batch,)`."""
    scores: dict[str, Score] = field(default_factory=dict)
    """Score-function terms of every latent whose sample carries no gradient."""

    closed: Callable[[str], Tensor | None] = lambda _: None
    """Function that returns the closed-form KL of a latent that `kl` estimates from samples; None if there is none."""

    def figures(self, closed: Collection[str]) -> list[Tensor]:
        """Return `means` as metrics, without gradient: KLs of the latents `closed` in closed form where it exists."""
        with torch.no_grad():
            known = [self.closed(name) if name in closed else None for name in self.kl]
            pairs = zip(self.means[1:], known, strict=True)
            return [self.means[0], *(mean if value is None else _apart(value, mean) for mean, value in pairs)]

    @cached_property
    def means(self) -> list[Tensor]:
        """Batch means of the reconstruction, then of every KL; cached, as loss and metrics both use them."""
        return [self.reconstruction.mean(), *(kl.mean() for kl in self.kl.values())]


def _apart(kl: Tensor, estimate: Tensor) -> Tensor:
    """Return the mean of closed-form KLs, at least 0 despite rounding, or the estimate where they are infinite."""
    mean = kl.mean()
    return torch.where(mean.isfinite(), mean.clamp(min=0), estimate)


@dataclass(frozen=True)
class Score:
    """Ingredients of the score-function gradient of a latent, E[(gain - baseline) grad log q] for the ELBO."""

    log_q: Tensor
    """Log density log q of the sample, `(batch,)`, with gradient and without the scale of poutine.scale."""
    weighed: Tensor
    """Log density log q of the sample times the scale of its site (poutine.scale), as it enters the latent's KL."""
    own_kl: bool
    """True if the gain includes the latent's own KL term; False if that KL is in closed form."""
    baseline: Tensor | None
    """Baseline subtracted from the gain, `(batch,)` or a scalar; None without a baseline."""
    learns: bool
    """True if the baseline has parameters (a network), which are fitted to the gain."""
    note: Callable[[Tensor], None]
    """Callback that receives the gain and updates a moving-average baseline, if there is one."""


def terms_of(
    guide_trace: Trace, model_trace: Trace, layout: Layout, particles: int, closed_form: bool, rows: int | None
) -> Terms:
    """Return the ELBO terms of a batch from traces of guide and model; `particles` is 0 without a particle plate."""
    size = full_size(model_trace, layout, rows)
    if layout.enumerated:
        return _summed_terms(guide_trace, model_trace, layout, particles, size)
    observed = [model_trace.nodes[name] for name in layout.observed if name in model_trace.nodes]
    reconstruction = sum_over([log_prob(node, layout, particles, size) for node in observed])
    kl: dict[str, Tensor] = {}
    scores: dict[str, Score] = {}
    for name in (*layout.latents, *layout.shared):
        if name not in guide_trace.nodes:  # a batch without this site
            kl[name] = torch.zeros_like(reconstruction)
            continue
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
    scores |= _scores_of_factors(guide_trace, layout, particles, size)
    penalties = penalties_of(guide_trace, layout, particles, size)

    def closed(name: str) -> Tensor | None:
        q, p = guide_trace.nodes.get(name), model_trace.nodes.get(name)
        if closed_form or q is None or p is None or is_point(q["fn"]) or priced_kl(q, p, layout, particles) is not None:
            return None  # the term itself is what there is
        return closed_kl(q, p, layout, particles, size)

    return Terms(reconstruction, kl, penalties, scores, closed)


def expected_terms(
    guide_trace: Trace, model_trace: Trace, layout: Layout, particles: int, closed_form: bool, rows: int | None
) -> Terms:
    """Return the ELBO terms in expectation under q(c|x), summed over all joint states c of the enumerated latents.

    In rows where a mask hides c (a label that is known), it has no KL, but is drawn as in other rows: the states are
    weighed by q(c|x) there too.
    """
    if layout.enumerated:
        raise DeclarationError(
            f"{', '.join(layout.expected)}: expected draws beside {', '.join(layout.enumerated)}, which the model "
            f"sums out given them; got a sum over their states too. Set estimator = 'score', or relax them."
        )
    summed = [name for name in layout.expected if name in guide_trace.nodes]  # a batch may lack some
    for name in summed:
        require_expectable(name, guide_trace.nodes[name], layout)
    for name in _scores_of_factors(guide_trace, layout, particles, 1):
        raise DeclarationError(
            f"{name}: expected pyro.factor(..., has_rsample=True) in a guide whose {', '.join(layout.expected)} are "
            f"summed over, where nothing is sampled that a score function could belong to; got has_rsample=False."
        )
    size = full_size(model_trace, layout, rows)
    if not summed:
        return terms_of(guide_trace, model_trace, layout, particles, closed_form, rows)
    states = Expectations(guide_trace, layout, particles)

    def mean(node: Mapping[str, Any]) -> Tensor:
        value = states.mean(log_density(node["fn"], node["value"]), node["mask"], str(node["name"]))
        return wide(share({**node, "mask": None}, value, layout, particles, size))

    def wide(value: Tensor) -> Tensor:
        return value.expand(particles, -1) if particles else value

    observed = sum_over([mean(model_trace.nodes[name]) for name in layout.observed if name in model_trace.nodes])
    kl: dict[str, Tensor] = {}
    for name in (*layout.latents, *layout.shared):
        if name not in guide_trace.nodes:
            kl[name] = torch.zeros_like(observed)
            continue
        q, p = guide_trace.nodes[name], model_trace.nodes.get(name)
        if name in layout.scored:
            raise DeclarationError(
                f"{name}: expected a draw with a gradient, or a sum over its states too, beside "
                f"{', '.join(layout.expected)}, which are summed over; got a score function."
            )
        known = _known_kl(q, p, layout, particles, size, closed_form and layout.nesting == 1)
        if name in layout.shared:
            kl[name] = _sampled_kl(q, p, layout, particles, size) if known is None else known
        elif known is None:
            kl[name] = mean(q) - (0.0 if p is None else mean(p))
        else:
            kl[name] = wide(states.mean(known, None, name))
    penalties = penalties_of(guide_trace, layout, particles, size)
    return Terms(
        observed, kl, {n: mean(guide_trace.nodes[n]) if n in layout.factors else v for n, v in penalties.items()}
    )


def _summed_terms(guide_trace: Trace, model_trace: Trace, layout: Layout, particles: int, size: int) -> Terms:
    """Return the ELBO terms in expectation under p(c | x, z), for discrete sites c that the model sums out.

    Their combination is log sum_c p(x, z, c) - log q(z | x), except that a relaxed latent with the categorical KL
    contributes that KL instead of log q - log p at its sample.
    """
    if layout.eliminated:
        return _eliminated_terms(guide_trace, model_trace, layout, particles, size)
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
    scores |= _scores_of_factors(guide_trace, layout, particles, size)
    return Terms(sum_over(observed), {**kl, **table.kl()}, penalties_of(guide_trace, layout, particles, size), scores)


def _eliminated_terms(guide_trace: Trace, model_trace: Trace, layout: Layout, particles: int, size: int) -> Terms:
    """Return the ELBO terms with enumerated sites summed out by elimination.

    The reconstruction holds log sum_c of all factors that depend on c; the KL of a latent whose prior is among them is
    log q alone.
    """
    total, names = eliminated(model_trace, layout, particles)
    plain = [name for name in layout.observed if name not in names and name in model_trace.nodes]
    observed = [log_prob(model_trace.nodes[name], layout, particles, size) for name in plain]
    kl, scores = {}, {}
    for name in (*layout.latents, *layout.shared):
        if name not in guide_trace.nodes:  # a batch without this site
            kl[name] = torch.zeros_like(sum_over([total, *observed]))
            continue
        q, p = guide_trace.nodes[name], None if name in names else model_trace.nodes.get(name)
        log_q = log_prob(q, layout, particles, size)
        if name in layout.scored:
            scores[name] = _score(q, layout, particles, log_q, own_kl=True)
            log_q = log_q.detach()
        kl[name] = log_q if p is None else log_q - log_prob(p, layout, particles, size)
    scores |= _scores_of_factors(guide_trace, layout, particles, size)
    penalties = penalties_of(guide_trace, layout, particles, size)
    return Terms(sum_over([total, *observed]), kl, penalties, scores)


def _known_kl(
    q: Mapping[str, Any], p: Mapping[str, Any] | None, layout: Layout, particles: int, size: int, closed_form: bool
) -> Tensor | None:
    """Return the categorical KL of a relaxed site, or a closed-form KL if asked for; None if neither exists."""
    if p is None:
        return None
    priced = priced_kl(q, p, layout, particles)
    return closed_kl(q, p, layout, particles, size) if priced is None and closed_form else priced


def _sampled_kl(q: Mapping[str, Any], p: Mapping[str, Any] | None, layout: Layout, particles: int, size: int) -> Tensor:
    """Return log q - log p of a site at its sample, nats; log q alone if the model has no such site."""
    return log_prob(q, layout, particles, size) - (0.0 if p is None else log_prob(p, layout, particles, size))


def _score(node: Mapping[str, Any], layout: Layout, particles: int, weighed: Tensor, own_kl: bool) -> Score:
    """Return the score-function term of a site, its baseline read from `infer` as in Pyro's `TraceGraph_ELBO`."""
    infer, scale = node["infer"], plate_scale(node)
    usual = node["scale"].__class__ is float and node["scale"] == scale and node["mask"] is None
    log_q = weighed if usual else log_prob({**node, "scale": scale, "mask": None}, layout, particles)  # as in Pyro
    told, average = infer.get("baseline", {}), infer.get("average")
    baseline = told.get("baseline_value")
    if "nn_baseline" in told:
        baseline = told["nn_baseline"](told["nn_baseline_input"].detach())
    learns = baseline is not None and baseline.requires_grad
    return Score(log_q, weighed, own_kl, baseline, learns, _no_average if average is None else average.note)


def _scores_of_factors(guide_trace: Trace, layout: Layout, particles: int, size: int) -> dict[str, Score]:
    """Return the score-function terms of the observed sites of a guide that have no pathwise gradient."""
    scores = {}
    for name in layout.factors:
        node: Any = guide_trace.nodes.get(name)
        if node is not None and not node["fn"].has_rsample:
            log_q = log_prob({**node, "mask": None}, layout, particles, size)
            scores[name] = Score(log_q, log_q, True, None, False, _no_average)
    return scores


def _no_average(_gain: Tensor) -> None:
    """Do nothing: the latent has no moving-average baseline."""


def penalties_of(guide_trace: Trace, layout: Layout, particles: int, size: int) -> dict[str, Tensor]:
    """Return the penalties of a guide by name: those in `infer["penalties"]` of a site, and its observed sites.

    An observed site of the guide, such as `pyro.factor`, enters the loss of `Trace_ELBO` as log q, as here, but is no
    part of a bound on log p(x). Without `has_rsample` its gradient is that of a score function, again as there.
    """
    out: dict[str, Tensor] = {}
    for name, node in guide_trace.nodes.items():
        infer: Any = node["infer"] if node["type"] == "sample" else {}
        if "penalties" in infer:
            out |= {f"{name.removesuffix('/embedded')}/{what}": v for what, v in infer["penalties"].items()}
    for name in layout.factors:
        factor: Any = guide_trace.nodes.get(name)
        if factor is not None:
            value = log_prob(factor, layout, particles, size)
            out[name] = value if factor["fn"].has_rsample else value.detach()  # as in Trace_ELBO
    return out
