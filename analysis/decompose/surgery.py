"""ELBO surgery: decomposition of the mean ELBO into reconstruction, mutual information and marginal KL; refits."""

from functools import partial
from typing import Any

import torch
from rich.console import Group
from rich.text import Text
from torch import Tensor

from pvae.analysis.aggregate.aggregated import MEMORY
from pvae.analysis.aggregate.entry import accept, quiet, require_room
from pvae.analysis.decompose.account import Account
from pvae.analysis.decompose.by_covariate import by_group, by_known, by_presence, priors_by_row, settled
from pvae.analysis.decompose.posterior_draws import Draw, draw
from pvae.analysis.decompose.result import SURGERY_TERMS, Surgery, side_by_side
from pvae.analysis.decompose.surgery_figures import Asked, close, labels_of, on_new_data
from pvae.analysis.figures.estimate import Estimate, over_draws, refuse, text
from pvae.analysis.population.interval import Population
from pvae.data import Dataset
from pvae.errors import instead
from pvae.experiment.plan import Plan
from pvae.pair import Pair, PairData
from pvae.util import Progress, Record, plain, replace, seeds, silent

CLASSES_AT_MOST = 1000
"""Largest number of distinct class labels that `surgery` accepts."""
RECORDED = (*SURGERY_TERMS, "total_correlation", "coordinate_kl")
"""Terms of a surgery that `record` returns as metrics."""


def surgery(
    pair: Pair, x: PairData, samples: int = 1, seed: int = 0, *, labels: Tensor | None = None,
    train: PairData | None = None, components: int | None = None, memory: int = MEMORY, seen: bool = False,
    population: Asked | None = "rows", on_progress: Progress = silent,
) -> Surgery:  # fmt: skip
    r"""Return the decomposition of the mean ELBO of `pair` on the data `x`.

    (1/n) sum_i KL(q(z|x_i) || p(z)) = I_q[x, z] + KL(q_agg || p), with q_agg = (1/n) sum_i q(z|x_i) over all n
    rows. Each Monte Carlo term is a mean over the same samples z_i ~ q(z|x_i):

    - `kl`: log q(z_i|x_i) - log p(z_i)
    - `mutual_information`: log q(z_i|x_i) - log q_agg(z_i), with the sum over all rows in float64
    - `marginal_kl`: the difference of the two
    - `elbo`: log p(x_i|z_i) minus `kl`

    For a discrete latent of at most 4096 joint states these terms are exact sums over all states. They are also exact,
    for any number of states, if x determines the code (the nearest codebook row): q_agg is then the proportion of rows
    with the same joint code. Terms of a single grid position are always exact. Relaxed latents are replaced by the
    discrete codes they stand for; only `relaxed_elbo` is the ELBO of the relaxed latents.

    For a latent whose posterior depends on x alone, the marginal KL splits further, into the total correlation
    KL(q_agg || prod_d q_agg(z_d)) and the sum of the marginal KLs of its coordinates.

    If the guide has several levels, q_agg is their joint aggregated posterior (each level's density is evaluated at
    the shared z), scored on a subset of samples that `notes` states. With too many rows for that, its components are a
    random subset as well, and I_q has a lower and an upper bound (`AggregatedPosterior.information`).

    Weights from poutine.scale are ignored: the terms are those of the unweighted ELBO. Global latents have one KL for
    all data, which is not part of q_agg. If the guide samples them, standard errors take into account that all rows of
    a sample share them, and latents that depend on them have no mutual information of their own.

    For a model conditioned on covariates y, every group of rows with the same y has a surgery of its own, and the terms
    are their means: I_q[x, z | y], E_y KL(q_agg(z|y) || p(z|y)) and the mean of the groups' log n.

    Rows in which a latent y is known (`Run.labelled`) beside others have a surgery each, see `Surgery.parts`: of
    log p(x, y), and of log p(x). The terms are their means, in proportion to the rows.

    A latent whose prior differs from row to row (a conditional model written by hand) has no one marginal KL, a latent
    that is absent or masked in some rows no mutual information: these are None, and `notes` says why. Where the guide
    sets a continuous latent to a point (Delta), `log_joint` takes the place of `elbo`.

    Warning: with samples=1 a standard error cannot separate Monte Carlo noise from spread over the data; it then
    contains both, and the note says "conservative".

    References:
        ELBO surgery (Hoffman, Johnson, 2016), http://approximateinference.org/accepted/HoffmanJohnson2016.pdf
        Isolating Sources of Disentanglement (Chen et al., 2018), https://arxiv.org/abs/1802.04942

    Arguments:
        pair: any Pyro pair.
        x: data `(n, *event)`.
        samples: samples of the latents per row.
        seed: seed of the samples; the same seed gives the same numbers.
        labels: class labels, integers `(n,)`, NaN where a row has none; the terms are then also given by class.
        train: other (training) rows `(m, *event)`, whose q_agg is evaluated as a prior for `x`.
        components: number of rows, chosen at random, whose posteriors form q_agg; information and marginal KL are then
            bounds; default: as many as time allows.
        memory: bytes that scoring q_agg may take in addition to the samples, for any n.
        seen: True if encoder or prior was fitted on `x`: nothing is then said of new data.
        population: how the interval on new data is made: "rows" from these rows, or from `train` where given; "full"
            also by a Gaussian mixture and a flow fitted to `train`; "model" with more rows simulated by the model; None
            for none.
        on_progress: called with (samples done, samples in all).

    Returns:
        Surgery, nats per datum; the `kind` of every term tells exact values, bounds and estimates apart.

    Raises:
        DataError: `x` has no rows, or labels do not fit it.

    Example:
        >>> from pvae import Experiment
        >>> pair = Experiment.load("vae").build((1, 8, 8))
        >>> found = surgery(pair, torch.zeros(4, 1, 8, 8))
        >>> abs(found.elbo.value - (found.reconstruction.value - found.kl.value)) < 1e-9
        True
    """
    refuse(samples < 1, f"surgery: expected at least one draw; got samples={samples}.")
    x = accept(pair, x, mixed=True)
    points = [name for name in pair.frame.known(x, every=False) if not pair.frame.entries[name].codes]
    refuse(points, "refused.known", names=points)  # a value has no density under q_agg
    kept = samples * len(x) * (1 + 6 * (len(pair.layout.latents) + len(pair.layout.enumerated)))
    require_room(pair, "surgery", 4 * len(x), kept, f"{samples:,} samples of {len(x):,} rows")
    train = None if train is None else accept(pair, train)
    y = _labels(labels, x)

    apart = partial(surgery, pair, samples=samples, components=components, memory=memory, seen=seen, population=None)
    if (found := by_known(pair, x, y, partial(apart, population=population), seed)) is not None:
        return replace(found, seen=seen)
    pooled = by_group(pair, x, y, train, apart, seed)
    if pooled is not None and (seen or population is None):
        return replace(pooled, seen=seen)
    with quiet(pair, x, seed):
        first = draw(pair, x)
        depend, every = pair.dependencies(x), frozenset(first.latents)  # of all sites that these rows have
        if settled(first, pair, x) and not pair.layout.shared and pair.structure.rows is None:
            present = by_presence(first, pair, x, y, partial(apart, population=population), seed)
            if present is not None:
                return replace(present, seen=seen)
        account = Account(pair, x, first, depend, seed, components, memory, priors_by_row(pair, x), every)
        if pooled is None:
            for done in range(1, samples + 1):
                account.take(_honest(first if done == 1 or account.certain else draw(pair, x), depend.bottom_up))
                on_progress(done, samples)
    found = replace(close(account, y, train) if pooled is None else pooled, seen=seen)
    if seen or population is None:
        return found
    new = on_new_data(account, train, population)
    return replace(found, notes=(*found.notes, new)) if isinstance(new, str) else replace(found, population=new)


def _labels(labels: Any, x: Tensor) -> Tensor | None:
    """Return class labels `(n,)` on the device of `x`, NaN where there is none; refuse any other shape or type."""
    if labels is None:
        return None
    with instead((TypeError, ValueError, RuntimeError), "analysis.surgery.labels", x=x, labels=labels):
        y = torch.as_tensor(labels, device=x.device)
    odd = y.shape != (len(x),) or bool((y != y.round())[~y.isnan()].any())
    refuse(odd or (y.is_floating_point() and not y.isnan().any()), "refused.labels", n=len(x), y=y)
    refuse((k := len(labels_of(y))) > CLASSES_AT_MOST, f"labels: expected at most {CLASSES_AT_MOST} classes; got {k}.")
    return y


def _honest(d: Draw, bottom_up: frozenset[str]) -> Draw:
    """Drop closed-form KLs of `bottom_up` latents, whose priors depend on latents that the guide infers from them."""
    for latent in (d.latents[name] for name in bottom_up & d.latents.keys()):  # rows may lack some
        if not latent.certain:  # nothing is averaged over
            latent.kl = latent.p = None
    return d


def record(plan: Plan, pair: Pair, data: Dataset) -> dict[str, float]:
    """Return the terms of a surgery of some rows as metrics by name: nats per datum, and active units by latent.

    Rows and noise are the same in every call, so that all differences between calls come from the pair.
    """
    watched = plan.analysis
    x = data.split(watched.split).rows
    chosen = seeds.subset(len(x), watched.rows, seeds.mix(plan.seed, seeds.ANALYSIS, 4)).to(x.device)
    found = surgery(pair, x[chosen], samples=watched.samples, seed=plan.seed, population=None)
    figures = {name: e.value for name, e, _ in found.known() if name in RECORDED}
    active = {f"active/{name}": z.active_units for name, z in found.latents.items() if z.active_units is not None}
    return {**figures, "log_n": found.log_n.value, **active}


# ---------------------------------------------------------------------- two priors under one encoder


class Gain(Record):
    """ELBO gain of a new prior: surgeries of one data set before and after the change; nats per datum."""

    before: Surgery
    after: Surgery
    gained: Estimate
    """ELBO after minus ELBO before on the same samples: E[log p_after(z) - log p_before(z)]."""

    @property
    def interval(self) -> Population | None:
        """Interval for what a better prior wins on new data, under the old prior; None where the surgery has none."""
        return self.before.population

    def sentence(self) -> str:
        """Return the gain as a sentence, beside the interval that new data had before the change."""
        return text("surgery.gain", found=self)

    def to_dict(self) -> dict[str, Any]:
        """Return the gain, the interval before it and both surgeries as plain numbers and strings for JSON."""
        parts = ("gained", "interval", "before", "after")
        return dict(plain({"unit": "nats per datum", **{name: getattr(self, name) for name in parts}}))

    def __str__(self) -> str:
        return self.sentence()

    def __rich__(self) -> Group:
        return Group(side_by_side({"before": self.before, "after": self.after}), Text(self.sentence()))


def gain(
    before: Pair, after: Pair, x: Tensor, samples: int = 1, seed: int = 0, *, seen: bool = False,
    on_progress: Progress = silent,
) -> Gain:  # fmt: skip
    """Return the ELBO gain of a new prior, measured on the same samples, and the surgeries before and after.

    Arguments:
        before: the pair with the old prior.
        after: the pair with the new prior and the same encoder and decoder.
        x: data `(n, *event)`.
        samples: samples per row.
        seed: seed of the samples.
        seen: True for rows that either pair was fitted on; there is then no interval for new data.
        on_progress: called with (surgeries done, surgeries in all).

    Returns:
        Gain, nats per datum; `gained` is an estimate whose Monte Carlo error is that of paired differences.

    Raises:
        DataError: the two guides sample different latents.

    Example:
        >>> from pvae import Experiment
        >>> pair = Experiment.load("vae").build((1, 8, 8))
        >>> gain(pair, pair, torch.zeros(4, 1, 8, 8)).gained.value
        0.0
    """
    accept(after, x)
    x = accept(before, x)
    terms = []
    for pair in (before, after):
        with quiet(pair, x, seed):
            terms.append([_nats(pair, x) for _ in range(samples)])
    pairs = list(zip(*terms, strict=True))
    refuse(not all(torch.equal(one[0], other[0]) for one, other in pairs), "refused.other_encoder")
    gained = over_draws(torch.stack([other[1] - one[1] for one, other in pairs]))
    found = []
    for i, pair in enumerate((before, after)):
        asked: Asked | None = None if i else "rows"
        found.append(surgery(pair, x, samples=samples, seed=seed, seen=seen, population=asked))
        on_progress(i + 1, 2)
    return Gain(found[0], found[1], gained)


def _nats(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return one sample of all latents, `(n, D)`, and its log p(x, z), `(n,)`, nats."""
    d = draw(pair, x)
    scores = [latent.log_p for latent in d.latents.values()]
    return d.flat(list(d.latents)), d.reconstruction + torch.stack(scores).sum(0)
