"""Section on the downstream probe: accuracy of simple classifiers that predict the label from the code."""

from __future__ import annotations

from functools import partial

from pvae.analysis.pages.document.blocks import PageSection, PageTable, Sentence, columns
from pvae.analysis.pages.document.text import percent
from pvae.analysis.pages.sections.examination import Examination
from pvae.analysis.samples.probe import RAW, Probe, probe


def section(exam: Examination) -> PageSection | None:
    """Return the section on the accuracy of k-NN and logistic regression on codes; None without labels or codes."""
    if exam.implicit or exam.part.y is None or exam.data.train.y is None:
        return None
    told = exam.stages.part("classifiers")
    found = exam.attempt("probe", partial(probe, exam.run, exam.split, seed=exam.seed, on_progress=told))
    if found is None:
        return None
    rows = tuple((r.of, r.knn, r.knn_gain, r.linear, r.linear_gain) for r in found.readings)
    table = PageTable(
        "probe",
        f"{found.title}: accuracies ± standard error; predicting the most frequent label is right in "
        f"{percent(found.majority.value)}",
        columns("classifier of", "k-NN", "k-NN − that of x", "linear", "linear − that of x"),
        (*rows, ("most frequent label", found.majority, None, None, None)),
    )
    lead = (
        "Two classifiers predict the label from the code, k nearest neighbours and logistic regression. Beside them "
        "stand the same classifiers of x itself."
    )
    numbers = {"probe": found.to_dict()}
    return PageSection("probe", "Downstream probe", (table,), lead, tuple(_on_probe(found)), numbers=numbers)


def _on_probe(found: Probe) -> list[Sentence]:
    best, raw = max((r for r in found.readings if r.of != RAW), key=lambda r: r.linear.value), found[RAW]
    pairs = (("Logistic regression", best.linear, raw.linear), ("A k-NN classifier", best.knn, raw.knn))
    return [
        Sentence(
            f"{name} predicts the label from {best.of} with {percent(of_code.value)} accuracy ({percent(of_x.value)} "
            "from x itself)."
        )
        for name, of_code, of_x in pairs
    ]
