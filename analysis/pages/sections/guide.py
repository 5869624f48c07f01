"""Section on guide quality: k-hat diagnostic of the importance weights of every datum."""

from __future__ import annotations

import numpy as np

from pvae.analysis.bounds.lower_bounds import Evidence
from pvae.analysis.pages import plots
from pvae.analysis.pages.document.blocks import Block, PageColumn, PageSection, PageTable, Sentence, Tile, picture
from pvae.analysis.pages.document.text import nats, percent
from pvae.analysis.pages.sections.examination import Examination, array
from pvae.analysis.pages.sections.fit import richer

UNRELIABLE = 0.1
"""Proportion of data with k-hat above its limit beyond which the report gives an alert."""
WORST_DATA = 10
"""Number of data with the largest k-hat that the report shows."""


def section(exam: Examination) -> PageSection | None:
    """Return the section on k-hat: its histogram, and the data with the largest k-hat.

    None without importance weights, if log p(x) is exact, or if no k-hat is finite.
    """
    bound = None if exam.implicit else exam.evidence
    if bound is None or bound.exact is not None or not bool(bound.khat.isfinite().any()):
        return None
    khat = array(bound.khat)
    order = np.argsort(-np.where(np.isfinite(khat), khat, -np.inf), kind="stable")[:WORST_DATA]
    blocks: list[Block] = [
        picture(
            "khat",
            plots.khats(khat, bound.khat_limit),
            f"Histogram of k-hat over {bound.n} data; {percent(bound.khat_share)} above {bound.khat_limit:.2f}.",
            "k-hat measures how heavy the tail of a datum's importance weights is. To the right of the dashed line the "
            "guide is too narrow or misplaced: there the bound on log p(x) is loose and its standard error too small.",
        )
    ]
    rows = exam.evidence_rows
    if plots.is_image(exam.shape):
        data = array(exam.observed(rows.x[order.tolist()]))
        blocks.append(
            picture(
                "worst_inferred",
                plots.gallery(data[None], *exam.scale_of_grey, column_names=[f"{khat[i]:.2f}" for i in order]),
                f"The {len(order)} data with the largest k-hat.",
                "The data whose posterior is hardest for the guide, with their k-hat. Look for a common kind: rare "
                "data, doubtful labels, or details that the decoder cannot produce.",
            )
        )
    caption = (
        f"Data of {exam.split} with the largest k-hat ({rows.note}): row of the split, k-hat, effective samples, nats"
    )
    effective = PageColumn(f"effective samples of {bound.samples}", 1)
    titles = (PageColumn("row"), PageColumn("k-hat", 2), effective, PageColumn("log p(x)"))
    table = tuple((str(int(rows.chosen[i])), float(khat[i]), float(bound.ess[i]), float(bound.log_p[i])) for i in order)
    blocks.append(PageTable("worst_inferred", caption, titles, table))
    lead = "Importance weights p(x, z) / q(z | x) show, datum by datum, whether q(z | x) covers the posterior."
    tiles = [Tile("k-hat above limit", percent(bound.khat_share), f"of {bound.n} data, limit {bound.khat_limit:.2f}")]
    return PageSection("guide", "Guide quality", tuple(blocks), lead, tuple(_on_khat(exam, bound)), tuple(tiles))


def _on_khat(exam: Examination, bound: Evidence) -> list[Sentence]:
    share, limit = percent(bound.khat_share), f"{bound.khat_limit:.2f}"
    if bound.khat_share > UNRELIABLE:
        return [
            Sentence(
                f"k-hat exceeds its limit of {limit} on {share} of data points: there the guide is too narrow, and "
                f"log p(x) may be nats above its bound of {nats(bound.iwae)}.{richer(exam)} Training with "
                "objective.kind = iwae also widens the guide; more samples tighten the bound alone.",
                True,
            )
        ]
    if not bound.khat_share > 0:
        return [Sentence(f"Importance sampling is reliable: k-hat is within its limit of {limit} on every data point.")]
    return [Sentence(f"Importance sampling is reliable: k-hat exceeds its limit of {limit} on only {share} of data.")]
