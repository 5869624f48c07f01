"""Sections on the run: training, declaration, environment, and analyses that could not be computed."""

import re
from collections.abc import Iterator, Mapping

from pvae.analysis.pages.document.blocks import Listing, Note, Part, Sentence
from pvae.analysis.pages.document.words import alert, picture, section, table, text
from pvae.analysis.pages.plots import curves
from pvae.analysis.pages.sections.examination import Examination
from pvae.experiment.experiment import Experiment
from pvae.experiment.readback import formulas
from pvae.objectives.base import named
from pvae.runs.run import Run

TOLD_EVENTS = ("nonfinite", "storage", "stop", "changed", "engine", "precision", "data", "alert")
MEASURED = re.compile("has collapsed|are dead|are silent")
"""Pattern of alerts from the fit that the report omits, because it measures collapse and dead codes itself."""


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
    skipped = status.get("skipped")
    if isinstance(skipped, int) and skipped > 0:
        yield alert("training.skipped", count=skipped)
    for said in dict.fromkeys(said for kind, said in told if kind == "alert" and not MEASURED.search(said)):
        yield Sentence(said, True)
    yield {"metrics": exam.metrics, "events": [list(event) for event in told]}


@section("declaration", is_appendix=True)
def declaration(exam: Examination) -> Iterator[Part]:
    """Yield the formulas of model and guide, and the declaration of the run as TOML."""
    if isinstance(exam.run.plan, Experiment):
        found = formulas(exam.run.plan)
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
    told = [
        ("run", f"{run.name} / {run.path.name}"),
        ("started", manifest.get("started")),
        ("state", f"{status.get('state')}, epoch {status.get('epoch')} of {status.get('epochs')}"),
        ("training time", f"{status.get('seconds')} s"),
        *((key, facts.get(key)) for key in ("device", "engine", "precision", "threads", "seed")),
        ("data", f"{data.get('source')}, shape {data.get('shape')}"),
        ("data fingerprint", data.get("fingerprint")),
        ("commit", f"{git['commit']}{' (changed since)' if git.get('dirty') else ''}" if git.get("commit") else None),
        ("platform", manifest.get("platform")),
        *versions.items(),
    ]
    return tuple((str(what), str(value)) for what, value in told if value is not None)
