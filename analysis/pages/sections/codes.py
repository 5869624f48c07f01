"""How codes are used."""

from __future__ import annotations

import numpy as np

from pvae.analysis.decompose.collapse import CodeUse
from pvae.analysis.pages import plots
from pvae.analysis.pages.document.document import Block, Column, Picture, Section, Table, nats, picture
from pvae.analysis.pages.sections.examination import Case, array

SHOWN = 6
"""Data whose codes are mapped."""


def section(case: Case) -> Section | None:
    """Use, perplexity and maps of every grid of codes; None where there are none."""
    if case.implicit:
        return None
    use = {name: latent.codes for name, latent in case.collapse.latents.items() if latent.codes is not None}
    if not use:
        return None
    blocks: list[Block] = [_table(case, use)]
    for name, codes in use.items():
        blocks.append(_use(name, codes))
        if (shown := _maps(case, name, codes)) is not None:
            blocks.append(shown)
        if codes.share is not None and codes.states <= 4096:
            caption = f"Share of each code of {name} on {case.split}, most used first"
            rows = tuple((i + 1, share) for i, share in enumerate(codes.share))
            blocks.append(Table(f"codes_{name}", caption, (Column("rank"), Column("share", 5)), rows, folded=True))
    return Section("codes", "Codes", tuple(blocks))


def _table(case: Case, use: dict[str, CodeUse]) -> Table:
    titles = ("positions", "codes", "perplexity of a position", "pooled", "in use", "duplicates")
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
        f"Use of the codes on {case.split}, under the aggregated posterior: exact numbers, not nats; a dash for bits, "
        f"whose positions have nothing in common, and where there is no codebook"
    )
    return Table("codes", caption, (Column("latent"), *(Column(title, 2) for title in titles)), rows)


def _use(name: str, use: CodeUse) -> Picture:
    said = f"{use.used} of {use.states} codes are in use. " if use.used is not None else ""
    low, high = min(use.perplexity), max(use.perplexity)
    return picture(
        f"codes_{name}",
        plots.code_use(name, use),
        f"Use of the codes of {name}. {said}Perplexity of positions: {nats(low)} to {nats(high)}.",
        "Under the aggregated posterior of these rows. A code is in use when its share is above a thousandth of an "
        "even one. Perplexity is the number of codes in use, weighed: a position at 1 says nothing of x. Look for a "
        "long flat end (codes that are never chosen: fewer would do) and for positions that stay dark.",
    )


def _maps(case: Case, name: str, use: CodeUse) -> Picture | None:
    """Some data above the codes that stand for them, where both are pictures."""
    latent = case.drawn.latents[name]
    if len(use.grid) != 2 or use.states < 3 or not plots.is_image(case.shape):
        return None
    rows = np.linspace(0, len(case.x) - 1, min(SHOWN, len(case.x))).astype(int)
    values = array(latent.value)[rows]
    if values.shape[1] != use.grid[0] * use.grid[1]:
        return None
    data = array(case.observed(case.x[rows.tolist()]))
    maps = values.reshape(len(rows), *use.grid).astype(np.int64)
    return picture(
        f"code_maps_{name}",
        plots.code_maps(name, data, maps, use.states, *case.scale_of_grey),
        f"{len(rows)} data of {case.split}, and below each the grid of codes of {name} that stands for it.",
        "Colours are ranks of use among these rows: dark codes are common (background, often), bright ones rare. "
        "Look for maps that follow the picture (codes say what is where), and for maps that are all alike (they say "
        "little).",
    )
