"""Distribution of one column of a table, as declared: read by the likelihood, and by the guide that reads x."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Law:
    """The distribution of one column.

    Arguments:
        family: "normal", "student_t", "poisson", "negative_binomial", "bernoulli" or "categorical".
        levels: number of levels of a categorical column.
        masked: True if values may be missing, as NaN.
        column: its name, for messages.
    """

    family: str
    levels: int = 1
    masked: bool = False
    column: str = ""
