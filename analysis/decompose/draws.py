"""Draws of a pair over a data set, chunk by chunk: what surgery, collapse and the report read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Bernoulli, Categorical

from pvae.distributions.exponential import FullRankNormals, Members, Normals
from pvae.distributions.exponential_codes import CertainCodes, Codes
from pvae.distributions.exponential_product import product
from pvae.distributions.relaxed import Discretised
from pvae.errors import DataError, DeclarationError
from pvae.pair import densities as traces
from pvae.pair.code_usage import Tally, grid_of, shared_prior, tally
from pvae.pair.densities import Unweighed, closed_kl, log_prob, rows_first, sum_over
from pvae.pair.enumeration import Table, read_table
from pvae.pair.layout import Layout, is_point, samples, unwrapped
from pvae.pair.pair import Pair
from pvae.pair.running import quiet as quiet_pair
from pvae.pair.structure import ROWS_AT_ONCE
from pvae.util import seeds

KEPT = 2**29
"""Bytes of posterior parameters that draws hold on to; larger ones (full rank, long codes) are read off again."""
LARGE = 1e12
"""Nats of a KL that no prior but an impossible one (`IMPOSSIBLE`, -1e30) costs."""


def accept(pair: Pair, x: Any) -> Tensor:
    """`Pair.accept`, with a word for whoever passes something else than a pair."""
    if not isinstance(pair, Pair):
        hint = " Pass its .pair." if isinstance(getattr(pair, "pair", None), Pair) else ""
        raise DeclarationError(f"pair: expected a pvae.Pair; got {type(pair).__name__}.{hint}")
    if pair.implicit:
        raise DataError(
            "pair: expected a model that scores data; got a generator without a likelihood, where nothing is inferred: "
            "it has no ELBO, no evidence and no codes. Compare its samples with data: pvae two-sample."
        )
    rows = pair.accept(x)
    pair.frame.require(rows)
    return rows


@contextmanager
def quiet(pair: Pair, x: Tensor, seed: int) -> Iterator[None]:
    """`pvae.pair.pair.quiet` with the draws of an analysis seeded, and without weights that handlers put on sites.

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
    """The n priors (all alike where it reads no parents); those of codes are in `prior`."""
    normal: Normals | None
    """Location and standard deviation of every coordinate of a (full-rank) normal posterior."""
    kl: Tensor | None
    """KL(q || p) in closed form where torch knows it, `(n,)`."""
    point: bool = False
    """Whether the guide sets it to a point: `log_q` is then 0, or minus the log determinant of the map to it."""
    tally: Tally | None = None
    """Of a grid of codes, what the posteriors of all rows add up to: there whether or not `q` was kept."""
    prior: Tensor | None = None
    """Of codes, log p of the states of `q`, `(P, K)`, where it is factorised and the same for all rows."""

    @property
    def certain(self) -> bool:
        """Whether it is a code known for certain."""
        return isinstance(self.q, CertainCodes)

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


def require_likelihood(pair: Pair, caller: str) -> None:
    """Refuse a pair whose latents determine x: p(x | z) at another z than the guide's own has no value.

    Raises:
        DataError: naming what is determined.
    """
    if found := pair.structure.determined:
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
    posterior, prior = _members(q, layout, n), _prior(p, layout, n)
    log_p = torch.zeros_like(value[:, 0]) if p is None else _score(p, prior, value, layout)
    certain = isinstance(posterior, CertainCodes)
    return LatentDraw(
        value=value,
        log_q=_score(q, posterior, value, layout),
        log_p=log_p,
        q=posterior,
        p=None if isinstance(prior, Codes) else prior,
        normal=_normal(posterior),
        kl=None if p is None else -log_p if certain else _closed(q, p, posterior, prior, layout),
        point=is_point(q["fn"]),
        tally=tally(posterior, prior, grid_of(q), bits=isinstance(unwrapped(q["fn"]), Bernoulli)),
        prior=shared_prior(prior),
    )


def _members(node: Any, layout: Layout, n: int) -> Members | None:
    found = None if node is None else traces.members(node, layout, n)
    return None if found is None else found.double()


def _prior(node: Any, layout: Layout, n: int) -> Members | None:
    """The priors of n rows: of codes a single member, where they are one."""
    found = None if node is None else traces.shared_codes(node, layout)
    return _members(node, layout, n) if found is None else found.double()


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


def _closed(q: Any, p: Any, posterior: Members | None, prior: Members | None, layout: Layout) -> Tensor | None:
    """KL(q || p) in closed form; of codes from the same numbers in float64 that everything else is made of."""
    if isinstance(posterior, Codes) and isinstance(prior, Codes):
        return codes_kl(posterior, prior)
    value = closed_kl(q, p, layout, 0, 1)
    return None if value is None else value.double()


def codes_kl(q: Codes, p: Codes) -> Tensor:
    """KL(q || p) of factorised codes, `(n,)`, nats; infinite where q has what p has not."""
    found = (q.logits.exp() * (q.logits - p.logits)).sum((1, 2))
    return torch.where(found > LARGE, torch.inf, found)


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
        summed = [samples(model_trace)[name] for name in layout.enumerated]
        return Draw(
            _expected_reconstruction(table) + outside, {"+".join(layout.enumerated): _codes(table, n, summed)}, *rest
        )
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


def _codes(table: Table, n: int, nodes: Sequence[Any]) -> LatentDraw:
    """The joint state of all enumerated sites as one code."""
    weights, prior = (t.double().reshape(-1, n).T[:, None] for t in (table.joint, table.latent))
    q, p = Codes(weights), Codes(prior)
    value = q.sample()
    counted = _tally_of_states(q, p, nodes)
    return LatentDraw(
        value, q.log_prob(value), p.log_prob(value), q, None, None, codes_kl(q, p), tally=counted, prior=shared_prior(p)
    )


def _tally_of_states(q: Codes, p: Codes, nodes: Sequence[Any]) -> Tally | None:
    """The tally of the one site that is summed out, position by position; of several, that of their joint state."""
    fn = nodes[0]["fn"]
    if len(nodes) > 1 or not fn.event_shape or not isinstance(unwrapped(fn), Categorical | Bernoulli):
        return tally(q, p)
    states = fn.enumerate_support(expand=False).reshape(q.states, -1).long()
    one_hot = torch.nn.functional.one_hot(states).double()  # (S, P, K)
    marginals = [Codes(torch.einsum("ns,spk->npk", t.logits[:, 0].exp(), one_hot).log()) for t in (q, p)]
    apart = torch.einsum("pk,spk->s", marginals[1].logits[0], one_hot)
    prior = marginals[1] if torch.allclose(apart, p.logits[0, 0], rtol=0, atol=1e-6) else None
    return tally(marginals[0], prior, grid_of(nodes[0]), bits=isinstance(unwrapped(fn), Bernoulli))


# ---------------------------------------------------------------------- all rows


def draw(pair: Pair, x: Tensor, chunk: int = ROWS_AT_ONCE) -> Draw:
    """One draw for every row of `x`, `chunk` rows at a time."""
    parts = []
    with same_globals(pair, x):
        chunk = pair.structure.rows_at_once(chunk)
        for start in range(0, len(x), chunk):
            part = draw_chunk(pair, x[start : start + chunk], len(x))
            for latent in part.latents.values():
                _drop_large(latent, len(x))
            parts.append(part)
            if start:
                for name, latent in part.latents.items():
                    _fold(parts[0].latents[name], latent)
    latents = {name: _joined([p.latents[name] for p in parts]) for name in parts[0].latents}
    return Draw(torch.cat([p.reconstruction for p in parts]), latents, parts[0].shared, parts[0].points)


def relaxed_terms(pair: Pair, x: Tensor, samples: int, seed: int) -> Tensor | None:
    """The ELBO per datum of a pair whose relaxed latents are drawn relaxed, with the KL they declare, `(samples, n)`.

    None where no latent is relaxed.
    """
    if not pair.layout.relaxed:
        return None
    with quiet_pair(pair, x), Unweighed():
        seeds.set_noise(seeds.mix(seed, seeds.ANALYSIS), x.device)
        return torch.stack([_relaxed_draw(pair, x) for _ in range(samples)])


def _relaxed_draw(pair: Pair, x: Tensor) -> Tensor:
    parts = []
    with same_globals(pair, x):
        for part in x.split(pair.structure.rows_at_once()):
            terms = pair.terms(part, rows=len(x))
            kl = sum_over([value.double() for value in terms.kl.values()])
            parts.append(terms.reconstruction.double() - kl)
    return torch.cat(parts)


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
    if latent.q is not None and not latent.certain and 8 * n * latent.q.numbers > KEPT:
        latent.q = None
    if latent.p is not None and 8 * n * latent.p.numbers > KEPT:
        latent.p = None


def _fold(first: LatentDraw, other: LatentDraw) -> None:
    """Move what chunks add up to, or have in common, to the first of them."""
    if first.tally is not None and other.tally is not None:
        first.tally = first.tally + other.tally
    if first.prior is None or other.prior is None or not torch.equal(first.prior, other.prior):
        first.prior = None
    other.tally = other.prior = None


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
        elif f.name in ("point", "tally", "prior"):
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
