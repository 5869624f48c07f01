"""Sections on the run, on the fit and its surgery, and on the guide.

The run: training, declaration, environment, and analyses that could not be computed. The fit: ELBO, bounds on log
p(x), inference gaps, overfitting. The ELBO surgery: reconstruction, mutual information I_q[x, z] and marginal KL of
the ELBO. The guide: k-hat, calibration.
"""

import math
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from operator import attrgetter

import numpy as np

from pvae.analysis.bounds import calibration as calibrate
from pvae.analysis.bounds.gap import Gap, gap
from pvae.analysis.bounds.weights import Evidence
from pvae.analysis.decompose.result import SURGERY_TERMS, Surgery
from pvae.analysis.figures.estimate import merged
from pvae.analysis.pages.document.blocks import Listing, Note, Part, Sentence
from pvae.analysis.pages.document.words import alert, picture, section, table, table_of, text, texts, tile, typeset
from pvae.analysis.pages.plots import bars, base, clouds, curves, pictures
from pvae.analysis.pages.sections.examination import Examination
from pvae.analysis.samples.features import is_image
from pvae.experiment import experiment, readback
from pvae.objectives.base import named
from pvae.runs.run import Run

TOLD_EVENTS = ("nonfinite", "storage", "stop", "changed", "engine", "precision", "data", "alert")
MEASURED = re.compile("has collapsed|are dead|are silent")
"""Pattern of alerts from the fit that the report omits, because it measures collapse and dead codes itself."""
OVERFITTING_NATS = 1.0
"""Train ELBO minus held-out ELBO, in nats per datum, above which a page reports overfitting."""
ADVICE_NATS = 0.1
"""Difference between approximation gap and amortisation gap, in nats, above which the report advises on the larger."""
SHOWN_NATS = 0.005
"""Values below this, in nats, are shown as 0.00, and sentences do not mention them."""
NO_GAIN_NATS = 1e-6
"""Gains of importance sampling over the ELBO up to this, in nats, are rounding errors: all weights are equal."""
REFINED_ROWS = 50
"""Number of rows whose approximate posterior is refined individually, to estimate the inference gaps."""
UNRELIABLE = 0.1
"""Proportion of data with k-hat above its limit beyond which the report gives an alert."""
SIMULATED_ROWS, IMPORTANCE = 500, 4
"""Number of rows on which the guide is calibrated, and of samples from which each weighted one is chosen."""
WORST_DATA = 10
"""Number of data with the largest k-hat that the report shows."""


# ---------------------------------------------------------------------- fit


@section("fit", scored=True)
def fit(exam: Examination) -> Iterator[Part]:
    """Yield ELBO, bounds on log p(x) and inference gaps; nothing for a model without a likelihood."""
    s, bound = exam.held, exam.evidence
    yield text("fit.elbo", split=exam.split, surgery=s, rows=exam.rows[exam.split])
    yield text("fit.terms", surgery=s, kl_seen=abs(s.kl.value) >= SHOWN_NATS)
    if s.global_kl is not None:
        yield text("fit.global", surgery=s)
    rows, reason = exam.evidence_rows, exam.missing.get("evidence")
    yield from texts("fit.log_p", bound=bound, rows=rows, reason=reason, rounding=NO_GAIN_NATS, least=SHOWN_NATS)
    yield tile("fit.total", surgery=s, split=exam.split)
    if bound is not None:
        yield tile("fit.gap", bound=bound)
        yield from _of_bound(exam, bound)
    if (found := _gaps(exam)) is not None:
        yield table_of("fit.gaps", found, split=exam.split, gap=found)
        yield from map(Note, found.remarks)
        yield from _on_gaps(exam, found)
    if exam.gap is not None:
        yield tile("fit.overfitting", gap=exam.gap, split=exam.split)
        yield _on_overfitting(exam, exam.gap)
    evidence = None if bound is None else {**bound.to_dict(), "rows": exam.evidence_rows.note}
    yield {"train_gap": exam.gap, "evidence": evidence, "gap": None if found is None else found.to_dict()}


def _of_bound(exam: Examination, bound: Evidence) -> Iterator[Part]:
    if several := not (len(bound.curve) < 2 or bound.gap < NO_GAIN_NATS):
        yield picture("fit.importance_samples", curves.importance(bound), bound=bound, last=bound.curve[-1][1])
    yield table_of("fit.evidence", bound, split=exam.split, rows=exam.evidence_rows, bound=bound)
    if several:
        yield Note(text("fit.evidence.effective", bound=bound))


def _gaps(exam: Examination) -> Gap | None:
    if exam.evidence is None or exam.evidence.exact is not None or not exam.gap_steps:
        return None
    settings = {"steps": exam.gap_steps, "evidence_samples": 4 * exam.evidence_samples, "seed": exam.seed}
    return exam.attempt("gaps", gap, exam.pair, exam.some(exam.split, REFINED_ROWS).x, **settings, part="inference gap")


def _on_gaps(exam: Examination, found: Gap) -> Iterator[str]:
    a, b = found.approximation, found.amortisation
    family, encoder = (e.value >= SHOWN_NATS for e in (a, b))
    if family or encoder:
        yield text("fit.refined", gap=found, family=family, encoder=encoder)
    if abs(a.value - b.value) > max(2 * math.hypot(a.standard_error, b.standard_error), ADVICE_NATS):
        yield text("fit.encoder_limits" if a.value < b.value else "fit.family_limits", richer=_richer(exam))


def _richer(exam: Examination) -> list[str]:
    """Return the kinds of richer posteriors that the run does not use; none for a run without declared latents."""
    latents = getattr(exam.run.plan, "latents", {})
    used = {getattr(latent.posterior, "kind", "") for latent in latents.values()}
    return [kind for kind in ("full_rank_normal", "flow") if latents and kind not in used]


def _on_overfitting(exam: Examination, difference: float) -> Sentence:
    errors = [exam.surgeries[split].total.data_error for split in ("train", exam.split)]
    error = math.hypot(*(math.nan if e is None or not math.isfinite(e) else e for e in errors))
    known, same = math.isfinite(error), abs(difference) < SHOWN_NATS
    overfits = known and difference > max(OVERFITTING_NATS, 2 * error)
    over = text("fit.over", gap=difference, split=exam.split, error=error, known=known, same=same, overfits=overfits)
    return Sentence(over, overfits)


# ---------------------------------------------------------------------- guide


@section("guide", scored=True)
def guide(exam: Examination) -> Iterator[Part]:
    """Yield the histogram of k-hat, and the data with the largest k-hat.

    Nothing without importance weights, if log p(x) is exact, or if no k-hat is finite.
    """
    if (bound := exam.evidence) is None or bound.exact is not None or not bool(bound.khat.isfinite().any()):
        return
    khat, rows = base.array(bound.khat), exam.evidence_rows
    order = np.argsort(-np.where(np.isfinite(khat), khat, -np.inf), kind="stable")[:WORST_DATA]
    yield picture("guide.khat", curves.khats(khat, bound.khat_limit), bound=bound)
    if is_image(exam.shape):
        data = base.array(exam.part.observed(rows.x[order.tolist()]))
        made = pictures.gallery(data[None], *exam.scale_of_grey, column_names=[f"{khat[i]:.2f}" for i in order])
        yield picture("guide.worst_inferred", made, count=len(order))
    worst = [(exam.name_of(rows.chosen[i]), float(khat[i]), float(bound.ess[i]), float(bound.log_p[i])) for i in order]
    yield table("guide.worst_inferred", worst, digits=(3, 2, 1, 3), split=exam.split, rows=rows, bound=bound)
    yield tile("guide.above_limit", bound=bound)
    if bound.khat_share > UNRELIABLE:
        yield alert("guide.unreliable", bound=bound, richer=_richer(exam))
    else:
        yield text("guide.mostly_reliable" if bound.khat_share > 0 else "guide.reliable", bound=bound)


# ---------------------------------------------------------------------- calibration


@section("calibration", scored=True)
def calibration(exam: Examination) -> Iterator[Part]:
    """Yield ranks and coverage of the guide on simulated data; nothing where they are not defined."""
    given = {"importance": IMPORTANCE, "x": exam.rows["train"].x, "seed": exam.seed}
    found = exam.attempt("calibration", calibrate.calibration, exam.pair, SIMULATED_ROWS, **given, part="calibration")
    if found is None:
        return
    said, notes = found.sentences[:-1], found.remarks[len(found.sentences) - 1 :]
    yield picture("calibration", bars.calibrated(found), shown=min(len(found.worst), bars.HISTOGRAMS), said=said[0])
    yield table_of("calibration", found, folded=len(found.worst) > 5)
    yield from map(Note, notes)
    yield from said
    yield {"calibration": found.to_dict()}


# ---------------------------------------------------------------------- surgery


SATURATED = 0.9
"""Ratio of I_q[x, z] to log n above which the report says that the number of rows n limits I_q[x, z]."""
LISTED_LABELS = 50
"""Largest number of labels for which the surgery of each is listed in a table."""


@section("surgery", scored=True)
def surgery(exam: Examination) -> Iterator[Part]:
    """Yield waterfall chart and table of the ELBO surgery; nothing for a model without a likelihood."""
    s, gaps = exam.held, bars.inference_steps(exam.held, exam.evidence)
    panels = bars.waterfall_steps(s, gaps)
    made, of, steps = bars.waterfall(panels), exam.evidence_rows, list(chain(*panels[:2]))
    yield picture("surgery.waterfall", made, split=exam.split, steps=steps, gaps=gaps, rows=of, surgery=s)
    rows = merged(exam.surgeries)
    strong = tuple(i for i, row in enumerate(rows) if row[0] == "elbo")
    yield table("surgery", rows, *exam.surgeries, strong=strong, exam=exam)
    yield from map(Note, s.notes)
    if s.shared:
        yield table("surgery.global_latents", tuple(s.shared.items()))
    if 1 < len(s.classes) <= LISTED_LABELS:
        names, terms = exam.data.label_names, attrgetter(*SURGERY_TERMS)
        by_label = [(clouds.class_name(label, names), c.n, *terms(c)) for label, c in s.classes.items()]
        titles = (term.replace("_", " ") for term in SURGERY_TERMS)
        yield table("surgery.surgery_by_label", by_label, *titles, digits=2, split=exam.split)
    if s.population is not None:
        yield tile("surgery.new_data", surgery=s)
        if len(s.population.sizes) > 1:
            yield picture("surgery.law_in_n", curves.law_in_n(s.population), surgery=s)
    elif s.marginal_kl is not None:
        yield tile("surgery.marginal_kl", surgery=s)
    yield from on_prior(s)
    surgeries = {split: {**found.to_dict(), "rows": exam.rows[split].note} for split, found in exam.surgeries.items()}
    yield {"surgery": surgeries}


def on_prior(s: Surgery) -> Iterator[str]:
    """Yield sentences on what a better prior wins: on new data, an interval; on these rows, the marginal KL."""
    if any("deterministic code" in note for note in s.notes):
        yield text("surgery.deterministic")
        return
    if s.population is not None or s.marginal_kl is None or s.marginal_kl.value >= SHOWN_NATS:
        yield from map(typeset, (s.headline(), *s.on_new_data))
    else:
        yield text("surgery.no_cost", surgery=s)
    if s.marginal_kl is not None and s.mutual_information is not None:
        yield from texts("surgery.limits", surgery=s, share=SATURATED, least=SHOWN_NATS)


# ---------------------------------------------------------------------- the run


@section("training")
def training(exam: Examination) -> Iterator[Part]:
    """Yield training curves, the table of events, and alerts: of an unfinished fit, of skipped steps, of the fit."""
    if not exam.metrics:
        yield Note(text("training.no_metrics"))
    elif exam.implicit:
        at, values = curves.series(exam.metrics, "validation", "two_sample")
        end = (int(at[-1]), values[-1]) if len(values) else None
        yield picture("training.gan.training", curves.duel(exam.metrics), end=end)
    else:
        figure, total = str(exam.run.files.manifest.get("figure", "elbo")), exam.held.total_name
        at, values = curves.series(exam.metrics, "validation", figure)
        best = (values.max(), int(at[values.argmax()])) if len(values) else None
        made = curves.training(exam.metrics, [*exam.collapse.latents, *exam.pair.layout.shared], figure, total)
        yield picture("training", made, total=total, figure=named(figure), best=best)
        if any(row.get("split") == "analysis" for row in exam.metrics):
            watched = exam.run.plan.analysis
            yield picture("training.information_over_epochs", curves.history(exam.metrics), watched=watched)
    events = [(str(e.get("kind")), str(e.get("message"))) for e in exam.run.files.events()]
    if told := tuple(dict.fromkeys(event for event in events if event[0] in TOLD_EVENTS)):
        yield table("training.events", told)
    if (status := exam.run.status).get("state") != "finished":
        state, epoch, epochs = map(status.get, ("state", "epoch", "epochs"))
        yield alert("training.unfinished", state=state, epoch=epoch, epochs=epochs)
    if isinstance(skipped := status.get("skipped"), int) and skipped > 0:
        yield alert("training.skipped", count=skipped)
    for said in dict.fromkeys(said for kind, said in told if kind == "alert" and not MEASURED.search(said)):
        yield Sentence(said, True)
    yield {"metrics": exam.metrics, "events": [list(event) for event in told]}


@section("declaration", is_appendix=True)
def declaration(exam: Examination) -> Iterator[Part]:
    """Yield the formulas of model and guide, and the declaration of the run as TOML."""
    if isinstance(exam.run.plan, experiment.Experiment):
        found = readback.formulas(exam.run.plan)
        yield Listing(f"{found['model']}\n{found['guide']}", text("declaration.formulas"))
        yield Listing(f"{found['model_latex']}\n{found['guide_latex']}", text("declaration.latex"), folded=True)
    else:
        yield Note(text("declaration.by_hand"))
    yield Listing(exam.run.files.spec_text, text("declaration.toml"))


@section("environment", is_appendix=True)
def environment(exam: Examination) -> Iterator[Part]:
    """Yield state, device, threads, seed, data and software versions of the run."""
    told = environment_of(exam.run)
    yield table("environment", told)
    yield {"environment": dict(told)}


@section("left_out", is_appendix=True)
def left_out(exam: Examination) -> Iterator[Part]:
    """Yield the analyses that failed, with the reason of each; this section must be computed after all others."""
    if exam.missing:
        yield table("left_out", tuple(exam.missing.items()))
    yield {"missing": dict(exam.missing)}


def environment_of(run: Run) -> tuple[tuple[str, str], ...]:
    """Return (name, value) pairs on state, device, seed, data and versions of a run, from its manifest and status."""
    manifest, status = run.files.manifest, run.status
    entries = map(manifest.get, ("data", "git", "versions"))
    data, git, versions = (found if isinstance(found, Mapping) else {} for found in entries)
    facts = {**manifest, "engine": status.get("engine", manifest.get("engine"))}
    said = texts("environment.facts", run=run, facts=facts, status=status, data=data, git=git)
    told = [*(fact.partition(": ")[::2] for fact in said), *versions.items()]
    return tuple((str(what), str(value)) for what, value in told if value is not None)
