"""Sections on the run: training, declaration, environment, and analyses that could not be computed."""

import re
from collections.abc import Iterator, Mapping

from pvae.analysis.pages.document.blocks import Listing, Note, PageTable, Part, Sentence, columns, picture, section
from pvae.analysis.pages.document.text import nats
from pvae.analysis.pages.plots import curves
from pvae.analysis.pages.sections.examination import Examination
from pvae.experiment.experiment import Experiment
from pvae.experiment.readback import formulas
from pvae.objectives.base import named
from pvae.runs.run import Run

TOLD_EVENTS = ("nonfinite", "storage", "stop", "changed", "engine", "precision", "data", "alert")
MEASURED = re.compile("has collapsed|are dead|are silent")
"""Pattern of alerts from the fit that the report omits, because it measures collapse and dead codes itself."""


@section("training", "Training")
def training(exam: Examination) -> Iterator[Part]:
    """Yield training curves, the table of events, and alerts: of an unfinished fit, of skipped steps, of the fit."""
    if not exam.metrics:
        yield Note("No metrics were kept.")
    elif exam.implicit:
        yield _duel(exam)
    else:
        yield _elbo(exam)
        if any(row.get("split") == "analysis" for row in exam.metrics):
            yield _history(exam)
    events = [(str(e.get("kind")), str(e.get("message"))) for e in exam.run.files.events()]
    if told := tuple(dict.fromkeys(event for event in events if event[0] in TOLD_EVENTS)):
        yield PageTable("events", "Events during the fit", columns("kind", words=["message"]), told)
    if (status := exam.run.status).get("state") != "finished":
        epochs = f"{status.get('epoch')} of {status.get('epochs')}"
        yield Sentence(f"The run is {status.get('state')} after epoch {epochs}. Continue it with pvae resume.", True)
    skipped = status.get("skipped")
    if isinstance(skipped, int) and skipped > 0:
        advice = "Lower train.optimizer.lr, or set train.clip_norm."
        yield Sentence(f"{skipped} steps with a NaN or infinite loss were skipped. {advice}", True)
    for text in dict.fromkeys(text for kind, text in told if kind == "alert" and not MEASURED.search(text)):
        yield Sentence(text, True)
    yield {"metrics": exam.metrics, "events": [list(event) for event in told]}


def _elbo(exam: Examination) -> Part:
    figure = str(exam.run.files.manifest.get("figure", "elbo"))
    epochs, best = curves.series(exam.metrics, "validation", figure)
    ranked = f" Best {named(figure)} {nats(best.max())} at epoch {int(epochs[best.argmax()])}." if len(best) else ""
    total = exam.held.total_name
    return picture(
        "training",
        curves.training(exam.metrics, [*exam.collapse.latents, *exam.pair.layout.shared], figure, total),
        f"Three charts over epochs: {total} of train and validation, KL of every latent, beta.{ranked}",
        f"The {total} is that of beta = 1, whatever beta the loss used. Its first epochs may lie below the frame. Look "
        "for a validation curve that falls while train still rises (overfitting), for curves that still rise at the "
        "end (train longer), and for a KL that falls to zero (collapse).",
    )


def _history(exam: Examination) -> Part:
    watched = exam.run.plan.analysis
    return picture(
        "information_over_epochs",
        curves.history(exam.metrics),
        f"Mutual information and marginal KL of {watched.rows} {watched.split} rows over epochs.",
        "The two parts of the KL, on the same rows and noise each time. Look for a marginal KL that grows while the "
        "mutual information is constant (a richer prior would help), and for mutual information at its ceiling (too "
        "few rows: raise analysis.rows).",
    )


def _duel(exam: Examination) -> Part:
    epochs, values = curves.series(exam.metrics, "validation", "two_sample")
    said = f" It ends at {values[-1]:.2f} after epoch {int(epochs[-1])}." if len(values) else ""
    return picture(
        "training",
        curves.duel(exam.metrics),
        f"Two charts over epochs: losses of critic and generator, and the nearest-neighbour accuracy.{said}",
        "Losses of critic and generator: neither falls as the model improves. A critic loss of log 4 (dotted) means "
        "that the critic cannot tell samples from data. A critic far better on train than on validation overfits. "
        "Below: proportion of validation data and as many samples whose nearest neighbour is of the same kind; 0.5 is "
        "the aim.",
    )


@section("declaration", "Declaration", is_appendix=True)
def declaration(exam: Examination) -> Iterator[Part]:
    """Yield the formulas of model and guide, and the declaration of the run as TOML."""
    if isinstance(exam.run.plan, Experiment):
        found = formulas(exam.run.plan)
        yield Listing(f"{found['model']}\n{found['guide']}", "Formulas")
        yield Listing(f"{found['model_latex']}\n{found['guide_latex']}", "In LaTeX", folded=True)
    else:
        yield Note("A hand-written pair: model and guide are Pyro programs of the user.")
    yield Listing(exam.run.files.spec_text, "Declaration as TOML")


@section("environment", "Environment", is_appendix=True)
def environment(exam: Examination) -> Iterator[Part]:
    """Yield state, device, threads, seed, data and software versions of the run."""
    told = environment_of(exam.run)
    yield PageTable("environment", "Environment of the run", columns("what", words=["value"]), told)
    yield {"environment": dict(told)}


@section("left_out", "Left out", is_appendix=True)
def left_out(exam: Examination) -> Iterator[Part]:
    """Yield the analyses that failed, with the reason of each; this section must be computed after all others."""
    if exam.missing:
        titles = columns("what", words=["why"])
        yield PageTable("left_out", "Not available for this run", titles, tuple(exam.missing.items()))
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
