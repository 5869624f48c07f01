"""Posteriors of codes and bits: laws of every engine; sums and score functions against brute force and Pyro's own;
relaxations against their limit; nearest codes against formulas written by hand."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, typeddict-item, union-attr"

from __future__ import annotations

SUM, SCORE = ({"kind": "categorical", "estimator": one} for one in ("sum", "score"))
