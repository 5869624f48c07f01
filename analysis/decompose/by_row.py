"""Questions by row of data: whether priors differ between rows, and which elements of a latent a row has."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pvae.analysis.aggregate.entry import same_globals
from pvae.pair.densities import masks_of
from pvae.pair.layout import Layout, samples
from pvae.pair.pair import Pair

SAME = 1e-4
"""Largest difference between rows, relative to 1 + size, of the log prior density of one value."""


def priors_by_row(pair: Pair, x: Tensor) -> frozenset[str]:
    """Return the latents whose prior p(z | parents) differs between rows where all latents have the same values.

    Their aggregated posterior has no one prior to be compared with. The model is run on all rows, with the latents of
    every row set to those of the first; call it in `quiet`. Empty for a declared pair, whose covariates are known.
    """
    if pair.declared or not pair.layout.latents or pair.layout.enumerated:
        return frozenset()
    found: set[str] = set()
    with same_globals(pair, x):
        guide, model = (samples(trace) for trace in pair.traces(pair.structure.few(x)))
        nodes = {
            n: node for n, node in {**model, **guide}.items() if pair.layout.holds(node) and not node["is_observed"]
        }
        first: dict[str, Tensor] = {}
        for part in x.split(pair.structure.rows_at_once()):
            values = {name: _first_row(node, pair.layout, len(part)) for name, node in nodes.items()}
            sites = samples(pair.model_trace(part, values))
            for name in values.keys() & sites.keys():
                scores = _by_row(sites[name], pair.layout, len(part))
                one = first.setdefault(name, scores[:1])
                if one.shape[1:] != scores.shape[1:] or bool(((scores - one).abs() > SAME * (1 + one.abs())).any()):
                    found.add(name)
    return frozenset(found)


def _first_row(node: Any, layout: Layout, rows: int) -> Tensor:
    """Return the value of a site in the first row, repeated for a number of rows."""
    value = node["value"]
    axis = value.dim() - len(node["fn"].event_shape) + layout.dim
    shape = [*value.shape]
    shape[axis] = rows
    return value.narrow(axis, 0, 1).expand(shape)


def _by_row(node: Any, layout: Layout, rows: int) -> Tensor:
    """Return the unmasked log density of a site by row, `(rows, other plates)`, float64."""
    if (score := node["fn"].log_prob(node["value"]).double()).dim() < -layout.dim:
        return score.reshape(1, -1)
    return torch.nan_to_num(score.movedim(layout.dim, 0).flatten(1) if score.dim() > 1 else score[:, None])


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


def joined_presence(parts: Sequence[tuple[Tensor | None, int]], device: torch.device) -> Tensor | None:
    """Return the presence of one latent in consecutive chunks; where one has no mask, all elements are present."""
    if not (known := [present for present, _ in parts if present is not None]):
        return None
    whole = max(1, *(int(present.max()) for present in known))
    return torch.cat([torch.full((n,), whole, device=device) if p is None else p for p, n in parts])
