"""Section on samples of the model, and on memorisation: their nearest training data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from pvae.analysis.figures.estimate import merged
from pvae.analysis.pages.document.blocks import Note, PageTable, Part, Sentence, Tile, columns, picture, section
from pvae.analysis.pages.document.text import percent
from pvae.analysis.pages.plots import pictures
from pvae.analysis.pages.sections.examination import Examination, array
from pvae.analysis.samples.copying import Copying, copying
from pvae.analysis.samples.features import is_image

ON_SHEET, BESIDE_NEIGHBOURS = 40, 10
"""Numbers of samples: shown in total, and shown with their nearest training data."""
MEMORISED = 0.6
"""Proportion of samples nearer to training than to held-out rows above which the report warns of memorisation."""


@section("samples", "Samples")
def samples(exam: Examination) -> Iterator[Part]:
    """Yield samples and their nearest training rows; nothing if the model cannot be sampled."""
    drawn = exam.sampled
    if drawn is None:
        return
    data = array(exam.data.train.observed(exam.rows["train"].x[:1000]))
    x = array(drawn.x[:ON_SHEET]).reshape(-1, *exam.shape)
    what = "Means of p(x | z)" if drawn.is_mean else "Samples of the model"
    noise = "Without the likelihood's own noise they look smoother than data. " if drawn.is_mean else ""
    yield picture(
        "samples",
        pictures.samples(x, data, *exam.scale_of_grey),
        f"{len(x)} samples of the model.",
        f"{what}, each at its own sample of the prior. {noise}Look for samples that mix kinds (they come from holes of "
        "the prior), for kinds that are missing, and for samples that repeat.",
    )
    told, known = exam.stages.part("nearest training data"), {}
    for kind, some in (("means", drawn), ("draws", exam.draws)):
        if some is not None and some.is_mean == (kind == "means"):
            given: dict[str, Any] = {"samples": some, "seed": exam.seed, "on_progress": told}
            if (copies := exam.attempt("copying", copying, exam.run, exam.split, **given)) is not None:
                known[kind] = copies
    yield {"copying": {kind: copies.to_dict() for kind, copies in known.items()}}
    if not known:
        return
    first = next(iter(known.values()))
    if is_image(exam.shape):
        train = exam.data.train
        nearest = train.observed(train.rows[first.nearest[:BESIDE_NEIGHBOURS].to(exam.x.device)])
        pairs = np.stack([x[:BESIDE_NEIGHBOURS], array(nearest)[: len(x)]])
        yield picture(
            "nearest",
            pictures.gallery(pairs, *exam.scale_of_grey, row_names=("sample", "nearest")),
            f"{len(pairs[0])} samples, and below each the training datum nearest to it.",
            "Above a sample, below the training datum nearest to it. Identical pairs are memorised data.",
        )
    yield _table(known)
    yield from (Note(text) for text in next(reversed(known.values())).remarks)
    yield on_copies(known)
    yield Tile("nearer to train", percent(first.nearer.value), "of samples, than to held-out; 50 % expected")


def _table(known: Mapping[str, Copying]) -> PageTable:
    """Return the table of the copying tests of samples and of means; for means, which lack noise, only `nearer`."""
    shown = []
    for term, *found, what in merged(known):
        figures = [e if kind != "means" or term == "nearer" else None for kind, e in zip(known, found, strict=True)]
        if any(e is not None for e in figures):
            shown.append((term, *figures, what))
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
