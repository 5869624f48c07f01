"""Common style, size and text of all plots, and their export as PNG."""

from __future__ import annotations

import io
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MaxNLocator
from PIL import Image

DPI = 120
FIGURE_WIDTH = 6.0
"""Width of a plot in inches: 720 pixels, so that text is legible on a phone."""
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
"""Colour palette of Okabe and Ito, which readers with colour vision deficiency can distinguish."""
GREY, PALE = "#767676", "#C8C8C8"
SERIES = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK)
CLASS_COLOURS = (BLUE, ORANGE, GREEN, RED, SKY, PURPLE, BLACK, YELLOW, "#8A8A8A", "#7A4A1E")
CAPTION_LINE = 96
"""Largest number of characters of a line of a caption."""
TEXT, SHORT = 60, 16
"""Largest numbers of characters of a name in a plot, and of the name of a class or latent."""

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
    """Apply the matplotlib settings `STYLE` and restore those of the user afterwards; context manager and decorator."""
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        yield


def figure(height: float) -> Figure:
    """Return an empty figure of width `FIGURE_WIDTH`, with `height` in inches."""
    made = Figure(figsize=(FIGURE_WIDTH, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def panels(height: float, ratios: Sequence[float] = (1,), **options: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure of `height` inches and its panels, one below the other, whose heights have these ratios."""
    made = figure(height)
    return made, list(made.subplots(len(ratios), squeeze=False, height_ratios=ratios, **options)[:, 0])


@style()
def png(made: Figure) -> bytes:
    """Return a figure as PNG bytes at 120 dpi; the same figure gives the same bytes."""
    canvas, buffer = FigureCanvasAgg(made), io.BytesIO()
    canvas.draw()  # once: `savefig` draws a first time to lay the figure out, and this does both
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(buffer, "png", optimize=True)
    return buffer.getvalue()


def plain(text: object) -> str:
    """Return a name for display, at most `TEXT` characters, with U+FFFD for controls and characters the font lacks."""
    known = get_font(findfont("DejaVu Sans")).get_charmap()
    shown = "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cf", "Cs") or ord(c) not in known else c
        for c in str(text)
    )
    return shown if len(shown) <= TEXT else shown[: TEXT - 1] + "…"


def nats(value: float, digits: int = 2) -> str:
    """Return a number with `digits` decimal places and a typographic minus sign, which zero does not get."""
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def set_caption(made: Figure, text: str) -> None:
    """Add a caption, wrapped to lines, below a figure that is saved without a page."""
    made.supxlabel("\n".join(textwrap.wrap(text, CAPTION_LINE)), x=0.02, ha="left", fontsize=8.5, color="#444444")


def whole_numbers(axis: Axis) -> None:
    """Place the ticks of an axis at integers."""
    axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
