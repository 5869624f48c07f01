"""Missing elements of rows of data: samples, means and intervals of p(x_missing | x_observed), for any pair."""

from contextlib import nullcontext, suppress
from math import inf, nan, prod
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pvae.analysis.aggregate.entry import accept, require_counts, require_room
from pvae.analysis.bounds.weights import inverse_ess, log_weights, pareto_k
from pvae.analysis.export.sites import rows_of
from pvae.analysis.figures.estimate import refuse
from pvae.analysis.samples import encode, running, sample
from pvae.analysis.samples.score import Hidden, is_elementwise, kinds_of
from pvae.distributions.codes import Certain
from pvae.distributions.missing import Absence, takes_missing
from pvae.pair import Layout, Pair, is_point, read_joint_states, samples as sample_sites, terms_of, tiled, unwrapped
from pvae.runs.run import Run
from pvae.util import Progress, silent

FILLING_SAMPLES = 64
"""Number of samples of the prior whose mean the guide reads in place of the missing elements of a row."""
SWEEPS = 20
"""Number of sweeps by default for pairs that take no missing values."""


class Imputations(running.Generated):
    """Rows of data with their missing elements filled in; the result of `impute`. Observed elements are untouched."""

    x: Tensor
    """Rows with point estimates, `(n, *shape)`: the posterior mean of a real element, the median of a count or a grey
    value, the most probable level of a binary or categorical one."""
    missing: Tensor
    """Booleans `(n, *shape)`, True where an element was missing; the five estimates below are NaN elsewhere."""
    mean: Tensor
    """Posterior mean, `(n, *shape)`; of a binary element its probability of 1; NaN for categories."""
    std: Tensor
    """Posterior standard deviation, `(n, *shape)`; NaN for categories."""
    lower: Tensor
    """Lower end of the central interval of the declared probability, `(n, *shape)`; NaN for categories."""
    upper: Tensor
    """Upper end of the same interval, `(n, *shape)`."""
    probability: Tensor
    """Posterior probability of the point estimate of a binary or categorical element, `(n, *shape)`; else NaN."""
    draws: Tensor
    """Completed rows, samples of p(x_missing | x_observed), `(n, draws, *shape)`."""
    khat: Tensor
    """Pareto shape k-hat of the importance weights of each row, `(n,)`; NaN without a tail. Above
    min(1 - 1 / log10(samples), 0.7) take more samples, or `sweeps`."""
    ess: Tensor
    """Effective number of importance samples of each row, `(n,)`; NaN for complete rows."""


def impute(
    run_or_pair: Run | Pair, x: Any, *, mask: Any = None, draws: int = 10, samples: int = 200,
    sweeps: int | None = None, interval: float = 0.9, seed: int = 0, on_progress: Progress = silent,
) -> Imputations:  # fmt: skip
    """Impute the missing elements of rows of data by importance resampling, or by Metropolis-within-Gibbs sweeps.

    Latents z_k ~ q(z | x_observed) have the weights p(x_observed, z_k) / q(z_k | x_observed), and x_missing ~
    p(x_missing | z_k): means, deviations and intervals are self-normalised weighted estimates over all samples, and
    draws are resampled by the weights. This is asymptotically exact under the fitted model, for any guide; `khat` tells
    where the samples are too few for it.

    With sweeps, every draw starts a Markov chain from its resampled row: z' is proposed from q(z | x_observed,
    x_missing), accepted by the Metropolis rule for p(z | x), and x_missing sampled anew. The second half of all chains
    gives the estimates. A guide without density (of codes, a point) accepts all: pseudo-Gibbs, an approximation.

    Missing elements are NaN, where the likelihood takes NaN (tables). For other data `mask` marks them; their values
    are never read: the guide is given the mean of the prior predictive distribution in their place, which the weights
    correct, and the sweeps are on by default.

    References:
        MIWAE: Deep Generative Modelling and Imputation of Incomplete Data Sets (Mattei, Frellsen, 2019),
        https://arxiv.org/abs/1812.02633
        Leveraging the Exact Likelihood of Deep Latent Variable Models (Mattei, Frellsen, 2018),
        https://arxiv.org/abs/1802.04826

    Arguments:
        run_or_pair: a run, or any pair.
        x: rows of data `(n, *row)`; with covariates, the datum flattened and followed by them.
        mask: booleans `(n, *shape)`, True where an element is missing; by default where x is NaN.
        draws: number of completed rows for each row; with sweeps, of chains.
        samples: number of importance samples of a row.
        sweeps: number of sweeps; None: 20 where a mask is given to a pair that takes no NaN, else 0.
        interval: probability of the intervals, in (0, 1).
        seed: seed of the samples; the same seed gives the same numbers.
        on_progress: called with (incomplete rows done, all of these).

    Returns:
        Imputations.

    Raises:
        DataError: x has no rows or rows of another shape; the pair does not take NaN and no mask is given; elements are
            not independent given z; the pair runs on a fixed number of rows.

    Example:
        >>> from pvae.analysis.truths.example import example_pair
        >>> pair, x = example_pair()
        >>> gone = torch.zeros(len(x), 3, dtype=torch.bool)
        >>> gone[:, 1] = True
        >>> found = impute(pair, x, mask=gone, draws=2, sweeps=3)
        >>> found.draws.shape, torch.equal(found.x[:, 0], x[:, 0])
        (torch.Size([400, 2, 3]), True)
    """
    require_counts("impute", draws=draws, samples=samples)
    refuse(not 0 < interval < 1, f"interval: expected a probability between 0 and 1; got {interval}.")
    pair = running.opened(run_or_pair)
    rows = accept(pair, x, holes=True)
    data, layout = pair.frame.split(rows)[0], pair.layout
    gone = torch.as_tensor(data.isnan() if mask is None else mask, device=rows.device)
    refuse(gone.dtype is not torch.bool or gone.shape != data.shape, "refused.mask", data=data, mask=gone)
    absent, event, n = gone | data.isnan(), tuple(data.shape[1:]), len(rows)
    require_room(pair, "impute", n, n * (draws + 8) * prod(event), f"{draws} draws")
    at = absent.flatten(1).any(1).nonzero()[:, 0]
    at = at if len(at) else at.new_zeros(1)  # a complete row, of which nothing is used

    def imputed(start: int, stop: int) -> dict[str, Tensor]:
        """Return estimates, draws and diagnostics of a chunk of incomplete rows."""
        chunk, missing, m = rows[at[start:stop]], absent[at[start:stop]], stop - start
        value = data[at[start:stop]].masked_fill(missing, 0.0 if hides else nan)
        if hides:
            prior = sample.model_samples(pair, tiled(pair.frame.join(value, chunk), FILLING_SAMPLES), mean=True).x
            value = torch.where(missing, prior.to(value).reshape(-1, *value.shape).mean(0), value)
        with Hidden(layout, tiled(missing, samples)) if hides else nullcontext():
            log_w, held, node = _visit(pair, tiled(pair.frame.join(value, chunk), samples))
        refuse(bool(log_w.isnan().any()), "refused.scores_no_missing")
        log_w, gone = log_w.reshape(samples, m), tiled(missing.flatten(1), draws)
        weights = log_w.masked_fill((log_w == -inf).all(0), 0.0).softmax(0)
        means, drawn = _read(node, layout, samples * m)
        mean = (weights[..., None].to(means) * means.reshape(samples, m, -1)).sum(0)
        index = torch.multinomial(weights.T, max(draws, samples), replacement=True).T * m + torch.arange(m).to(at)
        drawn, index = drawn[index], index[:draws].flatten()  # resampled, so that all weigh the same
        held = {name: _selected(index, layout, q) for name, q in held.items()}
        full = torch.where(gone, drawn[:draws].flatten(0, 1).to(rows), tiled(value.flatten(1), draws))
        kept: list[tuple[Tensor, Tensor]] = []
        for _ in range(rounds):
            now = pair.frame.join(full.reshape(-1, *event), tiled(chunk, draws))
            (old, _, stayed), (new, proposed, moved) = _visit(pair, now, held), _visit(pair, now)
            points = any(is_point(q["fn"]) or isinstance(unwrapped(q["fn"]), Certain) for q in held.values())
            take = (torch.rand_like(old).log() < new - old) | points
            index = torch.arange(len(take)).to(at) + take * len(take)
            held = {name: _selected(index, layout, q, proposed[name]) for name, q in held.items()}
            both = zip(_read(stayed, layout, len(take)), _read(moved, layout, len(take)), strict=True)
            mean, x = (torch.cat(t)[index] for t in both)
            full = torch.where(gone, x.to(full), full)
            kept.append((mean, full))
        if rounds:
            means, drawn = (torch.stack(t[rounds // 2 :]).reshape(-1, m, prod(event)) for t in zip(*kept, strict=True))
            mean = means.mean(0)
        found = _estimates(mean, drawn, kinds, interval)
        found = {name: t.where(missing.flatten(1), nan).reshape(m, *event) for name, t in found.items()}
        found |= {"draws": full.reshape(draws, m, *event).movedim(0, 1), "khat": pareto_k(log_w, samples)}
        return {name: t.cpu() for name, t in {**found, "ess": 1 / inverse_ess(log_w)}.items()}

    with running.analysed(pair, rows, seed):
        fn = (node := _visit(pair, few := pair.structure.few(rows))[2])["fn"]
        refuse(sweeps and isinstance(fn, Absence), "refused.sweeps")
        hides = mask is not None and not takes_missing(fn)
        whole = pair.structure.rows is None and node["value"].numel() == len(few) * prod(event) and is_elementwise(fn)
        refuse(not whole, "impute: expected rows of any number, each at one site, elements independent given z.")
        rounds, kinds = sweeps or SWEEPS * (hides and sweeps is None), kinds_of(fn, prod(event)).to(rows.device)
        found = running.by_chunks(imputed, len(at), rows[0].numel() * max(samples, draws), on_progress)
    at, absent, data = at.cpu(), absent.cpu(), data.cpu()
    full: dict[str, Any] = {name: t.new_full((n, *t.shape[1:]), nan).index_copy(0, at, t) for name, t in found.items()}
    filled = torch.where(absent, full.pop("x").to(data), data)
    completed = torch.where(absent[:, None], full.pop("draws").to(data), data[:, None])
    return Imputations(filled, absent, draws=completed, **full)


def _visit(pair: Pair, rows: Tensor, held: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any], Any]:
    """Return log p(x, z) - log q(z | x) at z ~ q(z | x), or at given latents, of rows `(m, *row)`: `(m,)`, nats.

    Also the nodes of the local latents, and that of x; codes that the model sums out are sampled given x and z.
    """
    layout, fixed = pair.layout, poutine.Trace()
    fixed.nodes.update(held or {})
    with poutine.replay(trace=fixed):
        traces = pair.traces(rows)
    guide, model = (sample_sites(trace) for trace in traces)
    log_w = log_weights(terms_of(traces, layout, 0, False, None), layout.shared).expand(len(rows))
    if layout.enumerated:
        values = {name: guide[name]["value"] for name in (*layout.latents, *layout.shared)}
        codes = encode.summed_codes(read_joint_states(model, layout, 0), model, mean=False)
        model = sample_sites(pair.model_trace(rows, values | {name: code for name, _, code in codes}))
    return log_w, {name: guide[name] for name in layout.latents}, running.datum(layout, model)


def _read(node: Any, layout: Layout, count: int) -> tuple[Tensor, Tensor]:
    """Return means and a sample of p(x | z), each `(count, D)`; the sample itself where no mean is known."""
    mean = drawn = rows_of(node["fn"].sample(), node, layout, count).reshape(count, -1)
    with suppress(NotImplementedError):
        mean = rows_of(running.distribution_mean(node["fn"]), node, layout, count).reshape(count, -1)
    return mean.to(drawn), drawn


def _estimates(mean: Tensor, drawn: Tensor, kinds: Tensor, interval: float) -> dict[str, Tensor]:
    """Return estimates `(n, D)` of x from its means and from samples of the same weight, `(K, n, D)`."""
    (real, level, category), value = kinds, drawn.sort(0).values
    low, middle, high = (value[round((1 + p) / 2 * (len(value) - 1))] for p in (-interval, 0.0, interval))
    mode = torch.where(category, drawn.mode(0).values, (mean > 0.5).to(drawn))
    found = {"mean": mean, "std": drawn.std(0, correction=0), "lower": low, "upper": high}
    found = {name: t.masked_fill(category, nan) for name, t in found.items()}
    x = torch.where(real, mean, torch.where(level, mode, middle))
    return {**found, "x": x, "probability": (drawn == mode).to(mean).mean(0).where(level, nan)}


def _selected(index: Tensor, layout: Layout, *nodes: Any) -> Any:
    """Return the first node with the values at some rows of all of them, one node's rows after the other's."""
    axis = nodes[0]["value"].dim() - len(nodes[0]["fn"].event_shape) + layout.dim
    return {**nodes[0], "value": torch.cat([node["value"] for node in nodes], axis).index_select(axis, index)}
