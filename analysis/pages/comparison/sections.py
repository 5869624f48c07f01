"""Sections of a comparison page in reading order: functions of a `Comparison`; None if a section does not apply."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from pvae.analysis.bounds.rate_distortion import rate_distortion_of
from pvae.analysis.figures.estimate import Estimate, merged
from pvae.analysis.pages.comparison.comparison import STRIP, Comparison
from pvae.analysis.pages.document.blocks import PageSection, PageTable, Part, Sentence, columns, picture, section
from pvae.analysis.pages.document.text import Value, nats, plus_minus
from pvae.analysis.pages.plots import comparisons, pictures
from pvae.analysis.pages.plots.base import array, plain
from pvae.analysis.pages.sections.fit import LESS_OVERFITTING, OVERFITTING_NATS, SHOWN_NATS
from pvae.analysis.pages.sections.run import environment_of
from pvae.analysis.pages.sections.samples import whole
from pvae.analysis.samples.features import is_image
from pvae.util.toml import flat

CORRELATED_RUNS = 4
"""Smallest number of runs for which rank correlations with the marginal KL are computed."""
COLUMN_RUNS = 6
"""Largest number of runs for a table with a column per run; for more runs it has a row per run."""

# ---------------------------------------------------------------------- overview and verdict


@section("overview", "Overview")
def _overview(found: Comparison) -> Iterator[Part]:
    """Yield the metrics of each run, their means over groups of runs, and the verdict."""
    all_of = _by_key(list(found.figures.values()))
    known = {term: values for term, values in all_of.items() if any(value is not None for value in values)}
    caption = (
        f"Nats per datum (bits per dimension: bits) on {found.split} ({found.first.rows[found.split].note}; log_p, a "
        f"lower bound, on {found.first.evidence_rows.note}); proportions; Fréchet distances in features; seconds of "
        "training"
    )
    yield _by_run("overview", caption, list(found.exams), known)
    if (groups := found.groups) is not None and len(set(groups)) < len(found.exams):
        rows = []
        for group in dict.fromkeys(groups):
            chosen = [i for i, g in enumerate(groups) if g == group]
            rows.append((group, len(chosen), *(_average([values[i] for i in chosen]) for values in known.values())))
        titles = columns("group", "runs", *(term.replace("_", " ") for term in known), digits=2)
        yield PageTable("averages", "Mean ± standard error over runs that differ in their seeds only", titles, rows)
    yield from _on_best(found)
    yield from _on_new_data(found)
    yield from _on_overfitting(found)
    yield from _on_samples(found)
    yield {"figures": found.figures, "groups": None if groups is None else list(groups)}


def _by_run(id: str, caption: str, names: Sequence[str], found: Mapping[str, Sequence[Value]]) -> PageTable:
    """Return a table of the values by term, with a column per run, or a row per run if there are many runs.

    Each sequence of `found` holds the values of one term, in the order of `names`.
    """
    if len(names) <= COLUMN_RUNS:
        return PageTable(id, caption, columns("figure", *names), [(term, *values) for term, values in found.items()])
    titles = columns("run", *(term.replace("_", " ") for term in found), digits=2)
    return PageTable(id, caption, titles, list(zip(names, *found.values(), strict=True)))


def _by_key(tables: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of every key that one of the tables has, a value per table, None where it lacks the key."""
    keys = dict.fromkeys(chain.from_iterable(tables))
    return {key: [table.get(key) for table in tables] for key in keys}


def _average(values: Sequence[Value]) -> Value:
    if not (numbers := [float(v) for v in values if isinstance(v, int | float | Estimate)]):
        return None
    error = float(np.std(numbers, ddof=1) / math.sqrt(len(numbers))) if len(numbers) > 1 else math.nan
    return Estimate(float(np.mean(numbers)), error, "estimate", note="over runs")


def _on_best(found: Comparison) -> Iterator[str]:
    """Yield the sentence on the run with the highest bound."""
    if found.best is None or len(found.scored) < 2:
        return
    rest = found.against(found.best)
    gains = {name: d.log_p or d.elbo for name, d in rest.items()}
    second = max(gains, key=lambda name: gains[name].value)
    gain, what = -gains[second].value, "bound on log p(x)" if rest[second].log_p is not None else "ELBO"
    error = gains[second].standard_error
    lead = f"{nats(gain)} ± {nats(error)} nats" if gain >= SHOWN_NATS else "less than 0.01 nats"
    if gain <= 2 * error or gain < SHOWN_NATS:
        text = f"{found.best} and {second} have the highest {what}. They differ by {lead}: these data do not show"
        yield f"{text} which is better."
    else:
        yield f"{found.best} has the highest {what}, {lead} above {second} (paired by datum)."


def _on_new_data(found: Comparison) -> Iterator[str]:
    """Yield the sentence on what a better prior wins on new data with the encoder of each run."""
    known = {name: new.interval for name, exam in found.scored.items() if (new := exam.held.population) is not None}
    if known:
        said = "; ".join(f"{interval} nats with that of {name}" for name, interval in known.items())
        yield f"What a better prior wins on new data while the encoder stays: {said}."


def _on_overfitting(found: Comparison) -> Iterator[Sentence]:
    gaps = {name: exam.gap for name, exam in found.scored.items() if found.split != "train"}
    wide = [f"{name} ({nats(gap)} nats)" for name, gap in gaps.items() if gap is not None and gap > OVERFITTING_NATS]
    if wide:
        text = f"The train ELBO is more than {OVERFITTING_NATS:g} nat higher than the {found.split} ELBO for"
        yield Sentence(f"{text} {', '.join(wide)}. These models overfit: {LESS_OVERFITTING}", True)


def _on_samples(found: Comparison) -> Iterator[str]:
    if len(found.quality) < 2:
        return
    distances = sorted((q.distances.frechet.value, name, q.distances) for name, q in found.quality.items())
    (_, near, least), *_, (_, far, most) = distances
    expected = f"({nats(least.frechet_floor)} expected for samples of the data distribution)"
    yield f"Samples of {near} have the smallest Fréchet distance to data, {plus_minus(least.frechet)} {expected}."
    yield f"Samples of {far} have the largest Fréchet distance to data, {plus_minus(most.frechet)}."


# ---------------------------------------------------------------------- likelihood


@section("training", "Training")
def _training(found: Comparison) -> Iterator[Part]:
    if rows := {name: exam.metrics for name, exam in found.scored.items() if exam.metrics}:
        yield picture(
            "training",
            comparisons.overlaid(list(rows), list(rows.values())),
            f"Validation ELBO over epochs for {len(rows)} runs.",
            "Curves that still rise at their end need more epochs; curves that fall after a maximum show overfitting.",
        )


@section("plane", "Rate and distortion")
def _plane(found: Comparison) -> Iterator[Part]:
    if len(found.scored) < 2:
        return
    plane = rate_distortion_of(found.split, {name: exam.held for name, exam in found.scored.items()})
    yield picture(
        "rate_distortion",
        plane.figure(),
        "Runs as points: rate to the right, distortion upwards; lines of equal ELBO.",
        "Runs on one dashed line have the same ELBO. Further right they spend more nats on the code; further down "
        "they reconstruct better.",
    )
    keys = ("rate", "distortion", "elbo")
    rows = [(row["run"], *(Estimate(row[key], row[f"{key}_error"], "estimate") for key in keys)) for row in plane.rows]
    caption = f"Nats per datum on {found.split}, ± Monte Carlo standard error"
    yield PageTable("rate_distortion", caption, columns("run", "rate", "distortion", "ELBO"), rows)
    yield {"rate_distortion": plane.to_dict()}


@section("paired", "Paired differences")
def _pairs(found: Comparison) -> Iterator[Part]:
    if len(found.scored) < 2:
        return
    reference, exam = next(iter(found.scored.items()))
    others = found.against(reference)
    gains = {name: d.log_p or d.elbo for name, d in others.items()}
    what = "Bound on log p(x)" if all(d.log_p is not None for d in others.values()) else "ELBO"
    yield picture(
        "paired",
        comparisons.differences(list(gains), list(gains.values()), reference, what),
        f"Paired differences to {reference}: " + "; ".join(f"{name} {plus_minus(e)}" for name, e in gains.items()),
        "To the right of the line a run is better than the reference. The interval is that of the difference datum by "
        "datum, so that the spread of data cancels. An interval that contains the line shows no difference.",
    )
    titles = columns("run", "ELBO", "log p(x), lower bound", "proportion of data won")
    caption = (
        f"Difference to {reference}, nats per datum ± standard error over data ({found.split}: ELBO on "
        f"{exam.rows[found.split].note}, log p(x) on {exam.evidence_rows.note})"
    )
    yield PageTable("paired", caption, titles, [(name, d.elbo, d.log_p, d.wins) for name, d in others.items()])
    yield {"paired": {"reference": reference, "runs": {name: d.to_dict() for name, d in others.items()}}}


@section("surgery", "ELBO surgery")
def _surgeries(found: Comparison) -> Iterator[Part]:
    if not found.scored:
        return
    held = {name: exam.held for name, exam in found.scored.items()}
    rows = merged(held)
    caption = f"Surgery on {found.split}: nats per datum, ± Monte Carlo standard error with the data fixed"
    if len(held) > COLUMN_RUNS:
        yield _by_run("surgery", caption, list(held), {str(row[0]): row[1:-1] for row in rows})
    else:
        yield PageTable("surgery", caption, columns("term", *held, words=["what it is"]), rows, strong=(0,))
    yield {"surgery": {name: s.to_dict() for name, s in held.items()}}


@section("together", "Correlation with the marginal KL")
def _together(found: Comparison) -> Iterator[Part]:
    """Yield rank correlations of the marginal KL with likelihood and sample quality; nothing for too few runs."""
    rows = {name: row for name, row in found.figures.items() if isinstance(row.get("marginal_kl"), Estimate)}
    if len(rows) < CORRELATED_RUNS:
        return
    x = [float(row["marginal_kl"]) for row in rows.values()]  # type: ignore[arg-type]
    asked = {
        "log_p": "bound on log p(x), nats",
        "sharpness of means": "sharpness of means, relative to data",
        "Fréchet": "Fréchet distance of samples and data",
        f"train − {found.split}": f"train ELBO − {found.split} ELBO, nats",
    }
    panels = {
        title: [float(row[key]) for row in rows.values()]  # type: ignore[arg-type]
        for key, title in asked.items()
        if all(isinstance(row.get(key), Estimate | float) for row in rows.values())
    }
    if not panels or max(x) - min(x) < 1e-9:
        return
    of = f"marginal KL on these rows of {found.split}, nats per datum"
    yield picture(
        "together",
        comparisons.together(list(rows), x, list(panels.items()), of),
        f"Figures of {len(rows)} runs over their marginal KL.",
        "Each point is a run. If a smaller marginal KL went with a better model, the upper chart would fall from left "
        "to right. Runs of one kind cluster: compare clusters, not points.",
    )
    ranks = {title: float(spearmanr(x, y).statistic) if max(y) > min(y) else math.nan for title, y in panels.items()}
    caption = f"Rank correlation with the marginal KL over {len(rows)} runs, from −1 to 1: too few runs for a test"
    yield PageTable("together", caption, columns("figure", "Spearman", digits=2), tuple(ranks.items()))
    yield {"rank_correlation": ranks}


# ---------------------------------------------------------------------- samples, declarations


@section("samples", "Samples")
def _samples(found: Comparison) -> Iterator[Part]:
    first = found.first
    drawn = {name: exam.sampled.x[:STRIP] for name, exam in found.exams.items() if exam.sampled is not None}
    shown = is_image(first.shape) and bool(drawn)
    if shown:
        images = np.stack([array(x).reshape(len(x), *first.shape) for x in drawn.values()])
        yield picture(
            "samples",
            pictures.gallery(images, *first.scale_of_grey, row_names=[plain(name)[:18] for name in drawn]),
            f"{STRIP} samples of each of {len(drawn)} runs.",
            "Means of p(x | z) at samples of each model's own prior (samples of x where there is no mean). Look for "
            "runs whose samples mix kinds, miss kinds, or are blurred.",
        )
    if quality := found.quality:
        space = next(iter(quality.values())).fidelity.space
        known = {str(row[0]): row[1:-1] for row in whole(quality)}
        caption = f"Samples of each run beside data of {found.split}: proportions, and distances in {space}"
        yield _by_run("sample_quality", caption, list(quality), known)
    if shown or quality:
        yield {"sample_quality": {name: q.to_dict() for name, q in quality.items()}}


@section("declarations", "Declarations", is_appendix=True)
def _declared(found: Comparison) -> Iterator[Part]:
    """Yield the settings that differ between the runs, and the software environment of each run."""
    runs = [exam.run for exam in found.exams.values()]
    declared = _by_key([flat(run.plan.model_dump(mode="json")) for run in runs])
    settings = {
        key: [None if value is None else str(value) for value in values]
        for key, values in declared.items()
        if key not in ("name", "description") and len(set(map(repr, values))) > 1
    }
    if settings:
        yield _by_run("declarations", "Settings that differ", list(found.exams), settings)
    environments = _by_key([dict(environment_of(run)) for run in runs])
    yield _by_run("environment", "Environments of the runs", list(found.exams), environments)
    yield {"declarations": settings}


COMPARISON_SECTIONS: Mapping[str, Callable[[Comparison], PageSection | None]] = {
    "overview": _overview,
    "training": _training,
    "rate and distortion": _plane,
    "paired differences": _pairs,
    "surgery": _surgeries,
    "correlations": _together,
    "samples": _samples,
    "declarations": _declared,
}
"""Functions that compute the sections of a comparison page, by name of the stage, in reading order."""
