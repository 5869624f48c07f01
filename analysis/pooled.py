"""Surgery of a model conditioned on covariates: q_agg is q_agg(z | y), so each group is taken apart by itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from pvae.analysis.anatomy import LatentSurgery, Surgery
from pvae.analysis.estimate import Estimate
from pvae.pair import Pair

FIGURES = (
    "reconstruction", "kl", "kl_exact", "mutual_information", "mutual_information_lower", "marginal_kl",
    "marginal_kl_upper", "leave_one_out", "train_gain", "elbo", "log_n", "global_kl",
)  # fmt: skip
LEVEL_FIGURES = ("kl", "kl_exact", "mutual_information", "marginal_kl")


def by_group(
    pair: Pair, x: Tensor, labels: Tensor | None, train: Tensor | None, take_apart: Callable[..., Surgery]
) -> Surgery | None:
    """The surgery of every group of rows with the same covariates, pooled; None where there is but one group.

    E_y KL(q(z|x, y) || p(z|y)) = I_q[x, z | y] + E_y KL(q_agg(z|y) || p(z|y)), with y as it occurs in the data.

    Arguments:
        pair: a pair with covariates.
        x: rows.
        labels: of the rows, or None.
        train: other rows, whose q_agg(z | y) is tried as the prior.
        take_apart: the surgery of one group: `(rows, labels, train)`.
    """
    groups = pair.groups(x)
    if groups is None or len(present := groups.unique().tolist()) < 2:
        return None
    others = None if train is None else pair.groups(train)
    found, sizes = [], []
    for group in present:
        mine = groups == group
        same = None if train is None or others is None else train[others == group]
        same = same if same is not None and len(same) else None
        found.append(take_apart(x[mine], None if labels is None else labels[mine], same))
        sizes.append(int(mine.sum()))
    return pool(found, sizes)


def pool(found: Sequence[Surgery], sizes: Sequence[int]) -> Surgery:
    """Means of the figures of groups, weighed by their sizes; errors are those of independent draws."""
    n = sum(sizes)
    weights = [size / n for size in sizes]
    first = found[0]
    latents = {name: _level([s.latents[name] for s in found], weights) for name in first.latents}
    told = dict.fromkeys(note for s in found for note in s.notes)
    classes = {label: c for s in found for label, c in s.classes.items()}
    distinct = sum(len(s.classes) for s in found) == len(classes)
    return replace(
        first,
        n=n,
        **{name: _mean([getattr(s, name) for s in found], weights) for name in FIGURES},
        latents=latents,
        classes=classes if distinct else {},
        label_information=None,
        shared={name: sum(s.shared[name] for s in found) for name in first.shared},
        notes=(f"conditioned: q_agg(z | y) and I_q[x, z | y] within each of {len(found)} groups", *told),
    )


def _mean(parts: Sequence[Estimate | None], weights: Sequence[float]) -> Any:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    value = sum(w * part.value for w, part in zip(weights, known, strict=True))
    error = math.sqrt(sum((w * part.standard_error) ** 2 for w, part in zip(weights, known, strict=True)))
    note = next((part.note for part in known if part.note), "")
    return Estimate(value, error, known[0].kind, None, note)


def _level(parts: Sequence[LatentSurgery], weights: Sequence[float]) -> LatentSurgery:
    figures = {name: _mean([getattr(part, name) for part in parts], weights) for name in LEVEL_FIGURES}
    columns = [part.kl_per_dimension for part in parts if part.kl_per_dimension is not None]
    per_dimension = None
    if len(columns) == len(parts):
        per_dimension = tuple(
            sum(w * v for w, v in zip(weights, row, strict=True)) for row in zip(*columns, strict=True)
        )
    return LatentSurgery(**figures, kl_per_dimension=per_dimension, active_units=None)
