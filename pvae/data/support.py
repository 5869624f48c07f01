"""Checks that a likelihood can score the data: every element lies in its support."""

from __future__ import annotations

from typing import Any

from torch.distributions import constraints

from pvae.data.split import Split
from pvae.errors import DataError
from pvae.models.likelihoods.columns import columns as of_columns


def elementwise(constraint: Any) -> Any:
    """Return the constraint of one element: ``real_vector`` is ``real`` on each."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def require_split(split: Split, constraint: Any, hint: str) -> None:
    """Refuse a split with an element outside a constraint.

    Arguments:
        split: the data.
        constraint: the support of one element, as `elementwise` gives it.
        hint: the transform to use instead.

    Raises:
        DataError: with the first value outside: its split, row, element, and the support.
    """
    row = 0
    for chunk in split.chunks():
        inside = constraint.check(chunk)
        if not bool(inside.all()):
            first, *element = (int(i) for i in (~inside).nonzero()[0])
            value = chunk[(first, *element)]
            shown = f"{value.item():g}" if value.numel() == 1 else str(value.flatten()[:6].tolist())
            where, wanted = f"element {tuple(element)}", _described(constraint)
            if isinstance(constraint, of_columns):
                where, wanted = constraint.named(element[0]), constraint.of(element[0])
            raise DataError(
                f"{split.name}, row {row + first}, {where}: expected {wanted}, as the likelihood does; got {shown}. "
                f"{hint}".rstrip()
            )
        row += len(chunk)


def _described(constraint: Any) -> str:
    """Describe a constraint in torch's words, ``Interval(lower_bound=0.0, upper_bound=1.0)``, or by its name."""
    return f"a value in {constraint}".removesuffix("()")
