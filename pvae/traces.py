"""What is read off a pair's traces, whatever its sites are called: layout, densities per datum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import kl_divergence

from pvae.errors import DeclarationError


@dataclass(frozen=True)
class Layout:
    """Where things are in a pair, read off its traces whatever the names."""

    plate: str
    """Name of the data plate."""
    dim: int
    """Its batch dimension (negative)."""
    nesting: int
    """Number of batch dimensions that plates use."""
    latents: tuple[str, ...]
    """Sites of the guide inside the data plate, in the guide's order."""
    shared: tuple[str, ...]
    """Sites of the guide outside it: global latents."""
    observed: tuple[str, ...]
    """Observed sites of the model."""


def samples(trace: Trace) -> dict[str, Any]:
    """Sample sites of a trace by name, without the plates' own bookkeeping."""
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not poutine.util.site_is_subsample(node)
    }


def data_frame(trace: Trace, count: int) -> CondIndepStackFrame | None:
    """The outermost vectorised plate of `count` rows that holds an observed site."""
    for node in samples(trace).values():
        frames = [f for f in node["cond_indep_stack"] if f.vectorized and f.size == count]
        if node["is_observed"] and frames:
            return min(frames, key=lambda f: f.counter)
    return None


def read_layout(guide_trace: Trace, model_trace: Trace, count: int) -> Layout:
    """The layout of a pair from traces on `count` rows.

    Raises:
        DeclarationError: no observed site stands in a plate over the rows.
    """
    frame = data_frame(model_trace, count)
    if frame is None or frame.dim is None:
        raise DeclarationError(
            "pair.model: expected x to be observed inside a plate over the rows of a batch; got no such plate. "
            'Write `with pyro.plate("data", len(x)): pyro.sample("x", ..., obs=x)`.'
        )
    nodes = [*samples(guide_trace).values(), *samples(model_trace).values()]
    dims = [f.dim for node in nodes for f in node["cond_indep_stack"] if f.vectorized]
    guide = {name: node for name, node in samples(guide_trace).items() if not node["is_observed"]}
    local = [name for name, node in guide.items() if any(is_data(f, frame.dim) for f in node["cond_indep_stack"])]
    return Layout(
        plate=frame.name,
        dim=frame.dim,
        nesting=-min(dims),
        latents=tuple(local),
        shared=tuple(name for name in guide if name not in local),
        observed=tuple(name for name, node in samples(model_trace).items() if node["is_observed"]),
    )


def is_data(frame: CondIndepStackFrame, dim: int) -> bool:
    """Whether a plate is the one over the rows: model and guide may name it differently."""
    return frame.dim == dim


def sum_over(parts: list[Tensor]) -> Tensor:
    """The sum of a non-empty list."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def per_datum(value: Tensor, layout: Layout, particles: int) -> Tensor:
    """Sum a batch-shaped tensor over every plate but the data's (and the particles', when there are any)."""
    width = layout.nesting + (particles > 0)
    if value.dim() == width == 1 + (particles > 0):
        return value
    value = value.reshape((1,) * (width - value.dim()) + value.shape)
    keep = {width + layout.dim} | ({0} if particles else set())
    drop = [d for d in range(width) if d not in keep]
    return value.sum(drop) if drop else value


def full_size(model_trace: Trace, layout: Layout, rows: int | None = None) -> int:
    """Rows of the whole data set: as the data plate declares them, else `rows`, else those of the batch."""
    frames = (f for name in layout.observed for f in model_trace.nodes[name]["cond_indep_stack"])
    frame = next(f for f in frames if is_data(f, layout.dim))
    declared = frame.full_size or frame.size
    return declared if declared != frame.size else rows or declared


def log_prob(node: Mapping[str, Any], layout: Layout, particles: int, size: int = 1) -> Tensor:
    """Log density of a site per datum, nats; a global site's is divided by the `size` of the data plate."""
    value = node["fn"].log_prob(node["value"])
    return share(node, value, layout, particles, size)


def share(node: Mapping[str, Any], value: Tensor, layout: Layout, particles: int, size: int) -> Tensor:
    """A site's batch-shaped nats per datum: masked, weighted by handlers, rid of the plate's own subsampling scale."""
    for frame in node["cond_indep_stack"]:
        if is_data(frame, layout.dim):
            scale = node["scale"]
            if frame.full_size is not None and frame.full_size != frame.size:
                scale = scale * frame.size / frame.full_size
            return per_datum(_weighed(value, scale, node["mask"]), layout, particles)
    value = _weighed(value, node["scale"], node["mask"]) / size
    if particles:
        return value.reshape(particles, -1).sum(-1, keepdim=True) if value.numel() > 1 else value.reshape(1, 1)
    return value.sum().reshape(1)


def _weighed(value: Tensor, scale: Any, mask: Any) -> Tensor:
    """`scale_and_mask`, past it in the usual case: it is called for every site of every step."""
    return value if mask is None and scale.__class__ is float and scale == 1.0 else scale_and_mask(value, scale, mask)


def closed_kl(q: Mapping[str, Any], p: Mapping[str, Any], layout: Layout, particles: int, size: int) -> Tensor | None:
    """KL(q || p) of a site per datum in closed form, or None where torch does not know it."""
    try:
        value = kl_divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return None
    return share(q, value, layout, particles, size)


def rows_first(t: Tensor, node: Mapping[str, Any], layout: Layout, rows: int) -> Tensor:
    """A site's value or a parameter of its distribution as `(rows, everything else)`, whatever plates it stands in."""
    fn = node["fn"]
    t = t.detach()
    if t.dim() < len(fn.batch_shape) + len(fn.event_shape):
        t = t.expand(*fn.batch_shape, *fn.event_shape)
    axis = t.dim() - len(fn.event_shape) + layout.dim
    return t.movedim(axis, 0).expand(rows, *t.movedim(axis, 0).shape[1:]).reshape(rows, -1)
