"""From rows to arrays: scaling and binarisation, chunk by chunk, so that no large float64 array is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from pvae.data.rows.arrays import AnyArray, Array
from pvae.data.rows.rows import Part, Rows, chunks, rows_of
from pvae.errors import DataError

Binarize = Literal["none", "threshold", "static", "dynamic"]
Scale = Literal["unit", "raw", "standardise"]

Floats = NDArray[np.float64]
Rule = Callable[[Floats], Array]
BlockRule = Callable[[Floats, int], Array]
"""A rule that draws anew for every block, whose number it gets."""

PUBLISHED_SEED = 777
TRAIN_SEED = 778


@dataclass(frozen=True, eq=False)
class Scaled:
    """Rows as float64 chunks of ``(x - shift) / divisor``, in a table after the functions of some columns."""

    x: AnyArray
    shift: Floats | float = 0.0
    divisor: Floats | float = 1.0
    warps: Mapping[str, list[int]] = field(default_factory=dict)
    """Names in `WARPS`, and the columns that go through them."""

    @property
    def as_stored(self) -> bool:
        """Whether nothing is done to the values."""
        return not self.warps and isinstance(self.shift, float) and (self.shift, self.divisor) == (0.0, 1.0)

    def chunks(self, part: Part) -> Iterator[tuple[int, Floats]]:
        """Chunks of the part, each with its first position."""
        for start, chunk in chunks(self.x, part):
            yield start, self.scale(chunk)

    def affine(self) -> tuple[Floats, Floats]:
        """Shift and divisor of every feature, `(*row)`."""
        shift, divisor = (np.broadcast_to(part, self.x.shape[1:]) for part in (self.shift, self.divisor))
        return shift, divisor

    def of(self, part: Part) -> Floats:
        """A part that is small enough to copy, at once."""
        return self.scale(rows_of(self.x, part))

    def scale(self, chunk: Array) -> Floats:
        """Stored values as they are seen."""
        values = chunk.astype(np.float64)
        for name, columns in self.warps.items():
            values[..., columns] = WARPS[name](values[..., columns])
        values -= self.shift
        values /= self.divisor
        return values

    def apply(self, part: Part, rule: Rule) -> NDArray[np.float32]:
        """The part as float32 (rows, *shape), after a rule."""
        out = np.empty((len(part), *self.x.shape[1:]), np.float32)
        for start, chunk in self.chunks(part):
            out[start : start + len(chunk)] = rule(chunk)
        return out


def scaled(scale: Scale, rows: Rows, x: AnyArray, train: Part) -> Scaled:
    """The declared scaling.

    Raises:
        DataError: ``unit`` without a known largest level; ``standardise`` with a constant column.
    """
    if rows.table:
        return _table(rows, x, train)
    if scale == "raw":
        return Scaled(x)
    if scale == "standardise":
        return _standardised(x, train)
    if rows.largest is None:
        raise DataError(f'data.scale = "unit": expected a known largest level or unsigned bytes; got {x.dtype}.')
    return Scaled(x, divisor=rows.largest)


def _standardised(x: AnyArray, train: Part) -> Scaled:
    plain = Scaled(x)
    mean = sum((c.sum(0) for _, c in plain.chunks(train)), np.zeros(x.shape[1:])) / len(train)
    centred = Scaled(x, shift=mean)
    variance = sum(((c * c).sum(0) for _, c in centred.chunks(train)), np.zeros(x.shape[1:])) / len(train)
    low, high = extremes(x, train)
    if constant := np.argwhere(np.atleast_1d((low == high) | _flat(mean, variance))).tolist():
        where = constant[0][0] if len(constant[0]) == 1 else tuple(constant[0])
        raise DataError(
            f'data.scale = "standardise": expected columns that vary in train; column {where} is constant '
            f"({len(constant)} such columns in all). Drop them, or use another scale."
        )
    return Scaled(x, mean, np.sqrt(variance))


def _table(rows: Rows, x: AnyArray, train: Part) -> Scaled:
    """Every column by its own transform, fitted on what is there of it in the training rows.

    Raises:
        DataError: a column has no value in train, or a standardised one is constant there.
    """
    columns = rows.table.values()
    warps = {name: [i for i, column in enumerate(columns) if column.warp == name] for name in WARPS}
    warped = Scaled(x, warps={name: places for name, places in warps.items() if places})
    low, high = extremes(x, train)
    chosen = np.array([column.is_standardised for column in columns])
    for place, name in enumerate(rows.table):
        if np.isnan(low[place]):
            raise DataError(f"data.columns.{name!r}: expected values in train; got none, all are missing. Drop it.")
        if chosen[place] and low[place] == high[place]:
            raise DataError(
                f"data.columns.{name!r}: expected a column that varies in train; got {low[place]:g} alone. Drop it, or "
                f'set transform = "none".'
            )
    mean = _mean_of_present(warped, train, 0.0, power=1)
    variance = _mean_of_present(warped, train, mean, power=2)
    for (name, _), flat in zip(rows.table.items(), chosen & _flat(mean, variance), strict=True):
        if flat:
            raise DataError(
                f"data.columns.{name!r}: expected a column that varies in train; what it varies by is rounding. Drop "
                f"it, or set another transform."
            )
    return Scaled(x, np.where(chosen, mean, 0.0), np.where(chosen, np.sqrt(variance), 1.0), warped.warps)


def _flat(mean: Floats, variance: Floats) -> NDArray[np.bool_]:
    """Where what varies is no more than the rounding of the numbers themselves."""
    return np.sqrt(variance) <= 1e-12 * np.maximum(np.abs(mean), np.finfo(np.float32).tiny)


def _mean_of_present(data: Scaled, part: Part, centre: Floats | float, power: int) -> Floats:
    """Mean of ``(x - centre) ** power`` of every column, over what is not missing."""
    total, count = np.zeros(data.x.shape[1:]), np.zeros(data.x.shape[1:])
    for _, chunk in data.chunks(part):
        missing = np.isnan(chunk)
        chunk -= centre
        chunk[missing] = 0.0
        chunk **= power
        total += chunk.sum(0)
        count += len(chunk) - missing.sum(0)
    return total / count


WARPS: Mapping[str, Callable[[Floats], Floats]] = {"log": np.log, "log1p": np.log1p, "logit": logit}
"""What columns of a table may go through before they are standardised."""
UNWARPS: Mapping[str, Callable[[Floats], Floats]] = {"log": np.exp, "log1p": np.expm1, "logit": expit}
"""Their inverses."""


def extremes(x: AnyArray, part: Part) -> tuple[Array, Array]:
    """Least and largest value of every feature `(*row)` over a part; what is missing (NaN) is left out."""
    low = high = np.full(x.shape[1:], np.nan)
    for _, chunk in chunks(x, part):
        low, high = np.fmin(low, np.fmin.reduce(chunk, 0)), np.fmax(high, np.fmax.reduce(chunk, 0))
    return low, high


@dataclass(frozen=True, eq=False)
class Prepared:
    """The three splits, (n, *shape) float32; ``raw`` are intensities of "train" to draw anew, or None."""

    x: dict[str, NDArray[np.float32]]
    raw: NDArray[np.float32] | None


def prepare(data: Scaled, parts: dict[str, Part], binarize: Binarize) -> Prepared:
    """Scale and binarise the splits.

    Fixed draws follow the published protocol: one ``RandomState(777)``, a binomial of the validation split first,
    then of the test split, on float64 intensities. The training split has a fixed draw of its own.

    References: Exemplar VAE (Norouzi, Fleet, Norouzi, 2020), https://arxiv.org/abs/2004.04795

    Raises:
        DataError: binarisation of values outside [0, 1].
    """
    if binarize == "none":
        return Prepared({name: data.apply(part, _same) for name, part in parts.items()}, None)
    published, own = np.random.RandomState(PUBLISHED_SEED), np.random.RandomState(TRAIN_SEED)
    rules = _rules(binarize, published, own)
    x = {name: data.apply(parts[name], _within_unit(name, rules[name])) for name in ("validation", "test", "train")}
    return Prepared(x, data.apply(parts["train"], _same) if binarize == "dynamic" else None)


def _rules(binarize: Binarize, published: np.random.RandomState, own: np.random.RandomState) -> dict[str, Rule]:
    if binarize == "threshold":
        return dict.fromkeys(("train", "validation", "test"), lambda p: p > 0.5)

    def fixed(p: Floats) -> Array:
        return published.binomial(1, p)

    return {"train": lambda p: own.random_sample(p.shape) < p, "validation": fixed, "test": fixed}


def _within_unit(name: str, rule: Rule) -> Rule:
    def checked(chunk: Floats) -> Array:
        require_unit(name, chunk.min(), chunk.max())
        return rule(chunk)

    return checked


def require_unit(name: str, low: float, high: float) -> None:
    """Refuse intensities outside of [0, 1].

    Raises:
        DataError: see above.
    """
    if low < 0 or high > 1:
        raise DataError(
            f'data.binarize: expected values in [0, 1]; got {low if low < 0 else high:g} in {name}. Use scale = "unit".'
        )


def _same(chunk: Floats) -> Floats:
    return chunk
