"""Dependencies of a pair: the latents that each conditional distribution reads, found by perturbing their values."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from pvae.distributions import Certain, Discretised
from pvae.pair import densities, running
from pvae.pair.layout import Layout, is_point, samples, unwrapped
from pvae.pair.structure import ROWS_OF_A_BATCH, Structure, unpack
from pvae.util import Record, seeds

if TYPE_CHECKING:
    from pvae.pair.pair import Pair

PROBED_ROWS = 16
"""Number of rows on which the dependencies between latents are found."""


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

    Both programs run once for each latent, with it perturbed, and all others and the noise as they were.
    """
    layout, structure = pair.layout, pair.structure
    rows = _probed(pair, x)
    random = [name for name in layout.shared if name not in structure.points]
    with running.quiet(pair, x), densities.Unweighed(), Discretised(pair.relaxed):
        seeds.set_noise(seeds.mix(0, seeds.ANALYSIS), x.device)
        with pair.own_store():
            traces = running.run(pair, rows)
        guide, model = samples(unpack(traces[0], structure.unpacked)), samples(traces[1])
        nodes = {**model, **guide}
        base = {z: nodes[z]["value"] for z in (*layout.latents, *structure.model_only) if z in nodes}
        given = {**base, **{name: guide[name]["value"] for name in layout.shared}}
        sites, first = _conditioned(pair, rows, given, base)
        reads: Reads = {key: set() for key in first}
        for name in (*random, *base):
            _, other = _conditioned(pair, rows, {**given, name: densities.moved(sites[name])}, base)
            for key in (key for key in first if key[1] != name and not torch.equal(first[key], other[key])):
                reads[key].add(name)
    certain = frozenset(name for name in base if name in guide and isinstance(unwrapped(guide[name]["fn"]), Certain))
    for name in (name for name in layout.latents if name not in nodes):  # not in these rows: nothing is known
        reads["guide", name], reads["model", name] = ({*layout.latents, *random} - {name} for _ in range(2))
    return Dependencies(_of_latents("guide", reads, layout), _of_latents("model", reads, layout), certain)


Reads = dict[tuple[str, str], set[str]]
"""Names of the latents that each conditional distribution, ("guide" or "model", latent), depends on."""
Scores = Mapping[tuple[str, str], Tensor]
"""Log density of the values of each conditional distribution, or the location of a point."""
Drawn = Mapping[str, Tensor]
"""Values of latents, by name."""


def _of_latents(side: str, reads: Reads, layout: Layout) -> dict[str, frozenset[str]]:
    """Return the dependencies among the guide's latents on one side, followed through model-only latents."""
    known, out = {*layout.latents, *layout.shared}, {}
    for name in (name for name in layout.latents if (side, name) in reads):
        found: set[str] = set()
        while more := reads[side, name].union(*(reads[side, z] for z in found - known)) - found:
            found |= more
        out[name] = frozenset(found & known - {name})
    return out


def _scores(guide: Mapping[str, Any], model: Mapping[str, Any], values: Drawn, layout: Layout) -> Scores:
    """Return per (side, latent) the log density of `values`, `(rows, ...)`, or the location of a point distribution."""
    sides = (("guide", guide), ("model", model))
    return {(side, z): _trail(nodes[z], values[z], layout) for side, nodes in sides for z in values if z in nodes}


def _trail(node: Mapping[str, Any], value: Tensor, layout: Layout) -> Tensor:
    fn, rows = node["fn"], value.shape[value.dim() - len(node["fn"].event_shape) + layout.dim]
    base = unwrapped(fn)
    if isinstance(base, Certain) or is_point(fn):
        return densities.rows_first(base.index if isinstance(base, Certain) else base.v, node, layout, rows)
    score = fn.log_prob(value).detach().movedim(layout.dim, 0)
    return score.expand(rows, *score.shape[1:]).reshape(rows, -1)


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
