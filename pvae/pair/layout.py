"""Layout of a pair's traces, whatever its sites are called: plates, latents, shapes of values."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pyro import poutine
from pyro.distributions import Delta, ExpandedDistribution, MaskedDistribution
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Independent

from pvae.component import Shape
from pvae.distributions.codes import Certain
from pvae.distributions.relaxed import is_relaxed
from pvae.errors import DeclarationError


@dataclass(frozen=True)
class Layout:
    """Names and places of the sites of a pair, read off its traces."""

    plate: str
    """Name of the data plate in the model."""
    plates: frozenset[str]
    """Names of the data plate on both sides: model and guide may call it differently."""
    dim: int
    """Batch dimension of the data plate (negative)."""
    nesting: int
    """Number of batch dimensions that plates use."""
    latents: tuple[str, ...]
    """Sites of the guide inside the data plate, in the guide's order."""
    shared: tuple[str, ...]
    """Sites of the guide outside it: global latents."""
    observed: tuple[str, ...]
    """Observed sites of the model."""
    enumerated: tuple[str, ...] = ()
    """Discrete sites of the model alone, marked for enumeration: summed out, and inferred by Bayes."""
    expected: tuple[str, ...] = ()
    """Latents of the guide marked for enumeration: a loss takes the ELBO in expectation over them."""
    scored: tuple[str, ...] = ()
    """Latents whose samples carry no gradient: a loss needs that of their score function."""
    relaxed: tuple[str, ...] = ()
    """Relaxed latents, in whose place every analysis takes the codes that they stand for."""

    def holds(self, node: Mapping[str, Any]) -> bool:
        """Return whether a site stands inside the data plate."""
        return any(self.is_data(frame) for frame in node["cond_indep_stack"])

    def is_data(self, frame: CondIndepStackFrame) -> bool:
        """Return whether a plate is the one over the rows."""
        return frame.vectorized and frame.name in self.plates


def samples(trace: Trace) -> dict[str, Any]:
    """Return the sample sites of a trace by name, without the plates' own bookkeeping and the rows of nearest codes."""
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not poutine.util.site_is_subsample(node) and not is_embedded(node)
    }


def is_embedded(node: Mapping[str, Any]) -> bool:
    """Return whether a site is the row of a nearest code."""
    return "_embedded" in node["infer"]


def data_frame(trace: Trace, count: int, among: Collection[str]) -> CondIndepStackFrame | None:
    """Return the outermost vectorised plate of `count` rows that holds an observed site, of some names."""
    for node in samples(trace).values():
        frames = [f for f in node["cond_indep_stack"] if f.vectorized and f.size == count and f.name in among]
        if node["is_observed"] and frames:
            return min(frames, key=lambda f: f.counter)
    return None


def plates_of(trace: Trace, count: int) -> set[str]:
    """Return the names of the vectorised plates of `count` rows."""
    frames = [f for node in samples(trace).values() for f in node["cond_indep_stack"] if f.vectorized]
    return {f.name for f in frames if f.size == count}


def read_layout(guide_trace: Trace, model_trace: Trace, count: int, follows: Collection[str]) -> Layout:
    """Return the layout of a pair from traces on `count` rows; `follows` names plates whose size is that of any batch.

    Raises:
        DeclarationError: no observed site stands in a plate over the rows, or a global one asks for enumeration.
    """
    frame = data_frame(model_trace, count, follows)
    if frame is None or frame.dim is None:
        raise DeclarationError(
            "pair.model: expected x to be observed inside a plate over the rows of a batch; got no such plate. "
            'Write `with pyro.plate("data", len(x)): pyro.sample("x", ..., obs=x)`.'
        )
    guide, model = samples(guide_trace), samples(model_trace)
    dims = [f.dim for node in (*guide.values(), *model.values()) for f in node["cond_indep_stack"] if f.vectorized]
    plates = frozenset({frame.name}) | _guide_plates(guide, model, frame)
    unseen = {name: node for name, node in guide.items() if not node["is_observed"]}

    def inside(node: Mapping[str, Any]) -> bool:
        return any(f.vectorized and f.name in plates for f in node["cond_indep_stack"])

    enumerated = [name for name, node in model.items() if name not in guide and is_enumerable(node)]
    outside = [name for name in enumerated if not inside(model[name])]
    if outside:
        raise DeclarationError(
            f"{', '.join(outside)}: expected enumerated sites inside the data plate; got global ones. Give a guide."
        )
    return Layout(
        plate=frame.name,
        plates=plates,
        dim=frame.dim,
        nesting=-min(dims),
        latents=tuple(name for name, node in unseen.items() if inside(node)),
        shared=tuple(name for name, node in unseen.items() if not inside(node)),
        observed=tuple(name for name, node in model.items() if node["is_observed"]),
        enumerated=tuple(enumerated),
        expected=tuple(name for name, node in unseen.items() if is_enumerable(node)),
        scored=tuple(name for name, node in unseen.items() if not is_enumerable(node) and needs_score(node["fn"])),
        relaxed=tuple(name for name, node in unseen.items() if is_relaxed(node["fn"])),
    )


def _guide_plates(guide: Mapping[str, Any], model: Mapping[str, Any], data: CondIndepStackFrame) -> set[str]:
    """Return plates of the guide alone that lie where the model's data plate does and have its size."""
    known = {f.name for node in model.values() for f in node["cond_indep_stack"]}
    frames = [f for node in guide.values() for f in node["cond_indep_stack"] if f.vectorized]
    return {f.name for f in frames if f.name not in known and (f.dim, f.size) == (data.dim, data.size)}


def is_enumerable(node: Mapping[str, Any]) -> bool:
    """Return whether a site asks to be summed over in parallel, and can be."""
    wants = node["infer"].get("enumerate") == "parallel"
    return wants and not node["is_observed"] and node["fn"].has_enumerate_support


def needs_score(fn: Any) -> bool:
    """Return whether a distribution needs a score-function gradient."""
    return not fn.has_rsample and not isinstance(unwrapped(fn), Certain)


def unwrapped(fn: Any) -> Any:
    """Return a distribution without its wrappers that declare event dimensions or expand it."""
    while isinstance(fn, Independent | ExpandedDistribution):
        fn = fn.base_dist
    return fn


def is_point(fn: Any) -> bool:
    """Return whether a distribution is a Delta, masked or not."""
    fn = unwrapped(fn)
    return is_point(fn.base_dist) if isinstance(fn, MaskedDistribution) else isinstance(fn, Delta)


@dataclass(frozen=True)
class SiteShape:
    """Place of the rows among the dimensions of a site's value."""

    left: Shape
    """Batch dimensions left of the rows."""
    right: Shape
    """Batch dimensions right of the rows, then the event's."""
    batch: int
    """Number of batch dimensions, the rows' among them."""

    @property
    def numel(self) -> int:
        """Numbers to one row."""
        return math.prod(self.left) * math.prod(self.right)

    def flatten(self, value: Tensor) -> Tensor:
        """Return a site's value as `(rows, numel)`."""
        return value.movedim(len(self.left), 0).reshape(value.shape[len(self.left)], -1)

    def spread(self, flat: Tensor, nesting: int = 0) -> Tensor:
        """Return `([particles,] rows, numel)` as the site's value; particles left of `nesting` dimensions."""
        lead = flat.shape[:-2]
        ones = (1,) * (nesting - self.batch) if lead else ()
        value = flat.reshape(*lead, *ones, flat.shape[-2], *self.left, *self.right)
        at = len(lead) + len(ones)
        return value.movedim(at, at + len(self.left))

    @classmethod
    def of(cls, shape: Shape, fn: Any, layout: Layout) -> SiteShape:
        """Return the place of the rows in values of a given `shape`, sampled from a distribution."""
        event = len(fn.event_shape)
        axis = len(shape) - event + layout.dim
        return cls(tuple(shape[:axis]), tuple(shape[axis + 1 :]), len(shape) - event)


def site_shape(node: Mapping[str, Any], layout: Layout) -> SiteShape:
    """Return the shape of a site's value, read off a trace."""
    return SiteShape.of(node["value"].shape, node["fn"], layout)
