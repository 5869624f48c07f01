"""Unpacked latents: sites of a guide set by a Delta to a transform of an auxiliary site, as AutoGuides write them.

`AutoNormal`, `AutoLowRankMultivariateNormal`, `EasyGuide` and others sample an unconstrained auxiliary site a and set
z = T(a) by `Delta(z, log_density)`, whose density is minus the log Jacobian of T: log q(z) = log q(a) + log_density.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.trace_struct import Trace
from torch.distributions import biject_to
from torch.distributions.transforms import ComposeTransform, IndependentTransform, Transform, identity_transform

from pvae.pair.layout import is_point, samples

TOLERANCE = 1e-3
"""Largest difference, nats relative to 1 + size, of the two ways to score an unpacked latent."""


@dataclass(frozen=True)
class Unpacking:
    """Auxiliary site of one latent, and the transform from its values to those of the latent."""

    auxiliary: str
    transform: Transform

    @property
    def is_identity(self) -> bool:
        """True if latent and auxiliary site have the same values."""
        inner = self.transform
        while isinstance(inner, IndependentTransform):
            inner = inner.base_transform
        return inner == identity_transform or (isinstance(inner, ComposeTransform) and not inner.parts)


Unpacked = Mapping[str, Unpacking]
"""Unpacked latents of a guide that have an auxiliary site of their own, by name."""


def read_unpacked(guide_trace: Trace, model_trace: Trace) -> dict[str, Unpacking]:
    """Return the unpacked latents of a guide, each with one auxiliary site of its own, checked by their densities."""
    guide, model = samples(guide_trace), samples(model_trace)
    auxiliary = {n: node for n, node in guide.items() if node["infer"].get("is_auxiliary") and not node["is_observed"]}
    found: dict[str, Unpacking] = {}
    for name, node in guide.items():
        if name in auxiliary or name not in model or not is_point(node["fn"]):
            continue
        for other, source in auxiliary.items():
            made = _explained(other, source, node, model[name]["fn"])
            if made is not None:
                found[name] = made
    used = [made.auxiliary for made in found.values()]
    return {name: made for name, made in found.items() if used.count(made.auxiliary) == 1}


def _explained(name: str, source: Any, node: Any, prior: Any) -> Unpacking | None:
    """Return the unpacking of an auxiliary site `name` into a Delta site; None unless value and density agree."""
    try:
        made = Unpacking(name, biject_to(prior.support))
        if not torch.equal(made.transform(source["value"]), node["value"]):
            return None
        one = _pushed(source["fn"], made).log_prob(node["value"])
        other = source["fn"].log_prob(source["value"]) + node["fn"].log_prob(node["value"])
        same = one.shape == other.shape and bool(((one - other).abs() <= TOLERANCE * (1 + other.abs())).all())
    except Exception:  # a discrete support, or a transform of another shape
        return None
    return made if same else None


def possibly_spread(guide_trace: Trace, model_trace: Trace) -> list[str]:
    """Return the Delta latents of a guide that has auxiliary sites which are no points, and so may move with these.

    `AutoDiagonalNormal` samples all latents as one vector, `AutoStructured` shifts one latent by another, a group of an
    `EasyGuide` is one vector of several. Such latents are no points: the auxiliary sites have their density, the log
    densities of the Deltas the Jacobians. A second draw of the guide tells.
    """
    guide, model = samples(guide_trace), samples(model_trace)
    helpers = [n for n in guide.values() if n["infer"].get("is_auxiliary") and not n["is_observed"]]  # no factors
    if all(is_point(node["fn"]) for node in helpers):
        return []
    return [name for name, node in guide.items() if name in model and is_point(node["fn"])]


def _pushed(fn: Any, made: Unpacking) -> Any:
    return fn if made.is_identity else dist.TransformedDistribution(fn, [made.transform])


def unpack(guide_trace: Trace, unpacked: Unpacked) -> Trace:
    """Return a trace of a guide in which unpacked latents have the transformed distribution of their auxiliary site."""
    if not unpacked:
        return guide_trace
    trace = guide_trace.copy()
    for name, made in unpacked.items():
        if name in trace.nodes and made.auxiliary in trace.nodes:
            fn = _pushed(trace.nodes[made.auxiliary]["fn"], made)
            trace.nodes[name] = {**trace.nodes[name], "fn": fn, "infer": {}}
    for made in unpacked.values():
        if made.auxiliary in trace.nodes:
            trace.remove_node(made.auxiliary)
    return trace
