"""Section on training: metrics over epochs, events and alerts of the fit."""

from __future__ import annotations

import re

from pvae.analysis.pages import plots
from pvae.analysis.pages.document.blocks import Block, Note, PageSection, PageTable, Picture, Sentence, columns, picture
from pvae.analysis.pages.document.text import nats
from pvae.analysis.pages.sections.examination import Examination

TOLD_EVENTS = ("nonfinite", "storage", "stop", "changed", "engine", "data", "alert")
MEASURED = re.compile("has collapsed|are dead")
"""Pattern of alerts from the fit that the report omits, because it measures collapse and dead codes itself."""


def section(exam: Examination) -> PageSection:
    """Return the section with training curves, the table of events, and the alerts of the fit."""
    blocks: list[Block] = _curves(exam) if exam.metrics else [Note("No metrics were kept.")]
    events = [(str(e.get("kind")), str(e.get("message"))) for e in exam.run.files.events()]
    told = tuple(dict.fromkeys(event for event in events if event[0] in TOLD_EVENTS))
    if told:
        blocks.append(PageTable("events", "Events during the fit", columns("kind", words=["message"]), told))
    of_fit = dict.fromkeys(text for kind, text in told if kind == "alert" if not MEASURED.search(text))
    numbers = {"metrics": exam.metrics, "events": [list(event) for event in told]}
    said = tuple(Sentence(text, True) for text in (*_state(exam), *of_fit))
    return PageSection("training", "Training", tuple(blocks), sentences=said, numbers=numbers)


def _state(exam: Examination) -> list[str]:
    """Return alerts on an unfinished fit and on skipped steps, each with advice."""
    status = exam.run.status
    alerts = []
    if status.get("state") != "finished":
        epochs = f"{status.get('epoch')} of {status.get('epochs')}"
        alerts.append(f"The run is {status.get('state')} after epoch {epochs}. Continue it with pvae resume.")
    skipped = status.get("skipped")
    if isinstance(skipped, int) and skipped > 0:
        alerts.append(
            f"{skipped} steps with a NaN or infinite loss were skipped. Lower train.optimizer.lr, or set "
            "train.clip_norm."
        )
    return alerts


def _curves(exam: Examination) -> list[Block]:
    if exam.implicit:
        return [_duel(exam)]
    made: list[Block] = [_elbo(exam)]
    if any(row.get("split") == "analysis" for row in exam.metrics):
        made.append(_history(exam))
    return made


def _elbo(exam: Examination) -> Picture:
    epochs, best = plots.series(exam.metrics, "validation", "elbo")
    said = ""
    if len(best):
        said = f" Best validation ELBO {nats(float(best.max()))} at epoch {int(epochs[best.argmax()])}."
    return picture(
        "training",
        plots.training(exam.metrics, list(exam.collapse.latents)),
        f"Three charts over epochs: ELBO of train and validation, KL of every latent, beta.{said}",
        "The ELBO is that of beta = 1, whatever beta the loss used. Its first epochs may lie below the frame. Look for "
        "a validation curve that falls while train still rises (overfitting), for curves that still rise at the end "
        "(train longer), and for a KL that falls to zero (collapse).",
    )


def _history(exam: Examination) -> Picture:
    watched = exam.run.plan.analysis
    return picture(
        "information_over_epochs",
        plots.history(exam.metrics),
        f"Mutual information and marginal KL of {watched.rows} {watched.split} rows over epochs.",
        "The two parts of the KL, on the same rows and noise each time. Look for a marginal KL that grows while the "
        "mutual information is constant (a richer prior would help), and for mutual information at its ceiling (too "
        "few rows: raise analysis.rows).",
    )


def _duel(exam: Examination) -> Picture:
    epochs, values = plots.series(exam.metrics, "validation", "two_sample")
    said = f" It ends at {values[-1]:.2f} after epoch {int(epochs[-1])}." if len(values) else ""
    return picture(
        "training",
        plots.duel(exam.metrics),
        f"Two charts over epochs: losses of critic and generator, and the nearest-neighbour accuracy.{said}",
        "Losses of critic and generator: neither falls as the model improves. A critic loss of log 4 (dotted) means "
        "that the critic cannot tell samples from data. A critic far better on train than on validation overfits. "
        "Below: proportion of validation data and as many samples whose nearest neighbour is of the same kind; 0.5 is "
        "the aim.",
    )
