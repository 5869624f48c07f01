"""Section on samples of the model, and on memorisation: their nearest training data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from pvae.analysis.pages import plots
from pvae.analysis.pages.document.blocks import (
    Block,
    Note,
    PageSection,
    PageTable,
    Picture,
    Sentence,
    Tile,
    columns,
    picture,
)
from pvae.analysis.pages.document.tables import side_by_side
from pvae.analysis.pages.document.text import percent
from pvae.analysis.pages.sections.examination import Examination, array
from pvae.analysis.samples.copying import Copying, copying
from pvae.util.types import Array

ON_SHEET, BESIDE_NEIGHBOURS = 40, 10
"""Numbers of samples: shown in total, and shown with their nearest training data."""
MEMORISED = 0.6
"""Proportion of samples nearer to training than to held-out rows above which the report warns of memorisation."""


def section(exam: Examination) -> PageSection | None:
    """Return the section on samples and their nearest training rows; None if the model cannot be sampled."""
    drawn = exam.sampled
    if drawn is None:
        return None
    data = array(exam.data.train.observed(exam.rows["train"].x[:1000]))
    x = array(drawn.x[:ON_SHEET]).reshape(-1, *exam.shape)
    what = "Means of p(x | z)" if drawn.is_mean else "Samples of the model"
    noise = "Without the likelihood's own noise they look smoother than data. " if drawn.is_mean else ""
    blocks: list[Block] = [
        picture(
            "samples",
            plots.samples(x, data, *exam.scale_of_grey),
            f"{len(x)} samples of the model.",
            f"{what}, each at its own sample of the prior. {noise}Look for samples that mix kinds (they come from "
            "holes of the prior), for kinds that are missing, and for samples that repeat.",
        )
    ]
    told = exam.stages.part("nearest training data")
    find = partial(copying, exam.run, exam.split, seed=exam.seed, on_progress=told)
    found = {
        kind: exam.attempt("copying", partial(find, samples=some))
        for kind, some in (("means", drawn), ("draws", exam.draws))
        if some is not None and some.is_mean == (kind == "means")
    }
    known = {kind: copies for kind, copies in found.items() if copies is not None}
    said, tiles = [], []
    if known:
        first = next(iter(known.values()))
        if plots.is_image(exam.shape):
            blocks.append(_beside(exam, x, first))
        blocks += [_table(known), *(Note(text) for text in next(reversed(known.values())).remarks)]
        said.append(on_copies(known))
        tiles.append(
            Tile("nearer to train", percent(first.nearer.value), "of samples, than to held-out; 50 % expected")
        )
    numbers = {"copying": {kind: copies.to_dict() for kind, copies in known.items()}}
    return PageSection("samples", "Samples", tuple(blocks), "", tuple(said), tuple(tiles), numbers)


def _beside(exam: Examination, x: Array, found: Copying) -> Picture:
    train = exam.data.train
    nearest = train.observed(train.rows[found.nearest[:BESIDE_NEIGHBOURS].to(exam.x.device)])
    pairs = np.stack([x[:BESIDE_NEIGHBOURS], array(nearest)[: len(x)]])
    return picture(
        "nearest",
        plots.gallery(pairs, *exam.scale_of_grey, row_names=("sample", "nearest")),
        f"{len(pairs[0])} samples, and below each the training datum nearest to it.",
        "Above a sample, below the training datum nearest to it. Identical pairs are memorised data.",
    )


def _table(known: Mapping[str, Copying]) -> PageTable:
    """Return the table of the copying tests of samples and of means; for means, which lack noise, only `nearer`."""
    rows = [
        (
            term,
            *(None if kind == "means" and term != "nearer" else e for kind, e in zip(known, found, strict=True)),
            what,
        )
        for term, *found, what in side_by_side(known)
    ]
    shown = [row for row in rows if any(e is not None for e in row[1:-1])]
    caption = f"{next(iter(known.values())).title}; proportions"
    return PageTable("copying", caption, columns("figure", *known, words=["what it is"]), shown)


def on_copies(known: Mapping[str, Copying]) -> Sentence:
    """Return the sentence on memorisation; an alert if samples or means are closer to training than held-out rows."""
    first, last = next(iter(known.values())), known.get("draws")
    text = f"{percent(first.nearer.value)} of samples are nearer to training rows than to as many held-out rows"
    near = [copies.nearer for copies in known.values()]
    clear = any(e.value > max(MEMORISED, 0.5 + 4 * e.standard_error) for e in near)
    doubt = any(e.value > 0.5 + 2 * e.standard_error or not e.standard_error < 0.05 for e in near)
    if last is not None:
        excess = last.share.value - last.held_share
        if excess > max(4 * last.share.standard_error, last.held_share):
            clear = True
            text += f", and {percent(last.share.value)} are as near as {percent(last.held_share)} of held-out data"
    if clear:
        return Sentence(
            f"The model has memorised training data: {text}. Stop earlier (train.patience), use smaller networks or "
            "fewer components, or more data.",
            True,
        )
    error = percent(first.nearer.standard_error)
    return Sentence(f"{'' if doubt else 'No sign of memorisation: '}{text} (± {error}; 50 % expected).")
