"""Bars: use of coordinates and codes of latents, maps of codes, calibration of the guide, waterfall of an ELBO."""

import math
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import binom

from pvae.analysis.bounds import calibration, weights
from pvae.analysis.bounds.ranks import LEVEL, RankTest
from pvae.analysis.decompose import collapse, result
from pvae.analysis.pages.plots import base, pictures
from pvae.analysis.pages.plots.base import BLUE, GREY, RED, nats, panels, plain, style, whole_numbers
from pvae.pair.code_usage import SILENT
from pvae.util import Record

USE = ("active", "inactive")
BARS, HISTOGRAMS = 10, 5
"""Largest numbers of bars of a histogram, and of histograms."""


def _bars(axes: Axes, heights: np.ndarray, active: np.ndarray, bottom: float = 0.0, among: Sequence[str] = USE) -> None:
    """Draw bars of heights `(n,)`: filled if active, hatched otherwise; `among` names the two kinds in the legend."""
    place, width = np.arange(1, len(heights) + 1), 0.82 if len(heights) <= 100 else 1.0
    empty: dict[str, Any] = {"color": "white", "edgecolor": GREY, "hatch": "////" if len(heights) <= 100 else None}
    for chosen, label, look in zip((active, ~active), among, ({"color": BLUE, "hatch": None}, empty), strict=True):
        if chosen.any():
            axes.bar(place[chosen], heights[chosen] - bottom, width, bottom=bottom, label=label, **look)
    if not active.all() and not bottom:
        axes.legend(loc="upper right", ncols=2)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


@style()
def units(name: str, latent: collapse.LatentCollapse) -> Figure:
    """Plot the KL of each coordinate, largest first, and the variance of its posterior mean with its limit."""
    kl = None if latent.kl_per_dimension is None else np.array(latent.kl_per_dimension)
    variance = None if latent.activity is None else np.array(latent.activity)
    shown = [values for values in (kl, variance) if values is not None]
    order = np.argsort(-shown[0], kind="stable")
    active = variance[order] > SILENT.variance if variance is not None else np.ones(len(order), bool)
    made, grid = panels(2.1 * len(shown) + 0.5, [1] * len(shown), sharex=True)
    last = grid[-1]
    if kl is not None:
        _bars(grid[0], kl[order], active)
        grid[0].set(title=f"{plain(name)}: KL per coordinate, largest first", ylabel="nats")
    if variance is not None:
        floor = 1e-5
        last.set_yscale("log")
        _bars(last, np.maximum(variance[order], floor), active, bottom=floor / 2)
        last.axhline(SILENT.variance, color=RED, linestyle="--", linewidth=1.5)
        title = f"Variance of its posterior mean (active above {SILENT.variance}, dashed)"
        last.set(ylim=(floor / 2, max(3.0, float(variance.max()) * 2)), title=title)
        last.set_yticks([1e-4, 1e-2, 1.0], ["0.0001", "0.01", "1"])
        last.minorticks_off()
    last.set(xlabel=f"rank of the coordinate (1 to {latent.dim})", xlim=(0.3, max(latent.dim, 6) + 0.7))
    whole_numbers(last.xaxis)
    if latent.dim <= 10:
        last.set_xticks(range(1, latent.dim + 1))
    return made


@style()
def code_use(name: str, use: collapse.CodeUse) -> Figure:
    """Draw the proportion of each code, most used first, above the perplexity of each position of a discrete latent."""
    perplexity, mapped = np.array(use.perplexity), len(use.grid) == 2
    several = len(perplexity) > 1 or use.share is None
    count = (use.share is not None) + several
    made, grid = panels(2.1 * count + 0.5 + 1.2 * mapped, [1.0] * (count - 1) + [2.0 if mapped else 1.0])
    if use.share is not None:
        share = np.array(use.share)
        _bars(grid[0], share, np.arange(len(share)) < (use.used or 0), among=("in use", "dead"))
        grid[0].set_title(f"{plain(name)}: share of each code, most used first")
        grid[0].set(xlabel=f"rank of the code (1 to {len(share)})", xlim=(0.3, max(len(share), 6) + 0.7))
    if several:
        axes = grid[-1]
        axes.set_title(f"{plain(name)}: perplexity of each position, of at most {use.states}")
        if mapped:
            axes.imshow(perplexity.reshape(use.grid), cmap="viridis", vmin=1, vmax=max(float(perplexity.max()), 1.01))
            made.colorbar(axes.images[0], ax=axes)
            axes.set(anchor="W", xlabel="column", ylabel="row")
            axes.locator_params(integer=True)
        else:
            _bars(axes, perplexity, np.ones(len(perplexity), bool))
            axes.set(ylim=(0, max(use.states, 1)), xlabel=f"position (1 to {len(perplexity)})")
            whole_numbers(axes.xaxis)
    return made


@style()
def code_maps(name: str, data: np.ndarray, maps: np.ndarray, states: int, low: float, high: float) -> Figure:
    """Draw images `(n, *shape)` above their grids of codes `(n, H, W)`; colours are ranks of use, most used first."""
    counts, rank = np.bincount(maps.ravel(), minlength=states), np.empty(states, dtype=np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(states)
    made, (axes,) = panels(2 * 0.92 * base.FIGURE_WIDTH / len(data) + 0.75)
    h, w = data.shape[-2:]
    gap = max(1, round(w / 10))
    axes.imshow(pictures.tiles(data, len(data), low, high), aspect="equal")
    for i, codes in enumerate(rank[maps]):
        left, top = i * (w + gap) - 0.5, h + gap - 0.5
        place = (left, left + w, top + h, top)
        shown = axes.imshow(codes, cmap="cividis", vmin=0, vmax=max(1, states - 1), extent=place)
    axes.set(xlim=(-0.5, len(data) * (w + gap) - gap - 0.5), ylim=(2 * h + gap - 0.5, -0.5))
    axes.set_axis_off()
    bar = made.colorbar(shown, ax=axes, location="bottom", aspect=40, pad=0.03, shrink=0.7)
    bar.set_label(f"{plain(name)}: rank of the code, most used (0) first", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return made


# ---------------------------------------------------------------------- calibration of the guide


@style()
def calibrated(found: calibration.Calibration) -> Figure:
    """Plot the ranks of the coordinates that are worst calibrated, and the coverage of regions of all coordinates."""
    shown = found.worst[:HISTOGRAMS]
    made, grid = panels(2.0 * (len(shown) // 3 + 1), [1] * (len(shown) // 3 + 1), columns=3)
    for axes, test in zip(grid, shown, strict=False):
        _ranks(axes, test)
    _coverage(grid[len(shown)], found)
    for axes in grid[len(shown) + 1 :]:
        axes.set_axis_off()
    return made


def _ranks(axes: Axes, test: RankTest) -> None:
    """Draw counts of ranks, relative to those expected, with the band that holds all bars of 95 % of exact ones."""
    ranks, n = len(test.counts), sum(test.counts)
    edges = np.unique(np.linspace(0, ranks, min(ranks, BARS) + 1).round().astype(int))
    share = np.diff(edges) / ranks
    tail = LEVEL / 2 / len(share)
    low, high = (binom.ppf(p, n, share) / (n * share) for p in (tail, 1 - tail))
    axes.stairs(high, edges / ranks, baseline=low, fill=True, color=base.PALE)
    axes.stairs(np.add.reduceat(test.counts, edges[:-1]) / (n * share), edges / ranks, color=BLUE, linewidth=1.5)
    axes.axhline(1.0, color=GREY, linewidth=0.8)
    axes.set(xlim=(0, 1), xticks=[0, 0.5, 1], ylim=(0, None), xlabel="rank")
    axes.set_title(f"{plain(test.name)}\n{test.verdict}", fontsize=9)


def _coverage(axes: Axes, found: calibration.Calibration) -> None:
    """Draw the proportion of true latents in the regions of q over their probability, with its 95 % band."""
    levels = np.linspace(0, 1, 101)
    band = (binom.ppf(p, found.n, levels) / found.n for p in (LEVEL / 2, 1 - LEVEL / 2))
    axes.fill_between(levels, *band, color=base.PALE)
    axes.plot(levels, levels, color=GREY, linewidth=0.8)
    for tests, colour, line, label in ((found.guide, BLUE, "-", "q"), (found.weighted, base.GREEN, "--", "weighted")):
        if tests:
            axes.plot(levels, [tests[-1].within(p).value for p in levels], line, color=colour, label=label)
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1], xlabel="region of q")
    axes.set_title(f"coverage, jointly\n{found.joint.verdict}", fontsize=9)
    axes.legend(loc="upper left")


# ---------------------------------------------------------------------- waterfall of the terms of an ELBO


class WaterfallStep(Record):
    """One line of a waterfall chart: a level (`is_level`), a cost that lowers it, or a range above it; nats per datum.

    A range, of what would be added, goes from `value` to `until`; to NaN where its upper end is not known.
    """

    label: str
    value: float
    is_level: bool = False
    colour: str = GREY
    until: float | None = None

    @property
    def figure(self) -> str:
        """Number of the line as text: the level, the change of the level, or both ends of a range."""
        if self.until is None:
            return nats(self.value if self.is_level else -self.value)
        return f"+{nats(self.value)}" + (" or more" if math.isnan(self.until) else f" to +{nats(self.until)}")


def inference_steps(surgery: result.Surgery, evidence: weights.Evidence | None) -> list[WaterfallStep]:
    """Return the steps from the bound on log p(x) down to the ELBO; empty without a gain from importance sampling."""
    if evidence is None or not math.isfinite(evidence.gap) or evidence.gap < 1e-6:
        return []
    elbo = surgery.total.value
    top = WaterfallStep("log p(x), from below", elbo + evidence.gap, True)
    cost = WaterfallStep("− KL(q(z | x) || p(z | x))", evidence.gap, colour=RED)
    return [top, cost, WaterfallStep(surgery.total_name, elbo, True)]


def waterfall_steps(surgery: result.Surgery, above: Sequence[WaterfallStep] = ()) -> list[list[WaterfallStep]]:
    """Return the panels of a waterfall from reconstruction to ELBO: by term, and by latent if there are several.

    The steps `above`, if any, form the first panel.
    """
    start = WaterfallStep("reconstruction", surgery.reconstruction.value, True)
    end, by_term = WaterfallStep(surgery.total_name, surgery.total.value, True), _by_term(surgery)
    costs = {f"− KL of {name}": z.kl.value for name, z in surgery.latents.items()}
    by_latent = [WaterfallStep(*cost, colour=c) for cost, c in zip(costs.items(), cycle(base.SERIES), strict=False)]
    if not by_term:
        by_term, by_latent = by_latent, []
    new = []
    if surgery.population:
        low, high = surgery.population.ends
        new = [WaterfallStep("+ a better prior, new data", low, False, base.GREEN, math.nan if high is None else high)]
    charts = [[start, *by_term, end, *new], *([[start, *by_latent, end]] if len(by_latent) > 1 else [])]
    return [list(above), *charts] if above else charts


def _by_term(surgery: result.Surgery) -> list[WaterfallStep]:
    """Return the costs I_q[x, z] and marginal KL, the latter split if possible; empty if they are not known.

    The parts of the marginal KL are total correlation and the KL of single coordinates.
    """
    information, marginal = surgery.mutual_information, surgery.marginal_kl
    if information is None or marginal is None:
        return []
    steps = [WaterfallStep("− I_q[x, z]", information.value, colour=BLUE)]
    parts = [z.dimensions for z in surgery.latents.values()]
    if len(parts) == 1 and parts[0] is not None and (apart := parts[0].coordinate_kl) is not None:
        steps.append(WaterfallStep("− total correlation", marginal.value - apart.value, colour=base.ORANGE))
        return [*steps, WaterfallStep("− KL of coordinates", apart.value, colour=base.YELLOW)]
    return [*steps, WaterfallStep("− marginal KL", marginal.value, colour=base.ORANGE)]


@style()
def waterfall(charts: Sequence[Sequence[WaterfallStep]]) -> Figure:
    """Draw a waterfall chart: panels of levels and costs above a common axis in nats per datum."""
    heights = [0.5 * len(steps) + 0.8 for steps in charts]
    made, grid = panels(sum(heights) + 0.2, heights, sharex=True)
    levels = [level for axes, steps in zip(grid, charts, strict=True) for level in _fall(axes, steps)]
    low, high = min(levels), max(max(levels), min(levels) + 1e-3)
    for axes, steps in zip(grid, charts, strict=True):
        axes.set_xlim(low - 0.2 * (high - low), high + 0.06 * (high - low))
        last = [step.label for step in steps if step.is_level][-1]
        axes.set_title(f"from {plain(steps[0].label.split(',')[0])} to the {plain(last)}")
    grid[-1].xaxis.set_major_locator(MaxNLocator(6))
    grid[-1].set_xlabel("nats per datum")
    return made


def _fall(axes: Axes, steps: Sequence[WaterfallStep]) -> list[float]:
    """Draw one panel, levels as ticks and costs as bars from one level down to the next; return the level per step."""
    position, levels = steps[0].value, []
    for i, step in enumerate(steps):
        if step.is_level:
            position = step.value
            axes.plot([position] * 2, [i - 0.38, i + 0.38], color=base.BLACK, linewidth=3, solid_capstyle="butt")
            _note(axes, position, i, step.figure, toward=1 if i else -1)
        elif step.until is not None:
            ends = position + step.value, position + (step.value if math.isnan(step.until) else step.until)
            axes.plot([position, ends[0]], [i, i], color=step.colour, linewidth=1)
            axes.barh(i, ends[1] - ends[0], left=ends[0], height=0.4, color=step.colour, edgecolor=step.colour)
            _note(axes, ends[1], i, step.figure, toward=1)
            levels.append(ends[1])
        else:
            axes.barh(i, -step.value, left=position, height=0.62, color=step.colour)
            _note(axes, min(position, position - step.value), i, step.figure, toward=-1)
            position -= step.value
        levels.append(position)
        if i + 1 < len(steps) and steps[i + 1].until is None:
            axes.plot([position] * 2, [i, i + 1], color=GREY, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_yticks(range(len(steps)), [plain(step.label) for step in steps])
    axes.set(ylim=(len(steps) - 0.4, -0.6), axisbelow=True)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    return levels


def _note(axes: Axes, x: float, y: float, text: str, toward: int) -> None:
    look = {"va": "center", "ha": "left" if toward > 0 else "right", "fontsize": 10, "fontweight": "bold"}
    base.note(axes, text, (x, y), (6 * toward, 0), 3, **look)
