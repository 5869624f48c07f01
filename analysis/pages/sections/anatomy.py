"""Section on the ELBO surgery: reconstruction, mutual information I_q[x, z] and marginal KL of the ELBO."""

import math
from collections.abc import Iterator

from pvae.analysis.decompose.result import Surgery
from pvae.analysis.figures.estimate import merged
from pvae.analysis.pages.document.blocks import Note, PageTable, Part, Picture, Tile, columns, picture, section
from pvae.analysis.pages.document.text import nats, typeset
from pvae.analysis.pages.plots import bars, clouds, curves
from pvae.analysis.pages.sections.examination import Examination
from pvae.analysis.pages.sections.fit import SHOWN_NATS
from pvae.analysis.population.result import Population

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
    scored=True,
)
def anatomy(exam: Examination) -> Iterator[Part]:
    """Yield waterfall chart and table of the ELBO surgery; nothing for a model without a likelihood."""
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
    if s.population is not None:
        figure = s.population.interval.replace(" to ", "–").replace("at least", "≥")
        yield Tile("better prior, new data", figure, "nats that it wins with this encoder")
        if len(s.population.sizes) > 1:
            yield _law(s.population)
    elif s.marginal_kl is not None:
        yield Tile("marginal KL", nats(s.marginal_kl), f"nats, on these {s.n} rows alone")
    yield from on_prior(s)
    surgeries = {split: {**found.to_dict(), "rows": exam.rows[split].note} for split, found in exam.surgeries.items()}
    yield {"surgery": surgeries}


def on_prior(s: Surgery) -> Iterator[str]:
    """Yield sentences on what a better prior wins: on new data, an interval; on these rows, the marginal KL."""
    if any("deterministic code" in note for note in s.notes):
        yield "The code is deterministic: I_q[x, z] equals log n, and the marginal KL is not defined."
        return
    if s.population is not None or s.marginal_kl is None or s.marginal_kl.value >= SHOWN_NATS:
        yield from (typeset(text) for text in (s.headline(), *s.on_new_data))
    else:
        yield f"The marginal KL on these {s.n} rows is below 0.01 nats: on them no prior would raise the ELBO."
    if s.marginal_kl is None or s.mutual_information is None:
        return
    if s.population is None and s.mutual_information.value > SATURATED * s.log_n.value:
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
    found, gaps = exam.held, bars.inference_steps(exam.held, exam.evidence)
    panels = bars.waterfall_steps(found, gaps)
    said = "; ".join(f"{step.label} {step.figure}" for steps in panels[:2] for step in steps)
    top = f"Top: from log p(x) down to the ELBO, the loss of inference ({exam.evidence_rows.note}). Below: from"
    new = (
        "The last bar is what a better prior adds to the ELBO on new data, at least and at most: if its lower end is "
        "large, try a richer prior. "
    )
    return picture(
        "waterfall",
        bars.waterfall(panels),
        f"Waterfall of the ELBO on {exam.split}: {said} nats per datum.",
        f"{top if gaps else 'From'} log p(x | z) down to the ELBO. I_q[x, z] is the information about x that the code "
        "carries; the marginal KL is the cost of a prior that differs from q_agg on these "
        f"{found.n} rows, and falls as rows are added. {new if found.population else ''}The axis does not start at 0.",
    )


def _law(found: Population) -> Picture:
    said = "; ".join(f"n = {s.n}: {nats(s.information)}" for s in found.sizes)
    return picture(
        "law_in_n",
        curves.law_in_n(found),
        f"Mutual information of n rows and their codes over n: {said} nats.",
        "I_n counts each row's own posterior among the n that form q_agg, so that it is at most log n; leave-one-out "
        "does not count it and is too large. Where the two meet they tell the information of new data. Where I_n "
        "runs along log n these rows cannot tell it, and KL − I_n only says how many rows there are. The grey band is "
        "what the bounds leave for new data.",
    )
