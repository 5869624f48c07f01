"""Functions that run the two programs of a pair: quietly, under enumeration, with several samples per row.

Modules within reach of a program rest meanwhile: those in arguments of partial, closures, globals, attributes.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Literal

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pvae.pair.densities import sum_over
from pvae.pair.layout import Layout
from pvae.pair.terms import Terms, terms_of
from pvae.util import seeds

if TYPE_CHECKING:
    from pvae.pair.pair import Pair

PARTICLES = "_particles"
"""Name of the plate of several samples per row."""


Way = Literal["plate", "rows", "one by one"]
RELATIVE, ABSOLUTE = 1e-3, 1e-3
"""Largest difference of a log density between ways of running the same particles."""


@contextmanager
def quiet(pair: "Pair", x: Tensor) -> Iterator[None]:
    """Context manager: evaluation mode, no gradients, no Pyro validation, forked random state; all restored on exit.

    Plates that draw a subsample of the rows of x by themselves are opened to all rows.
    """
    noise = torch.random.fork_rng(devices=[x.device] if x.is_cuda else [])
    with evaluating(pair), torch.no_grad(), noise, pyro.validation_enabled(False), whole_plates():
        yield


@contextmanager
def evaluating(pair: "Pair") -> Iterator[None]:
    """Context manager that sets the Modules of a pair to evaluation mode and restores the mode of each on exit.

    Hand-written programs may call Modules that are no part of the pair: those within reach are set as well, and any
    other one just before its first call.
    """
    with ExitStack() as stack:

        def rest(module: nn.Module) -> None:
            for part in module.modules():
                stack.callback(setattr, part, "training", part.training)  # the first mode is restored last
            module.eval()

        def before_call(module: nn.Module, _inputs: Any) -> None:
            if module.training:
                rest(module)

        for module in [pair] if pair.declared else [pair, *modules_within([pair.model, pair.guide])]:
            rest(module)
        if not pair.declared:
            stack.callback(nn.modules.module.register_module_forward_pre_hook(before_call).remove)
        yield


def current_store() -> Any:
    """Return a shallow copy of the state of Pyro's global param store, so that already fitted values are adopted."""
    state = pyro.get_param_store().get_state()
    return {"params": dict(state["params"]), "constraints": dict(state["constraints"])}


_WHOLE: ContextVar[bool] = ContextVar("whole_plates", default=False)


@contextmanager
def whole_plates() -> Iterator[None]:
    """Context manager in which a plate that would draw its own subsample of the rows of a batch holds all of them."""
    with ExitStack() as stack:
        stack.callback(_WHOLE.reset, _WHOLE.set(True))
        yield


@contextmanager
def _opened(rows: int) -> Iterator[None]:
    """Context manager that replaces Pyro's choice of a subsample by all rows, for plates not declared as the batch."""
    plates: Any = pyro.poutine.subsample_messenger.SubsampleMessenger
    draw = plates._subsample

    def all_rows(name: str, size: Any = None, subsample_size: Any = None, subsample: Any = None, *rest: Any) -> Any:
        own = subsample is None and subsample_size is not None and subsample_size != rows
        return draw(name, size, None if own else subsample_size, subsample, *rest)

    with ExitStack() as stack:
        stack.callback(setattr, plates, "_subsample", staticmethod(draw))
        plates._subsample = staticmethod(all_rows)
        yield


def run(
    pair: "Pair", x: Tensor, layout: Layout | None = None, particles: int = 1, *, expected: bool = False
) -> tuple[Trace, Trace]:
    """Return the guide's trace of a batch and the model's trace replayed against it.

    Arguments:
        pair: the pair whose programs run; its own param store must be active.
        x: data `(batch, *event)`.
        layout: layout of the pair; None before it is known: then one particle, and no enumeration.
        particles: samples per row, along a plate left of all others.
        expected: enumerate the latents marked for it in the guide too, in dimensions left of all plates.
    """
    sums: AbstractContextManager[Any] = nullcontext()
    if layout and (expected or layout.enumerated):  # left of all plates and particles
        sums = pyro.poutine.enum_messenger.EnumMessenger(-1 - layout.nesting - (particles > 1))
    plate = pyro.plate(PARTICLES, particles, dim=-1 - layout.nesting) if layout and particles > 1 else nullcontext()
    with plate, sums if expected else nullcontext():
        guide = trace_of(pair, pair.guide, x)
        with pyro.poutine.replay_messenger.ReplayMessenger(trace=guide), nullcontext() if expected else sums:
            return guide, trace_of(pair, pair.model, x)


def run_one(pair: "Pair", program: Callable[..., Any], x: Tensor, particles: int, values: Trace | None = None) -> Trace:
    """Return a trace of one program of a pair as `run` runs it, its latents drawn, or set to those of a trace."""
    nesting, sums = pair.layout.nesting, pair.layout.enumerated and program is pair.model
    with (
        pyro.plate(PARTICLES, particles, dim=-1 - nesting) if particles > 1 else nullcontext(),
        pyro.poutine.replay_messenger.ReplayMessenger(trace=values) if values else nullcontext(),
        pyro.poutine.enum_messenger.EnumMessenger(-1 - nesting - (particles > 1)) if sums else nullcontext(),
    ):
        return trace_of(pair, program, x)


def trace_of(pair: "Pair", program: Callable[..., Any], x: Tensor) -> Trace:
    """Return the trace of one program of a pair on a batch.

    Raises:
        ProgramError: the program failed; the message names its line.
    """
    with pyro.poutine.trace_messenger.TraceMessenger() as tracer:
        if pair.declared:
            program(x)
        elif not _WHOLE.get():
            pair.program(program)(x)
        else:
            with _opened(len(x)):
                pair.call(program, x)
    return tracer.trace


# ---------------------------------------------------------------------- several samples per row


def way_of_particles(pair: "Pair", x: Tensor) -> Way:
    """Return the way to run several samples per row of a batch; found once per pair and shape, by values.

    Programs written for one sample may index or reshape their latents from the left (`z[:, 0]`), which is right for one
    sample and another model under a further plate. So a few samples run along a plate, as repeated rows and one at a
    time, on the rows of the batch, at the same latents: a way is safe if it gives the densities of single samples.
    """
    if pair.declared:
        return "plate"
    key = (tuple(x.shape), x.dtype, str(x.device))
    return pair.remember(f"particles of {key}", key, lambda: _find_way(pair, x))


def _find_way(pair: "Pair", x: Tensor) -> Way:
    if torch.compiler.is_compiling():
        return "one by one"  # safe; asked before compilation
    with quiet(pair, x):
        seeds.set_noise(seeds.mix(0, seeds.ANALYSIS), x.device)
        # of a number that is no size of the data or of a latent, so that none is taken for another
        taken = {*x.shape, *(size for shape in pair.structure.shapes.values() for size in (*shape.left, *shape.right))}
        singles = [pair.traces(x) for _ in range(next(count for count in range(2, 100) if count not in taken))]
        want = torch.stack([_weights(pair, *traces, 0) for traces in singles])
        guides = [trace for trace, _ in singles]
        by_rows = not pair.layout.shared and pair.structure.rows is None
        if not guides[0].nodes.keys() == guides[1].nodes.keys():
            return "one by one"  # the sites of a sample vary
        ways: tuple[Way, ...] = ("plate", "rows") if by_rows else ("plate",)
        return next((way for way in ways if _agrees(pair, x, way, guides, want)), "one by one")


def _agrees(pair: "Pair", x: Tensor, way: Way, guides: Sequence[Trace], want: Tensor) -> bool:
    """Return whether a way gives the log weights `want` `(particles, rows)` of single samples at their latents."""
    count, layout, fixed = len(guides), pair.layout, Trace()
    for name, node in guides[0].nodes.items():
        if node["type"] == "sample" and not node["is_observed"] and name in (*layout.latents, *layout.shared):
            fixed.nodes[name] = {**node, "value": _stacked(way, [g.nodes[name] for g in guides], layout)}
    try:
        with pair.own_store(), pyro.poutine.replay_messenger.ReplayMessenger(trace=fixed):
            found = run(pair, x, layout, count) if way == "plate" else run(pair, tiled(x, count), layout)
        got = _weights(pair, *pair.known(x, *found), count if way == "plate" else 0).reshape(count, -1)
    except Exception:  # whatever a program raises under a further plate
        return False
    return got.shape == want.shape and torch.allclose(got, want, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True)


def _stacked(way: Way, nodes: Sequence[Any], layout: Layout) -> Tensor:
    """Return the values of a site in several samples as one: left of all plates, or along the rows."""
    values = [node["value"] for node in nodes]
    batch = values[0].dim() - len(nodes[0]["fn"].event_shape)
    if way == "rows":
        return torch.cat(values, batch + layout.dim)
    return torch.stack([value.reshape((1,) * (layout.nesting - batch) + value.shape) for value in values])


def _weights(pair: "Pair", guide: Trace, model: Trace, particles: int) -> Tensor:
    """Return log p(x, z) - log q(z | x) of every row, `([particles,] rows)`."""
    terms = terms_of((guide, model), pair.layout, particles, False, None)
    return sum_over([terms.reconstruction, *(-kl for kl in terms.kl.values())])


def tiled(x: Tensor, count: int) -> Tensor:
    """Return `count` copies of rows, one after the other, `(count * n, ...)`."""
    return x.repeat(count, *(1,) * (x.dim() - 1))


def with_particles(pair: "Pair", x: Tensor, particles: int, way: Way, **options: Any) -> Terms:
    """Return the ELBO terms of a batch with `particles` samples per row, for programs that take no plate of them."""
    if way == "rows":
        return _combined([pair.terms(tiled(x, particles), **options)], lambda values: values[0].reshape(particles, -1))
    return _combined([pair.terms(x, **options) for _ in range(particles)], torch.stack)


def _combined(parts: Sequence[Terms], join: Callable[[list[Tensor]], Tensor]) -> Terms:
    """Return the terms of several runs, each tensor of which is joined from those of the runs."""
    scores = {}
    for name, first in parts[0].scores.items():
        same = [part.scores[name] for part in parts]
        base = [score.baseline for score in same if score.baseline is not None]
        baseline = first.baseline if first.baseline is None or not first.baseline.dim() else join(base)
        log_q, weighed = join([score.log_q for score in same]), join([score.weighed for score in same])
        scores[name] = replace(first, log_q=log_q, weighed=weighed, baseline=baseline)
    sides = [part.kl for part in parts], [part.penalties for part in parts]
    kl, penalties = ({name: join([table[name] for table in side]) for name in side[0]} for side in sides)
    return Terms(join([part.reconstruction for part in parts]), kl, penalties, scores)


LIBRARIES = tuple("torch pyro numpy scipy pandas builtins functools collections math pvae pytest _pytest".split())
"""Packages whose globals and classes are not searched: no Module of the user is kept there."""
OBJECTS_AT_MOST = 20_000
"""Largest number of objects that are looked at in one search."""


def modules_within(programs: Iterable[Any]) -> list[nn.Module]:
    """Return the Modules that programs can reach, in the order found; submodules of a Module come with it.

    Searched are arguments of `functools.partial`, programs inside Pyro handlers (`poutine.scale`, `config_enumerate`),
    closures and default arguments, the globals that a function names, owners of bound methods, and attributes of plain
    objects, lists, tuples, sets and dictionaries, however deep; not annotations, nor builtins, where a notebook keeps
    its shell and by it all that its user has.

    Example:
        >>> from functools import partial
        >>> layer = nn.Linear(1, 1)
        >>> modules_within([partial(lambda net, x: net(x), layer)]) == [layer]
        True
    """
    seen: dict[int, Any] = {}
    left = list(programs)
    while left and len(seen) < OBJECTS_AT_MOST:
        thing = left.pop(0)
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        left += _inside(thing)
    found = {key: thing for key, thing in seen.items() if isinstance(thing, nn.Module)}
    inner = {id(part) for module in found.values() for part in module.modules() if part is not module}
    return [module for key, module in found.items() if key not in inner]


def _inside(thing: Any) -> list[Any]:
    """Return the objects that an object refers to and that may lead to a Module; of globals, those that are named."""
    known = isinstance(thing, nn.Module) and _is_library(type(thing), ("torch", "pvae"))
    if known or isinstance(thing, type | ModuleType | Tensor | str | bytes | int | float | complex | CodeType | None):
        return []
    if isinstance(thing, FunctionType):
        return [thing.__closure__, thing.__defaults__, thing.__kwdefaults__, vars(thing), *_named_globals(thing)]
    methods = [v for c in type(thing).__mro__ if not _is_library(c) for v in vars(c).values()]
    return [*gc.get_referents(thing), *(method for method in methods if isinstance(method, FunctionType))]


def _named_globals(function: FunctionType) -> Iterator[Any]:
    """Yield the globals that a function names, and what it may name in modules among them."""
    if not _is_library(function.__globals__.get("__name__", "")):
        names = set(_names_in(function.__code__))
        for value in [function.__globals__.get(name) for name in sorted(names)]:
            yield value
            if isinstance(value, ModuleType) and not _is_library(value.__name__):
                yield from (vars(value).get(name) for name in sorted(names))


def _names_in(code: CodeType) -> Iterator[str]:
    """Yield the global and attribute names of a code object and of the functions defined in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _is_library(thing: Any, libraries: tuple[str, ...] = LIBRARIES) -> bool:
    return str(thing if isinstance(thing, str) else getattr(thing, "__module__", "")).partition(".")[0] in libraries
