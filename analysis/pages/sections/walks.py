"""What single coordinates draw, and what lies between two data."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from pvae.analysis.pages import plots
from pvae.analysis.pages.document.document import Block, Column, Section, Table, picture
from pvae.analysis.pages.sections.examination import Case, array
from pvae.analysis.samples.interpolate import interpolate
from pvae.analysis.samples.traversal import Traversal, traverse
from pvae.util import seeds

WALKED = 3
"""Most latents that are walked through."""
PAIRS = 4
"""Pairs of data that are walked between."""


def traversals(case: Case) -> Section | None:
    """One coordinate at a time, the dearest first; None where data are neither pictures nor points of the plane."""
    if case.implicit or not plots.is_shown(case.shape):
        return None
    blocks: list[Block] = []
    for name in list(case.pair.layout.latents)[:WALKED]:
        found = case.attempt(f"traversal of {name}", partial(traverse, case.run, latent=name, seed=case.seed))
        if found is None:
            continue
        if not plots.is_image(case.shape):
            blocks += _paths(case, found)
            continue
        values = array(found.values)
        same = bool((values == values[:1]).all())
        below = "Below, its value" if same else "Below, its value in the first row; each moves as far as its prior does"
        names = [f"{plots.plain(name)[:12]}[{d}]" for d in found.dims]
        columns = [f"{v:.3g}".replace("-", "−") for v in values[0]]
        blocks.append(
            picture(
                f"traversal_{name}",
                plots.gallery(array(found.x), *case.scale_of_grey, row_names=names, column_names=columns),
                f"{len(names)} rows of pictures: in each one coordinate of {name} moves.",
                f"Means of p(x | z) as one coordinate moves and the others are held at the prior's mean, ordered by "
                f"{found.order}, largest first. {below}. Look for coordinates that change one thing, and for rows that "
                f"stand still (they carry nothing).",
            )
        )
    return Section("traversals", "Traversals", tuple(blocks)) if blocks else None


def _paths(case: Case, found: Traversal) -> list[Block]:
    """Of points of the plane: where the mean goes as each coordinate moves."""
    made = plots.traversed(found, array(case.observed(case.x[:1000])))
    if made is None:
        return []
    alt = (
        f"Data, and the path of the mean of p(x | z) as each of {len(found.dims)} coordinates of {found.latent} moves."
    )
    return [
        picture(
            f"traversal_{found.latent}",
            made,
            alt,
            "Look for paths that follow the data, and for dots that stand still.",
        )
    ]


def interpolations(case: Case) -> Section | None:
    """From one datum to another, through their codes; None where data are no pictures or codes have no in-between."""
    if case.implicit or not plots.is_image(case.shape):
        return None
    chosen = _ends(case)
    found = case.attempt(
        "interpolations",
        lambda: [interpolate(case.run, case.x[a], case.x[b], seed=case.seed) for a, b in chosen],
    )
    if not found:
        return None
    made = picture(
        "interpolations",
        plots.gallery(np.stack([array(path.x) for path in found]), *case.scale_of_grey),
        f"{len(found)} rows of pictures, each from one datum of {case.split} to another.",
        "Means of p(x | z) along the path between the codes of two data. Look at the middle: it should look like data, "
        "not like two of them laid over each other.",
    )
    blocks: list[Block] = [made]
    if all(path.log_prior is not None for path in found):
        steps = len(found[0].x)
        rows = tuple(
            (f"{i + 1}", *(float(v) for v in path.log_prior))  # type: ignore[union-attr]
            for i, path in enumerate(found)
        )
        columns = (Column("row"), *(Column(str(k + 1), 1) for k in range(steps)))
        caption = "log p(z) along each path, nats: where it falls in the middle the prior thinks little of the way"
        blocks.append(Table("interpolations", caption, columns, rows, folded=True))
    return Section("interpolations", "Interpolations", tuple(blocks))


def _ends(case: Case) -> list[tuple[int, int]]:
    """Pairs of rows by the seed; of two labels where there are labels."""
    order = torch.randperm(
        len(case.x), generator=torch.Generator().manual_seed(seeds.mix(case.seed, seeds.ANALYSIS, 33))
    ).tolist()
    pairs: list[tuple[int, int]] = []
    while len(order) > 1 and len(pairs) < PAIRS:
        a = order.pop(0)
        apart = [i for i in order if case.labels is None or case.labels[i] != case.labels[a]]
        if not apart:
            break
        order.remove(apart[0])
        pairs.append((a, apart[0]))
    return pairs
