"""Two-dimensional toy densities: samplers, and exact log densities for those that have a closed form.

Every density is centred, with a standard deviation of 1 to 2 along each coordinate. ``noise`` is the standard deviation
of the Gaussian noise, in the same units.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import i0e, logsumexp, ndtr

from pvae.data.rows.files import require_room
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
    return _rotated(straight, 2 * math.pi / ARMS * y + SWIRL * np.hypot(*straight.T)), y


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
    return _rotated(straight, math.pi * y + SPIRAL_TURN * outward) + noise * rng.standard_normal((n, 2)), y


def _rotated(x: Floats, angle: Floats) -> Floats:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([cos * x[..., 0] - sin * x[..., 1], sin * x[..., 0] + cos * x[..., 1]], -1)


def _rings(x: Floats, noise: float) -> Floats:
    """Return log p(x) of the rings, `(n,)`.

    A circle of radius R with noise s has Rice's density `exp(-(r^2 + R^2) / 2 s^2) I_0(r R / s^2) / 2 pi s^2`.
    """
    r = np.hypot(x[:, :1], x[:, 1:])
    parts = np.log(i0e(r * RADII / noise**2)) - (r - RADII) ** 2 / (2 * noise**2)
    return _mixed(parts) - math.log(2 * math.pi * noise**2)


def _pinwheel(x: Floats, noise: float) -> Floats:
    """Return log p(x) of the pinwheel, `(n,)`: that of the arms before the swirl, which preserves areas."""
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
    return _mixed(-((x[:, None] - CENTRES) ** 2).sum(-1) / (2 * noise**2)) - math.log(2 * math.pi * noise**2)


def _mixed(parts: Floats) -> Floats:
    return np.asarray(logsumexp(parts, axis=-1)) - math.log(parts.shape[-1])


@dataclass(frozen=True)
class ToyDensity:
    """Toy density in the plane: its sampler, and its log density if it has a closed form.

    Arguments:
        draw: sampler, a function of `(rng, n, noise)` that returns x (n, 2) and labels (n,).
        noise: default standard deviation of the noise.
        label_names: name of each label, or None.
        log_density: function of x (n, 2) and the noise that returns log p(x) in nats (n,), or None.
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


class Toy(Data):
    """Samples (x1, x2) of a two-dimensional toy density, labelled by the component (arm, ring, square) of each sample.

    `pvae.data.sources.toys.log_density` and `entropy` give the exact density of four of them.
    """

    source: Literal["toy"] = "toy"
    density: DensityName = "moons"
    rows: int = Field(default=4000, gt=0)
    """Number of training rows; the validation and the test split have a tenth of this number each, in addition."""
    noise: Annotated[float, Field(ge=0)] | None = None
    """Standard deviation of the Gaussian noise added to the density; None for the default of each density."""
    scale: Scale = "raw"
    """Scaling of the samples; `unit` is not possible, as there is no largest value."""
    data_seed: Seed | Literal["experiment"] = 0
    """Seed of the samples, fixed for all experiments; `experiment`: samples depend on the seed of the experiment."""

    def read(self, data_dir: Path | None, seed: int) -> Rows:
        """Return rows (1.2 rows, 2), float32; train [0, rows), then validation, then test, a tenth of `rows` each."""
        density, tenth = DENSITIES[self.density], max(1, self.rows // 10)
        rng = np.random.default_rng(seed if self.data_seed == "experiment" else self.data_seed)
        noise = density.noise if self.noise is None else self.noise
        told = f"data.rows = {self.rows:,}, with what its sampler computes"
        require_room((self.rows + 2 * tenth, 12), np.dtype(np.float64), told, "Lower data.rows.")
        x, y = density.draw(rng, self.rows + 2 * tenth, noise)
        ends = self.rows, self.rows + tenth, self.rows + 2 * tenth
        parts = {"train": range(ends[0]), "validation": range(ends[0], ends[1]), "test": range(ends[1], ends[2])}
        return Rows(x.astype(np.float32), y, parts, label_names=density.label_names, name=self.density)


def log_density(name: str, x: Floats, noise: float | None = None) -> Floats:
    """Return the exact log p(x) of rings, pinwheel, checkerboard or eight_gaussians, in double precision.

    Arguments:
        name: name of the density.
        x: points (n, 2).
        noise: standard deviation of the noise; None for the density's default.

    Returns:
        log p(x) in nats, (n,); -inf outside the support.

    Raises:
        DeclarationError: the density has no closed form, or needs noise to have one.

    Example:
        >>> log_density("rings", np.zeros((1, 2))).round(1)
        array([-30.3])
    """
    exact, noise = _closed_form(name, noise)
    return exact(np.asarray(x, np.float64), noise)


def entropy(name: str, noise: float | None = None) -> float:
    """Return the entropy -E[log p(x)], in nats, of a toy density that has a closed form.

    The expected log density of any model is at most the negative entropy.

    The entropy of the checkerboard without noise is the log of its area, exact. All others are computed by the
    trapezoid rule on a grid with a step of at most a fifth of the noise, with an error below 1e-6; small noise is slow.

    Raises:
        DeclarationError: see `log_density`.

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
