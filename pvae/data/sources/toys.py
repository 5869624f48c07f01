"""Densities in the plane, easy to plot: their samples, and the exact log density where it has a closed form.

Every density is centred, with a deviation of 1 to 2 along each coordinate. ``noise`` is a deviation in the same units.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, final, get_args

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import Field, field_validator
from scipy.special import i0e, logsumexp, ndtr

from pvae.data.rows.prepare import Floats, Scale
from pvae.data.rows.rows import Rows
from pvae.data.sources.base import Data, Seed
from pvae.errors import DeclarationError, near

Draws = tuple[Floats, NDArray[np.int64]]
DensityName = Literal["moons", "rings", "pinwheel", "checkerboard", "eight_gaussians", "spiral"]

COMPASS = ("east", "north-east", "north", "north-west", "west", "south-west", "south", "south-east")
CENTRES = 2 * np.stack([np.cos(np.arange(8) * math.pi / 4), np.sin(np.arange(8) * math.pi / 4)], 1)
RADII = np.array([0.8, 1.6, 2.4])
SIDE = 1.5
SQUARES = SIDE * np.array([(i - 1.5, j - 1.5) for i in range(4) for j in range(4) if (i + j) % 2 == 0])
ARMS, ARM_LENGTH, ARM_SPREAD, SWIRL = 5, 2.0, 0.6, 0.6
SPIRAL_TURN, SPIRAL_RADIUS = 3 * math.pi, 3.0


def moons(rng: Generator, n: int, noise: float) -> Draws:
    """Sample two half circles of radius 2, each reaching into the other; the label is the half circle."""
    y, t = rng.integers(2, size=n), rng.uniform(0, math.pi, n)
    upper = np.stack([np.cos(t) - 0.5, np.sin(t) - 0.25], 1)
    return 2 * np.where(y[:, None] == 0, upper, -upper) + noise * rng.standard_normal((n, 2)), y


def rings(rng: Generator, n: int, noise: float) -> Draws:
    """Sample three circles around the origin; the label is the circle, counted from the inside."""
    y, t = rng.integers(len(RADII), size=n), rng.uniform(0, 2 * math.pi, n)
    return RADII[y, None] * np.stack([np.cos(t), np.sin(t)], 1) + noise * rng.standard_normal((n, 2)), y


def pinwheel(rng: Generator, n: int, noise: float) -> Draws:
    """Sample five arms, each a normal of width ``noise`` across, swirled about the origin; the label is the arm."""
    y = rng.integers(ARMS, size=n)
    straight = rng.standard_normal((n, 2)) * (ARM_SPREAD, noise) + (ARM_LENGTH, 0.0)
    return _rotated(straight, 2 * math.pi / ARMS * y + SWIRL * np.hypot(*straight.T)), y


def checkerboard(rng: Generator, n: int, noise: float) -> Draws:
    """Sample eight squares of [-3, 3]^2, evenly filled; the label is the square, counted by columns."""
    y = rng.integers(len(SQUARES), size=n)
    return SQUARES[y] + SIDE * rng.uniform(-0.5, 0.5, (n, 2)) + noise * rng.standard_normal((n, 2)), y


def eight_gaussians(rng: Generator, n: int, noise: float) -> Draws:
    """Sample eight normals of deviation ``noise`` on a circle; labels run counterclockwise from the east."""
    y = rng.integers(len(CENTRES), size=n)
    return CENTRES[y] + noise * rng.standard_normal((n, 2)), y


def spiral(rng: Generator, n: int, noise: float) -> Draws:
    """Sample two arms of one and a half turns, out to radius 3; the label is the arm."""
    y, outward = rng.integers(2, size=n), np.sqrt(rng.uniform(0, 1, n))
    straight = np.stack([SPIRAL_RADIUS * outward, np.zeros(n)], 1)
    return _rotated(straight, math.pi * y + SPIRAL_TURN * outward) + noise * rng.standard_normal((n, 2)), y


def _rotated(x: Floats, angle: Floats) -> Floats:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([cos * x[..., 0] - sin * x[..., 1], sin * x[..., 0] + cos * x[..., 1]], -1)


def _rings(x: Floats, noise: float) -> Floats:
    """Return log p(x); a circle with noise has Rice's density `exp(-(r^2 + R^2) / 2 s^2) I_0(r R / s^2) / 2 pi s^2`."""
    r = np.hypot(x[:, :1], x[:, 1:])
    parts = np.log(i0e(r * RADII / noise**2)) - (r - RADII) ** 2 / (2 * noise**2)
    return _mixed(parts) - math.log(2 * math.pi * noise**2)


def _pinwheel(x: Floats, noise: float) -> Floats:
    """Return log p(x): the swirl keeps areas, so that it is the density of the straight arms before the swirl."""
    turned = 2 * math.pi / ARMS * np.arange(ARMS) + SWIRL * np.hypot(x[:, :1], x[:, 1:])
    straight = (_rotated(x[:, None], -turned) - (ARM_LENGTH, 0.0)) / (ARM_SPREAD, noise)
    return _mixed(-(straight**2).sum(-1) / 2) - math.log(2 * math.pi * ARM_SPREAD * noise)


def _checkerboard(x: Floats, noise: float) -> Floats:
    away = np.abs(x[:, None] - SQUARES)
    if noise:
        inside = ndtr((SIDE / 2 - away) / noise) - ndtr((-SIDE / 2 - away) / noise)
    else:
        inside = (away <= SIDE / 2).astype(np.float64)
    with np.errstate(divide="ignore"):
        return np.log(inside.prod(-1).mean(-1)) - 2 * math.log(SIDE)


def _eight_gaussians(x: Floats, noise: float) -> Floats:
    squared = ((x[:, None] - CENTRES) ** 2).sum(-1)
    return _mixed(-squared / (2 * noise**2)) - math.log(2 * math.pi * noise**2)


def _mixed(parts: Floats) -> Floats:
    return np.asarray(logsumexp(parts, axis=-1)) - math.log(parts.shape[-1])


@dataclass(frozen=True)
class ToyDensity:
    """A density of this module.

    Arguments:
        draw: `(rng, n, noise)` to x (n, 2) and labels (n,).
        noise: its own, where none is declared.
        label_names: a name for each label, or None.
        log_density: x (n, 2) and noise to nats (n,), where there is a closed form.
    """

    draw: Callable[[Generator, int, float], Draws]
    noise: float
    label_names: tuple[str, ...] | None = None
    log_density: Callable[[Floats, float], Floats] | None = None


DENSITIES = {
    "moons": ToyDensity(moons, 0.15, ("upper", "lower")),
    "rings": ToyDensity(rings, 0.1, ("inner", "middle", "outer"), _rings),
    "pinwheel": ToyDensity(pinwheel, 0.2, None, _pinwheel),
    "checkerboard": ToyDensity(checkerboard, 0.0, None, _checkerboard),
    "eight_gaussians": ToyDensity(eight_gaussians, 0.2, COMPASS, _eight_gaussians),
    "spiral": ToyDensity(spiral, 0.1),
}


@final
class Toy(Data):
    """Samples of a density in the plane: pairs (x1, x2), labelled by the part of the figure that they belong to.

    `pvae.data.sources.toys.log_density` and `entropy` give the exact density of four of them.
    """

    source: Literal["toy"] = "toy"
    density: DensityName = "moons"
    rows: int = Field(default=4000, gt=0)
    """Rows to train; a tenth more validates, another tests."""
    noise: Annotated[float, Field(ge=0)] | None = None
    """Deviation of the noise around the figure; by default one that keeps it clear."""
    scale: Scale = "raw"
    """Not `unit`: there is no largest level."""
    data_seed: Seed | Literal["experiment"] = 0
    """Seed of the samples, the same data for every experiment; `experiment`: each seed of a run draws its own."""

    @field_validator("density", mode="before")
    @classmethod
    def _known(cls, density: Any) -> Any:
        known = get_args(DensityName)
        if density not in known:
            hint = near(density, known) if isinstance(density, str) else ""
            raise ValueError(f"one of {', '.join(known)}; got {density!r}{hint}")
        return density

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Return rows (1.2 rows, 2), float32; train [0, rows), then validation, then test, a tenth of `rows` each."""
        density, tenth = DENSITIES[self.density], max(1, self.rows // 10)
        rng = np.random.default_rng(seed if self.data_seed == "experiment" else self.data_seed)
        noise = density.noise if self.noise is None else self.noise
        x, y = density.draw(rng, self.rows + 2 * tenth, noise)
        ends = self.rows, self.rows + tenth, self.rows + 2 * tenth
        parts = {"train": range(ends[0]), "validation": range(ends[0], ends[1]), "test": range(ends[1], ends[2])}
        return Rows(x.astype(np.float32), y, parts, label_names=density.label_names, name=self.density)


def log_density(name: str, x: Floats, noise: float | None = None) -> Floats:
    """Return log p(x) of rings, pinwheel, checkerboard or eight_gaussians; exact, in double precision.

    Arguments:
        name: of the density.
        x: (n, 2).
        noise: as declared; None is the density's own.

    Returns:
        Nats, (n,); -inf where there is no mass.

    Raises:
        DeclarationError: the density has no closed form, or needs noise to have one.

    Example:
        >>> log_density("rings", np.zeros((1, 2))).round(1)
        array([-30.3])
    """
    exact, noise = _closed_form(name, noise)
    return exact(np.asarray(x, np.float64), noise)


def entropy(name: str, noise: float | None = None) -> float:
    """Return the entropy -E[log p(x)], nats, of a density that `log_density` knows.

    No model's mean log density exceeds its negative.

    Without noise the checkerboard's is the log of its area, exact. Else it is the trapezoid rule on a grid of a fifth
    of the noise, whose error on densities as smooth as these is below 1e-6; small noise takes long.

    Raises:
        DeclarationError: as `log_density`.

    Example:
        >>> round(entropy("checkerboard"), 3)
        2.89
    """
    exact, noise = _closed_form(name, noise)
    if not noise:
        return math.log(len(SQUARES) * SIDE**2)
    reach, step = 6.5 + 8 * noise, min(noise, 0.5) / 5
    axis = np.arange(-reach, reach, step)
    total = 0.0
    for first in axis:
        log_p = exact(np.stack([np.full_like(axis, first), axis], 1), noise)
        total -= float((np.exp(log_p) * np.where(np.isfinite(log_p), log_p, 0.0)).sum())
    return total * step**2


def _closed_form(name: str, noise: float | None) -> tuple[Callable[[Floats, float], Floats], float]:
    known = {key: (density.log_density, density.noise) for key, density in DENSITIES.items() if density.log_density}
    if name not in known:
        found = f"{', '.join(known)}; got {name!r}{near(name, known)}"
        raise DeclarationError(f"Expected a density in closed form, {found}.")
    exact, own = known[name]
    noise = own if noise is None else noise
    if noise < 0 or (noise == 0 and name != "checkerboard"):
        raise DeclarationError(f"Expected noise > 0, without which {name} has no density; got {noise}.")
    return exact, noise
