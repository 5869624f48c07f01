"""Plots of data, samples and reconstructions, as images, lines or points; with captions for files of commands."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pvae.analysis.export.sites import numpy_of
from pvae.analysis.figures.estimate import texts
from pvae.analysis.pages.plots import base, clouds
from pvae.analysis.pages.plots.base import BLACK, FIGURE_WIDTH, ORANGE, RED, Names, array, nats, panels, plain, style
from pvae.analysis.samples import encode, features, sample, traversal
from pvae.util import Record

Planes = dict[str, Figure]
Groups = Sequence[tuple[np.ndarray, str]]
SHEET = 100
"""Largest number of samples that a plot shows as images."""


def tiles(images: np.ndarray, columns: int, low: float, high: float) -> np.ndarray:
    """Return images `(n, 1|3, H, W)` or `(n, H, W)` tiled in a grid, as one RGB image with white gaps.

    Values from `low` to `high` are scaled to 0 to 1, missing ones (NaN) are a pale orange; the result is
    `(height, width, 3)`.
    """
    images = images[:, None] if images.ndim == 3 else images
    grey = np.clip((images - low) / ((high - low) or 1.0), 0, 1)
    colour = np.broadcast_to(grey, (len(grey), 3, *grey.shape[2:])).transpose(0, 2, 3, 1)
    colour = np.where(np.isnan(colour), (1.0, 0.8, 0.6), colour)
    gap = max(1, round(grey.shape[-1] / 10))
    padded = np.pad(colour, ((0, -len(colour) % columns), (0, gap), (0, gap), (0, 0)), constant_values=1.0)
    lines = padded.reshape(-1, columns, *padded.shape[1:]).swapaxes(1, 2)
    return lines.reshape(lines.shape[0] * lines.shape[1], -1, 3)[:-gap, :-gap]


def image_width(columns: int) -> float:
    """Return the width of one image of a grid, in inches."""
    return min(1.1, 0.9 * FIGURE_WIDTH / columns)


def show_tiles(axes: Axes, images: np.ndarray, columns: int, low: float, high: float, *names: Sequence[str]) -> None:
    """Draw images in a grid with `columns` columns; `names` of rows are at the left, then names of columns below."""
    row_names, column_names, *_ = (*names, (), ())
    h, w = images.shape[-2:]
    gap = max(1, round(w / 10))
    axes.imshow(tiles(images, columns, low, high), aspect="equal")
    axes.set_xticks([i * (w + gap) + w / 2 - 0.5 for i in range(len(column_names))], column_names)
    axes.set_yticks([i * (h + gap) + h / 2 - 0.5 for i in range(len(row_names))], row_names)
    axes.tick_params(length=0, labelsize=9)
    axes.spines[:].set_visible(False)


class Rebuilt(Record):
    """Data and their reconstructions, the means of p(x | z) at samples z of q(z | x).

    `data` and `means` are `(n, *shape)`; `nats` is log p(x | z) of each datum, `(n,)`.
    """

    title: str
    data: np.ndarray
    means: np.ndarray
    nats: np.ndarray


def best_to_worst(scores: np.ndarray, most: int) -> dict[str, np.ndarray]:
    """Return the indices of the `most` best, median and worst of n `scores`; of the best only, if n < 3 `most`."""
    order = np.argsort(-scores, kind="stable")
    count = min(most, len(order))
    middle = (len(order) - count) // 2
    found = {"best": order[:count], "median": order[middle : middle + count], "worst": order[len(order) - count :]}
    return found if len(order) >= 3 * count else {"best": found["best"]}


@style()
def reconstructions(parts: Sequence[Rebuilt], low: float, high: float, below: str = "mean") -> Figure:
    """Draw groups of data (best, median, worst) above their reconstructions, as images; other data as lines.

    The numbers are log p(x | z), nats.
    """
    columns = max(len(part.data) for part in parts)
    if not features.is_image(parts[0].data.shape[1:]):
        return _rebuilt_lines(parts, min(4, columns))
    h, w = parts[0].data.shape[-2:]
    made, grid = panels(len(parts) * (2.15 * 0.89 * FIGURE_WIDTH / columns * h / w + 0.55), [1] * len(parts))
    for axes, part in zip(grid, parts, strict=True):
        both, scores = np.concatenate([part.data, part.means]), [nats(v, 1) for v in part.nats]
        show_tiles(axes, both, len(part.data), low, high, ("data", below), scores)
        axes.set_title(part.title)
    return made


def _rebuilt_lines(parts: Sequence[Rebuilt], columns: int) -> Figure:
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
    made.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return made


@style()
def samples(means: np.ndarray, data: np.ndarray, low: float, high: float) -> Figure:
    """Draw means of p(x | z) at samples z of the prior: as images, or as lines or points beside data."""
    shape = means.shape[1:]
    if features.is_image(shape):
        columns = min(10, len(means))
        rows = math.ceil(len(means) / columns)
        made, (axes,) = panels(rows * FIGURE_WIDTH / columns * shape[-2] / shape[-1] + 0.1)
        axes.imshow(tiles(means, columns, low, high), aspect="equal")
        axes.set_axis_off()
        return made
    means, data = means.reshape(len(means), -1), data.reshape(len(data), -1)
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
        axes.scatter(data[:, 0], data[:, 1], s=10, color=base.GREY, alpha=0.5, linewidths=0, label="data")
        axes.scatter(means[:, 0], means[:, 1], s=16, color=ORANGE, linewidths=0, label="means of p(x | z)")
    else:
        axes.hist(data[:, 0], 40, density=True, color=base.PALE, label="data")
        axes.hist(means[:, 0], 40, density=True, histtype="step", color=RED, linewidth=1.6, label="means of p(x | z)")
    axes.legend(loc="best")
    return made


@style()
def gallery(images: np.ndarray, low: float, high: float, row_names: Names = (), column_names: Names = ()) -> Figure:
    """Draw images `(rows, columns, *shape)` in a grid; names of rows are at the left, names of columns below."""
    rows, columns = images.shape[:2]
    h, w = images.shape[-2:]
    gap = max(1, round(w / 10))
    filled = min(1.0, 1.08 * columns * image_width(columns) / FIGURE_WIDTH)
    wide = filled * (FIGURE_WIDTH - 0.1 - (0.7 if row_names else 0))
    made, (axes,) = panels(wide * (rows * (h + gap)) / (columns * (w + gap)) + (0.4 if column_names else 0.15))
    show_tiles(axes, images.reshape(-1, *images.shape[2:]), columns, low, high, row_names, column_names)
    return made


# ---------------------------------------------------------------------- files of commands, with captions


def is_shown(shape: Sequence[int]) -> bool:
    """Return True for data that can be plotted: images `(1|3, H, W)` or `(H, H)`, and points in the plane `(2,)`."""
    return tuple(shape) == (2,) or (features.is_image(shape) and (len(shape) == 3 or shape[0] == shape[1]))


def sampled(found: sample.Samples, data: np.ndarray) -> Figure | None:
    """Draw samples of a model as images, or as points over the data `(m, 2)`; None for data of other shapes."""
    x, what = array(found.x), "means of p(x | z)" if found.is_mean else "draws of p(x | z)"
    shown, told = x[:SHEET], {plain(name): _range(numpy_of(values)) for name, values in found.covariates.items()}
    side, n = math.ceil(math.sqrt(len(shown))), len(shown)
    words = texts("pictures.sampled", points=x.ndim == 2, what=what, told=told, shown=n, count=len(x))
    return _drawn(words, shown, side, data, [(x, what)])


def _range(values: np.ndarray) -> str:
    low, high = f"{values.min():g}", f"{values.max():g}"
    return low if low == high else f"{low} to {high}"


@style()
def reconstructed(found: encode.Reconstructions, x: np.ndarray, data: np.ndarray) -> Figure | None:
    """Draw best, median and worst reconstructions below their data `x`, `(n, *shape)`; None for data of other shapes.

    Points in the plane are joined to their reconstructions by lines. `data` gives the range of grey values.
    """
    made, log_p = array(found.x), numpy_of(found.log_p)
    if not is_shown(x.shape[1:]):
        return None
    what = "mean" if found.is_mean else "draw"
    (caption,) = texts("pictures.reconstructed", points=x.ndim == 2, what=what)
    if x.ndim == 2:
        return _points([(made, f"{what}s of p(x | z)")], x, "Reconstructions", caption, "data")
    picks = best_to_worst(log_p, 8)
    titles = list(picks) if len(picks) > 1 else ["Reconstructions"]
    parts = [Rebuilt(name, x[i], made[i], log_p[i]) for name, i in zip(titles, picks.values(), strict=True)]
    sheet = reconstructions(parts, float(np.nanmin(data)), float(np.nanmax(data)), what)
    base.set_caption(sheet, caption)
    return sheet


def moved(found: traversal.Traversal) -> tuple[list[str], list[str], str]:
    """Return names of the moved coordinates, values of the first as text, and the sentence that explains the values."""
    values, name = numpy_of(found.values), plain(found.latent)[:12]
    names = [f"{name}[{d}]" for d in found.dims] if len(values) > 1 or found.dims[0] else [name]
    said = "" if bool((values == values[:1]).all()) else " in the first row; each moves as far as its prior does"
    return names, [f"{v:.3g}".replace("-", "−") for v in values[0]], f"Below: its value{said}."


def traversed(found: traversal.Traversal, data: np.ndarray) -> Figure | None:
    """Draw a latent traversal: a row of images per coordinate, or paths over 2D data; None for data of other shapes."""
    x, (names, columns, below) = array(found.x), moved(found)
    images, paths = x.reshape(-1, *x.shape[2:]), list(zip(x, names, strict=True))
    latent, order = plain(found.latent)[: base.SHORT], found.order if names[1:] else ""
    words = texts("pictures.traversed", points=x.ndim == 3, latent=latent, order=order, below=below)
    return _drawn(words, images, x.shape[1], data, paths, names, columns, lines="path")


def interpolated(found: traversal.Interpolation, data: np.ndarray) -> Figure | None:
    """Draw an interpolation of two data: a row of images, or a path over 2D data; None for data of other shapes."""
    x, known = array(found.x), [] if found.log_prior is None else found.log_prior.tolist()
    below = [f"{value:.1f}".replace("-", "−") for value in known]
    words = texts("pictures.interpolated", points=x.ndim == 2, known=bool(below))
    return _drawn(words, x, len(x), data, [(x, "the way")], (), below, lines="path")


@style()
def _drawn(
    words: Names, x: np.ndarray, columns: int, data: np.ndarray, groups: Groups, *names: Names, lines: str = ""
) -> Figure | None:
    """Draw images x on a sheet, or else groups of 2D points, under title and caption; None for data of other shapes.

    Images are in a grid, scaled by the range of `data`; `names` of rows are at the left, then of columns below.
    """
    if not is_shown(x.shape[1:]):
        return None
    title, caption = words
    if x.ndim == 2:
        return _points(groups, data, title, caption, lines)
    h, w = x.shape[-2:]
    rows = math.ceil(len(x) / columns)
    made, (axes,) = panels(rows * image_width(columns) * h / w * 1.08 + 0.75, title=title)
    show_tiles(axes, x, columns, float(np.nanmin(data)), float(np.nanmax(data)), *names)
    base.set_caption(made, caption)
    return made


def encoded(
    found: encode.Encoding, prior: sample.Samples, labels: np.ndarray | None = None, names: Names | None = None
) -> Planes:
    """Return plots of q_agg against the prior, from samples of both, by real latent with at least two rows."""
    planes = {}
    for name, code in found.latents.items():
        if code.probs is None and code.value.is_floating_point() and name in prior.latents and len(code.value) > 1:
            three = (code.value if code.loc is None else code.loc, code.value, prior.latents[name])
            means, values, of_prior = (array(t).reshape(len(t), -1) for t in three)
            planes[name] = clouds.plane(clouds.Cloud(name, means, values, of_prior), labels, names)
    return planes


@style()
def _points(groups_of: Groups, data: np.ndarray, title: str, caption: str, lines: str = "") -> Figure:
    """Draw groups of 2D points over the data; `lines` join them to their "data", or each group to a "path"."""
    made, (axes,) = panels(5.4, title=title, xlabel="x[0]", ylabel="x[1]")
    size = float(np.clip(9000 / max(map(len, (data, groups_of[0][0]))), 4, 16))
    colour = base.GREY if lines == "data" else base.PALE
    axes.scatter(data[:, 0], data[:, 1], s=size, color=colour, linewidths=0, label="data")
    for i, (x, label) in enumerate(groups_of):
        if lines == "data":
            axes.plot(*np.stack([data.T, x.T], 1), color=base.PALE, lw=0.8, zorder=0)
        if lines == "path":
            colour, dash = base.SERIES[i % len(base.SERIES)], ("-", "--")[i // len(base.SERIES) % 2]
            axes.plot(*x.T, color=colour, linestyle=dash, label=label)
            axes.plot(x[-1:, 0], x[-1:, 1], "o", color=colour, markersize=5)
        else:
            axes.scatter(x[:, 0], x[:, 1], s=1.5 * size, color=RED, alpha=0.7, linewidths=0, label=label)
    axes.set_aspect("equal", adjustable="datalim")
    made.legend(loc="outside upper right", ncols=min(6, 1 + len(groups_of)), columnspacing=1.0)
    made.set_layout_engine("constrained", w_pad=0.1)
    base.set_caption(made, caption)
    return made
