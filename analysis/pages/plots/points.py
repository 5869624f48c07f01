"""Plot of runs in the rate-distortion plane, and labels of points that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from pvae.analysis.pages.plots.base import GREY, PALE, SERIES, figure, nats, plain, set_caption, style
from pvae.util.types import Array

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LABEL = 36
"""Largest number of characters of a label."""
REACHES = (9, 20, 34, 52, 74, 100, 140, 190)
"""Distances of a label from its point, in 1/72 inch, tried in this order; from the third on, a line connects them."""
TURNS = tuple(math.radians(angle) for angle in (0, 180, 90, 270, 35, 145, 325, 215, 65, 115, 295, 245))
"""Directions from a point to its label, in radians, tried in this order at each distance."""


@style()
def rate_distortion(
    names: Sequence[str], rates: Sequence[float], distortions: Sequence[float], errors: Sequence[tuple[float, float]]
) -> Figure:
    """Plot runs in the rate-distortion plane, with lines of equal ELBO and labels that do not overlap.

    Arguments:
        names: names of the runs.
        rates: rate KL(q(z | x) || p(z)) of each run, nats per datum.
        distortions: distortion -E log p(x | z) of each run, nats per datum.
        errors: standard errors of rate and distortion of each run; infinite or NaN errors are not drawn.
    """
    points = np.column_stack([rates, distortions]).astype(np.float64)
    spread = np.nan_to_num(np.asarray(errors, dtype=np.float64), posinf=0.0).reshape(-1, 2)
    made = figure(5.0)
    axes = made.subplots()
    for i, ((x, y), (e_x, e_y)) in enumerate(zip(points, spread, strict=True)):
        axes.errorbar(
            x, y, xerr=e_x or None, yerr=e_y or None, color=SERIES[i % len(SERIES)], elinewidth=1.2,
            marker=MARKERS[i % len(MARKERS)], markersize=7, markeredgecolor="white", markeredgewidth=0.8, zorder=3,
        )  # fmt: skip
    low, high = (points - spread).min(0), (points + spread).max(0)
    pad = np.where(high > low, 0.18 * (high - low), np.maximum(1.0, 0.05 * np.abs(high)))
    axes.set_xlim(low[0] - pad[0], high[0] + pad[0])
    axes.set_ylim(low[1] - pad[1], high[1] + pad[1])
    axes.set_title("Rate and distortion")
    axes.set_xlabel("rate: KL(q(z | x) || p(z)), nats per datum")
    axes.set_ylabel("distortion: −E log p(x | z), nats per datum")
    set_caption(made, "Dashed: equal ELBO = −(rate + distortion). Towards the lower left the ELBO is higher.")
    made.draw_without_rendering()
    made.set_layout_engine("none")
    taken = _equal_elbo(made, axes)
    ends = axes.transData.transform(np.concatenate([points - spread, points + spread])).reshape(2, -1, 2)
    for (x, y), (x0, y0), (x1, y1) in zip(axes.transData.transform(points), *ends, strict=True):
        taken += [Bbox.from_extents(x0, y - 2, x1, y + 2), Bbox.from_extents(x - 2, y0, x + 2, y1)]
    label_points(made, axes, [shortened(plain(name)) for name in names], points, taken)
    return made


def _equal_elbo(made: Figure, axes: Axes) -> list[Bbox]:
    """Draw dashed lines of equal ELBO = -(rate + distortion); return the boxes of their labels, in display pixels."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    boxes, levels = [], MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(left + bottom, right + top)
    digits = max(0, -math.floor(math.log10(levels[1] - levels[0]) + 1e-9))
    for level in levels:
        if not left + bottom < level < right + top:
            continue
        axes.plot([left, right], [level - left, level - right], color=PALE, linestyle="--", linewidth=0.9, zorder=0)
        at = (left, level - left) if level - left <= top else (level - top, top)
        if at[0] > right - 0.12 * (right - left) or at[1] < bottom + 0.04 * (top - bottom):
            continue
        note = axes.annotate(
            nats(-level, digits), at, xytext=(3, -2), textcoords="offset points", ha="left",
            va="top", fontsize=8, color=GREY, path_effects=[withStroke(linewidth=2, foreground="white")],
        )  # fmt: skip
        boxes.append(note.get_window_extent(made.canvas.get_renderer()))  # type: ignore[attr-defined]
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    return boxes


def shortened(name: str) -> str:
    """Return a name of at most `LABEL` characters; a longer one has an ellipsis in place of its middle."""
    return name if len(name) <= LABEL else f"{name[: LABEL // 2]}…{name[-LABEL // 2 + 1 :]}"


def label_points(made: Figure, axes: Axes, names: Sequence[str], points: Array, taken: list[Bbox]) -> None:
    """Label each point at the first place inside the axes that is clear of other labels, points and the boxes `taken`.

    If no place is free of all, one that is clear of the labels is preferred.
    """
    places = axes.transData.transform(points)
    scale, frame = made.dpi / 72, axes.get_window_extent()
    obstacles = [*taken, *(Bbox.from_extents(*(place - 5 * scale), *(place + 5 * scale)) for place in places)]
    labels: list[Bbox] = []
    for name, place, point in zip(names, places, points, strict=True):
        note = axes.annotate(
            name, (float(point[0]), float(point[1])), xytext=(0, 0), textcoords="offset points", fontsize=9, zorder=4,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3},
        )  # fmt: skip
        size = Text.get_window_extent(note, made.canvas.get_renderer())  # type: ignore[attr-defined]  # not the line's
        spots = [
            (reach, _beside(place, size.width, size.height, turn, reach * scale)) for reach in REACHES for turn in TURNS
        ]
        inside = [(reach, box) for reach, box in spots if _inside(box, frame)] or spots
        clear = [(reach, box) for reach, box in inside if not box.count_overlaps(labels)] or inside
        reach, box = next((spot for spot in clear if not spot[1].count_overlaps(obstacles)), clear[0])
        labels.append(box)
        note.set_position(((box.x0 - place[0]) / scale, (box.y0 - place[1]) / scale))
        if reach <= REACHES[1] and note.arrow_patch is not None:
            note.arrow_patch.set_visible(False)


def _beside(place: Array, width: float, height: float, turn: float, reach: float) -> Bbox:
    """Return the box of a label at distance `reach` from a point in direction `turn` (radians), in display pixels."""
    cos, sin = math.cos(turn), math.sin(turn)
    middle = place + np.array([cos * (reach + width / 2), sin * (reach + height / 2)])
    return Bbox.from_bounds(middle[0] - width / 2, middle[1] - height / 2, width, height)


def _inside(box: Bbox, frame: Bbox) -> bool:
    return frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
