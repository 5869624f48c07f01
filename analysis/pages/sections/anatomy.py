"""Section on the ELBO surgery: reconstruction, mutual information I_q[x, z] and marginal KL of the ELBO."""

import math
from collections.abc import Iterator

from pvae.analysis.decompose.result import Surgery
from pvae.analysis.figures.estimate import merged
from pvae.analysis.pages.document.blocks import Note, Part, Picture
from pvae.analysis.pages.document.text import nats, typeset
from pvae.analysis.pages.document.words import picture, section, table, text, tile
from pvae.analysis.pages.plots import bars, clouds, curves
from pvae.analysis.pages.sections.examination import Examination
from pvae.analysis.pages.sections.fit import SHOWN_NATS

SATURATED = 0.9
"""Ratio of I_q[x, z] to log n above which the report says that the number of rows n limits I_q[x, z]."""
LISTED_LABELS = 50
"""Largest number of labels for which the surgery of each is listed in a table."""
SURGERY_TERMS = ("elbo", "reconstruction", "kl", "mutual_information", "marginal_kl")


@section("surgery", scored=True)
def anatomy(exam: Examination) -> Iterator[Part]:
    """Yield waterfall chart and table of the ELBO surgery; nothing for a model without a likelihood."""
    s = exam.held
    yield _waterfall(exam)
    rows = merged(exam.surgeries)
    samples = "; ".join(f"{split}: {exam.rows[split].note}, {s.samples} samples" for split, s in exam.surgeries.items())
    strong = tuple(i for i, row in enumerate(rows) if row[0] == "elbo")
    yield table("surgery", rows, *exam.surgeries, strong=strong, samples=samples)
    yield from map(Note, s.notes)
    if s.shared:
        yield table("surgery.global_latents", tuple(s.shared.items()))
    if 1 < len(s.classes) <= LISTED_LABELS:
        by_label = [
            (clouds.class_name(label, exam.data.label_names), c.n, *(getattr(c, term) for term in SURGERY_TERMS))
            for label, c in s.classes.items()
        ]
        titles = (term.replace("_", " ") for term in SURGERY_TERMS)
        yield table("surgery.surgery_by_label", by_label, *titles, digits=2, split=exam.split)
    if s.population is not None:
        interval = s.population.interval.replace(" to ", "–").replace("at least", "≥")
        yield tile("surgery.new_data", interval=interval)
        if len(s.population.sizes) > 1:
            sizes = "; ".join(f"n = {size.n}: {nats(size.information)}" for size in s.population.sizes)
            yield picture("surgery.law_in_n", curves.law_in_n(s.population), sizes=sizes)
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
    if s.marginal_kl is None or s.mutual_information is None:
        return
    if s.population is None and s.mutual_information.value > SATURATED * s.log_n.value:
        yield text("surgery.ceiling", surgery=s)
    if s.train_gain is not None and not math.isfinite(s.train_gain.value):
        yield text("surgery.no_support")
    elif s.train_gain is not None and abs(gain := s.train_gain.value) >= SHOWN_NATS:
        yield text("surgery.as_prior", gain=gain)


def _waterfall(exam: Examination) -> Picture:
    found, gaps = exam.held, bars.inference_steps(exam.held, exam.evidence)
    panels = bars.waterfall_steps(found, gaps)
    steps = "; ".join(f"{step.label} {step.figure}" for steps in panels[:2] for step in steps)
    made, rows = bars.waterfall(panels), exam.evidence_rows
    return picture("surgery.waterfall", made, split=exam.split, steps=steps, gaps=gaps, rows=rows, surgery=found)
