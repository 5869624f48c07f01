"""Waterfall chart of the terms of an ELBO."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from pvae.analysis.bounds.lower_bounds import Evidence
from pvae.analysis.decompose.result import Surgery
from pvae.analysis.pages.plots import base
from pvae.analysis.pages.plots.base import BLACK, BLUE, GREY, ORANGE, RED, SERIES, YELLOW, nats, panels, plain, style
from pvae.analysis.population.result import Population


@dataclass(frozen=True)
class WaterfallStep:
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


def inference_steps(surgery: Surgery, evidence: Evidence | None) -> list[WaterfallStep]:
    """Return the steps from the bound on log p(x) down to the ELBO; empty without a gain from importance sampling."""
    if evidence is None or not math.isfinite(evidence.gap) or evidence.gap < 1e-6:
        return []
    elbo = surgery.total.value
    return [
        WaterfallStep("log p(x), from below", elbo + evidence.gap, True),
        WaterfallStep("− KL(q(z | x) || p(z | x))", evidence.gap, colour=RED),
        WaterfallStep(surgery.total_name, elbo, True),
    ]


def waterfall_steps(surgery: Surgery, above: Sequence[WaterfallStep] = ()) -> list[list[WaterfallStep]]:
    """Return the panels of a waterfall from reconstruction to ELBO: by term, and by latent if there are several.

    The steps `above`, if any, form the first panel.
    """
    start = WaterfallStep("reconstruction", surgery.reconstruction.value, True)
    end = WaterfallStep(surgery.total_name, surgery.total.value, True)
    by_term = _by_term(surgery)
    by_latent = [
        WaterfallStep(f"− KL of {name}", z.kl.value, colour=SERIES[i % len(SERIES)])
        for i, (name, z) in enumerate(surgery.latents.items())
    ]
    if not by_term:
        by_term, by_latent = by_latent, []
    new = [_new_data(surgery.population)] if surgery.population else []
    charts = [[start, *by_term, end, *new], *([[start, *by_latent, end]] if len(by_latent) > 1 else [])]
    return [list(above), *charts] if above else charts


def _new_data(found: Population) -> WaterfallStep:
    low, high = found.ends
    return WaterfallStep("+ a better prior, new data", low, colour=base.GREEN, until=math.nan if high is None else high)


def _by_term(surgery: Surgery) -> list[WaterfallStep]:
    """Return the costs I_q[x, z] and marginal KL, the latter split if possible; empty if they are not known.

    The parts of the marginal KL are total correlation and the KL of single coordinates.
    """
    information, marginal = surgery.mutual_information, surgery.marginal_kl
    if information is None or marginal is None:
        return []
    steps = [WaterfallStep("− I_q[x, z]", information.value, colour=BLUE)]
    parts = [z.dimensions for z in surgery.latents.values()]
    if len(parts) == 1 and parts[0] is not None and (apart := parts[0].coordinate_kl) is not None:
        steps.append(WaterfallStep("− total correlation", marginal.value - apart.value, colour=ORANGE))
        return [*steps, WaterfallStep("− KL of coordinates", apart.value, colour=YELLOW)]
    return [*steps, WaterfallStep("− marginal KL", marginal.value, colour=ORANGE)]


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
            axes.plot([position] * 2, [i - 0.38, i + 0.38], color=BLACK, linewidth=3, solid_capstyle="butt")
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
    axes.set_ylim(len(steps) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    return levels


def _note(axes: Axes, x: float, y: float, text: str, toward: int) -> None:
    axes.annotate(
        text, (x, y), xytext=(6 * toward, 0), textcoords="offset points", va="center", fontsize=10, fontweight="bold",
        ha="left" if toward > 0 else "right", path_effects=[withStroke(linewidth=3, foreground="white")],
    )  # fmt: skip
