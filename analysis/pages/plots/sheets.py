"""Plots with captions, for the PNG files that commands write: samples, reconstructions, traversals, codes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from pvae.analysis.export.sites import numpy_of
from pvae.analysis.pages.plots.base import GREY, PALE, RED, SERIES, SHORT, panels, plain, set_caption, style
from pvae.analysis.pages.plots.clouds import Cloud, plane
from pvae.analysis.pages.plots.pictures import Rebuilt, best_to_worst, image_width, rebuilt_images, show_tiles
from pvae.analysis.samples.encode import Encoding, Reconstructions
from pvae.analysis.samples.interpolate import Interpolation
from pvae.analysis.samples.sample import Samples
from pvae.analysis.samples.sharpness import is_image
from pvae.analysis.samples.traversal import Traversal
from pvae.util.types import Array

SHEET = 100
"""Largest number of samples that a plot shows as images."""


def is_shown(shape: Sequence[int]) -> bool:
    """Return True for data that can be plotted: images `(1|3, H, W)` or `(H, H)`, and points in the plane `(2,)`."""
    return tuple(shape) == (2,) or (is_image(shape) and (len(shape) == 3 or shape[0] == shape[1]))


def sampled(found: Samples, data: Array) -> Figure | None:
    """Draw samples of a model as images, or as points over the data `(m, 2)`; None for data of other shapes."""
    x = _values(found.x)
    if not is_shown(x.shape[1:]):
        return None
    what = "means of p(x | z)" if found.is_mean else "draws of p(x | z)"
    told = ", ".join(f"{plain(name)} = {_range(numpy_of(values))}" for name, values in found.covariates.items())
    caption = f"{what[0].upper()}{what[1:]}, each at its own draw of z from the prior{told and f', given {told}'}."
    if x.ndim == 2:
        return _points([(x, what)], data, "Samples", caption)
    shown = x[:SHEET]
    some = f" ({len(shown)} of {len(x)})" if len(shown) < len(x) else ""
    return _sheet(shown, math.ceil(math.sqrt(len(shown))), data, f"Samples{some}", caption)


def _values(t: Tensor) -> Array:
    return numpy_of(t).astype(np.float64)


def _range(values: Array) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"


@style()
def reconstructed(found: Reconstructions, x: Array, data: Array) -> Figure | None:
    """Draw best, median and worst reconstructions below their data `x`, `(n, *shape)`; None for data of other shapes.

    Points in the plane are joined to their reconstructions by lines. `data` gives the range of grey values.
    """
    made, log_p = _values(found.x), numpy_of(found.log_p)
    if not is_shown(x.shape[1:]):
        return None
    what = "mean" if found.is_mean else "draw"
    if x.ndim == 2:
        caption = f"Lines join each datum to the {what} of p(x | z) at one draw of q(z | x)."
        return _points([(made, f"{what}s of p(x | z)")], x, "Reconstructions", caption, joined=True)
    picks = best_to_worst(log_p, 8)
    titles = list(picks) if len(picks) > 1 else ["Reconstructions"]
    parts = [Rebuilt(name, x[i], made[i], log_p[i]) for name, i in zip(titles, picks.values(), strict=True)]
    sheet = rebuilt_images(parts, float(data.min()), float(data.max()), what)
    set_caption(sheet, f"Above the datum, below the {what} of p(x | z) at one draw of q(z | x); log p(x | z), nats.")
    return sheet


def traversed(found: Traversal, data: Array) -> Figure | None:
    """Draw a latent traversal: a row of images per coordinate, or paths over 2D data; None for data of other shapes."""
    x, values = _values(found.x), numpy_of(found.values)
    if not is_shown(x.shape[2:]):
        return None
    name = plain(found.latent)[:SHORT]
    names = [f"{name}[{d}]" for d in found.dims] if values.shape[0] > 1 or found.dims[0] else [name]
    title = f"Traversal of {name}"
    by = f", ordered by {found.order}" if len(names) > 1 else ""
    if x.ndim == 3:
        caption = f"Paths of the mean of p(x | z) as one coordinate moves, the others held{by}; a dot where each ends."
        return _points(list(zip(x, names, strict=True)), data, title, caption, paths=True)
    same = bool((values == values[:1]).all())
    caption = f"Means of p(x | z); in each row one coordinate moves, the others are held{by}."
    caption += " Below: its value." if same else " Below: its value in the first row; each moves as far as its prior."
    columns = [f"{v:.3g}".replace("-", "−") for v in values[0]]
    return _sheet(x.reshape(-1, *x.shape[2:]), x.shape[1], data, title, caption, names, columns)


def interpolated(found: Interpolation, data: Array) -> Figure | None:
    """Draw an interpolation of two data: a row of images, or a path over 2D data; None for data of other shapes."""
    x = _values(found.x)
    if not is_shown(x.shape[1:]):
        return None
    title, caption = "Interpolation", "Means of p(x | z) on the line between the codes of two data"
    if x.ndim == 2:
        return _points([(x, "the way")], data, title, f"{caption}; a dot where it ends.", paths=True)
    log_prior = () if found.log_prior is None else numpy_of(found.log_prior)
    caption = f"{caption}." if found.log_prior is None else f"{caption}. Below: log p(z), nats."
    return _sheet(x, len(x), data, title, caption, (), [f"{v:.1f}".replace("-", "−") for v in log_prior])


def encoded(
    found: Encoding, prior: Samples, labels: Array | None = None, names: Sequence[str] | None = None
) -> dict[str, Figure]:
    """Return plots of q_agg against the prior, from samples of both, by real latent with at least two rows."""
    planes = {}
    for name, code in found.latents.items():
        if code.probs is None and name in prior.latents and len(code.value) > 1:
            three = (code.value if code.loc is None else code.loc, code.value, prior.latents[name])
            means, values, of_prior = (_values(t).reshape(len(t), -1) for t in three)
            planes[name] = plane(Cloud(name, means, values, of_prior), labels, names)
    return planes


@style()
def _sheet(images: Array, columns: int, data: Array, title: str, caption: str, *names: Sequence[str]) -> Figure:
    """Draw images in a grid, scaled by the range of `data`; `names` of rows are at the left, then of columns below."""
    h, w = images.shape[-2:]
    rows = math.ceil(len(images) / columns)
    made, (axes,) = panels(rows * image_width(columns) * h / w * 1.08 + 0.75)
    show_tiles(axes, images, columns, float(data.min()), float(data.max()), *names)
    axes.set_title(title)
    set_caption(made, caption)
    return made


@style()
def _points(
    groups_of: Sequence[tuple[Array, str]],
    data: Array,
    title: str,
    caption: str,
    *,
    joined: bool = False,
    paths: bool = False,
) -> Figure:
    """Draw groups of 2D points over the data: as points, joined to their data by lines (`joined`), or as `paths`."""
    made, (axes,) = panels(5.4)
    size = float(np.clip(9000 / max(map(len, (data, groups_of[0][0]))), 4, 16))
    axes.scatter(data[:, 0], data[:, 1], s=size, color=PALE if not joined else GREY, linewidths=0, label="data")
    for i, (x, label) in enumerate(groups_of):
        if joined:
            axes.plot(np.stack([data[:, 0], x[:, 0]]), np.stack([data[:, 1], x[:, 1]]), color=PALE, lw=0.8, zorder=0)
        if paths:
            colour, dash = SERIES[i % len(SERIES)], ("-", "--")[i // len(SERIES) % 2]
            axes.plot(x[:, 0], x[:, 1], color=colour, linestyle=dash, label=label)
            axes.plot(x[-1:, 0], x[-1:, 1], "o", color=colour, markersize=5)
        else:
            axes.scatter(x[:, 0], x[:, 1], s=1.5 * size, color=RED, alpha=0.7, linewidths=0, label=label)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set(title=title, xlabel="x[0]", ylabel="x[1]")
    made.legend(loc="outside upper right", ncols=min(6, 1 + len(groups_of)), columnspacing=1.0)
    made.set_layout_engine("constrained", w_pad=0.1)
    set_caption(made, caption)
    return made
