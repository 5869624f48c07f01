"""First screen of a report: what was fitted and how well, what the latents look like; alerts say what to do next."""

from collections.abc import Iterator
from math import prod

import numpy as np
from matplotlib.figure import Figure

from pvae.analysis.pages.document.blocks import Part, Picture, Question
from pvae.analysis.pages.document.words import picture, section, text, texts, tile
from pvae.analysis.pages.plots import bars, base, clouds, columns, pictures
from pvae.analysis.pages.sections.examination import Examination
from pvae.analysis.pages.sections.latents import cloud, colours
from pvae.analysis.samples.features import is_image

HALF = (4.2, 3.4)
"""Width and height in inches of a picture of the first screen, two of which stand side by side."""
SHOWN = (3, 6)
"""Rows and columns of images of data, and as many of samples."""


@section("glance")
def glance(exam: Examination) -> Iterator[Part]:
    """Yield the answers of the first screen, each with its pictures; the page adds the alerts."""
    source, epoch = exam.run.files.manifest.get("data", {}).get("source"), exam.run.status.get("epoch")
    count, values = len(exam.data.train), prod(exam.shape)
    said = [text("glance.rows", run=exam.run.name, count=count, values=values, source=source, epoch=epoch)]
    if exam.implicit:
        yield Question(text("glance.fitted"), (*said, text("glance.no_elbo")))
    else:
        said += texts("glance.elbo", surgery=exam.held, split=exam.split, values=values)
        tiles = [tile("glance.total", surgery=s, split=name) for name, s in reversed(exam.surgeries.items())]
        yield Question(text("glance.fitted"), said, tiles)
    latents = {} if exam.implicit else exam.collapse.latents
    kl = {name: exam.held.latents[name].kl for name in latents}
    said = [text("glance.latent", name=name, latent=z, kl=kl[name]) for name, z in latents.items()]
    yield Question(text("glance.latents" if latents else "glance.samples_alone"), said)
    yield from _map(exam)
    yield from _beside(exam)


def _map(exam: Examination) -> Iterator[Picture]:
    """Yield the map of the first real latent, or else the use of the first code; nothing without either."""
    for name, latent in () if exam.implicit else [*exam.collapse.latents.items()][:1]:
        if latent.codes is not None:
            yield picture("glance.codes", _half(bars.code_use(name, latent.codes)), of=name)
        elif name in exam.prior:
            made = clouds.plane(cloud(exam, name), labels := colours(exam), exam.data.label_names)
            yield picture("glance.map", _half(made), of=name, coloured=labels is not None)


def _beside(exam: Examination) -> Iterator[Picture]:
    """Yield images of data above images of samples, or charts of columns; nothing for other data."""
    if exam.is_table and exam.draws is not None:
        made = columns.beside(exam.in_units(exam.observed), exam.in_units(exam.draws.x), charts=4, across=2)
        yield picture("glance.beside", _half(made), images=False)
    if exam.sampled is None or not is_image(exam.shape):
        return
    count = SHOWN[0] * SHOWN[1]
    both = [part[:count] for part in (base.array(exam.observed), base.array(exam.sampled.x).reshape(-1, *exam.shape))]
    if min(map(len, both)) == count:
        grid = np.concatenate(both).reshape(2 * SHOWN[0], SHOWN[1], *exam.shape)
        names = ["data", *[""] * (SHOWN[0] - 1), "samples", *[""] * (SHOWN[0] - 1)]
        yield picture("glance.beside", _half(pictures.gallery(grid, *exam.scale_of_grey, names)), images=True)


def _half(made: Figure) -> Figure:
    made.set_size_inches(*HALF)
    return made
