"""Section on discrete latents: usage and perplexity of their codes, and maps of codes beside the data."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from pvae.analysis.decompose.collapse import CodeUse
from pvae.analysis.pages.document.blocks import PageTable, Part, Picture, columns, picture, section
from pvae.analysis.pages.document.text import nats
from pvae.analysis.pages.plots import bars
from pvae.analysis.pages.sections.examination import Examination, array
from pvae.analysis.samples.features import is_image

MAPPED_DATA = 6
"""Number of data whose codes are shown as maps."""
LISTED_CODES = 4096
"""Largest number of codes K for which the proportion of each code is listed in a table."""


@section("codes", "Codes")
def codes(exam: Examination) -> Iterator[Part]:
    """Yield usage, perplexity and maps of every discrete latent; nothing if no latent is discrete."""
    latents = {} if exam.implicit else exam.collapse.latents
    uses = {name: latent.codes for name, latent in latents.items() if latent.codes is not None}
    if uses:
        yield _table(exam, uses)
    for name, use in uses.items():
        yield _use(name, use)
        yield from _maps(exam, name, use)
        if use.share is not None and use.states <= LISTED_CODES:
            caption = f"Proportion of each code of {name} on {exam.split}, most used first"
            titles = columns("rank", "proportion", digits=5)
            yield PageTable(f"codes_{name}", caption, titles, list(enumerate(use.share, 1)), folded=True)


def _table(exam: Examination, uses: dict[str, CodeUse]) -> PageTable:
    titles = ("latent", "positions", "codes", "I_q", "log K", "silent", "perplexity", "pooled", "in use", "duplicates")
    rows = []
    for name, use in uses.items():
        count = len(use.perplexity)
        information, mean = (sum(values) / count for values in (use.information, use.perplexity))
        measured = information, math.log(use.states), use.silent, mean, use.pooled_perplexity, use.used, use.duplicates
        rows.append((name, count, use.states, *measured))
    caption = (
        f"Use of the codes on {exam.split} under the aggregated posterior: I_q of a position (mean), nats, of at most "
        "log K, and silent positions, which carry at most 1 % of it; perplexity of a position, and pooled; a dash "
        "where a figure is not defined (bits have no common codebook)"
    )
    return PageTable("codes", caption, columns(*titles, digits=2), rows)


def _use(name: str, use: CodeUse) -> Picture:
    said = f"{use.used} of {use.states} codes are in use. " if use.used is not None else ""
    low, high = min(use.perplexity), max(use.perplexity)
    return picture(
        f"codes_{name}",
        bars.code_use(name, use),
        f"Use of the codes of {name}. {said}Perplexity of positions: {nats(low)} to {nats(high)}.",
        "Under the aggregated posterior of these rows. A code is in use if its proportion is above a thousandth of "
        "the uniform one. Perplexity is the effective number of codes in use: a position of perplexity 1 carries no "
        "information about x. Look for many codes that are never chosen (fewer would do) and for positions that stay "
        "dark.",
    )


def _maps(exam: Examination, name: str, use: CodeUse) -> Iterator[Picture]:
    """Yield a picture of some data, each above its map of codes.

    Nothing unless data are images, and codes have at least three states and form a 2D grid.
    """
    if len(use.grid) != 2 or use.states < 3 or not is_image(exam.shape):
        return
    rows = np.linspace(0, len(exam.x) - 1, min(MAPPED_DATA, len(exam.x))).astype(int)
    values = array(exam.drawn.latents[name].value)[rows]
    if values.shape[1] != use.grid[0] * use.grid[1]:
        return
    data = array(exam.observed(exam.x[rows.tolist()]))
    maps = values.reshape(len(rows), *use.grid).astype(np.int64)
    yield picture(
        f"code_maps_{name}",
        bars.code_maps(name, data, maps, use.states, *exam.scale_of_grey),
        f"{len(rows)} data of {exam.split}, and below each the grid of codes of {name} that stands for it.",
        "Colours are ranks of use among these rows: dark codes are frequent (often background), bright ones rare. Maps "
        "that follow the picture show that codes say what is where; maps that are all alike carry little information.",
    )
