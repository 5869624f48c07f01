"""How the run was fitted: its curves, and what happened on the way."""

from __future__ import annotations

import re

from pvae.analysis.pages import plots
from pvae.analysis.pages.document.document import Block, Column, Note, Picture, Section, Sentence, Table, nats, picture
from pvae.analysis.pages.sections.examination import Case

TOLD_EVENTS = ("nonfinite", "storage", "stop", "changed", "engine", "data", "alert")
MEASURED = re.compile("has collapsed|are dead")
"""Alerts of the fit on what the report measures itself."""


def section(case: Case) -> Section:
    """Curves over epochs, events, and alerts of the fit."""
    blocks: list[Block] = _curves(case) if case.metrics else [Note("No metrics were kept.")]
    events = [(str(e.get("kind")), str(e.get("message"))) for e in case.run.files.events()]
    told = tuple(dict.fromkeys(event for event in events if event[0] in TOLD_EVENTS))
    if told:
        columns = (Column("kind"), Column("message", is_text=True))
        blocks.append(Table("events", "What happened on the way", columns, told))
    alerts = [
        *_state(case),
        *dict.fromkeys(text for kind, text in told if kind == "alert" if not MEASURED.search(text)),
    ]
    numbers = {"metrics": case.metrics, "events": [list(event) for event in told]}
    said = tuple(Sentence(text, True) for text in alerts)
    return Section("training", "Training", tuple(blocks), sentences=said, numbers=numbers)


def _state(case: Case) -> list[str]:
    """What went wrong while a run was fitted, each with what to do."""
    status = case.run.status
    alerts = []
    if status.get("state") != "finished":
        epochs = f"{status.get('epoch')} of {status.get('epochs')}"
        alerts.append(f"The run is {status.get('state')} after epoch {epochs}: go on with pvae resume.")
    skipped = status.get("skipped")
    if isinstance(skipped, int) and skipped > 0:
        alerts.append(
            f"{skipped} steps with a NaN or infinite loss were skipped: lower train.optimizer.lr, or set "
            "train.clip_norm."
        )
    return alerts


def _curves(case: Case) -> list[Block]:
    if case.implicit:
        return [_duel(case)]
    made: list[Block] = [_elbo(case)]
    if any(row.get("split") == "analysis" for row in case.metrics):
        made.append(_history(case))
    return made


def _elbo(case: Case) -> Picture:
    epochs, best = plots.series(case.metrics, "validation", "elbo")
    said = ""
    if len(best):
        said = f" Best validation ELBO {nats(float(best.max()))} at epoch {int(epochs[best.argmax()])}."
    return picture(
        "training",
        plots.training(case.metrics, list(case.collapse.latents)),
        f"Three charts over epochs: ELBO of train and validation, KL of every latent, beta.{said}",
        "The ELBO is the one with beta = 1 whatever the loss was; its first epochs may lie below the frame. Look for "
        "validation that turns down while train still rises (overfitting), for an end that still rises (train longer), "
        "and for a KL that falls to zero (collapse).",
    )


def _history(case: Case) -> Picture:
    watched = case.run.plan.analysis
    return picture(
        "information_over_epochs",
        plots.history(case.metrics),
        f"Mutual information and marginal KL of {watched.rows} {watched.split} rows over epochs.",
        "The two parts of the KL, on the same rows and noise each time. Look for a marginal KL that grows while the "
        "information stands still (a richer prior would pay for itself), and for information at its ceiling (too few "
        "rows were watched: raise analysis.rows).",
    )


def _duel(case: Case) -> Picture:
    epochs, values = plots.series(case.metrics, "validation", "two_sample")
    said = f" It ends at {values[-1]:.2f} after epoch {int(epochs[-1])}." if len(values) else ""
    return picture(
        "training",
        plots.duel(case.metrics),
        f"Two charts over epochs: losses of critic and generator, and the nearest-neighbour accuracy.{said}",
        "Losses of critic and generator: neither falls as the model improves. Where the critic's stands at log 4 "
        "(dotted) it tells nothing apart; a critic far better on train than on validation has learned the data by "
        "heart. Below, how often the nearest other row of validation data and as many samples is of the same kind: one "
        "half is the aim.",
    )
