"""Draws of a pair over a data set, chunk by chunk: what surgery, collapse and the report read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pvae import seeds, traces
from pvae.determined import Rounded
from pvae.discrete import Discretised
from pvae.enumeration import Table, read_table
from pvae.errors import DataError, DeclarationError
from pvae.exponential import Codes, FullRankNormals, Members, Normals, product
from pvae.pair import Pair
from pvae.pair import quiet as quiet_pair
from pvae.traces import (
    Layout,
    Unweighed,
    closed_kl,
    is_point,
    log_prob,
    moved,
    rows_first,
    samples,
    sum_over,
    unwrapped,
)

CHUNK = 1000
Roots = tuple[set[str], set[str]]
KEPT = 2**29
"""Bytes of posterior parameters that draws hold on to; larger ones (full rank, long codes) are read off again."""


def accept(pair: Pair, x: Any) -> Tensor:
    """`Pair.accept`, with a word for whoever passes something else than a pair."""
    if not isinstance(pair, Pair):
        hint = " Pass its .pair." if isinstance(getattr(pair, "pair", None), Pair) else ""
        raise DeclarationError(f"pair: expected a pvae.Pair; got {type(pair).__name__}.{hint}")
    rows = pair.accept(x)
    pair.frame.require(rows)
    return rows


@contextmanager
def quiet(pair: Pair, x: Tensor, seed: int) -> Iterator[None]:
    """`pvae.pair.quiet` with the draws of an analysis seeded, and without weights that handlers put on sites.

    What poutine.scale does to a loss is no part of the ELBO that is analysed. Relaxed latents are taken as the codes
    they stand for.
    """
    with quiet_pair(pair, x), Unweighed(), Discretised():
        seeds.set_noise(seeds.mix(seed, seeds.ANALYSIS), x.device)
        yield


@dataclass
class LatentDraw:
    """One draw of one latent for every datum, float64."""

    value: Tensor
    """`(n, D)`, event dimensions flattened."""
    log_q: Tensor
    """log q(z | x, latents before it), `(n,)`."""
    log_p: Tensor
    """log p(z | parents), `(n,)`."""
    q: Members | None
    """The n posteriors, of an exponential family; None for others, and where they are too large to keep."""
    p: Members | None
    """The n priors (all alike where it reads no parents)."""
    normal: Normals | None
    """Location and standard deviation of every coordinate of a (full-rank) normal posterior."""
    kl: Tensor | None
    """KL(q || p) in closed form where torch knows it, `(n,)`."""
    point: bool = False
    """Whether the guide sets it to a point: `log_q` is then 0, or minus the log determinant of the map to it."""

    @property
    def loc(self) -> Tensor | None:
        """Posterior mean of a normal, `(n, D)`."""
        return None if self.normal is None else self.normal.loc

    @property
    def scale(self) -> Tensor | None:
        """Its standard deviations."""
        return None if self.normal is None else self.normal.scale

    @property
    def prior_loc(self) -> Tensor | None:
        """Mean of a diagonal normal prior, `(n, D)`."""
        return self.p.loc if isinstance(self.p, Normals) else None

    @property
    def prior_scale(self) -> Tensor | None:
        """Its standard deviations."""
        return self.p.scale if isinstance(self.p, Normals) else None


@dataclass
class Draw:
    """One draw of all latents for every datum."""

    reconstruction: Tensor
    """log p(x | z), `(n,)`, float64."""
    latents: dict[str, LatentDraw]
    shared: dict[str, float]
    """log q - log p of every global latent, nats for the whole data set."""
    points: bool = True
    """Whether every global latent is a point (a Delta), so that nothing about it is drawn."""

    def flat(self, names: Sequence[str]) -> Tensor:
        """Values of several latents side by side, `(n, D)`."""
        return torch.cat([self.latents[name].value for name in names], 1)


def members(pair: Pair, x: Tensor, latents: Sequence[str]) -> Members | None:
    """The posteriors of some latents as members of an exponential family; None where one is of another kind.

    Call it inside `quiet`. A posterior that reads other latents is that at the guide's own draw of them.
    """
    nodes = samples(pair.guide_trace(x))
    found = [traces.members(nodes[name], pair.layout, len(x)) for name in latents]
    known = [f for f in found if f is not None]
    return product(known) if len(known) == len(found) else None


def flat_values(pair: Pair, x: Tensor, latents: Sequence[str]) -> Tensor:
    """One draw of some latents for every row, side by side, `(n, D)`, float64."""
    nodes = samples(pair.guide_trace(x))
    return torch.cat([rows_first(nodes[z]["value"], nodes[z], pair.layout, len(x)).double() for z in latents], 1)


def determined(pair: Pair, x: Tensor) -> tuple[list[str], list[str]]:
    """Latents of single data that the guide sets to points, and observations that are points given the latents.

    Call it inside `quiet`.
    """
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        guide_trace, model_trace = pair.traces(x[:2])
    guide, model = samples(guide_trace), samples(model_trace)
    latents = [name for name in pair.layout.latents if is_point(guide[name]["fn"])]
    return latents, [name for name in pair.layout.observed if is_point(model[name]["fn"])]


def discrete_elements(pair: Pair, x: Tensor) -> int | None:
    """Numbers to a datum, where every observed site is discrete; else None. Call it inside `quiet`."""
    nodes = [samples(pair.traces(x[:2])[1])[name] for name in pair.layout.observed]
    try:
        discrete = [isinstance(n["fn"], Rounded) or unwrapped(n["fn"]).support.is_discrete for n in nodes]
    except NotImplementedError:  # a distribution that does not say
        return None
    if not all(discrete):
        return None
    return sum(n["value"].numel() // len(x[:2]) for n in nodes)


def require_likelihood(pair: Pair, x: Tensor, caller: str) -> None:
    """Refuse a pair whose latents determine x: p(x | z) at another z than the guide's own has no value.

    Raises:
        DataError: naming what is determined. Call it inside `quiet`.
    """
    if found := determined(pair, x)[1]:
        raise DataError(
            f"{caller}: expected a density p(x | z); got {', '.join(found)} determined by the latents. Its log p(x) is "
            f"known through the guide: use evidence."
        )


# ---------------------------------------------------------------------- one chunk


def draw_chunk(pair: Pair, x: Tensor, size: int = 0) -> Draw:
    """One draw for the rows of a chunk of a data set of `size` (by itself unless said)."""
    guide_trace, model_trace = pair.traces(x)
    layout = pair.layout
    if layout.enumerated:
        return _draw_summed(pair, guide_trace, model_trace, len(x), size or len(x))
    p = samples(model_trace)
    reconstruction = _observed(model_trace, layout, size or len(x)).expand(len(x))
    latents = {name: _latent(samples(guide_trace)[name], p.get(name), layout, len(x)) for name in layout.latents}
    return Draw(reconstruction, latents, _shared(guide_trace, model_trace, layout), points(guide_trace, layout))


def _observed(model_trace: Trace, layout: Layout, size: int, known: Sequence[str] = ()) -> Tensor:
    """log p(x | z) per datum; a site outside the data plate is shared among `size` rows."""
    nodes = samples(model_trace)
    found = [log_prob(nodes[name], layout, 0, size).double() for name in layout.observed if name not in known]
    return sum_over(found) if found else torch.zeros((), dtype=torch.float64)  # a number: goes with any device


def _latent(q: Any, p: Any, layout: Layout, n: int) -> LatentDraw:
    value = rows_first(q["value"], q, layout, n).double()
    posterior, prior = _members(q, layout, n), _members(p, layout, n)
    return LatentDraw(
        value=value,
        log_q=_score(q, posterior, value, layout),
        log_p=torch.zeros_like(value[:, 0]) if p is None else _score(p, prior, value, layout),
        q=posterior,
        p=prior,
        normal=_normal(posterior),
        kl=None if p is None else _closed(q, p, layout),
        point=is_point(q["fn"]),
    )


def _members(node: Any, layout: Layout, n: int) -> Members | None:
    found = None if node is None else traces.members(node, layout, n)
    return None if found is None else found.double()


def _score(node: Any, known: Members | None, value: Tensor, layout: Layout) -> Tensor:
    """Log density per datum in float64: of the same parameters where they are known, else as the site computes it."""
    weighed = node["mask"] is not None or not (node["scale"].__class__ is float and node["scale"] == 1.0)
    if known is None or weighed:
        return log_prob(node, layout, 0).double()
    return known.log_prob(value)


def _normal(q: Members | None) -> Normals | None:
    if isinstance(q, FullRankNormals):
        return Normals(q.loc, q.scale)
    return q if isinstance(q, Normals) else None


def _closed(q: Any, p: Any, layout: Layout) -> Tensor | None:
    value = closed_kl(q, p, layout, 0, 1)
    return None if value is None else value.double()


def _shared(guide_trace: Trace, model_trace: Trace, layout: Layout) -> dict[str, float]:
    guide, model, out = samples(guide_trace), samples(model_trace), {}
    for name in layout.shared:
        q, p = guide[name], model.get(name)
        out[name] = float(q["fn"].log_prob(q["value"]).sum() - (p["fn"].log_prob(p["value"]).sum() if p else 0.0))
    return out


def points(guide_trace: Trace, layout: Layout) -> bool:
    """Whether every global latent of the guide is a point."""
    return all(is_point(samples(guide_trace)[name]["fn"]) for name in layout.shared)


# ---------------------------------------------------------------------- with sites that are summed out


def _draw_summed(pair: Pair, guide_trace: Trace, model_trace: Trace, n: int, size: int) -> Draw:
    """A draw of a pair whose model has sites to sum over: they are latents where the guide has none, else left out."""
    layout = pair.layout
    rest = _shared(guide_trace, model_trace, layout), points(guide_trace, layout)
    table = read_table(model_trace, layout, 0)
    outside = _observed(model_trace, layout, size, list(table.logs))
    if not layout.latents:
        return Draw(_expected_reconstruction(table) + outside, {"+".join(layout.enumerated): _codes(table, n)}, *rest)
    if len(layout.latents) > 1:
        raise DataError(
            f"surgery: expected at most one latent in the guide beside enumerated ones ({', '.join(layout.enumerated)}"
            f"); got {', '.join(layout.latents)}. Give the discrete sites a guide."
        )
    name = layout.latents[0]
    latent = _latent(guide_trace.nodes[name], None, layout, n)
    latent.log_p = table.log_sum(table.latent).double()
    return Draw(table.log_sum(table.joint).double() - latent.log_p + outside, {name: latent}, *rest)


def _expected_reconstruction(table: Table) -> Tensor:
    return sum_over([table.expected(name) for name in table.layout.observed if name in table.logs]).double()


def _codes(table: Table, n: int) -> LatentDraw:
    """The joint state of all enumerated sites as one code."""
    weights, prior = (t.double().reshape(-1, n).T[:, None] for t in (table.joint, table.latent))
    q, p = Codes(weights), Codes(prior)
    value = q.sample()
    kl = (q.logits.exp() * (q.logits - p.logits)).sum((1, 2))
    return LatentDraw(value, q.log_prob(value), p.log_prob(value), q, p, None, kl)


# ---------------------------------------------------------------------- all rows


def draw(pair: Pair, x: Tensor, chunk: int = CHUNK) -> Draw:
    """One draw for every row of `x`, `chunk` rows at a time."""
    parts = []
    with same_globals(pair, x):
        for start in range(0, len(x), chunk):
            part = draw_chunk(pair, x[start : start + chunk], len(x))
            for latent in part.latents.values():
                _drop_large(latent, len(x))
            parts.append(part)
    latents = {name: _joined([p.latents[name] for p in parts]) for name in parts[0].latents}
    return Draw(torch.cat([p.reconstruction for p in parts]), latents, parts[0].shared, parts[0].points)


@contextmanager
def same_globals(pair: Pair, x: Tensor) -> Iterator[dict[str, Any]]:
    """A context in which every run of the programs sees one draw of the global latents; yields their sites."""
    if not pair.layout.shared:
        yield {}
        return
    nodes, fixed = samples(pair.guide_trace(x[:2])), Trace()
    for name in pair.layout.shared:
        fixed.nodes[name] = nodes[name]
    with ReplayMessenger(trace=fixed):
        yield {name: nodes[name] for name in pair.layout.shared}


def _drop_large(latent: LatentDraw, n: int) -> None:
    """Let go of parameters that would take more than `KEPT` bytes for all rows."""
    if latent.q is not None and 8 * n * latent.q.numbers > KEPT:
        latent.q = None
    if latent.p is not None and 8 * n * latent.p.numbers > KEPT:
        latent.p = None


def _joined(parts: list[LatentDraw]) -> LatentDraw:
    """Chunks of one latent in a row."""
    first, rest = parts[0], parts[1:]
    if not rest:
        return first
    out: dict[str, Any] = {}
    for f in fields(LatentDraw):
        column = [getattr(part, f.name) for part in parts]
        if column[0] is None or f.name == "normal":
            out[f.name] = None
        elif f.name == "point":
            out[f.name] = column[0]
        elif isinstance(column[0], Members):
            out[f.name] = column[0].joined(column[1:])
        else:
            out[f.name] = torch.cat(column)
    normal = [part.normal for part in parts if part.normal is not None]
    # A diagonal normal posterior is its own marginal: kept once.
    shared = isinstance(out["q"], Normals)
    out["normal"] = out["q"] if shared else normal[0].joined(normal[1:]) if normal else None
    return LatentDraw(**out)


# ---------------------------------------------------------------------- who reads whom


def first_level(pair: Pair, x: Tensor) -> Roots:
    """Latents whose posterior (first set) and prior (second set) depend on no other latent of the guide.

    Found by moving one latent at a time while the others stay: a density that changes reads it. Global latents
    that are random count as others; points do not.
    """
    rows = x[:16]
    with quiet(pair, x, 0), same_globals(pair, rows) as shared:
        if pair.layout.enumerated and not pair.layout.latents:
            return _summed_level(pair, shared)
        nodes = samples(pair.guide_trace(rows))
        at = {name: nodes[name] for name in pair.layout.latents}
        random = {name: node for name, node in shared.items() if not is_point(node["fn"])}
        base = {name: node["value"] for name, node in {**at, **random}.items()}
        q, p = _scores(pair, rows, base, base)
        readers: Roots = (set(), set())
        for name, node in {**at, **random}.items():
            changed = _scores(pair, rows, {**base, name: moved(node)}, base)
            for side, old, new in zip(readers, (q, p), changed, strict=True):
                side.update(z for z in new if z != name and not torch.equal(new[z], old[z]))
    names = pair.layout.latents
    return {z for z in names if z not in readers[0]}, {z for z in names if z in p and z not in readers[1]}


def _scores(
    pair: Pair, x: Tensor, given: Mapping[str, Tensor], value: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """log q and log p of every latent's `value` where the programs see the values `given`."""
    seeds.set_noise(0, x.device)  # what else is drawn stays
    with poutine.condition(data=dict(given)):
        guide = samples(pair.guide_trace(x))
    model = samples(pair.model_trace(x, given))
    names = pair.layout.latents
    q = {name: _trail(guide[name]["fn"], value[name]) for name in names}
    return q, {name: model[name]["fn"].log_prob(value[name]) for name in names if name in model}


def _trail(fn: Any, value: Tensor) -> Tensor:
    """What changes with a distribution: its density of a value, or the place of a point."""
    return unwrapped(fn).v if is_point(fn) else fn.log_prob(value)


def _summed_level(pair: Pair, shared: Mapping[str, Any]) -> Roots:
    """A code inferred by Bayes depends on nothing but x, unless global latents are random."""
    name = "+".join(pair.layout.enumerated)
    still = all(is_point(node["fn"]) for node in shared.values())
    return ({name}, {name}) if still else (set(), set())
