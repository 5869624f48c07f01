"""Sections on what the decoder makes of codes: reconstructions, traversals of latents, interpolations."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pvae.analysis.aggregate.entry import quiet
from pvae.analysis.pages.document.blocks import PageTable, Part, Picture, columns, picture, section
from pvae.analysis.pages.plots import base, pictures
from pvae.analysis.pages.sections.examination import Examination, array
from pvae.analysis.samples.encode import reconstruct
from pvae.analysis.samples.features import is_image
from pvae.analysis.samples.interpolate import interpolate
from pvae.analysis.samples.running import distribution_mean
from pvae.analysis.samples.traversal import Traversal, traverse
from pvae.util import seeds

REBUILT_DATA = 8
"""Number of data per group: best, median and worst."""
TRAVERSED_LATENTS = 3
"""Largest number of latents for which traversals are shown."""
INTERPOLATED_PAIRS = 4
"""Number of pairs of data that are interpolated."""


@section("reconstructions", "Reconstructions")
def reconstructions(exam: Examination) -> Iterator[Part]:
    """Yield best, median and worst reconstructions; nothing for a model without a likelihood."""
    found = None if exam.implicit else exam.attempt("reconstructions", _rebuild, exam)
    if not found:
        return
    yield picture(
        "reconstructions",
        pictures.reconstructions(found, *exam.scale_of_grey),
        f"Data of {exam.split} beside their reconstructions.",
        "Above the datum, below the mean of p(x | z) for one sample of q(z | x); figures are log p(x | z) in nats. "
        "Look at the worst: rare data, or details that the decoder cannot produce.",
    )
    scores = {part.title: part.nats.tolist() for part in found}
    titles = columns("data", *(str(i + 1) for i in range(len(found[0].nats))), digits=1)
    rows = [(title, *values) for title, values in scores.items()]
    yield PageTable("reconstructions", "log p(x | z) of the data above, nats", titles, rows, folded=True)
    yield {"reconstructions": scores}


def _rebuild(exam: Examination) -> list[pictures.Rebuilt]:
    """Return the best, median and worst reconstructions by log p(x | z), with the mean of p(x | z) at the same z.

    Only the best are returned if there are fewer than three times `REBUILT_DATA` rows.
    """
    exam.require_whole_rows()
    picks = pictures.best_to_worst(array(exam.drawn.reconstruction), REBUILT_DATA)
    with quiet(exam.pair, exam.x, exam.seed):
        return [_part(exam, title, torch.from_numpy(rows).to(exam.x.device)) for title, rows in picks.items()]


def _part(exam: Examination, title: str, rows: Tensor) -> pictures.Rebuilt:
    pair, drawn, chosen = exam.pair, exam.drawn, exam.x[rows]
    data = pair.frame.split(chosen)[0]
    if pair.layout.enumerated:  # the score sums over codes c: decode a sample of p(c | x, z)
        means = reconstruct(pair, chosen).x
    else:
        trace = pair.guide_trace(chosen)
        sites = (*pair.layout.latents, *pair.layout.shared)
        values: dict[str, Tensor] = {name: torch.as_tensor(trace.nodes[name]["value"]) for name in sites}
        for name, latent in drawn.latents.items():
            values[name] = latent.value[rows].to(values[name].dtype).reshape(values[name].shape)
        fn = pair.model_trace(chosen, values).nodes[pair.layout.observed[0]]["fn"]
        means = distribution_mean(fn).expand(data.shape)
    return pictures.Rebuilt(title, array(data), array(means), array(drawn.reconstruction[rows]))


@section("traversals", "Traversals")
def traversals(exam: Examination) -> Iterator[Part]:
    """Yield latent traversals; nothing unless data are images or points in the plane."""
    if exam.implicit or not pictures.is_shown(exam.shape) or not exam.whole_rows:
        return
    for name in list(exam.pair.layout.latents)[:TRAVERSED_LATENTS]:
        what = f"traversal of {name}"
        found = exam.attempt(what, traverse, exam.run, latent=name, seed=exam.seed, part=what)
        if found is not None:
            yield _rows(exam, found) if is_image(exam.shape) else _paths(exam, found)


def _rows(exam: Examination, found: Traversal) -> Picture:
    """Return the traversal of a latent for image data: one row of images per coordinate."""
    values = array(found.values)
    same = bool((values == values[:1]).all())
    below = "Below: its value" if same else "Below: its value in the first row; each moves as far as its prior does"
    names = [f"{base.plain(found.latent)[:12]}[{d}]" for d in found.dims]
    steps = [f"{v:.3g}".replace("-", "−") for v in values[0]]
    return picture(
        f"traversal_{found.latent}",
        pictures.gallery(array(found.x), *exam.scale_of_grey, row_names=names, column_names=steps),
        f"{len(names)} rows of pictures: in each one coordinate of {found.latent} moves.",
        f"Means of p(x | z) as one coordinate moves and the others stay at the prior's mean, ordered by {found.order}, "
        f"largest first. {below}. Look for coordinates that change one thing only. Rows that do not change belong to "
        "coordinates without information.",
    )


def _paths(exam: Examination, found: Traversal) -> Picture:
    """Return the traversal of a latent for data in the plane: the path of the mean of p(x | z) for each coordinate."""
    made = pictures.traversed(found, array(exam.part.observed(exam.x[:1000])))
    assert made is not None  # noqa: S101 - points in the plane are shown
    return picture(
        f"traversal_{found.latent}",
        made,
        f"Data, and the path of the mean of p(x | z) as each of {len(found.dims)} coordinates of {found.latent} moves.",
        "Look for paths that follow the data. Dots without a path belong to coordinates without information.",
    )


@section("interpolations", "Interpolations")
def interpolations(exam: Examination) -> Iterator[Part]:
    """Yield interpolations between codes of two data; nothing unless data are images and codes real."""
    if exam.implicit or not is_image(exam.shape) or not exam.whole_rows:
        return
    chosen = _ends(exam)
    found = exam.attempt(
        "interpolations", lambda: [interpolate(exam.run, exam.x[a], exam.x[b], seed=exam.seed) for a, b in chosen]
    )
    if not found:
        return
    yield picture(
        "interpolations",
        pictures.gallery(np.stack([array(path.x) for path in found]), *exam.scale_of_grey),
        f"{len(found)} rows of pictures, each from one datum of {exam.split} to another.",
        "Means of p(x | z) on the path between the codes of two data. Pictures in the middle should look like data, "
        "not like two data laid over each other.",
    )
    paths = [path.log_prior.tolist() for path in found if path.log_prior is not None]
    if len(paths) == len(found):
        rows = [(str(i), *path) for i, path in enumerate(paths, 1)]
        titles = columns("row", *(str(k + 1) for k in range(len(paths[0]))), digits=1)
        caption = "log p(z) on each path, nats: low values in the middle are codes that are improbable under the prior"
        yield PageTable("interpolations", caption, titles, rows, folded=True)


def _ends(exam: Examination) -> list[tuple[int, int]]:
    """Return random pairs of rows, chosen by the seed; the two rows of a pair differ in label if data have labels."""
    generator = torch.Generator().manual_seed(seeds.mix(exam.seed, seeds.ANALYSIS, 33))
    order = torch.randperm(len(exam.x), generator=generator).tolist()
    pairs: list[tuple[int, int]] = []
    while len(order) > 1 and len(pairs) < INTERPOLATED_PAIRS:
        a = order.pop(0)
        b = next((i for i in order if exam.labels is None or exam.labels[i] != exam.labels[a]), None)
        if b is None:
            break
        order.remove(b)
        pairs.append((a, b))
    return pairs
