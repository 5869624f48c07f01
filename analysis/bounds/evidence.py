"""Importance-weighted lower bounds on log p(x), with samples of the guide or of the prior."""

from contextlib import nullcontext

import pyro
import torch
from torch import Tensor

from pvae.analysis.aggregate.entry import accept, quiet, require_counts, require_likelihood, same_globals
from pvae.analysis.bounds.accumulate import accumulate_weights
from pvae.analysis.bounds.weights import Evidence, PriorEvidence, log_weights, one_by_one, side_by_side
from pvae.analysis.decompose.codes import log_evidence
from pvae.analysis.figures.estimate import exact_mean, refuse, scaled
from pvae.pair import PARTICLES, Pair, PairData, Terms, full_size, is_point, log_prob, samples as sample_sites, sum_over
from pvae.util import Progress, silent


def evidence(
    pair: Pair, x: PairData, samples: int = 5000, seed: int = 0, *, on_progress: Progress = silent
) -> Evidence:
    r"""Bound the mean log p(x) from below by importance sampling from the guide (the IWAE bound).

    With log weights log w_k = log p(x, z_k) - log q(z_k | x), z_k ~ q(z | x), the bound with K samples is

        L_K = E log 1/K sum_k w_k <= log p(x),   L_1 = ELBO,

    and L_K rises with K towards log p(x). The samples of a datum are split into groups of K, and L_K is estimated by
    the mean over groups of log mean w, which is unbiased. Groups are nested, so the estimates never fall with K.
    Weights are summed as they are sampled: memory does not grow with `samples`. The Monte Carlo error of a datum comes
    from the variance over groups; for the single group of all samples from the jackknife over samples
    (`weights.squared_error`).

    Global latents that the guide sets to points (Delta) are taken as given: the bound is on log p(x | points) and
    does not include their KL. Global latents that it samples make all rows depend on each other: every weight is then
    that of the whole data set, log p(g_k) - log q(g_k) + sum_i [log p(x_i, z_ik | g_k) - log q(z_ik | x_i, g_k)], and
    the bounds are those on log p(x_1, ..., x_n), divided by n; `log_p`, `ess` and `khat` have one entry, `joint` is
    True.

    Warning: where the guide is narrower than the posterior the weights may have infinite variance, and the bound is
    then loose; a low `ess` or a high `khat` indicates this.

    References:
        Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov, 2015), https://arxiv.org/abs/1509.00519
        Pareto Smoothed Importance Sampling (Vehtari et al., 2024), https://arxiv.org/abs/1507.02646

    Arguments:
        pair: any Pyro pair.
        x: data `(n, *event)`.
        samples: the largest K.
        seed: seed of the samples; the same seed gives the same numbers.
        on_progress: called with (rows done, rows in all).

    Returns:
        Evidence, nats per datum. `curve`, whose ends are `elbo` and `iwae`, holds lower bounds with Monte Carlo errors;
        `exact` is log p(x) where it is known. A datum that no sampled z explains has log p = -inf.

    Raises:
        DataError: there are no rows or no samples, or the posterior has no density.

    Example:
        >>> from pvae.analysis.truths.example import example_pair
        >>> pair, x = example_pair()
        >>> found = evidence(pair, x, samples=100)
        >>> found.elbo.kind, found.elbo.value < found.iwae.value
        ('lower_bound', True)
    """
    require_counts("evidence", samples=samples)
    x = accept(pair, x)
    with quiet(pair, x, seed):
        certain = require_posterior(pair)
        if not pair.structure.points.issuperset(pair.layout.shared):
            return _joint_evidence(pair, x, samples, on_progress)
        given = _points(pair, x, "evidence")

        def weights(x: Tensor, count: int) -> Tensor:
            particles = 1 if certain else count  # where nothing is drawn all weights are equal
            return log_weights(pair.terms(x, particles=particles), given).expand(count, len(x))

        found = accumulate_weights(x, samples, weights, on_progress, together=pair.structure.rows is not None)
        summed = None if pair.layout.shared or pair.layout.enumerated else log_evidence(pair, x)
    if certain:
        summed = found.log_p
    exact = None if summed is None or pair.structure.bounds else exact_mean(summed.cpu())
    return Evidence(len(x), samples, found.curve(), found.log_p, found.ess, found.khat, exact)


def prior_evidence(
    pair: Pair, x: PairData, samples: int = 5000, seed: int = 0, *, on_progress: Progress = silent
) -> PriorEvidence:
    r"""Bound the mean log p(x) from below by simple Monte Carlo with samples of the prior.

    The bound with K samples is E log 1/K sum_k p(x | z_k) <= log p(x), z_k ~ p(z). With K = 1 it is Jensen's bound
    E_p(z) log p(x | z), which is KL(p(z) || p(z|x)) below log p(x). The guide is not used, so this checks the result of
    `evidence` for latents of few dimensions; in many dimensions hardly any sample explains x. Errors, memory and global
    latents are as in `evidence`.

    Warning: where the posterior is much narrower than the prior, few samples carry all the weight; the bound is then
    loose. A low `ess` or a high `khat` indicates this.

    References:
        On the Quantitative Analysis of Decoder-Based Generative Models (Wu, Burda, Salakhutdinov, Grosse, 2016),
        https://arxiv.org/abs/1611.04273

    Arguments:
        pair: any Pyro pair.
        x: data `(n, *event)`.
        samples: the largest K.
        seed: seed of the samples; the same seed gives the same numbers.
        on_progress: called with (rows done, rows in all).

    Returns:
        PriorEvidence, nats per datum. `curve`, whose ends are `jensen` and `evidence`, holds lower bounds with Monte
        Carlo errors.

    Raises:
        DataError: there are no rows or no samples, global latents are not points, or z determines x.

    Example:
        >>> from pvae.analysis.truths.example import example_pair
        >>> pair, x = example_pair()
        >>> found = prior_evidence(pair, x, samples=100)
        >>> found.jensen.value < found.evidence.value
        True
    """
    require_counts("prior_evidence", samples=samples)
    x = accept(pair, x, guide=False)
    with quiet(pair, x, seed):
        given = _points(pair, x, "prior_evidence")
        require_likelihood(pair, "prior_evidence")

        def weights(x: Tensor, count: int) -> Tensor:
            return _likelihood(pair, x, count, given)

        draws = {"plate": weights, "rows": side_by_side(weights), "one by one": one_by_one(weights)}
        draw = draws[pair.way_of_particles(x)]
        found = accumulate_weights(x, samples, draw, on_progress, together=pair.structure.rows is not None)
    return PriorEvidence(len(x), samples, found.curve(), found.log_p, found.ess, found.khat)


def _joint_evidence(pair: Pair, x: Tensor, samples: int, on_progress: Progress) -> Evidence:
    """Return bounds on log p(x_1, ..., x_n), divided by n, from weights of the whole data set."""
    n = len(x)
    _require_fixed_points(pair, x)
    size = full_size(pair.traces(pair.structure.few(x))[1], pair.layout, n)
    at_once = n <= pair.structure.rows_at_once() and pair.way_of_particles(x) == "plate"

    def weight(terms: Terms) -> Tensor:
        found = log_weights(terms, pair.layout.shared)
        return found.reshape(-1, found.shape[-1]).sum(1)

    def ratio(terms: Terms) -> Tensor:
        shares = [terms.kl[name].double() for name in pair.layout.shared if name not in pair.structure.points]
        return -size * sum_over(shares).reshape(-1)

    def draw(whole: Tensor, count: int) -> Tensor:
        rows = whole[0]
        if at_once:
            terms = pair.terms(rows, particles=count, rows=n)
            return (weight(terms) + ratio(terms))[:, None]
        return torch.stack([_one_weight(rows) for _ in range(count)])[:, None]

    def _one_weight(rows: Tensor) -> Tensor:
        with same_globals(pair, rows):
            parts = [pair.terms(part, rows=n) for part in rows.split(pair.structure.rows_at_once())]
        return (sum_over([weight(part) for part in parts]) + ratio(parts[0]))[0]

    found = accumulate_weights(x[None], samples, draw, on_progress)
    curve = tuple((k, scaled(bound, 1 / n)) for k, bound in found.curve())
    return Evidence(n, samples, curve, found.log_p, found.ess, found.khat, None, joint=True)


def _require_fixed_points(pair: Pair, x: Tensor) -> None:
    """Refuse a global point that moves with other latents of the guide: no bound is conditional on it.

    Raises:
        DataError: the message names the latents.
    """
    one, other = (sample_sites(pair.guide_trace(pair.structure.few(x))) for _ in range(2))
    points = [name for name in pair.layout.shared if name in pair.structure.points]
    moving = [name for name in points if not torch.equal(one[name]["value"], other[name]["value"])]
    refuse(moving, "refused.moving_points", names=moving)


def require_posterior(pair: Pair) -> bool:
    """Refuse a posterior without a density, unless z and x determine each other (a flow).

    Returns:
        True if log p(x) is known exactly: in a flow, and where the model sums all its latents out.
    """
    points = [name for name in pair.layout.latents if name in pair.structure.points]
    refuse(points and not pair.structure.determined, "refused.points", names=points)
    return len(points) == len(pair.layout.latents)


def _likelihood(pair: Pair, x: Tensor, count: int, given: dict[str, Tensor]) -> Tensor:
    """Return log p(x | z) with z sampled from the prior, `(count, batch)`, nats."""
    particles = count if count > 1 else 0
    with pyro.plate(PARTICLES, count, dim=-1 - pair.layout.nesting) if particles else nullcontext():
        trace = pair.model_trace(x, given)
    observed = [trace.nodes[name] for name in pair.layout.observed if name in trace.nodes]
    return sum_over([log_prob(node, pair.layout, particles).double() for node in observed])


def _points(pair: Pair, x: Tensor, caller: str) -> dict[str, Tensor]:
    """Return the values of the global latents; raise DataError unless the guide sets all of them to points."""
    if not pair.layout.shared:
        return {}
    nodes = sample_sites(pair.guide_trace(pair.structure.few(x)))
    spread = [name for name in pair.layout.shared if not is_point(nodes[name]["fn"])]
    refuse(spread, "refused.global_densities", caller=caller, names=spread)
    return {name: nodes[name]["value"] for name in pair.layout.shared}
