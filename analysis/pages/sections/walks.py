"""Sections on latent traversals of single coordinates, and on interpolations between two data."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from pvae.analysis.pages import plots
from pvae.analysis.pages.document.blocks import Block, PageSection, PageTable, columns, picture
from pvae.analysis.pages.sections.examination import Examination, array
from pvae.analysis.samples.interpolate import interpolate
from pvae.analysis.samples.traversal import Traversal, traverse
from pvae.util import seeds

TRAVERSED_LATENTS = 3
"""Largest number of latents for which traversals are shown."""
INTERPOLATED_PAIRS = 4
"""Number of pairs of data that are interpolated."""


def traversals(exam: Examination) -> PageSection | None:
    """Return the section on latent traversals; None unless data are images or points in the plane."""
    if exam.implicit or not plots.is_shown(exam.shape):
        return None
    blocks: list[Block] = []
    for name in list(exam.pair.layout.latents)[:TRAVERSED_LATENTS]:
        told = exam.stages.part(f"traversal of {name}")
        walk = partial(traverse, exam.run, latent=name, seed=exam.seed, on_progress=told)
        if (found := exam.attempt(f"traversal of {name}", walk)) is None:
            continue
        blocks += _pictures(exam, found) if plots.is_image(exam.shape) else _paths(exam, found)
    return PageSection("traversals", "Traversals", tuple(blocks)) if blocks else None


def _pictures(exam: Examination, found: Traversal) -> list[Block]:
    """Return the traversal of a latent for image data: one row of images per coordinate."""
    values = array(found.values)
    same = bool((values == values[:1]).all())
    below = "Below: its value" if same else "Below: its value in the first row; each moves as far as its prior does"
    names = [f"{plots.plain(found.latent)[:12]}[{d}]" for d in found.dims]
    steps = [f"{v:.3g}".replace("-", "−") for v in values[0]]
    return [
        picture(
            f"traversal_{found.latent}",
            plots.gallery(array(found.x), *exam.scale_of_grey, row_names=names, column_names=steps),
            f"{len(names)} rows of pictures: in each one coordinate of {found.latent} moves.",
            f"Means of p(x | z) as one coordinate moves and the others stay at the prior's mean, ordered by "
            f"{found.order}, largest first. {below}. Look for coordinates that change one thing only. Rows that do "
            "not change belong to coordinates without information.",
        )
    ]


def _paths(exam: Examination, found: Traversal) -> list[Block]:
    """Return the traversal of a latent for data in the plane: the path of the mean of p(x | z) for each coordinate."""
    made = plots.traversed(found, array(exam.observed(exam.x[:1000])))
    if made is None:
        return []
    alt = (
        f"Data, and the path of the mean of p(x | z) as each of {len(found.dims)} coordinates of {found.latent} moves."
    )
    caption = "Look for paths that follow the data. Dots without a path belong to coordinates without information."
    return [picture(f"traversal_{found.latent}", made, alt, caption)]


def interpolations(exam: Examination) -> PageSection | None:
    """Return the section on interpolations between codes of two data; None unless data are images and codes real."""
    if exam.implicit or not plots.is_image(exam.shape):
        return None
    chosen = _ends(exam)
    found = exam.attempt(
        "interpolations",
        lambda: [interpolate(exam.run, exam.x[a], exam.x[b], seed=exam.seed) for a, b in chosen],
    )
    if not found:
        return None
    made = picture(
        "interpolations",
        plots.gallery(np.stack([array(path.x) for path in found]), *exam.scale_of_grey),
        f"{len(found)} rows of pictures, each from one datum of {exam.split} to another.",
        "Means of p(x | z) on the path between the codes of two data. Pictures in the middle should look like data, "
        "not like two data laid over each other.",
    )
    blocks: list[Block] = [made]
    paths = [path.log_prior for path in found if path.log_prior is not None]
    if len(paths) == len(found):
        rows = tuple((f"{i + 1}", *(float(v) for v in path)) for i, path in enumerate(paths))
        titles = columns("row", *(str(k + 1) for k in range(len(paths[0]))), digits=1)
        caption = "log p(z) on each path, nats: low values in the middle are codes that are improbable under the prior"
        blocks.append(PageTable("interpolations", caption, titles, rows, folded=True))
    return PageSection("interpolations", "Interpolations", tuple(blocks))


def _ends(exam: Examination) -> list[tuple[int, int]]:
    """Return random pairs of rows, chosen by the seed; the two rows of a pair differ in label if data have labels."""
    order = torch.randperm(
        len(exam.x), generator=torch.Generator().manual_seed(seeds.mix(exam.seed, seeds.ANALYSIS, 33))
    ).tolist()
    pairs: list[tuple[int, int]] = []
    while len(order) > 1 and len(pairs) < INTERPOLATED_PAIRS:
        a = order.pop(0)
        apart = [i for i in order if exam.labels is None or exam.labels[i] != exam.labels[a]]
        if not apart:
            break
        order.remove(apart[0])
        pairs.append((a, apart[0]))
    return pairs
