"""Bar charts of the KL and activity of latent units."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from pvae.analysis.decompose.collapse import ACTIVE, LatentCollapse
from pvae.analysis.pages.plots.base import BLUE, GREY, RED, figure, plain, style, whole_numbers
from pvae.util.types import Array


@style()
def units(name: str, latent: LatentCollapse) -> Figure:
    """Plot the KL of each coordinate, largest first, and the variance of its posterior mean with the limit `ACTIVE`."""
    kl = None if latent.kl_per_dimension is None else np.array(latent.kl_per_dimension)
    variance = None if latent.activity is None else np.array(latent.activity)
    shown = [values for values in (kl, variance) if values is not None]
    order = np.argsort(-shown[0], kind="stable")
    active = variance[order] > ACTIVE if variance is not None else np.ones(len(order), bool)
    made = figure(2.1 * len(shown) + 0.5)
    grid = list(made.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0])
    if kl is not None:
        bars(grid[0], kl[order], active)
        grid[0].set_title(f"{plain(name)}: KL per coordinate, largest first")
        grid[0].set_ylabel("nats")
    if variance is not None:
        _activity(grid[-1], variance[order], active)
    grid[-1].set_xlabel(f"rank of the coordinate (1 to {latent.dim})")
    whole_numbers(grid[-1].xaxis)
    if latent.dim <= 10:
        grid[-1].set_xticks(range(1, latent.dim + 1))
    grid[-1].set_xlim(0.3, max(latent.dim, 6) + 0.7)
    return made


def bars(
    axes: Axes,
    heights: Array,
    active: NDArray[np.bool_],
    bottom: float = 0.0,
    among: tuple[str, str] = ("active", "inactive"),
) -> None:
    """Draw bars of heights `(n,)`: filled if active, hatched otherwise; `among` names the two kinds in the legend."""
    place = np.arange(1, len(heights) + 1)
    width = 0.82 if len(heights) <= 100 else 1.0
    if active.any():
        axes.bar(place[active], heights[active] - bottom, width, bottom=bottom, color=BLUE, label=among[0])
    if not active.all():
        axes.bar(
            place[~active], heights[~active] - bottom, width, bottom=bottom, color="white", edgecolor=GREY,
            hatch="////" if len(heights) <= 100 else None, label=among[1],
        )  # fmt: skip
        if not bottom:
            axes.legend(loc="upper right", ncols=2)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _activity(axes: Axes, variance: Array, active: NDArray[np.bool_]) -> None:
    floor = 1e-5
    axes.set_yscale("log")
    bars(axes, np.maximum(variance, floor), active, bottom=floor / 2)
    axes.axhline(ACTIVE, color=RED, linestyle="--", linewidth=1.5)
    axes.set_ylim(floor / 2, max(3.0, float(variance.max()) * 2))
    axes.set_yticks([1e-4, 1e-2, 1.0], ["0.0001", "0.01", "1"])
    axes.minorticks_off()
    axes.set_title(f"Variance of its posterior mean (active above {ACTIVE}, dashed)")
