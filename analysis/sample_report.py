"""The report of a run without a likelihood: its losses, its samples, and how they compare with data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvae.analysis import plots
from pvae.analysis.generate import Samples, sample
from pvae.analysis.report import (
    SHOWN_SAMPLES,
    TOLD_EVENTS,
    Picture,
    Progress,
    Sentence,
    array,
    environment,
    finite,
    page,
    picture,
    training_alerts,
)
from pvae.analysis.two_sample import STEPS as COMPARING
from pvae.analysis.two_sample import Comparison, compare
from pvae.files import write_atomic
from pvae.run import Run
from pvae.show import formulas

STEPS = (*COMPARING, "figures")
ALIKE = 0.05
"""A p-value above which samples cannot be told from data."""
MISSED = 0.5
"""Share of the coverage that samples of the data's law have, below which data are missed."""


@dataclass(frozen=True)
class SampleFindings:
    """Everything the report of a run without a likelihood says, before it is written down."""

    run: Run
    split: str
    held: Comparison
    """Samples beside the data of the split."""
    sampled: Samples
    """What is shown."""
    seed: int


def examine(
    run: Run, *, split: str = "test", seed: int = 0, on_progress: Progress = lambda _done, _total, _what: None
) -> SampleFindings:
    """Compute everything the report says.

    Arguments:
        run: a run with a checkpoint.
        split: the data that samples are compared with.
        seed: of all draws.
        on_progress: called with (steps done, steps in all, what comes next).
    """
    held = compare(run, split, seed=seed, on_progress=lambda done, _, what: on_progress(done, len(STEPS), what))
    return SampleFindings(run, split, held, sample(run, SHOWN_SAMPLES, seed=seed), seed)


def write(found: SampleFindings) -> Path:
    """Write the report's two files, each whole or not at all; returns the path of the HTML file."""
    folder, content = found.run.files.report, render(found)
    numbers = json.dumps(finite(figures(found)), indent=2, allow_nan=False, ensure_ascii=True) + "\n"
    write_atomic(folder / "report.json", numbers)
    write_atomic(folder / "index.html", content)
    return folder / "index.html"


# ---------------------------------------------------------------------- what it says


def verdict(found: SampleFindings) -> list[Sentence]:
    """What the figures say, in plain words."""
    sentences = [
        Sentence("The model has no likelihood: nothing below says how probable a datum is, or how much was inferred."),
        _on_test(found.held),
        *_on_fidelity(found.held),
    ]
    return [*sentences, *(Sentence(text, True) for text in training_alerts(found.run))]


def _on_test(held: Comparison) -> Sentence:
    accuracy, p = held.test.accuracy, held.test.p_value.value
    text = f"A classifier tells samples from data of {held.split} in {percent(accuracy.value)} of cases"
    if p > ALIKE:
        return Sentence(f"{text}, no better than chance would (p = {p:.2g}; {held.test.held} of each kind).")
    return Sentence(f"{text}; of samples of the data's own law it would in 50 % (p = {p:.2g}).")


def _on_fidelity(held: Comparison) -> list[Sentence]:
    f = held.fidelity
    expected = f.expected_coverage
    sentences = [
        Sentence(
            f"{percent(f.precision.value)} of the samples look like data, {percent(f.recall.value)} of the data could "
            f"have been drawn, and {percent(f.coverage.value)} have a sample near ({percent(expected)} would with "
            f"samples of the data's own law)."
        )
    ]
    if f.coverage.value < MISSED * expected:
        sentences.append(
            Sentence("Most kinds of data are never drawn. Raise objective.r1, or train longer with a lower rate.", True)
        )
    if f.confidence is not None and f.data_confidence is not None:
        least = min(f.shares, key=lambda name: f.shares[name].value)
        sentences.append(
            Sentence(
                f"A classifier of the data is {percent(f.confidence.value / f.data_confidence.value)} as sure of the "
                f"samples as of data; it finds least of {least}, {percent(f.shares[least].value)}."
            )
        )
    return sentences


def percent(value: float) -> str:
    """A share in whole per cent."""
    return f"{100 * value:.0f} %"


def pictures(found: SampleFindings) -> dict[str, list[Picture]]:
    """All figures by section."""
    rows = found.run.files.metrics_rows()
    data = array(found.run.data.train.observed(found.run.data.train.rows[:1000]))
    low, high = float(data.min()), float(data.max())
    made = plots.sampled(found.sampled, data) or plots.samples(array(found.sampled.x), data, low, high)
    return {
        "training": [picture(plots.duel(rows), _alt_of_training(rows), TRAINING_CAPTION)] if rows else [],
        "samples": [picture(made, f"{len(found.sampled.x)} samples of the model.", SAMPLES_CAPTION)],
    }


TRAINING_CAPTION = (
    "Losses of critic and generator: neither falls as the model improves. Where the critic's stands at log 4 (dotted) "
    "it tells nothing apart; a critic far better on train than on validation has learned the data by heart. Below, how "
    "often the nearest other row of validation data and as many samples is of the same kind: one half is the aim."
)
SAMPLES_CAPTION = (
    "Each at its own draw of z from the prior. Look for kinds that are missing, and for samples that repeat."
)


def _alt_of_training(rows: Sequence[plots.Row]) -> str:
    epochs, values = plots.series(rows, "validation", "two_sample")
    said = f" It ends at {values[-1]:.2f} after epoch {int(epochs[-1])}." if len(values) else ""
    return f"Two charts over epochs: losses of critic and generator, and the nearest-neighbour accuracy.{said}"


def tiles(found: SampleFindings) -> list[tuple[str, str, str]]:
    """The headline figures: (what, figure, unit and condition)."""
    test, f = found.held.test, found.held.fidelity
    return [
        ("told apart", f"{test.accuracy.value:.2f}", "of 1; one half is the aim"),
        ("precision", f"{f.precision.value:.2f}", "of samples look like data"),
        ("recall", f"{f.recall.value:.2f}", "of data could have been drawn"),
        ("coverage", f"{f.coverage.value:.2f}", f"of data; {f.expected_coverage:.2f} is the aim"),
    ]


def figures(found: SampleFindings) -> dict[str, Any]:
    """Every number of the report."""
    run = found.run
    return {
        "run": {"name": run.name, "id": run.path.name, "started": run.files.manifest.get("started")},
        "split": found.split,
        "seed": found.seed,
        "verdict": [{"text": s.text, "alert": s.is_alert} for s in verdict(found)],
        **found.held.to_dict(),
        "metrics": run.files.metrics_rows(),
        "environment": dict(environment(run)),
    }


def render(found: SampleFindings) -> str:
    """The page, with everything that comes from the run escaped."""
    run = found.run
    events = [(str(e.get("kind")), str(e.get("message"))) for e in run.files.events() if e.get("kind") in TOLD_EVENTS]
    return page(
        "samples.html.j2",
        found=found,
        name=run.name,
        identity=run.path.name,
        started=str(run.files.manifest.get("started", "")),
        description=run.plan.description,
        formulas=formulas(run.experiment),
        spec=run.files.spec_text,
        verdict=verdict(found),
        tiles=tiles(found),
        pictures=pictures(found),
        events=list(dict.fromkeys(events)),
        environment=environment(run),
    )
