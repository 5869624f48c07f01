"""Estimators of the gradient of latents with pathwise samples: log q without its score, and weighted samples."""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pvae.errors import misdeclared
from pvae.pair.densities import masks_of, plate_scale
from pvae.pair.layout import is_point, samples, unwrapped
from pvae.pair.running import modules_within, run_one
from pvae.pair.structure import unpack
from pvae.pair.terms import Nodes, Terms, terms_of
from pvae.util import Record, replace

if TYPE_CHECKING:
    from pvae.pair.pair import Pair


class Estimator(Record):
    """Estimator of the gradient of the terms of a batch, whose values do not depend on it.

    The score of a latent, the derivative of log q(z | ...) by the parameters of q at a fixed sample, has expectation 0.
    Without it, log q passes a gradient to its sample and to the samples that it is conditioned on, and through these
    alone to the parameters of q.
    """

    stopped: Collection[str] | None = None
    """Latents whose score is left out; None for all."""
    passed: Callable[[Terms], Tensor] | None = None
    """Function from terms to factors `(particles, batch)` of the gradient that each sample passes on; None for 1."""
    apart: bool = False
    """True to compute `Terms.of_model` as well, by another run of the model."""


def pathwise_terms(pair: "Pair", x: Tensor, particles: int, rows: int | None, estimator: Estimator) -> Terms:
    """Return the terms of a batch, as `Pair.terms` does, with the gradient of an estimator.

    The factors of `Estimator.passed` are found by a run of the model without gradients. With several latents, whose
    posteriors may read samples of others, the guide runs once more, at samples without a gradient.

    Raises:
        DeclarationError: the estimator is biased for this pair, or does not exist.
    """
    layout = pair.layout
    reads = len((*layout.latents, *layout.shared)) > 1
    names = (*layout.latents, *layout.shared) if estimator.stopped is None else tuple(estimator.stopped)

    def at(change: Callable[[Mapping[str, Any]], Tensor]) -> Trace:
        """Return the trace of the guide at samples of the same values, with the distributions given these."""
        copy: Any = drawn.copy()
        for name, node in samples(drawn).items():
            copy.nodes[name] = node if node["is_observed"] else {**node, "value": change(node)}
        return run_one(pair, pair.guide, x, particles, copy) if reads else copy

    def scored(guide: Trace, still: Nodes) -> Terms:
        traces = pair.known(x, guide, run_one(pair, pair.model, x, particles, guide))
        return terms_of(traces, layout, particles if particles > 1 else 0, False, rows, still)

    with pair.own_store():
        drawn = guide = run_one(pair, pair.guide, x, particles)
        sites = unpack(drawn, pair.structure.unpacked)
        asked = names, estimator.passed is None, estimator.apart
        pair.remember(f"estimator {asked}", asked, lambda: _require(pair, sites, names, estimator))
        if estimator.passed is not None:
            with torch.no_grad():
                factors = estimator.passed(scored(drawn, {}))
            guide = at(lambda node: _partly(node, factors, layout.nesting, layout.dim))
        fixed = at(lambda node: node["value"].detach())
        still = unpack(fixed, pair.structure.unpacked).nodes
        found = scored(guide, {name: still[name] for name in names if name in still})
        return replace(found, of_model=scored(fixed, still)) if estimator.apart else found


def _partly(node: Mapping[str, Any], factors: Tensor, nesting: int, dim: int) -> Tensor:
    """Return the value of a site, which passes on the gradient times `factors` `(particles, batch)`."""
    value, shape = node["value"], [1] * node["value"].dim()
    right = value.dim() - len(node["fn"].event_shape)
    shape[right - nesting - 1], shape[right + dim] = factors.shape
    return value.detach() + factors.reshape(shape) * (value - value.detach())


def _require(pair: "Pair", guide: Trace, names: Collection[str], estimator: Estimator) -> None:
    """Check that an estimator exists for the latents `names` of a pair, and has no bias.

    Raises:
        DeclarationError: the message says what is against it.
    """
    layout = pair.layout
    nodes: dict[str, Any] = {name: guide.nodes[name] for name in names if name in guide.nodes}
    weighed = estimator.passed is not None
    again = weighed or estimator.apart
    several = len((*layout.latents, *layout.shared)) > 1
    modules = [pair, *modules_within([pair.model, pair.guide])] if again or several else []
    against = {
        "unknown": [name for name in names if name not in (*layout.latents, *layout.shared)],
        "summed": layout.expected,
        "determined": pair.structure.determined,
        "sample": [z for z, n in nodes.items() if not n["fn"].has_rsample or is_point(n["fn"]) or _moves(n["fn"])],
        "scored": layout.scored if weighed else (),
        "masked": [z for z, n in nodes.items() if weighed and (masks_of(n) or n["scale"] != plate_scale(n))],
        "bounds": sorted(pair.structure.bounds) if again else (),
        "noise": [p for m in modules for p in m.modules() if isinstance(p, nn.modules.dropout._DropoutNd) and p.p],
    }
    kind = "doubly_reparameterised" if weighed else "stick_the_landing" if names else "partially"
    for reason, found in against.items():
        misdeclared(found, "pair.pathwise.refused", reason=reason, names=[*found], kind=kind)


def _moves(fn: Any) -> bool:
    """Return whether the support of a distribution moves with its parameters, so that its score has another mean."""
    with suppress(NotImplementedError, AttributeError):
        support = vars(unwrapped(fn).support).values()
        return any(isinstance(edge, Tensor) and edge.requires_grad for edge in support)
    return False
