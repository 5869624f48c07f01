"""Plots of discrete latents: bar charts of code usage, and maps of codes beside data."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pvae.analysis.decompose.collapse import CodeUse
from pvae.analysis.pages.plots.base import FIGURE_WIDTH, figure, plain, style, whole_numbers
from pvae.analysis.pages.plots.pictures import tiles
from pvae.analysis.pages.plots.units import bars
from pvae.util.types import Array


@style()
def code_use(name: str, use: CodeUse) -> Figure:
    """Draw the proportion of each code, most used first, above the perplexity of each position of a discrete latent."""
    perplexity, mapped = np.array(use.perplexity), len(use.grid) == 2
    several = len(perplexity) > 1 or use.share is None
    panels = (use.share is not None) + several
    made = figure(2.1 * panels + 0.5 + 1.2 * mapped)
    ratios = [1.0] * (panels - 1) + [2.0 if mapped else 1.0]
    grid = list(made.subplots(panels, 1, squeeze=False, height_ratios=ratios)[:, 0])
    if use.share is not None:
        share = np.array(use.share)
        bars(grid[0], share, np.arange(len(share)) < (use.used or 0), among=("in use", "dead"))
        grid[0].set_title(f"{plain(name)}: share of each code, most used first")
        grid[0].set_xlabel(f"rank of the code (1 to {use.states})")
        grid[0].set_xlim(0.3, max(use.states, 6) + 0.7)
    if several:
        _of_positions(made, grid[-1], perplexity.reshape(use.grid if mapped else (-1,)), use.states)
        grid[-1].set_title(f"{plain(name)}: perplexity of each position, of at most {use.states}")
    return made


def _of_positions(made: Figure, axes: Axes, perplexity: Array, states: int) -> None:
    """Draw the perplexity of positions: a heat map for a 2D grid, bars otherwise."""
    if perplexity.ndim == 2:
        shown = axes.imshow(perplexity, cmap="viridis", vmin=1, vmax=max(float(perplexity.max()), 1.01))
        made.colorbar(shown, ax=axes)
        axes.set_anchor("W")
        axes.set_xlabel("column")
        axes.set_ylabel("row")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        return
    bars(axes, perplexity, np.ones(len(perplexity), bool))
    axes.set_ylim(0, max(states, 1))
    axes.set_xlabel(f"position (1 to {len(perplexity)})")
    whole_numbers(axes.xaxis)


@style()
def code_maps(name: str, data: Array, maps: Array, states: int, low: float, high: float) -> Figure:
    """Draw images `(n, *shape)` above their grids of codes `(n, H, W)`; colours are ranks of use, most used first."""
    counts = np.bincount(maps.ravel(), minlength=states)
    rank = np.empty(states, dtype=np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(states)
    made = figure(2 * 0.92 * FIGURE_WIDTH / len(data) + 0.75)
    axes = made.subplots()
    h, w = data.shape[-2:]
    gap = max(1, round(w / 10))
    axes.imshow(tiles(data, len(data), low, high), aspect="equal")
    for i, codes in enumerate(rank[maps]):
        left, top = i * (w + gap) - 0.5, h + gap - 0.5
        place = (left, left + w, top + h, top)
        shown = axes.imshow(codes, cmap="cividis", vmin=0, vmax=max(1, states - 1), extent=place)
    axes.set_xlim(-0.5, len(data) * (w + gap) - gap - 0.5)
    axes.set_ylim(2 * h + gap - 0.5, -0.5)
    axes.set_axis_off()
    bar = made.colorbar(shown, ax=axes, location="bottom", aspect=40, pad=0.03, shrink=0.7)
    bar.set_label(f"{plain(name)}: rank of the code, most used (0) first", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return made
