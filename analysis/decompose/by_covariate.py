"""ELBO surgery of a model conditioned on covariates y: the mean of the surgeries of all groups of rows with equal y.

And of rows that have other latents or, in a model written by hand, other priors.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pvae.analysis.aggregate.entry import same_globals
from pvae.analysis.decompose.posterior_draws import Draw, LatentDraw, draw
from pvae.analysis.decompose.result import ClassSurgery, LatentSurgery, Surgery
from pvae.analysis.figures.estimate import Estimate, exact
from pvae.analysis.population.interval import Population
from pvae.pair import Layout, Pair, samples, site_shape
from pvae.util import seeds

BOUNDS = {"mutual_information_lower": "mutual_information", "marginal_kl_upper": "marginal_kl"}
"""Bounds that exist only in groups where q_agg is computed from a random subset of the rows, and the term that replaces
each of them in the other groups."""
GROUP_SEEDS = 1000
"""Offset of the groups' seeds among the noise streams of an analysis."""
GROUPS_AT_MOST = 100
"""Largest number of groups of rows with the same latents that have a surgery of their own."""
NOTHING = exact(0.0)
ABSENT = LatentSurgery(NOTHING, NOTHING, NOTHING, NOTHING, None, None)
"""Surgery of a latent in a group of rows that lack it."""
SAME = 1e-4
"""Largest difference between rows, relative to 1 + size, of the log prior density of one value."""

Known = Tensor | None
Surgeon = Callable[..., Surgery]


def by_group(pair: Pair, x: Tensor, labels: Known, train: Known, take_apart: Surgeon, seed: int) -> Surgery | None:
    """Return the mean of the surgeries of all groups of rows with the same covariates; None for a single group.

    None, too, for more than `GROUPS_AT_MOST` groups of fewer than two rows on average: q_agg(z | y) is then unknown.
    Covariates that are real numbers are in no group, but count as a part of x.

    E_y KL(q(z|x, y) || p(z|y)) = I_q[x, z | y] + E_y KL(q_agg(z|y) || p(z|y)), with y as it occurs in the data.

    Arguments:
        pair: a pair with covariates.
        x: rows.
        labels: class labels of the rows, or None.
        train: other rows, whose q_agg(z | y) is evaluated as the prior, or None.
        take_apart: function that returns the surgery of one group from its rows, `labels`, `train` and `seed`.
        seed: seed of the samples; groups have seeds of their own, so that their errors are independent.
    """
    if (groups := pair.groups(x)) is None or len(groups.unique()) < 2 or _scattered(groups):
        return None
    others = None if train is None else pair.groups(train)
    note = "conditioned: q_agg(z | y) and I_q[x, z | y] within each of {} groups"
    return _pooled(groups, x, labels, (train, others), take_apart, seed, note)


def by_known(pair: Pair, x: Tensor, labels: Known, take_apart: Surgeon, seed: int) -> Surgery | None:
    """Return the mean of the surgeries of rows that hold the value of a latent and of those that do not, in `parts`.

    None where the same latents are known in all rows. The ELBO of rows with y bounds log p(x, y), that of others
    log p(x); their mean is the ELBO of a fit that sees both.
    """
    if not (known := pair.frame.known(x, every=False)):
        return None
    has = torch.stack([~t.isnan().reshape(len(x), -1).any(1) for t in known.values()], 1)
    kinds, groups = has.unique(dim=0, return_inverse=True)
    if len(kinds) < 2:
        return None
    said = [", ".join(f"{n} {'known' if k else 'unknown'}" for n, k in zip(known, kind, strict=True)) for kind in kinds]
    note = "log p(x, y) of rows with a value of a latent y, log p(x) of others, each with a q_agg of its own"
    return _pooled(groups, x, labels, (None, None), take_apart, seed, note, said)


def _scattered(groups: Tensor) -> bool:
    """Return True for too many groups of too few rows."""
    return (count := len(groups.unique())) > GROUPS_AT_MOST and 2 * count > len(groups)


def settled(first: Draw, pair: Pair, x: Tensor) -> bool:
    """Find out by a second draw whether the rows determine which latents they have; call it in `quiet`.

    Latents that no row has are dropped from the first draw. If sampled values decide what is masked (as in AIR), the
    latents concerned count as partial whatever the first draw shows, and the result is False.
    """
    if not (masked := {name: z.present for name, z in first.latents.items() if z.present is not None}):
        return False
    again = {name: z.present for name, z in draw(pair, x).latents.items() if z.present is not None}
    moving = [name for name, present in masked.items() if name not in again or not torch.equal(present, again[name])]
    for name in moving:
        first.latents[name].present = torch.arange(len(x), device=x.device)
    for name, present in {} if moving else masked.items():
        if not bool(present.any()):
            del first.latents[name]
    return not moving


def by_presence(first: Draw, pair: Pair, x: Tensor, labels: Known, take_apart: Surgeon, seed: int) -> Surgery | None:
    """Return the mean of the surgeries of all groups of rows with the same latents, as sequences of one length have.

    None where all rows have the same, where there are more than `GROUPS_AT_MOST` groups, or one of a single row, and
    where rows of a group alone have other latents than in the whole (a mask by the number of the row, say).
    """
    if not (keys := [latent.present for latent in first.latents.values() if latent.partial]):
        return None
    groups = torch.stack([key for key in keys if key is not None], 1).unique(dim=0, return_inverse=True)[1]
    if len(counts := groups.bincount()) > GROUPS_AT_MOST or int(counts.min()) < 2:
        return None
    for group in range(len(counts)):
        mine = groups == group
        alone = draw(pair, x[mine]).latents
        for name, latent in first.latents.items():
            if latent.present is not None and not _keeps(latent.present, mine, alone.get(name)):
                return None
    note = "by the latents that rows have: q_agg and I_q within each of {} groups"
    return _pooled(groups, x, labels, (None, None), take_apart, seed, note)


def _keeps(present: Tensor, mine: Tensor, alone: LatentDraw | None) -> bool:
    """Return whether some rows of a batch have the same elements of a latent in a batch of their own."""
    want = present[mine]
    if alone is None:
        return not bool(want.any())
    return bool((want == present.max()).all()) if alone.present is None else torch.equal(alone.present, want)


def _pooled(
    groups: Tensor, x: Tensor, labels: Known, train: tuple[Tensor | None, Tensor | None],
    take_apart: Surgeon, seed: int, note: str, titles: Sequence[str] = (),
) -> Surgery:  # fmt: skip
    """Return the means over groups of all terms, weighted by group size, with the errors of independent groups.

    If only some groups have a lower and an upper bound, the estimates of the other groups serve as both; `train` are
    other rows and their groups. Groups with `titles` are kept as `parts`.
    """
    others, other_groups = train
    found, sizes = list[Surgery](), list[int]()
    for group in groups.unique().tolist():
        mine = groups == group
        same = None if others is None or other_groups is None else others[other_groups == group]
        own = seeds.mix(seed, seeds.ANALYSIS, GROUP_SEEDS + group)
        y = None if labels is None else labels[mine]
        found.append(take_apart(x[mine], labels=y, train=None if same is None or not len(same) else same, seed=own))
        sizes.append(int(mine.sum()))
    names = dict.fromkeys(name for s in found for name in s.latents)
    latents = {name: _level([s.latents.get(name, ABSENT) for s in found], sizes) for name in names}
    told = dict.fromkeys(note for s in found for note in s.notes)
    known = sorted({label for s in found for label in s.classes})
    classes = {label: _class([s.classes[label] for s in found if label in s.classes]) for label in known}
    figures = _means(found, sizes, but=(*BOUNDS, "global_kl", "label_information"))
    for bound, main in BOUNDS.items():
        if any(getattr(s, bound) for s in found):
            figures[bound] = _mean([getattr(s, bound) or getattr(s, main) for s in found], sizes)
    return replace(
        found[0], n=sum(sizes), **figures, latents=latents,
        population=_population([s.population for s in found], sizes), classes=classes,
        label_information=None, notes=(note.format(len(found)), *told), parts=dict(zip(titles, found, strict=False)),
    )  # fmt: skip


def _class(parts: Sequence[ClassSurgery]) -> ClassSurgery:
    """Return the terms of the rows of one label from those of each group that has some."""
    sizes = [part.n for part in parts]
    return parts[0] if len(parts) == 1 else ClassSurgery(sum(sizes), **_means(parts, sizes))


def _population(found: Sequence[Population | None], sizes: Sequence[int]) -> Population | None:
    """Return the mean of the intervals of groups of rows that have other latents; None if one group has none."""
    known = [part for part in found if part is not None]
    if len(known) < len(found):
        return None
    figures = _means(known, sizes, but=("midpoint",))
    notes = tuple(dict.fromkeys(note for part in known for note in part.notes))
    prior = f"a prior for each of {len(known)} groups of rows with the same latents"
    return Population(n=sum(sizes), **figures, prior=prior, notes=notes)


def _means(parts: Sequence[Any], sizes: Sequence[int], but: Collection[str] = ()) -> dict[str, Any]:
    """Return the weighted means of all fields of results that are estimates, but for some."""
    names = [field.name for field in fields(parts[0]) if "Estimate" in str(field.type) and field.name not in but]
    return {name: _mean([getattr(part, name) for part in parts], sizes) for name in names}


def _mean(parts: Sequence[Estimate | None], sizes: Sequence[int]) -> Any:
    """Return the weighted mean of estimates, of the weakest kind among them; None if one of them is None.

    A group whose standard error is not finite (a single row) takes the average variance of the other groups.
    """
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    n = sum(sizes)
    value = sum(size * part.value for size, part in zip(sizes, known, strict=True)) / n
    spreads = [part.standard_error**2 * size for size, part in zip(sizes, known, strict=True)]
    finite = [spread for spread in spreads if math.isfinite(spread)]
    usual = sum(finite) / len(finite) if finite else math.nan
    filled = [spread if math.isfinite(spread) else usual for spread in spreads]
    variance = sum(size * spread for size, spread in zip(sizes, filled, strict=True))
    kinds = {part.kind for part in known}
    kind = next(kind for kind in ("upper_bound", "lower_bound", "estimate", "exact") if kind in kinds)
    note = next((part.note for part in known if part.note), "")
    return Estimate(value, math.sqrt(variance) / n, kind, None, note)


def _level(parts: Sequence[LatentSurgery], sizes: Sequence[int]) -> LatentSurgery:
    figures = _means(parts, sizes)
    columns = [part.kl_per_dimension for part in parts if part.kl_per_dimension is not None]
    means = np.average(columns, 0, sizes).tolist() if len(columns) == len(parts) else None
    per_dimension = None if means is None else tuple(means)
    return LatentSurgery(**figures, kl_per_dimension=per_dimension, active_units=None)


# ---------------------------------------------------------------------- priors by row


def priors_by_row(pair: Pair, x: Tensor) -> frozenset[str]:
    """Return the latents whose prior p(z | parents) differs between rows where all latents have the same values.

    Their aggregated posterior has no one prior to be compared with. The model is run on all rows, with the latents of
    every row set to those of the first; call it in `quiet`. In a declared pair they are those whose prior is given a
    covariate that is a real number, or that has too many values for groups of rows.
    """
    if pair.declared:
        frame, groups, model = pair.frame, pair.groups(x), cast(Any, pair.model)
        alone = set(frame.covariates if groups is not None and _scattered(groups) else frame.continuous)
        return frozenset(site.name for site in model.sites if alone.intersection(site.given))
    if not pair.layout.latents or pair.layout.enumerated:
        return frozenset()
    found: set[str] = set()
    with same_globals(pair, x):
        guide, model = (samples(trace) for trace in pair.traces(pair.structure.few(x)))
        inside = {name: node for name, node in {**model, **guide}.items() if pair.layout.holds(node)}
        nodes = {name: node for name, node in inside.items() if not node["is_observed"]}
        shapes = {name: site_shape(node, pair.layout) for name, node in nodes.items()}
        rows = {name: (shape, shape.flatten(nodes[name]["value"])[:1]) for name, shape in shapes.items()}
        first: dict[str, Tensor] = {}
        for part in x.split(pair.structure.rows_at_once()):
            values = {name: shape.spread(row.expand(len(part), -1)) for name, (shape, row) in rows.items()}
            sites = samples(pair.model_trace(part, values))
            for name in values.keys() & sites.keys():
                scores = _by_row(sites[name], pair.layout, len(part))
                one = first.setdefault(name, scores[:1])
                if one.shape[1:] != scores.shape[1:] or bool(((scores - one).abs() > SAME * (1 + one.abs())).any()):
                    found.add(name)
    return frozenset(found)


def _by_row(node: Any, layout: Layout, rows: int) -> Tensor:
    """Return the unmasked log density of a site by row, `(rows, other plates)`, float64."""
    if (score := node["fn"].log_prob(node["value"]).double()).dim() < -layout.dim:
        return score.reshape(1, -1)
    return torch.nan_to_num(score.movedim(layout.dim, 0).flatten(1) if score.dim() > 1 else score[:, None])
