"""Verdict of a comparison: sentences on the best run, on overfitting and on sample quality."""

from __future__ import annotations

from pvae.analysis.pages.comparison.comparison import Comparison
from pvae.analysis.pages.document.blocks import Sentence
from pvae.analysis.pages.document.text import nats, plus_minus
from pvae.analysis.pages.sections.fit import LESS_OVERFITTING, OVERFITTING_NATS, SHOWN_NATS


def verdict(found: Comparison) -> list[Sentence]:
    """Return the sentences on the run with the highest bound, on runs that overfit, and on the quality of samples."""
    return [*_on_best(found), *_on_overfitting(found), *_on_samples(found)]


def _on_best(found: Comparison) -> list[Sentence]:
    if found.best is None or len(found.scored) < 2:
        return []
    rest = found.against(found.best)
    gains = {name: d.log_p or d.elbo for name, d in rest.items()}
    second = max(gains, key=lambda name: gains[name].value)
    gain, what = -gains[second].value, "bound on log p(x)" if rest[second].log_p is not None else "ELBO"
    error = gains[second].standard_error
    lead = f"{nats(gain)} ± {nats(error)} nats" if gain >= SHOWN_NATS else "less than 0.01 nats"
    if gain <= 2 * error or gain < SHOWN_NATS:
        text = f"{found.best} and {second} have the highest {what}. They differ by {lead}: these data do not show"
        return [Sentence(f"{text} which is better.")]
    return [Sentence(f"{found.best} has the highest {what}, {lead} above {second} (paired by datum).")]


def _on_overfitting(found: Comparison) -> list[Sentence]:
    gaps = {name: exam.gap for name, exam in found.scored.items() if found.split != "train"}
    wide = [f"{name} ({nats(gap)} nats)" for name, gap in gaps.items() if gap is not None and gap > OVERFITTING_NATS]
    if not wide:
        return []
    text = f"The train ELBO is more than {OVERFITTING_NATS:g} nat higher than the {found.split} ELBO for"
    return [Sentence(f"{text} {', '.join(wide)}. These models overfit: {LESS_OVERFITTING}", True)]


def _on_samples(found: Comparison) -> list[Sentence]:
    if len(found.quality) < 2:
        return []
    distances = {name: quality.distances for name, quality in found.quality.items()}
    near = min(distances, key=lambda name: distances[name].frechet.value)
    far = max(distances, key=lambda name: distances[name].frechet.value)
    floor = nats(distances[near].frechet_floor)
    return [
        Sentence(
            f"Samples of {near} have the smallest Fréchet distance to data, {plus_minus(distances[near].frechet)} "
            f"({floor} expected for samples of the data distribution)."
        ),
        Sentence(f"Samples of {far} have the largest Fréchet distance to data, {plus_minus(distances[far].frechet)}."),
    ]
