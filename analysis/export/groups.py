"""Groups of an export: posterior samples and their densities, guide parameters, prior and predictive samples, data."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xarray
from pyro import poutine
from torch import Tensor

from pvae.analysis.aggregate.entry import quiet, same_globals
from pvae.analysis.bounds.weights import inverse_ess, log_mean, pareto_k
from pvae.analysis.decompose.posterior_draws import Draw, draw_chunk
from pvae.analysis.export.sites import (
    ExportedSites,
    Variable,
    as_value,
    numpy_of,
    parameters_of,
    text,
    values_of,
    whole,
)
from pvae.data.split import Split
from pvae.pair.layout import samples
from pvae.pair.pair import Pair
from pvae.pair.structure import ROWS_OF_A_BATCH
from pvae.util import seeds
from pvae.util.progress import Progress
from pvae.util.types import Array

RESOLVED_ROUNDINGS = 8
"""Number of rounding errors of the largest term of a log weight up to which log weights count as equal."""
DRAW_DIMS = ("chain", "draw")
NATS = {"units": "nats"}


def group(variables: Mapping[str, Variable], why: str = "", missing: Iterable[str] = ()) -> xarray.Dataset:
    """Return a group with the given variables, and the reason why others are missing as attributes `missing_<name>`."""
    return xarray.Dataset(dict(variables), attrs={f"missing_{name}": text(why) for name in missing})


@dataclass
class PosteriorExport:
    """Export of one run: its rows and sites, and a method for every group of `GROUP_NAMES`; `fill` comes first."""

    pair: Pair
    split: Split
    sites: ExportedSites
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
        """Return a context in evaluation mode without gradients, whose noise is seeded by the seed and `counter`."""
        return quiet(self.pair, self.x, seeds.mix(self.seed, seeds.ANALYSIS, counter))

    def fill(self, on_progress: Progress) -> None:
        """Sample all latents for all rows; the rows of one draw share one sample of the global latents."""
        pair, x, n, draws, sites = self.pair, self.x, len(self.rows), self.draws, self.sites
        self.values = {site.site: site.empty(1, draws, n) for site in sites.latents}
        self.values |= {site.site: site.empty(1, draws) for site in sites.shared}
        self.log_q, self.log_p, self.log_likelihood = (np.empty((1, draws, n)) for _ in range(3))
        self.global_log_ratio = np.zeros((1, draws))
        self.kl = {site.site: np.zeros((n, *site.like.shape)) for site in sites.latents if site.closed}
        with quiet(pair, x, self.seed):
            for draw in range(draws):
                with same_globals(pair, x) as shared:
                    for site in sites.shared:
                        self.values[site.site][0, draw] = whole(shared[site.site])
                    for start in range(0, n, ROWS_OF_A_BATCH):
                        rows = slice(start, start + ROWS_OF_A_BATCH)
                        self._keep(draw, rows, draw_chunk(pair, x[rows], n))
                on_progress(draw + 1, draws)

    def _keep(self, draw: int, rows: slice, part: Draw) -> None:
        at = (0, draw, rows)
        self.log_likelihood[at] = numpy_of(part.reconstruction)
        self.log_q[at] = sum(numpy_of(latent.log_q) for latent in part.latents.values())
        self.log_p[at] = sum(numpy_of(latent.log_p) for latent in part.latents.values())
        self.global_log_ratio[0, draw] = sum(part.shared.values())
        for name, latent in part.latents.items():
            kept = self.values[name][at]
            kept[...] = numpy_of(latent.value).reshape(kept.shape)
            kl = latent.coordinate_kl if name in self.kl else None
            if kl is not None:
                mean = self.kl[name][rows]
                mean += numpy_of(kl).reshape(mean.shape) / self.draws

    @cached_property
    def points(self) -> list[str]:
        """Latents that the guide sets to points, as in an autoencoder."""
        structure = self.pair.structure
        return [] if structure.determined else [name for name in self.pair.layout.latents if name in structure.points]

    @cached_property
    def log_weight(self) -> Array:
        """Log weight log p(x, z) - log q(z | x), `(1, draws, n)`, nats; every row has 1/n of the global log ratio."""
        share = self.global_log_ratio[..., None] / len(self.rows)
        return np.asarray(self.log_likelihood + self.log_p - self.log_q - share)

    def posterior(self) -> xarray.Dataset:
        """Return the group `posterior`: the samples of all latents."""
        latents = {z.name: z.variable(self.values[z.site], *DRAW_DIMS, "datum") for z in self.sites.latents}
        return group(latents | {z.name: z.variable(self.values[z.site], *DRAW_DIMS) for z in self.sites.shared})

    def sample_stats(self) -> xarray.Dataset:
        """Return the group `sample_stats`: the log densities of the samples and, where defined, their log weights."""
        columns = {"log_q": self.log_q, "log_p": self.log_p}
        why = self._expected()
        if not why:
            columns |= {"log_likelihood": self.log_likelihood, "log_weight": self.log_weight}
        found: dict[str, Variable] = {name: ((*DRAW_DIMS, "datum"), values, NATS) for name, values in columns.items()}
        if self.sites.shared:
            found["global_log_ratio"] = (DRAW_DIMS, self.global_log_ratio, NATS)
        return group(found, why, ("log_likelihood", "log_weight") if why else ())

    def _expected(self) -> str:
        """Return the reason why single samples have no importance weights (summed-out latents, or points); else ""."""
        if self.sites.summed:
            return f"the model sums out {', '.join(self.sites.summed)}"
        return f"{', '.join(self.points)}: a point has no density" if self.points else ""

    def diagnostics(self) -> xarray.Dataset:
        """Return the group `diagnostics`: bounds on log p(x), closed-form KLs and weight diagnostics, per datum."""
        found: dict[str, Variable] = {}
        if not self.points:
            found["elbo"] = (("datum",), self.log_weight[0].mean(0), NATS)
        for site in self.sites.latents:
            if site.closed:
                found[f"{site.name}_kl"] = site.variable(self.kl[site.site], "datum", **NATS)
        names = ", ".join(site.name for site in self.sites.shared)
        why = f"expected latents of single data only; got global {names}" if names else self._expected()
        if not why:
            return group({**found, **self._weights()})
        return group(found, why, ("log_evidence", "ess", "khat", *(["elbo"] if self.points else [])))

    def _weights(self) -> dict[str, Variable]:
        weights = torch.from_numpy(self.log_weight[0])
        magnitude = sum(np.abs(part[0]).max(0) for part in (self.log_likelihood, self.log_p, self.log_q))
        resolution = torch.from_numpy(magnitude * RESOLVED_ROUNDINGS * torch.finfo(self.x.dtype).eps)
        khat = pareto_k(weights, len(weights), resolution)
        return {
            "log_evidence": (("datum",), numpy_of(log_mean(weights)), NATS),
            "ess": (("datum",), numpy_of(1 / inverse_ess(weights)), {}),
            "khat": (("datum",), numpy_of(khat), {}),
        }

    def guide(self) -> xarray.Dataset:
        """Return the group `guide`: the parameters of q(z | x) for all rows of the split."""
        pair, n = self.pair, len(self.split)
        shown = [site for site in self.sites.latents if site.parameters]
        found: dict[str, Variable] = {}
        for site in shown:
            for key, one in site.parameters.items():
                dims = ("datum", *(*site.dims, f"{site.name}_code")[: one.ndim])
                found[f"{site.name}_{key}"] = dims, np.empty((n, *one.shape), one.dtype), {"site": text(site.site)}
        with self.quiet(0):
            for start in range(0, n, ROWS_OF_A_BATCH) if shown else ():
                x = pair.accept(self.split.rows[start : start + ROWS_OF_A_BATCH])
                nodes = samples(pair.guide_trace(x))
                for site in shown:
                    for key, t in parameters_of(nodes[site.site], pair.layout, len(x)).items():
                        found[f"{site.name}_{key}"][1][start : start + len(x)] = numpy_of(t)
        missing = {f"missing_{site.name}": text(site.hidden) for site in self.sites.latents if site.hidden}
        return group(found).assign_attrs(missing)

    def prior(self) -> xarray.Dataset:
        """Return the group `prior`: samples of p(z), each from its own run of the model, with its own global latents.

        Latents are those of the first row of two. Sites of the guide alone are left out.
        """
        pair, n, draws = self.pair, len(self.x), []
        with self.quiet(1):
            for i in range(self.draws):
                nodes = samples(pair.simulate(self.x[torch.tensor([i % n, (i + 1) % n])]))
                latents, shared = ([z for z in s if z.site in nodes] for s in (self.sites.latents, self.sites.shared))
                per_row = {z: values_of(nodes[z.site], pair.layout, 2)[0] for z in latents}
                draws.append(per_row | {z: whole(nodes[z.site]) for z in shared})
        stacked = {z: np.stack([draw[z].reshape(z.like.shape) for draw in draws])[None] for z in draws[0]}
        return group({z.name: z.variable(values, *DRAW_DIMS) for z, values in stacked.items()})

    def posterior_predictive(self) -> xarray.Dataset:
        """Return the group `posterior_predictive`: samples of p(x | z) at the first samples of z for the first rows."""
        pair, count, layout = self.pair, self.predictive_rows, self.pair.layout
        x = self.x[:count]
        if self.sites.summed:
            raise NotImplementedError(f"the model sums out {', '.join(self.sites.summed)}")
        out = {site.site: site.empty(1, self.predictive_draws, count) for site in self.sites.observed}
        with self.quiet(2):
            template = samples(pair.guide_trace(x))
            for draw in range(self.predictive_draws):
                values = {z: torch.from_numpy(kept[0, draw, ...]) for z, kept in self.values.items()}
                for site in self.sites.latents:
                    values[site.site] = as_value(values[site.site][:count], template[site.site], layout)
                for site in self.sites.shared:
                    value = template[site.site]["value"]
                    values[site.site] = values[site.site].to(value).reshape(value.shape)
                with poutine.condition(data=values):
                    nodes = samples(pair.simulate(x))
                for site in self.sites.observed:
                    out[site.site][0, draw] = values_of(nodes[site.site], layout, count)
        return group({s.name: s.variable(out[s.site], *DRAW_DIMS, "datum_predictive") for s in self.sites.observed})

    def observed_data(self) -> xarray.Dataset:
        """Return the group `observed_data`: the observed values of the rows of `posterior_predictive`."""
        pair, x = self.pair, self.x[: self.predictive_rows]
        with self.quiet(3):
            nodes = samples(pair.traces(x)[1])
        values = {site: values_of(nodes[site.site], pair.layout, len(x)) for site in self.sites.observed}
        return group({site.name: site.variable(v, "datum_predictive") for site, v in values.items()})

    def constant_data(self) -> xarray.Dataset:
        """Return the group `constant_data`: indices of the rows, and class labels if the split has them."""
        found: dict[str, Variable] = {"row": (("datum",), self.rows.numpy(), {})}
        if self.split.y is not None:
            found["label"] = (("datum",), numpy_of(self.split.y)[self.rows.numpy()], {})
        return group(found)
