"""Sample sites of any pair as arrays with one row per datum: shapes, names, and what shows of their posteriors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvae.analysis.decompose.draws import draw_chunk, quiet
from pvae.analysis.export.datasets import Array, dims_of, safe_names, text
from pvae.distributions.codes import Certain
from pvae.pair.layout import Layout, samples, unwrapped
from pvae.pair.pair import Pair
from pvae.pair.structure import numbers_of

PROBED = 16
"""Rows on which it is found out which posteriors read other latents."""
PROBABILITIES = 4096
"""Most probabilities of one datum's code that are shown."""


# ---------------------------------------------------------------------- values


def rows_of(t: Tensor, node: Mapping[str, Any], layout: Layout, count: int, codes: int = 0) -> Tensor:
    """A site's value or parameter as `(count, *tail)`, whatever plates it stands in.

    Arguments:
        t: the tensor; its last `codes` dims are no part of the event (probabilities of a categorical).
        node: the site's node in a trace.
        layout: of the pair.
        count: rows of the batch.
        codes: number of such dims.
    """
    fn = node["fn"]
    event = (*fn.event_shape, *t.shape[t.dim() - codes :])
    t = t.detach().expand(*fn.batch_shape, *event).movedim(len(fn.batch_shape) + layout.dim, 0)
    plates = [size for size in t.shape[1 : len(fn.batch_shape)] if size > 1]
    return t.expand(count, *t.shape[1:]).reshape(count, *plates, *event)


def as_value(rows: Tensor, node: Mapping[str, Any], layout: Layout) -> Tensor:
    """The inverse of `rows_of`: rows as a value of the site in `node`, of its shape and type."""
    value = node["value"]
    axis = len(node["fn"].batch_shape) + layout.dim
    return rows.to(value).reshape(value.movedim(axis, 0).shape).movedim(0, axis)


def numpy_of(t: Tensor) -> Array:
    """A tensor as an array on the CPU, bfloat16 (which numpy lacks) as float32."""
    t = t.detach().cpu()
    return np.asarray((t.float() if t.dtype is torch.bfloat16 else t).numpy())


# ---------------------------------------------------------------------- posteriors


def parameters_of(node: Mapping[str, Any], layout: Layout, count: int) -> dict[str, Tensor]:
    """`loc` and `scale` of a diagonal normal, `probs` of discrete families, `(count, ...)`; {} for others.

    Of codes with more than `PROBABILITIES` to a datum, and of those known for certain, there are none.
    """
    fn = unwrapped(node["fn"])
    if isinstance(fn, torch.distributions.Normal):
        return {key: rows_of(t, node, layout, count) for key, t in (("loc", fn.loc), ("scale", fn.scale))}
    if numbers_of(node["fn"]) > PROBABILITIES and not isinstance(fn, torch.distributions.Bernoulli):
        return {}
    if isinstance(fn, torch.distributions.Categorical):
        return {"probs": rows_of(fn.probs, node, layout, count, codes=1)}
    if isinstance(fn, torch.distributions.OneHotCategorical | torch.distributions.Bernoulli):
        return {"probs": rows_of(fn.probs, node, layout, count)}
    return {}


# ---------------------------------------------------------------------- sites


@dataclass(frozen=True)
class Site:
    """One sample site as it is exported."""

    site: str
    """Its name in the pair."""
    name: str
    """Its name in the groups."""
    tail: tuple[int, ...]
    """Shape of one datum's value; of the whole value, for a global latent."""
    dtype: Any
    """numpy's type of the values."""

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the dims of `tail`."""
        return dims_of(self.name, self.tail)

    @property
    def attrs(self) -> dict[str, Any]:
        """The site's own name, kept."""
        return {"site": text(self.site)}

    @property
    def size(self) -> int:
        """Numbers in one value."""
        return math.prod(self.tail)

    @property
    def bytes(self) -> int:
        """Of one value."""
        return self.size * int(np.dtype(self.dtype).itemsize)

    def empty(self, *lead: int) -> Array:
        """An array `(*lead, *tail)` of the site's type."""
        return np.empty((*lead, *self.tail), self.dtype)


@dataclass(frozen=True)
class Sites:
    """All sites of a pair, and what shows of their posteriors."""

    latents: tuple[Site, ...]
    """Of the guide; sites of the model that it sums out, where the guide has none."""
    shared: tuple[Site, ...]
    observed: tuple[Site, ...]
    summed: tuple[str, ...]
    """Those latents that the model sums out: given a draw of them the analyses score expectations."""
    parameters: Mapping[str, Mapping[str, Array]]
    """Parameters of every posterior that has some and reads no other latent, on the probed rows."""
    hidden: Mapping[str, str]
    """Why the other posteriors have none."""
    closed: frozenset[str]
    """Latents whose KL(q || p) is known for every coordinate: both normal, and the prior reads nothing inferred from
    them."""


def read_sites(pair: Pair, x: Tensor) -> Sites:
    """The sites of a pair, read off its traces on the first rows of `x` `(n, *event)`."""
    x = x[:PROBED]
    with quiet(pair, x, 0):
        guide, model = (samples(trace) for trace in pair.traces(x))
        again = samples(pair.guide_trace(x))
        drawn = draw_chunk(pair, x).latents
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

    def sites(found: Mapping[str, Array]) -> tuple[Site, ...]:
        return tuple(Site(name, names[name], value.shape, value.dtype) for name, value in found.items())

    shown = {name: parameters_of(guide[name], layout, count) for name in layout.latents}
    others = {name: parameters_of(again[name], layout, count) for name in layout.latents}
    hidden = {name: why for name in layout.latents if (why := _why_hidden(guide[name], shown[name], others[name]))}
    normal = {name for name in layout.latents if name in model and _is_normal(guide[name]) and _is_normal(model[name])}
    return Sites(
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
        closed=frozenset(normal - pair.dependencies(x).bottom_up),
    )


def whole(node: Mapping[str, Any]) -> Tensor:
    """The value of a global latent, without plates of one."""
    fn = node["fn"]
    plates = [size for size in fn.batch_shape if size > 1]
    return node["value"].detach().reshape(*plates, *fn.event_shape)


def _is_normal(node: Mapping[str, Any]) -> bool:
    return isinstance(unwrapped(node["fn"]), torch.distributions.Normal) and node["mask"] is None


def _why_hidden(node: Mapping[str, Any], found: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """Why a posterior's parameters cannot be shown as a function of the datum, "" where they can."""
    if isinstance(unwrapped(node["fn"]), Certain):
        return "a code known for certain has no parameters"
    if not found and isinstance(unwrapped(node["fn"]), torch.distributions.Categorical):
        return f"expected at most {PROBABILITIES} probabilities of a datum; got {numbers_of(node['fn'])}"
    if not found:
        kind = type(unwrapped(node["fn"])).__name__
        return f"expected a diagonal normal, categorical, one-hot or Bernoulli posterior; got {kind}"
    if not all(torch.equal(t, other[key]) for key, t in found.items()):
        return "its parameters read other latents"
    return ""
