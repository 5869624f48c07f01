"""Sections of a comparison page in reading order: functions of a `Comparison`; None if a section does not apply."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.stats import spearmanr

from pvae.analysis.bounds.rate_distortion import rate_distortion_of
from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.pages.comparison.comparison import STRIP, Comparison
from pvae.analysis.pages.comparison.verdict import verdict
from pvae.analysis.pages.document.blocks import Block, PageSection, PageTable, Picture, columns, picture
from pvae.analysis.pages.document.tables import side_by_side
from pvae.analysis.pages.document.text import Value, plus_minus
from pvae.analysis.pages.plots import base, comparisons, pictures
from pvae.analysis.pages.sections.appendix import environment_of
from pvae.analysis.pages.sections.examination import array
from pvae.analysis.pages.sections.quality import whole
from pvae.analysis.samples.sharpness import is_image
from pvae.util.toml import flat

CORRELATED_RUNS = 4
"""Smallest number of runs for which rank correlations with the marginal KL are computed."""
COLUMN_RUNS = 6
"""Largest number of runs for a table with a column per run; for more runs it has a row per run."""


def _overview(found: Comparison) -> PageSection:
    """Return the overview: the metrics of each run, their means over groups of runs, and the verdict."""
    terms = list(dict.fromkeys(term for row in found.figures.values() for term in row))
    all_of = {term: [found.figures[name].get(term) for name in found.names] for term in terms}
    known = {term: values for term, values in all_of.items() if any(value is not None for value in values)}
    caption = (
        f"Nats per datum (bits per dimension: bits) on {found.split} ({found.first.rows[found.split].note}; log_p, a "
        f"lower bound, on {found.first.evidence_rows.note}); proportions; Fréchet distances in features; seconds of "
        "training"
    )
    blocks: list[Block] = [_by_run("overview", caption, found.names, known)]
    if found.groups is not None and len(set(found.groups)) < len(found.names):
        blocks.append(_averages(found.groups, known))
    numbers = {"figures": found.figures, "groups": None if found.groups is None else list(found.groups)}
    return PageSection("overview", "Overview", tuple(blocks), sentences=tuple(verdict(found)), numbers=numbers)


def _by_run(id: str, caption: str, names: Sequence[str], found: Mapping[str, Sequence[Value]]) -> PageTable:
    """Return a table of the values by term, with a column per run, or a row per run if there are many runs.

    Each sequence of `found` holds the values of one term, in the order of `names`.
    """
    if len(names) <= COLUMN_RUNS:
        return PageTable(id, caption, columns("figure", *names), [(term, *values) for term, values in found.items()])
    rows = [(name, *(values[i] for values in found.values())) for i, name in enumerate(names)]
    return PageTable(id, caption, columns("run", *(term.replace("_", " ") for term in found), digits=2), rows)


def _averages(groups: Sequence[str], found: Mapping[str, Sequence[Value]]) -> PageTable:
    """Return the table of the mean and standard error of each metric over the runs of each group."""
    rows = []
    for group in dict.fromkeys(groups):
        chosen = [i for i, g in enumerate(groups) if g == group]
        rows.append((group, len(chosen), *(_average([values[i] for i in chosen]) for values in found.values())))
    titles = columns("group", "runs", *(term.replace("_", " ") for term in found), digits=2)
    return PageTable("averages", "Mean ± standard error over runs that differ in their seeds only", titles, rows)


def _average(values: Sequence[Value]) -> Value:
    numbers = [float(v) for v in values if isinstance(v, int | float | Estimate)]
    if not numbers:
        return None
    error = float(np.std(numbers, ddof=1) / math.sqrt(len(numbers))) if len(numbers) > 1 else math.nan
    return Estimate(float(np.mean(numbers)), error, "estimate", note="over runs")


def _training(found: Comparison) -> PageSection | None:
    rows = {name: exam.metrics for name, exam in found.scored.items() if exam.metrics}
    if not rows:
        return None
    made = picture(
        "training",
        comparisons.overlaid(list(rows), list(rows.values())),
        f"Validation ELBO over epochs for {len(rows)} runs.",
        "Curves that still rise at their end need more epochs; curves that fall after a maximum show overfitting.",
    )
    return PageSection("training", "Training", (made,))


def _plane(found: Comparison) -> PageSection | None:
    if len(found.scored) < 2:
        return None
    plane = rate_distortion_of(found.split, {name: exam.held for name, exam in found.scored.items()})
    made = picture(
        "rate_distortion",
        plane.figure(),
        "Runs as points: rate to the right, distortion upwards; lines of equal ELBO.",
        "Runs on one dashed line have the same ELBO. Further right they spend more nats on the code; further down "
        "they reconstruct better.",
    )
    keys = ("rate", "distortion", "elbo")
    rows = [(row["run"], *(Estimate(row[key], row[f"{key}_error"], "estimate") for key in keys)) for row in plane.rows]
    caption = f"Nats per datum on {found.split}, ± Monte Carlo standard error"
    table = PageTable("rate_distortion", caption, columns("run", "rate", "distortion", "ELBO"), rows)
    numbers = {"rate_distortion": plane.to_dict()}
    return PageSection("plane", "Rate and distortion", (made, table), numbers=numbers)


def _pairs(found: Comparison) -> PageSection | None:
    if len(found.scored) < 2:
        return None
    reference, exam = next(iter(found.scored.items()))
    others = found.against(reference)
    gains = {name: d.log_p or d.elbo for name, d in others.items()}
    what = "Bound on log p(x)" if all(d.log_p is not None for d in others.values()) else "ELBO"
    made = picture(
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
    table = PageTable("paired", caption, titles, [(name, d.elbo, d.log_p, d.wins) for name, d in others.items()])
    numbers = {"paired": {"reference": reference, "runs": {name: d.to_dict() for name, d in others.items()}}}
    return PageSection("paired", "Paired differences", (made, table), numbers=numbers)


def _surgeries(found: Comparison) -> PageSection | None:
    if not found.scored:
        return None
    held = {name: exam.held for name, exam in found.scored.items()}
    rows = side_by_side(held)
    caption = f"Surgery on {found.split}: nats per datum, ± Monte Carlo standard error with the data fixed"
    table = PageTable("surgery", caption, columns("term", *held, words=["what it is"]), rows, strong=(0,))
    if len(held) > COLUMN_RUNS:
        table = _by_run("surgery", caption, list(held), {str(row[0]): row[1:-1] for row in rows})
    numbers = {"surgery": {name: s.to_dict() for name, s in held.items()}}
    return PageSection("surgery", "ELBO surgery", (table,), numbers=numbers)


def _together(found: Comparison) -> PageSection | None:
    """Return rank correlations of the marginal KL with likelihood and sample quality; None for too few runs."""
    rows = {name: row for name, row in found.figures.items() if isinstance(row.get("marginal_kl"), Estimate)}
    if len(rows) < CORRELATED_RUNS:
        return None
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
        return None
    made = picture(
        "together",
        comparisons.together(list(rows), x, list(panels.items()), f"marginal KL on {found.split}, nats per datum"),
        f"Figures of {len(rows)} runs over their marginal KL.",
        "Each point is a run. If a smaller marginal KL went with a better model, the upper chart would fall from left "
        "to right. Runs of one kind cluster: compare clusters, not points.",
    )
    ranks = {title: float(spearmanr(x, y).statistic) if max(y) > min(y) else math.nan for title, y in panels.items()}
    caption = f"Rank correlation with the marginal KL over {len(rows)} runs, from −1 to 1: too few runs for a test"
    table = PageTable("together", caption, columns("figure", "Spearman", digits=2), tuple(ranks.items()))
    numbers = {"rank_correlation": ranks}
    return PageSection("together", "Correlation with the marginal KL", (made, table), numbers=numbers)


def _samples(found: Comparison) -> PageSection | None:
    blocks: list[Block] = [] if (strips := _strips(found)) is None else [strips]
    if quality := found.quality:
        space = next(iter(quality.values())).fidelity.space
        known = {str(row[0]): row[1:-1] for row in whole(quality)}
        caption = f"Samples of each run beside data of {found.split}: proportions, and distances in {space}"
        blocks.append(_by_run("sample_quality", caption, list(quality), known))
    if not blocks:
        return None
    numbers = {"sample_quality": {name: q.to_dict() for name, q in quality.items()}}
    return PageSection("samples", "Samples", tuple(blocks), numbers=numbers)


def _strips(found: Comparison) -> Picture | None:
    first = found.first
    drawn = {name: exam.sampled.x[:STRIP] for name, exam in found.exams.items() if exam.sampled is not None}
    if not drawn or not is_image(first.shape):
        return None
    images = np.stack([array(x).reshape(len(x), *first.shape) for x in drawn.values()])
    return picture(
        "samples",
        pictures.gallery(images, *first.scale_of_grey, row_names=[base.plain(name)[:18] for name in drawn]),
        f"{STRIP} samples of each of {len(drawn)} runs.",
        "Means of p(x | z) at samples of each model's own prior (samples of x where there is no mean). Look for runs "
        "whose samples mix kinds, miss kinds, or are blurred.",
    )


def _declared(found: Comparison) -> PageSection:
    """Return the appendix: settings that differ between the runs, and the software environment of each run."""
    tables = {name: flat(exam.run.plan.model_dump(mode="json")) for name, exam in found.exams.items()}
    keys = dict.fromkeys(key for table in tables.values() for key in table if key not in ("name", "description"))
    differing = [key for key in keys if len({repr(table.get(key)) for table in tables.values()}) > 1]
    settings = {key: [_text(tables[name].get(key)) for name in found.names] for key in differing}
    environments = {name: dict(environment_of(exam.run)) for name, exam in found.exams.items()}
    whats = list(dict.fromkeys(what for table in environments.values() for what in table))
    rows = {what: [environments[name].get(what) for name in found.names] for what in whats}
    blocks = [_by_run("environment", "Environments of the runs", found.names, rows)]
    if settings:
        blocks.insert(0, _by_run("declarations", "Settings that differ", found.names, settings))
    numbers = {"declarations": settings}
    return PageSection("declarations", "Declarations", tuple(blocks), numbers=numbers, is_appendix=True)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


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
