"""The report's figures: pure functions from numbers to matplotlib Figures; no pyplot, no global settings."""

from __future__ import annotations

import io
import math
import textwrap
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Ellipse
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from pvae.analysis.anatomy import Surgery
from pvae.analysis.collapse import ACTIVE, CodeUse, LatentCollapse
from pvae.analysis.generate import Encoding, Reconstructions, Samples
from pvae.analysis.sites import numpy_of
from pvae.analysis.traversal import Traversal

Array = NDArray[np.float64]
Row = Mapping[str, Any]

DPI = 120
WIDTH = 6.0
"""Inches: 720 pixels, so that text is still legible on a phone."""
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
"""Okabe and Ito's palette, told apart by every kind of colour vision."""
GREY, PALE = "#767676", "#C8C8C8"
SERIES = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK)
CLASSES = (BLUE, ORANGE, GREEN, RED, SKY, PURPLE, BLACK, YELLOW, "#8A8A8A", "#7A4A1E")
TEXT, SHORT = 60, 16
"""Characters of a name that a figure shows, and of a class's name."""

STYLE: dict[str, Any] = {
    "text.parse_math": False,
    "text.usetex": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "font.family": ["DejaVu Sans"],
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10.0,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.facecolor": "white",
    "figure.facecolor": "white",
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "savefig.facecolor": "white",
    "savefig.bbox": None,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.8,
    "hatch.linewidth": 0.6,
    "image.interpolation": "nearest",
}


@contextmanager
def style() -> Iterator[None]:
    """The figures' settings for a while; whatever the user has set comes back."""
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        yield


def figure(height: float) -> Figure:
    """An empty figure of the report's width, `height` in inches."""
    made = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def png(made: Figure) -> bytes:
    """PNG bytes at 120 dpi; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with style():
        made.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def plain(text: object) -> str:
    """A name that the font can show: no control characters, at most `TEXT` characters."""
    known = get_font(findfont("DejaVu Sans")).get_charmap()
    shown = "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cf", "Cs") or ord(c) not in known else c
        for c in str(text)
    )
    return shown if len(shown) <= TEXT else shown[: TEXT - 1] + "…"


def nats(value: float, digits: int = 2) -> str:
    """A figure with a true minus sign, and none before a zero."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


# ---------------------------------------------------------------------- training


def series(rows: Sequence[Row], split: str, key: str) -> tuple[Array, Array]:
    """(epochs, values) of one figure of one split; what is no number is left out."""
    pairs = [
        (float(row["epoch"]), float(row[key]))
        for row in rows
        if row.get("split") == split and all(_is_number(row.get(name)) for name in ("epoch", key))
    ]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def training(rows: Sequence[Row], latents: Sequence[str]) -> Figure:
    """ELBO of train and validation, KL of every latent, and beta, over epochs."""
    with style():
        made = figure(6.6)
        top, middle, bottom = made.subplots(3, 1, sharex=True, height_ratios=[3, 2, 1])
        _elbo_curves(top, rows)
        for i, name in enumerate(latents):
            colour = SERIES[i % len(SERIES)]
            middle.plot(*series(rows, "train", f"kl/{name}"), color=colour, label=plain(name))
            middle.plot(*series(rows, "validation", f"kl/{name}"), color=colour, linestyle="--")
        middle.set_title("KL of every latent (dashed: validation)")
        middle.set_ylabel("nats")
        middle.set_ylim(bottom=0)
        middle.legend(loc="best")
        epochs, beta = series(rows, "train", "beta")
        bottom.plot(epochs, beta, color=GREY)
        bottom.set_title("beta, the weight of the KL in the loss")
        bottom.set_ylim(-0.05, max(1.05, float(beta.max(initial=0.0)) * 1.05))
        bottom.set_xlabel("epoch")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        for axes in (top, middle, bottom):
            axes.grid(axis="y")
            if len(epochs) == 1:
                axes.margins(x=0.5)
    return made


def history(rows: Sequence[Row]) -> Figure:
    """Mutual information and marginal KL over epochs, with the ceiling of the first."""
    with style():
        made = figure(3.2)
        axes = made.subplots()
        for (key, label), colour in zip(HISTORY, SERIES, strict=False):
            epochs, values = series(rows, "analysis", key)
            axes.plot(epochs, values, color=colour, label=label, marker="o" if len(epochs) < 10 else None, markersize=4)
        epochs, ceiling = series(rows, "analysis", "log_n")
        axes.plot(epochs, ceiling, color=GREY, linestyle=":", label="log n, the most I can be")
        axes.set_title("Where the KL goes")
        axes.set_ylabel("nats")
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.grid(axis="y")
        axes.legend(loc="best")
    return made


HISTORY = (("mutual_information", "mutual information I_q[x, z]"), ("marginal_kl", "marginal KL(q_agg || p)"))


def duel(rows: Sequence[Row]) -> Figure:
    """Losses of critic and generator, and the nearest-neighbour accuracy of validation, over epochs."""
    with style():
        made = figure(4.8)
        top, bottom = made.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        for key, label, colour in (("critic_loss", "critic", BLUE), ("generator_loss", "generator", RED)):
            epochs, values = series(rows, "train", key)
            mark = "o" if len(epochs) < 10 else None
            top.plot(epochs, values, color=colour, label=label, marker=mark, markersize=4)
            top.plot(*series(rows, "validation", key), color=colour, linestyle="--")
        top.axhline(math.log(4), color=GREY, linestyle=":", label="log 4, of a critic that knows nothing")
        top.set_title("Losses (dashed: validation)")
        top.set_ylabel("nats")
        top.legend(loc="best")
        epochs, values = series(rows, "validation", "two_sample")
        bottom.plot(epochs, values, color=GREEN, marker="o" if len(epochs) < 10 else None, markersize=4)
        bottom.axhline(0.5, color=GREY, linestyle=":")
        bottom.set_title("Nearest neighbour of the same kind (one half: alike)")
        bottom.set_ylim(0.0, 1.05)
        bottom.set_xlabel("epoch")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        for axes in (top, bottom):
            axes.grid(axis="y")
            if len(epochs) == 1:
                axes.margins(x=0.5)
    return made


def _elbo_curves(axes: Axes, rows: Sequence[Row]) -> None:
    seen = []
    for split, colour, dash in (("train", BLUE, "-"), ("validation", RED, "--")):
        epochs, values = series(rows, split, "elbo")
        mark = "o" if len(epochs) < 10 else None
        axes.plot(epochs, values, color=colour, linestyle=dash, label=split, marker=mark, markersize=4)
        seen.append((epochs, values))
    epochs, values = seen[1]
    if len(values):
        best = int(values.argmax())
        axes.plot(epochs[best], values[best], "o", color=RED, markersize=7, markerfacecolor="white", markeredgewidth=2)
        axes.set_title(f"ELBO (circle: best of validation, {nats(values[best])})")
    else:
        axes.set_title("ELBO")
    _set_robust_limits(axes, seen)
    axes.set_ylabel("nats per datum")
    axes.legend(loc="lower right")


def _set_robust_limits(axes: Axes, curves: Sequence[tuple[Array, Array]]) -> None:
    """Frame the later nine tenths of training: the first steps can lie a hundred times lower."""
    last = max((float(epochs[-1]) for epochs, _ in curves if len(epochs)), default=0.0)
    late = [values[epochs > 0.1 * last] for epochs, values in curves if len(values)]
    if last < 10 or not late:
        return
    shown, whole = np.concatenate(late), np.concatenate([values for _, values in curves])
    low, high = float(shown.min()), float(whole.max())
    margin = 0.08 * max(high - low, 1e-6)
    axes.set_ylim(low - margin, high + margin)


# ---------------------------------------------------------------------- surgery


@dataclass(frozen=True)
class Step:
    """One line of a waterfall: a level that is reached, or a cost that is paid."""

    label: str
    value: float
    is_level: bool = False
    colour: str = GREY


def waterfall_steps(surgery: Surgery) -> list[list[Step]]:
    """From reconstruction to ELBO: by term, and by latent where there are several."""
    start = Step("reconstruction", surgery.reconstruction.value, True)
    end = Step("ELBO", surgery.elbo.value, True)
    by_latent = [
        Step(f"− KL of {name}", z.kl.value, colour=SERIES[i % len(SERIES)])
        for i, (name, z) in enumerate(surgery.latents.items())
    ]
    if surgery.mutual_information is None or surgery.marginal_kl is None:
        return [[start, *by_latent, end]]
    terms = [
        Step("− I_q[x, z]", surgery.mutual_information.value, colour=BLUE),
        Step("− marginal KL", surgery.marginal_kl.value, colour=ORANGE),
    ]
    panels = [[start, *terms, end]]
    return [*panels, [start, *by_latent, end]] if len(by_latent) > 1 else panels


def waterfall(surgery: Surgery) -> Figure:
    """From the reconstruction down through what the code costs to the ELBO, nats per datum."""
    panels = waterfall_steps(surgery)
    titles = ("by term", "by latent") if len(panels) > 1 else ("where the nats go",)
    with style():
        heights = [0.5 * len(steps) + 0.8 for steps in panels]
        made = figure(sum(heights) + 0.2)
        grid = made.subplots(len(panels), 1, squeeze=False, sharex=True, height_ratios=heights)
        for axes, steps, title in zip(grid[:, 0], panels, titles, strict=True):
            _fall(axes, steps)
            low, high = reach(panels)
            axes.set_xlim(low - 0.2 * (high - low), high + 0.06 * (high - low))
            axes.set_title(title)
        grid[-1, 0].set_xlabel("nats per datum")
    return made


def reach(panels: Sequence[Sequence[Step]]) -> tuple[float, float]:
    """Lowest and highest level that any panel touches, at least a little apart."""
    levels = []
    for steps in panels:
        position = steps[0].value
        for step in steps:
            position = step.value if step.is_level else position - step.value
            levels.append(position)
    return min(levels), max(max(levels), min(levels) + 1e-3)


def _fall(axes: Axes, steps: Sequence[Step]) -> None:
    """Levels as ticks, costs as bars from one level down to the next."""
    position = steps[0].value
    for i, step in enumerate(steps):
        if step.is_level:
            position = step.value
            axes.plot([position] * 2, [i - 0.38, i + 0.38], color=BLACK, linewidth=3, solid_capstyle="butt")
            _note(axes, position, i, nats(step.value), toward=1 if i else -1)
        else:
            axes.barh(i, -step.value, left=position, height=0.62, color=step.colour)
            end = min(position, position - step.value)
            _note(axes, end, i, nats(-step.value), toward=-1)
            position -= step.value
        if i + 1 < len(steps):
            axes.plot([position] * 2, [i, i + 1], color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_yticks(range(len(steps)), [plain(step.label) for step in steps])
    axes.set_ylim(len(steps) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _note(axes: Axes, x: float, y: float, text: str, toward: int) -> None:
    axes.annotate(
        text, (x, y), xytext=(6 * toward, 0), textcoords="offset points", va="center", fontsize=10, fontweight="bold",
        ha="left" if toward > 0 else "right", path_effects=[withStroke(linewidth=3, foreground="white")],
    )  # fmt: skip


# ---------------------------------------------------------------------- latents


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


# ---------------------------------------------------------------------- data


def is_image(shape: Sequence[int]) -> bool:
    """Whether an event `(1|3, H, W)` or `(H, W)` can be shown as a picture."""
    return (len(shape) == 3 and shape[0] in (1, 3)) or (len(shape) == 2 and min(shape) > 1)


def tiles(images: Array, columns: int, low: float, high: float) -> Array:
    """Pictures `(n, 1|3, H, W)` or `(n, H, W)` side by side with white between them, `(rows H, columns W, 3)`."""
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


@dataclass(frozen=True)
class Rebuilt:
    """Some data beside the mean of p(x | z) at their own draw of z."""

    title: str
    data: Array
    means: Array
    nats: Array


def reconstructions(parts: Sequence[Rebuilt], low: float, high: float) -> Figure:
    """Best, median and worst data by log p(x | z): the datum above, the decoder's mean below."""
    shape = parts[0].data.shape[1:]
    with style():
        if is_image(shape):
            return _rebuilt_images(parts, low, high)
        return _rebuilt_lines(parts)


def _rebuilt_images(parts: Sequence[Rebuilt], low: float, high: float, below: str = "mean") -> Figure:
    columns = max(len(part.data) for part in parts)
    h, w = parts[0].data.shape[-2:]
    made = figure(len(parts) * (2.15 * 0.89 * WIDTH / columns * h / w + 0.55))
    grid = made.subplots(len(parts), 1, squeeze=False)
    for axes, part in zip(grid[:, 0], parts, strict=True):
        axes.imshow(tiles(np.concatenate([part.data, part.means]), len(part.data), low, high), aspect="equal")
        gap = max(1, round(w / 10))
        axes.set_xticks([i * (w + gap) + w / 2 - 0.5 for i in range(len(part.nats))], [nats(v, 1) for v in part.nats])
        axes.set_yticks([h / 2, h + gap + h / 2], ["data", below])
        axes.tick_params(length=0, labelsize=9)
        axes.spines[:].set_visible(False)
        axes.set_title(part.title)
    return made


def _rebuilt_lines(parts: Sequence[Rebuilt]) -> Figure:
    made = figure(1.6 * len(parts) + 0.4)
    columns = min(4, max(len(part.data) for part in parts))
    grid = made.subplots(len(parts), columns, squeeze=False, sharex=True)
    for row, part in zip(grid, parts, strict=True):
        for i, axes in enumerate(row):
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
    handles, names = grid[0, 0].get_legend_handles_labels()
    made.legend(handles, names, loc="outside lower center", ncols=2)
    return made


def samples(means: Array, data: Array, low: float, high: float) -> Figure:
    """Means of p(x | z) for draws of the prior; beside some data where events are no pictures."""
    shape = means.shape[1:]
    with style():
        if is_image(shape):
            columns = min(10, len(means))
            rows = math.ceil(len(means) / columns)
            made = figure(rows * WIDTH / columns * shape[-2] / shape[-1] + 0.1)
            axes = made.subplots()
            axes.imshow(tiles(means, columns, low, high), aspect="equal")
            axes.set_axis_off()
            return made
        return _sampled_vectors(means.reshape(len(means), -1), data.reshape(len(data), -1))


def _sampled_vectors(means: Array, data: Array) -> Figure:
    if means.shape[1] > 2:
        made = figure(4.6)
        top, bottom = made.subplots(2, 1, sharex=True, sharey=True)
        for axes, values, title, colour in ((top, data, "data", BLACK), (bottom, means, "means of p(x | z)", ORANGE)):
            axes.plot(values[:40].T, color=colour, linewidth=0.8, alpha=0.5)
            axes.set_title(title)
        bottom.set_xlabel("coordinate of x")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        return made
    made = figure(3.4)
    axes = made.subplots()
    if means.shape[1] == 2:
        axes.scatter(data[:, 0], data[:, 1], s=10, color=GREY, alpha=0.5, linewidths=0, label="data")
        axes.scatter(means[:, 0], means[:, 1], s=16, color=ORANGE, linewidths=0, label="means of p(x | z)")
    else:
        axes.hist(data[:, 0], 40, density=True, color=PALE, label="data")
        axes.hist(means[:, 0], 40, density=True, histtype="step", color=RED, linewidth=1.6, label="means of p(x | z)")
    axes.legend(loc="best")
    return made


# ---------------------------------------------------------------------- what a model makes

SHEET = 100
"""Most pictures of a sheet."""
PICTURE = 1.1
"""Largest width of a picture, inches."""
CAPTION = 96
"""Characters of a line of a caption."""


def is_shown(shape: Sequence[int]) -> bool:
    """Whether data of an event are pictures, `(1|3, H, W)` or `(H, H)`, or points of the plane."""
    return tuple(shape) == (2,) or (is_image(shape) and (len(shape) == 3 or shape[0] == shape[1]))


def sampled(found: Samples, data: Array) -> Figure | None:
    """Samples as pictures, or as points before the data `(m, *shape)`; None for data of other shapes."""
    x = numpy_of(found.x).astype(np.float64)
    if not is_shown(x.shape[1:]):
        return None
    what = "means of p(x | z)" if found.is_mean else "draws of p(x | z)"
    told = ", ".join(f"{plain(name)} = {_range(numpy_of(values))}" for name, values in found.covariates.items())
    caption = f"{what[0].upper()}{what[1:]}, each at its own draw of z from the prior{told and f', given {told}'}."
    shown = x[:SHEET]
    some = f" ({len(shown)} of {len(x)})" if len(shown) < len(x) and x.ndim > 2 else ""
    if x.ndim == 2:
        return _points([(x, what)], data, "Samples", caption)
    return _sheet(shown, math.ceil(math.sqrt(len(shown))), data, f"Samples{some}", caption)


def _range(values: NDArray[Any]) -> str:
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}"


def reconstructed(found: Reconstructions, x: Array, data: Array) -> Figure | None:
    """Reconstructions below their data `(n, *shape)`, best, median and worst; None for data of other shapes."""
    made, log_p = numpy_of(found.x).astype(np.float64), numpy_of(found.log_p)
    if not is_shown(x.shape[1:]):
        return None
    what = "mean" if found.is_mean else "draw"
    if x.ndim == 2:
        caption = f"Lines join each datum to the {what} of p(x | z) at one draw of q(z | x)."
        return _points([(made, f"{what}s of p(x | z)")], x, "Reconstructions", caption, joined=True)
    order = np.argsort(-log_p, kind="stable")
    count = min(8, len(order))
    middle = (len(order) - count) // 2
    picks = (("best", order[:count]), ("median", order[middle : middle + count]), ("worst", order[-count:]))
    parts = [Rebuilt(name, x[i], made[i], log_p[i]) for name, i in picks[: 3 if len(order) >= 3 * count else 1]]
    parts = parts if len(parts) > 1 else [replace(parts[0], title="Reconstructions")]
    with style():
        sheet = _rebuilt_images(parts, float(data.min()), float(data.max()), what)
        _caption(sheet, f"Above the datum, below the {what} of p(x | z) at one draw of q(z | x); log p(x | z), nats.")
    return sheet


def traversed(found: Traversal, data: Array) -> Figure | None:
    """A row of pictures for every coordinate, or its path before the data; None for data of other shapes."""
    x, values = numpy_of(found.x).astype(np.float64), numpy_of(found.values)
    if not is_shown(x.shape[2:]):
        return None
    name = plain(found.latent)[:SHORT]
    names = [f"{name}[{d}]" for d in found.dims] if values.shape[0] > 1 or found.dims[0] else [name]
    title = f"Traversal of {name}"
    by = f", ordered by {found.order}" if len(names) > 1 else ""
    if x.ndim == 3:
        caption = f"Paths of the mean of p(x | z) as one coordinate moves, the others held{by}; a dot where each ends."
        return _points([(path, label) for path, label in zip(x, names, strict=True)], data, title, caption, paths=True)
    same = bool((values == values[:1]).all())
    caption = f"Means of p(x | z); in each row one coordinate moves, the others are held{by}."
    caption += " Below: its value." if same else " Below: its value in the first row; each moves as far as its prior."
    columns = [f"{v:.3g}".replace("-", "−") for v in values[0]]
    return _sheet(x.reshape(-1, *x.shape[2:]), x.shape[1], data, title, caption, names, columns)


def encoded(
    found: Encoding, prior: Samples, labels: NDArray[Any] | None = None, names: Sequence[str] | None = None
) -> dict[str, Figure]:
    """The plane of every real latent of at least two rows: draws of q_agg against draws of the prior; by name."""
    planes = {}
    for name, code in found.latents.items():
        if code.probs is None and name in prior.latents and len(code.value) > 1:
            flat = [numpy_of(t.double().reshape(len(t), -1)) for t in (code.value, prior.latents[name])]
            means = flat[0] if code.loc is None else numpy_of(code.loc.double().reshape(len(code.loc), -1))
            planes[name] = plane(Cloud(name, means, flat[0], flat[1]), labels, names)
    return planes


def _sheet(
    images: Array,
    columns: int,
    data: Array,
    title: str,
    caption: str,
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
) -> Figure:
    """Pictures in a grid, on the scale of grey of the data; names of rows at the left, of columns below."""
    h, w = images.shape[-2:]
    gap, rows = max(1, round(w / 10)), math.ceil(len(images) / columns)
    size = min(PICTURE, 0.9 * WIDTH / columns)
    with style():
        made = figure(rows * size * h / w * 1.08 + 0.75)
        axes = made.subplots()
        axes.imshow(tiles(images, columns, float(data.min()), float(data.max())), aspect="equal")
        axes.set_xticks([i * (w + gap) + w / 2 - 0.5 for i in range(len(column_names))], column_names)
        axes.set_yticks([i * (h + gap) + h / 2 - 0.5 for i in range(len(row_names))], row_names)
        axes.tick_params(length=0, labelsize=9)
        axes.spines[:].set_visible(False)
        axes.set_title(title)
        _caption(made, caption)
    return made


def _points(
    groups_of: Sequence[tuple[Array, str]],
    data: Array,
    title: str,
    caption: str,
    *,
    joined: bool = False,
    paths: bool = False,
) -> Figure:
    """Points of the plane before the data: as they are, joined each to its datum, or as paths."""
    with style():
        made = figure(5.4)
        axes = made.subplots()
        size = float(np.clip(9000 / max(map(len, (data, groups_of[0][0]))), 4, 16))
        axes.scatter(data[:, 0], data[:, 1], s=size, color=PALE if not joined else GREY, linewidths=0, label="data")
        for i, (x, label) in enumerate(groups_of):
            if joined:
                axes.plot(
                    np.stack([data[:, 0], x[:, 0]]), np.stack([data[:, 1], x[:, 1]]), color=PALE, lw=0.8, zorder=0
                )
            if paths:
                colour, dash = SERIES[i % len(SERIES)], ("-", "--")[i // len(SERIES) % 2]
                axes.plot(x[:, 0], x[:, 1], color=colour, linestyle=dash, label=label)
                axes.plot(x[-1:, 0], x[-1:, 1], "o", color=colour, markersize=5)
            else:
                axes.scatter(x[:, 0], x[:, 1], s=1.5 * size, color=RED, alpha=0.7, linewidths=0, label=label)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_title(title)
        axes.set_xlabel("x[0]")
        axes.set_ylabel("x[1]")
        made.legend(loc="outside upper right", ncols=min(6, 1 + len(groups_of)), columnspacing=1.0)
        made.set_layout_engine("constrained", w_pad=0.1)
        _caption(made, caption)
    return made


def _caption(made: Figure, text: str) -> None:
    made.supxlabel("\n".join(textwrap.wrap(text, CAPTION)), x=0.02, ha="left", fontsize=8.5, color="#444444")


# ---------------------------------------------------------------------- runs on one plane

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LABEL = 36
"""Characters of a label."""
REACHES = (9, 20, 34, 52, 74, 100, 140, 190)
"""How far from its point a label may stand, points of 1/72 inch; beyond the second a line leads to it."""
TURNS = tuple(math.radians(angle) for angle in (0, 180, 90, 270, 35, 145, 325, 215, 65, 115, 295, 245))
"""In which direction, the first that is free."""


def rate_distortion(
    names: Sequence[str], rates: Sequence[float], distortions: Sequence[float], errors: Sequence[tuple[float, float]]
) -> Figure:
    """Runs on the plane of rate and distortion, with lines of equal ELBO; labels stand clear of each other.

    Arguments:
        names: of the runs.
        rates: nats per datum.
        distortions: nats per datum.
        errors: standard errors of both; what is not finite is not drawn.
    """
    points = np.column_stack([rates, distortions]).astype(np.float64)
    spread = np.nan_to_num(np.asarray(errors, dtype=np.float64), posinf=0.0).reshape(-1, 2)
    with style():
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
        _caption(made, "Dashed: equal ELBO = −(rate + distortion). Towards the lower left the ELBO is higher.")
        made.draw_without_rendering()
        made.set_layout_engine("none")
        taken = _equal_elbo(made, axes)
        ends = axes.transData.transform(np.concatenate([points - spread, points + spread])).reshape(2, -1, 2)
        for (x, y), (x0, y0), (x1, y1) in zip(axes.transData.transform(points), *ends, strict=True):
            taken += [Bbox.from_extents(x0, y - 2, x1, y + 2), Bbox.from_extents(x - 2, y0, x + 2, y1)]
        _label_points(made, axes, [_shortened(plain(name)) for name in names], points, taken)
    return made


def _equal_elbo(made: Figure, axes: Axes) -> list[Bbox]:
    """Dashed lines rate + distortion = -ELBO with their ELBO at the edge; returns where those stand."""
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


def _shortened(name: str) -> str:
    """A long name without its middle."""
    return name if len(name) <= LABEL else f"{name[: LABEL // 2]}…{name[-LABEL // 2 + 1 :]}"


def _label_points(made: Figure, axes: Axes, names: Sequence[str], points: Array, taken: list[Bbox]) -> None:
    """A label for every point at the first place that is free: of other labels and points, and inside the frame."""
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
    """A box of some size whose near edge lies in a direction from a point."""
    cos, sin = math.cos(turn), math.sin(turn)
    middle = place + np.array([cos * (reach + width / 2), sin * (reach + height / 2)])
    return Bbox.from_bounds(middle[0] - width / 2, middle[1] - height / 2, width, height)


def _inside(box: Bbox, frame: Bbox) -> bool:
    return frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
