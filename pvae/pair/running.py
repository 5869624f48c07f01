"""Functions that run the two programs of a pair: with particles, under enumeration, or in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pvae.pair.layout import Layout
from pvae.pair.reach import modules_within

if TYPE_CHECKING:
    from pvae.pair.pair import Pair

PARTICLES = "_particles"
"""Name of the plate of several samples per row."""


@contextmanager
def quiet(pair: Pair, x: Tensor) -> Iterator[None]:
    """Context manager: evaluation mode, no gradients, no Pyro validation, forked random state; all restored on exit.

    Plates that draw a subsample of the rows of x by themselves are opened to all rows.
    """
    devices = [x.device] if x.is_cuda else []
    noise = torch.random.fork_rng(devices=devices)
    with evaluating(pair), torch.no_grad(), noise, pyro.validation_enabled(False), whole_plates():
        yield


@contextmanager
def evaluating(pair: Pair) -> Iterator[None]:
    """Context manager that sets the Modules of a pair to evaluation mode and restores the mode of each on exit.

    Hand-written programs may call Modules that are no part of the pair: those within reach are set as well, and any
    other one just before its first call.
    """
    modes: dict[nn.Module, bool] = {}

    def rest(module: nn.Module) -> None:
        for part in module.modules():
            modes.setdefault(part, part.training)
            part.training = False

    def before_call(module: nn.Module, _inputs: Any) -> None:
        if module.training:
            rest(module)

    rest(pair)
    with ExitStack() as stack:
        stack.callback(lambda: [setattr(part, "training", mode) for part, mode in modes.items()])
        if not pair.declared:
            for module in modules_within([pair.model, pair.guide]):
                rest(module)
            stack.callback(register_module_forward_pre_hook(before_call).remove)
        yield


_WHOLE: ContextVar[bool] = ContextVar("whole_plates", default=False)


@contextmanager
def whole_plates() -> Iterator[None]:
    """Context manager in which a plate that would draw its own subsample of the rows of a batch holds all of them."""
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)


@contextmanager
def _opened(rows: int) -> Iterator[None]:
    """Context manager that replaces Pyro's choice of a subsample by all rows, for plates not declared as the batch."""
    draw = SubsampleMessenger._subsample

    def all_rows(name: str, size: Any = None, subsample_size: Any = None, subsample: Any = None, *rest: Any) -> Any:
        own = subsample is None and subsample_size is not None and subsample_size != rows
        return draw(name, size, None if own else subsample_size, subsample, *rest)

    SubsampleMessenger._subsample = staticmethod(all_rows)  # type: ignore[method-assign]
    try:
        yield
    finally:
        SubsampleMessenger._subsample = staticmethod(draw)  # type: ignore[method-assign]


def run(pair: Pair, x: Tensor, layout: Layout | None = None, particles: int = 1) -> tuple[Trace, Trace]:
    """Return the guide's trace of a batch and the model's trace replayed against it.

    Arguments:
        pair: the pair whose programs run; its own param store must be active.
        x: data `(batch, *event)`.
        layout: layout of the pair; None before it is known: then one particle, and no enumeration.
        particles: samples per row, along a plate left of all others.
    """
    with particle_plate(layout, particles):
        guide = trace_of(pair, pair.guide, x)
        with ReplayMessenger(trace=guide), _enumeration(layout, particles):
            return guide, trace_of(pair, pair.model, x)


def run_expected(pair: Pair, x: Tensor, layout: Layout, particles: int = 1) -> tuple[Trace, Trace]:
    """Return traces of guide and model that enumerate the latents marked for it, in dimensions left of all plates."""
    with particle_plate(layout, particles), EnumMessenger(_leftmost(layout, particles)):
        guide = trace_of(pair, pair.guide, x)
        with ReplayMessenger(trace=guide):
            return guide, trace_of(pair, pair.model, x)


def trace_of(pair: Pair, program: Callable[..., Any], x: Tensor) -> Trace:
    """Return the trace of one program of a pair on a batch.

    Raises:
        ProgramError: the program failed; the message names its line.
    """
    opened = _opened(len(x)) if _WHOLE.get() and not pair.declared else nullcontext()
    with TraceMessenger() as tracer, opened:
        if pair.declared or not _WHOLE.get():
            pair.program(program)(x)
        else:
            pair.call(program, x)
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
