"""Sections on latents: KL and activity of coordinates, q_agg against prior, holes, use of codes, labels from codes."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pvae.analysis.aggregate.aggregated import AggregatedPosterior
from pvae.analysis.decompose.collapse import CodeUse
from pvae.analysis.figures.estimate import Estimate, proportion, refuse
from pvae.analysis.pages.document.blocks import PageTable, Part, Picture, Sentence
from pvae.analysis.pages.document.words import picture, section, table, text, tile
from pvae.analysis.pages.plots import bars, base, clouds
from pvae.analysis.pages.sections.examination import Examination
from pvae.analysis.samples.features import is_image
from pvae.analysis.samples.probe import RAW, groups as groups_of, probe as probe_of
from pvae.pair.code_usage import SILENT
from pvae.training.evaluation import FIGURES, classified, predicted
from pvae.util import Record, seeds

HOLE = 0.01
"""Quantile of log q_agg at held-out codes that is the threshold of a hole: 1 % of held-out codes lie below it."""
MANY_HOLES = 0.5
"""Proportion of prior samples in holes above which the report gives an alert."""
ALL_AT_ONCE, PAIR_BY_PAIR = (20_000, 2000), (1000, 500)
"""Largest numbers of training rows that form q_agg, and of codes and prior samples scored under it.

`PAIR_BY_PAIR` is for posteriors that depend on other latents, where the guide runs for each row and sample.
"""


@section("latents", scored=True)
def latents(exam: Examination) -> Iterator[Part]:
    """Yield active units, marginals and planes of latents, and holes; nothing for a model without a likelihood."""
    figures = []
    for name, z in exam.held.latents.items():
        use, total = exam.collapse.latents[name], None if z.dimensions is None else z.dimensions.total_correlation
        figures.append((name, use.dim, use.active, z.kl, z.kl_exact, z.mutual_information, z.marginal_kl, total))
    yield table("latents", figures, split=exam.split)
    real = [name for name, latent in exam.collapse.latents.items() if latent.codes is None]
    coded = [name for name in exam.collapse.latents if name not in real]
    for name in real:
        yield from _units(exam, name)
        yield from _against_prior(exam, name)
    yield from _curves(exam, real)
    yield from (Sentence(said, True) for said in exam.collapse.alerts)
    if not exam.collapse.alerts:
        units = [z.dim for z in exam.collapse.latents.values() if z.active is not None]
        yield text("latents.in_use", coded=coded, units=units, count=exam.collapse.n)
    found = exam.attempt("holes", holes, exam)
    yield {"collapse": exam.collapse.to_dict(), "holes": None if found is None else vars(found)}
    if found is not None:
        many = found.share > MANY_HOLES
        yield Sentence(text("latents.holes", holes=found, quantile=HOLE, many=many), many)
        yield tile("latents.hole", holes=found, quantile=HOLE)


def _units(exam: Examination, name: str) -> Iterator[Part]:
    """Yield a bar chart and a table of the KL and activity of each coordinate of a latent; nothing without either."""
    latent, d = exam.collapse.latents[name], exam.held.latents[name].dimensions
    if latent.activity is None and latent.kl_per_dimension is None:
        return
    figures = {"KL": latent.kl_per_dimension, "variance of the mean": latent.activity}
    figures |= {} if d is None else {"I_q": d.mutual_information, "marginal KL": d.marginal_kl}
    there = {title: values for title, values in figures.items() if values is not None}
    rows = tuple((i, *(values[i] for values in there.values())) for i in range(latent.dim))
    yield picture("latents.units", bars.units(name, latent), of=name, latent=latent, least=SILENT.variance)
    yield table("latents.units", rows, *there, of=name, folded=latent.dim > 5, split=exam.split)


def _against_prior(exam: Examination, name: str) -> Iterator[Picture]:
    """Yield plots of q_agg against the prior of a latent: marginal distributions, and the two leading directions."""
    if name not in exam.prior:
        return
    seen, labels = cloud(exam, name), colours(exam)
    if seen.values.shape[1] > 1:
        d = exam.held.latents[name].dimensions
        costs = None if d is None else d.marginal_kl
        order = np.argsort(-np.array(costs if costs else seen.means.var(0)), kind="stable")
        made = clouds.marginals(seen, order.tolist(), costs)
        yield picture("latents.marginals", made, of=name, known=bool(costs))
    made = clouds.plane(seen, labels, exam.data.label_names)
    yield picture("latents.plane", made, of=name, coloured=labels is not None)


def cloud(exam: Examination, name: str) -> clouds.Cloud:
    """Return the points of a latent of which the prior has samples: posterior means and samples, and prior samples."""
    latent, normal = exam.drawn.latents[name], None
    p, means = latent.normal_prior, latent.value if latent.normal is None else latent.normal.loc
    if p is not None and bool((p.loc == p.loc[:1]).all()) and bool((p.scale == p.scale[:1]).all()):
        normal = (base.array(p.loc[0]), base.array(p.scale[0]))
    return clouds.Cloud(name, base.array(means), base.array(latent.value), base.array(exam.prior[name]), normal)


def colours(exam: Examination) -> np.ndarray | None:
    """Return the labels of the rows `(n,)`, if there are few enough to be colours; None otherwise."""
    labels = None if exam.labels is None else exam.labels.numpy()
    return labels if clouds.groups(labels) else None


def _curves(exam: Examination, names: list[str]) -> Iterator[PageTable]:
    """Yield the table of active units by threshold on the variance; nothing if the activity of all is unknown."""
    if not (use := {name: exam.collapse.latents[name] for name in names if exam.collapse.latents[name].curve}):
        return
    thresholds = [f"> {threshold:g}" for threshold, _ in next(iter(use.values())).curve[::4]]
    rows = tuple((name, latent.dim, *(count for _, count in latent.curve[::4])) for name, latent in use.items())
    yield table("latents.active_units", rows, *thresholds, usual=SILENT.variance)


# ---------------------------------------------------------------------- holes of the prior


class Holes(Record):
    """Proportion of prior samples in holes of the aggregated posterior, with its settings; the result of `holes`."""

    share: float
    """Proportion of prior samples at which log q_agg is below `threshold`; a Monte Carlo estimate."""
    error: float
    """Standard error of `share`, from the number of prior samples."""
    expected: float
    """Proportion of held-out codes in holes, 0.01 by construction of the threshold."""
    threshold: float
    """Threshold in nats: z lies in a hole if log q_agg(z) is below it."""
    rows: int
    """Number of training rows whose posteriors form q_agg."""
    draws: int
    """Number of prior samples that were scored."""


def holes(exam: Examination) -> Holes:
    """Return the proportion of prior samples where the density q_agg of train is lower than at 99 % of held-out codes.

    Held-out codes and prior samples are scored under the same q_agg, formed from training rows. A prior equal to the
    distribution of held-out codes would have 1 % of its samples in holes.

    Raises:
        DataError: the reported split is train, the model has covariates, a posterior is not normal (a point, or
            discrete), or a prior has no samples.
    """
    refuse(exam.split == "train", "refused.from_train")
    names = list(exam.pair.layout.latents)
    known = [exam.drawn.latents[name] for name in names]
    others = exam.pair.frame.covariates or any(latent.point or latent.normal is None for latent in known)
    refuse(others, "holes: expected normal posteriors of a model without covariates; got others.")
    refuse(missing := [name for name in names if name not in exam.prior], "refused.no_prior_draws", names=missing)
    most, draws = ALL_AT_ONCE if set(names) <= exam.pair.dependencies(exam.x).guide_roots else PAIR_BY_PAIR
    chosen = seeds.subset(len(exam.rows["train"].x), most, seeds.mix(exam.seed, seeds.ANALYSIS, 31))
    q = AggregatedPosterior.of(exam.pair, exam.rows["train"].x[chosen.to(exam.x.device)], latents=names)
    held = exam.drawn.flat(names)
    held = held[seeds.subset(len(held), draws, seeds.mix(exam.seed, seeds.ANALYSIS, 32)).to(held.device)]
    prior = torch.cat([exam.prior[name] for name in names], 1)[:draws].to(held)
    threshold = torch.quantile(q.log_prob(held), HOLE)
    share = float((q.log_prob(prior) < threshold).double().mean())
    return Holes(share, math.sqrt(share * (1 - share) / len(prior)), HOLE, float(threshold), len(chosen), len(prior))


# ---------------------------------------------------------------------- codes

MAPPED_DATA = 6
"""Number of data whose codes are shown as maps."""
LISTED_CODES = 4096
"""Largest number of codes K for which the proportion of each code is listed in a table."""


@section("codes", scored=True)
def codes(exam: Examination) -> Iterator[Part]:
    """Yield usage, perplexity and maps of every discrete latent; nothing if no latent is discrete."""
    if uses := {name: z.codes for name, z in exam.collapse.latents.items() if z.codes is not None}:
        yield _code_table(exam, uses)
    for name, use in uses.items():
        yield picture("codes.codes", bars.code_use(name, use), of=name, use=use)
        yield from _maps(exam, name, use)
        if use.share is not None and use.states <= LISTED_CODES:
            yield table("codes.codes", list(enumerate(use.share, 1)), of=name, digits=5, folded=True, split=exam.split)


def _code_table(exam: Examination, uses: dict[str, CodeUse]) -> PageTable:
    rows, every = [], dict(uses)
    for name, use in uses.items():
        every |= {f"{name}, code {i}": part for i, part in enumerate(use.parts, 1)}
    for name, use in every.items():
        count = len(use.perplexity)
        information, mean = (sum(values) / count for values in (use.information, use.perplexity))
        measured = information, math.log(use.states), use.silent, mean, use.pooled_perplexity, use.used, use.duplicates
        rows.append((name, count, use.states * use.tables, *measured))
    return table("codes", rows, digits=2, split=exam.split)


def _maps(exam: Examination, name: str, use: CodeUse) -> Iterator[Picture]:
    """Yield a picture of some data, each above its map of codes.

    Nothing unless data are images, and codes have at least three states and form a 2D grid.
    """
    if len(use.grid) != 2 or use.parts or use.states < 3 or not is_image(exam.shape):
        return
    rows = np.linspace(0, len(exam.x) - 1, min(MAPPED_DATA, len(exam.x))).astype(int)
    if (values := base.array(exam.drawn.latents[name].value)[rows]).shape[1] != use.grid[0] * use.grid[1]:
        return
    data = base.array(exam.part.observed(exam.x[rows.tolist()]))
    maps = values.reshape(len(rows), *use.grid).astype(np.int64)
    made = bars.code_maps(name, data, maps, use.states, *exam.scale_of_grey)
    yield picture("codes.code_maps", made, of=name, count=len(rows), split=exam.split)


# ---------------------------------------------------------------------- labels of some rows

CALIBRATION_BINS = 15
"""Number of intervals of confidence over which a calibration error is taken."""


LABEL_DRAWS = 100
"""Number of samples of other latents over which a prediction of an observed latent is averaged, if it reads them."""


def calibration_error(probs: torch.Tensor, label: torch.Tensor) -> float:
    """Return the expected calibration error: |accuracy - mean confidence| of 15 bins of confidence, weighed by rows.

    Arguments:
        probs: probabilities of the classes, `(n, K)`; the confidence is the largest.
        label: classes, `(n,)`.

    References:
        On Calibration of Modern Neural Networks (Guo et al., 2017), https://arxiv.org/abs/1706.04599

    Example:
        >>> calibration_error(torch.tensor([[0.75, 0.25]] * 4), torch.tensor([0, 0, 0, 1]))
        0.0
    """
    confidence, guess = probs.double().max(1)
    bins = (confidence * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    gaps = torch.zeros(CALIBRATION_BINS).to(confidence).index_add(0, bins, (guess == label).double() - confidence)
    return float(gaps.abs().sum() / len(label))


@section("labels", scored=True, where=lambda exam: any(entry.latent for entry in exam.pair.frame.entries.values()))
def labels(exam: Examination) -> Iterator[Part]:
    """Yield errors and calibration of q(y | x) of all latents that some rows observe; nothing without any."""
    plan, part = exam.run.experiment, exam.part
    seen, held, codes = plan.known(exam.data.train), plan.known(part), classified(plan, exam.pair, part, LABEL_DRAWS)
    vectors = predicted(plan, exam.pair, exam.data, part, LABEL_DRAWS)
    right: dict[str, Any] = {z: (proportion(q.argmax(1) == y), calibration_error(q, y)) for z, (q, y) in codes.items()}
    right |= {z: tuple(Estimate(*found) for found in p.values()) for z, p in vectors.items()}
    whole: dict[str, list[tuple[Any, ...]]] = {"labels": [], "numbers": []}
    for name in seen:
        count = (name, *(int((~known[name].isnan().any(1)).sum()) for known in (seen, held)))
        kind, width = ("labels", 2) if exam.pair.frame.entries[name].codes else ("numbers", len(FIGURES))
        whole[kind].append((*count, *right.get(name, [None] * width)))
    if whole["labels"]:
        yield table("labels", whole["labels"], split=exam.split, bins=CALIBRATION_BINS)
    if whole["numbers"]:
        yield table("labels.numbers", whole["numbers"], split=exam.split, draws=LABEL_DRAWS)
    for kind, keys in (("labels", ("accuracy", "calibration_error")), ("numbers", FIGURES)):
        titles = ("latent", "training_labels", "rows", *keys)
        yield {kind: [dict(zip(titles, row, strict=True)) for row in whole[kind]]}


# ---------------------------------------------------------------------- probe


@section("probe", scored=True, where=lambda exam: exam.part.y is not None and exam.data.train.y is not None)
def probe(exam: Examination) -> Iterator[Part]:
    """Yield the accuracy of k-NN and logistic regression on codes; nothing without labels or codes."""
    if (found := exam.attempt("probe", probe_of, exam.run, exam.split, seed=exam.seed, part="classifiers")) is None:
        return
    rows = [(r.of, r.knn, r.knn_gain, r.linear, r.linear_gain) for r in found.readings]
    yield table("probe", (*rows, ("most frequent label", found.majority, None, None, None)), probe=found)
    best = max((r for r in found.readings if r.of != RAW), key=lambda r: r.linear.value)
    yield text("probe.logistic", best=best, raw=found[RAW])
    yield text("probe.neighbours", best=best, raw=found[RAW])
    yield {"probe": found.to_dict()}


def _grouped(exam: Examination) -> bool:
    known = exam.part.y is not None or any(entry.codes for entry in exam.pair.frame.covariates.values())
    return known and any(latent.codes is None for latent in exam.collapse.latents.values())


@section("groups", scored=True, where=_grouped)
def groups(exam: Examination) -> Iterator[Part]:
    """Yield separation and mixing of labels and levels of covariates among codes; nothing where rows have no groups."""
    if (found := exam.attempt("groups", groups_of, exam.run, exam.split, exam.seed)) is not None:
        yield table("groups", [(name, s, found.mixed[name]) for name, s in found.separated.items()], groups=found)
        yield {"groups": found.to_dict()}
