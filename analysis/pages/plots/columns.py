"""Plots of data that are no images beside samples: a chart for each column, correlations, counts of each feature."""

import math
from typing import Any

import numpy as np
import pandas
from matplotlib.figure import Figure

from pvae.analysis.pages.plots.base import BLACK, ORANGE, PALE, RED, panels, plain, style

CHARTS, ACROSS, COMPARED = 12, 3, 500
"""Largest numbers of columns that have a chart, of charts beside each other, and of columns that are compared."""
LEVELS = 12
"""Largest number of distinct values of a column whose proportions are drawn as bars; others have a histogram."""
BINS = 30
"""Number of bins of a histogram."""
RELATED = 30
"""Largest number of columns whose correlations are drawn."""


@style()
def beside(data: pandas.DataFrame, samples: pandas.DataFrame, charts: int = CHARTS, across: int = ACROSS) -> Figure:
    """Draw proportions of data and samples in bins or levels of columns, in their units; those that differ most."""
    found = {name: _shares(data[name], samples[name]) for name in data.columns[:COMPARED]}
    names = sorted(found, key=lambda name: -float(np.abs(found[name][1] - found[name][2]).sum()))[:charts]
    rows = math.ceil(len(names) / across)
    made, grid = panels(1.75 * rows + 0.4, [1] * rows, across)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    for axes, name in zip(grid, names, strict=False):
        at, *shares = found[name]
        if isinstance(at, list):
            for i, (share, label) in enumerate(zip(shares, ("data", "samples"), strict=True)):
                axes.bar(np.arange(len(at)) + 0.4 * i - 0.2, share, 0.4, color=(PALE, RED)[i], label=label)
            axes.set_xticks(range(len(at)), [plain(level)[: max(2, 26 // len(at))] for level in at])
        else:
            axes.stairs(shares[0], at, fill=True, color=PALE, label="data")
            axes.stairs(shares[1], at, color=RED, linewidth=1.6, label="samples")
            axes.locator_params(axis="x", nbins=4)
        axes.set_title(plain(name)[:20], fontsize=9)
        axes.tick_params(labelsize=8)
        axes.set_yticks([])
    made.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return made


def _shares(data: pandas.Series, samples: pandas.Series) -> tuple[Any, ...]:
    """Return levels (a list), or edges of bins, of a column, and the proportions of data and of samples in them."""
    data, samples = data.dropna(), samples.dropna()
    levels = list(data.value_counts().index)
    if not pandas.api.types.is_numeric_dtype(data) or len(levels) <= LEVELS:
        kept = sorted(levels[:LEVELS], key=lambda level: (isinstance(level, str), level))
        return kept, *(x.value_counts(normalize=True).reindex(kept, fill_value=0).to_numpy() for x in (data, samples))
    ends = [np.quantile(x, (0.005, 0.995)) for x in (data, samples) if len(x)]
    edges = np.histogram_bin_edges(np.concatenate(ends), BINS)
    return edges, *(np.histogram(x, edges)[0] / max(1, len(x)) for x in (data, samples))


@style()
def correlations(data: pandas.DataFrame, samples: pandas.DataFrame) -> Figure:
    """Draw the rank correlations of the first `RELATED` numeric columns, of data and of samples."""
    names = list(data.select_dtypes("number").columns)[:RELATED]
    made, grid = panels(3.4, [1], 2, sharey=True)
    for axes, (title, table) in zip(grid, {"data": data, "samples": samples}.items(), strict=True):
        image = axes.imshow(table[names].corr("spearman"), cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set_title(title)
        shown = range(0, len(names), max(1, math.ceil(len(names) / 15)))
        axes.set_xticks(shown, [plain(names[i])[:12] for i in shown], rotation=90, fontsize=7)
        axes.set_yticks(shown, [plain(names[i])[:12] for i in shown], fontsize=7)
    made.colorbar(image, ax=grid, shrink=0.8)
    return made


@style()
def counts(data: np.ndarray, samples: np.ndarray) -> Figure:
    """Draw, for counts `(n, features)`, mean against variance of each feature, and its proportion of zeros."""
    made, (left, right) = panels(3.2, [1], 2)
    for label, x, colour in (("data", data, BLACK), ("samples", samples, ORANGE)):
        for axes, y in ((left, x.var(0)), (right, (x == 0).mean(0))):
            axes.scatter(x.mean(0), y, s=10, linewidths=0, label=label, color=colour)
    left.set(xscale="log", yscale="log", xlabel="mean", title="variance")
    right.set(xscale="log", xlabel="mean", title="zeros")
    for axis in (left.xaxis, left.yaxis, right.xaxis):
        axis.set(major_formatter="{x:g}", minor_formatter="")
    left.legend(loc="best")
    return made
