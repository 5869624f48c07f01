"""Plots of the aggregated posterior against the prior: marginal distributions, and the two leading directions."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from matplotlib.ticker import MaxNLocator
from scipy.ndimage import gaussian_filter

from pvae.analysis.pages.plots import base
from pvae.analysis.pages.plots.base import BLACK, BLUE, CLASS_COLOURS, SHORT, SKY, YELLOW, nats, panels, plain, style
from pvae.util import Record


class Cloud(Record):
    """Points of one latent to plot: posterior means, posterior samples, and prior samples."""

    name: str
    means: np.ndarray
    """Posterior means, `(n, D)`."""
    values: np.ndarray
    """One sample of q(z | x) per datum, `(n, D)`."""
    prior: np.ndarray
    """Samples of the prior, `(m, D)`."""
    prior_normal: tuple[np.ndarray, np.ndarray] | None = None
    """Location and scale, each `(D,)`, of a diagonal normal prior that is the same for all rows; None for others."""


def leading(means: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first two principal components of posterior means `(n, D)`.

    Returns:
        The centre `(D,)`, the directions `(D, 2)` with fixed signs, and their proportions of the variance `(2,)`.
    """
    centre = means.mean(0)
    _, singular, directions = np.linalg.svd(means - centre, full_matrices=False)
    two = directions[:2].T
    signs = np.sign(two[np.abs(two).argmax(0), range(two.shape[1])])
    return centre, two * np.where(signs == 0, 1, signs), singular[:2] ** 2 / (float((singular**2).sum()) or 1.0)


def groups(labels: np.ndarray | None) -> list[int]:
    """Return the distinct labels if they can be colours: 2 to 10 integers, beside NaN; else an empty list."""
    if labels is None or labels.ndim != 1 or not len(labels):
        return []
    found = np.unique(labels[~np.isnan(labels)])
    are_classes = 1 < len(found) <= len(CLASS_COLOURS) and np.array_equal(found, np.round(found))
    return [int(value) for value in found] if are_classes else []


@style()
def plane(cloud: Cloud, labels: np.ndarray | None = None, names: Sequence[str] | None = None) -> Figure:
    """Plot q_agg and prior in the two leading directions of the posterior means; as histograms for one coordinate."""
    if cloud.values.shape[1] == 1 or len(cloud.means) < 2:
        return _line(cloud)
    made, (axes,) = panels(5.4, title=f"{plain(cloud.name)}: aggregated posterior and prior")
    centre, directions, shares = leading(cloud.means)
    points, prior = (cloud.values - centre) @ directions, (cloud.prior - centre) @ directions
    _scatter(axes, points, labels, names)
    if cloud.prior_normal is not None:
        _ellipses(axes, cloud.prior_normal, centre, directions)
    else:
        _contours(axes, prior, points)
    axes.set(xlabel=f"direction 1 ({shares[0]:.0%} of the means' variance)", ylabel=f"direction 2 ({shares[1]:.0%})")
    axes.set_aspect("equal", adjustable="datalim")
    handles, shown = axes.get_legend_handles_labels()
    columns = max(1, min(6, 66 // (6 + max(map(len, shown)))))
    made.legend(handles, shown, loc="outside lower center", ncols=columns, markerscale=3, columnspacing=1.0)
    return made


def _line(cloud: Cloud) -> Figure:
    """Plot histograms of the first coordinate of q_agg and of the prior."""
    name = plain(cloud.name)
    made, (axes,) = panels(3.0, title=f"{name}: aggregated posterior and prior", xlabel=name, ylabel="density")
    values, prior = cloud.values[:, 0], cloud.prior[:, 0]
    edges = np.linspace(min(values.min(), prior.min()), max(values.max(), prior.max()), 61).tolist()
    _histograms(axes, values, prior, edges, linewidth=1.6)
    axes.legend(loc="best")
    return made


def _histograms(axes: Axes, values: np.ndarray, prior: np.ndarray, edges: list[float], linewidth: float) -> None:
    """Draw histograms of q_agg, filled, and of the prior, as an outline, both as densities."""
    of_posterior, of_prior = (np.histogram(sample, edges, density=True)[0] for sample in (values, prior))
    axes.stairs(of_posterior, edges, fill=True, color=SKY, label="aggregated posterior")
    axes.stairs(of_prior, edges, color=BLACK, linewidth=linewidth, label="prior")


def class_name(value: int, names: Sequence[str] | None) -> str:
    """Return the name of the class with label `value`, shortened; the label itself if it has no name."""
    return plain(names[value])[:SHORT] if names and 0 <= value < len(names) else str(value)


def _scatter(axes: Axes, points: np.ndarray, labels: np.ndarray | None, names: Sequence[str] | None) -> None:
    look: dict[str, Any] = {"s": float(np.clip(9000 / len(points), 3, 16)), "linewidths": 0}
    if not (found := groups(labels)):
        axes.scatter(*points.T, color=BLUE, alpha=0.5, label="samples of q(z | x)", **look)
    for value, colour in zip(found, CLASS_COLOURS, strict=False):
        name, inside = class_name(value, names), points[labels == value]
        axes.scatter(*inside.T, color=colour, alpha=0.65, label=name, **look)
        font = {"fontsize": 12, "fontweight": "bold", "color": "#8A7D00" if colour == YELLOW else colour}
        base.note(axes, name, np.median(inside, 0), (0, 0), 3.5, ha="center", va="center", **font)


def _ellipses(axes: Axes, normal: tuple[np.ndarray, np.ndarray], centre: np.ndarray, directions: np.ndarray) -> None:
    """Draw a normal prior, projected on the plane, as ellipses at 1, 2 and 3 standard deviations."""
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


def _contours(axes: Axes, prior: np.ndarray, points: np.ndarray) -> None:
    """Draw contours that contain 39, 86 and 99 % of prior samples, as 1, 2, 3 standard deviations of a normal do."""
    both = np.concatenate([prior, points])
    low, high = both.min(0), both.max(0)
    pad = 0.15 * np.maximum(high - low, 1e-6)
    edges = [np.linspace(low[i] - pad[i], high[i] + pad[i], 71) for i in (0, 1)]
    counts, _, _ = np.histogram2d(prior[:, 0], prior[:, 1], bins=edges)
    density = gaussian_filter(counts, 2.0)
    ranked = np.sort(density.ravel())[::-1]
    held = np.cumsum(ranked) / max(float(ranked.sum()), 1e-300)
    inside = np.minimum(np.searchsorted(held, (0.39, 0.86, 0.99)), len(ranked) - 1)
    levels, middles = np.unique(ranked[inside]), [(edge[1:] + edge[:-1]) / 2 for edge in edges]
    if levels[0] > 0:
        axes.contour(*middles, density.T, levels=levels, colors=BLACK, linewidths=1.2)
    axes.plot([], [], color=BLACK, linewidth=1.2, label="prior")


MARGINALS = 12
"""Largest number of coordinates whose marginal distributions are shown."""


@style()
def marginals(cloud: Cloud, order: Sequence[int], nats_of: Sequence[float] | None) -> Figure:
    """Plot histograms of q_agg and prior for the first `MARGINALS` coordinates in `order`.

    `nats_of` holds the marginal KL of every coordinate, in nats, for the titles; None omits it.
    """
    chosen = list(order)[:MARGINALS]
    columns = min(4, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    made, grid = panels(1.35 * rows + 0.7, [1] * rows, columns)
    for axes in grid[len(chosen) :]:
        axes.set_axis_off()
    for axes, d in zip(grid, chosen, strict=False):
        values, prior = cloud.values[:, d], cloud.prior[:, d]
        low, high = np.percentile(np.concatenate([values, prior]), [0.2, 99.8])
        _histograms(axes, values, prior, np.linspace(low, high if high > low else low + 1, 41).tolist(), linewidth=1.3)
        said = "" if nats_of is None else f": {nats(nats_of[d])} nats"
        axes.set_title(f"{plain(cloud.name)[:SHORT]}[{d}]{said}", fontsize=8.5)
        axes.set_yticks([])
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(3))
    made.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return made
