"""Plot of the calibration of a guide: histograms of ranks, and the coverage of its regions."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binom

from pvae.analysis.bounds.calibration import Calibration
from pvae.analysis.bounds.ranks import LEVEL, RankTest
from pvae.analysis.pages.plots.base import BLUE, GREEN, GREY, PALE, panels, plain, style

BARS, HISTOGRAMS = 10, 5
"""Largest numbers of bars of a histogram, and of histograms."""


@style()
def calibrated(found: Calibration) -> Figure:
    """Plot the ranks of the coordinates that are worst calibrated, and the coverage of regions of all coordinates."""
    shown = found.worst[:HISTOGRAMS]
    made, grid = panels(2.0 * (len(shown) // 3 + 1), [1] * (len(shown) // 3 + 1), columns=3)
    for axes, test in zip(grid, shown, strict=False):
        _ranks(axes, test)
    _coverage(grid[len(shown)], found)
    for axes in grid[len(shown) + 1 :]:
        axes.set_axis_off()
    return made


def _ranks(axes: Axes, test: RankTest) -> None:
    """Draw counts of ranks, relative to those expected, with the band that holds all bars of 95 % of exact ones."""
    ranks, n = len(test.counts), sum(test.counts)
    edges = np.unique(np.linspace(0, ranks, min(ranks, BARS) + 1).round().astype(int))
    share = np.diff(edges) / ranks
    tail = LEVEL / 2 / len(share)
    axes.stairs(
        binom.ppf(1 - tail, n, share) / (n * share), edges / ranks, baseline=binom.ppf(tail, n, share) / (n * share),
        fill=True, color=PALE,
    )  # fmt: skip
    axes.stairs(np.add.reduceat(test.counts, edges[:-1]) / (n * share), edges / ranks, color=BLUE, linewidth=1.5)
    axes.axhline(1.0, color=GREY, linewidth=0.8)
    axes.set(xlim=(0, 1), xticks=[0, 0.5, 1], ylim=(0, None), xlabel="rank")
    axes.set_title(f"{plain(test.name)}\n{test.verdict}", fontsize=9)


def _coverage(axes: Axes, found: Calibration) -> None:
    """Draw the proportion of true latents in the regions of q over their probability, with its 95 % band."""
    levels = np.linspace(0, 1, 101)
    axes.fill_between(
        levels, *(binom.ppf(p, found.n, levels) / found.n for p in (LEVEL / 2, 1 - LEVEL / 2)), color=PALE
    )
    axes.plot(levels, levels, color=GREY, linewidth=0.8)
    for tests, colour, line, label in ((found.guide, BLUE, "-", "q"), (found.weighted, GREEN, "--", "weighted")):
        if tests:
            axes.plot(levels, [tests[-1].within(p).value for p in levels], line, color=colour, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], xlabel="region of q")
    axes.set_title(f"coverage, jointly\n{found.joint.verdict}", fontsize=9)
    axes.legend(loc="upper left")
