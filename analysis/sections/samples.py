"""What the model draws, beside the training data nearest to it."""

from __future__ import annotations

import numpy as np

from pvae.analysis import plots
from pvae.analysis.case import Case, array
from pvae.analysis.copying import Copying, copying
from pvae.analysis.document import Block, Note, Section, Sentence, Tile, percent, picture, table_of

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
            f"{what[0].upper()}{what[1:]}, each at its own draw of the prior. {_noise(drawn.is_mean)}Look for samples that "
            f"mix kinds (they come from where the prior has mass and q_agg has none), for kinds that are missing, and "
            f"for samples that repeat.",
        )
    ]
    found = case.attempt("copying", lambda: copying(case.run, case.split, seed=case.seed, samples=drawn))
    said, tiles = [], []
    if found is not None:
        if plots.is_image(case.shape):
            nearest = case.data.train.observed(case.data.train.rows[found.nearest[:BESIDE].to(case.x.device)])
            pairs = np.stack([x[:BESIDE], array(nearest)[: len(x)]])
            blocks.append(
                picture(
                    "nearest",
                    plots.gallery(pairs, *case.scale_of_grey, row_names=("sample", "nearest")),
                    f"{len(pairs[0])} samples, and below each the training datum nearest to it.",
                    "Above a sample, below the training datum nearest to it. Look for pairs that are one and the same: a "
                    "model that has learned its data by heart.",
                )
            )
        blocks += [table_of("copying", found), *(Note(text) for text in found.remarks)]
        said.append(_on_copies(found))
        tiles.append(
            Tile("nearer to train", percent(found.nearer.value), "of samples, than to held-out data; 50 % is the aim")
        )
    numbers = {"copying": None if found is None else found.to_dict()}
    return Section("samples", "Samples", tuple(blocks), "", tuple(said), tuple(tiles), numbers)


def _noise(is_mean: bool) -> str:
    """Why means look as they do."""
    return "Without the likelihood's own noise they look smoother than data. " if is_mean else ""


def _on_copies(found: Copying) -> Sentence:
    text = f"{percent(found.nearer.value)} of samples lie nearer to training data than to as many held-out data"
    if found.nearer.value > max(COPIES, 0.5 + 4 * found.nearer.standard_error):
        return Sentence(
            f"The model has memorised: {text}. Stop earlier (train.patience), use smaller networks or fewer components, "
            f"or more data.",
            True,
        )
    return Sentence(f"No copies: {text} (50 % is the aim).")
