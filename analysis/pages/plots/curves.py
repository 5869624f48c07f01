"""Plots of training metrics over epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pvae.analysis.pages.plots.base import (
    BLUE,
    GREEN,
    GREY,
    RED,
    SERIES,
    MetricsRow,
    few_marks,
    figure,
    nats,
    plain,
    style,
    whole_numbers,
)
from pvae.util.types import Array


def series(rows: Sequence[MetricsRow], split: str, key: str) -> tuple[Array, Array]:
    """Return epochs and values, both `(m,)`, of one metric of one split; values that are not finite are left out."""
    pairs = [
        (float(row["epoch"]), float(row[key]))
        for row in rows
        if row.get("split") == split and all(_is_number(row.get(name)) for name in ("epoch", key))
    ]
    table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@style()
def training(rows: Sequence[MetricsRow], latents: Sequence[str]) -> Figure:
    """Plot the ELBO of train and validation, the KL of every latent, and beta over epochs."""
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
    whole_numbers(bottom.xaxis)
    for axes in (top, middle, bottom):
        axes.grid(axis="y")
        if len(epochs) == 1:
            axes.margins(x=0.5)
    return made


@style()
def history(rows: Sequence[MetricsRow]) -> Figure:
    """Plot I_q[x, z] and marginal KL over epochs, with log n, the upper limit of I_q[x, z]; nats."""
    made = figure(3.2)
    axes = made.subplots()
    for (key, label), colour in zip(HISTORY, SERIES, strict=False):
        epochs, values = series(rows, "analysis", key)
        axes.plot(epochs, values, color=colour, label=label, marker=few_marks(epochs), markersize=4)
    epochs, ceiling = series(rows, "analysis", "log_n")
    axes.plot(epochs, ceiling, color=GREY, linestyle=":", label="log n, the most I can be")
    axes.set_title("Where the KL goes")
    axes.set_ylabel("nats")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.set_xlabel("epoch")
    whole_numbers(axes.xaxis)
    axes.grid(axis="y")
    axes.legend(loc="best")
    return made


HISTORY = (("mutual_information", "mutual information I_q[x, z]"), ("marginal_kl", "marginal KL(q_agg || p)"))


@style()
def duel(rows: Sequence[MetricsRow]) -> Figure:
    """Plot the losses of critic and generator, and the nearest-neighbour two-sample accuracy, over epochs of a GAN."""
    made = figure(4.8)
    top, bottom = made.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for key, label, colour in (("critic_loss", "critic", BLUE), ("generator_loss", "generator", RED)):
        epochs, values = series(rows, "train", key)
        mark = few_marks(epochs)
        top.plot(epochs, values, color=colour, label=label, marker=mark, markersize=4)
        top.plot(*series(rows, "validation", key), color=colour, linestyle="--")
    top.axhline(math.log(4), color=GREY, linestyle=":", label="log 4, of a critic that knows nothing")
    top.set_title("Losses (dashed: validation)")
    top.set_ylabel("nats")
    top.legend(loc="best")
    epochs, values = series(rows, "validation", "two_sample")
    bottom.plot(epochs, values, color=GREEN, marker=few_marks(epochs), markersize=4)
    bottom.axhline(0.5, color=GREY, linestyle=":")
    bottom.set_title("Nearest neighbour of the same kind (one half: alike)")
    bottom.set_ylim(0.0, 1.05)
    bottom.set_xlabel("epoch")
    whole_numbers(bottom.xaxis)
    for axes in (top, bottom):
        axes.grid(axis="y")
        if len(epochs) == 1:
            axes.margins(x=0.5)
    return made


def _elbo_curves(axes: Axes, rows: Sequence[MetricsRow]) -> None:
    seen = []
    for split, colour, dash in (("train", BLUE, "-"), ("validation", RED, "--")):
        epochs, values = series(rows, split, "elbo")
        mark = few_marks(epochs)
        axes.plot(epochs, values, color=colour, linestyle=dash, label=split, marker=mark, markersize=4)
        seen.append((epochs, values))
    epochs, values = seen[1]
    if len(values):
        best = int(values.argmax())
        axes.plot(epochs[best], values[best], "o", color=RED, markersize=7, markerfacecolor="white", markeredgewidth=2)
        axes.set_title(f"ELBO (circle: best of validation, {nats(values[best])})")
    else:
        axes.set_title("ELBO")
    robust_limits(axes, seen)
    axes.set_ylabel("nats per datum")
    axes.legend(loc="lower right")


def robust_limits(axes: Axes, curves: Sequence[tuple[Array, Array]]) -> None:
    """Set the y limits from the last 90 % of epochs, as the first epochs can be lower by orders of magnitude."""
    last = max((float(epochs[-1]) for epochs, _ in curves if len(epochs)), default=0.0)
    late = [values[epochs > 0.1 * last] for epochs, values in curves if len(values)]
    if last < 10 or not late:
        return
    shown, whole = np.concatenate(late), np.concatenate([values for _, values in curves])
    low, high = float(shown.min()), float(whole.max())
    margin = 0.08 * max(high - low, 1e-6)
    axes.set_ylim(low - margin, high + margin)
