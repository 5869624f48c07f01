"""Dependencies of a pair: the latents that each conditional distribution reads, found by perturbing their values."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from pvae.distributions import Certain, Discretised
from pvae.pair.densities import Unweighed, moved, rows_first
from pvae.pair.layout import Layout, Traces, is_point, samples, unwrapped
from pvae.pair.running import quiet, run
from pvae.pair.structure import ROWS_OF_A_BATCH, Structure, unpack
from pvae.records import Record
from pvae.util import seeds

if TYPE_CHECKING:
    from pvae.pair.pair import Pair

PROBED_ROWS = 16
"""Number of rows on which the dependencies between latents are found."""
ROUNDING = 8
"""Largest difference of a log density between equal rows of a batch that counts as rounding, in units of eps."""
CLEAR_CHANGE = 1e-3
"""Relative change of a log density above which it cannot be rounding; smaller changes are tested by a second run."""


class Dependencies(Record):
    """Latents that each conditional distribution of a pair depends on, at the weights where this was found.

    Global latents count if the guide samples them, not if it sets them to points.
    """

    guide: Mapping[str, frozenset[str]]
    """Latents that the posterior q of each latent depends on, in the order of the guide."""
    model: Mapping[str, frozenset[str]]
    """Latents that the prior p of each latent depends on."""
    certain: frozenset[str] = frozenset()
    """Latents whose codes are a deterministic function of their inputs in the guide, such as nearest codes (VQ)."""

    @cached_property
    def guide_roots(self) -> frozenset[str]:
        """Latents whose posterior depends only on the row of data, directly or through deterministic codes."""
        given: set[str] = set()
        for name, read in self.guide.items():
            if name in self.certain and read <= given:
                given.add(name)
        return frozenset(name for name, read in self.guide.items() if read <= given)

    @cached_property
    def model_roots(self) -> frozenset[str]:
        """Latents whose prior depends on no other latent."""
        return frozenset(name for name, read in self.model.items() if not read)

    @cached_property
    def bottom_up(self) -> frozenset[str]:
        """Latents whose prior depends on a latent that the guide infers from them (bottom-up inference).

        E_q[log q - log p] of such a latent is not the expectation of a closed-form KL.
        """
        return frozenset(name for name, read in self.model.items() if read & self.inferred_from(name))

    def inferred_from(self, name: str) -> set[str]:
        """Return the latents whose posterior depends on latent `name`, directly or through other latents."""
        found = {name}
        while more := {z for z, read in self.guide.items() if z not in found and read & found}:
            found |= more
        return found - {name}


def dependencies_without_asking(structure: Structure) -> Dependencies | None:
    """Return the dependencies of a pair that are known without running it (one latent); None for other pairs."""
    layout = structure.layout
    random = frozenset(layout.shared) - structure.points
    if layout.enumerated and not layout.latents:  # the joint posterior is computed by Bayes' rule
        joint = "+".join(layout.enumerated)
        return Dependencies({joint: random}, {joint: random})
    if layout.latents and len(layout.latents) + len(random) > 1:
        return None
    alone: dict[str, frozenset[str]] = dict.fromkeys(layout.latents, frozenset())
    return Dependencies(alone, {name: read for name, read in alone.items() if name in structure.model_sites})


def _probed(pair: "Pair", x: Tensor) -> Tensor:
    """Return the rows to probe: a few of a declared pair; of any other one many, from all over the data.

    Rows of a hand-written program may differ in what is masked, and a masked density shows no dependency.
    """
    if pair.structure.rows is not None:
        return x
    count = PROBED_ROWS if pair.declared else max(PROBED_ROWS, min(len(x), ROWS_OF_A_BATCH // 2))
    apart = 1 if pair.declared else max(1, len(x) // count)
    return x[torch.arange(count, device=x.device) * apart % len(x)]


def read_dependencies(pair: "Pair", x: Tensor) -> Dependencies:
    """Find the latents that each distribution depends on: those whose perturbation changes its log density.

    One batch holds one copy of the rows for each latent, which is perturbed in that copy, so that each program runs
    once. The programs run again, with one latent perturbed at a time, where a change may be a rounding error, for
    random global latents (a batch has one value of them), and for programs that reject so large a batch.
    """
    layout, structure = pair.layout, pair.structure
    rows = _probed(pair, x)
    latents = (*layout.latents, *structure.model_only)
    random = [name for name in layout.shared if name not in pair.structure.points]
    with quiet(pair, x), Unweighed(), Discretised(pair.relaxed):
        seeds.set_noise(seeds.mix(0, seeds.ANALYSIS), x.device)
        copies, traces = _copied(pair, rows, x, latents)
        guide, model = samples(unpack(traces[0], structure.unpacked)), samples(traces[1])
        nodes = {**model, **guide}
        latents = tuple(name for name in latents if name in nodes)
        rows = structure.few(x, PROBED_ROWS) if not copies.base else rows
        base = {name: copies.first(name) if name in copies.base else nodes[name]["value"] for name in latents}
        scores = _scores(guide, model, copies.base or base, layout)
        reads, unclear = _moves(scores, [*copies.copy] if copies.base else [], len(rows))
        if again := [*random, *(unclear if copies.base else latents)]:
            given = {**base, **{name: guide[name]["value"] for name in layout.shared}}
            sites, first = _conditioned(pair, rows, given, base)
            for name in again:
                _, other = _conditioned(pair, rows, {**given, name: moved(sites[name])}, base)
                for key in (key for key in first if key[1] != name):
                    (reads[key].discard if torch.equal(first[key], other[key]) else reads[key].add)(name)
    certain = frozenset(name for name in latents if name in guide and isinstance(unwrapped(guide[name]["fn"]), Certain))
    for name in (name for name in layout.latents if name not in nodes):  # not in these rows: nothing is known
        reads["guide", name], reads["model", name] = ({*layout.latents, *random} - {name} for _ in range(2))
    return Dependencies(_of_latents("guide", reads, layout), _of_latents("model", reads, layout), certain)


Reads = dict[tuple[str, str], set[str]]
"""Names of the latents that each conditional distribution, ("guide" or "model", latent), depends on."""
Scores = Mapping[tuple[str, str], Tensor]
"""Log density of the values of each conditional distribution, or the location of a point."""
Drawn = Mapping[str, Tensor]
"""Values of latents, by name."""


def _copied(pair: "Pair", rows: Tensor, x: Tensor, latents: Sequence[str]) -> tuple["_Copies", Traces]:
    """Run both programs on copies of the rows with perturbed latents; on a few rows alone where they reject that."""
    if pair.structure.rows is None:
        with suppress(Exception):  # whatever a program raises on so large a batch
            return _run_copies(pair, rows, latents)
    return _run_copies(pair, pair.structure.few(x, PROBED_ROWS), ())


def _run_copies(pair: "Pair", rows: Tensor, latents: Sequence[str]) -> tuple["_Copies", Traces]:
    """Run both programs on a batch of the rows, an unchanged copy, and one copy per latent with it perturbed."""
    copies = _Copies(latents, pair.layout, len(rows))
    with pair.own_store(), copies:
        return copies, run(pair, rows.repeat(2 + len(latents) if latents else 1, *(1,) * (rows.dim() - 1)))


def _of_latents(side: str, reads: Reads, layout: Layout) -> dict[str, frozenset[str]]:
    """Return the dependencies among the guide's latents on one side, followed through model-only latents."""
    known, out = {*layout.latents, *layout.shared}, {}
    for name in (name for name in layout.latents if (side, name) in reads):
        found: set[str] = set()
        while more := reads[side, name].union(*(reads[side, z] for z in found - known)) - found:
            found |= more
        out[name] = frozenset(found & known - {name})
    return out


class _Copies(poutine.messenger.Messenger):
    """Pyro handler that gives all copies of the rows the same latent values, with one latent perturbed in each copy."""

    def __init__(self, names: Sequence[str], layout: Layout, rows: int) -> None:
        super().__init__()
        self.copy = {name: i for i, name in enumerate(names, 2)}  # after the rows, and a copy where nothing is moved
        self.layout, self.rows = layout, rows
        self.base: dict[str, Tensor] = {}
        self.axis: dict[str, int] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        name, value = msg["name"], msg["value"]
        if name not in self.copy or name in self.base:  # the model gets the guide's values
            return
        axis = value.dim() - len(msg["fn"].event_shape) + self.layout.dim
        if axis < 0 or value.shape[axis] % self.rows:
            return  # a global latent, or a batch that is no stack of copies
        row = torch.arange(value.shape[axis], device=value.device)
        base = value.index_select(axis, row % self.rows)
        mine = (row // self.rows == self.copy[name]).reshape(-1, *(1,) * (value.dim() - axis - 1))
        self.base[name], self.axis[name] = base, axis
        msg["value"] = torch.where(mine, moved({**msg, "value": base}), base)

    def first(self, name: str) -> Tensor:
        """Return the value of a latent in the first block of the batch, the rows themselves."""
        return self.base[name].narrow(self.axis[name], 0, self.rows)


def _scores(guide: Mapping[str, Any], model: Mapping[str, Any], values: Drawn, layout: Layout) -> Scores:
    """Return per (side, latent) the log density of `values`, `(rows, ...)`, or the location of a point distribution."""
    sides = (("guide", guide), ("model", model))
    return {(side, z): _trail(nodes[z], values[z], layout) for side, nodes in sides for z in values if z in nodes}


def _trail(node: Mapping[str, Any], value: Tensor, layout: Layout) -> Tensor:
    fn, rows = node["fn"], value.shape[value.dim() - len(node["fn"].event_shape) + layout.dim]
    base = unwrapped(fn)
    if isinstance(base, Certain) or is_point(fn):
        return rows_first(base.index if isinstance(base, Certain) else base.v, node, layout, rows)
    score = fn.log_prob(value).detach().movedim(layout.dim, 0)
    # Not more digits than its parameters have: equal rows differ by their rounding.
    score = score.to(value.dtype) if value.is_floating_point() else score
    return score.expand(rows, *score.shape[1:]).reshape(rows, -1)


def _moves(scores: Scores, latents: Sequence[str], rows: int) -> tuple[Reads, list[str]]:
    """Return the dependencies of each distribution from the scores of all copies, and the latents to test again."""
    reads: Reads = {}
    unclear: set[str] = set()
    for (side, name), score in scores.items():
        first, *others = score.split(rows)
        copies = dict(zip(["", *latents] if latents else [], others, strict=True))
        rounding = ROUNDING * torch.finfo(first.dtype).eps if first.is_floating_point() else 0.0
        # Equal copies differ where a program uses random numbers outside sample sites.
        noisy = bool(latents) and _differ(first, copies[""], CLEAR_CHANGE)
        reads[side, name] = {z for z in latents if z != name and _differ(first, copies[z], rounding)}
        unclear |= {z for z in reads[side, name] if noisy or not _differ(first, copies[z], CLEAR_CHANGE)}
    return reads, sorted(unclear)


def _differ(first: Tensor, other: Tensor, relative: float) -> bool:
    """Return whether any score changes by more than `relative` times 1 + its size; infinite ones, by any change."""
    change = (other - first).double().abs()
    return not bool(((other == first) | (change <= relative * (1 + first.double().abs()))).all())


def _conditioned(pair: "Pair", x: Tensor, given: Drawn, values: Drawn) -> tuple[dict[str, Any], Scores]:
    """Run both programs conditioned on the values `given`; return their sites, and the scores of `values`."""
    seeds.set_noise(0, x.device)  # all other samples stay the same
    with poutine.condition(data=dict(given)):
        guide = samples(pair.guide_trace(x))
    model = samples(pair.model_trace(x, given))
    return {**model, **guide}, _scores(guide, model, values, pair.layout)


def weights_of(pair: "Pair") -> list[tuple[str, str, float]]:
    """Return type, device and sum of every parameter and buffer of a pair, as a key that detects changed weights."""
    tensors = (t.detach() for t in (*pair.parameters(), *pair.buffers()))
    return [(str(t.dtype), str(t.device), float(t.double().sum())) for t in tensors]
