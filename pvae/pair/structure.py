"""Structure of a pair (sites, shapes, dependencies), read once by running it and checked against every batch."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Categorical, OneHotCategorical

from pvae.component import Shape
from pvae.distributions.base import Rounded
from pvae.distributions.codes import Certain
from pvae.distributions.relaxed import Discretised, twin
from pvae.errors import DeclarationError
from pvae.pair.densities import Unweighed, moved, rows_first
from pvae.pair.layout import Layout, SiteShape, is_point, samples, unwrapped
from pvae.pair.running import quiet, run
from pvae.util import seeds

if TYPE_CHECKING:
    from pvae.pair.pair import Pair

ROWS_OF_A_BATCH = 1000
"""Largest number of rows in one batch of an analysis."""
PROBABILITIES_AT_ONCE = 2**20
"""Largest number of code probabilities in one batch of an analysis (8 MiB in float64, held in a dozen copies)."""
PROBED_ROWS = 16
"""Number of rows on which the dependencies between latents are found."""
ROUNDING = 8
"""Largest difference of a log density between equal rows of a batch that counts as rounding, in units of eps."""
CLEAR_CHANGE = 1e-3
"""Relative change of a log density above which it cannot be rounding; smaller changes are tested by a second run."""


@dataclass(frozen=True)
class Structure:
    """Properties of a pair that hold for any weights and any batch; relaxed latents are described as discrete codes."""

    event: Shape
    """Shape of a row of data."""
    layout: Layout
    """Names of the sites of the pair, and position of the data plate."""
    guide_sites: frozenset[str]
    """Names of all sample sites of the guide."""
    model_sites: frozenset[str]
    """Names of all sample sites of the model."""
    model_only: tuple[str, ...]
    """Latents of the model inside the data plate that the guide does not sample."""
    points: frozenset[str]
    """Latents whose posterior in the guide is a point mass (Delta)."""
    determined: tuple[str, ...]
    """Observed sites that are a deterministic function of the latents (Delta likelihood)."""
    codes: frozenset[str]
    """Latents of the guide that are discrete codes."""
    states: int
    """Number of joint states of the latents, of guide and model, that the loss enumerates; 1 if there are none."""
    parameters_per_row: Mapping[str, int]
    """Size of each latent's parameters in one row: D of a vector, grid positions times K (probabilities) of codes."""
    shapes: Mapping[str, SiteShape]
    """Position of the row dimension in values of each latent inside the data plate."""
    elements: int | None
    """Number of observed elements of one row; None unless every observed site is discrete."""
    nodes: tuple[frozenset[str], frozenset[str]]
    """Names of all trace nodes of the guide, and of the model."""

    def rows_at_once(self, most: int | None = None) -> int:
        """Return the largest batch size, at most `most`, with up to `PROBABILITIES_AT_ONCE` parameters per latent."""
        widest = max((self.parameters_per_row[name] for name in self.layout.latents), default=1)
        return max(1, min(most or ROWS_OF_A_BATCH, PROBABILITIES_AT_ONCE // widest))

    def hold(self, guide_trace: Trace | None, model_trace: Trace | None = None) -> None:
        """Check that the traces of a batch have the same sample sites as the first run of the pair.

        Raises:
            DeclarationError: a site is missing or new; analyses would otherwise ignore it silently.
        """
        if guide_trace is not None and guide_trace.nodes.keys() != self.nodes[0]:
            _require_same("guide", samples(guide_trace), self.guide_sites)
        if model_trace is not None and model_trace.nodes.keys() != self.nodes[1]:
            _require_same("model", samples(model_trace), self.model_sites)


def _require_same(side: str, found: Collection[str], known: Collection[str]) -> None:
    missing, new = (", ".join(sorted(names)) for names in ({*known} - {*found}, {*found} - {*known}))
    if missing or new:
        got = " and ".join(f"{word} {names}" for word, names in (("without", missing), ("with", new)) if names)
        raise DeclarationError(
            f"pair.{side}: expected the sample sites of its first run ({', '.join(sorted(known))}) on every batch; got "
            f"a batch {got}. Sample the same sites whatever the data are, and mask what a row lacks (poutine.mask)."
        )


def read_structure(guide_trace: Trace, model_trace: Trace, layout: Layout, event: Shape, rows: int) -> Structure:
    """Return the structure of a pair, read off one trace of each program on `rows` rows and its layout."""
    guide, model = samples(guide_trace), samples(model_trace)
    twins = {name: twin(guide[name]["fn"]) for name in (*layout.latents, *layout.shared)}
    hidden = {name: node for name, node in model.items() if name not in guide and not node["is_observed"]}
    summed = [(guide | model)[name]["fn"] for name in (*layout.expected, *layout.enumerated)]
    observed = [model[name] for name in layout.observed]
    return Structure(
        event=event,
        layout=layout,
        guide_sites=frozenset(guide),
        model_sites=frozenset(model),
        model_only=tuple(name for name, node in hidden.items() if layout.holds(node)),
        points=frozenset(name for name, fn in twins.items() if is_point(fn)),
        determined=tuple(name for name in layout.observed if is_point(model[name]["fn"])),
        codes=frozenset(name for name, fn in twins.items() if is_code(fn)),
        states=math.prod(int(fn.enumerate_support(expand=False).shape[0]) for fn in summed),
        parameters_per_row={name: numbers_of(twins[name]) for name in layout.latents},
        shapes={name: SiteShape.of(twins[name].shape(), twins[name], layout) for name in layout.latents},
        elements=_discrete_elements(observed, rows),
        nodes=(frozenset(guide_trace.nodes), frozenset(model_trace.nodes)),
    )


def is_code(fn: Any) -> bool:
    """Return whether a distribution is over discrete codes: categorical, one-hot, or deterministic (nearest code)."""
    return isinstance(unwrapped(fn), Categorical | OneHotCategorical | Certain)


def numbers_of(fn: Any) -> int:
    """Return the size of a site's parameters in one row: D of a vector, grid positions times K of codes."""
    base = unwrapped(fn)
    wide = base.logits.shape[-1] if isinstance(base, Categorical) else base.states if isinstance(base, Certain) else 1
    return int(fn.event_shape.numel()) * wide


def _discrete_elements(observed: Sequence[Mapping[str, Any]], rows: int) -> int | None:
    try:
        discrete = [isinstance(n["fn"], Rounded) or unwrapped(n["fn"]).support.is_discrete for n in observed]
    except NotImplementedError:  # a distribution that does not say
        return None
    return sum(n["value"].numel() // rows for n in observed) if all(discrete) else None


# ---------------------------------------------------------------------- which distribution reads which latent


@dataclass(frozen=True)
class Dependencies:
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
        return frozenset(name for name, read in self.model.items() if read & self._inferred_from(name))

    def _inferred_from(self, name: str) -> set[str]:
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
    if len(layout.latents) + len(random) > 1:
        return None
    alone: dict[str, frozenset[str]] = dict.fromkeys(layout.latents, frozenset())
    return Dependencies(alone, {name: read for name, read in alone.items() if name in structure.model_sites})


def read_dependencies(pair: Pair, x: Tensor) -> Dependencies:
    """Find the latents that each distribution depends on: those whose perturbation changes its log density.

    One batch holds one copy of the rows for each latent, which is perturbed in that copy, so that each program runs
    once. The programs run again, with one latent perturbed at a time, where a change may be a rounding error, for
    random global latents (a batch has one value of them), and for programs that reject so large a batch.
    """
    layout, rows = pair.layout, x[torch.arange(PROBED_ROWS, device=x.device) % len(x)]
    latents = (*layout.latents, *pair.structure.model_only)
    random = [name for name in layout.shared if name not in pair.structure.points]
    with quiet(pair, x), Unweighed(), Discretised():
        seeds.set_noise(seeds.mix(0, seeds.ANALYSIS), x.device)
        try:
            copies, traces = _run_copies(pair, rows, latents)
        except (ValueError, RuntimeError, IndexError):
            rows = x[:PROBED_ROWS]
            copies, traces = _run_copies(pair, rows, ())
        pair.structure.hold(*traces)
        guide, model = (samples(trace) for trace in traces)
        nodes = {**model, **guide}
        base = {name: copies.first(name) if name in copies.base else nodes[name]["value"] for name in latents}
        reads, unclear = _moves(_scores(guide, model, copies.base or base, layout), [*copies.base], len(rows))
        if again := [*random, *(unclear if copies.base else latents)]:
            _ask_again(pair, rows, base, {name: guide[name]["value"] for name in layout.shared}, again, reads)
    certain = frozenset(name for name in layout.latents if isinstance(unwrapped(guide[name]["fn"]), Certain))
    return Dependencies(_of_latents("guide", reads, layout), _of_latents("model", reads, layout), certain)


Reads = dict[tuple[str, str], set[str]]
"""Names of the latents that each conditional distribution, ("guide" or "model", latent), depends on."""


def _run_copies(pair: Pair, rows: Tensor, latents: Sequence[str]) -> tuple[_Copies, tuple[Trace, Trace]]:
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


class _Copies(Messenger):
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
        row = torch.arange(value.shape[axis], device=value.device)
        base = value.index_select(axis, row % self.rows)
        mine = (row // self.rows == self.copy[name]).reshape(-1, *(1,) * (value.dim() - axis - 1))
        self.base[name], self.axis[name] = base, axis
        msg["value"] = torch.where(mine, moved({**msg, "value": base}), base)

    def first(self, name: str) -> Tensor:
        """Return the value of a latent in the first block of the batch, the rows themselves."""
        return self.base[name].narrow(self.axis[name], 0, self.rows)


def _scores(
    guide: Mapping[str, Any], model: Mapping[str, Any], values: Mapping[str, Tensor], layout: Layout
) -> dict[tuple[str, str], Tensor]:
    """Return per (side, latent) the log density of `values`, `(rows, ...)`, or the location of a point distribution."""
    return {
        (side, name): _trail(nodes[name], value, layout)
        for side, nodes in (("guide", guide), ("model", model))
        for name, value in values.items()
        if name in nodes
    }


def _trail(node: Mapping[str, Any], value: Tensor, layout: Layout) -> Tensor:
    fn, rows = node["fn"], value.shape[value.dim() - len(node["fn"].event_shape) + layout.dim]
    if isinstance(unwrapped(fn), Certain):
        return rows_first(unwrapped(fn).index, node, layout, rows)
    if is_point(fn):
        return rows_first(unwrapped(fn).v, node, layout, rows)
    score = fn.log_prob(value).detach().movedim(layout.dim, 0)
    return score.expand(rows, *score.shape[1:]).reshape(rows, -1)


def _moves(scores: Mapping[tuple[str, str], Tensor], latents: Sequence[str], rows: int) -> tuple[Reads, list[str]]:
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
    same = (other == first) | (change <= relative * (1 + first.double().abs()))
    return not bool(same.all())


def _ask_again(
    pair: Pair, x: Tensor, base: Mapping[str, Tensor], shared: Mapping[str, Tensor], names: Sequence[str], reads: Reads
) -> None:
    """Perturb the latents `names` one at a time in separate runs, and update `reads` by the densities that change."""
    nodes, first = _conditioned(pair, x, {**base, **shared}, base)
    for name in names:
        _, other = _conditioned(pair, x, {**base, **shared, name: moved(nodes[name])}, base)
        for key in (key for key in first if key[1] != name):
            (reads[key].discard if torch.equal(first[key], other[key]) else reads[key].add)(name)


def _conditioned(
    pair: Pair, x: Tensor, given: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[tuple[str, str], Tensor]]:
    """Run both programs conditioned on the values `given`; return their sites, and the scores of `values`."""
    seeds.set_noise(0, x.device)  # all other samples stay the same
    with poutine.condition(data=dict(given)):
        guide = samples(pair.guide_trace(x))
    model = samples(pair.model_trace(x, given))
    return {**model, **guide}, _scores(guide, model, values, pair.layout)


def weights_of(pair: Pair) -> list[tuple[str, str, float]]:
    """Return type, device and sum of every parameter and buffer of a pair, as a key that detects changed weights."""
    tensors = (t.detach() for t in (*pair.parameters(), *pair.buffers()))
    return [(str(t.dtype), str(t.device), float(t.double().sum())) for t in tensors]
