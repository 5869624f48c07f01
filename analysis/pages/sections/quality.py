"""Sections on sample quality (two-sample test, distances, coverage) and on labels predicted from codes (probe)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pvae.analysis.figures.estimate import merged
from pvae.analysis.pages.document.blocks import Note, PageColumn, PageTable, Part, Sentence, Tile, columns, section
from pvae.analysis.pages.document.text import nats, percent
from pvae.analysis.pages.sections.examination import Examination
from pvae.analysis.samples.fidelity import Fidelity
from pvae.analysis.samples.probe import RAW, Probe
from pvae.analysis.samples.probe import probe as probe_of
from pvae.analysis.samples.quality import SampleQuality, sample_quality
from pvae.analysis.samples.sample import Samples

CHANCE_P_VALUE = 0.05
"""p-value of the two-sample test above which the report calls the classifier no better than chance."""
SMALLEST_P_VALUE = 1e-4
"""Smallest p-value that is written out; smaller ones appear as p < 0.0001."""
MISSED = 0.5
"""Ratio of coverage to its expected value below which the report gives an alert."""
FOLDED_LABELS = 10
"""Largest number of labels whose table is not collapsed."""


@section(
    "quality",
    "Sample quality",
    "Samples beside data: whether a classifier can tell them apart, how far apart they lie in a space of features, and "
    "which data are never generated. None of these figures measures log p(x).",
)
def quality(exam: Examination) -> Iterator[Part]:
    """Yield the quality of samples; nothing if the model cannot be sampled."""
    kinds = {"draws": exam.draws}
    if exam.sampled is not None and exam.sampled.is_mean and not exam.binary:
        kinds["means"] = exam.sampled
    found = {kind: got for kind, drawn in kinds.items() if (got := measure(exam, kind, drawn)) is not None}
    if not found:
        return
    first = next(iter(found.values()))
    fidelity, distances = first.fidelity, first.distances
    titles = (*columns("figure", *found, digits=4), PageColumn("what it is", is_text=True))
    yield PageTable("sample_quality", f"{first.title}; proportions and distances", titles, whole(found))
    yield from (Note(text) for text in first.remarks)
    if fidelity.shares:
        rows = tuple((name, share, fidelity.data_shares[name]) for name, share in fidelity.shares.items())
        caption = "Proportion of each label, as predicted by a classifier of the data"
        titles = columns("label", "samples", "data")
        yield PageTable("labels_of_samples", caption, titles, rows, folded=len(rows) > FOLDED_LABELS)
    yield Tile("two-sample accuracy", f"{first.test.accuracy.value:.2f}", "of samples and data; 0.50 is the aim")
    yield Tile("Fréchet distance", nats(distances.frechet), f"{nats(distances.frechet_floor)} among data alone")
    expected = percent(fidelity.expected_coverage)
    yield Tile("coverage", percent(fidelity.coverage.value), f"of data; {expected} expected")
    yield _on_test(exam, first)
    yield from _on_fidelity(exam, fidelity)
    yield {"sample_quality": {name: quality.to_dict() for name, quality in found.items()}}


def measure(exam: Examination, kind: str, drawn: Samples | None) -> SampleQuality | None:
    """Return the quality of samples of the model (`draws`) or of means of p(x | z) (`means`); None on failure."""
    if drawn is None or exam.space is None:
        return None
    given = exam.run, exam.split, len(drawn.x), exam.seed
    what, part = f"sample quality of {kind}", "sample quality"
    return exam.attempt(what, sample_quality, *given, space=exam.space, fake=drawn, part=part)


def whole(found: Mapping[str, SampleQuality]) -> list[tuple[Any, ...]]:
    """Return table rows that compare several sample qualities, without the proportions of single labels."""
    return [row for row in merged(found) if not row[0].startswith("share/")]


def _on_test(exam: Examination, quality: SampleQuality) -> str:
    accuracy, p = percent(quality.test.accuracy.value), quality.test.p_value.value
    text = f"The classifier two-sample test accuracy between samples and {exam.split} data is {accuracy}"
    if p > CHANCE_P_VALUE:
        return f"{text}, not better than chance (p = {p:.2g}, {quality.test.held} rows of each kind)."
    known = f"p = {p:.2g}" if p >= SMALLEST_P_VALUE else f"p < {SMALLEST_P_VALUE:g}"
    return f"{text} ({known}; 50 % expected for samples of the data distribution)."


def _on_fidelity(exam: Examination, f: Fidelity) -> Iterator[Part]:
    expected = percent(f.expected_coverage)
    told = (
        (f.precision.value, "of samples lie near data (precision)."),
        (f.recall.value, "of data lie near samples (recall)."),
        (f.coverage.value, f"of data have a sample among their nearest neighbours (coverage; {expected} expected)."),
    )
    yield from (f"{percent(value)} {what}" for value, what in told if value > 0)
    if f.coverage.value < MISSED * f.expected_coverage:
        knob = (
            "Raise objective.r1, or train longer with a lower rate."
            if exam.implicit
            else "Fit a richer prior (pvae refit), or train longer. Noise of the likelihood also moves samples away."
        )
        yield Sentence(f"Most data have no sample near them. {knob}", True)
    if f.confidence is not None and f.data_confidence is not None:
        there = [name for name in f.shares if f.data_shares[name].value > 0]
        least = min(there, key=lambda name: f.shares[name].value)
        sure = percent(f.confidence.value / f.data_confidence.value)
        yield f"A classifier of the data is {sure} as confident on samples as on data."
        if not f.shares[least].value > 0:
            yield f"No sample is classified as {least}."
        else:
            rarest, of_data = percent(f.shares[least].value), percent(f.data_shares[least].value)
            yield f"The least frequent label among samples is {least} ({rarest}, against {of_data} of data)."


# ---------------------------------------------------------------------- probe


@section(
    "probe",
    "Downstream probe",
    "Two classifiers predict the label from the code, k nearest neighbours and logistic regression. Beside them stand "
    "the same classifiers of x itself.",
)
def probe(exam: Examination) -> Iterator[Part]:
    """Yield the accuracy of k-NN and logistic regression on codes; nothing without labels or codes."""
    if exam.implicit or exam.part.y is None or exam.data.train.y is None:
        return
    found = exam.attempt("probe", probe_of, exam.run, exam.split, seed=exam.seed, part="classifiers")
    if found is None:
        return
    rows = [(r.of, r.knn, r.knn_gain, r.linear, r.linear_gain) for r in found.readings]
    yield PageTable(
        "probe",
        f"{found.title}: accuracies ± standard error; predicting the most frequent label is right in "
        f"{percent(found.majority.value)}",
        columns("classifier of", "k-NN", "k-NN − that of x", "linear", "linear − that of x"),
        (*rows, ("most frequent label", found.majority, None, None, None)),
    )
    yield from _on_probe(found)
    yield {"probe": found.to_dict()}


def _on_probe(found: Probe) -> Iterator[str]:
    best, raw = max((r for r in found.readings if r.of != RAW), key=lambda r: r.linear.value), found[RAW]
    pairs = (("Logistic regression", best.linear, raw.linear), ("A k-NN classifier", best.knn, raw.knn))
    for name, of_code, of_x in pairs:
        accuracy = f"{percent(of_code.value)} accuracy ({percent(of_x.value)} from x itself)"
        yield f"{name} predicts the label from {best.of} with {accuracy}."
