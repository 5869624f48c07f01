"""Declared distribution family of one column of a table, read by the likelihood and by the encoder of x."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Law:
    """Declared distribution family of one column of a table.

    Arguments:
        family: "normal", "student_t", "poisson", "negative_binomial", "bernoulli" or "categorical".
        levels: number of levels of a categorical column.
        masked: True if values may be missing, as NaN.
        column: name of the column, for error messages.
    """

    family: str
    levels: int = 1
    masked: bool = False
    column: str = ""
