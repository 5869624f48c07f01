"""ELBO surgery: the ELBO of a data set taken apart, nat by nat."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from pvae.analysis.decompose.account import Account
from pvae.analysis.decompose.aggregated import MEMORY
from pvae.analysis.decompose.by_covariate import by_group
from pvae.analysis.decompose.entry import accept, quiet
from pvae.analysis.decompose.posterior_draws import Draw, draw
from pvae.analysis.decompose.result import Surgery
from pvae.analysis.decompose.surgery_figures import close
from pvae.data import Dataset
from pvae.errors import DataError
from pvae.experiment.plan import Plan
from pvae.pair.pair import Pair
from pvae.util import seeds

CLASSES_AT_MOST = 1000
"""Largest number of classes of labels."""
RECORDED = ("elbo", "reconstruction", "kl", "mutual_information", "marginal_kl", "total_correlation", "coordinate_kl")
"""Terms of a surgery that are recorded."""


def surgery(
    pair: Pair,
    x: Tensor,
    samples: int = 1,
    seed: int = 0,
    *,
    labels: Tensor | None = None,
    train: Tensor | None = None,
    components: int | None = None,
    memory: int = MEMORY,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Surgery:
    r"""Return the ELBO of `pair` on the data `x`, taken apart.

    (1/n) sum_i KL(q(z|x_i) || p(z)) = I_q[x, z] + KL(q_agg || p), with q_agg = (1/n) sum_i q(z|x_i) over all n
    rows. Each Monte Carlo term is a mean over the same samples z_i ~ q(z|x_i):

    - `kl`: log q(z_i|x_i) - log p(z_i)
    - `mutual_information`: log q(z_i|x_i) - log q_agg(z_i), with the sum over all rows in float64
    - `marginal_kl`: the difference of the two
    - `elbo`: log p(x_i|z_i) minus `kl`

    A code of at most 4096 joint states is summed over instead, and exact; so is one that is known for certain (a
    nearest code), whatever its size: rows of the same joint code are counted. Positions of a grid are exact one by one.
    Relaxed latents are taken as the codes they stand for, and `relaxed_elbo` is that of the relaxed ones.

    For a latent that reads no other, the marginal KL splits further: total correlation KL(q_agg || prod_d q_agg(z_d))
    and a sum over coordinates.

    Where the guide has several levels, q_agg is that of all levels together (each level's density is evaluated
    at the shared z), on a stated subset of samples; where rows are too many for that, components are a random subset
    too and I_q stands between two bounds (`AggregatedPosterior.information`).

    Weights that handlers put on sites (poutine.scale) are left out: the figures are of the ELBO itself. Global latents
    have one KL for all data, outside of q_agg; where the guide samples them, a sample of all data is one unit
    of error, and latents that read them have no information of their own.

    A model conditioned on covariates y is taken apart group by group: I_q[x, z | y] and E_y KL(q_agg(z|y) || p(z|y)),
    with log n the mean of the groups' own ceilings.

    Warning: with samples=1 a standard error cannot tell Monte Carlo noise from spread over the data; the total is
    given and called conservative.

    References:
        ELBO surgery (Hoffman, Johnson, 2016), http://approximateinference.org/accepted/HoffmanJohnson2016.pdf
        Isolating Sources of Disentanglement (Chen et al., 2018), https://arxiv.org/abs/1802.04942

    Arguments:
        pair: any Pyro pair.
        x: data `(n, *event)`.
        samples: samples of the latents per row.
        seed: of the samples; the same seed, the same numbers.
        labels: integers `(n,)`; the figures are then also given class by class.
        train: other rows `(m, *event)`, whose q_agg is tried as the prior of `x`.
        components: take this many rows, at random, for q_agg, and give bounds; default: as many as time allows.
        memory: bytes that scoring q_agg may take beside the samples, whatever n.
        on_progress: called with (samples done, samples in all).

    Returns:
        Surgery; figures are estimates in nats per datum, `kl_exact`, `log_n` and sums over codes exact.

    Raises:
        DataError: `x` has no rows, or labels do not fit it.

    Example:
        >>> from pvae import Experiment
        >>> pair = Experiment.load("vae").build((1, 8, 8))
        >>> found = surgery(pair, torch.zeros(4, 1, 8, 8))
        >>> abs(found.elbo.value - (found.reconstruction.value - found.kl.value)) < 1e-9
        True
    """
    if samples < 1:
        raise DataError(f"surgery: expected at least one draw; got samples={samples}.")
    x = accept(pair, x)
    train = None if train is None else accept(pair, train)
    if not pair.layout.latents and not pair.layout.enumerated:
        raise DataError(f"surgery: expected latents of single data; got only global {', '.join(pair.layout.shared)}.")
    y = _labels(labels, x)
    pooled = by_group(
        pair, x, _labels(labels, x), train,
        lambda rows, y, other, own: surgery(
            pair, rows, samples, own, labels=y, train=other, components=components, memory=memory
        ),
        seed,
    )  # fmt: skip
    if pooled is not None:
        return pooled
    found = pair.dependencies(x)
    with quiet(pair, x, seed):
        first = draw(pair, x)
        account = Account(pair, x, first, found, seed, components, memory)
        for done in range(1, samples + 1):
            account.take(_honest(first if done == 1 or account.certain else draw(pair, x), found.bottom_up))
            on_progress(done, samples)
    return close(account, y, train)


def _labels(labels: Any, x: Tensor) -> Tensor | None:
    """Return labels as class numbers `(n,)`."""
    if labels is None:
        return None
    try:
        y = torch.as_tensor(labels, device=x.device)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"labels: expected {len(x)} integers; got something else: {type(labels).__name__}.") from None
    if y.shape != (len(x),) or y.is_floating_point():
        raise DataError(f"labels: expected {len(x)} integers; got shape {list(y.shape)} of {y.dtype}.")
    if len(y.unique()) > CLASSES_AT_MOST:
        raise DataError(f"labels: expected at most {CLASSES_AT_MOST} classes; got {len(y.unique())}.")
    return y


def _honest(d: Draw, bottom_up: Collection[str]) -> Draw:
    """Drop closed-form KLs that are invalid for bottom-up guides, whose priors read latents inferred from it."""
    for name in bottom_up:
        if not d.latents[name].certain:  # nothing is averaged over
            d.latents[name].kl = d.latents[name].p = None
    return d


def record(plan: Plan, pair: Pair, data: Dataset) -> dict[str, float]:
    """Return the surgery of a few rows as a row of metrics: mean terms and active units, nats per datum.

    The same rows and the same noise every time, so that what changes is the pair.
    """
    watched = plan.analysis
    x = data.split(watched.split).rows
    chosen = seeds.subset(len(x), watched.rows, seeds.mix(plan.seed, seeds.ANALYSIS, 4)).to(x.device)
    found = surgery(pair, x[chosen], samples=watched.samples, seed=plan.seed)
    figures = {name: e.value for name, e, _ in found.known() if name in RECORDED}
    active = {f"active/{name}": z.active_units for name, z in found.latents.items() if z.active_units is not None}
    return {**figures, "log_n": found.log_n.value, **active}
