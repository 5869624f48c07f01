"""A number that says what it is: value, Monte Carlo error, spread over data, and whether it is a bound."""

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
    """A figure in nats.

    `standard_error` is the Monte Carlo error with the data fixed; `data_error` the error that another sample
    of data of the same size would add. `note` says how the error was found where that matters.
    """

    value: float
    standard_error: float = 0.0
    kind: Kind = "estimate"
    data_error: float | None = None
    note: str = ""

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        if self.kind == "exact" and not self.standard_error:
            return f"{self.value:.4f} (exact)"
        return f"{self.value:.4f} +- {self.standard_error:.4f} ({self.kind.replace('_', ' ')})"

    @property
    def label(self) -> str:
        """The kind in words, and how the error was found where that matters."""
        return self.kind.replace("_", " ") + (f", {self.note}" if self.note else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON: what is not defined (the error of one draw of one row) is None."""
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(self).items()}


def exact(value: float) -> Estimate:
    """A figure without Monte Carlo error."""
    return Estimate(value, 0.0, "exact")


def exact_mean(terms: Tensor) -> Estimate:
    """The mean of terms `(n,)` that are exact for every datum."""
    n = len(terms)
    return Estimate(float(terms.mean()), 0.0, "exact", float(terms.std() / math.sqrt(n)) if n > 1 else None)


def over_whole_draws(terms: Tensor, kind: Kind = "estimate") -> Estimate:
    """The mean of per-datum terms `(samples, n)` whose noise all data of a draw share: the error between draws."""
    found = over_draws(terms, kind)
    if len(terms) == 1:
        return replace(found, note=ONE_GLOBAL)
    return replace(found, standard_error=float(terms.mean(1).std() / math.sqrt(len(terms))))


def over_draws(terms: Tensor, kind: Kind = "estimate", of: int | None = None) -> Estimate:
    """The mean of per-datum terms `(samples, n)` with its errors; the n rows may be a random subset `of` more.

    With several draws the Monte Carlo error comes from the variance within each datum,
    sqrt(sum_i var_i / S) / n. One draw cannot tell noise from spread: the total spread is given, which is
    too large on average, and the note says "conservative".
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
