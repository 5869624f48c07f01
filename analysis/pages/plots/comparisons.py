"""Plots that compare several runs, and labels of points that do not overlap."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.pages.plots import base
from pvae.analysis.pages.plots.base import BLACK, GREY, PALE, SERIES, Names, nats, note, panels, plain, style
from pvae.analysis.pages.plots.curves import MetricsRow, curve, over_epochs, robust_limits

Values = Sequence[float]
Cases = Mapping[str, tuple[int, str]]
"""Number of the case of each run, and its label, empty for all but one of its runs."""
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LABEL = 36
"""Largest number of characters of a label."""
REACHES = (9, 20, 34, 52, 74, 100, 140, 190)
"""Distances of a label from its point, in 1/72 inch, tried in this order; from the third on, a line connects them."""
TURNS = tuple(math.radians(angle) for angle in (0, 180, 90, 270, 35, 145, 325, 215, 65, 115, 295, 245))
"""Directions from a point to its label, in radians, tried in this order at each distance."""


@style()
def overlaid(names: Names, runs: Sequence[Sequence[MetricsRow]], cases: Sequence[int]) -> Figure:
    """Plot the validation ELBO over epochs, nats per datum, a line for each run, those of a case in one colour."""
    made, (axes,) = panels(3.8 + 0.1 * len(set(cases)), title="ELBO of validation", ylabel="nats per datum")
    curves = []
    for name, rows, i in zip(names, runs, cases, strict=True):
        look = {"color": SERIES[i % len(SERIES)], "linestyle": DASHES[i // len(SERIES) % len(DASHES)], "linewidth": 1.5}
        curves.append(curve(axes, rows, "validation", "elbo", label=shortened(name) or "_", **look))
    robust_limits(axes, curves)
    over_epochs([axes])
    made.legend(loc="outside lower left", ncols=2)
    return made


@style()
def differences(names: Names, gains: Sequence[Estimate], reference: str, what: str, cases: Sequence[int]) -> Figure:
    """Plot paired differences to a reference run with ± 2 standard errors; they are positive if the run is better."""
    made, (axes,) = panels(0.36 * len(names) + 1.2, title=f"{what}, less that of {shortened(reference)}")
    for i, (gain, case) in enumerate(zip(gains, cases, strict=True)):
        error = 2 * gain.standard_error if np.isfinite(gain.standard_error) else 0.0
        axes.errorbar(gain.value, i, xerr=error, markersize=6, elinewidth=2, capsize=3, **_look(case))
    axes.axvline(0, color=BLACK, linewidth=1)
    axes.set_yticks(range(len(names)), [shortened(name) for name in names])
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel="nats per datum, ± 2 standard errors")
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    return made


@style()
def together(names: Names, x: Values, metrics: Sequence[tuple[str, Values]], of: str, cases: Sequence[int]) -> Figure:
    """Plot several metrics of the runs, a panel each, against one metric `x`, to show correlations over runs."""
    made, grid = panels(2.6 * len(metrics) + 0.3, [1] * len(metrics), sharex=True)
    clouds = [np.column_stack([x, y]).astype(np.float64) for _, y in metrics]
    for axes, (title, _), points in zip(grid, metrics, clouds, strict=True):
        for i, (a, b) in zip(cases, points, strict=True):
            axes.plot(a, b, markersize=7, linestyle="", **_look(i))
        _frame(axes, points.min(0), points.max(0), pad=0.2, least=0.5)
        axes.set_title(title)
        axes.grid(color=GREY, alpha=0.2)
    grid[-1].set_xlabel(of)
    _fix_layout(made)
    for axes, points in zip(grid, clouds, strict=True):
        label_points(made, axes, names, points, [])
    return made


def _look(i: int) -> dict[str, Any]:
    """Return marker and colour of case `i`."""
    return {"marker": MARKERS[i % len(MARKERS)], "color": SERIES[i % len(SERIES)]}


def _frame(axes: Axes, low: np.ndarray, high: np.ndarray, pad: float, least: float) -> None:
    """Set the limits of both axes to `low` and `high`, `(2,)`, and a margin, at least `least` for points on a line."""
    margin = np.where(high > low, pad * (high - low), np.maximum(least, 0.05 * np.abs(high)))
    axes.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))


def _fix_layout(made: Figure) -> None:
    """Lay the figure out once and for all, so that labels can be placed in display pixels."""
    made.draw_without_rendering()
    made.set_layout_engine("none")


@style()
def rate_distortion(rows: Sequence[Mapping[str, Any]], cases: Cases | None = None) -> Figure:
    """Plot runs in the rate-distortion plane, with lines of equal ELBO and labels that do not overlap.

    Arguments:
        rows: of each run its name `run`, its `rate` KL(q(z | x) || p(z)) and its `distortion` -E log p(x | z), nats per
            datum, and their standard errors `rate_error` and `distortion_error`; infinite or NaN errors are not drawn.
        cases: number of the case of each run, by which runs look alike, and its label; by default each run is a case.
    """
    points = np.array([(row["rate"], row["distortion"]) for row in rows], dtype=np.float64)
    errors = np.array([(row["rate_error"], row["distortion_error"]) for row in rows], dtype=np.float64)
    spread = np.nan_to_num(errors, posinf=0.0)
    made, (axes,) = panels(5.0, title="Rate and distortion")
    known = cases or {row["run"]: (i, row["run"]) for i, row in enumerate(rows)}
    for row, (x, y), (e_x, e_y) in zip(rows, points, spread, strict=True):
        look = {"elinewidth": 1.2, "markersize": 7, "markeredgecolor": "white", **_look(known[row["run"]][0])}
        axes.errorbar(x, y, xerr=e_x or None, yerr=e_y or None, markeredgewidth=0.8, zorder=3, **look)
    _frame(axes, (points - spread).min(0), (points + spread).max(0), pad=0.18, least=1.0)
    axes.set(xlabel="rate: KL(q(z | x) || p(z)), nats per datum", ylabel="distortion: −E log p(x | z), nats per datum")
    base.set_caption(made, "Dashed: equal ELBO = −(rate + distortion). Towards the lower left the ELBO is higher.")
    _fix_layout(made)
    taken = _equal_elbo(made, axes)
    ends = axes.transData.transform(np.concatenate([points - spread, points + spread])).reshape(2, -1, 2)
    for (x, y), (x0, y0), (x1, y1) in zip(axes.transData.transform(points), *ends, strict=True):
        taken += [Bbox.from_extents(x0, y - 2, x1, y + 2), Bbox.from_extents(x - 2, y0, x + 2, y1)]
    label_points(made, axes, [known[row["run"]][1] for row in rows], points, taken)
    return made


def _equal_elbo(made: Figure, axes: Axes) -> list[Bbox]:
    """Draw dashed lines of equal ELBO = -(rate + distortion); return the boxes of their labels, in display pixels."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    boxes, levels = [], MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(left + bottom, right + top)
    digits = max(0, -math.floor(math.log10(levels[1] - levels[0]) + 1e-9))
    for level in (level for level in levels if left + bottom < level < right + top):
        axes.plot([left, right], [level - left, level - right], color=PALE, linestyle="--", linewidth=0.9, zorder=0)
        at = (left, level - left) if level - left <= top else (level - top, top)
        if at[0] > right - 0.12 * (right - left) or at[1] < bottom + 0.04 * (top - bottom):
            continue
        label = note(axes, nats(-level, digits), at, (3, -2), 2, ha="left", va="top", fontsize=8, color=GREY)
        boxes.append(label.get_window_extent(made.canvas.get_renderer()))  # type: ignore[attr-defined]
    axes.set(xlim=(left, right), ylim=(bottom, top))
    return boxes


def shortened(name: str) -> str:
    """Return a name for display of at most `LABEL` characters; a longer one has an ellipsis in place of its middle."""
    name = plain(name)
    return name if len(name) <= LABEL else f"{name[: LABEL // 2]}…{name[-LABEL // 2 + 1 :]}"


def label_points(made: Figure, axes: Axes, names: Sequence[str], points: np.ndarray, taken: list[Bbox]) -> None:
    """Label each point that has a name at the first place inside the axes clear of labels, points and boxes `taken`.

    If no place is free of all, one that is clear of the labels is preferred.
    """
    places = axes.transData.transform(points)
    scale, frame = made.dpi / 72, axes.get_window_extent()
    obstacles = [*taken, *(Bbox.from_extents(*(place - 5 * scale), *(place + 5 * scale)) for place in places)]
    labels: list[Bbox] = []
    for name, place, point in ((n, *at) for n, *at in zip(names, places, points, strict=True) if n):
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3}
        label = note(axes, shortened(name), point, (0, 0), 2.5, fontsize=9, zorder=4, arrowprops=line)
        size = Text.get_window_extent(label, made.canvas.get_renderer())  # type: ignore[attr-defined]  # not the line's
        spots = [(r, _beside(place, size.width, size.height, turn, r * scale)) for r in REACHES for turn in TURNS]
        inside = [spot for spot in spots if all(frame.fully_contains(*c) for c in (spot[1].min, spot[1].max))] or spots
        clear = [(reach, box) for reach, box in inside if not box.count_overlaps(labels)] or inside
        reach, box = next((spot for spot in clear if not spot[1].count_overlaps(obstacles)), clear[0])
        labels.append(box)
        label.set_position(((box.x0 - place[0]) / scale, (box.y0 - place[1]) / scale))
        if reach <= REACHES[1] and label.arrow_patch is not None:
            label.arrow_patch.set_visible(False)


def _beside(place: np.ndarray, width: float, height: float, turn: float, reach: float) -> Bbox:
    """Return the box of a label at distance `reach` from a point in direction `turn` (radians), in display pixels."""
    cos, sin = math.cos(turn), math.sin(turn)
    middle = place + np.array([cos * (reach + width / 2), sin * (reach + height / 2)])
    return Bbox.from_bounds(middle[0] - width / 2, middle[1] - height / 2, width, height)
