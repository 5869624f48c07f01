"""Units, codes, and the aggregated posterior against the prior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pvae.analysis.decompose.collapse import ACTIVE, CodeUse, LatentCollapse
from pvae.analysis.pages.plots.base import (
    BLACK,
    BLUE,
    CLASSES,
    GREY,
    RED,
    SHORT,
    SKY,
    WIDTH,
    YELLOW,
    Array,
    figure,
    nats,
    plain,
    style,
)
from pvae.analysis.pages.plots.pictures import tiles


def units(name: str, latent: LatentCollapse) -> Figure:
    """KL of every coordinate, sorted, above the variance of its posterior mean with the threshold of activity."""
    kl = None if latent.kl_per_dimension is None else np.array(latent.kl_per_dimension)
    variance = None if latent.activity is None else np.array(latent.activity)
    shown = [values for values in (kl, variance) if values is not None]
    order = np.argsort(-shown[0], kind="stable")
    active = variance[order] > ACTIVE if variance is not None else np.ones(len(order), bool)
    with style():
        made = figure(2.1 * len(shown) + 0.5)
        grid = list(made.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0])
        if kl is not None:
            _bars(grid[0], kl[order], active)
            grid[0].set_title(f"{plain(name)}: KL per coordinate, largest first")
            grid[0].set_ylabel("nats")
        if variance is not None:
            _activity(grid[-1], variance[order], active)
        grid[-1].set_xlabel(f"rank of the coordinate (1 to {latent.dim})")
        grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if latent.dim <= 10:
            grid[-1].set_xticks(range(1, latent.dim + 1))
        grid[-1].set_xlim(0.3, max(latent.dim, 6) + 0.7)
    return made


def code_use(name: str, use: CodeUse) -> Figure:
    """How often each code is used, most used first, above (or beside) the perplexity of every position."""
    perplexity, mapped = np.array(use.perplexity), len(use.grid) == 2
    several = len(perplexity) > 1 or use.share is None
    panels = (use.share is not None) + several
    with style():
        made = figure(2.1 * panels + 0.5 + 1.2 * mapped)
        ratios = [1.0] * (panels - 1) + [2.0 if mapped else 1.0]
        grid = list(made.subplots(panels, 1, squeeze=False, height_ratios=ratios)[:, 0])
        if use.share is not None:
            share = np.array(use.share)
            _bars(grid[0], share, np.arange(len(share)) < (use.used or 0), among=("in use", "dead"))
            grid[0].set_title(f"{plain(name)}: share of each code, most used first")
            grid[0].set_xlabel(f"rank of the code (1 to {use.states})")
            grid[0].set_xlim(0.3, max(use.states, 6) + 0.7)
        if several:
            _of_positions(made, grid[-1], perplexity.reshape(use.grid if mapped else (-1,)), use.states)
            grid[-1].set_title(f"{plain(name)}: perplexity of each position, of at most {use.states}")
    return made


def _of_positions(made: Figure, axes: Axes, perplexity: Array, states: int) -> None:
    """A map of a grid, bars of a row."""
    if perplexity.ndim == 2:
        shown = axes.imshow(perplexity, cmap="viridis", vmin=1, vmax=max(float(perplexity.max()), 1.01))
        made.colorbar(shown, ax=axes)
        axes.set_anchor("W")
        axes.set_xlabel("column")
        axes.set_ylabel("row")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        return
    _bars(axes, perplexity, np.ones(len(perplexity), bool))
    axes.set_ylim(0, max(states, 1))
    axes.set_xlabel(f"position (1 to {len(perplexity)})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _bars(
    axes: Axes,
    heights: Array,
    active: NDArray[np.bool_],
    bottom: float = 0.0,
    among: tuple[str, str] = ("active", "inactive"),
) -> None:
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
    _bars(axes, np.maximum(variance, floor), active, bottom=floor / 2)
    axes.axhline(ACTIVE, color=RED, linestyle="--", linewidth=1.5)
    axes.set_ylim(floor / 2, max(3.0, float(variance.max()) * 2))
    axes.set_yticks([1e-4, 1e-2, 1.0], ["0.0001", "0.01", "1"])
    axes.minorticks_off()
    axes.set_title(f"Variance of its posterior mean (active above {ACTIVE}, dashed)")


@dataclass(frozen=True)
class Cloud:
    """What the plane of one latent shows."""

    name: str
    means: Array
    """Posterior means, `(n, D)`."""
    values: Array
    """One draw of q_agg per datum, `(n, D)`."""
    prior: Array
    """Draws of the prior, `(m, D)`."""
    prior_normal: tuple[Array, Array] | None = None
    """Location and scale `(D,)` where the prior is one diagonal normal for all rows."""


def leading(means: Array) -> tuple[Array, Array, Array]:
    """(centre `(D,)`, the two leading directions `(D, 2)`, their shares of the variance); signs are fixed."""
    centre = means.mean(0)
    _, singular, directions = np.linalg.svd(means - centre, full_matrices=False)
    total = float((singular**2).sum())
    two = directions[:2].T
    signs = np.sign(two[np.abs(two).argmax(0), range(two.shape[1])])
    return centre, two * np.where(signs == 0, 1, signs), singular[:2] ** 2 / (total or 1.0)


def groups(labels: NDArray[Any] | None) -> list[int]:
    """The classes worth colouring: at most ten whole numbers; else none."""
    if labels is None or labels.ndim != 1 or not len(labels) or not np.array_equal(labels, np.round(labels)):
        return []
    found = np.unique(labels)
    return [int(value) for value in found] if 1 < len(found) <= len(CLASSES) else []


def plane(cloud: Cloud, labels: NDArray[Any] | None = None, names: Sequence[str] | None = None) -> Figure:
    """q_agg against the prior in the two leading directions of the posterior means (a histogram for one coordinate)."""
    with style():
        made = figure(5.4 if cloud.values.shape[1] > 1 and len(cloud.means) > 1 else 3.0)
        axes = made.subplots()
        if cloud.values.shape[1] == 1 or len(cloud.means) < 2:
            _line_of(axes, cloud)
            return made
        centre, directions, shares = leading(cloud.means)
        points, prior = (cloud.values - centre) @ directions, (cloud.prior - centre) @ directions
        _scatter(axes, points, labels, names)
        if cloud.prior_normal is not None:
            _ellipses(axes, cloud.prior_normal, centre, directions)
        else:
            _contours(axes, prior, points)
        axes.set_title(f"{plain(cloud.name)}: aggregated posterior and prior")
        axes.set_xlabel(f"direction 1 ({shares[0]:.0%} of the means' variance)")
        axes.set_ylabel(f"direction 2 ({shares[1]:.0%})")
        axes.set_aspect("equal", adjustable="datalim")
        handles, shown = axes.get_legend_handles_labels()
        columns = max(1, min(6, 66 // (6 + max(map(len, shown)))))
        made.legend(handles, shown, loc="outside lower center", ncols=columns, markerscale=3, columnspacing=1.0)
    return made


def _line_of(axes: Axes, cloud: Cloud) -> None:
    values, prior = cloud.values[:, 0], cloud.prior[:, 0]
    edges = np.linspace(min(values.min(), prior.min()), max(values.max(), prior.max()), 61).tolist()
    axes.hist(values, edges, density=True, color=SKY, label="aggregated posterior")
    axes.hist(prior, edges, density=True, histtype="step", color=BLACK, linewidth=1.6, label="prior")
    axes.set_title(f"{plain(cloud.name)}: aggregated posterior and prior")
    axes.set_xlabel(plain(cloud.name))
    axes.set_ylabel("density")
    axes.legend(loc="best")


def class_name(value: int, names: Sequence[str] | None) -> str:
    """A class's own name if it has one, else its number."""
    return plain(names[value])[:SHORT] if names and 0 <= value < len(names) else str(value)


def _scatter(axes: Axes, points: Array, labels: NDArray[Any] | None, names: Sequence[str] | None) -> None:
    size = float(np.clip(9000 / len(points), 3, 16))
    found = groups(labels)
    if not found or labels is None:
        axes.scatter(points[:, 0], points[:, 1], s=size, color=BLUE, alpha=0.5, linewidths=0, label="draws of q(z | x)")
        return
    for i, value in enumerate(found):
        chosen = points[labels == value]
        look = {"s": size, "color": CLASSES[i], "alpha": 0.65, "linewidths": 0}
        axes.scatter(chosen[:, 0], chosen[:, 1], label=class_name(value, names), **look)  # type: ignore[arg-type]
    for i, value in enumerate(found):
        axes.annotate(
            class_name(value, names), np.median(points[labels == value], 0), ha="center", va="center", fontsize=12,
            fontweight="bold", color=CLASSES[i] if CLASSES[i] != YELLOW else "#8A7D00",
            path_effects=[withStroke(linewidth=3.5, foreground="white")],
        )  # fmt: skip


def _ellipses(axes: Axes, normal: tuple[Array, Array], centre: Array, directions: Array) -> None:
    """Where the prior has 1, 2 and 3 standard deviations in the plane."""
    loc, scale = normal
    middle = (loc - centre) @ directions
    variances, turn = np.linalg.eigh(directions.T @ np.diag(scale**2) @ directions)
    angle = math.degrees(math.atan2(turn[1, 0], turn[0, 0]))
    for k in (1, 2, 3):
        width, height = 2 * k * np.sqrt(variances)
        axes.add_patch(Ellipse((middle[0], middle[1]), width, height, angle=angle, fill=False, color=BLACK, lw=1.2))
    axes.plot([], [], color=BLACK, linewidth=1.2, label="prior")
    axes.plot(*middle, "+", color=BLACK, markersize=9)
    reach = 3.1 * float(np.sqrt(variances.max()))
    axes.update_datalim([middle - reach, middle + reach])


def _contours(axes: Axes, prior: Array, points: Array) -> None:
    """Regions that hold 39, 86 and 99 % of the prior's draws: what 1, 2, 3 standard deviations hold of a normal."""
    both = np.concatenate([prior, points])
    low, high = both.min(0), both.max(0)
    pad = 0.15 * np.maximum(high - low, 1e-6)
    edges = [np.linspace(low[i] - pad[i], high[i] + pad[i], 71) for i in (0, 1)]
    counts, _, _ = np.histogram2d(prior[:, 0], prior[:, 1], bins=edges)
    density = gaussian_filter(counts, 2.0)
    ranked = np.sort(density.ravel())[::-1]
    held = np.cumsum(ranked) / max(float(ranked.sum()), 1e-300)
    inside = np.minimum(np.searchsorted(held, (0.39, 0.86, 0.99)), len(ranked) - 1)
    levels = np.unique(ranked[inside])
    middles = [(edge[1:] + edge[:-1]) / 2 for edge in edges]
    if levels[0] > 0:
        axes.contour(*middles, density.T, levels=levels, colors=BLACK, linewidths=1.2)
    axes.plot([], [], color=BLACK, linewidth=1.2, label="prior")


# ---------------------------------------------------------------------- single coordinates, single codes

MARGINALS = 12
"""Most coordinates whose marginals are shown."""


def marginals(cloud: Cloud, order: Sequence[int], nats_of: Sequence[float] | None) -> Figure:
    """q_agg against the prior in single coordinates, in the order given; with the marginal KL of each, where known."""
    chosen = list(order)[:MARGINALS]
    columns = min(4, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    with style():
        made = figure(1.35 * rows + 0.7)
        grid = made.subplots(rows, columns, squeeze=False)
        for axes in grid.ravel()[len(chosen) :]:
            axes.set_axis_off()
        for axes, d in zip(grid.ravel(), chosen, strict=False):
            values, prior = cloud.values[:, d], cloud.prior[:, d]
            low, high = np.percentile(np.concatenate([values, prior]), [0.2, 99.8])
            edges = np.linspace(low, high if high > low else low + 1, 41).tolist()
            axes.hist(values, edges, density=True, color=SKY, label="aggregated posterior")
            axes.hist(prior, edges, density=True, histtype="step", color=BLACK, linewidth=1.3, label="prior")
            said = "" if nats_of is None else f": {nats(nats_of[d])} nats"
            axes.set_title(f"{plain(cloud.name)[:SHORT]}[{d}]{said}", fontsize=8.5)
            axes.set_yticks([])
            axes.tick_params(labelsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(3))
        handles, shown = grid[0, 0].get_legend_handles_labels()
        made.legend(handles, shown, loc="outside lower center", ncols=2)
    return made


def code_maps(name: str, data: Array, maps: NDArray[Any], states: int, low: float, high: float) -> Figure:
    """Data `(n, *shape)` above the codes `(n, H, W)` that stand for them; colours are ranks of use, most used first."""
    counts = np.bincount(maps.ravel(), minlength=states)
    rank = np.empty(states, dtype=np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(states)
    with style():
        made = figure(2 * 0.92 * WIDTH / len(data) + 0.75)
        grid = made.subplots(2, len(data), squeeze=False)
        for i, (above, below) in enumerate(zip(grid[0], grid[1], strict=True)):
            above.imshow(tiles(data[i : i + 1], 1, low, high), aspect="equal")
            shown = below.imshow(rank[maps[i]], cmap="cividis", vmin=0, vmax=max(1, states - 1))
            for axes in (above, below):
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
        bar = made.colorbar(shown, ax=grid[1].tolist(), location="bottom", aspect=40, pad=0.03, shrink=0.7)
        bar.set_label(f"{plain(name)}: rank of the code, most used (0) first", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    return made
