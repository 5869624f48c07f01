"""Section on the ELBO surgery: reconstruction, mutual information I_q[x, z] and marginal KL of the ELBO."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pvae.analysis.decompose.result import Surgery
from pvae.analysis.figures.estimate import merged
from pvae.analysis.pages.document.blocks import Note, PageTable, Part, Picture, Tile, columns, picture, section
from pvae.analysis.pages.document.text import nats
from pvae.analysis.pages.plots import clouds, waterfall
from pvae.analysis.pages.sections.examination import Examination
from pvae.analysis.pages.sections.fit import SHOWN_NATS

SATURATED = 0.9
"""Ratio of I_q[x, z] to log n above which the report says that the number of rows n limits I_q[x, z]."""
LISTED_LABELS = 50
"""Largest number of labels for which the surgery of each is listed in a table."""
SURGERY_TERMS = ("elbo", "reconstruction", "kl", "mutual_information", "marginal_kl")


@section(
    "surgery",
    "ELBO surgery",
    "ELBO = reconstruction − I_q[x, z] − KL(q_agg ‖ p). Only the last term depends on the prior. All terms are "
    "computed from the same samples, so they add up to the ELBO exactly.",
)
def anatomy(exam: Examination) -> Iterator[Part]:
    """Yield waterfall chart and table of the ELBO surgery; nothing for a model without a likelihood."""
    if exam.implicit:
        return
    s = exam.held
    yield _waterfall(exam)
    rows = merged(exam.surgeries)
    where = "; ".join(f"{split}: {exam.rows[split].note}, {s.samples} samples" for split, s in exam.surgeries.items())
    yield PageTable(
        "surgery",
        f"Nats per datum, ± Monte Carlo standard error with the data fixed; {where}",
        columns("term", *exam.surgeries, words=["what it is"]),
        rows,
        strong=tuple(i for i, row in enumerate(rows) if row[0] == "elbo"),
    )
    yield from (Note(text) for text in s.notes)
    if s.shared:
        caption = "Global latents: log q − log p in nats for the whole data set, not included in figures per datum"
        yield PageTable("global_latents", caption, columns("site", "nats"), tuple(s.shared.items()))
    if 1 < len(s.classes) <= LISTED_LABELS:
        by_label = [
            (clouds.class_name(label, exam.data.label_names), c.n, *(getattr(c, term) for term in SURGERY_TERMS))
            for label, c in s.classes.items()
        ]
        titles = columns("label", "rows", *(term.replace("_", " ") for term in SURGERY_TERMS), digits=2)
        yield PageTable("surgery_by_label", f"Surgery by label, {exam.split}: nats per datum", titles, by_label)
    if s.marginal_kl is not None:
        yield Tile("marginal KL", nats(s.marginal_kl), "nats, the most that a better prior can add")
    yield from on_prior(s)
    surgeries = {split: {**found.to_dict(), "rows": exam.rows[split].note} for split, found in exam.surgeries.items()}
    yield {"surgery": surgeries}


def on_prior(s: Surgery) -> Iterator[str]:
    """Yield sentences on the gain that a better prior could bring, from the marginal KL and I_q[x, z]."""
    if any("deterministic code" in note for note in s.notes):
        yield "The code is deterministic: I_q[x, z] equals log n, and the marginal KL is not defined."
        return
    if s.marginal_kl is None or s.mutual_information is None:
        yield "The marginal KL is not known for this posterior."
        return
    if s.marginal_kl.value < SHOWN_NATS:
        yield "The marginal KL is below 0.01 nats: with this encoder no better prior would raise the ELBO."
    else:
        yield f"The marginal KL is {nats(s.marginal_kl)} nats, the most that a better prior can add with this encoder."
    if s.mutual_information.value > SATURATED * s.log_n.value:
        yield (
            f"I_q[x, z] = {nats(s.mutual_information)} nats is close to its ceiling log {s.n} = {nats(s.log_n)}. With "
            f"more rows I_q[x, z] would be larger and the marginal KL smaller."
        )
    if s.train_gain is not None and not math.isfinite(s.train_gain.value):
        yield "q_agg of the training rows cannot serve as the prior: it gives some codes here no probability."
    elif s.train_gain is not None and abs(gain := s.train_gain.value) >= SHOWN_NATS:
        change = "raise" if gain > 0 else "lower"
        yield f"As the prior, q_agg of the training rows would {change} this ELBO by {nats(abs(gain))} nats."


def _waterfall(exam: Examination) -> Picture:
    found, gaps = exam.held, waterfall.inference_steps(exam.held, exam.evidence)
    panels = waterfall.waterfall_steps(found, gaps)
    said = "; ".join(
        f"{step.label} {nats(step.value if step.is_level else -step.value)}" for steps in panels[:2] for step in steps
    )
    above = (
        f"Top: from log p(x) down to the ELBO, the loss of inference ({exam.evidence_rows.note}). Below: from "
        "log p(x | z) down"
        if gaps
        else "From log p(x | z) down"
    )
    return picture(
        "waterfall",
        waterfall.waterfall(panels),
        f"Waterfall of the ELBO on {exam.split}: {said} nats per datum.",
        f"{above} to the ELBO. I_q[x, z] is the information about x that the code carries; the marginal KL is the cost "
        "of a prior that differs from q_agg. If the marginal KL is large, try a richer prior. The axis does not start "
        "at 0.",
    )
