"""Fitted transforms of table columns, and the inverse that returns rows of x to the units of the table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pvae.data.rows.columns import Column
from pvae.data.rows.prepare import UNWARPS, Floats

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class ColumnTransforms:
    """Columns of a table and their fitted transforms: x is (f(value) - shift) / divisor.

    Arguments:
        columns: declared columns by name, in the order of x.
        shift: shift of every column, `(D,)`.
        divisor: divisor of every column, `(D,)`.
        warps: column numbers to which each function f other than the identity is applied, by the function's name.
    """

    columns: Mapping[str, Column]
    shift: Floats
    divisor: Floats
    warps: Mapping[str, list[int]]

    def to_frame(self, x: Any) -> pandas.DataFrame:
        """Return rows of x `(n, D)` as a data frame in the table's units, with codes rounded to the nearest level."""
        import pandas

        values = np.asarray(x, np.float64) * self.divisor + self.shift
        for name, places in self.warps.items():
            with np.errstate(over="ignore"):
                values[:, places] = UNWARPS[name](values[:, places])
        made = {name: _worded(values[:, i], column) for i, (name, column) in enumerate(self.columns.items())}
        return pandas.DataFrame(made)


def _worded(values: Floats, column: Column) -> Any:
    """Return a column of numbers as levels (categorical), as integers (counts), or unchanged (continuous)."""
    import pandas

    if said := column.said:
        codes = np.where(np.isnan(values), -1, np.clip(np.rint(values), 0, len(said) - 1)).astype(np.int64)
        return pandas.Categorical.from_codes(codes, dtype=pandas.CategoricalDtype(list(said)))
    if column.family in ("poisson", "negative_binomial") and not (values % 1 > 0).any():
        return pandas.array(values).astype("Int64")
    return values
