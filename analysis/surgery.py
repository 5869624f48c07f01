"""ELBO surgery: where every nat of the ELBO goes."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from pvae import seeds
from pvae.analysis.aggregated import AggregatedPosterior
from pvae.analysis.collapse import active_units, kl_per_dimension
from pvae.analysis.draws import Draw, LatentDraw, accept, draw, quiet
from pvae.analysis.estimate import Estimate, exact, over_draws
from pvae.errors import DataError
from pvae.pair import Pair
from pvae.traces import log_prob, samples

if TYPE_CHECKING:
    import pandas
    from rich.table import Table

Roots = tuple[set[str], set[str]]
JOINT_ROWS = 512
BATCH = 8192


@dataclass(frozen=True)
class LatentSurgery:
    """What one latent costs, nats per datum."""

    kl: Estimate
    """E[log q(z|.) - log p(z|.)]."""
    kl_exact: Estimate | None
    """The same in closed form, where torch knows it."""
    mutual_information: Estimate | None
    """I_q[x, z_l] under the exact aggregated posterior; None where q(z_l | .) reads other latents."""
    marginal_kl: Estimate | None
    """KL(q_agg(z_l) || p(z_l)); None where either side reads other latents."""
    kl_per_dimension: tuple[float, ...] | None
    """Mean closed-form KL of every coordinate, for normal posterior and normal prior."""
    active_units: int | None
    """Coordinates whose posterior mean varies over the data by more than 0.01 (variance)."""


@dataclass(frozen=True, repr=False)
class Surgery:
    """The ELBO of a data set, taken apart; nats per datum.

    `elbo = reconstruction - kl` and `kl = mutual_information + marginal_kl` hold exactly, because one set of
    draws serves every term. `mutual_information` is at most `log_n`.
    """

    n: int
    samples: int
    reconstruction: Estimate
    kl: Estimate
    kl_exact: Estimate | None
    mutual_information: Estimate | None
    marginal_kl: Estimate | None
    elbo: Estimate
    log_n: Estimate
    latents: dict[str, LatentSurgery]
    shared: dict[str, float] = field(default_factory=dict)
    """log q - log p of global latents, nats for the whole data set; no part of the figures per datum."""
    notes: tuple[str, ...] = ()

    def rows(self) -> Iterator[tuple[str, Estimate | None, str]]:
        """(term, figure, what it means) in reading order."""
        rest = " - global_kl" if self.shared else ""
        yield "elbo", self.elbo, f"reconstruction - kl{rest}, a lower bound of log p(x)"
        yield "reconstruction", self.reconstruction, "E_q log p(x | z)"
        yield "kl", self.kl, "E_q log q(z | x) - log p(z), the price of the code"
        yield "kl_exact", self.kl_exact, "the same in closed form"
        yield "mutual_information", self.mutual_information, f"I_q[x, z], at most log n = {self.log_n.value:.4f}"
        yield "marginal_kl", self.marginal_kl, "KL(q_agg || p), the most a better prior can win with this encoder"
        if self.shared:
            share = sum(self.shared.values()) / self.n
            yield "global_kl", Estimate(share), f"of {', '.join(self.shared)}: one draw for all data, divided by n"
        for name, latent in self.latents.items() if len(self.latents) > 1 else ():
            yield f"{name}.kl", latent.kl, f"the level {name} alone"
            yield f"{name}.mutual_information", latent.mutual_information, f"I_q[x, {name}]"
            yield f"{name}.marginal_kl", latent.marginal_kl, f"KL(q_agg({name}) || p({name}))"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        figures = {name: None if e is None else e.to_dict() for name, e, _ in self.rows()}
        latents = {
            name: {"kl_per_dimension": z.kl_per_dimension, "active_units": z.active_units}
            for name, z in self.latents.items()
        }
        return {
            "unit": "nats per datum",
            "n": self.n,
            "samples": self.samples,
            "log_n": self.log_n.value,
            "figures": figures,
            "latents": latents,
            "shared": self.shared,
            "notes": list(self.notes),
        }

    def to_frame(self) -> pandas.DataFrame:
        """One row per term: value, errors, kind."""
        import pandas

        rows = [{"term": name, **e.to_dict()} for name, e, _ in self.rows() if e is not None]
        return pandas.DataFrame(rows).set_index("term")

    def headline(self) -> str:
        """What a better prior could win, in one sentence."""
        if self.marginal_kl is None:
            return "marginal KL not available for this posterior"
        return (
            f"marginal KL {self.marginal_kl.value:.2f} nats: the most a better prior can win with this encoder "
            f"(on these {self.n} points)"
        )

    def _legend(self) -> tuple[str, ...]:
        """What a word in the table means, where it stands there."""
        if self.samples > 1:
            return ()
        return ("conservative: one draw cannot tell Monte Carlo noise from spread over data; take more samples",)

    def table(self) -> Table:
        """The figures as a rich table."""
        from rich.table import Table
        from rich.text import Text

        title = f"ELBO surgery, nats per datum (n = {self.n}, {self.samples} draw{'s' * (self.samples > 1)})"
        table = Table(
            title=title, caption="\n".join((self.headline(), *self.notes, *self._legend())), caption_justify="left"
        )
        for column, justify in (("term", "left"), ("value", "right"), ("std error", "right"), ("kind", "left")):
            table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        table.add_column("what it is")
        for name, e, meaning in self.rows():
            if e is not None:
                kind = e.kind.replace("_", " ") + (f", {e.note}" if e.note else "")
                error = f"{e.standard_error:.4f}" if e.standard_error else ""
                table.add_row(name, f"{e.value:.4f}", error, kind, Text(meaning))  # Text: no markup in I_q[x, z]
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [f"ELBO surgery, nats per datum, n = {self.n}, samples = {self.samples}"]
        lines += [f"{name:28s} {e}" for name, e, _ in self.rows() if e is not None]
        return "\n".join([*lines, self.headline(), *self.notes])

    def _repr_html_(self) -> str:
        body = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{e.value:.4f}</td><td>{e.standard_error:.4f}</td>"
            f"<td>{e.kind.replace('_', ' ')}</td><td>{html.escape(meaning)}</td></tr>"
            for name, e, meaning in self.rows()
            if e is not None
        )
        head = "<tr><th>term</th><th>nats</th><th>std error</th><th>kind</th><th></th></tr>"
        return f"<table><caption>n = {self.n}</caption>{head}{body}</table><p>{html.escape(self.headline())}</p>"


def surgery(
    pair: Pair,
    x: Tensor,
    samples: int = 1,
    seed: int = 0,
    *,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Surgery:
    r"""Take the ELBO of `pair` on the data `x` apart.

    (1/n) sum_i KL(q(z|x_i) || p(z)) = I_q[x, z] + KL(q_agg || p), with q_agg = (1/n) sum_i q(z|x_i) over all n
    rows. Each Monte Carlo term is a mean over the same draws z_i ~ q(z|x_i):

    - `kl`: log q(z_i|x_i) - log p(z_i)
    - `mutual_information`: log q(z_i|x_i) - log q_agg(z_i), with the sum over all rows in float64
    - `marginal_kl`: the difference of the two
    - `elbo`: log p(x_i|z_i) minus `kl`

    Where the guide has several levels, q_agg is that of all levels together (each level's density is evaluated
    at the shared z), on a stated subset of draws.

    Warning: with samples=1 a standard error cannot tell Monte Carlo noise from spread over the data; the total is
    given and called conservative.

    References:
        ELBO surgery (Hoffman, Johnson, 2016), http://approximateinference.org/accepted/HoffmanJohnson2016.pdf

    Arguments:
        pair: any Pyro pair.
        x: data `(n, *event)`.
        samples: draws per datum.
        seed: of the draws; the same seed, the same numbers.
        on_progress: called with (draws done, draws in all).

    Returns:
        Surgery; figures are estimates in nats per datum, `kl_exact` and `log_n` exact.

    Raises:
        DataError: `x` has no rows.
    """
    if samples < 1:
        raise DataError(f"surgery: expected at least one draw; got samples={samples}.")
    x = accept(pair, x)
    roots, bottom_up = first_level(pair, x), pair.reads_itself(x)
    with quiet(pair, x, seed):
        draws = [_lighter(draw(pair, x), bottom_up)]
        for done in range(1, samples):
            on_progress(done, samples)
            draws.append(_lighter(draw(pair, x), bottom_up, draws[0], roots))
        return _assemble(pair, x, draws, roots, seed)


def _lighter(d: Draw, bottom_up: set[str], first: Draw | None = None, roots: Roots = (set(), set())) -> Draw:
    """A draw without closed forms that are no expectations; parameters that never change are kept once."""
    for name, latent in d.latents.items():
        if name in bottom_up:
            latent.kl = latent.prior_loc = latent.prior_scale = None
        if first is not None and name in roots[0]:
            latent.loc, latent.scale = first.latents[name].loc, first.latents[name].scale
        if first is not None and name in roots[1]:
            latent.prior_loc, latent.prior_scale = first.latents[name].prior_loc, first.latents[name].prior_scale
    return d


def first_level(pair: Pair, x: Tensor) -> Roots:
    """Latents whose posterior (first set) and prior (second set) do not depend on other latents' values.

    Found by drawing twice: parameters that move read another latent.
    """
    with quiet(pair, x, 0):
        one, two = draw(pair, x[:16]), draw(pair, x[:16])

    def still(name: str, *fields: str) -> bool:
        pairs = [(getattr(one.latents[name], f), getattr(two.latents[name], f)) for f in fields]
        return all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)

    posterior = {name for name in one.latents if still(name, "loc", "scale")}
    return posterior, {name for name in one.latents if still(name, "prior_loc", "prior_scale")}


def _assemble(pair: Pair, x: Tensor, draws: list[Draw], roots: Roots, seed: int) -> Surgery:
    reconstruction = torch.stack([d.reconstruction for d in draws])
    log_q = torch.stack([sum_latents(d, "log_q") for d in draws])
    log_p = torch.stack([sum_latents(d, "log_p") for d in draws])
    kl = log_q - log_p
    information, notes = _joint_information(pair, x, draws, log_q, roots[0], seed)
    latents = {name: _latent(name, [d.latents[name] for d in draws], roots) for name in pair.layout.latents}
    closed = [latent.kl_exact for latent in latents.values()]
    mi = None if information is None else over_draws(information)
    return Surgery(
        n=len(x),
        samples=len(draws),
        reconstruction=over_draws(reconstruction),
        kl=over_draws(kl),
        kl_exact=_total([c for c in closed if c is not None]) if closed and None not in closed else None,
        mutual_information=mi,
        marginal_kl=None if mi is None or information is None else _marginal(kl, information, mi),
        elbo=over_draws(reconstruction - kl - sum(draws[0].shared.values()) / len(x)),
        log_n=exact(math.log(len(x))),
        latents=latents,
        shared=draws[0].shared,
        notes=notes,
    )


def sum_latents(d: Draw, name: str) -> Tensor:
    """Sum a field over all latents of a draw, `(n,)`."""
    return torch.stack([getattr(latent, name) for latent in d.latents.values()]).sum(0)


def _total(parts: list[Estimate]) -> Estimate:
    """The sum of closed-form KLs: exact when each is, else an estimate whose error adds up conservatively."""
    kind = "exact" if all(p.kind == "exact" for p in parts) else "estimate"
    return Estimate(sum(p.value for p in parts), sum(p.standard_error for p in parts), kind)  # type: ignore[arg-type]


def _marginal(kl: Tensor, information: Tensor, mi: Estimate) -> Estimate:
    """kl - information: term by term where both have all rows, else the difference of the means."""
    if kl.shape == information.shape:
        parts = over_draws(kl - information)
        return Estimate(float(kl.mean()) - mi.value, parts.standard_error, "estimate", parts.data_error, parts.note)
    error = math.hypot(over_draws(kl).standard_error, mi.standard_error)
    return Estimate(float(kl.mean()) - mi.value, error, "estimate", None, mi.note)


def _latent(name: str, draws: list[LatentDraw], roots: Roots) -> LatentSurgery:
    kl = torch.stack([d.log_q - d.log_p for d in draws])
    closed = [d.kl for d in draws if d.kl is not None]
    kl_exact = None
    if len(closed) == len(draws):
        alone = name in roots[0] and name in roots[1]
        kl_exact = exact(float(closed[0].mean())) if alone else over_draws(torch.stack(closed))
    mi = marginal = None
    if name in roots[0]:
        information = torch.stack([d.log_q for d in draws]) - _log_q_agg(draws)
        mi = over_draws(information)
        marginal = _marginal(kl, information, mi) if name in roots[1] else None
    return LatentSurgery(over_draws(kl), kl_exact, mi, marginal, kl_per_dimension(draws), active_units(draws[0]))


def _log_q_agg(draws: list[LatentDraw]) -> Tensor:
    """log q_agg of one latent's draws, `(samples, n)`."""
    loc, scale = draws[0].loc, draws[0].scale
    assert loc is not None  # noqa: S101 - first-level latents are normal
    assert scale is not None  # noqa: S101
    mixture = AggregatedPosterior(loc, scale)
    return torch.stack([mixture.log_prob(d.value) for d in draws])


# ---------------------------------------------------------------------- all latents together


def _joint_information(
    pair: Pair, x: Tensor, draws: list[Draw], log_q: Tensor, roots: set[str], seed: int
) -> tuple[Tensor | None, tuple[str, ...]]:
    """log q(z|x) - log q_agg(z) for the joint of all latents, `(samples, n)` or `(samples, subset)`."""
    latents = draws[0].latents
    if set(latents) <= roots:
        loc = torch.cat([latent.loc for latent in latents.values()], 1)  # type: ignore[misc]
        scale = torch.cat([latent.scale for latent in latents.values()], 1)  # type: ignore[misc]
        mixture = AggregatedPosterior(loc, scale)
        joint = [torch.cat([latent.value for latent in d.latents.values()], 1) for d in draws]
        return log_q - torch.stack([mixture.log_prob(z) for z in joint]), ()
    rows = torch.arange(len(x))
    if len(x) > JOINT_ROWS:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seeds.mix(seed, seeds.ANALYSIS, 1)))
        rows = order[:JOINT_ROWS].sort().values
    rows = rows.to(x.device)
    values = {name: latent.value[rows] for name, latent in latents.items()}
    log_aggregated = guide_log_mean(pair, x, values)
    note = f"joint I_q over {len(latents)} levels: {len(rows)} of {len(x)} draws, each under all {len(x)} components"
    return (log_q[:1, rows] - log_aggregated[None]), (note,)


def guide_log_mean(pair: Pair, x: Tensor, values: dict[str, Tensor]) -> Tensor:
    """log (1/n) sum_j q(z_i | x_j) for given values of all latents, by running the guide on every pair (i, j).

    Works for any guide: rows of a larger batch hold x_j beside z_i. Time is (rows of values) x n guide rows.

    Arguments:
        pair: any pair.
        x: the data of the components, `(n, *event)`.
        values: of every latent, `(m, D)`, in float64; cast to the type of the guide's own draws.

    Returns:
        `(m,)`, nats, exact over the n components.
    """
    shapes = {name: node["value"].shape[1:] for name, node in _sites(pair, x[:2])}
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    m, n = len(next(iter(values.values()))), len(x)
    per_block = max(1, BATCH // n)
    out = torch.empty(m, dtype=torch.float64, device=x.device)
    for start in range(0, m, per_block):
        block = {name: v[start : start + per_block] for name, v in values.items()}
        k = len(next(iter(block.values())))
        tiled = x.repeat(k, *(1,) * (x.dim() - 1))
        fixed = {name: v.to(dtype).repeat_interleave(n, 0).reshape(k * n, *shapes[name]) for name, v in block.items()}
        with poutine.condition(data=fixed):
            trace = pair.guide_trace(tiled)
        total = sum(log_prob(trace.nodes[name], pair.layout, 0).double() for name in values)
        out[start : start + k] = torch.as_tensor(total).reshape(k, n).logsumexp(1) - math.log(n)
    return out


def _sites(pair: Pair, x: Tensor) -> Iterator[tuple[str, dict[str, Any]]]:
    nodes = samples(pair.guide_trace(x))
    for name in pair.layout.latents:
        yield name, nodes[name]
