"""Plots over epochs of training, and of importance sampling: its bound over the number of samples, and k-hat."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pvae.analysis.bounds.weights import Bounds
from pvae.analysis.pages.plots import base
from pvae.analysis.pages.plots.base import BLUE, GREEN, GREY, RED, SERIES, nats, panels, plain, style, whole_numbers
from pvae.analysis.population.interval import Population

MetricsRow = Mapping[str, Any]
"""Type of the training metrics of one epoch and one split, by name."""

JOINT = {"elbo": "log_joint", "log_joint": "elbo"}
"""The other name of a metric: the total of a pair with points was named an ELBO by earlier versions."""

# ---------------------------------------------------------------------- over epochs


def series(rows: Sequence[MetricsRow], split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return epochs and values, both `(m,)`, of one metric of one split; values that are not finite are left out.

    Where the guide sets a latent to a point, `elbo` is the log joint, as earlier versions named it.
    """
    mine = [row for row in rows if row.get("split") == split]
    found: list[tuple[Any, Any]] = [(row.get("epoch"), row.get(key, row.get(JOINT.get(key, key)))) for row in mine]
    pairs = [pair for pair in found if all(type(v) in (int, float) and math.isfinite(v) for v in pair)]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def curve(axes: Axes, rows: Sequence[MetricsRow], split: str, key: str, **look: Any) -> tuple[np.ndarray, np.ndarray]:
    """Plot one metric of one split over epochs, with circles for fewer than 10 points; return epochs and values."""
    epochs, values = series(rows, split, key)
    axes.plot(epochs, values, marker="o" if len(epochs) < 10 else None, markersize=4, **look)
    return epochs, values


def over_epochs(grid: Sequence[Axes], *, widened: bool = False) -> None:
    """Label the epochs below the lowest panel, and draw lines of equal value; `widened` is for a single epoch."""
    for axes in grid:
        axes.grid(axis="y")
        if widened:
            axes.margins(x=0.5)
    grid[-1].set_xlabel("epoch")
    whole_numbers(grid[-1].xaxis)


@style()
def training(rows: Sequence[MetricsRow], latents: Sequence[str], figure: str = "elbo", total: str = "ELBO") -> Figure:
    """Plot the ELBO of train and validation, the validation `figure` that ranks weights, KLs and beta over epochs.

    `total` names reconstruction - KL: "ELBO", or "log joint".
    """
    made, grid = panels(6.6, (3, 2, 1), sharex=True)
    top, middle, bottom = grid
    _elbo_curves(top, rows, figure, total)
    for i, name in enumerate(latents):
        colour = SERIES[i % len(SERIES)]
        middle.plot(*series(rows, "train", f"kl/{name}"), color=colour, label=plain(name))
        middle.plot(*series(rows, "validation", f"kl/{name}"), color=colour, linestyle="--")
    middle.set(title="KL of every latent (dashed: validation)", ylabel="nats", ylim=(0, None))
    if latents:
        middle.legend(loc="best")
    epochs, beta = series(rows, "train", "beta")
    bottom.plot(epochs, beta, color=GREY)
    highest = max(1.0, float(beta.max(initial=0.0)))
    bottom.set(title="beta, the weight of the KL in the loss", ylim=(-0.05, highest * 1.05))
    over_epochs(grid, widened=len(epochs) == 1)
    return made


def _elbo_curves(axes: Axes, rows: Sequence[MetricsRow], figure: str, total: str) -> None:
    train = curve(axes, rows, "train", "elbo", color=BLUE, label="train")
    epochs, values = curve(axes, rows, "validation", "elbo", color=RED, linestyle="--", label="validation")
    shown, title, colour = [train, (epochs, values)], total, RED
    if figure not in JOINT and len(series(rows, "validation", figure)[0]):
        epochs, values = curve(axes, rows, "validation", figure, color=GREEN, linestyle="--", label=figure)
        shown, title, colour = [*shown, (epochs, values)], f"{total} and {figure}", GREEN
    if len(values):
        best = int(values.argmax())
        look: dict[str, Any] = {"color": colour, "markersize": 7, "markerfacecolor": "white", "markeredgewidth": 2}
        axes.plot(epochs[best], values[best], "o", **look)
        title = f"{title} (circle: best of validation, {nats(values[best])})"
    robust_limits(axes, shown)
    axes.set(title=title, ylabel="nats per datum")
    axes.legend(loc="lower right")


def robust_limits(axes: Axes, curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Set the y limits from the last 90 % of epochs, as the first epochs can be lower by orders of magnitude."""
    last = max((float(epochs[-1]) for epochs, _ in curves if len(epochs)), default=0.0)
    late = [values[epochs > 0.1 * last] for epochs, values in curves if len(values)]
    if last < 10 or not late:
        return
    shown, whole = np.concatenate(late), np.concatenate([values for _, values in curves])
    low, high = float(shown.min()), float(whole.max())
    margin = 0.08 * max(high - low, 1e-6)
    axes.set_ylim(low - margin, high + margin)


@style()
def history(rows: Sequence[MetricsRow]) -> Figure:
    """Plot I_q[x, z] and marginal KL over epochs, with log n, the upper limit of I_q[x, z]; nats."""
    made, (axes,) = panels(3.2, title="Where the KL goes", ylabel="nats")
    curve(axes, rows, "analysis", "mutual_information", color=SERIES[0], label="mutual information I_q[x, z]")
    curve(axes, rows, "analysis", "marginal_kl", color=SERIES[1], label="marginal KL(q_agg || p)")
    axes.plot(*series(rows, "analysis", "log_n"), color=GREY, linestyle=":", label="log n, the most I can be")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    over_epochs([axes])
    axes.legend(loc="best")
    return made


@style()
def duel(rows: Sequence[MetricsRow]) -> Figure:
    """Plot the losses of critic and generator, and the nearest-neighbour two-sample accuracy, over epochs of a GAN."""
    made, grid = panels(4.8, (3, 2), sharex=True)
    top, bottom = grid
    for player, colour in (("critic", BLUE), ("generator", RED)):
        curve(top, rows, "train", f"{player}_loss", color=colour, label=player)
        top.plot(*series(rows, "validation", f"{player}_loss"), color=colour, linestyle="--")
    top.axhline(math.log(4), color=GREY, linestyle=":", label="log 4, of a critic that knows nothing")
    top.set(title="Losses (dashed: validation)", ylabel="nats")
    top.legend(loc="best")
    epochs, _ = curve(bottom, rows, "validation", "two_sample", color=GREEN)
    bottom.axhline(0.5, color=GREY, linestyle=":")
    bottom.set(title="Nearest neighbour of the same kind (one half: alike)", ylim=(0.0, 1.05))
    over_epochs(grid, widened=len(epochs) == 1)
    return made


@style()
def law_in_n(found: Population) -> Figure:
    """Plot the mutual information of n rows and their codes, with and without the own posterior, over n; nats."""
    made, (axes,) = panels(4.2, xscale="log", xlabel="rows n", ylabel="nats per datum")
    n = np.array([size.n for size in found.sizes], dtype=np.float64)
    top = max(2 * math.log(n[-1]), found.information_upper.value) * 1.1
    if found.information is not None:
        low, high = found.information, found.information_upper
        band = low.value - 2 * low.standard_error, high.value + 2 * high.standard_error
        axes.axhspan(*band, color=base.PALE, alpha=0.5, linewidth=0, label="new data, between the bounds")
    named = ("information", "I_n, own posterior counted", BLUE), ("leave_one_out", "leave-one-out", RED)
    for name, label, colour in named:
        known = [(s.n, e) for s in found.sizes if (e := getattr(s, name)) is not None and abs(e.value) < 2 * top]
        values, errors = [e.value for _, e in known], [2 * e.standard_error for _, e in known]
        if values and min(values) > top:
            label += f" (above, {nats(values[-1], 1)} at n = {known[-1][0]})"
        axes.errorbar([m for m, _ in known], values, errors, color=colour, marker="o", markersize=4, label=label)
    axes.plot(n, np.log(n), color=GREY, linestyle=":", label="log n, the most I_n can be")
    axes.plot(n, 2 * np.log(n), color=GREY, linestyle="--", label="2 log n, the most any bound can see")
    axes.set(title="Information of the codes about their rows", ylim=(min(0.0, axes.get_ylim()[0]), top))
    axes.set_xticks(n, [f"{m:.0f}" for m in n])
    axes.minorticks_off()
    axes.grid(axis="y")
    made.legend(loc="outside lower center", ncol=2)
    return made


# ---------------------------------------------------------------------- importance sampling


@style()
def importance(found: Bounds) -> Figure:
    """Plot the bound on log p(x) over the number of importance samples, with a band of ± 2 standard errors."""
    counts = np.array([k for k, _ in found.curve], dtype=np.float64)
    values = np.array([e.value for _, e in found.curve])
    errors = np.nan_to_num(np.array([e.standard_error for _, e in found.curve]), posinf=0.0)
    made, (axes,) = panels(3.2, title="lower bound on log p(x)", xscale="log", ylabel="nats per datum")
    axes.set_xlabel("importance samples per datum")
    axes.fill_between(counts, values - 2 * errors, values + 2 * errors, color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(counts, values, color=BLUE, marker="o", markersize=4)
    axes.axhline(values[0], color=GREY, linestyle=":", label="one sample: the ELBO")
    ticks = [k for k in (1, 10, 100, 1000, 10_000, 100_000) if k <= counts[-1]]
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.legend(loc="center right")
    return made


@style()
def khats(khat: np.ndarray, limit: float) -> Figure:
    """Plot a histogram of k-hat over the data `(n,)`, with `limit`, above which importance sampling is not reliable."""
    known = khat[np.isfinite(khat)]
    edges = np.linspace(min(float(known.min()), 0.0), max(float(known.max()), 1.0), 41)
    what = "k-hat, Pareto shape of a datum's largest weights"
    made, (axes,) = panels(2.8, ylabel="data", axisbelow=True, xlabel=what)
    for part, colour, label in ((known <= limit, BLUE, "reliable"), (known > limit, RED, "not reliable")):
        counts, _ = np.histogram(known[part], edges)
        axes.stairs(counts, edges, fill=True, color=colour, label=f"{label}: {part.sum()} of {len(known)}")
    axes.axvline(limit, color="black", linestyle="--", linewidth=1.2)
    axes.set_title(f"k-hat of the importance weights (dashed: {limit:.2f})")
    axes.grid(axis="y")
    axes.legend(loc="best")
    return made
