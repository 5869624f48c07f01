"""Section on the fit: ELBO, importance-weighted bounds on log p(x), inference gaps and overfitting gap."""

from __future__ import annotations

import math

from pvae.analysis.bounds.gap import Gap, gap
from pvae.analysis.bounds.lower_bounds import Evidence
from pvae.analysis.pages import plots
from pvae.analysis.pages.document.blocks import Block, Note, PageSection, Sentence, Tile, picture
from pvae.analysis.pages.document.tables import table_of
from pvae.analysis.pages.document.text import nats
from pvae.analysis.pages.sections.examination import Examination

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
LESS_OVERFITTING = "set train.patience, use smaller networks, or more data."


def section(exam: Examination) -> PageSection | None:
    """Return the section on ELBO, bounds on log p(x) and inference gaps; None for a model without a likelihood."""
    if exam.implicit:
        return None
    bound, blocks = exam.evidence, []
    said = [*_on_elbo(exam), *_on_evidence(exam, bound)]
    tiles = [Tile(exam.held.total_name, nats(exam.held.total), f"nats per datum, {exam.split}")]
    if bound is not None:
        tiles.append(Tile("log p(x) − ELBO", nats(bound.gap), f"nats or more, {bound.n} rows"))
        blocks += _of_bound(exam, bound)
    found = _gaps(exam)
    if found is not None:
        blocks.append(table_of("gaps", found, f"{exam.split}, {found.n} rows: {found.title}"))
        blocks += [Note(text) for text in found.remarks]
        said += _on_gaps(exam, found)
    if exam.gap is not None:
        tiles.append(Tile("overfitting gap", nats(exam.gap), f"nats, train ELBO − {exam.split} ELBO"))
        said.append(_on_overfitting(exam, exam.gap))
    lead = (
        "The ELBO is a lower bound on log p(x). Importance sampling tightens the bound as the number of samples grows. "
        "The gain over the ELBO is a lower bound on KL(q(z | x) ‖ p(z | x)), the nats that a better guide would add."
    )
    numbers = {
        "train_gap": exam.gap,
        "evidence": None if bound is None else {**bound.to_dict(), "rows": exam.evidence_rows.note},
        "gap": None if found is None else found.to_dict(),
    }
    return PageSection("fit", "Fit", tuple(blocks), lead, tuple(said), tuple(tiles), numbers)


def _of_bound(exam: Examination, bound: Evidence) -> list[Block]:
    note = (
        f"Effective samples per datum: median {bound.ess.median():.0f}, least {bound.ess.min():.1f} of "
        f"{bound.samples}. Few effective samples mean a loose bound: take more (pvae evidence RUN --samples)."
    )
    caption = f"{exam.split}, {exam.evidence_rows.note}, {bound.samples} samples per datum"
    table = table_of("evidence", bound, caption)
    if len(bound.curve) < 2 or bound.gap < NO_GAIN_NATS:
        return [table]
    last = bound.curve[-1][1]
    chart = picture(
        "importance_samples",
        plots.importance(bound),
        f"The bound on log p(x) over the number of importance samples, from {nats(bound.elbo)} to {nats(last)} nats.",
        "The bound rises with the number of samples and never exceeds log p(x). If it still rises at the right end, "
        "log p(x) is higher than every figure here.",
    )
    return [chart, table, Note(note)]


def _gaps(exam: Examination) -> Gap | None:
    if exam.evidence is None or exam.evidence.exact is not None or not exam.gap_steps:
        return None
    x, told = exam.some(exam.split, REFINED_ROWS).x, exam.stages.part("inference gap")
    settings = {"steps": exam.gap_steps, "evidence_samples": 4 * exam.evidence_samples, "seed": exam.seed}
    return exam.attempt("gaps", lambda: gap(exam.pair, x, **settings, on_progress=told))


def _on_elbo(exam: Examination) -> list[Sentence]:
    s = exam.held
    said = [
        f"The {exam.split} {s.total_name} is {nats(s.total)} nats per datum ({exam.rows[exam.split].note}).",
        f"Its reconstruction term is {nats(s.reconstruction)} nats"
        + (f", its KL term {nats(s.kl)} nats per datum." if abs(s.kl.value) >= SHOWN_NATS else " per datum."),
    ]
    if s.global_kl is not None:
        said.append(f"Global latents cost a further {nats(s.global_kl)} nats per datum, spread over these rows.")
    return [Sentence(text) for text in said]


def _on_evidence(exam: Examination, e: Evidence | None) -> list[Sentence]:
    if e is None:
        return [Sentence(f"log p(x) has no bound here. {exam.missing['evidence']}")]
    if e.exact is not None:
        return [Sentence(f"log p(x) is {nats(e.exact)} nats per datum (exact). No other guide gives a tighter bound.")]
    if e.gap < NO_GAIN_NATS:
        return [
            Sentence(f"log p(x) is at least {nats(e.iwae)} nats per datum."),
            Sentence("Importance sampling does not raise the ELBO: all weights are equal, as for deterministic codes."),
        ]
    where = "" if e.n == exam.evidence_rows.of else f" ({exam.evidence_rows.note}; their ELBO is {nats(e.elbo)} nats)"
    said = [Sentence(f"log p(x) is at least {nats(e.iwae)} nats per datum{where}.")]
    if e.gap >= SHOWN_NATS:
        said.append(Sentence(f"A better guide would raise the ELBO by at least {nats(e.gap)} nats for the same model."))
    return said


def _on_gaps(exam: Examination, found: Gap) -> list[Sentence]:
    a, b = found.approximation, found.amortisation
    parts = (("approximation gap (posterior family)", a), ("amortisation gap (encoder)", b))
    told = [f"the {name} is {nats(e)} nats" for name, e in parts if e.value >= SHOWN_NATS]
    said = [Sentence(f"On {found.n} refined rows {' and '.join(told)}.")] if told else []
    if not abs(a.value - b.value) > max(2 * math.hypot(a.standard_error, b.standard_error), ADVICE_NATS):
        return said
    if a.value < b.value:
        return [*said, Sentence("The encoder limits the ELBO most: give it more units, or train longer.")]
    return [*said, Sentence(f"The posterior family limits the ELBO most.{richer(exam)}")]


def richer(exam: Examination) -> str:
    """Return a sentence that names richer posterior families not used by the run; empty text if there are none."""
    latents = getattr(exam.run.plan, "latents", {})
    used = {getattr(latent.posterior, "kind", "") for latent in latents.values()}
    left = [kind for kind in ("full_rank_normal", "flow") if kind not in used]
    return f" Try posterior.kind = {' or '.join(left)}." if left and latents else ""


def _on_overfitting(exam: Examination, difference: float) -> Sentence:
    errors = [exam.surgeries[split].total.data_error for split in ("train", exam.split)]
    known = [error for error in errors if error is not None and math.isfinite(error)]
    error = math.hypot(*known) if len(known) == len(errors) else math.nan
    spread = f", ± {nats(error)} from the choice of rows" if math.isfinite(error) else ""
    if abs(difference) < SHOWN_NATS:
        return Sentence(f"The train and {exam.split} ELBO agree to 0.01 nats{spread}: no sign of overfitting.")
    if difference < 0:
        text = f"The train ELBO is {nats(-difference)} nats lower than the {exam.split} ELBO"
        return Sentence(f"{text}{spread}: no sign of overfitting.")
    text = f"The train ELBO is {nats(difference)} nats higher than the {exam.split} ELBO (overfitting gap{spread})."
    if math.isfinite(error) and difference > max(OVERFITTING_NATS, 2 * error):
        return Sentence(f"{text} The model overfits: {LESS_OVERFITTING}", True)
    return Sentence(text)
