"""What the model draws, beside the training data nearest to it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from pvae.analysis.pages import plots
from pvae.analysis.pages.document.document import (
    Block,
    Column,
    Note,
    Picture,
    Section,
    Sentence,
    Table,
    Tile,
    percent,
    picture,
    side_by_side,
)
from pvae.analysis.pages.sections.examination import Case, array
from pvae.analysis.samples.copying import Copying, copying

SHOWN, BESIDE = 40, 10
"""Samples on the sheet, and beside their neighbours."""
COPIES = 0.6
"""Share of samples nearer to training rows than to as many held-out ones above which the report speaks of copies."""


def section(case: Case) -> Section | None:
    """Samples, their nearest training rows, and whether they are copies; None of a pair that cannot be sampled."""
    drawn = case.sampled
    if drawn is None:
        return None
    data = array(case.data.train.observed(case.rows["train"].x[:1000]))
    x = array(drawn.x[:SHOWN]).reshape(-1, *case.shape)
    what = "means of p(x | z)" if drawn.is_mean else "draws of the model"
    blocks: list[Block] = [
        picture(
            "samples",
            plots.samples(x, data, *case.scale_of_grey),
            f"{len(x)} samples of the model.",
            f"{what[0].upper()}{what[1:]}, each at its own draw of the prior. {_noise(drawn.is_mean)}Look for samples "
            "that mix kinds (they come from where the prior has mass and q_agg has none), for kinds that are "
            "missing, and for samples that repeat.",
        )
    ]
    found = {
        kind: case.attempt("copying", partial(copying, case.run, case.split, seed=case.seed, samples=some))
        for kind, some in (("means", drawn), ("draws", case.draws))
        if some is not None and some.is_mean == (kind == "means")
    }
    known = {kind: copies for kind, copies in found.items() if copies is not None}
    said, tiles = [], []
    if known:
        first = next(iter(known.values()))
        if plots.is_image(case.shape):
            blocks.append(_beside(case, x, first))
        blocks += [_table(known), *(Note(text) for text in next(reversed(known.values())).remarks)]
        said.append(on_copies(known))
        where = "of samples, than to held-out data; 50 % is the aim"
        tiles.append(Tile("nearer to train", percent(first.nearer.value), where))
    numbers = {"copying": {kind: copies.to_dict() for kind, copies in known.items()}}
    return Section("samples", "Samples", tuple(blocks), "", tuple(said), tuple(tiles), numbers)


def _beside(case: Case, x: plots.Array, found: Copying) -> Picture:
    nearest = case.data.train.observed(case.data.train.rows[found.nearest[:BESIDE].to(case.x.device)])
    pairs = np.stack([x[:BESIDE], array(nearest)[: len(x)]])
    return picture(
        "nearest",
        plots.gallery(pairs, *case.scale_of_grey, row_names=("sample", "nearest")),
        f"{len(pairs[0])} samples, and below each the training datum nearest to it.",
        "Above a sample, below the training datum nearest to it. Look for pairs that are one and the same: a model "
        "that has learned its data by heart.",
    )


def _table(known: Mapping[str, Copying]) -> Table:
    """Means have no noise: only `nearer` is fair to them."""
    rows = [
        (
            term,
            *(None if kind == "means" and term != "nearer" else e for kind, e in zip(known, found, strict=True)),
            what,
        )
        for term, *found, what in side_by_side(known)
    ]
    titles = (Column("figure"), *(Column(kind) for kind in known), Column("what it is", is_text=True))
    shown = [row for row in rows if any(e is not None for e in row[1:-1])]
    return Table("copying", f"{next(iter(known.values())).title}; shares", titles, shown)


def _noise(is_mean: bool) -> str:
    """Why means look as they do."""
    return "Without the likelihood's own noise they look smoother than data. " if is_mean else ""


def on_copies(known: Mapping[str, Copying]) -> Sentence:
    """Of means and draws: nearer to train than to held-out data, or (draws alone) too many too near."""
    first, last = next(iter(known.values())), known.get("draws")
    text = f"{percent(first.nearer.value)} of samples lie nearer to training data than to as many held-out data"
    near = [copies.nearer for copies in known.values()]
    clear = any(e.value > max(COPIES, 0.5 + 4 * e.standard_error) for e in near)
    doubt = any(e.value > 0.5 + 2 * e.standard_error or not e.standard_error < 0.05 for e in near)
    if last is not None:
        excess = last.share.value - last.held_share
        if excess > max(4 * last.share.standard_error, last.held_share):
            clear = True
            text += f", and {percent(last.share.value)} as near as {percent(last.held_share)} of held-out data"
    if clear:
        return Sentence(
            f"The model has memorised: {text}. Stop earlier (train.patience), use smaller networks or fewer "
            "components, or more data.",
            True,
        )
    return Sentence(
        f"{'' if doubt else 'No copies: '}{text} (± {percent(first.nearer.standard_error)}; 50 % is the aim)."
    )
