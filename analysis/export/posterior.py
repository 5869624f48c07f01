"""Posterior export: the draws of a guide with their densities and diagnostics, as Datasets that ArviZ reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from pvae import __version__
from pvae.analysis.bounds.psis import pareto_k
from pvae.analysis.decompose.draws import Draw, LatentDraw, accept, draw_chunk, quiet, same_globals
from pvae.analysis.export.datasets import NATS, Array, Posterior, Variable, dataset, text
from pvae.analysis.export.sites import PROBED, Sites, as_value, numpy_of, parameters_of, read_sites, rows_of, whole
from pvae.data import Split
from pvae.errors import DataError
from pvae.pair.layout import Layout, samples
from pvae.pair.pair import Pair
from pvae.pair.structure import ROWS_AT_ONCE
from pvae.runs.run import Run
from pvae.util import seeds

GIB = 1 << 30
DOUBLE = 8
"""Bytes of a float64."""
PREDICTIVE_ROWS = 20
PREDICTIVE_DRAWS = 10
ROUNDINGS = 8
"""Log weights are told apart from this many roundings of their largest term on."""
DRAW = ("chain", "draw")
LEVERS = {
    "posterior_predictive": "predictive_rows or predictive_draws",
    "observed_data": "predictive_rows",
    "prior": "draws",
}
"""What makes a group smaller, where it is not draws or rows."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Group:
    """Variables of one group."""

    variables: Mapping[str, Variable]
    missing: dict[str, str] = field(default_factory=dict)
    """Why a variable is not there."""
    absent: str = ""
    """Why the whole group is not."""

    @property
    def notes(self) -> dict[str, str]:
        """`missing` as attributes."""
        return {f"missing_{name}": text(why) for name, why in self.missing.items()}


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    pair: Pair
    split: Split
    rows: Tensor
    """Rows of the split, `(n,)`, on the CPU."""
    draws: int
    seed: int
    predictive_rows: int
    predictive_draws: int

    @cached_property
    def x(self) -> Tensor:
        """The rows as the pair takes them, `(n, *event)`."""
        return self.pair.accept(self.split.rows[self.rows.to(self.split.rows.device)])

    def quiet(self, counter: int) -> AbstractContextManager[None]:
        """Quiet, with noise of its own."""
        return quiet(self.pair, self.x, seeds.mix(self.seed, seeds.ANALYSIS, counter))


def posterior(
    run: Run,
    split: str = "test",
    draws: int = 100,
    rows: int | None = None,
    seed: int = 0,
    *,
    predictive_rows: int = PREDICTIVE_ROWS,
    predictive_draws: int = PREDICTIVE_DRAWS,
    memory: int = GIB,
    on_progress: Progress = lambda _done, _total: None,
) -> Posterior:
    """Draw every latent of a run's guide for the rows of a split, and keep what there is to say of the draws.

    Groups and their dims (a variable bears its site's name, made safe; the name as it is is its attribute `site`;
    its coordinates are `<name>_dim`, or `<name>_dim_0`, ... where there are several):

    - `posterior`: latents `(chain, draw, datum, ...)`, global ones `(chain, draw, ...)`, in the pair's own type. The
      draws are independent, so there is one chain; `datum` is the row in the split.
    - `sample_stats`, `(chain, draw, datum)`, nats, float64 (their differences cancel): `log_q` = log q(z|x), `log_p` =
      log p(z), `log_likelihood` = log p(x|z), `log_weight` = log p(x, z) - log q(z|x). Global latents have their
      log q - log p in `global_log_ratio` `(chain, draw)`, of which `log_weight` bears an equal share per row.
      Where the model sums its latents out there is neither `log_likelihood` nor `log_weight`.
    - `guide`: parameters of q(z|x) for all rows of the split, `(datum, ...)`: `<name>_loc` and `<name>_scale` of a
      diagonal normal, `<name>_probs` of a categorical, one-hot or Bernoulli. A posterior that reads other latents, or
      is of another family, is left out; the attribute `missing_<name>` says why.
    - `diagnostics`, `(datum)`: `elbo` and `log_evidence` (the importance-weighted bound over the draws), lower bounds
      in nats; `ess` of the weights, at most `draws`; `khat` of their tail, see `psis.pareto_k`; `<name>_kl` `(datum,
      ...)`, the closed KL(q || p) of every coordinate, nats, averaged over the draws of what it reads.
    - `prior`: draws of p(z), `(chain, draw, ...)`.
    - `posterior_predictive`: draws of p(x|z) `(chain, draw, datum_predictive, ...)` at the first draws of the first
      rows; `observed_data`: the same rows as they are.
    - `constant_data`, `(datum)`: `row`, and `label` where the split has labels.

    Arguments:
        run: a run with a checkpoint.
        split: "train", "validation" or "test".
        draws: per datum.
        rows: this many rows, drawn at random by `seed`, in their order; all unless said.
        seed: of all draws; the same seed, the same numbers.
        predictive_rows: rows of `posterior_predictive`.
        predictive_draws: draws of each.
        memory: bytes that all arrays together may take.
        on_progress: called with (draws done, draws in all).

    Returns:
        Posterior.

    Raises:
        DataError: a count below 1, or arrays beyond `memory`; nothing has been drawn then.
        DeclarationError: no split of that name.
    """
    _require_counts(draws=draws, rows=rows, predictive_rows=predictive_rows, predictive_draws=predictive_draws)
    part = run.data.split(split)
    chosen = seeds.subset(len(part), rows, seed)
    few, some = min(predictive_rows, len(chosen)), min(predictive_draws, draws)
    request = Request(run.pair, part, chosen, draws, seed, few, some)
    sites = read_sites(run.pair, accept(run.pair, part.rows[:PROBED]))
    require_memory(sizes(request, sites), memory)
    origin = {"inference_library": "pvae", "inference_library_version": __version__}
    name = {"run": text(run.name), "run_id": text(str(run.files.manifest.get("id", run.path.name)))}
    return export(request, sites, {**origin, **name, "split": split, "seed": seed}, on_progress)


def _require_counts(**counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count < 1:
            raise DataError(f"{name}: expected at least 1; got {count}.")


# ---------------------------------------------------------------------- memory


def sizes(request: Request, sites: Sites) -> dict[str, int]:
    """Bytes of every array that `request` leads to, by `<group>/<variable>`; nothing is drawn."""
    n, whole_split, draws = len(request.rows), len(request.split), request.draws
    found = {f"posterior/{site.name}": draws * n * site.bytes for site in sites.latents}
    found |= {f"posterior/{site.name}": draws * site.bytes for site in sites.shared}
    found |= {f"sample_stats/{name}": draws * n * DOUBLE for name in ("log_q", "log_p", "log_likelihood", "log_weight")}
    found |= {f"prior/{site.name}": draws * site.bytes for site in (*sites.latents, *sites.shared)}
    for site in sites.latents:
        found[f"diagnostics/{site.name}_kl"] = n * site.size * DOUBLE if site.site in sites.closed else 0
        for key, values in sites.parameters.get(site.site, {}).items():
            found[f"guide/{site.name}_{key}"] = whole_split * values.nbytes
    for site in sites.observed:
        found[f"observed_data/{site.name}"] = request.predictive_rows * site.bytes
        found[f"posterior_predictive/{site.name}"] = request.predictive_draws * found[f"observed_data/{site.name}"]
    return found


def require_memory(found: Mapping[str, int], memory: int) -> None:
    """Refuse arrays of more than `memory` bytes together; raises DataError that names the largest."""
    total = sum(found.values())
    if total > memory:
        largest = max(found, key=found.__getitem__)
        group = largest.partition("/")[0]
        raise DataError(
            f"posterior: expected arrays of at most {memory} bytes together; got {total} bytes, of which {largest} "
            f"takes {found[largest]}. Lower {LEVERS.get(group, 'draws or rows')}, or raise memory."
        )


# ---------------------------------------------------------------------- the draws


class Drawn:
    """Draws of all latents for all rows, filled chunk by chunk: no array but those kept grows with the rows."""

    def __init__(self, request: Request, sites: Sites) -> None:
        self.request, self.sites = request, sites
        n, draws = len(request.rows), request.draws
        self.values = {site.site: site.empty(1, draws, n) for site in sites.latents}
        self.values |= {site.site: site.empty(1, draws) for site in sites.shared}
        self.log_q, self.log_p, self.log_likelihood = (np.empty((1, draws, n)) for _ in range(3))
        self.global_log_ratio = np.zeros((1, draws))
        points = [name for name in request.pair.layout.latents if name in request.pair.structure.points]
        self.points = [] if request.pair.structure.determined else points
        """Codes of an autoencoder."""
        self.kl = {site.site: np.zeros((n, *site.tail)) for site in sites.latents if site.site in sites.closed}

    def fill(self, on_progress: Progress) -> None:
        """Draw; global latents are drawn once for all rows of a draw."""
        pair, x = self.request.pair, self.request.x
        with quiet(pair, x, self.request.seed):
            for draw in range(self.request.draws):
                with same_globals(pair, x) as shared:
                    for site in self.sites.shared:
                        self.values[site.site][0, draw] = numpy_of(whole(shared[site.site]))
                    for start in range(0, len(x), ROWS_AT_ONCE):
                        rows = slice(start, start + ROWS_AT_ONCE)
                        self._keep(draw, rows, draw_chunk(pair, x[rows], len(x)))
                on_progress(draw + 1, self.request.draws)

    def _keep(self, draw: int, rows: slice, part: Draw) -> None:
        at = (0, draw, rows)
        self.log_likelihood[at] = numpy_of(part.reconstruction)
        self.log_q[at] = sum(numpy_of(latent.log_q) for latent in part.latents.values())
        self.log_p[at] = sum(numpy_of(latent.log_p) for latent in part.latents.values())
        self.global_log_ratio[0, draw] = sum(part.shared.values())
        for name, latent in part.latents.items():
            kept = self.values[name][at]
            kept[...] = numpy_of(latent.value).reshape(kept.shape)
            kl = _kl(latent) if name in self.kl else None
            if kl is not None:
                mean = self.kl[name][rows]
                mean += numpy_of(kl).reshape(mean.shape) / self.request.draws

    @cached_property
    def log_weight(self) -> Array:
        """log p(x, z) - log q(z | x), `(1, draws, n)`, with an equal share of the global latents' ratio."""
        share = self.global_log_ratio[..., None] / len(self.request.rows)
        return np.asarray(self.log_likelihood + self.log_p - self.log_q - share)

    # -- as groups

    def posterior(self) -> Group:
        """The draws."""
        per_row = {
            site.name: ((*DRAW, "datum", *site.dims), self.values[site.site], site.attrs) for site in self.sites.latents
        }
        shared = {site.name: ((*DRAW, *site.dims), self.values[site.site], site.attrs) for site in self.sites.shared}
        return Group({**per_row, **shared})

    def sample_stats(self) -> Group:
        """Their densities."""
        columns = {"log_q": self.log_q, "log_p": self.log_p}
        why = self._expected()
        if not why:
            columns |= {"log_likelihood": self.log_likelihood, "log_weight": self.log_weight}
        found: dict[str, Variable] = {name: ((*DRAW, "datum"), values, NATS) for name, values in columns.items()}
        if self.sites.shared:
            found["global_log_ratio"] = (DRAW, self.global_log_ratio, NATS)
        return Group(found, dict.fromkeys(("log_likelihood", "log_weight"), why) if why else {})

    def _expected(self) -> str:
        """Why single draws have no weights: the model sums latents out, or a code is a point; else ""."""
        if self.sites.summed:
            return f"the model sums out {', '.join(self.sites.summed)}"
        return f"{', '.join(self.points)}: a point has no density" if self.points else ""

    def diagnostics(self) -> Group:
        """Per datum: bounds, and how far the weights can be trusted."""
        found: dict[str, Variable] = {}
        if not self.points:
            found["elbo"] = (("datum",), self.log_weight[0].mean(0), NATS)
        for site in self.sites.latents:
            if site.site in self.kl:
                found[f"{site.name}_kl"] = (("datum", *site.dims), self.kl[site.site], {**NATS, **site.attrs})
        names = ", ".join(site.name for site in self.sites.shared)
        why = f"expected latents of single data only; got global {names}" if names else self._expected()
        if not why:
            return Group({**found, **self._weights()})
        return Group(found, dict.fromkeys(("log_evidence", "ess", "khat", *(["elbo"] if self.points else [])), why))

    def _weights(self) -> dict[str, Variable]:
        weights = torch.from_numpy(self.log_weight[0])
        first, second = weights.logsumexp(0), (2 * weights).logsumexp(0)
        magnitude = sum(np.abs(part[0]).max(0) for part in (self.log_likelihood, self.log_p, self.log_q))
        resolution = torch.from_numpy(magnitude * ROUNDINGS * torch.finfo(self.request.x.dtype).eps)
        khat = pareto_k(weights, len(weights), resolution)
        return {
            "log_evidence": (("datum",), numpy_of(first - math.log(len(weights))), NATS),
            "ess": (("datum",), numpy_of((2 * first - second).exp()), {}),
            "khat": (("datum",), numpy_of(khat), {}),
        }


def _kl(latent: LatentDraw) -> Tensor | None:
    """KL(q || p) of every coordinate in closed form, nats, `(n, D)`; None where one of them is no diagonal normal."""
    loc, scale, prior_loc, prior_scale = latent.loc, latent.scale, latent.prior_loc, latent.prior_scale
    if loc is None or scale is None or prior_loc is None or prior_scale is None:
        return None
    return torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(prior_loc, prior_scale))


# ---------------------------------------------------------------------- the other groups


def guide(request: Request, sites: Sites) -> Group:
    """Parameters of q(z|x) for all rows of the split, chunk by chunk."""
    pair, n, layout = request.pair, len(request.split), request.pair.layout
    shown = [site for site in sites.latents if site.site in sites.parameters]
    found: dict[str, Variable] = {
        f"{site.name}_{key}": (
            ("datum", *(*site.dims, f"{site.name}_code")[: one.ndim]),
            np.empty((n, *one.shape), one.dtype),
            site.attrs,
        )
        for site in shown
        for key, one in sites.parameters[site.site].items()
    }
    with request.quiet(0):
        for start in range(0, n, ROWS_AT_ONCE) if shown else ():
            x = pair.accept(request.split.rows[start : start + ROWS_AT_ONCE])
            nodes = samples(pair.guide_trace(x))
            for site in shown:
                for key, t in parameters_of(nodes[site.site], layout, len(x)).items():
                    found[f"{site.name}_{key}"][1][start : start + len(x)] = numpy_of(t)
    names = {site.site: site.name for site in sites.latents}
    return Group(found, {names[site]: why for site, why in sites.hidden.items()})


def prior(request: Request, sites: Sites) -> Group:
    """Draws of the model's latents, one run of the model each, so that draws share no global latent."""
    pair, n = request.pair, len(request.x)
    with request.quiet(1):
        draws = [
            dict(_values_of_prior(samples(pair.simulate(x)), sites, pair.layout, len(x)))
            for x in (request.x[torch.tensor([i % n, (i + 1) % n])] for i in range(request.draws))
        ]
    every = [site for site in (*sites.latents, *sites.shared) if site.site in draws[0]]
    stacked = {site: np.stack([draw[site.site] for draw in draws])[None] for site in every}
    return Group({site.name: ((*DRAW, *site.dims), values, site.attrs) for site, values in stacked.items()})


def _values_of_prior(nodes: Mapping[str, Any], sites: Sites, layout: Layout, count: int) -> Iterator[tuple[str, Array]]:
    """The first row's latents in a run of the model, and the global ones; those of the guide alone are not there."""
    for site in sites.latents:
        if node := nodes.get(site.site):
            yield site.site, numpy_of(rows_of(node["value"], node, layout, count)[0]).reshape(site.tail)
    for site in sites.shared:
        if node := nodes.get(site.site):
            yield site.site, numpy_of(whole(node))


def posterior_predictive(request: Request, sites: Sites, drawn: Drawn) -> Group:
    """Draws of x given the first draws of the latents of the first rows."""
    pair, count, layout = request.pair, request.predictive_rows, request.pair.layout
    x = request.x[:count]
    if sites.summed:
        raise NotImplementedError(f"the model sums out {', '.join(sites.summed)}")
    out = {site.site: site.empty(1, request.predictive_draws, count) for site in sites.observed}
    with request.quiet(2):
        template = samples(pair.guide_trace(x))
        for draw in range(request.predictive_draws):
            with poutine.condition(data=dict(_values(drawn, template, layout, draw, count))):
                nodes = samples(pair.simulate(x))
            for site in sites.observed:
                node = nodes[site.site]
                out[site.site][0, draw] = numpy_of(rows_of(node["value"], node, layout, count))
    dims = (*DRAW, "datum_predictive")
    return Group({site.name: ((*dims, *site.dims), out[site.site], site.attrs) for site in sites.observed})


def _values(
    drawn: Drawn, template: Mapping[str, Any], layout: Layout, draw: int, count: int
) -> Iterator[tuple[str, Tensor]]:
    """The kept values of one draw, as the programs take them."""
    for site in drawn.sites.latents:
        rows = torch.from_numpy(drawn.values[site.site][0, draw, :count])
        yield site.site, as_value(rows, template[site.site], layout)
    for site in drawn.sites.shared:
        value = template[site.site]["value"]
        yield site.site, torch.from_numpy(drawn.values[site.site][0, draw, ...]).to(value).reshape(value.shape)


def observed_data(request: Request, sites: Sites) -> Group:
    """What the model observed for the rows of `posterior_predictive`."""
    pair, x = request.pair, request.x[: request.predictive_rows]
    with request.quiet(3):
        nodes = samples(pair.traces(x)[1])
    rows = {site: rows_of(nodes[site.site]["value"], nodes[site.site], pair.layout, len(x)) for site in sites.observed}
    return Group({s.name: (("datum_predictive", *s.dims), numpy_of(t), s.attrs) for s, t in rows.items()})


def constant_data(request: Request) -> Group:
    """Row numbers, and labels where the split has them."""
    found: dict[str, Variable] = {"row": (("datum",), request.rows.numpy(), {})}
    if request.split.y is not None:
        found["label"] = (("datum",), numpy_of(request.split.y)[request.rows.numpy()], {})
    return Group(found)


# ---------------------------------------------------------------------- together


def export(request: Request, sites: Sites, attrs: Mapping[str, Any], on_progress: Progress) -> Posterior:
    """All groups that the pair can give; why it cannot give one stands in the attributes of `posterior`."""
    drawn = Drawn(request, sites)
    drawn.fill(on_progress)
    found = {
        "posterior": drawn.posterior(),
        "sample_stats": drawn.sample_stats(),
        "guide": guide(request, sites),
        "diagnostics": drawn.diagnostics(),
        "prior": _attempt(lambda: prior(request, sites)),
        "posterior_predictive": _attempt(lambda: posterior_predictive(request, sites, drawn)),
        "observed_data": observed_data(request, sites),
        "constant_data": constant_data(request),
    }
    found["posterior"].missing.update({name: group.absent for name, group in found.items() if group.absent})
    rows = {"datum": request.rows.numpy(), "datum_predictive": request.rows.numpy()[: request.predictive_rows]}
    own = {"guide": {"datum": np.arange(len(request.split))}}
    return Posterior(
        {
            name: dataset(group.variables, {**attrs, **group.notes}, own.get(name, rows))
            for name, group in found.items()
            if not group.absent
        }
    )


def _attempt(make: Callable[[], Group]) -> Group:
    """What `make` gives; a hand-written pair that cannot do it loses a group, not the export."""
    try:
        return make()
    except (NotImplementedError, ValueError, RuntimeError, LookupError, AttributeError) as error:
        return Group({}, absent=(str(error).splitlines() or [type(error).__name__])[0][:300])
