"""Posterior samples of a whole data set, in chunks of rows, with their log densities and distributions."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence

from pvae.analysis.aggregate.entry import same_globals
from pvae.analysis.decompose.codes import codes_kl
from pvae.analysis.figures.estimate import refuse
from pvae.distributions import ROW_COST, CertainCodes, Codes, FullRankNormals, Members, Normals, log_density
from pvae.pair import ROWS_OF_A_BATCH, JointStates, Layout, Pair, eliminated, is_masked, read_joint_states, sum_over
from pvae.pair.code_usage import Tally, described, shared_prior, tally
from pvae.pair.densities import closed_kl, full_size, log_prob, members, presence, rows_first, shared_codes
from pvae.pair.layout import samples, unwrapped

PARAMETER_BYTES = 2**29
"""Largest number of bytes of a latent's posterior parameters that are kept in memory for all rows; larger ones (full
rank, long codes) are recomputed by running the guide again."""
Sites = Mapping[str, Any]
"""Nodes of the sample sites of a Pyro trace, by name."""


@dataclass
class LatentDraw:
    """One sample of one latent for every row of the data, with its log densities and distributions; float64."""

    value: Tensor
    """Sampled values, `(n, D)`, with event dimensions flattened."""
    log_q: Tensor
    """Log posterior density log q(z | x, earlier latents), `(n,)`, nats."""
    log_p: Tensor
    """Log prior density log p(z | parents), `(n,)`, nats."""
    q: Members | None
    """Posteriors of the n rows as members of an exponential family; None for other families, and where their parameters
    are too large to keep."""
    p: Members | None
    """Priors of the n rows as members of an exponential family (all equal if the prior has no parents); None for other
    families and for discrete latents, which have `prior`."""
    normal: Normals | None
    """Mean and standard deviation of every coordinate of a diagonal or full-rank normal posterior; None for others."""
    kl: Tensor | None
    """Closed-form KL(q || p) of every row, `(n,)`, nats; None where torch has no closed form."""
    code_kl: Tensor | None = None
    """Exact KL(q || p) of every code, `(n, P)`, nats; None unless the codes are independent in q and p."""
    point: bool = False
    """True if the guide sets the latent to a point (Delta): `log_q` is then 0, in a flow minus a log determinant."""
    present: Tensor | None = None
    """An integer per row, `(n,)`, that tells which elements of the latent are present: the same number for the same
    elements, 0 for none. None where no mask hides any and no batch lacks the site."""
    tally: Tally | None = None
    """Code probabilities and entropies of a discrete latent, summed over all rows; None for continuous latents."""
    prior: Tensor | None = None
    """Log prior probabilities of a discrete latent, `(P, K)` for K states at P positions, if they factorise and are the
    same for all rows; else None."""

    @property
    def partial(self) -> bool:
        """True if some rows lack this latent or a part of it: absent from their batch, or masked."""
        return self.present is not None and len(self.present.unique()) > 1

    @property
    def certain(self) -> bool:
        """True for a deterministic discrete latent, whose posterior gives one code probability one."""
        return isinstance(self.q, CertainCodes)

    @property
    def work(self) -> int:
        """Number of multiplications for one log posterior density, also where the posteriors were too large to keep."""
        counted = 0 if self.tally is None else self.tally.positions * ROW_COST  # others are scored by the guide
        return counted if self.q is None else self.q.work

    @property
    def normal_prior(self) -> Normals | None:
        """Means and standard deviations of a diagonal normal prior; None for other priors."""
        return self.p if isinstance(self.p, Normals) else None

    @property
    def number_kl(self) -> Tensor | None:
        """Closed-form KL(q || p) of every number of `value`, `(n, D)`, nats; None where unknown."""
        found = self.coordinate_kl if self.code_kl is None else self.code_kl
        found = self.kl[:, None] if found is None and self.kl is not None else found
        return None if found is None or found.shape != self.value.shape else found

    @property
    def coordinate_kl(self) -> Tensor | None:
        """Closed-form KL(q || p) of every coordinate, `(n, D)`, nats; None unless posterior and prior are normal."""
        q, p = self.normal, self.normal_prior
        return None if q is None or p is None else kl_divergence(Normal(q.loc, q.scale), Normal(p.loc, p.scale))


@dataclass
class Draw:
    """One sample of all latents for every row of the data, with the log likelihood log p(x | z)."""

    reconstruction: Tensor
    """Log likelihood log p(x | z) of every row, `(n,)`, nats, float64."""
    latents: dict[str, LatentDraw]
    shared: dict[str, float]
    """Log ratio log q - log p of every global latent, by name, nats for the whole data set."""
    points: bool = True
    """True if the guide sets every global latent to a point (Delta)."""
    size: int = 1
    """Number of rows by which terms of the whole data set are divided: that of the data, or as the data plate says."""

    def flat(self, names: Sequence[str]) -> Tensor:
        """Return the sampled values of several latents, concatenated to `(n, D)`."""
        return torch.cat([self.latents[name].value for name in names], 1)


def draw_chunk(pair: Pair, x: Tensor, size: int = 0) -> Draw:
    """Return one sample of all latents for a chunk of rows of a data set of `size` rows (0: of the chunk alone)."""
    guide_trace, model_trace = pair.traces(x)
    guide, model = samples(guide_trace), samples(model_trace)
    layout, n = pair.layout, len(x)
    size = full_size(model_trace, layout, size or n)
    if layout.enumerated:
        reconstruction, latents = _summed(guide, model_trace, layout, n, size)
    else:
        reconstruction = _observed(model, layout, size).expand(n)
        latents = {name: _absent(pair.structure.shapes[name].numel, reconstruction) for name in layout.latents}
        for name in (name for name in latents if name in guide):
            latents[name] = _latent(guide[name], model.get(name), layout, n, name in pair.structure.points)
    shared = {name: _log_ratio(guide[name], model.get(name)) for name in layout.shared if name in guide}
    return Draw(reconstruction, latents, shared, pair.structure.points.issuperset(layout.shared), size)


def _observed(nodes: Sites, layout: Layout, size: int, known: Collection[str] = ()) -> Tensor:
    """Return log p(x | z) per row; sites outside the data plate are divided by `size`, sites in `known` left out."""
    names = [name for name in layout.observed if name not in known and name in nodes]
    found = [log_prob(nodes[name], layout, 0, size).double() for name in names]
    return sum_over(found) if found else torch.zeros((), dtype=torch.float64)  # a number: goes with any device


def _latent(q: Any, p: Any, layout: Layout, n: int, point: bool = False) -> LatentDraw:
    value = rows_first(q["value"], q, layout, n).double()
    posterior = _double(members(q, layout, n))
    prior = None if p is None else _double(shared_codes(p, layout) or members(p, layout, n))
    log_p = torch.zeros_like(value[:, 0]) if p is None else _score(p, prior, value, layout)
    certain, each = isinstance(posterior, CertainCodes), codes_kl(posterior, prior)
    kl = _double(closed_kl(q, p, layout, 0, 1)) if p is not None and each is None and not certain else None
    normal = Normals(posterior.loc, posterior.scale) if isinstance(posterior, FullRankNormals) else posterior
    return LatentDraw(
        value=value, log_q=_score(q, posterior, value, layout), log_p=log_p, q=posterior,
        p=None if isinstance(prior, Codes) else prior, normal=normal if isinstance(normal, Normals) else None,
        kl=-log_p if certain and p is not None else kl if each is None else each.sum(1), code_kl=each, point=point,
        present=presence(q, p, layout, n), tally=tally(posterior, prior, **described(q)),
        prior=shared_prior(prior),
    )  # fmt: skip


def _absent(numel: int, like: Tensor) -> LatentDraw:
    """Return the draw of a latent that a batch lacks: its terms are 0."""
    zero = torch.zeros_like(like)
    nowhere = torch.zeros_like(zero, dtype=torch.int64)
    return LatentDraw(zero[:, None].expand(-1, numel), zero, zero, None, None, None, zero, present=nowhere)


def _double(found: Any) -> Any:
    """Return a tensor or members of an exponential family as float64; None stays None."""
    return None if found is None else found.double()


def _score(node: Any, known: Members | None, value: Tensor, layout: Layout) -> Tensor:
    """Return the log density of a site's value per row, float64, from float64 parameters where these are known."""
    weighed = is_masked(node) or not (node["scale"].__class__ is float and node["scale"] == 1.0)
    return log_prob(node, layout, 0).double() if known is None or weighed else known.log_prob(value)


def _log_ratio(q: Any, p: Any) -> float:
    """Return log q - log p of a global latent, nats for the whole data set."""
    return float(log_density(q["fn"], q["value"]).sum() - (log_density(p["fn"], p["value"]).sum() if p else 0.0))


def _summed(guide: Sites, trace: Trace, layout: Layout, n: int, size: int) -> tuple[Tensor, dict[str, LatentDraw]]:
    """Return log p(x | z) per row, and the latents, of a model that sums out discrete sites.

    The latents are the joint code of these sites or, if the guide has a latent, that latent, with the sites summed out
    of its prior and of the likelihood.
    """
    model = samples(trace)
    if layout.eliminated or len(layout.latents) > 1:
        return _eliminated(guide, trace, layout, n, size)
    table = read_joint_states(model, layout, 0)
    outside = _observed(model, layout, size, table.logs)
    if not layout.latents:
        expected = sum_over([table.expected(name) for name in layout.observed if name in table.logs]).double()
        codes = _codes(table, n, [model[name] for name in layout.enumerated])
        return expected + outside, {"+".join(layout.enumerated): codes}
    name = layout.latents[0]
    latent = _latent(guide[name], None, layout, n)
    latent.log_p = table.log_sum(table.latent).double()
    return table.log_sum(table.joint).double() - latent.log_p + outside, {name: latent}


def _eliminated(guide: Sites, trace: Trace, layout: Layout, n: int, size: int) -> tuple[Tensor, dict[str, LatentDraw]]:
    """Return log p(x | z) per row with all enumerated sites summed out, and the guide's latents.

    Raises:
        DataError: the prior of a latent depends on an enumerated site, so that it is no factor of its own.
    """
    total, names = eliminated(trace, layout, 0)
    refuse(read := [name for name in layout.latents if name in names], "refused.read_prior", names=read, layout=layout)
    model = samples(trace)
    outside = _observed(model, layout, size, names)
    latents = {name: _latent(guide[name], model.get(name), layout, n) for name in layout.latents if name in guide}
    return total.double() + outside, latents


def _codes(table: JointStates, n: int, nodes: Sequence[Any]) -> LatentDraw:
    """Return the joint state of all enumerated sites as one discrete latent, with its exact posterior."""
    weights, prior = (t.double().reshape(-1, n).T[:, None] for t in (table.joint, table.latent))
    q, p = Codes(weights), Codes(prior)
    value, counted, each = q.sample(), _tally_of_states(q, p, nodes), codes_kl(q, p)
    known: Any = {"kl": None if each is None else each.sum(1), "code_kl": each, "prior": shared_prior(p)}
    return LatentDraw(value, q.log_prob(value), p.log_prob(value), q, None, None, tally=counted, **known)


def _tally_of_states(q: Codes, p: Codes, nodes: Sequence[Any]) -> Tally | None:
    """Return code probabilities summed over rows: by position for one enumerated site, else of the joint state."""
    fn = nodes[0]["fn"]
    if len(nodes) > 1 or not fn.event_shape or not isinstance(unwrapped(fn), Categorical | Bernoulli):
        return tally(q, p)
    states = fn.enumerate_support(expand=False).reshape(q.states, -1).long()
    one_hot = torch.nn.functional.one_hot(states).double()  # (S, P, K)
    marginals = [Codes(torch.einsum("ns,spk->npk", t.logits[:, 0].exp(), one_hot).log()) for t in (q, p)]
    apart = torch.einsum("pk,spk->s", marginals[1].logits[0], one_hot)
    prior = marginals[1] if torch.allclose(apart, p.logits[0, 0], rtol=0, atol=1e-6) else None
    return tally(marginals[0], prior, **described(nodes[0]))


def draw(pair: Pair, x: Tensor, chunk: int = ROWS_OF_A_BATCH) -> Draw:
    """Return one sample of all latents for every row of `x`, at most `chunk` rows at a time."""
    parts = []
    with same_globals(pair, x):
        chunk = pair.structure.rows_at_once(chunk)
        for start in range(0, len(x), chunk):
            part = draw_chunk(pair, x[start : start + chunk], len(x))
            for latent in part.latents.values():
                _drop_large(latent, len(x))
            parts.append(part)
            for name, latent in part.latents.items() if start else ():
                for early in [p for p in parts if name not in p.latents]:  # this batch is the first to have it
                    early.latents[name] = _absent(pair.structure.shapes[name].numel, early.reconstruction)
                _fold(parts[0].latents[name], latent)
        names = [name for name in (pair.layout.latents or parts[0].latents) if name in parts[0].latents]
    latents = {name: _joined([p.latents[name] for p in parts]) for name in names}
    return Draw(torch.cat([p.reconstruction for p in parts]), latents, parts[0].shared, parts[0].points, parts[0].size)


def _drop_large(latent: LatentDraw, n: int) -> None:
    """Drop parameters of posterior and prior that would take more than `PARAMETER_BYTES` for all n rows."""
    if latent.q is not None and not latent.certain and 8 * n * latent.q.numbers > PARAMETER_BYTES:
        latent.q = None
    if latent.p is not None and 8 * n * latent.p.numbers > PARAMETER_BYTES:
        latent.p = None


def _fold(first: LatentDraw, other: LatentDraw) -> None:
    """Add the code sums of a chunk to those of the first chunk, which keeps its `prior` only if both have the same."""
    if first.tally is not None and other.tally is not None:
        first.tally = first.tally + other.tally
    if first.prior is None or other.prior is None or not torch.equal(first.prior, other.prior):
        first.prior = None
    other.tally = other.prior = None


def _joined(parts: list[LatentDraw]) -> LatentDraw:
    """Concatenate the samples of one latent for consecutive chunks of rows."""
    if len(parts) == 1:
        return parts[0]
    out: dict[str, Any] = {}
    for f in fields(LatentDraw):
        column = [getattr(part, f.name) for part in parts]
        if f.name == "present" and any(present is not None for present in column):
            # Where a chunk has no mask, all elements are present.
            all_of = max(1, *(int(present.max()) for present in column if present is not None))
            ones = [torch.full_like(part.log_q, all_of, dtype=torch.int64) for part in parts]
            out[f.name] = torch.cat([one if own is None else own for own, one in zip(column, ones, strict=True)])
        elif f.name in ("point", "tally", "prior"):
            out[f.name] = column[0]
        elif any(part is None for part in column) or f.name == "normal":
            out[f.name] = None
        else:
            out[f.name] = column[0].joined(column[1:]) if isinstance(column[0], Members) else torch.cat(column)
    normal = [part.normal for part in parts if part.normal is not None]
    # A diagonal normal posterior is its own marginal: kept once.
    out["normal"] = out["q"] if isinstance(out["q"], Normals) else normal[0].joined(normal[1:]) if normal else None
    return LatentDraw(**out)
