"""Posterior samples of all latents of a pair, with their log densities and diagnostics."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from pvae.analysis.bounds.psis import pareto_k
from pvae.analysis.bounds.weights import inverse_ess, log_mean
from pvae.analysis.decompose.entry import quiet, same_globals
from pvae.analysis.decompose.posterior_draws import Draw, LatentDraw, draw_chunk
from pvae.analysis.export.names import NATS, Variable, text
from pvae.analysis.export.sites import ExportedSites, numpy_of, whole
from pvae.data.split import Split
from pvae.pair.pair import Pair
from pvae.pair.structure import ROWS_OF_A_BATCH
from pvae.util import seeds
from pvae.util.progress import Progress
from pvae.util.types import Array

RESOLVED_ROUNDINGS = 8
"""Number of rounding errors of the largest term of a log weight up to which log weights count as equal."""
DRAW_DIMS = ("chain", "draw")


@dataclass(frozen=True)
class VariableGroup:
    """Variables of one group of an export, with the reasons why other variables are missing."""

    variables: Mapping[str, Variable]
    missing: dict[str, str] = field(default_factory=dict)
    """Reasons why variables are missing, by name."""
    absent: str = ""
    """Reason why the whole group is missing."""

    @property
    def notes(self) -> dict[str, str]:
        """Reasons for missing variables as attributes of the Dataset, `missing_<name>`."""
        return {f"missing_{name}": text(why) for name, why in self.missing.items()}


@dataclass(frozen=True)
class PosteriorRequest:
    """Arguments of an export by `posterior`, with the pair and the indices of the chosen rows."""

    pair: Pair
    split: Split
    rows: Tensor
    """Indices of the chosen rows of the split, `(n,)`, on the CPU."""
    draws: int
    seed: int
    predictive_rows: int
    predictive_draws: int

    @cached_property
    def x(self) -> Tensor:
        """Data of the chosen rows in the type and on the device of the pair, `(n, *event)`."""
        return self.pair.accept(self.split.rows[self.rows.to(self.split.rows.device)])

    def quiet(self, counter: int) -> AbstractContextManager[None]:
        """Return a context in evaluation mode without gradients, whose noise is seeded by the request and `counter`."""
        return quiet(self.pair, self.x, seeds.mix(self.seed, seeds.ANALYSIS, counter))


class SampledLatents:
    """Posterior samples of all latents for all rows, with log densities; filled by `fill`, chunk by chunk."""

    def __init__(self, request: PosteriorRequest, sites: ExportedSites) -> None:
        self.request, self.sites = request, sites
        n, draws = len(request.rows), request.draws
        self.values = {site.site: site.empty(1, draws, n) for site in sites.latents}
        self.values |= {site.site: site.empty(1, draws) for site in sites.shared}
        self.log_q, self.log_p, self.log_likelihood = (np.empty((1, draws, n)) for _ in range(3))
        self.global_log_ratio = np.zeros((1, draws))
        points = [name for name in request.pair.layout.latents if name in request.pair.structure.points]
        self.points = [] if request.pair.structure.determined else points
        """Latents that the guide sets to points, as in an autoencoder."""
        self.kl = {site.site: np.zeros((n, *site.tail)) for site in sites.latents if site.site in sites.closed}

    def fill(self, on_progress: Progress) -> None:
        """Sample all latents for all rows; the rows of one draw share one sample of the global latents."""
        pair, x = self.request.pair, self.request.x
        with quiet(pair, x, self.request.seed):
            for draw in range(self.request.draws):
                with same_globals(pair, x) as shared:
                    for site in self.sites.shared:
                        self.values[site.site][0, draw] = numpy_of(whole(shared[site.site]))
                    for start in range(0, len(x), ROWS_OF_A_BATCH):
                        rows = slice(start, start + ROWS_OF_A_BATCH)
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
        """Log weight log p(x, z) - log q(z | x), `(1, draws, n)`, nats; every row has 1/n of the global log ratio."""
        share = self.global_log_ratio[..., None] / len(self.request.rows)
        return np.asarray(self.log_likelihood + self.log_p - self.log_q - share)

    def posterior(self) -> VariableGroup:
        """Return the group `posterior`: the samples of all latents."""
        per_row = {
            site.name: ((*DRAW_DIMS, "datum", *site.dims), self.values[site.site], site.attrs)
            for site in self.sites.latents
        }
        shared = {
            site.name: ((*DRAW_DIMS, *site.dims), self.values[site.site], site.attrs) for site in self.sites.shared
        }
        return VariableGroup({**per_row, **shared})

    def sample_stats(self) -> VariableGroup:
        """Return the group `sample_stats`: the log densities of the samples and, where defined, their log weights."""
        columns = {"log_q": self.log_q, "log_p": self.log_p}
        why = self._expected()
        if not why:
            columns |= {"log_likelihood": self.log_likelihood, "log_weight": self.log_weight}
        found: dict[str, Variable] = {name: ((*DRAW_DIMS, "datum"), values, NATS) for name, values in columns.items()}
        if self.sites.shared:
            found["global_log_ratio"] = (DRAW_DIMS, self.global_log_ratio, NATS)
        return VariableGroup(found, dict.fromkeys(("log_likelihood", "log_weight"), why) if why else {})

    def _expected(self) -> str:
        """Return the reason why single samples have no importance weights (summed-out latents, or points); else ""."""
        if self.sites.summed:
            return f"the model sums out {', '.join(self.sites.summed)}"
        return f"{', '.join(self.points)}: a point has no density" if self.points else ""

    def diagnostics(self) -> VariableGroup:
        """Return the group `diagnostics`: bounds on log p(x), closed-form KLs and weight diagnostics, per datum."""
        found: dict[str, Variable] = {}
        if not self.points:
            found["elbo"] = (("datum",), self.log_weight[0].mean(0), NATS)
        for site in self.sites.latents:
            if site.site in self.kl:
                found[f"{site.name}_kl"] = (("datum", *site.dims), self.kl[site.site], {**NATS, **site.attrs})
        names = ", ".join(site.name for site in self.sites.shared)
        why = f"expected latents of single data only; got global {names}" if names else self._expected()
        if not why:
            return VariableGroup({**found, **self._weights()})
        return VariableGroup(
            found, dict.fromkeys(("log_evidence", "ess", "khat", *(["elbo"] if self.points else [])), why)
        )

    def _weights(self) -> dict[str, Variable]:
        weights = torch.from_numpy(self.log_weight[0])
        magnitude = sum(np.abs(part[0]).max(0) for part in (self.log_likelihood, self.log_p, self.log_q))
        resolution = torch.from_numpy(magnitude * RESOLVED_ROUNDINGS * torch.finfo(self.request.x.dtype).eps)
        khat = pareto_k(weights, len(weights), resolution)
        return {
            "log_evidence": (("datum",), numpy_of(log_mean(weights)), NATS),
            "ess": (("datum",), numpy_of(1 / inverse_ess(weights)), {}),
            "khat": (("datum",), numpy_of(khat), {}),
        }


def _kl(latent: LatentDraw) -> Tensor | None:
    """Return the closed-form KL(q || p) of every coordinate, nats, `(n, D)`; None unless q and p are normal."""
    loc, scale, prior_loc, prior_scale = latent.loc, latent.scale, latent.prior_loc, latent.prior_scale
    if loc is None or scale is None or prior_loc is None or prior_scale is None:
        return None
    return torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(prior_loc, prior_scale))
