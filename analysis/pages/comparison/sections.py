"""Sections of a comparison page in reading order: functions of a `Comparison`; None if a section does not apply."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from pvae.analysis.bounds.rate_distortion import rate_distortion_of
from pvae.analysis.figures.estimate import Estimate, merged
from pvae.analysis.pages.comparison.comparison import STRIP, Comparison
from pvae.analysis.pages.document.blocks import PageTable, Part, Sentence
from pvae.analysis.pages.document.words import Value, alert, picture, section, table, text
from pvae.analysis.pages.plots import base, comparisons, pictures
from pvae.analysis.pages.sections.fit import OVERFITTING_NATS, SHOWN_NATS, environment_of
from pvae.analysis.pages.sections.samples import whole
from pvae.analysis.samples.features import is_image
from pvae.util.toml import flat

CORRELATED_RUNS = 4
"""Smallest number of runs for which rank correlations with the marginal KL are computed."""
COLUMN_RUNS = 6
"""Largest number of runs for a table with a column per run; for more runs it has a row per run."""

# ---------------------------------------------------------------------- overview and verdict


@section("overview", "compared.overview")
def overview(found: Comparison) -> Iterator[Part]:
    """Yield the metrics of each run, their means over groups of runs, and the verdict."""
    all_of = _by_key(list(found.figures.values()))
    known = {term: values for term, values in all_of.items() if any(value is not None for value in values)}
    if found.repeated:
        rows = []
        for case, members in found.members.items():
            chosen = [i for i, name in enumerate(found.exams) if name in members]
            rows.append((case, len(chosen), *(_average([values[i] for i in chosen]) for values in known.values())))
        yield table("compared.averages", rows, *_spaced(known), digits=2)
    yield _by_run("compared.overview", list(found.exams), known, folded=found.repeated, exam=found.first)
    yield from _on_cases(found) if found.repeated else _on_best(found)
    yield from _on_new_data(found)
    yield from _on_collapse(found)
    yield {"figures": found.figures, "groups": None if found.groups is None else list(found.groups)}


def _on_collapse(found: Comparison) -> Iterator[Sentence]:
    """Yield an alert for every case of which a run has unused units or codes."""
    for case, members in found.members.items():
        said = [alerts[0] for name in members if name in found.scored and (alerts := found.exams[name].collapse.alerts)]
        if said:
            yield alert("compared.overview.collapsed", case=case, count=len(said), total=len(members), said=said[0])


def _on_cases(found: Comparison) -> Iterator[str]:
    """Yield the sentence on the case with the highest mean over seeds of the bound."""
    values, bounds = found.log_p or found.elbos, bool(found.log_p)
    of_runs = {case: [float(values[n].mean()) for n in names if n in values] for case, names in found.members.items()}
    means = {case: mean for case, own in of_runs.items() if isinstance(mean := _average(own), Estimate)}
    known = sorted(means.items(), key=lambda entry: -entry[1].value)
    if len(known) > 1:
        (best, a), (second, b) = known[:2]
        yield _ahead(best, second, a.value - b.value, math.hypot(a.standard_error, b.standard_error), bounds, True)


def _ahead(best: str, second: str, gain: float, error: float, bounds: bool, seeds: bool) -> str:
    seen = gain >= SHOWN_NATS
    entry = "compared.overview.best" if seen and gain > 2 * error else "compared.overview.tie"
    return text(entry, best=best, second=second, gain=gain, error=error, bounds=bounds, seen=seen, seeds=seeds)


def _by_run(entry: str, names: Sequence[str], found: Mapping[str, Sequence[Value]], **fields: Any) -> PageTable:
    """Return a table of the values by term, with a column per run, or a row per run if there are many runs.

    Each sequence of `found` holds the values of one term, in the order of `names`.
    """
    if len(names) <= COLUMN_RUNS:
        return table(entry, [(term, *values) for term, values in found.items()], "figure", *names, **fields)
    return table(entry, list(zip(names, *found.values(), strict=True)), "run", *_spaced(found), digits=2, **fields)


def _spaced(terms: Iterable[str]) -> list[str]:
    return [term.replace("_", " ") for term in terms]


def _by_key(tables: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of every key that one of the tables has, a value per table, None where it lacks the key."""
    return {key: [table.get(key) for table in tables] for key in dict.fromkeys(chain.from_iterable(tables))}


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
    gain, bounds = gains[second], rest[second].log_p is not None
    yield _ahead(found.best, second, -gain.value, gain.standard_error, bounds, False)


def _on_new_data(found: Comparison) -> Iterator[str | Sentence]:
    """Yield sentences on what a better prior wins with the encoder of each run, on overfitting, and on samples."""
    known = {name: new.interval for name, exam in found.scored.items() if (new := exam.held.population) is not None}
    if known and not found.repeated:  # else the table has the means
        yield text("compared.overview.new_data", known=known)
    gaps = {name: exam.gap for name, exam in found.scored.items() if found.split != "train"}
    if wide := {name: gap for name, gap in gaps.items() if gap is not None and gap > OVERFITTING_NATS}:
        yield alert("compared.overview.overfitting", limit=OVERFITTING_NATS, split=found.split, wide=wide)
    if len(found.quality) > 1:
        distances = sorted((q.distances.frechet.value, name, q.distances) for name, q in found.quality.items())
        (_, near, least), *_, (_, far, most) = distances
        yield text("compared.overview.nearest", name=near, distances=least)
        yield text("compared.overview.farthest", name=far, distances=most)


# ---------------------------------------------------------------------- likelihood


@section("training", "compared.training")
def training(found: Comparison) -> Iterator[Part]:
    """Yield the validation ELBO of the runs over epochs."""
    if rows := {name: exam.metrics for name, exam in found.scored.items() if exam.metrics}:
        cases, labels = zip(*(found.cases[name] for name in rows), strict=True)
        yield picture("compared.training", comparisons.overlaid(labels, [*rows.values()], cases), count=len(rows))


@section("plane", "compared.plane", where=lambda found: len(found.scored) > 1)
def rate_and_distortion(found: Comparison) -> Iterator[Part]:
    """Yield the runs in the rate-distortion plane, and their table."""
    plane = rate_distortion_of(found.split, {name: exam.held for name, exam in found.scored.items()})
    yield picture("compared.rate_distortion", plane.figure(found.cases))
    keys = ("rate", "distortion", "elbo")
    rows = [(row["run"], *(Estimate(row[key], row[f"{key}_error"], "estimate") for key in keys)) for row in plane.rows]
    yield table("compared.rate_distortion", rows, split=found.split)
    yield {"rate_distortion": plane.to_dict()}


@section("paired", "compared.paired", where=lambda found: len(found.scored) > 1)
def paired_differences(found: Comparison) -> Iterator[Part]:
    """Yield the differences of each run to the reference, datum by datum."""
    reference, exam = next(iter(found.scored.items()))
    others = found.against(reference)
    gains = {name: d.log_p or d.elbo for name, d in others.items()}
    what = "Bound on log p(x)" if all(d.log_p is not None for d in others.values()) else "ELBO"
    cases = [found.cases[name][0] for name in gains]
    made = comparisons.differences([*gains], [*gains.values()], reference, what, cases)
    yield picture("compared.paired", made, reference=reference, gains=gains)
    rows = [(name, d.elbo, d.log_p, d.wins) for name, d in others.items()]
    yield table("compared.paired", rows, reference=reference, exam=exam)
    yield {"paired": {"reference": reference, "runs": {name: d.to_dict() for name, d in others.items()}}}


@section("surgery", "compared.surgery", where=lambda found: found.scored)
def surgery(found: Comparison) -> Iterator[Part]:
    """Yield the terms of the ELBO surgery of each run."""
    held = {name: exam.held for name, exam in found.scored.items()}
    rows = merged(held)
    if len(held) > COLUMN_RUNS:
        yield _by_run("compared.many.surgery", list(held), {str(row[0]): row[1:-1] for row in rows}, split=found.split)
    else:
        yield table("compared.surgery", rows, *held, strong=(0,), split=found.split)
    yield {"surgery": {name: s.to_dict() for name, s in held.items()}}


@section("together", "compared.together")
def correlations(found: Comparison) -> Iterator[Part]:
    """Yield rank correlations of the marginal KL with likelihood and sample quality; nothing for too few runs."""
    rows = {name: row for name, row in found.figures.items() if isinstance(row.get("marginal_kl"), Estimate)}
    if len(rows) < CORRELATED_RUNS:
        return
    x = [float(row["marginal_kl"]) for row in rows.values()]  # type: ignore[arg-type]
    asked = {"log_p": "bound on log p(x), nats", "sharpness of means": "sharpness of means, relative to data"}
    asked["Fréchet"] = "Fréchet distance of samples and data"
    asked[f"train − {found.split}"] = f"train ELBO − {found.split} ELBO, nats"
    metrics = {title: [row.get(key) for row in rows.values()] for key, title in asked.items()}
    whole = {k: values for k, values in metrics.items() if all(isinstance(v, Estimate | float) for v in values)}
    panels = {title: [float(value) for value in values] for title, values in whole.items()}  # type: ignore[arg-type]
    if not panels or max(x) - min(x) < 1e-9:
        return
    of = f"marginal KL on these rows of {found.split}, nats per datum"
    cases, labels = zip(*(found.cases[name] for name in rows), strict=True)
    made = comparisons.together(labels, x, list(panels.items()), of, cases)
    yield picture("compared.together", made, count=len(rows))
    ranks = {title: float(spearmanr(x, y).statistic) if max(y) > min(y) else math.nan for title, y in panels.items()}
    yield table("compared.together", tuple(ranks.items()), digits=2, count=len(rows))
    yield {"rank_correlation": ranks}


# ---------------------------------------------------------------------- samples, declarations


@section("samples", "compared.samples")
def samples(found: Comparison) -> Iterator[Part]:
    """Yield samples of each run, and their quality."""
    first = found.first
    drawn = {name: exam.sampled.x[:STRIP] for name, exam in found.exams.items() if exam.sampled is not None}
    if shown := is_image(first.shape) and bool(drawn):
        images = np.stack([base.array(x).reshape(len(x), *first.shape) for x in drawn.values()])
        made = pictures.gallery(images, *first.scale_of_grey, row_names=[base.plain(name)[:18] for name in drawn])
        yield picture("compared.samples", made, each=STRIP, count=len(drawn))
    if quality := found.quality:
        space = next(iter(quality.values())).fidelity.space
        known = {str(row[0]): row[1:-1] for row in whole(quality)}
        yield _by_run("compared.sample_quality", list(quality), known, split=found.split, space=space)
    if shown or quality:
        yield {"sample_quality": {name: q.to_dict() for name, q in quality.items()}}


@section("declarations", "compared.declarations", is_appendix=True)
def declarations(found: Comparison) -> Iterator[Part]:
    """Yield the settings that differ between the runs, and the software environment of each run."""
    runs = [exam.run for exam in found.exams.values()]
    declared = _by_key([flat(run.plan.model_dump(mode="json")) for run in runs])
    varied = {k: v for k, v in declared.items() if k not in ("name", "description") and len(set(map(repr, v))) > 1}
    if settings := {k: [None if value is None else str(value) for value in values] for k, values in varied.items()}:
        yield _by_run("compared.declarations", list(found.exams), settings)
    yield _by_run("compared.environment", list(found.exams), _by_key([dict(environment_of(run)) for run in runs]))
    yield {"declarations": settings}


COMPARISON_SECTIONS = {made.__name__.replace("_", " "): made for made in (
    overview, training, rate_and_distortion, paired_differences, surgery, correlations, samples, declarations,
)}  # fmt: skip
