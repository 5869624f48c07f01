"""Adoption: the first run of the two programs of a pair on data, which finds their parameters and their structure."""

import copy
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from pvae.errors import misdeclared, text
from pvae.pair.enumeration import needs_elimination
from pvae.pair.layout import Layout, Traces, is_point, plates_of, read_layout, samples
from pvae.pair.problems import Problem, ProgramError, guide_only, require_bound
from pvae.pair.running import current_store, evaluating, modules_within, run, trace_of, whole_plates
from pvae.pair.structure import Structure, Unpacked, read_structure, read_unpacked, unpack

if TYPE_CHECKING:
    from pvae.pair.pair import Pair

Store = Any
"""State of a Pyro param store: dicts `params` and `constraints`, by name."""
ROWS_AT_FIRST = 100
"""Largest number of rows of the first run, unless the programs run on all rows only."""


def adopted(pair: "Pair", x: Tensor, own: Store) -> Structure:
    """Run both programs on rows of `x`, register their param-store parameters, return their structure.

    A data plate is one whose size follows the number of rows: the model also runs on two rows more. Programs with
    parameters for every row (an AutoGuide over local latents) run on all rows at once, and on these rows only.

    Arguments:
        pair: the pair.
        x: data `(n, *event)`.
        own: the param store of the pair, to which the parameters created by the programs are added.

    Raises:
        DeclarationError: nothing is observed inside a data plate, or a program fails.
    """
    lazy = any(isinstance(part, AutoGuide | EasyGuide) for part in modules_within([pair.guide]))
    counts = [3] if pair.declared else [len(x)] if lazy else sorted({min(len(x), ROWS_AT_FIRST), len(x)})
    for count in counts:
        rows = x[torch.arange(count, device=x.device) % len(x)]
        devices = [x.device] if x.is_cuda else []
        scope = pyro.get_param_store().scope(current_store())
        with evaluating(pair), torch.random.fork_rng(devices=devices), torch.no_grad(), whole_plates(), scope as store:
            try:
                traces = run(pair, rows)
            except Exception:
                if count == counts[-1]:
                    raise
                continue
            layout, fixed, unpacked = _layout(pair, traces, rows)
            spread = _spread(pair, (unpack(traces[0], unpacked), traces[1]), rows)
            if not fixed or count == counts[-1]:
                break
    alone = tuple(guide_only(*traces, unpacked))
    _take_parameters(pair, traces, store, own)
    traces = (unpack(traces[0], unpacked), traces[1])
    found = read_structure(traces, layout, tuple(x.shape[1:]), count, unpacked, spread)
    dtype = None if x.is_floating_point() else x.dtype
    return replace(found, rows=count if fixed else None, guide_only=alone, dtype=dtype)


def _layout(pair: "Pair", traces: Traces, rows: Tensor) -> tuple[Layout, bool, Unpacked]:
    """Return the layout, True if the programs run on this number of rows only, and the guide's unpacked latents."""
    count = len(rows)
    more = rows[torch.arange(count + 2, device=rows.device) % count]
    follows, fixed, unpacked = plates_of(traces[1], count), False, {}
    if not pair.declared:
        try:
            follows &= plates_of(trace_of(pair, pair.model, more), count + 2)
            guide = trace_of(pair, deep_copied(pair.guide), more)  # an EasyGuide that fails here keeps open plates
            fixed = not plates_of(traces[0], count) & follows <= plates_of(guide, count + 2)
        except Exception:  # whatever a program raises on other rows means that these are its rows
            fixed = True
        unpacked = read_unpacked(*traces)
    layout = read_layout(unpack(traces[0], unpacked), traces[1], count, follows)
    if layout.enumerated and not pair.declared:
        layout = replace(layout, eliminated=needs_elimination(run(pair, rows, layout)[1], layout))
    return layout, fixed, unpacked


def whole_or_floats(pair: "Pair", x: Tensor, like: Tensor | None) -> Tensor:
    """Return whole numbers as they are if the programs of a pair run on them, else as floating-point numbers."""
    floats = x.to(torch.get_default_dtype() if like is None else like.dtype)
    if pair.arguments is not None:
        return x
    try:
        return x if pair.adopt(x).structure.dtype is not None else floats
    except ProgramError:
        return floats


def other_rows(structure: Structure | None, x: Tensor) -> Problem | None:
    """Return the problem of data of another number of rows than the programs have parameters for, if they do."""
    if structure is None or structure.rows in (None, len(x)):
        return None
    return Problem("x", text("pair.adoption.rows", rows=structure.rows, found=len(x)))


def _spread(pair: "Pair", traces: Traces, rows: Tensor) -> frozenset[str]:
    """Return the Delta latents of a guide whose values differ in a second draw: they are no points.

    `AutoDiagonalNormal` samples all latents as one vector, `AutoStructured` shifts one latent by another, a group of an
    `EasyGuide` is one vector of several. The auxiliary sites have the density of such latents, the log densities of the
    Deltas the Jacobians: they may move with auxiliary sites that are no points.
    """
    guide, model = map(samples, traces)
    helpers = [n for n in guide.values() if n["infer"].get("is_auxiliary") and not n["is_observed"]]  # no factors
    points = [n for n, node in guide.items() if n in model and is_point(node["fn"])]
    if pair.declared or not points or all(is_point(node["fn"]) for node in helpers):
        return frozenset()
    other = samples(trace_of(pair, pair.guide, rows))
    return frozenset(n for n in points if n not in other or not guide[n]["value"].equal(other[n]["value"]))


def read_again(known: Structure, guide: pyro.poutine.Trace, model: pyro.poutine.Trace, count: int) -> Structure:
    """Return the structure of a batch whose traces have sites that no batch had before.

    Raises:
        DeclarationError: the guide has latents that the model lacks, or x is not observed in the known data plate.
    """
    require_bound(guide_only(guide, model, known.unpacked))
    layout = read_layout(guide, model, count, known.layout.plates)
    return read_structure((guide, model), layout, known.event, count, known.unpacked, known.guide_sites - known.points)


def copied(pair: "Pair") -> tuple["Pair", Store]:
    """Return a pair of copies of the programs, of what they are bound to, and of Pyro's global param store.

    Closures and globals of functions are shared. Programs that cannot be copied are used as they are.
    """
    (model, guide), store = deep_copied(((pair.model, pair.guide), current_store()))
    return type(pair)(model=model, guide=guide), store


def deep_copied(thing: Any) -> Any:
    """Return a deep copy of programs, with AutoGuides whole; what cannot be copied is returned as it is."""
    known: dict[int, Any] = {}
    parts = [part for module in modules_within([thing]) for part in module.modules() if isinstance(part, AutoGuide)]
    kept = [(part, part._model, part.master) for part in parts]  # a copy empties these of the original as well
    try:
        made = copy.deepcopy(thing, known)
    except Exception:  # a lock, a generator or a tensor with a history inside an object
        return thing
    finally:
        for part, model, master in kept:
            part._model, part.master = model, master
    for part in (part for part in parts if part._model and id(part) in known):
        known[id(part)]._model = tuple(known.get(id(model), model) for model in part._model)
    return made


def _take_parameters(pair: "Pair", traces: Traces, store: Mapping[str, Any], own: Store) -> None:
    """Register on the pair the params that its programs use, and the Modules that its programs are methods of."""
    names = [n for t in traces for n, node in t.nodes.items() if node["type"] == "param"]
    kept = {id(store["params"][name]) for name in names}
    used = [m for m in modules_within([pair.model, pair.guide]) if any(id(p) in kept for p in m.parameters())]
    for i, module in enumerate(dict.fromkeys([*pair.owners(), *used])):
        if module not in (pair.model, pair.guide):
            pair.add_module(f"owner_{i}", module)
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


def _attribute(name: str, free: nn.ParameterDict) -> str:
    """Return a param name as an attribute name, `net$$$0.weight` as `net___0_weight`, made unique by trailing `_`."""
    key = re.sub(r"[^0-9A-Za-z_]", "_", name)
    while hasattr(free, key):
        key += "_"
    return key


class StoreRecord:
    """Record of the values that Pyro's global param store held when a pair took them, to see later changes.

    A pair has values of its own. Until something changes these (a fit, loaded weights), it follows the global store:
    values that `pyro.infer.SVI` or the user have put there since are copied before the next analysis. A copy of the
    pair keeps the values that it was made with.
    """

    def __init__(self) -> None:
        self.store: dict[str, tuple[Tensor, int]] = {}
        self.own: dict[str, int] = {}
        self.follows = True

    def __getstate__(self) -> dict[str, Any]:
        return {"store": {}, "own": {}, "follows": False}

    def note(self, own: Store) -> None:
        """Remember the state of the pair's own parameters, and of the global ones of the same names."""
        present = pyro.get_param_store().get_state()["params"]
        self.own = {name: value._version for name, value in own["params"].items()}
        self.store = {name: (present[name], present[name]._version) for name in self.own if name in present}

    def follow(self, own: Store) -> None:
        """Copy values that changed in the global store into the pair's parameters, unless these changed themselves.

        Raises:
            DeclarationError: the store holds a value of another shape under the same name.
        """
        present = pyro.get_param_store().get_state()["params"]
        news = {name: present[name] for name in own["params"] if name in present and not self._had(name, present[name])}
        changed = any(own["params"][name]._version != version for name, version in self.own.items())
        if changed or not news or not self.follows:
            return
        for name, value in news.items():
            if (mine := own["params"][name]) is value:
                continue
            misdeclared(mine.shape != value.shape, "pair.adoption.shape", name=name, mine=mine, found=value)
            with torch.no_grad():
                mine.copy_(value)
        self.note(own)

    def _had(self, name: str, value: Tensor) -> bool:
        known, version = self.store.get(name, (None, 0))
        return known is value and version == value._version
