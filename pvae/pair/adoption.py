"""Adoption: the first run of the two programs of a pair on data, which finds their parameters and their structure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import CellType
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from pvae.errors import DeclarationError
from pvae.pair.layout import plates_of, read_layout
from pvae.pair.running import evaluating, run
from pvae.pair.structure import Structure, read_structure

if TYPE_CHECKING:
    from pvae.pair.pair import Pair

Store = Any
"""State of a Pyro param store: dicts `params` and `constraints`, by name."""


def adopted(pair: Pair, x: Tensor, own: Store) -> Structure:
    """Run both programs on a few rows of `x`, register their param-store parameters, return their structure.

    Arguments:
        pair: the pair; its programs run on batches of two sizes, and a data plate is one that follows the size.
        x: data `(n, *event)`.
        own: the param store of the pair, to which the parameters created by the programs are added.

    Raises:
        DeclarationError: nothing is observed inside a data plate, or the pair has no parameters.
    """
    rows, more = (x[torch.arange(count, device=x.device) % len(x)] for count in (3, 5))
    store_scope = pyro.get_param_store().scope(current_store())
    with evaluating(pair), torch.random.fork_rng(), torch.no_grad(), store_scope as store:
        traces = run(pair, rows)
        follows = plates_of(traces[1], 3) & plates_of(run(pair, more)[1], 5)
    layout = read_layout(*traces, 3, follows)
    _take_parameters(pair, traces, store, own)
    if not any(True for _ in pair.parameters()):
        raise DeclarationError(
            "pair: expected at least one parameter to learn; got none. Pass Modules, or use pyro.param or "
            "pyro.module in the programs."
        )
    return read_structure(*traces, layout, tuple(x.shape[1:]), 3)


def current_store() -> Any:
    """Return a shallow copy of the state of Pyro's global param store, so that already fitted values are adopted."""
    state = pyro.get_param_store().get_state()
    return {"params": dict(state["params"]), "constraints": dict(state["constraints"])}


def owners(pair: Pair) -> list[nn.Module]:
    """Return the Modules of which the model or the guide program is a bound method."""
    found = (getattr(program, "__self__", None) for program in (pair.model, pair.guide))
    return list(dict.fromkeys(owner for owner in found if isinstance(owner, nn.Module)))


def _take_parameters(pair: Pair, traces: tuple[Trace, Trace], store: Mapping[str, Any], own: Store) -> None:
    """Register on the pair the params that its programs use, and the Modules that its programs are methods of."""
    kept = {id(value) for value in store["params"].values()}
    named = [m for m in _named(pair) if any(id(p) in kept for p in m.parameters())]
    for i, module in enumerate(dict.fromkeys([*owners(pair), *named])):
        pair.add_module(f"owner_{i}", module)
    names = [n for t in traces for n, node in t.nodes.items() if node["type"] == "param"]
    known = {id(p) for p in pair.parameters()}
    free = nn.ParameterDict()
    for name in dict.fromkeys(names):
        value = store["params"][name]
        own["constraints"][name] = store["constraints"][name]
        if id(value) not in known:
            value = value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().clone())
            free[_attribute(name, free)] = value
        own["params"][name] = value
    if len(free):
        pair.free = free


def _named(pair: Pair) -> list[nn.Module]:
    """Return the Modules that plain-function programs refer to, as globals or closure variables."""
    found = []
    for program in (pair.model, pair.guide):
        code = getattr(program, "__code__", None)
        if code is not None:
            cells = [cell.cell_contents for cell in program.__closure__ or () if cell != CellType()]
            found += [*cells, *(program.__globals__.get(name) for name in code.co_names)]
    return [value for value in found if isinstance(value, nn.Module)]


def _attribute(name: str, free: nn.ParameterDict) -> str:
    """Return a param name as an attribute name, `net$$$0.weight` as `net___0_weight`, made unique by trailing `_`."""
    key = re.sub(r"[^0-9A-Za-z_]", "_", name)
    while hasattr(free, key):
        key += "_"
    return key
