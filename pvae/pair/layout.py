"""Layout of the traces of a pair: data plate, latent and observed sites, shapes of their values."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Self

from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution
from torch import Tensor

from pvae.component import Shape
from pvae.distributions import Certain, is_relaxed, twin, unwrapped as unwrapped
from pvae.errors import DeclarationError, misdeclared
from pvae.util import Record

RECORDS = frozenset({"_deterministic", "_embedded"})
"""Marks of sites that only record a value: `pyro.deterministic`, and the codebook vector of a nearest code (VQ)."""


Traces = tuple[poutine.Trace, poutine.Trace]
"""Trace of the guide on a batch, and that of the model replayed against it."""


class Layout(Record):
    """Names of the sites of a pair by role, and position of its data plate, read off its traces."""

    plate: str
    """Name of the data plate in the model."""
    plates: frozenset[str]
    """Names of the data plate in model and guide, which may differ."""
    dim: int
    """Batch dimension of the data plate (negative)."""
    nesting: int
    """Number of batch dimensions that plates use."""
    latents: tuple[str, ...]
    """Local latents: sites of the guide inside the data plate, in the order of the guide."""
    shared: tuple[str, ...]
    """Global latents: sites of the guide outside the data plate."""
    observed: tuple[str, ...]
    """Names of the observed sites of the model."""
    enumerated: tuple[str, ...] = ()
    """Discrete sites of the model alone, marked for enumeration: summed out exactly, with posterior by Bayes' rule."""
    expected: tuple[str, ...] = ()
    """Latents of the guide marked for enumeration, over which a loss takes the exact expectation of the ELBO."""
    scored: tuple[str, ...] = ()
    """Latents whose samples have no pathwise gradient, so that a loss needs the score-function gradient."""
    relaxed: tuple[str, ...] = ()
    """Relaxed discrete latents; analyses replace them by the discrete codes of the same logits."""
    eliminated: bool = False
    """True if the enumerated sites are summed out by Pyro's variable elimination: they then have no KL of their own."""
    factors: tuple[str, ...] = ()
    """Observed sites of the guide (`pyro.factor`): penalties of the training loss, no part of the ELBO."""

    def holds(self, node: Mapping[str, Any]) -> bool:
        """Return whether a site of a trace is inside the data plate."""
        return any(self.is_data(frame) for frame in node["cond_indep_stack"])

    def is_data(self, frame: poutine.indep_messenger.CondIndepStackFrame) -> bool:
        """Return whether a plate is the data plate, over the rows of a batch."""
        return frame.vectorized and frame.name in self.plates


def samples(trace: poutine.Trace) -> dict[str, Any]:
    """Return the sample sites of a trace by name.

    Subsample sites of plates, records (`pyro.deterministic`) and codebook vectors (VQ) are no sites of the joint.
    """
    nodes = [(name, node) for name, node in trace.nodes.items() if node["type"] == "sample"]
    records = {name for name, node in nodes if RECORDS.intersection(node["infer"] or ())}
    return {name: node for name, node in nodes if name not in records and not poutine.util.site_is_subsample(node)}


def plates_around(node: Mapping[str, Any]) -> list[tuple[poutine.indep_messenger.CondIndepStackFrame, int]]:
    """Return the vectorised plates around a site, and their sizes; that of a plate without a size is read off."""
    frames = [f for f in node["cond_indep_stack"] if f.vectorized]
    shape = node["fn"].batch_shape
    return [(f, f.size if f.size >= 0 else int(shape[f.dim]) if len(shape) >= -f.dim else 1) for f in frames]


def plates_of(trace: poutine.Trace, count: int) -> set[str]:
    """Return the names of the vectorised plates of size `count` in a trace."""
    return {f.name for node in samples(trace).values() for f, size in plates_around(node) if size == count}


def read_layout(guide_trace: poutine.Trace, model_trace: poutine.Trace, count: int, follows: Collection[str]) -> Layout:
    """Return the layout of a pair from traces on `count` rows; `follows` names the plates as large as the batch.

    Raises:
        DeclarationError: no observed site is inside a plate over the rows, or a global site is to be enumerated.
    """
    guide, model = samples(guide_trace), samples(model_trace)
    around = [(f, n) for n in model.values() for f, size in plates_around(n) if size == count and f.name in follows]
    first = next((node for _, node in around if node["is_observed"]), None)
    frame = min((f for f, node in around if node is first), key=lambda f: f.counter, default=None)  # the outermost
    if frame is None or frame.dim is None:
        raise DeclarationError.of("pair.layout.no_plate")
    dims = [f.dim for node in (*guide.values(), *model.values()) for f in node["cond_indep_stack"] if f.vectorized]
    beside = {f.name for f, _ in around if f.dim == frame.dim}  # over the rows as well
    known = {f.name for node in model.values() for f in node["cond_indep_stack"]}
    frames = [(f, size) for node in guide.values() for f, size in plates_around(node) if f.name not in known]
    plates = frozenset(beside | {f.name for f, size in frames if (f.dim, size) == (frame.dim, count)})
    unseen = {name: node for name, node in guide.items() if not node["is_observed"]}

    def inside(node: Mapping[str, Any]) -> bool:
        return any(f.vectorized and f.name in plates for f in node["cond_indep_stack"])

    enumerated = [name for name, node in model.items() if name not in guide and is_enumerable(node)]
    misdeclared(apart := [name for name in enumerated if not inside(model[name])], "pair.layout.outside", sites=apart)
    return Layout(
        plate=frame.name, plates=plates, dim=frame.dim, nesting=-min(dims),
        latents=tuple(name for name, node in unseen.items() if inside(node)),
        shared=tuple(name for name, node in unseen.items() if not inside(node)),
        observed=tuple(name for name, node in model.items() if node["is_observed"]), enumerated=tuple(enumerated),
        expected=tuple(name for name, node in unseen.items() if is_enumerable(node)),
        scored=tuple(name for name, node in unseen.items() if not is_enumerable(node) and needs_score(node["fn"])),
        relaxed=tuple(name for name, node in unseen.items() if is_relaxed(node["fn"]) and _has_twin(model.get(name))),
        factors=tuple(name for name in guide if name not in unseen),
    )  # fmt: skip


def joined(one: Layout, other: Layout) -> Layout:
    """Return the layout with the sites of both, each new one after the site that it followed.

    Raises:
        DeclarationError: a site changed its role, or the data plate its place.
    """
    roles = [f.name for f in fields(Layout) if f.type == tuple[str, ...]]
    merged: dict[str, Any] = {role: _in_order(getattr(one, role), getattr(other, role)) for role in roles}
    both = {name for role in ("latents", "shared", "observed", "enumerated") for name in merged[role]}
    if sum(len(merged[role]) for role in ("latents", "shared", "observed", "enumerated")) > len(both):
        raise DeclarationError("pair: expected every site in one role on every batch; got one that is observed in some")
    misdeclared((one.dim, one.plate) != (other.dim, other.plate), "pair.layout.moved", one=one, other=other)
    plates, nesting = one.plates | other.plates, max(one.nesting, other.nesting)
    eliminated = one.eliminated or other.eliminated or one.enumerated != merged["enumerated"]
    return replace(one, **merged, plates=plates, nesting=nesting, eliminated=eliminated)


def _in_order(one: Sequence[str], other: Sequence[str]) -> tuple[str, ...]:
    """Return the names of both sequences, each name of the other after the one that it follows there."""
    merged = list(one)
    for i, name in enumerate(other):
        if name not in merged:
            merged.insert(merged.index(other[i - 1]) + 1 if i else 0, name)
    return tuple(merged)


def _has_twin(prior: Mapping[str, Any] | None) -> bool:
    """Return whether the prior of a relaxed latent has a discrete counterpart as well."""
    return prior is None or twin(prior["fn"]) is not prior["fn"]


def is_enumerable(node: Mapping[str, Any]) -> bool:
    """Return whether a latent site is marked for parallel enumeration and its distribution has finite support."""
    return node["infer"].get("enumerate") == "parallel" and not node["is_observed"] and node["fn"].has_enumerate_support


def needs_score(fn: Any) -> bool:
    """Return whether a distribution needs a score-function gradient: it has no rsample and is not deterministic."""
    return not fn.has_rsample and not isinstance(unwrapped(fn), Certain)


def is_point(fn: Any) -> bool:
    """Return whether a distribution is a point mass (Delta), masked or not."""
    fn = unwrapped(fn)
    return is_point(fn.base_dist) if isinstance(fn, MaskedDistribution) else isinstance(fn, Delta)


class SiteShape(Record):
    """Position of the row dimension in a site's value, and the shapes to its left and right."""

    left: Shape
    """Shape of the batch dimensions left of the row dimension."""
    right: Shape
    """Shape of the batch dimensions right of the row dimension, then of the event."""
    batch: int
    """Number of batch dimensions, including that of the rows."""

    @property
    def numel(self) -> int:
        """Number of elements of the value in one row."""
        return math.prod(self.left) * math.prod(self.right)

    def flatten(self, value: Tensor) -> Tensor:
        """Return a site's value as `(rows, numel)`."""
        return value.movedim(len(self.left), 0).reshape(value.shape[len(self.left)], -1)

    def spread(self, flat: Tensor, nesting: int = 0) -> Tensor:
        """Return flat values `([particles,] rows, numel)` in the site's shape; particles go left of all plates."""
        lead = flat.shape[:-2]
        ones = (1,) * (nesting - self.batch) if lead else ()
        at = len(lead) + len(ones)
        return flat.reshape(*lead, *ones, flat.shape[-2], *self.left, *self.right).movedim(at, at + len(self.left))

    @classmethod
    def of(cls, shape: Shape, fn: Any, layout: Layout) -> Self:
        """Return the site shape of values of shape `shape`, sampled from the distribution `fn`."""
        event = len(fn.event_shape)
        axis = len(shape) - event + layout.dim
        return cls(tuple(shape[:axis]), tuple(shape[axis + 1 :]), len(shape) - event)


def site_shape(node: Mapping[str, Any], layout: Layout) -> SiteShape:
    """Return the site shape (position of the rows) of the value of a traced site."""
    return SiteShape.of(node["value"].shape, node["fn"], layout)
