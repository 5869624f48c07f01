"""Event dimensions without needless work."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch


class Event(dist.Independent):
    """`to_event` whose `expand` to the shape it has already is free: a plate expands every site of every step."""

    def expand(self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: Any = None) -> Any:
        """The same distribution over more batch dimensions."""
        return self if self.batch_shape == tuple(batch_shape) else super().expand(batch_shape, _instance)
