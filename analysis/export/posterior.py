"""Export of posterior samples with densities and diagnostics, as Datasets that ArviZ reads."""

import numpy as np

from pvae import __version__
from pvae.analysis.aggregate.entry import accept
from pvae.analysis.export.datasets import GROUP_NAMES, PosteriorDraws
from pvae.analysis.export.groups import PosteriorExport
from pvae.analysis.export.sites import TRACED_ROWS, read_sites, text
from pvae.errors import DataError
from pvae.runs.run import Run
from pvae.util import seeds
from pvae.util.progress import Progress, silent

FLOAT64_BYTES = 8
REDUCED_BY = {
    "posterior_predictive": "predictive_rows or predictive_draws",
    "observed_data": "predictive_rows",
    "prior": "draws",
}
"""Arguments of `posterior` that reduce the size of a group; for groups not listed they are `draws` and `rows`."""


def posterior(
    run: Run,
    split: str = "test",
    draws: int = 100,
    rows: int | None = None,
    seed: int = 0,
    *,
    predictive_rows: int = 20,
    predictive_draws: int = 10,
    memory: int = 1 << 30,
    on_progress: Progress = silent,
) -> PosteriorDraws:
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
      ...)`, the closed-form KL(q || p) of every coordinate, nats, averaged over samples of the latents it reads.
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
        if count is not None and count < 1:
            raise DataError(f"{name}: expected at least 1; got {count}.")
    part = run.data.split(split)
    chosen = seeds.subset(len(part), rows, seed)
    few, some = min(predictive_rows, len(chosen)), min(predictive_draws, draws)
    sites = read_sites(run.pair, accept(run.pair, part.rows[:TRACED_ROWS]))
    export = PosteriorExport(run.pair, part, sites, chosen, draws, seed, few, some)
    require_memory(export, memory)
    export.fill(on_progress)
    found = {}
    for name in GROUP_NAMES:
        try:
            found[name] = getattr(export, name)()
        except (NotImplementedError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            if name not in ("prior", "posterior_predictive"):  # which a hand-written pair may not give
                raise
            why = (str(error).splitlines() or [type(error).__name__])[0][:300]
            found["posterior"].attrs[f"missing_{name}"] = text(why)
    attrs = {
        "inference_library": "pvae", "inference_library_version": __version__, "run": text(run.name),
        "run_id": text(str(run.files.manifest.get("id", run.path.name))), "split": split, "seed": seed,
    }  # fmt: skip
    rows_of_dims = {"datum": chosen.numpy(), "datum_predictive": chosen.numpy()[:few]}
    for name, group in found.items():
        own = {"datum": np.arange(len(part))} if name == "guide" else rows_of_dims
        found[name] = group.assign_coords({dim: own.get(str(dim), np.arange(n)) for dim, n in group.sizes.items()})
        found[name].attrs = {**attrs, **group.attrs}
    return PosteriorDraws(found)


def require_memory(export: PosteriorExport, memory: int) -> None:
    """Refuse arrays of more than `memory` bytes together; raises DataError that names the largest one.

    Nothing is sampled.
    """
    n, draws, sites = len(export.rows), export.draws, export.sites
    found = {f"posterior/{site.name}": draws * n * site.like.nbytes for site in sites.latents}
    found |= {f"posterior/{site.name}": draws * site.like.nbytes for site in sites.shared}
    for name in ("log_q", "log_p", "log_likelihood", "log_weight"):
        found[f"sample_stats/{name}"] = draws * n * FLOAT64_BYTES
    found |= {f"prior/{site.name}": draws * site.like.nbytes for site in (*sites.latents, *sites.shared)}
    for site in sites.latents:
        found[f"diagnostics/{site.name}_kl"] = n * site.like.size * FLOAT64_BYTES if site.closed else 0
        for key, values in site.parameters.items():
            found[f"guide/{site.name}_{key}"] = len(export.split) * values.nbytes
    for site in sites.observed:
        found[f"observed_data/{site.name}"] = export.predictive_rows * site.like.nbytes
        found[f"posterior_predictive/{site.name}"] = export.predictive_draws * found[f"observed_data/{site.name}"]
    total = sum(found.values())
    if total > memory:
        largest = max(found, key=found.__getitem__)
        group = largest.partition("/")[0]
        raise DataError(
            f"posterior: expected arrays of at most {memory} bytes together; got {total} bytes, of which {largest} "
            f"takes {found[largest]}. Lower {REDUCED_BY.get(group, 'draws or rows')}, or raise memory."
        )
