"""Log densities and KLs per row of data, read off the sites of traces, and the weights and shapes they need."""

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pyro.distributions as dist
import torch
import torch.distributions as td
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pvae.distributions import Certain, Determined, FullRankNormals, Members, Normals, doubled, has_gamma, log_density
from pvae.distributions.exponential_codes import CertainCodes, Codes, Form, product
from pvae.distributions.relaxed import LogOneHot, RelaxedCodes, categorical_kl
from pvae.pair.layout import Layout, is_point, plates_around, unwrapped


class Unweighed(Messenger):
    """Pyro handler that removes the scale of poutine.scale from all sites; scales of subsampling plates are kept."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["scale"] = plate_scale(msg)


def plate_scale(node: Mapping[str, Any]) -> float:
    """Return the scale of a site that is due to subsampling plates, without that of poutine.scale."""
    frames = [f for f in node["cond_indep_stack"] if f.vectorized and f.full_size not in (None, f.size)]
    return math.prod(f.full_size / f.size for f in frames) if frames else 1.0


def moved(node: Mapping[str, Any]) -> Tensor:
    """Return a perturbed value of a site, within its support, with every element of every row changed."""
    fn, value = unwrapped(node["fn"]), node["value"]
    if isinstance(fn, td.Bernoulli):
        return 1 - value
    if isinstance(fn, td.OneHotCategorical | RelaxedCodes):
        return value.roll(1, -1)
    if isinstance(fn, td.Categorical | Certain):
        return (value + 1) % fn.logits.shape[-1]
    with suppress(NotImplementedError, ValueError):
        transform = td.biject_to(node["fn"].support)
        return transform(transform.inv(value) + 1)
    return value + 1


def sum_over(parts: list[Tensor]) -> Tensor:
    """Return the sum of a non-empty list of tensors."""
    return sum(parts[1:], parts[0])


def per_datum(value: Tensor, layout: Layout, particles: int) -> Tensor:
    """Return a batch-shaped tensor summed over all plates but those of the data and of the particles, if any.

    Dimensions left of the plates belong to enumerated sites and are kept.
    """
    width = layout.nesting + (particles > 0)
    if value.dim() == width == 1 + (particles > 0):
        return value
    value = value.reshape((1,) * (width - value.dim()) + value.shape)
    drop = [d for d in range(-width, 0) if d != layout.dim and not (particles and d == -width)]
    return value.sum(drop) if drop else value


def full_size(model_trace: Trace, layout: Layout, rows: int | None = None) -> int:
    """Return the size of the data set: that declared by the data plate, else `rows`, else the batch size."""
    present = [name for name in layout.observed if name in model_trace.nodes]
    frames = (f for name in present for f in model_trace.nodes[name]["cond_indep_stack"])
    frame = next(f for f in frames if layout.is_data(f))
    if (declared := frame.full_size or frame.size) < 0:  # a plate without a size
        node = next(model_trace.nodes[name] for name in present if layout.holds(model_trace.nodes[name]))
        return rows or next(size for f, size in plates_around(node) if layout.is_data(f))
    return declared if declared != frame.size else rows or declared


def log_prob(node: Mapping[str, Any], layout: Layout, particles: int, size: int = 1) -> Tensor:
    """Return the log density of a traced site per row, nats; of a global site divided by `size`, shape `(1,)`."""
    return share(node, log_density(node["fn"], node["value"]), layout, particles, size)


def certainty(node: Mapping[str, Any], layout: Layout, particles: int) -> Tensor | None:
    """Return log q of a value under a deterministic code, 0 or -inf per row; None for other distributions.

    `Certain.log_prob` is 0 for any value, since a guide is normally scored at its own code; here values are compared.
    """
    fn = unwrapped(node["fn"])
    if not isinstance(fn, Certain):
        return None
    same = node["value"] == fn.index
    hit = same.flatten(same.dim() - len(fn.event_shape)).all(-1) if fn.event_shape else same
    return share(node, torch.where(hit, 0.0, -math.inf), layout, particles, 1)


def share(node: Mapping[str, Any], value: Tensor, layout: Layout, particles: int, size: int) -> Tensor:
    """Return `value` of a site (nats) per row: masked and scaled, without the data plate's subsampling scale.

    That of a global site is summed and divided by `size`.
    """
    for frame in node["cond_indep_stack"]:
        if layout.is_data(frame):
            drawn = frame.full_size not in (None, frame.size)
            scale = node["scale"] * frame.size / frame.full_size if drawn else node["scale"]
            return per_datum(_weighed(value, scale, node["mask"]), layout, particles)
    value = _weighed(value, node["scale"], node["mask"]) / size
    if particles:
        return value.reshape(particles, -1).sum(-1, keepdim=True) if value.numel() > 1 else value.reshape(1, 1)
    return value.sum().reshape(1)


def is_masked(node: Mapping[str, Any]) -> bool:
    """Return whether a mask hides a part of a site: `poutine.mask`, or `.mask(...)` of its distribution."""
    return any(not bool(mask.all()) for mask in masks_of(node))


def masks_of(node: Mapping[str, Any]) -> list[Tensor]:
    """Return the masks of a site, each of a shape that broadcasts to its batch and event dimensions."""
    fn, inner, event = node["fn"], 0, len(node["fn"].event_shape)
    found = [(node["mask"], event)]
    while isinstance(fn, dist.MaskedDistribution | td.Independent | dist.ExpandedDistribution):
        if isinstance(fn, dist.MaskedDistribution):
            found.append((fn._mask, event - inner))
        inner += fn.reinterpreted_batch_ndims if isinstance(fn, td.Independent) else 0
        fn = fn.base_dist
    masks = [(torch.as_tensor(mask), beyond) for mask, beyond in found if mask is not None]
    return [mask.reshape(mask.shape + (1,) * beyond) for mask, beyond in masks]


def presence(q: Any, p: Any, layout: Layout, n: int) -> Tensor | None:
    """Return an integer per row that tells which elements of a site no mask hides; None where there is no mask."""
    if not (masks := [mask for node in (q, p) if node is not None for mask in masks_of(node)]):
        return None
    fn = q["fn"]
    shown = torch.ones((*fn.batch_shape, *fn.event_shape), dtype=torch.bool, device=q["value"].device)
    for mask in masks:
        shown = shown & mask.to(shown)
    shown = shown.flatten(len(fn.batch_shape)) if fn.event_shape else shown[..., None]
    shown = shown.movedim(-1, 0)  # the elements first, so that the data plate stays where it is from the right
    first = shown.movedim(layout.dim, 0)
    rows = first.expand(n, *first.shape[1:]).reshape(n, -1)
    weights = torch.randint(1, 2**40, rows.shape[1:], generator=torch.Generator().manual_seed(0))
    return (rows * weights.to(rows.device)).sum(1)


def _weighed(value: Tensor, scale: Any, mask: Any) -> Tensor:
    """Return a value scaled and masked; skips `scale_and_mask` if both are trivial, as this runs every step."""
    return value if mask is None and scale.__class__ is float and scale == 1.0 else scale_and_mask(value, scale, mask)


def closed_kl(q: Mapping[str, Any], p: Mapping[str, Any], layout: Layout, particles: int, size: int) -> Tensor | None:
    """Return KL(q || p) of a site per row in closed form, nats; None if torch has no closed form."""
    if isinstance(q["fn"], Determined) or is_point(q["fn"]):  # torch's rule forgets their density
        return log_prob(q, layout, particles, size) - log_prob(p, layout, particles, size)
    fns = q["fn"], p["fn"]
    if isinstance(unwrapped(q["fn"]), td.Bernoulli):  # torch's rule for bits does not broadcast
        shape = torch.broadcast_shapes(*(fn.batch_shape for fn in fns))
        fns = q["fn"].expand(shape), p["fn"].expand(shape)
    if has_gamma(q["fn"]):
        fns = doubled(fns[0]), doubled(fns[1])
    with suppress(NotImplementedError):
        return share(q, td.kl_divergence(*fns), layout, particles, size)
    return None


def priced_kl(q: Mapping[str, Any], p: Mapping[str, Any], layout: Layout, particles: int) -> Tensor | None:
    """Return the categorical KL of a relaxed site per row, nats; None unless its posterior has `kl` "categorical"."""
    fn = unwrapped(q["fn"])
    if not isinstance(fn, RelaxedCodes) or fn.kl != "categorical":
        return None
    return share(q, categorical_kl(fn, p["fn"], q["value"]), layout, particles, 1)


def rows_first(t: Tensor, node: Mapping[str, Any], layout: Layout, rows: int, beyond: int = 0) -> Tensor:
    """Return a site's value or distribution parameter as a matrix, `(rows, all other dimensions flattened)`.

    `beyond` is the number of dimensions of a parameter right of the event (1 for logits or a covariance factor).
    """
    fn = node["fn"]
    t, batch = t.detach(), len(fn.batch_shape) + len(fn.event_shape)
    if t.dim() - beyond < batch:
        t = t.expand(*fn.batch_shape, *fn.event_shape, *t.shape[t.dim() - beyond :])
    axis = t.dim() - beyond - len(fn.event_shape) + layout.dim
    return t.movedim(axis, 0).expand(rows, *t.movedim(axis, 0).shape[1:]).reshape(rows, -1)


def shared_codes(node: Mapping[str, Any], layout: Layout) -> Codes | None:
    """Return the categorical codes of a site as one member if all rows share the same logits; else None."""
    fn = unwrapped(node["fn"])
    if is_masked(node) or not isinstance(fn, td.Categorical):
        return None
    event = tuple(node["fn"].event_shape)
    logits = fn.logits.detach().expand(*node["fn"].batch_shape, *event, -1)
    axis = logits.dim() - 1 - len(event) + layout.dim
    if logits.stride(axis) and logits.shape[axis] > 1:
        return None
    return Codes(logits.movedim(axis, 0)[:1].reshape(1, -1, logits.shape[-1]))


def members(node: Mapping[str, Any], layout: Layout, rows: int) -> Members | None:
    """Return the distributions of a site as exponential-family members, one per row; None for other families.

    Copies along plates other than the data plate are independent, so that a member is their product.
    """
    fn = unwrapped(node["fn"])
    if is_masked(node):
        return None

    def flat(t: Tensor, beyond: int = 0) -> Tensor:
        return rows_first(t, node, layout, rows, beyond)

    if isinstance(fn, td.Normal):
        return Normals(flat(fn.loc), flat(fn.scale))
    if isinstance(fn, td.MultivariateNormal | td.LowRankMultivariateNormal):
        d = fn.event_shape[0]
        loc, scale_tril = flat(fn.loc).reshape(rows, -1, d), flat(fn.scale_tril, 1).reshape(rows, -1, d, d)
        return product([FullRankNormals(loc[:, i], scale_tril[:, i]) for i in range(loc.shape[1])])
    if isinstance(fn, Certain):
        return CertainCodes(flat(fn.index).long(), fn.states)
    if isinstance(fn, td.Categorical | td.OneHotCategorical | LogOneHot):
        whole = isinstance(fn, td.Categorical)
        form: Form = "index" if whole else "log_one_hot" if isinstance(fn, LogOneHot) else "one_hot"
        return Codes(flat(fn.logits, int(whole)).reshape(rows, -1, fn.logits.shape[-1]), form)
    if isinstance(fn, td.Bernoulli):
        return Codes(torch.stack([flat(-fn.logits), flat(fn.logits)], -1).clamp(-1e4, 1e4) / 2)
    return None
