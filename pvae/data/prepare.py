"""From rows to arrays: scaling and binarisation, chunk by chunk, so that no large float64 array is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pvae.data.declared import Binarize, Scale
from pvae.data.rows import Array, Part, Rows, chunks
from pvae.errors import DataError

Floats = NDArray[np.float64]
Rule = Callable[[Floats], Array]

PUBLISHED_SEED = 777
TRAIN_SEED = 778


@dataclass(frozen=True, eq=False)
class Scaled:
    """Rows as float64 chunks of ``(x - shift) / divisor``."""

    x: Array
    shift: Floats | float = 0.0
    divisor: Floats | float = 1.0

    def chunks(self, part: Part) -> Iterator[tuple[int, Floats]]:
        """Chunks of the part, each with its first position."""
        for start, chunk in chunks(self.x, part):
            yield start, (chunk.astype(np.float64) - self.shift) / self.divisor

    def apply(self, part: Part, rule: Rule) -> NDArray[np.float32]:
        """The part as float32 (rows, *shape), after a rule."""
        out = np.empty((len(part), *self.x.shape[1:]), np.float32)
        for start, chunk in self.chunks(part):
            out[start : start + len(chunk)] = rule(chunk)
        return out


def scaled(scale: Scale, rows: Rows, x: Array, train: Part) -> Scaled:
    """The declared scaling.

    Raises:
        DataError: ``unit`` without a known largest level; ``standardise`` with a constant column.
    """
    if scale == "raw":
        return Scaled(x)
    if scale == "standardise":
        return _standardised(x, train)
    if rows.largest is None:
        raise DataError(f'data.scale = "unit": expected a known largest level or unsigned bytes; got {x.dtype}.')
    return Scaled(x, divisor=rows.largest)


def _standardised(x: Array, train: Part) -> Scaled:
    plain = Scaled(x)
    mean = sum((c.sum(0) for _, c in plain.chunks(train)), np.zeros(x.shape[1:])) / len(train)
    centred = Scaled(x, shift=mean)
    variance = sum(((c * c).sum(0) for _, c in centred.chunks(train)), np.zeros(x.shape[1:])) / len(train)
    low, high = _extremes(x, train)
    if constant := np.argwhere(np.atleast_1d(low == high)).tolist():
        where = constant[0][0] if len(constant[0]) == 1 else tuple(constant[0])
        raise DataError(
            f'data.scale = "standardise": expected columns that vary in train; column {where} is constant '
            f"({len(constant)} such columns in all). Drop them, or use another scale."
        )
    return Scaled(x, mean, np.sqrt(variance))


def _extremes(x: Array, part: Part) -> tuple[Array, Array]:
    pieces = [(chunk.min(0), chunk.max(0)) for _, chunk in chunks(x, part)]
    return np.min([low for low, _ in pieces], axis=0), np.max([high for _, high in pieces], axis=0)


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
        low, high = chunk.min(), chunk.max()
        if low < 0 or high > 1:
            raise DataError(
                f"data.binarize: expected values in [0, 1]; got {low if low < 0 else high:g} in {name}. "
                f'Use scale = "unit".'
            )
        return rule(chunk)

    return checked


def _same(chunk: Floats) -> Floats:
    return chunk
