"""Plots that compare several runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.pages.plots.base import (
    BLACK,
    GREY,
    SERIES,
    MetricsRow,
    few_marks,
    figure,
    plain,
    style,
    whole_numbers,
)
from pvae.analysis.pages.plots.curves import robust_limits, series
from pvae.analysis.pages.plots.points import MARKERS, label_points, shortened

DASHES = ("-", "--", ":", "-.")


@style()
def overlaid(names: Sequence[str], runs: Sequence[Sequence[MetricsRow]]) -> Figure:
    """Plot the validation ELBO over epochs, nats per datum, one line per run."""
    made = figure(3.8 + 0.2 * len(names) / 2)
    axes = made.subplots()
    curves = [series(rows, "validation", "elbo") for rows in runs]
    for i, (name, (epochs, values)) in enumerate(zip(names, curves, strict=True)):
        dash = DASHES[i // len(SERIES) % len(DASHES)]
        mark = few_marks(epochs)
        axes.plot(
            epochs, values, color=SERIES[i % len(SERIES)], linestyle=dash, label=shortened(plain(name)),
            marker=mark, markersize=4, linewidth=1.5,
        )  # fmt: skip
    robust_limits(axes, curves)
    axes.set_title("ELBO of validation")
    axes.set_xlabel("epoch")
    axes.set_ylabel("nats per datum")
    whole_numbers(axes.xaxis)
    axes.grid(axis="y")
    made.legend(loc="outside lower left", ncols=2)
    return made


@style()
def differences(names: Sequence[str], gains: Sequence[Estimate], reference: str, what: str) -> Figure:
    """Plot paired differences to a reference run with ± 2 standard errors; they are positive if the run is better."""
    made = figure(0.36 * len(names) + 1.2)
    axes = made.subplots()
    for i, gain in enumerate(gains):
        error = 2 * gain.standard_error if np.isfinite(gain.standard_error) else 0.0
        axes.errorbar(
            gain.value, i, xerr=error, color=SERIES[(i + 1) % len(SERIES)], marker=MARKERS[(i + 1) % len(MARKERS)],
            markersize=6, elinewidth=2, capsize=3,
        )  # fmt: skip
    axes.axvline(0, color=BLACK, linewidth=1)
    axes.set_yticks(range(len(names)), [shortened(plain(name)) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_title(f"{what}, less that of {shortened(plain(reference))}")
    axes.set_xlabel("nats per datum, ± 2 standard errors")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    return made


@style()
def together(
    names: Sequence[str], x: Sequence[float], panels: Sequence[tuple[str, Sequence[float]]], of: str
) -> Figure:
    """Plot several metrics of the runs, a panel each, against one metric `x`, to show correlations over runs."""
    made = figure(2.6 * len(panels) + 0.3)
    grid = made.subplots(len(panels), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (title, y) in zip(grid, panels, strict=True):
        points = np.column_stack([x, y]).astype(np.float64)
        for i, (a, b) in enumerate(points):
            axes.plot(a, b, MARKERS[i % len(MARKERS)], color=SERIES[i % len(SERIES)], markersize=7)
        low, high = points.min(0), points.max(0)
        pad = np.where(high > low, 0.2 * (high - low), np.maximum(0.5, 0.05 * np.abs(high)))
        axes.set_xlim(low[0] - pad[0], high[0] + pad[0])
        axes.set_ylim(low[1] - pad[1], high[1] + pad[1])
        axes.set_title(title)
        axes.grid(color=GREY, alpha=0.2)
    grid[-1].set_xlabel(of)
    made.draw_without_rendering()
    made.set_layout_engine("none")
    for axes, (_, y) in zip(grid, panels, strict=True):
        label_points(
            made, axes, [shortened(plain(name)) for name in names], np.column_stack([x, y]).astype(np.float64), []
        )
    return made
