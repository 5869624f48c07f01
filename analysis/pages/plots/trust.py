"""Plots on importance sampling: the bound over the number of samples, and k-hat of the importance weights."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from pvae.analysis.bounds.lower_bounds import Bounds
from pvae.analysis.pages.plots.base import BLUE, GREY, RED, figure, style
from pvae.util.types import Array


@style()
def importance(found: Bounds) -> Figure:
    """Plot the bound on log p(x) over the number of importance samples, with a band of ± 2 standard errors."""
    counts = np.array([k for k, _ in found.curve], dtype=np.float64)
    values = np.array([e.value for _, e in found.curve])
    errors = np.nan_to_num(np.array([e.standard_error for _, e in found.curve]), posinf=0.0)
    made = figure(3.2)
    axes = made.subplots()
    axes.fill_between(counts, values - 2 * errors, values + 2 * errors, color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(counts, values, color=BLUE, marker="o", markersize=4)
    axes.axhline(values[0], color=GREY, linestyle=":", label="one sample: the ELBO")
    axes.set_xscale("log")
    ticks = [k for k in (1, 10, 100, 1000, 10_000, 100_000) if k <= counts[-1]]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.set_title("lower bound on log p(x)")
    axes.set_xlabel("importance samples per datum")
    axes.set_ylabel("nats per datum")
    axes.grid(axis="y")
    axes.legend(loc="center right")
    return made


@style()
def khats(khat: Array, limit: float) -> Figure:
    """Plot a histogram of k-hat over the data `(n,)`, with `limit`, above which importance sampling is not reliable."""
    known = khat[np.isfinite(khat)]
    low, high = min(float(known.min()), 0.0), max(float(known.max()), 1.0)
    edges = np.linspace(low, high, 41)
    made = figure(2.8)
    axes = made.subplots()
    for part, colour, label in (
        (known[known <= limit], BLUE, "reliable"),
        (known[known > limit], RED, "not reliable"),
    ):
        counts, _ = np.histogram(part, edges)
        axes.stairs(counts, edges, fill=True, color=colour, label=f"{label}: {len(part)} of {len(known)}")
    axes.axvline(limit, color="black", linestyle="--", linewidth=1.2)
    axes.set_title(f"k-hat of the importance weights (dashed: {limit:.2f})")
    axes.set_xlabel("k-hat, Pareto shape of a datum's largest weights")
    axes.set_ylabel("data")
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.legend(loc="best")
    return made
