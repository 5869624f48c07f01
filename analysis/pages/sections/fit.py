"""How good the fit is: the ELBO, what bounds log p(x), and what keeps the two apart."""

from __future__ import annotations

import math

from pvae.analysis.bounds.gap import Gap, gap
from pvae.analysis.bounds.lower_bounds import Evidence
from pvae.analysis.pages import plots
from pvae.analysis.pages.document.document import Block, Note, Section, Sentence, Tile, nats, picture, table_of
from pvae.analysis.pages.sections.examination import Case

GAP_NATS = 1.0
"""Train minus test ELBO above which the report speaks of overfitting."""
WORTH = 0.1
"""Nats by which one gap must exceed the other before it is worth advice."""
NOTHING = 1e-6
"""Nats up to which importance sampling found nothing: its weights are all alike."""
REFINED_ROWS = 50
"""Rows whose posterior is refined, datum by datum."""


def section(case: Case) -> Section | None:
    """ELBO, evidence and gaps; None of a model without a likelihood."""
    if case.implicit:
        return None
    bound, blocks = case.evidence, []
    said = [_on_elbo(case), _on_evidence(case, bound)]
    tiles = [Tile("ELBO", nats(case.held.elbo), f"nats per datum, {case.split}")]
    if bound is not None:
        tiles.append(Tile("log p(x) − ELBO", nats(bound.gap), f"nats or more, {bound.n} rows"))
        blocks += _of_bound(case, bound)
    found = _gaps(case)
    if found is not None:
        blocks.append(table_of("gaps", found, f"{case.split}, {found.n} rows: {found.title}"))
        blocks += [Note(text) for text in found.remarks]
        said.append(_on_gaps(case, found))
    if case.gap is not None:
        tiles.append(Tile(f"train − {case.split}", nats(case.gap), "nats of ELBO"))
        said.append(_on_overfitting(case, case.gap))
    lead = (
        "The ELBO bounds log p(x) from below. Importance sampling tightens the bound with the number of samples; what "
        "it finds above the ELBO is a lower bound of KL(q(z | x) ‖ p(z | x)): nats that a better guide would win."
    )
    numbers = {
        "train_gap": case.gap,
        "evidence": None if bound is None else {**bound.to_dict(), "rows": case.evidence_rows.note},
        "gap": None if found is None else found.to_dict(),
    }
    return Section("fit", "Fit", tuple(blocks), lead, tuple(said), tuple(tiles), numbers)


def _of_bound(case: Case, bound: Evidence) -> list[Block]:
    note = (
        f"Effective samples per datum: median {bound.ess.median():.0f}, least {bound.ess.min():.1f} of "
        f"{bound.samples}. Few effective samples mean a loose bound: ask for more (pvae evidence RUN --samples)."
    )
    caption = f"{case.split}, {case.evidence_rows.note}, {bound.samples} samples per datum"
    table = table_of("evidence", bound, caption)
    if len(bound.curve) < 2 or bound.gap < NOTHING:
        return [table]
    last = bound.curve[-1][1]
    chart = picture(
        "importance_samples",
        plots.importance(bound),
        f"The bound on log p(x) over the number of importance samples, from {nats(bound.elbo)} to {nats(last)} nats.",
        "The bound rises with the number of samples and never passes log p(x). Look at its right end: where it still "
        "climbs, log p(x) is further up than any figure here says.",
    )
    return [chart, table, Note(note)]


def _gaps(case: Case) -> Gap | None:
    if case.evidence is None or case.evidence.exact is not None or not case.gap_steps:
        return None
    rows = case.some(case.split, REFINED_ROWS)
    samples = 4 * case.evidence_samples
    return case.attempt(
        "gaps", lambda: gap(case.pair, rows.x, steps=case.gap_steps, evidence_samples=samples, seed=case.seed)
    )


def _on_elbo(case: Case) -> Sentence:
    s = case.held
    shared = "" if s.global_kl is None else f", less {nats(s.global_kl)} for global latents, shared by these rows"
    return Sentence(
        f"On {case.split} ({case.rows[case.split].note}) the ELBO is {nats(s.elbo)} nats per datum: "
        f"{nats(s.reconstruction)} for the reconstruction, less {nats(s.kl)} that the code costs{shared}."
    )


def _on_evidence(case: Case, e: Evidence | None) -> Sentence:
    if e is None:
        return Sentence(f"Nothing here bounds log p(x). {case.missing['evidence']}")
    if e.exact is not None:
        return Sentence(f"log p(x) itself is {nats(e.exact)} nats: no other guide could be tighter.")
    if e.gap < NOTHING:
        return Sentence(
            f"log p(x) is at least {nats(e.iwae)} nats. Importance sampling finds nothing above the ELBO: all of its "
            f"weights are alike, as where codes are known for certain."
        )
    where = "" if e.n == case.evidence_rows.of else f"On {case.evidence_rows.note}, "
    return Sentence(
        f"{where}log p(x) is at least {nats(e.iwae)} nats and the ELBO {nats(e.elbo)}: a better guide would win "
        f"{nats(e.gap)} nats or more without touching the model."
    )


def _on_gaps(case: Case, found: Gap) -> Sentence:
    a, b = found.approximation, found.amortisation
    text = (
        f"Of what the guide loses, {nats(a)} nats are the family's (approximation) and {nats(b)} the network's "
        f"(amortisation; {found.n} rows)"
    )
    error = math.hypot(a.standard_error, b.standard_error)
    if not abs(a.value - b.value) > max(2 * error, WORTH):
        return Sentence(f"{text}.")
    if a.value < b.value:
        return Sentence(f"{text}: the encoder is what limits. Give it more units, or train longer.")
    return Sentence(f"{text}: the family is what limits.{richer(case)}")


def richer(case: Case) -> str:
    """Which posteriors would be richer than those declared; nothing where there are none."""
    latents = getattr(case.run.plan, "latents", {})
    used = {getattr(latent.posterior, "kind", "") for latent in latents.values()}
    left = [kind for kind in ("full_rank_normal", "flow") if kind not in used]
    return f" Try posterior.kind = {' or '.join(left)}." if left and latents else ""


def _on_overfitting(case: Case, difference: float) -> Sentence:
    errors = [case.surgeries[split].elbo.data_error for split in ("train", case.split)]
    known = [error for error in errors if error is not None and math.isfinite(error)]
    error = math.hypot(*known) if len(known) == len(errors) else math.nan
    spread = f" (± {nats(error)} from the choice of rows)" if math.isfinite(error) else ""
    if difference < 0:
        return Sentence(f"Train stands {nats(-difference)} nats below {case.split}{spread}: no sign of overfitting.")
    text = f"Train stands {nats(difference)} nats above {case.split}{spread}."
    if math.isfinite(error) and difference > max(GAP_NATS, 2 * error):
        return Sentence(f"{text} The model overfits: set train.patience, use smaller networks, or more data.", True)
    return Sentence(text)
