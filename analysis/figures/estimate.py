"""Estimates: a value with its Monte Carlo error, its error over the data, and its kind (exact, bound, estimate)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import Tensor

Kind = Literal["exact", "lower_bound", "upper_bound", "estimate"]
CONSERVATIVE = "conservative"
ONE_GLOBAL = "one draw of the global latents, whose noise is not in it"


@dataclass(frozen=True)
class Estimate:
    """A value with its errors and its kind, in nats unless the result that holds it says otherwise.

    Example:
        >>> estimate = Estimate(-86.31, standard_error=0.02, kind="lower_bound")
        >>> print(estimate)
        -86.3100 +- 0.0200 (lower bound)
        >>> float(estimate)
        -86.31
    """

    value: float
    standard_error: float = 0.0
    """Monte Carlo standard error with the data fixed."""
    kind: Kind = "estimate"
    """One of exact, lower_bound, upper_bound and estimate; bounds hold in expectation."""
    data_error: float | None = None
    """Standard error that another data set of the same size would add; None where it is not known."""
    note: str = ""
    """Remark on the way the standard error was computed."""

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        if self.kind == "exact" and not self.standard_error:
            return f"{self.value:.4f} (exact)"
        return f"{self.value:.4f} +- {self.standard_error:.4f} ({self.kind.replace('_', ' ')})"

    @property
    def label(self) -> str:
        """Kind of the estimate in words, followed by the note."""
        return self.kind.replace("_", " ") + (f", {self.note}" if self.note else "")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain numbers and strings, for JSON; values that are not finite are None."""
        return {k: finite(v) if isinstance(v, float) else v for k, v in asdict(self).items()}


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """Return an estimate of a positive multiple of the estimated quantity."""
    data_error = None if estimate.data_error is None else estimate.data_error * factor
    value, error = estimate.value * factor, estimate.standard_error * factor
    return replace(estimate, value=value, standard_error=error, data_error=data_error)


def finite(value: float | Tensor) -> float | None:
    """Return a number as a float that JSON can represent: None if it is NaN or infinite."""
    return float(value) if math.isfinite(value) else None


def exact(value: float) -> Estimate:
    """Return a value as an `Estimate` of kind "exact", without Monte Carlo error."""
    return Estimate(value, 0.0, "exact")


def exact_mean(terms: Tensor) -> Estimate:
    """Return the mean of terms `(n,)` that are exact for every datum, without Monte Carlo error."""
    n = len(terms)
    return Estimate(float(terms.mean()), 0.0, "exact", float(terms.std() / math.sqrt(n)) if n > 1 else None)


def over_rows(values: Tensor) -> Estimate:
    """Return the mean of independent values `(n,)`, one per row, with its standard error."""
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), error, "estimate")


def over_whole_draws(terms: Tensor, kind: Kind = "estimate") -> Estimate:
    """Return the mean of terms `(samples, n)`, with the error between samples, as rows share noise within a sample."""
    found = over_draws(terms, kind)
    if len(terms) == 1:
        return replace(found, note=ONE_GLOBAL)
    return replace(found, standard_error=float(terms.mean(1).std() / math.sqrt(len(terms))))


def over_draws(terms: Tensor, kind: Kind = "estimate", of: int | None = None) -> Estimate:
    """Return the mean of terms `(samples, n)` with its errors; the n rows may be a random subset of `of` rows.

    With several samples the Monte Carlo error comes from the variance within each datum, sqrt(sum_i var_i / S) / n.
    A single sample cannot separate noise from the spread over data: the total spread is given, which is too large on
    average, and the note says "conservative".
    """
    draws, n = terms.shape
    value = float(terms.mean())
    data_error = float(terms.mean(0).std() / math.sqrt(n)) if n > 1 else None
    if draws > 1:
        error = float((terms.var(0).sum() / draws).sqrt() / n)
        if of is not None and n < of and data_error is not None:
            error = math.hypot(error, data_error * math.sqrt(1 - n / of))
        return Estimate(value, error, kind, data_error)
    spread = float(terms.std() / math.sqrt(n)) if n > 1 else math.nan
    return Estimate(value, spread, kind, data_error, CONSERVATIVE)
