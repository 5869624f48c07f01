"""How far the guide can be trusted, datum by datum."""

from __future__ import annotations

import numpy as np

from pvae.analysis.bounds.lower_bounds import Evidence
from pvae.analysis.pages import plots
from pvae.analysis.pages.document.document import Block, Column, Section, Sentence, Table, Tile, nats, percent, picture
from pvae.analysis.pages.sections.examination import Case, array
from pvae.analysis.pages.sections.fit import richer

SHARE = 0.1
"""Of data whose k-hat is above its limit, beyond which the report speaks of it."""
WORST = 10
"""Data that are shown."""


def section(case: Case) -> Section | None:
    """k-hat over the data, and the data the guide does worst on; None where there are no weights."""
    bound = None if case.implicit else case.evidence
    if bound is None or bound.exact is not None or not bool(bound.khat.isfinite().any()):
        return None
    khat = array(bound.khat)
    order = np.argsort(-np.where(np.isfinite(khat), khat, -np.inf), kind="stable")[:WORST]
    blocks: list[Block] = [
        picture(
            "khat",
            plots.khats(khat, bound.khat_limit),
            f"Histogram of k-hat over {bound.n} data; {percent(bound.khat_share)} above {bound.khat_limit:.2f}.",
            "k-hat says how heavy the tail of a datum's importance weights is. Right of the dashed line the guide is "
            "too narrow, or in the wrong place: for these data the bound on log p(x) is loose and its error too small.",
        )
    ]
    rows = case.evidence_rows
    if plots.is_image(case.shape):
        data = array(case.observed(rows.x[order.tolist()]))
        blocks.append(
            picture(
                "worst_inferred",
                plots.gallery(data[None], *case.scale_of_grey, column_names=[f"{khat[i]:.2f}" for i in order]),
                f"The {len(order)} data with the largest k-hat.",
                "The data whose posterior the guide finds hardest, with their k-hat. Look for a kind that comes "
                "back: rare data, labels in doubt, or something the decoder cannot draw.",
            )
        )
    caption = (
        f"Data of {case.split} with the largest k-hat ({rows.note}): row of the split, k-hat, effective samples, nats"
    )
    columns = (
        Column("row"),
        Column("k-hat", 2),
        Column(f"effective samples of {bound.samples}", 1),
        Column("log p(x)"),
    )
    table = tuple((str(int(rows.chosen[i])), float(khat[i]), float(bound.ess[i]), float(bound.log_p[i])) for i in order)
    blocks.append(Table("worst_inferred", caption, columns, table))
    lead = "Importance weights p(x, z) / q(z | x) tell, datum by datum, whether q(z | x) covers the posterior."
    tiles = [Tile("k-hat above limit", percent(bound.khat_share), f"of {bound.n} data, limit {bound.khat_limit:.2f}")]
    return Section("guide", "Guide quality", tuple(blocks), lead, (_on_khat(case, bound),), tuple(tiles))


def _on_khat(case: Case, bound: Evidence) -> Sentence:
    if bound.khat_share > SHARE:
        return Sentence(
            f"k-hat is above {bound.khat_limit:.2f} for {percent(bound.khat_share)} of data: the guide is too narrow "
            f"there, and log p(x) may be nats above {nats(bound.iwae)}.{richer(case)} Training with "
            "objective.kind = iwae helps, too; for the figure alone, more samples do.",
            True,
        )
    return Sentence(
        f"k-hat is above {bound.khat_limit:.2f} for {percent(bound.khat_share)} of data: importance weights can be "
        "trusted."
    )
