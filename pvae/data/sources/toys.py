"""Two-dimensional toy densities.

Every density is centred, with a standard deviation of 1 to 2 along each coordinate. ``noise`` is the standard deviation
of the Gaussian noise, in the same units.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.random import Generator
from pydantic import Field

from pvae.data.rows import files, prepare
from pvae.data.rows.rows import Rows
from pvae.data.sources.base import Data, Seed
from pvae.util import Record

Draws = tuple[prepare.Floats, np.typing.NDArray[np.int64]]
DensityName = Literal["moons", "rings", "pinwheel", "checkerboard", "eight_gaussians", "spiral"]

COMPASS = ("east", "north-east", "north", "north-west", "west", "south-west", "south", "south-east")
CENTRES = 2 * np.stack([np.cos(np.arange(8) * math.pi / 4), np.sin(np.arange(8) * math.pi / 4)], 1)
RADII = np.array([0.8, 1.6, 2.4])
SIDE = 1.5
SQUARES = SIDE * np.array([(i - 1.5, j - 1.5) for i in range(4) for j in range(4) if (i + j) % 2 == 0])
ARMS, ARM_LENGTH, ARM_SPREAD, SWIRL = 5, 2.0, 0.6, 0.6
SPIRAL_TURN, SPIRAL_RADIUS = 3 * math.pi, 3.0


def moons(rng: Generator, n: int, noise: float) -> Draws:
    """Return n samples of two interleaving half circles of radius 2, with noise; the label is the half circle."""
    y, t = rng.integers(2, size=n), rng.uniform(0, math.pi, n)
    upper = np.stack([np.cos(t) - 0.5, np.sin(t) - 0.25], 1)
    return 2 * np.where(y[:, None] == 0, upper, -upper) + noise * rng.standard_normal((n, 2)), y


def rings(rng: Generator, n: int, noise: float) -> Draws:
    """Return n samples of three concentric circles, with noise; the label is the circle, counted from the inside."""
    y, t = rng.integers(len(RADII), size=n), rng.uniform(0, 2 * math.pi, n)
    return RADII[y, None] * np.stack([np.cos(t), np.sin(t)], 1) + noise * rng.standard_normal((n, 2)), y


def pinwheel(rng: Generator, n: int, noise: float) -> Draws:
    """Return n samples of five Gaussian arms of width ``noise``, swirled about the origin; the label is the arm."""
    y = rng.integers(ARMS, size=n)
    straight = rng.standard_normal((n, 2)) * (ARM_SPREAD, noise) + (ARM_LENGTH, 0.0)
    return rotated(straight, 2 * math.pi / ARMS * y + SWIRL * np.hypot(*straight.T)), y


def checkerboard(rng: Generator, n: int, noise: float) -> Draws:
    """Return n samples of eight uniform squares of a checkerboard on [-3, 3]^2, with noise; the label is the square."""
    y = rng.integers(len(SQUARES), size=n)
    return SQUARES[y] + SIDE * rng.uniform(-0.5, 0.5, (n, 2)) + noise * rng.standard_normal((n, 2)), y


def eight_gaussians(rng: Generator, n: int, noise: float) -> Draws:
    """Return n samples of eight Gaussians with standard deviation ``noise`` on a circle; the label is the Gaussian."""
    y = rng.integers(len(CENTRES), size=n)
    return CENTRES[y] + noise * rng.standard_normal((n, 2)), y


def spiral(rng: Generator, n: int, noise: float) -> Draws:
    """Return n samples of a two-armed spiral (1.5 turns, outer radius 3), with noise; the label is the arm."""
    y, outward = rng.integers(2, size=n), np.sqrt(rng.uniform(0, 1, n))
    straight = np.stack([SPIRAL_RADIUS * outward, np.zeros(n)], 1)
    return rotated(straight, math.pi * y + SPIRAL_TURN * outward) + noise * rng.standard_normal((n, 2)), y


def rotated(x: prepare.Floats, angle: prepare.Floats) -> prepare.Floats:
    """Return points of the plane `(..., 2)`, each turned by an angle."""
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([cos * x[..., 0] - sin * x[..., 1], sin * x[..., 0] + cos * x[..., 1]], -1)


class ToyDensity(Record):
    """Toy density in the plane.

    Arguments:
        draw: sampler, a function of `(rng, n, noise)` that returns x (n, 2) and labels (n,).
        noise: default standard deviation of the noise.
        label_names: name of each label, or None.
    """

    draw: Callable[[Generator, int, float], Draws]
    noise: float
    label_names: tuple[str, ...] | None = None


DENSITIES = {
    "moons": ToyDensity(moons, 0.15, ("upper", "lower")),
    "rings": ToyDensity(rings, 0.1, ("inner", "middle", "outer")),
    "pinwheel": ToyDensity(pinwheel, 0.2),
    "checkerboard": ToyDensity(checkerboard, 0.0),
    "eight_gaussians": ToyDensity(eight_gaussians, 0.2, COMPASS),
    "spiral": ToyDensity(spiral, 0.1),
}


class Toy(Data):
    """Samples (x1, x2) of a two-dimensional toy density, labelled by their component (arm, ring, square)."""

    source: Literal["toy"] = "toy"
    density: DensityName = "moons"
    rows: int = Field(default=4000, gt=0)
    """Number of training rows; the validation and the test split have a tenth of this number each, in addition."""
    noise: Annotated[float, Field(ge=0)] | None = None
    """Standard deviation of the Gaussian noise added to the density; None for the default of each density."""
    scale: prepare.Scale = "raw"
    """Scaling of the samples; `unit` is not possible, as there is no largest value."""
    data_seed: Seed | Literal["experiment"] = 0
    """Seed of the samples, fixed for all experiments; `experiment`: samples depend on the seed of the experiment."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Return rows (1.2 rows, 2), float32; train [0, rows), then validation, then test, a tenth of `rows` each."""
        density, tenth = DENSITIES[self.density], max(1, self.rows // 10)
        rng = np.random.default_rng(seed if self.data_seed == "experiment" else self.data_seed)
        noise = density.noise if self.noise is None else self.noise
        told = f"data.rows = {self.rows:,}, with what its sampler computes"
        files.require_room((self.rows + 2 * tenth, 12), np.dtype(np.float64), told, "Lower data.rows.")
        x, y = density.draw(rng, self.rows + 2 * tenth, noise)
        ends = self.rows, self.rows + tenth, self.rows + 2 * tenth
        parts = {"train": range(ends[0]), "validation": range(ends[0], ends[1]), "test": range(ends[1], ends[2])}
        return Rows(x.astype(np.float32), y, parts, label_names=density.label_names, name=self.density)
