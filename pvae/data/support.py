"""Checks that every element of the data lies in the support of the likelihood."""

from __future__ import annotations

from typing import Any

from torch.distributions import constraints

from pvae.data.split import Split
from pvae.errors import DataError


def elementwise(constraint: Any) -> Any:
    """Return the constraint on a single element, without `independent` wrappers: ``real`` for ``real_vector``."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def require_split(split: Split, constraint: Any, hint: str) -> None:
    """Refuse a split with an element outside a constraint.

    Arguments:
        split: split whose data are checked.
        constraint: support of one element, as `elementwise` returns it.
        hint: advice that ends the message, such as the transform to use instead.

    Raises:
        DataError: an element is outside; the message gives its split, row, element and the support.
    """
    row = 0
    for chunk in split.chunks():
        inside = constraint.check(chunk)
        if not bool(inside.all()):
            first, *element = (int(i) for i in (~inside).nonzero()[0])
            value = chunk[(first, *element)]
            shown = f"{value.item():g}" if value.numel() == 1 else str(value.flatten()[:6].tolist())
            where, wanted = _named(constraint, element)
            raise DataError(
                f"{split.name}, row {row + first}, {where}: expected {wanted}, as the likelihood does; got {shown}. "
                f"{hint}".rstrip()
            )
        row += len(chunk)


def _named(constraint: Any, element: list[int]) -> tuple[str, str]:
    """Return the name of an element (column of a table, or array indices) and a description of its support."""
    from pvae.models.likelihoods.columns import columns

    if isinstance(constraint, columns):
        return constraint.named(element[0]), constraint.of(element[0])
    # torch's own words, `Interval(lower_bound=0.0, upper_bound=1.0)`, or the constraint's name
    return f"element {tuple(element)}", f"a value in {constraint}".removesuffix("()")
