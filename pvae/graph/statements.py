"""Statements of declared programs: the plate over the rows of a batch, and `sample`, Pyro's at less cost."""

from functools import lru_cache
from typing import Any

import pyro
import pyro.distributions as dist
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK, InferDict
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor


class DataPlate(pyro.plate):
    """Plate over all `count` rows of a batch at dim -1; in a trace it leaves no site of its own."""

    def __init__(self, count: int) -> None:
        with pyro.poutine.block():
            super().__init__("data", count, dim=-1)
        self.frames = (pyro.poutine.indep_messenger.CondIndepStackFrame("data", -1, count, 0, count),)


data_plate = lru_cache(maxsize=16)(DataPlate)
"""Plate over a batch of some number of rows, cached: making one costs as much as a layer."""


def sample(name: str, fn: dist.TorchDistribution, *, obs: Tensor | None = None, infer: InferDict | None = None) -> Any:
    """Return what `pyro.sample` returns, and leave the same site in a trace.

    Where the handlers are a data plate inside a trace, replayed or not, as in a step of a fit, the site is recorded
    without a message through Pyro's handlers, which costs as much as a layer.
    """
    stack: list[Any] = _PYRO_STACK
    plate, count = stack[-1] if stack else None, len(stack)
    if plate.__class__ is DataPlate and count in (2, 3) and stack[-2].__class__ is TraceMessenger:
        replayed = stack[0].trace if count == 3 and stack[0].__class__ is ReplayMessenger else None
        if (count == 2 or replayed is not None) and fn.batch_shape in ((), (plate.size,)):
            given = replayed.nodes.get(name) if replayed is not None and obs is None else None
            wide: Any = fn
            if not fn.batch_shape:
                if (wide := fn.expand((plate.size,))).has_rsample != fn.has_rsample:
                    wide.has_rsample = fn.has_rsample
            value = obs if obs is not None else wide() if given is None else given["value"]
            stack[-2].trace.add_node(
                name, type="sample", name=name, fn=wide, is_observed=obs is not None, args=(), kwargs={}, value=value,
                infer={**(infer or {})} if given is None else given["infer"], scale=1.0, mask=None,
                cond_indep_stack=plate.frames, done=True, stop=False, continuation=None,
            )  # fmt: skip
            return value
    return pyro.sample(name, fn, obs=obs, infer=infer)
