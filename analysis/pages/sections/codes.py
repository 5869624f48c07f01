"""Section on discrete latents: usage and perplexity of their codes, and maps of codes beside the data."""

from __future__ import annotations

import numpy as np

from pvae.analysis.decompose.collapse import CodeUse
from pvae.analysis.pages import plots
from pvae.analysis.pages.document.blocks import Block, PageSection, PageTable, Picture, columns, picture
from pvae.analysis.pages.document.text import nats
from pvae.analysis.pages.sections.examination import Examination, array

MAPPED_DATA = 6
"""Number of data whose codes are shown as maps."""
LISTED_CODES = 4096
"""Largest number of codes K for which the proportion of each code is listed in a table."""


def section(exam: Examination) -> PageSection | None:
    """Return the section on usage, perplexity and maps of every discrete latent; None if no latent is discrete."""
    if exam.implicit:
        return None
    use = {name: latent.codes for name, latent in exam.collapse.latents.items() if latent.codes is not None}
    if not use:
        return None
    blocks: list[Block] = [_table(exam, use)]
    for name, codes in use.items():
        blocks.append(_use(name, codes))
        if (shown := _maps(exam, name, codes)) is not None:
            blocks.append(shown)
        if codes.share is not None and codes.states <= LISTED_CODES:
            caption = f"Proportion of each code of {name} on {exam.split}, most used first"
            titles = columns("rank", "proportion", digits=5)
            rows = tuple((i + 1, share) for i, share in enumerate(codes.share))
            blocks.append(PageTable(f"codes_{name}", caption, titles, rows, folded=True))
    return PageSection("codes", "Codes", tuple(blocks))


def _table(exam: Examination, use: dict[str, CodeUse]) -> PageTable:
    titles = ("latent", "positions", "codes", "perplexity of a position", "pooled", "in use", "duplicates")
    rows = tuple(
        (
            name,
            len(codes.perplexity),
            codes.states,
            sum(codes.perplexity) / len(codes.perplexity),
            codes.pooled_perplexity,
            codes.used,
            codes.duplicates,
        )
        for name, codes in use.items()
    )
    caption = (
        f"Use of the codes on {exam.split} under the aggregated posterior: exact numbers, not nats; a dash where a "
        "figure is not defined (bits have no common codebook)"
    )
    return PageTable("codes", caption, columns(*titles, digits=2), rows)


def _use(name: str, use: CodeUse) -> Picture:
    said = f"{use.used} of {use.states} codes are in use. " if use.used is not None else ""
    low, high = min(use.perplexity), max(use.perplexity)
    return picture(
        f"codes_{name}",
        plots.code_use(name, use),
        f"Use of the codes of {name}. {said}Perplexity of positions: {nats(low)} to {nats(high)}.",
        "Under the aggregated posterior of these rows. A code is in use if its proportion is above a thousandth of "
        "the uniform one. Perplexity is the effective number of codes in use: a position of perplexity 1 carries no "
        "information about x. Look for many codes that are never chosen (fewer would do) and for positions that stay "
        "dark.",
    )


def _maps(exam: Examination, name: str, use: CodeUse) -> Picture | None:
    """Return a picture of some data, each above its map of codes.

    None unless data are images, and codes have at least three states and form a 2D grid.
    """
    latent = exam.drawn.latents[name]
    if len(use.grid) != 2 or use.states < 3 or not plots.is_image(exam.shape):
        return None
    rows = np.linspace(0, len(exam.x) - 1, min(MAPPED_DATA, len(exam.x))).astype(int)
    values = array(latent.value)[rows]
    if values.shape[1] != use.grid[0] * use.grid[1]:
        return None
    data = array(exam.observed(exam.x[rows.tolist()]))
    maps = values.reshape(len(rows), *use.grid).astype(np.int64)
    return picture(
        f"code_maps_{name}",
        plots.code_maps(name, data, maps, use.states, *exam.scale_of_grey),
        f"{len(rows)} data of {exam.split}, and below each the grid of codes of {name} that stands for it.",
        "Colours are ranks of use among these rows: dark codes are frequent (often background), bright ones rare. Maps "
        "that follow the picture show that codes say what is where; maps that are all alike carry little information.",
    )
