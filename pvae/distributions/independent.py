"""Variant of `Independent` (event dimensions) with a cheaper `expand`."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch


class Event(dist.Independent):
    """Distribution with declared event dimensions, as `to_event` returns; `expand` to its own shape costs nothing.

    A plate expands every site in every training step.
    """

    def expand(self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: Any = None) -> Any:
        """Return this distribution expanded to `batch_shape`."""
        return self if self.batch_shape == tuple(batch_shape) else super().expand(batch_shape, _instance)
