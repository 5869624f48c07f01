"""Common style, size and text of all plots, and their export as PNG."""

import base64
import html
import io
import math
import textwrap
import unicodedata
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
from matplotlib import rc_context, rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

Names = Sequence[str]
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

style = partial(rc_context, rc_params_from_file(Path(__file__).with_name("pages.mplstyle"), use_default_template=False))
"""Context manager and decorator: apply the settings of pages.mplstyle, and restore those of the user afterwards."""


def array(t: Tensor) -> np.ndarray:
    """Return a tensor as a NumPy array of float64, as plots take it."""
    return np.asarray(t.detach().double().cpu().numpy())


def panels(height: float, ratios: Sequence[float] = (1,), columns: int = 1, **look: Any) -> tuple[Figure, list[Axes]]:
    """Return a figure of `height` inches and its panels, row by row; `ratios` are those of the heights of the rows.

    Each panel has the properties `look`, such as title and xlabel; `sharex` and `sharey` join the axes of all panels.
    """
    made = Figure(figsize=(FIGURE_WIDTH, height), layout="constrained")
    FigureCanvasAgg(made)
    shared = {key: look.pop(key, False) for key in ("sharex", "sharey")}
    grid = made.subplots(len(ratios), columns, squeeze=False, height_ratios=ratios, subplot_kw=look, **shared)
    return made, list(grid.ravel())


@style()
def png(made: Figure) -> bytes:
    """Return a figure as PNG bytes at 120 dpi; the same figure gives the same bytes."""
    canvas, buffer = FigureCanvasAgg(made), io.BytesIO()
    canvas.draw()  # once: `savefig` draws a first time to lay the figure out, and this does both
    Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").save(buffer, "png")
    return buffer.getvalue()


def pictured(made: Any, alt: str) -> str:
    """Return a figure as an image in HTML, for notebooks; empty for None."""
    if made is None:
        return ""
    source = base64.b64encode(png(made)).decode()
    return f'<img src="data:image/png;base64,{source}" alt="{html.escape(alt)}" style="max-width: 100%">'


def plain(text: object) -> str:
    """Return a name for display, at most `TEXT` characters, with U+FFFD for controls and characters the font lacks."""
    known = get_font(findfont("DejaVu Sans")).get_charmap()
    hidden = {c for c in str(text) if unicodedata.category(c) in ("Cc", "Cf", "Cs") or ord(c) not in known}
    shown = "".join("\N{REPLACEMENT CHARACTER}" if c in hidden else c for c in str(text))
    return shown if len(shown) <= TEXT else shown[: TEXT - 1] + "…"


def nats(value: SupportsFloat, digits: int = 2) -> str:
    """Return a number, or an estimate, with `digits` decimal places and a typographic minus sign, which zero has not.

    It is a dash for NaN and infinities.
    """
    number = float(value)
    return f"{round(number, digits) + 0.0:.{digits}f}".replace("-", "−") if math.isfinite(number) else "–"


def set_caption(made: Figure, text: str) -> None:
    """Add a caption, wrapped to lines, below a figure that is saved without a page."""
    made.supxlabel("\n".join(textwrap.wrap(text, CAPTION_LINE)), x=0.02, ha="left", fontsize=8.5, color="#444444")


def note(axes: Axes, text: str, at: Sequence[float], offset: Sequence[float], halo: float, **look: Any) -> Annotation:
    """Write a text, with a white halo of a width, at a point and an offset from it; both in 1/72 inch."""
    look["path_effects"] = [withStroke(linewidth=halo, foreground="white")]
    return axes.annotate(text, (at[0], at[1]), xytext=(offset[0], offset[1]), textcoords="offset points", **look)


def whole_numbers(axis: Axis) -> None:
    """Place the ticks of an axis at integers."""
    axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
