"""Sample sites of any pair as arrays with one row per datum: shapes, names, and posterior parameters."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvae.analysis.decompose.entry import quiet
from pvae.analysis.decompose.posterior_draws import draw_chunk
from pvae.analysis.export.names import dims_of, safe_names, text
from pvae.distributions.codes import Certain
from pvae.pair.layout import Layout, samples, unwrapped
from pvae.pair.pair import Pair
from pvae.pair.structure import numbers_of
from pvae.util.types import Array

TRACED_ROWS = 16
"""Number of rows on which guide and model are run to find their sample sites."""
EXPORTED_PROBABILITIES = 4096
"""Largest number of posterior probabilities of a discrete latent, per datum, that are exported."""


# ---------------------------------------------------------------------- values


def rows_of(t: Tensor, node: Mapping[str, Any], layout: Layout, count: int, codes: int = 0) -> Tensor:
    """Return a site's value or parameter with one entry per datum, `(count, *tail)`, for any plates around the site.

    Arguments:
        t: the tensor.
        node: node of the site in a trace.
        layout: layout of the pair.
        count: rows of the batch.
        codes: number of last dims that are not part of the event: 1 for the probabilities of a categorical.
    """
    fn = node["fn"]
    event = (*fn.event_shape, *t.shape[t.dim() - codes :])
    t = t.detach().expand(*fn.batch_shape, *event).movedim(len(fn.batch_shape) + layout.dim, 0)
    plates = [size for size in t.shape[1 : len(fn.batch_shape)] if size > 1]
    return t.expand(count, *t.shape[1:]).reshape(count, *plates, *event)


def as_value(rows: Tensor, node: Mapping[str, Any], layout: Layout) -> Tensor:
    """Invert `rows_of`: return rows as a value of the site in `node`, with its shape and type."""
    value = node["value"]
    axis = len(node["fn"].batch_shape) + layout.dim
    return rows.to(value).reshape(value.movedim(axis, 0).shape).movedim(0, axis)


def numpy_of(t: Tensor) -> Array:
    """Return a tensor as an array on the CPU; bfloat16, which NumPy lacks, as float32."""
    t = t.detach().cpu()
    return np.asarray((t.float() if t.dtype is torch.bfloat16 else t).numpy())


# ---------------------------------------------------------------------- posteriors


def parameters_of(node: Mapping[str, Any], layout: Layout, count: int) -> dict[str, Tensor]:
    """Return `loc` and `scale` of a diagonal normal, `probs` of discrete families, `(count, ...)`; {} for others.

    Deterministic codes, and those with more than `EXPORTED_PROBABILITIES` per datum, have no entries.
    """
    fn = unwrapped(node["fn"])
    if isinstance(fn, torch.distributions.Normal):
        return {key: rows_of(t, node, layout, count) for key, t in (("loc", fn.loc), ("scale", fn.scale))}
    if numbers_of(node["fn"]) > EXPORTED_PROBABILITIES and not isinstance(fn, torch.distributions.Bernoulli):
        return {}
    if isinstance(fn, torch.distributions.Categorical):
        return {"probs": rows_of(fn.probs, node, layout, count, codes=1)}
    if isinstance(fn, torch.distributions.OneHotCategorical | torch.distributions.Bernoulli):
        return {"probs": rows_of(fn.probs, node, layout, count)}
    return {}


# ---------------------------------------------------------------------- sites


@dataclass(frozen=True)
class ExportedSite:
    """One sample site of a pair, as a variable of the export."""

    site: str
    """Name of the sample site in the pair."""
    name: str
    """Name of the variable in the export."""
    tail: tuple[int, ...]
    """Shape of the value of one datum, or of a global latent."""
    dtype: Any
    """NumPy type of the values."""

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the event dims of the variable, one for every axis of `tail`."""
        return dims_of(self.name, self.tail)

    @property
    def attrs(self) -> dict[str, Any]:
        """Attributes of the variable: the name of the sample site in the pair."""
        return {"site": text(self.site)}

    @property
    def size(self) -> int:
        """Number of elements of one value."""
        return math.prod(self.tail)

    @property
    def bytes(self) -> int:
        """Number of bytes of one value."""
        return self.size * int(np.dtype(self.dtype).itemsize)

    def empty(self, *lead: int) -> Array:
        """Return an uninitialised array `(*lead, *tail)` of the site's dtype."""
        return np.empty((*lead, *self.tail), self.dtype)


@dataclass(frozen=True)
class ExportedSites:
    """All sample sites of a pair that are exported, and the parameters of their posteriors."""

    latents: tuple[ExportedSite, ...]
    """Latents of the guide, and sites that the model sums out."""
    shared: tuple[ExportedSite, ...]
    """Global latents."""
    observed: tuple[ExportedSite, ...]
    """Observed sites."""
    summed: tuple[str, ...]
    """Latents that the model sums out: their densities are expectations."""
    parameters: Mapping[str, Mapping[str, Array]]
    """Posterior parameters of the first row, by site, of posteriors of a supported family that depend on x alone."""
    hidden: Mapping[str, str]
    """Reasons, by site, why the parameters of the other posteriors are not exported."""
    closed: frozenset[str]
    """Latents with a closed-form KL(q || p) per coordinate: q and p are normal, and the prior does not depend on
    latents that the guide infers from this one."""


def read_sites(pair: Pair, x: Tensor) -> ExportedSites:
    """Return the sample sites of a pair, found by running it on the first rows of `x` `(n, *event)`."""
    x = x[:TRACED_ROWS]
    with quiet(pair, x, 0):
        guide, model = (samples(trace) for trace in pair.traces(x))
        drawn = draw_chunk(pair, x).latents if pair.layout.enumerated else {}
    layout, count = pair.layout, len(x)
    values = {name: numpy_of(rows_of(guide[name]["value"], guide[name], layout, count)[0]) for name in layout.latents}
    summed = {name: numpy_of(latent.value[0].long().squeeze()) for name, latent in drawn.items() if name not in guide}
    shared = {name: numpy_of(whole(guide[name])) for name in layout.shared}
    observed = {
        name: numpy_of(rows_of(model[name]["value"], model[name], layout, count)[0]) for name in layout.observed
    }
    names = safe_names(
        {name: value.shape for part in (values, summed, shared, observed) for name, value in part.items()}
    )

    def sites(found: Mapping[str, Array]) -> tuple[ExportedSite, ...]:
        return tuple(ExportedSite(name, names[name], value.shape, value.dtype) for name, value in found.items())

    shown = {name: parameters_of(guide[name], layout, count) for name in layout.latents}
    dependencies = pair.dependencies(x)
    reads = {name: dependencies.guide.get(name, frozenset()) for name in layout.latents}
    hidden = {name: why for name in layout.latents if (why := _why_hidden(guide[name], shown[name], reads[name]))}
    normal = {name for name in layout.latents if name in model and _is_normal(guide[name]) and _is_normal(model[name])}
    return ExportedSites(
        latents=sites({**values, **summed}),
        shared=sites(shared),
        observed=sites(observed),
        summed=tuple(summed),
        parameters={
            name: {key: numpy_of(t[0]) for key, t in found.items()}
            for name, found in shown.items()
            if name not in hidden
        },
        hidden={**hidden, **dict.fromkeys(summed, "the model sums it out; it has no guide")},
        closed=frozenset(normal - dependencies.bottom_up),
    )


def whole(node: Mapping[str, Any]) -> Tensor:
    """Return the value of a global latent, without plates of size one."""
    fn = node["fn"]
    plates = [size for size in fn.batch_shape if size > 1]
    return node["value"].detach().reshape((*plates, *fn.event_shape))


def _is_normal(node: Mapping[str, Any]) -> bool:
    return isinstance(unwrapped(node["fn"]), torch.distributions.Normal) and node["mask"] is None


def _why_hidden(node: Mapping[str, Any], found: Mapping[str, Tensor], reads: Collection[str]) -> str:
    """Return the reason why the parameters of a posterior are not exported; empty if they are."""
    if isinstance(unwrapped(node["fn"]), Certain):
        return "a deterministic code has no parameters"
    if not found and isinstance(unwrapped(node["fn"]), torch.distributions.Categorical):
        return f"expected at most {EXPORTED_PROBABILITIES} probabilities of a datum; got {numbers_of(node['fn'])}"
    if not found:
        kind = type(unwrapped(node["fn"])).__name__
        return f"expected a diagonal normal, categorical, one-hot or Bernoulli posterior; got {kind}"
    return "its parameters read other latents" if reads else ""
