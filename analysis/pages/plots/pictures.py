"""Plots of data, samples and reconstructions: as images, or as lines and points for other data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pvae.analysis.pages.plots.base import BLACK, FIGURE_WIDTH, GREY, ORANGE, PALE, RED, nats, panels, style
from pvae.analysis.samples.sharpness import is_image
from pvae.util.types import Array


def tiles(images: Array, columns: int, low: float, high: float) -> Array:
    """Return images `(n, 1|3, H, W)` or `(n, H, W)` tiled in a grid, as one RGB image with white gaps.

    Values from `low` to `high` are scaled to 0 to 1; the result is `(height, width, 3)`.
    """
    images = images[:, None] if images.ndim == 3 else images
    grey = np.clip((images - low) / ((high - low) or 1.0), 0, 1)
    colour = np.broadcast_to(grey, (len(grey), 3, *grey.shape[2:])).transpose(0, 2, 3, 1)
    h, w = colour.shape[1:3]
    gap = max(1, round(w / 10))
    rows = math.ceil(len(colour) / columns)
    out = np.ones((rows * (h + gap) - gap, columns * (w + gap) - gap, 3))
    for i, picture in enumerate(colour):
        top, left = i // columns * (h + gap), i % columns * (w + gap)
        out[top : top + h, left : left + w] = picture
    return out


def image_width(columns: int) -> float:
    """Return the width of one image of a grid, in inches."""
    return min(1.1, 0.9 * FIGURE_WIDTH / columns)


def show_tiles(
    axes: Axes,
    images: Array,
    columns: int,
    low: float,
    high: float,
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
) -> None:
    """Draw images in a grid with `columns` columns; names of rows are at the left, names of columns below."""
    h, w = images.shape[-2:]
    gap = max(1, round(w / 10))
    axes.imshow(tiles(images, columns, low, high), aspect="equal")
    axes.set_xticks([i * (w + gap) + w / 2 - 0.5 for i in range(len(column_names))], column_names)
    axes.set_yticks([i * (h + gap) + h / 2 - 0.5 for i in range(len(row_names))], row_names)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)


@dataclass(frozen=True)
class Rebuilt:
    """Data and their reconstructions, the means of p(x | z) at samples z of q(z | x).

    `data` and `means` are `(n, *shape)`; `nats` is log p(x | z) of each datum, `(n,)`.
    """

    title: str
    data: Array
    means: Array
    nats: Array


def best_to_worst(scores: Array, most: int) -> dict[str, Array]:
    """Return the indices of the `most` best, median and worst of n `scores`; of the best only, if n < 3 `most`."""
    order = np.argsort(-scores, kind="stable")
    count = min(most, len(order))
    middle = (len(order) - count) // 2
    found = {"best": order[:count], "median": order[middle : middle + count], "worst": order[len(order) - count :]}
    return found if len(order) >= 3 * count else {"best": found["best"]}


@style()
def reconstructions(parts: Sequence[Rebuilt], low: float, high: float) -> Figure:
    """Draw groups of data (best, median, worst) with their reconstructions: as images, or as lines for other data."""
    return rebuilt_images(parts, low, high) if is_image(parts[0].data.shape[1:]) else _rebuilt_lines(parts)


def rebuilt_images(parts: Sequence[Rebuilt], low: float, high: float, below: str = "mean") -> Figure:
    """Draw each image above its reconstruction, with log p(x | z) in nats, in one panel per group of data."""
    columns = max(len(part.data) for part in parts)
    h, w = parts[0].data.shape[-2:]
    made, grid = panels(len(parts) * (2.15 * 0.89 * FIGURE_WIDTH / columns * h / w + 0.55), [1] * len(parts))
    for axes, part in zip(grid, parts, strict=True):
        both, scores = np.concatenate([part.data, part.means]), [nats(v, 1) for v in part.nats]
        show_tiles(axes, both, len(part.data), low, high, ("data", below), scores)
        axes.set_title(part.title)
    return made


def _rebuilt_lines(parts: Sequence[Rebuilt]) -> Figure:
    columns = min(4, max(len(part.data) for part in parts))
    made, grid = panels(1.6 * len(parts) + 0.4, [1] * len(parts), columns, sharex=True)
    for first, part in enumerate(parts):
        for i, axes in enumerate(grid[columns * first : columns * (first + 1)]):
            if i >= len(part.data):
                axes.set_axis_off()
                continue
            data, mean = part.data[i].ravel(), part.means[i].ravel()
            mark = "o" if len(data) <= 40 else None
            axes.plot(data, color=BLACK, linewidth=1, marker=mark, markersize=3, label="data")
            axes.plot(mean, color=ORANGE, linewidth=1.6, label="mean of p(x | z)")
            axes.set_title(f"{part.title}: {nats(part.nats[i], 1)}" if i == 0 else nats(part.nats[i], 1), fontsize=9)
            axes.tick_params(labelsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    handles, names = grid[0].get_legend_handles_labels()
    made.legend(handles, names, loc="outside lower center", ncols=2)
    return made


@style()
def samples(means: Array, data: Array, low: float, high: float) -> Figure:
    """Draw means of p(x | z) at samples z of the prior: as images, or as lines or points beside data."""
    shape = means.shape[1:]
    if is_image(shape):
        columns = min(10, len(means))
        rows = math.ceil(len(means) / columns)
        made, (axes,) = panels(rows * FIGURE_WIDTH / columns * shape[-2] / shape[-1] + 0.1)
        axes.imshow(tiles(means, columns, low, high), aspect="equal")
        axes.set_axis_off()
        return made
    return _sampled_vectors(means.reshape(len(means), -1), data.reshape(len(data), -1))


def _sampled_vectors(means: Array, data: Array) -> Figure:
    if means.shape[1] > 2:
        made, (top, bottom) = panels(4.6, (1, 1), sharex=True, sharey=True)
        for axes, values, title, colour in ((top, data, "data", BLACK), (bottom, means, "means of p(x | z)", ORANGE)):
            axes.plot(values[:40].T, color=colour, linewidth=0.8, alpha=0.5)
            axes.set_title(title)
        bottom.set_xlabel("coordinate of x")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        return made
    made, (axes,) = panels(3.4)
    if means.shape[1] == 2:
        axes.scatter(data[:, 0], data[:, 1], s=10, color=GREY, alpha=0.5, linewidths=0, label="data")
        axes.scatter(means[:, 0], means[:, 1], s=16, color=ORANGE, linewidths=0, label="means of p(x | z)")
    else:
        axes.hist(data[:, 0], 40, density=True, color=PALE, label="data")
        axes.hist(means[:, 0], 40, density=True, histtype="step", color=RED, linewidth=1.6, label="means of p(x | z)")
    axes.legend(loc="best")
    return made


@style()
def gallery(
    images: Array, low: float, high: float, row_names: Sequence[str] = (), column_names: Sequence[str] = ()
) -> Figure:
    """Draw images `(rows, columns, *shape)` in a grid; names of rows are at the left, names of columns below."""
    rows, columns = images.shape[:2]
    h, w = images.shape[-2:]
    gap = max(1, round(w / 10))
    filled = min(1.0, 1.08 * columns * image_width(columns) / FIGURE_WIDTH)
    wide = filled * (FIGURE_WIDTH - 0.1 - (0.7 if row_names else 0))
    made, (axes,) = panels(wide * (rows * (h + gap)) / (columns * (w + gap)) + (0.4 if column_names else 0.15))
    show_tiles(axes, images.reshape(-1, *images.shape[2:]), columns, low, high, row_names, column_names)
    return made
