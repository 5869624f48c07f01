"""Scaling and binarisation of stored rows, chunk by chunk (no large float64 array), and the inverse for tables."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas
import torch
from scipy.special import expit, logit

from pvae.data.rows.columns import Column
from pvae.data.rows.files import AnyArray, Index, Stored
from pvae.data.rows.rows import Part, Rows, chunks, rows_of
from pvae.errors import DataError, refuse
from pvae.util import Record, field

Binarize = Literal["none", "threshold", "static", "dynamic"]
Scale = Literal["unit", "raw", "standardise"]

Floats = np.typing.NDArray[np.float64]
Rule = Callable[[Floats], np.ndarray]

PUBLISHED_SEED = 777
TRAIN_SEED = 778


class Scaled(Record, eq=False):
    """Stored rows with their declared scaling ``(f(x) - shift) / divisor``; f is the identity except for `warps`."""

    x: AnyArray
    shift: Floats | float = 0.0
    divisor: Floats | float = 1.0
    warps: Mapping[str, list[int]] = field(default_factory=dict)
    """Column numbers to which each function of `WARPS` is applied, by the function's name."""

    @property
    def as_stored(self) -> bool:
        """True if the scaling is the identity, so that stored values are used unchanged."""
        return not self.warps and isinstance(self.shift, float) and (self.shift, self.divisor) == (0.0, 1.0)

    def chunks(self, part: Part) -> Iterator[tuple[int, Floats]]:
        """Return the rows numbered in `part`, scaled, in consecutive float64 chunks, each with its offset in `part`."""
        return ((start, self.scale(chunk)) for start, chunk in chunks(self.x, part))

    def of(self, part: Part) -> Floats:
        """Return the rows numbered in `part` after the declared scaling, as one float64 array."""
        return self.scale(rows_of(self.x, part))

    def scale(self, chunk: np.ndarray) -> Floats:
        """Return a chunk of stored values after the declared scaling, as float64.

        Scaling is the column functions of `warps`, then minus `shift`, then divided by `divisor`.
        """
        values = chunk.astype(np.float64)
        for name, columns in self.warps.items():
            values[..., columns] = WARPS[name](values[..., columns])
        values -= self.shift
        values /= self.divisor
        return values

    def apply(self, part: Part, rule: Rule | None = None) -> torch.Tensor:
        """Return the rows numbered in `part` after scaling and binarisation by `rule` (if any), float32 (m, *shape)."""
        out = np.empty((len(part), *self.x.shape[1:]), np.float32)
        for start, chunk in self.chunks(part):
            out[start : start + len(chunk)] = rule(chunk) if rule else chunk
        return torch.from_numpy(out)


class Holed(Stored):
    """Rows with NaN where a mask says so.

    Arguments:
        x: rows of numbers, `(n, *row)`.
        mask: booleans of the same shape, or numbers that are 0 or `one`; of images one channel will do.
        where: name of the mask in messages.
        one: number that stands for a missing value.

    Raises:
        DataError: the mask has another shape, or another value (raised where that is read).
    """

    def __init__(self, x: AnyArray, mask: AnyArray, where: str, one: int = 1) -> None:
        fits = mask.shape == x.shape or (one > 1 and mask.shape == (x.shape[0], 1, *x.shape[2:]))
        refuse(not fits, "data.rows.mask", where=where, one=one, of=x.shape, found=mask.shape)
        self.x, self.mask, self.where, self.one = x, mask, where, one
        self.shape, self.dtype = x.shape, np.result_type(x.dtype, np.float32)

    def read(self, index: Index) -> np.ndarray:
        mask = self.mask[index]
        odd = mask[(mask != 0) & (mask != self.one)].ravel()[:1].tolist()
        refuse(odd, "data.rows.mask", where=self.where, one=self.one, of=self.shape, found=odd)
        return np.where(mask, np.nan, self.x[index]).astype(self.dtype)


def scaled(scale: Scale, rows: Rows, x: AnyArray, train: Part) -> Scaled:
    """Return the stored rows with the declared scaling, whose statistics come from the training rows.

    Raises:
        DataError: ``unit`` is declared without a known largest value, or ``standardise`` with a constant column.
    """
    if rows.table:
        return _table(rows, x, train)
    if scale == "raw":
        return Scaled(x)
    if scale == "unit":
        if rows.largest is None:
            raise DataError(f'data.scale = "unit": expected data.largest (a level) or unsigned bytes; got {x.dtype}.')
        return Scaled(x, divisor=rows.largest)
    low, high = extremes(x, train)
    mean, deviation, flat = _moments(Scaled(x), train)
    constant = np.argwhere(np.atleast_1d((low == high) | flat | np.isnan(low))).tolist()
    refuse(constant, "data.rows.constant", found=constant)
    return Scaled(x, mean, deviation)


def _table(rows: Rows, x: AnyArray, train: Part) -> Scaled:
    """Return table rows with each column's own transform, fitted on the training rows in which it is not missing.

    Raises:
        DataError: a column has no value in the training rows, or a standardised column is constant there.
    """
    columns = rows.table.values()
    warps = warps_of(rows.table)
    low, high = extremes(x, train)
    if empty := [name for name, least in zip(rows.table, low, strict=True) if np.isnan(least)]:
        raise DataError(f"data.columns.{empty[0]!r}: expected values in train; got none, all are missing. Drop it.")
    chosen = np.array([column.is_standardised for column in columns])
    mean, deviation, flat = _moments(Scaled(x, warps=warps), train)
    for name, constant, least, most in zip(rows.table, chosen & (flat | (low == high)), low, high, strict=True):
        refuse(constant, "data.rows.constant_column", name=name, least=least, most=most)
    return Scaled(x, np.where(chosen, mean, 0.0), np.where(chosen, deviation, 1.0), warps)


def _moments(data: Scaled, part: Part) -> tuple[Floats, Floats, np.typing.NDArray[np.bool_]]:
    """Return mean and standard deviation of each scaled feature, `(*row)`, over the rows in `part`, without NaN.

    The third array is True for each feature whose standard deviation is no larger than rounding error.
    """
    total, count, squares = (np.zeros(data.x.shape[1:]) for _ in range(3))
    for _, chunk in data.chunks(part):
        total += np.nansum(chunk, 0)
        count += len(chunk) - np.isnan(chunk).sum(0)
    mean = total / np.maximum(count, 1)
    for _, chunk in data.chunks(part):
        chunk -= mean
        chunk **= 2
        squares += np.nansum(chunk, 0)
    deviation = np.sqrt(squares / np.maximum(count, 1))
    return mean, deviation, deviation <= 1e-12 * np.maximum(np.abs(mean), np.finfo(np.float32).tiny)


WARPS: Mapping[str, Callable[[Floats], Floats]] = {"log": np.log, "log1p": np.log1p, "logit": logit}
"""Functions that can be applied to table columns before standardisation, by name."""
UNWARPS: Mapping[str, Callable[[Floats], Floats]] = {"log": np.exp, "log1p": np.expm1, "logit": expit}
"""Inverses of the functions in `WARPS`, by the same names."""


def warps_of(columns: Mapping[str, Column]) -> dict[str, list[int]]:
    """Return the numbers of the columns to which each function of `WARPS` is applied, by the function's name."""
    found = {name: [i for i, column in enumerate(columns.values()) if column.warp == name] for name in WARPS}
    return {name: places for name, places in found.items() if places}


def worded(values: Floats, column: Column) -> Any:
    """Return a column of numbers as levels (categorical), as integers (counts), or unchanged (continuous)."""
    if said := column.said:
        codes = np.where(np.isnan(values), -1, np.clip(np.rint(values), 0, len(said) - 1)).astype(np.int64)
        return pandas.Categorical.from_codes(codes, dtype=pandas.CategoricalDtype(list(said)))
    if column.family in ("poisson", "negative_binomial") and not (values % 1 > 0).any():
        return pandas.array(values).astype("Int64")
    return values


def extremes(x: AnyArray, part: Part, digest: "hashlib._Hash | None" = None) -> tuple[np.ndarray, np.ndarray]:
    """Return minimum and maximum of every feature, each `(*row)`, over the rows in `part`, ignoring NaN (missing).

    The stored values are added to `digest`, if given, in the same pass.
    """
    low = high = np.full(x.shape[1:], np.nan)
    for _, chunk in chunks(x, part):
        if digest:
            digest.update(np.ascontiguousarray(chunk).data)
        low, high = np.fmin(low, np.fmin.reduce(chunk, 0)), np.fmax(high, np.fmax.reduce(chunk, 0))
    return low, high


def prepare(
    data: Scaled, parts: dict[str, Part], binarize: Binarize
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Return each split scaled and binarised, (n, *shape) float32, and the train intensities or None.

    The intensities are returned only for dynamic binarisation, which samples the training data anew for every batch.
    Static samples follow the published protocol: one ``RandomState(777)`` draws a binomial for the validation split
    first, then for the test split, from float64 intensities; the training split has a seed of its own. New rows, a
    split alone, are drawn as a validation split is.

    References: Exemplar VAE (Norouzi, Fleet, Norouzi, 2020), https://arxiv.org/abs/2004.04795

    Raises:
        DataError: values to binarise are outside [0, 1].
    """
    if binarize == "none":
        return {name: data.apply(part) for name, part in parts.items()}, None
    published, own = np.random.RandomState(PUBLISHED_SEED), np.random.RandomState(TRAIN_SEED)
    rules: dict[str, Rule] = {name: lambda p: published.binomial(1, p) for name in parts if name != "train"}
    rules["train"] = lambda p: own.random_sample(p.shape) < p
    if binarize == "threshold":
        rules = dict.fromkeys(rules, lambda p: p > 0.5)

    def binarized(name: str, chunk: Floats) -> np.ndarray:
        require_unit(name, np.fmin.reduce(chunk, None), np.fmax.reduce(chunk, None))
        return kept_missing(rules[name], chunk)

    x = {name: data.apply(parts[name], partial(binarized, name)) for name in rules if name in parts}
    return x, data.apply(parts["train"]) if binarize == "dynamic" and "train" in parts else None


def kept_missing(rule: Rule, chunk: Floats) -> np.ndarray:
    """Return the values of a rule of binarisation for a chunk of intensities; missing ones (NaN) stay missing."""
    missing = np.isnan(chunk)
    return np.where(missing, np.nan, rule(np.where(missing, 0.0, chunk))) if missing.any() else rule(chunk)


def require_unit(name: str, low: float, high: float) -> None:
    """Refuse a split with intensities outside [0, 1], given the minimum and the maximum over the split.

    Raises:
        DataError: `low` is below 0 or `high` above 1.
    """
    refuse(low < 0 or high > 1, "data.rows.unit", name=name, found=low if low < 0 else high)
