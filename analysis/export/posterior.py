"""Export of posterior samples with densities, guide parameters, prior and predictive samples, as ArviZ reads them."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xarray
from pyro import poutine

from pvae import __version__
from pvae.analysis.aggregate.entry import accept, quiet, same_globals
from pvae.analysis.bounds.weights import inverse_ess, log_mean, pareto_k
from pvae.analysis.decompose.posterior_draws import Draw, draw_chunk
from pvae.analysis.export import sites as exported
from pvae.analysis.export.datasets import GROUP_NAMES, PosteriorDraws
from pvae.analysis.export.sites import ExportedSites, Variable, group, numpy_of, storable, value_of, values_of
from pvae.analysis.figures.estimate import refuse
from pvae.data.split import Split
from pvae.pair import ROWS_OF_A_BATCH, Pair, samples
from pvae.runs.run import Run
from pvae.util import Progress, seeds, silent
from pvae.util.group import add_up, is_mine

FLOAT64_BYTES = 8
RESOLVED_ROUNDINGS = 8
"""Number of rounding errors of the largest term of a log weight up to which log weights count as equal."""
DRAW_DIMS = ("chain", "draw")
NATS = {"units": "nats"}


@dataclass
class PosteriorExport:
    """Export of one run: its rows and sites, and a method for every group of `GROUP_NAMES`; `fill` comes first."""

    pair: Pair
    split: Split
    sites: ExportedSites
    rows: torch.Tensor
    """Indices of the chosen rows of the split, `(n,)`, on the CPU."""
    draws: int
    seed: int
    predictive_rows: int
    predictive_draws: int

    @cached_property
    def x(self) -> torch.Tensor:
        """Data of the chosen rows in the type and on the device of the pair, `(n, *event)`."""
        return self.pair.accept(self.split.rows[self.rows.to(self.split.rows.device)])

    def quiet(self, counter: int) -> AbstractContextManager[None]:
        """Return a context in evaluation mode without gradients, whose noise is seeded by the seed and `counter`."""
        return quiet(self.pair, self.x, seeds.mix(self.seed, seeds.ANALYSIS, counter))

    def require_memory(self, memory: int) -> None:
        """Refuse arrays of more than `memory` bytes together; raises DataError that names the largest one.

        Nothing is sampled.
        """
        n, draws, sites = len(self.rows), self.draws, self.sites
        found = {f"posterior/{site.name}": draws * n * site.like.nbytes for site in sites.latents}
        found |= {f"posterior/{site.name}": draws * site.like.nbytes for site in sites.shared}
        for name in ("log_q", "log_p", "log_likelihood", "log_weight"):
            found[f"sample_stats/{name}"] = draws * n * FLOAT64_BYTES
        found |= {f"prior/{site.name}": draws * site.like.nbytes for site in (*sites.latents, *sites.shared)}
        for site in sites.latents:
            found[f"diagnostics/{site.name}_kl"] = n * site.like.size * FLOAT64_BYTES if site.closed else 0
            for key, values in site.parameters.items():
                found[f"guide/{site.name}_{key}"] = len(self.split) * values.nbytes
        for site in sites.observed:
            found[f"observed_data/{site.name}"] = self.predictive_rows * site.like.nbytes
            found[f"posterior_predictive/{site.name}"] = self.predictive_draws * found[f"observed_data/{site.name}"]
        largest = max(found, key=found.__getitem__)
        refuse(sum(found.values()) > memory, "refused.memory", memory=memory, sizes=found, largest=largest)

    def fill(self, on_progress: Progress) -> None:
        """Sample all latents for all rows; the rows of one draw share one sample of the global latents."""
        pair, x, n, draws, sites = self.pair, self.x, len(self.rows), self.draws, self.sites
        self.values = {site.site: site.empty(1, draws, n) for site in sites.latents}
        self.values |= {site.site: site.empty(1, draws) for site in sites.shared}
        self.log_q, self.log_p, self.log_likelihood = (np.zeros((1, draws, n)) for _ in range(3))
        self.global_log_ratio, starts = np.zeros((1, draws)), range(0, n, ROWS_OF_A_BATCH)
        self.kl = {site.site: np.zeros((n, *site.like.shape)) for site in sites.latents if site.closed}
        with quiet(pair, x, self.seed):
            for draw in range(draws):
                seeds.set_noise(seeds.mix(self.seed, seeds.NOISE, draw), x.device)
                with same_globals(pair, x) as shared:
                    for site in sites.shared if is_mine(draw) else ():
                        self.values[site.site][0, draw] = exported.whole(shared[site.site])
                    for number, start in enumerate(starts, draw * len(starts)):
                        if is_mine(number):
                            seeds.set_noise(seeds.mix(self.seed, seeds.ANALYSIS, 4 + number), x.device)
                            rows = slice(start, start + ROWS_OF_A_BATCH)
                            self._keep(draw, rows, draw_chunk(pair, x[rows], n))
                on_progress(draw + 1, draws)
        own = *self.values.values(), *self.kl.values(), self.log_q, self.log_p, self.log_likelihood
        add_up(*map(torch.from_numpy, (*own, self.global_log_ratio)))

    def _keep(self, draw: int, rows: slice, part: Draw) -> None:
        at = (0, draw, rows)
        self.log_likelihood[at] = numpy_of(part.reconstruction)
        self.log_q[at] = sum(numpy_of(latent.log_q) for latent in part.latents.values())
        self.log_p[at] = sum(numpy_of(latent.log_p) for latent in part.latents.values())
        if rows.start == 0:
            self.global_log_ratio[0, draw] = sum(part.shared.values())
        for name, latent in part.latents.items():
            kept = self.values[name][at]
            kept[...] = numpy_of(latent.value).reshape(kept.shape)
            if name in self.kl and (kl := latent.number_kl) is not None:
                mean = self.kl[name][rows]
                mean += numpy_of(kl).reshape(mean.shape) / self.draws

    @cached_property
    def points(self) -> list[str]:
        """Latents that the guide sets to points, as in an autoencoder."""
        structure = self.pair.structure
        return [] if structure.determined else [name for name in self.pair.layout.latents if name in structure.points]

    @cached_property
    def log_weight(self) -> np.ndarray:
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
        if not (why := self._expected()):
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
        closed = (site for site in self.sites.latents if site.closed)
        found |= {f"{site.name}_kl": site.variable(self.kl[site.site], "datum", **NATS) for site in closed}
        names = ", ".join(site.name for site in self.sites.shared)
        why = f"expected latents of single data only; got global {names}" if names else self._expected()
        if not why:
            return group({**found, **self._weights()})
        return group(found, why, ("log_evidence", "ess", "khat", *(["elbo"] if self.points else [])))

    def _weights(self) -> dict[str, Variable]:
        weights = torch.from_numpy(self.log_weight[0])
        magnitude = sum(np.abs(part[0]).max(0) for part in (self.log_likelihood, self.log_p, self.log_q))
        resolution = torch.from_numpy(magnitude * RESOLVED_ROUNDINGS * torch.finfo(self.x.dtype).eps)
        found = {"log_evidence": log_mean(weights), "ess": 1 / inverse_ess(weights)}
        found["khat"] = pareto_k(weights, len(weights), resolution)
        return {name: (("datum",), numpy_of(t), NATS if name == "log_evidence" else {}) for name, t in found.items()}

    def guide(self) -> xarray.Dataset:
        """Return the group `guide`: the parameters of q(z | x) for all rows of the split."""
        pair, n = self.pair, len(self.split)
        shown = [site for site in self.sites.latents if site.parameters]
        found: dict[str, Variable] = {}
        for site in shown:
            for key, one in site.parameters.items():
                dims = ("datum", *(*site.dims, f"{site.name}_code")[: one.ndim])
                found[f"{site.name}_{key}"] = dims, np.empty((n, *one.shape), one.dtype), {"site": storable(site.site)}
        with self.quiet(0):
            for start in range(0, n, ROWS_OF_A_BATCH) if shown else ():
                x = pair.accept(self.split.rows[start : start + ROWS_OF_A_BATCH])
                nodes = samples(pair.guide_trace(x))
                for site in shown:
                    for key, t in exported.parameters_of(nodes[site.site], pair.layout, len(x)).items():
                        found[f"{site.name}_{key}"][1][start : start + len(x)] = numpy_of(t)
        missing = {f"missing_{site.name}": storable(site.hidden) for site in self.sites.latents if site.hidden}
        return group(found).assign_attrs(missing)

    def prior(self) -> xarray.Dataset:
        """Return the group `prior`: samples of p(z), each from its own run of the model, with its own global latents.

        Latents are those of the first row of two. Sites of the guide alone are left out.
        """
        pair, n, draws = self.pair, len(self.x), []
        with self.quiet(1):
            for i in range(self.draws):
                nodes = samples(pair.simulate(self.x[torch.tensor([i % n, (i + 1) % n])]))
                there = [z for z in (*self.sites.latents, *self.sites.shared) if z.site in nodes]
                draws.append({z: value_of(nodes[z.site], pair.layout, 2) for z in there})
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
                    values[site.site] = exported.as_value(values[site.site][:count], template[site.site], layout)
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


def posterior(
    run: Run, split: str = "test", draws: int = 100, rows: int | None = None, seed: int = 0, *,
    predictive_rows: int = 20, predictive_draws: int = 10, memory: int = 1 << 30, on_progress: Progress = silent,
) -> PosteriorDraws:  # fmt: skip
    """Sample every latent of the guide of a run for the rows of a split, with densities and diagnostics.

    Groups and their dims (a variable has the name of its site, made safe, with the original name in the attribute
    `site`; the dims of its event are `<name>_dim`, or `<name>_dim_0`, ... if there are several):

    - `posterior`: latents `(chain, draw, datum, ...)`, global ones `(chain, draw, ...)`, in the type of the pair. The
      samples are independent, so there is one chain; `datum` is the row in the split.
    - `sample_stats`, `(chain, draw, datum)`, nats, float64: `log_q` = log q(z|x), `log_p` = log p(z), `log_likelihood`
      = log p(x|z), `log_weight` = log p(x, z) - log q(z|x). Global latents have log q - log p in `global_log_ratio`
      `(chain, draw)`, which `log_weight` divides equally among the rows. Where the model sums its latents out there is
      no `log_likelihood` and no `log_weight`.
    - `guide`: parameters of q(z|x) for all rows of the split, `(datum, ...)`: `<name>_loc` and `<name>_scale` of a
      diagonal normal, `<name>_probs` of a categorical, one-hot or Bernoulli. A posterior that reads other latents, or
      is of another family, is left out; the attribute `missing_<name>` gives the reason.
    - `diagnostics`, `(datum)`: `elbo` and `log_evidence` (the importance-weighted bound over the samples), lower bounds
      in nats; `ess` of the weights, at most `draws`; `khat` of their tail, see `weights.pareto_k`; `<name>_kl` `(datum,
      ...)`, the closed-form KL(q || p) of every number, nats, averaged over samples of the latents it reads.
    - `prior`: samples of p(z), `(chain, draw, ...)`.
    - `posterior_predictive`: samples of p(x|z) `(chain, draw, datum_predictive, ...)` at the first samples of the first
      rows; `observed_data`: the data of these rows.
    - `constant_data`, `(datum)`: `row`, and `label` if the split has labels.

    Arguments:
        run: a run with a checkpoint.
        split: "train", "validation" or "test".
        draws: samples per datum.
        rows: number of rows, chosen at random with `seed` and kept in order; default: all.
        seed: seed of the samples; the same seed gives the same numbers.
        predictive_rows: rows of `posterior_predictive`.
        predictive_draws: samples per row of `posterior_predictive`.
        memory: largest number of bytes of all arrays together.
        on_progress: called with (draws done, draws in all).

    Returns:
        PosteriorDraws (`pvae.analysis.Posterior`), whose `to_arviz()` gives the object that ArviZ works on.

    Raises:
        DataError: a count is below 1, or the arrays exceed `memory`; nothing is sampled then.
        DeclarationError: there is no split of that name.

    References:
        ArviZ a unified library for exploratory analysis of Bayesian models in Python (Kumar et al., 2019),
        https://doi.org/10.21105/joss.01143

    Example:
        >>> from pvae.analysis.truths.example import example_run
        >>> found = posterior(example_run(), draws=4, rows=8)
        >>> dict(found["posterior"]["z"].sizes)
        {'chain': 1, 'draw': 4, 'datum': 8, 'z_dim': 2}
    """
    counts = {"draws": draws, "rows": rows, "predictive_rows": predictive_rows, "predictive_draws": predictive_draws}
    for name, count in counts.items():
        refuse(count is not None and count < 1, f"{name}: expected at least 1; got {count}.")
    part = run.data.split(split)
    chosen = seeds.subset(len(part), rows, seed)
    few, some = min(predictive_rows, len(chosen)), min(predictive_draws, draws)
    sites = exported.read_sites(run.pair, accept(run.pair, part.rows[: exported.TRACED_ROWS]))
    export = PosteriorExport(run.pair, part, sites, chosen, draws, seed, few, some)
    export.require_memory(memory)
    export.fill(on_progress)
    found = {}
    for name in GROUP_NAMES:
        try:
            found[name] = getattr(export, name)()
        except (NotImplementedError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            if name not in ("prior", "posterior_predictive"):  # which a hand-written pair may not give
                raise
            why = (str(error).splitlines() or [type(error).__name__])[0][:300]
            found["posterior"].attrs[f"missing_{name}"] = storable(why)
    attrs = {
        "inference_library": "pvae", "inference_library_version": __version__, "run": storable(run.name),
        "run_id": storable(str(run.files.manifest.get("id", run.path.name))), "split": split, "seed": seed,
    }  # fmt: skip
    rows_of_dims = {"datum": chosen.numpy(), "datum_predictive": chosen.numpy()[:few]}
    for name, made in found.items():
        own = {"datum": np.arange(len(part))} if name == "guide" else rows_of_dims
        found[name] = made.assign_coords({dim: own.get(str(dim), np.arange(n)) for dim, n in made.sizes.items()})
        found[name].attrs = {**attrs, **made.attrs}
    return PosteriorDraws(found)
