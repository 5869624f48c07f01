"""Modules within reach of a program: arguments of partial, closures, globals, attributes, programs inside handlers."""

from collections.abc import Iterable, Iterator
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

LIBRARIES = (
    "torch", "pyro", "numpy", "scipy", "pandas",
    "builtins", "functools", "collections", "math", "pvae", "pytest", "_pytest",
)  # fmt: skip
"""Packages whose globals and classes are not searched: no Module of the user is kept there."""
OBJECTS_AT_MOST = 20_000
"""Largest number of objects that are looked at in one search."""


def modules_within(programs: Iterable[Any]) -> list[nn.Module]:
    """Return the Modules that programs can reach, in the order found; submodules of a Module come with it.

    Searched are arguments of `functools.partial`, programs inside Pyro handlers (`poutine.scale`, `config_enumerate`),
    closures and default arguments, the globals that a function names, owners of bound methods, and attributes of plain
    objects, lists, tuples, sets and dictionaries, however deep.

    Example:
        >>> from functools import partial
        >>> layer = nn.Linear(1, 1)
        >>> modules_within([partial(lambda net, x: net(x), layer)]) == [layer]
        True
    """
    found: dict[int, nn.Module] = {}
    seen: dict[int, Any] = {}
    left = list(programs)
    while left and len(seen) < OBJECTS_AT_MOST:
        thing = left.pop(0)
        if id(thing) in seen:
            continue
        seen[id(thing)] = thing
        if isinstance(thing, nn.Module):
            found[id(thing)] = thing
        left += _inside(thing)
    inner = {id(part) for module in found.values() for part in module.modules() if part is not module}
    return [module for key, module in found.items() if key not in inner]


def _inside(thing: Any) -> list[Any]:
    """Return the objects that an object refers to and that may lead to a Module."""
    if isinstance(thing, FunctionType):
        return [*_of_function(thing)]
    if isinstance(thing, MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, dict):
        return [*thing.values()]
    if isinstance(thing, list | tuple | set | frozenset):
        return [*thing]
    if isinstance(thing, type | ModuleType | Tensor | str | bytes | int | float | complex | CodeType) or thing is None:
        return []
    if isinstance(thing, nn.Module) and _is_library(type(thing), ("torch", "pvae")):
        return []
    named = [thing.func, thing.args, thing.keywords] if isinstance(thing, partial) else []
    classes = type(thing).__mro__
    slots = [_attribute(thing, s) for c in classes for s in _names(vars(c).get("__slots__", ()))]
    methods = [v for c in classes if not _is_library(c) for v in vars(c).values()]
    functions = [m for m in methods if isinstance(m, FunctionType)]
    return [*(_attribute(thing, "__dict__") or {}).values(), *slots, *named, *functions]


def _attribute(thing: Any, name: str) -> Any:
    """Return an attribute of an object, None where it has none; proxies and unset slots may raise anything."""
    try:
        return object.__getattribute__(thing, name)
    except Exception:
        return None


def _names(slots: Any) -> Iterable[str]:
    return [slots] if isinstance(slots, str) else slots


def _of_function(function: FunctionType) -> Iterator[Any]:
    """Yield what a function refers to: closure, defaults, the function it wraps, and the globals that it names."""
    yield from (cell.cell_contents for cell in function.__closure__ or () if cell != CellType())
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield getattr(function, "__wrapped__", None)
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
    name = thing if isinstance(thing, str) else getattr(thing, "__module__", "")
    return str(name).partition(".")[0] in libraries
