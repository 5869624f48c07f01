"""Functions that run the two programs of a pair: with particles, under enumeration, or in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pvae.pair.layout import Layout

if TYPE_CHECKING:
    from pvae.pair.pair import Pair

PARTICLES = "_particles"
"""Name of the plate of several samples per row."""


@contextmanager
def quiet(pair: nn.Module, x: Tensor) -> Iterator[None]:
    """Context manager: evaluation mode, no gradients, no Pyro validation, forked random state; all restored on exit."""
    devices = [x.device] if x.is_cuda else []
    with evaluating(pair), torch.no_grad(), torch.random.fork_rng(devices=devices), pyro.validation_enabled(False):
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Context manager that sets a Module to evaluation mode and restores the mode of every submodule on exit."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def run(pair: Pair, x: Tensor, layout: Layout | None = None, particles: int = 1) -> tuple[Trace, Trace]:
    """Return the guide's trace of a batch and the model's trace replayed against it.

    Arguments:
        pair: the pair whose programs run; its own param store must be active.
        x: data `(batch, *event)`.
        layout: layout of the pair; None before it is known: then one particle, and no enumeration.
        particles: samples per row, along a plate left of all others.
    """
    with particle_plate(layout, particles):
        with TraceMessenger() as guide:
            pair.guide(x)
        with TraceMessenger() as model, ReplayMessenger(trace=guide.trace), _enumeration(layout, particles):
            pair.model(x)
        return guide.trace, model.trace


def run_expected(pair: Pair, x: Tensor, layout: Layout, particles: int = 1) -> tuple[Trace, Trace]:
    """Return traces of guide and model that enumerate the latents marked for it, in dimensions left of all plates."""
    with particle_plate(layout, particles), EnumMessenger(_leftmost(layout, particles)):
        guide = trace_of(pair.guide, x)
        with TraceMessenger() as model, ReplayMessenger(trace=guide):
            pair.model(x)
    return guide, model.trace


def trace_of(program: Callable[..., Any], x: Tensor) -> Trace:
    """Return the trace of one program on a batch."""
    with TraceMessenger() as tracer:
        program(x)
    return tracer.trace


def particle_plate(layout: Layout | None, particles: int) -> AbstractContextManager[Any]:
    """Return a plate of `particles` samples per row, left of all other plates; a null context for one sample."""
    if particles == 1 or layout is None:
        return nullcontext()
    return pyro.plate(PARTICLES, particles, dim=-1 - layout.nesting)


def _enumeration(layout: Layout | None, particles: int) -> AbstractContextManager[Any]:
    """Return a handler that enumerates the model-only sites marked for it, left of all plates; null without such."""
    if layout is None or not layout.enumerated:
        return nullcontext()
    return EnumMessenger(_leftmost(layout, particles))


def _leftmost(layout: Layout, particles: int) -> int:
    """Return the first batch dimension (negative) that neither plates nor particles use."""
    return -1 - layout.nesting - (particles > 1)
