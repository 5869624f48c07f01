"""Holes of the prior: regions where the prior has probability mass and the aggregated posterior has almost none."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pvae.analysis.decompose.aggregated import AggregatedPosterior
from pvae.analysis.pages.document.blocks import Sentence
from pvae.analysis.pages.document.text import percent
from pvae.analysis.pages.sections.examination import Examination
from pvae.errors import DataError
from pvae.util import seeds

HOLE = 0.01
"""Quantile of log q_agg at held-out codes that is the threshold of a hole: 1 % of held-out codes lie below it."""
MANY_HOLES = 0.5
"""Proportion of prior samples in holes above which the report gives an alert."""
ALL_AT_ONCE, PAIR_BY_PAIR = (20_000, 2000), (1000, 500)
"""Largest numbers of training rows that form q_agg, and of codes and prior samples scored under it.

`PAIR_BY_PAIR` is for posteriors that depend on other latents, where the guide runs for each row and sample.
"""


@dataclass(frozen=True)
class Holes:
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
    if exam.split == "train":
        raise DataError("holes: expected codes of data that q_agg is not made of; got those of train.")
    names = list(exam.pair.layout.latents)
    known = [exam.drawn.latents[name] for name in names]
    if exam.pair.frame.covariates or any(latent.point or latent.normal is None for latent in known):
        raise DataError("holes: expected normal posteriors of a model without covariates; got others.")
    if missing := [name for name in names if name not in exam.prior]:
        raise DataError(f"holes: expected draws of the prior of {', '.join(missing)}; got none.")
    most, draws = ALL_AT_ONCE if set(names) <= exam.pair.dependencies(exam.x).guide_roots else PAIR_BY_PAIR
    chosen = seeds.subset(len(exam.rows["train"].x), most, seeds.mix(exam.seed, seeds.ANALYSIS, 31))
    q = AggregatedPosterior.of(exam.pair, exam.rows["train"].x[chosen.to(exam.x.device)], latents=names)
    held = exam.drawn.flat(names)
    held = held[seeds.subset(len(held), draws, seeds.mix(exam.seed, seeds.ANALYSIS, 32)).to(held.device)]
    prior = torch.cat([exam.prior[name] for name in names], 1)[:draws].to(held)
    threshold = torch.quantile(q.log_prob(held), HOLE)
    share = float((q.log_prob(prior) < threshold).double().mean())
    error = math.sqrt(share * (1 - share) / len(prior))
    return Holes(share, error, HOLE, float(threshold), len(chosen), len(prior))


def on_holes(found: Holes) -> Sentence:
    """Return the sentence on prior samples in holes; an alert if their proportion exceeds `MANY_HOLES`."""
    where = f"where q_agg of the training rows is thinner than at {percent(1 - found.expected)} of held-out codes"
    if found.share <= found.expected:
        return Sentence(f"The prior has no holes: at most the expected {percent(HOLE)} of its samples lie {where}.")
    text = f"{percent(found.share)} of prior samples lie in holes, {where} ({percent(found.expected)} expected)."
    if found.share > MANY_HOLES:
        advice = "Fit a richer prior to the codes (pvae refit RUN latents.z.prior.kind=realnvp), or train with vamp or"
        return Sentence(f"{text} The decoder was never fitted to these codes. {advice} mixture.", True)
    return Sentence(text)
