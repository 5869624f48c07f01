"""Sections on the fit (ELBO, bounds on log p(x), inference gaps, overfitting) and on the guide (k-hat, calibration)."""

import math
from collections.abc import Iterator

import numpy as np

from pvae.analysis.bounds import calibration as calibrate
from pvae.analysis.bounds.gap import Gap, gap
from pvae.analysis.bounds.lower_bounds import Evidence
from pvae.analysis.pages.document.blocks import Note, PageColumn, PageTable, Part, Sentence, Tile, picture, section
from pvae.analysis.pages.document.text import nats, percent, table_of
from pvae.analysis.pages.plots import bars, curves, pictures
from pvae.analysis.pages.plots.base import array
from pvae.analysis.pages.sections.examination import Examination
from pvae.analysis.samples.features import is_image

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
UNRELIABLE = 0.1
"""Proportion of data with k-hat above its limit beyond which the report gives an alert."""
SIMULATED_ROWS, IMPORTANCE = 500, 4
"""Number of rows on which the guide is calibrated, and of samples from which each weighted one is chosen."""
WORST_DATA = 10
"""Number of data with the largest k-hat that the report shows."""


# ---------------------------------------------------------------------- fit


@section(
    "fit",
    "Fit",
    "The ELBO is a lower bound on log p(x). Importance sampling tightens the bound as the number of samples grows. "
    "The gain over the ELBO is a lower bound on KL(q(z | x) ‖ p(z | x)), the nats that a better guide would add.",
    scored=True,
)
def fit(exam: Examination) -> Iterator[Part]:
    """Yield ELBO, bounds on log p(x) and inference gaps; nothing for a model without a likelihood."""
    bound = exam.evidence
    yield from _on_elbo(exam)
    yield from _on_evidence(exam, bound)
    yield Tile(exam.held.total_name, nats(exam.held.total), f"nats per datum, {exam.split}")
    if bound is not None:
        yield Tile("log p(x) − ELBO", nats(bound.gap), f"nats or more, {bound.n} rows")
        yield from _of_bound(exam, bound)
    if (found := _gaps(exam)) is not None:
        yield table_of("gaps", found, f"{exam.split}, {found.n} rows: {found.title}")
        yield from (Note(text) for text in found.remarks)
        yield from _on_gaps(exam, found)
    if exam.gap is not None:
        yield Tile("overfitting gap", nats(exam.gap), f"nats, train ELBO − {exam.split} ELBO")
        yield _on_overfitting(exam, exam.gap)
    yield {
        "train_gap": exam.gap,
        "evidence": None if bound is None else {**bound.to_dict(), "rows": exam.evidence_rows.note},
        "gap": None if found is None else found.to_dict(),
    }


def _of_bound(exam: Examination, bound: Evidence) -> Iterator[Part]:
    caption = f"{exam.split}, {exam.evidence_rows.note}, {bound.samples} samples per datum"
    table = table_of("evidence", bound, caption)
    if len(bound.curve) < 2 or bound.gap < NO_GAIN_NATS:
        yield table
        return
    last = bound.curve[-1][1]
    yield picture(
        "importance_samples",
        curves.importance(bound),
        f"The bound on log p(x) over the number of importance samples, from {nats(bound.elbo)} to {nats(last)} nats.",
        "The bound rises with the number of samples and never exceeds log p(x). If it still rises at the right end, "
        "log p(x) is higher than every figure here.",
    )
    yield table
    yield Note(
        f"Effective samples per datum: median {bound.ess.median():.0f}, least {bound.ess.min():.1f} of "
        f"{bound.samples}. Few effective samples mean a loose bound: take more (pvae evidence RUN --samples)."
    )


def _gaps(exam: Examination) -> Gap | None:
    if exam.evidence is None or exam.evidence.exact is not None or not exam.gap_steps:
        return None
    x = exam.some(exam.split, REFINED_ROWS).x
    settings = {"steps": exam.gap_steps, "evidence_samples": 4 * exam.evidence_samples, "seed": exam.seed}
    return exam.attempt("gaps", gap, exam.pair, x, **settings, part="inference gap")


def _on_elbo(exam: Examination) -> Iterator[str]:
    s = exam.held
    yield f"The {exam.split} {s.total_name} is {nats(s.total)} nats per datum ({exam.rows[exam.split].note})."
    kl = f", its KL term {nats(s.kl)} nats per datum." if abs(s.kl.value) >= SHOWN_NATS else " per datum."
    yield f"Its reconstruction term is {nats(s.reconstruction)} nats{kl}"
    if s.global_kl is not None:
        yield f"Global latents cost a further {nats(s.global_kl)} nats per datum, spread over these rows."


def _on_evidence(exam: Examination, e: Evidence | None) -> Iterator[str]:
    if e is None:
        yield f"log p(x) has no bound here. {exam.missing['evidence']}"
    elif e.exact is not None:
        yield f"log p(x) is {nats(e.exact)} nats per datum (exact). No other guide gives a tighter bound."
    elif e.gap < NO_GAIN_NATS:
        yield f"log p(x) is at least {nats(e.iwae)} nats per datum."
        yield "Importance sampling does not raise the ELBO: all weights are equal, as for deterministic codes."
    else:
        rows = exam.evidence_rows
        where = "" if e.n == rows.of else f" ({rows.note}; their ELBO is {nats(e.elbo)} nats)"
        yield f"log p(x) is at least {nats(e.iwae)} nats per datum{where}."
        if e.gap >= SHOWN_NATS:
            yield f"A better guide would raise the ELBO by at least {nats(e.gap)} nats for the same model."


def _on_gaps(exam: Examination, found: Gap) -> Iterator[str]:
    a, b = found.approximation, found.amortisation
    parts = (("approximation gap (posterior family)", a), ("amortisation gap (encoder)", b))
    if told := [f"the {name} is {nats(e)} nats" for name, e in parts if e.value >= SHOWN_NATS]:
        yield f"On {found.n} refined rows {' and '.join(told)}."
    if abs(a.value - b.value) > max(2 * math.hypot(a.standard_error, b.standard_error), ADVICE_NATS):
        if a.value < b.value:
            yield "The encoder limits the ELBO most: give it more units, or train longer."
        else:
            yield f"The posterior family limits the ELBO most.{_richer(exam)}"


def _richer(exam: Examination) -> str:
    """Return a sentence that names richer posterior families not used by the run; empty text if there are none."""
    latents = getattr(exam.run.plan, "latents", {})
    used = {getattr(latent.posterior, "kind", "") for latent in latents.values()}
    left = [kind for kind in ("full_rank_normal", "flow") if kind not in used]
    return f" Try posterior.kind = {' or '.join(left)}." if left and latents else ""


def _on_overfitting(exam: Examination, difference: float) -> Sentence:
    errors = [exam.surgeries[split].total.data_error for split in ("train", exam.split)]
    error = math.hypot(*(math.nan if e is None or not math.isfinite(e) else e for e in errors))
    spread = f", ± {nats(error)} from the choice of rows" if math.isfinite(error) else ""
    if abs(difference) < SHOWN_NATS:
        return Sentence(f"The train and {exam.split} ELBO agree to 0.01 nats{spread}: no sign of overfitting.")
    text = f"The train ELBO is {nats(abs(difference))} nats {'lower' if difference < 0 else 'higher'} than the"
    if difference < 0:
        return Sentence(f"{text} {exam.split} ELBO{spread}: no sign of overfitting.")
    overfits = math.isfinite(error) and difference > max(OVERFITTING_NATS, 2 * error)
    advice = f" The model overfits: {LESS_OVERFITTING}" if overfits else ""
    return Sentence(f"{text} {exam.split} ELBO (overfitting gap{spread}).{advice}", overfits)


# ---------------------------------------------------------------------- guide


@section(
    "guide",
    "Guide quality",
    "Importance weights p(x, z) / q(z | x) show, datum by datum, whether q(z | x) covers the posterior.",
    scored=True,
)
def guide(exam: Examination) -> Iterator[Part]:
    """Yield the histogram of k-hat, and the data with the largest k-hat.

    Nothing without importance weights, if log p(x) is exact, or if no k-hat is finite.
    """
    bound = exam.evidence
    if bound is None or bound.exact is not None or not bool(bound.khat.isfinite().any()):
        return
    khat, rows = array(bound.khat), exam.evidence_rows
    order = np.argsort(-np.where(np.isfinite(khat), khat, -np.inf), kind="stable")[:WORST_DATA]
    yield picture(
        "khat",
        curves.khats(khat, bound.khat_limit),
        f"Histogram of k-hat over {bound.n} data; {percent(bound.khat_share)} above {bound.khat_limit:.2f}.",
        "k-hat measures how heavy the tail of a datum's importance weights is. To the right of the dashed line the "
        "guide is too narrow or misplaced: there the bound on log p(x) is loose and its standard error too small.",
    )
    if is_image(exam.shape):
        data = array(exam.part.observed(rows.x[order.tolist()]))
        yield picture(
            "worst_inferred",
            pictures.gallery(data[None], *exam.scale_of_grey, column_names=[f"{khat[i]:.2f}" for i in order]),
            f"The {len(order)} data with the largest k-hat.",
            "The data whose posterior is hardest for the guide, with their k-hat. Look for a common kind: rare data, "
            "doubtful labels, or details that the decoder cannot produce.",
        )
    effective = f"effective samples of {bound.samples}"
    yield PageTable(
        "worst_inferred",
        f"Data of {exam.split} with the largest k-hat ({rows.note}): row of the split, k-hat, effective samples, nats",
        (PageColumn("row"), PageColumn("k-hat", 2), PageColumn(effective, 1), PageColumn("log p(x)")),
        [(str(int(rows.chosen[i])), float(khat[i]), float(bound.ess[i]), float(bound.log_p[i])) for i in order],
    )
    yield Tile("k-hat above limit", percent(bound.khat_share), f"of {bound.n} data, limit {bound.khat_limit:.2f}")
    yield _on_khat(exam, bound)


def _on_khat(exam: Examination, bound: Evidence) -> Sentence:
    share, limit = percent(bound.khat_share), f"{bound.khat_limit:.2f}"
    if bound.khat_share > UNRELIABLE:
        return Sentence(
            f"k-hat exceeds its limit of {limit} on {share} of data points: there the guide is too narrow, and "
            f"log p(x) may be nats above its bound of {nats(bound.iwae)}.{_richer(exam)} Training with "
            "objective.kind = iwae also widens the guide; more samples tighten the bound alone.",
            True,
        )
    if not bound.khat_share > 0:
        return Sentence(f"Importance sampling is reliable: k-hat is within its limit of {limit} on every data point.")
    return Sentence(f"Importance sampling is reliable: k-hat exceeds its limit of {limit} on only {share} of data.")


# ---------------------------------------------------------------------- calibration


@section(
    "calibration",
    "Calibration of the guide",
    "Latents z of the prior make data x of the model. If q(z | x) is the posterior of the model, the rank of z among "
    "samples of q(z | x) is uniform in every coordinate, and a region to which q gives 90 % holds z in 90 % of rows.",
    scored=True,
)
def calibration(exam: Examination) -> Iterator[Part]:
    """Yield ranks and coverage of the guide on simulated data; nothing where they are not defined."""
    given = {"importance": IMPORTANCE, "x": exam.rows["train"].x, "seed": exam.seed}
    found = exam.attempt("calibration", calibrate.calibration, exam.pair, SIMULATED_ROWS, **given, part="calibration")
    if found is None:
        return
    said, notes = found.sentences[:-1], found.remarks[len(found.sentences) - 1 :]
    yield picture(
        "calibration",
        bars.calibrated(found),
        f"Histograms of the ranks of {min(len(found.worst), bars.HISTOGRAMS)} coordinates, and coverage. {said[0]}",
        "Ranks of the coordinates with the smallest p-values, relative to uniform ones: high at both ends where q is "
        "too narrow, high in the middle where it is too wide, sloping where it is shifted. Grey: 95 % of exact "
        "posteriors have all bars of a histogram inside, and each point of the coverage. A coverage below the diagonal "
        "is that of an overconfident q.",
    )
    yield table_of("calibration", found, found.title)
    yield from map(Note, notes)
    yield from said
    yield {"calibration": found.to_dict()}
