"""What simple readers make of the codes."""

from __future__ import annotations

from pvae.analysis.pages.document.document import Column, Section, Sentence, Table, percent
from pvae.analysis.pages.sections.examination import Case
from pvae.analysis.samples.probe import RAW, Probe, probe


def section(case: Case) -> Section | None:
    """Accuracy of k-NN and of a linear reader; None without labels, or without codes."""
    if case.implicit or case.part.y is None or case.data.train.y is None:
        return None
    found = case.attempt("probe", lambda: probe(case.run, case.split, seed=case.seed))
    if found is None:
        return None
    rows = tuple(
        (reading.of, reading.knn, reading.knn_gain, reading.linear, reading.linear_gain) for reading in found.readings
    )
    titles = ("k-NN", "k-NN, less that of x", "linear", "linear, less that of x")
    table = Table(
        "probe",
        f"{found.title}: shares ± standard error; always naming the most frequent label is right in "
        f"{percent(found.majority.value)}",
        (Column("of"), *(Column(title) for title in titles)),
        (*rows, ("most frequent label", found.majority, None, None, None)),
    )
    lead = (
        "Can the label be read off the code? Nearest neighbours ask whether codes of one label lie together, a linear "
        "reader whether a plane parts them. Beside them the same readers of x itself."
    )
    return Section("probe", "Downstream probe", (table,), lead, (_on_probe(found),), numbers={"probe": found.to_dict()})


def _on_probe(found: Probe) -> Sentence:
    best = max((r for r in found.readings if r.of != RAW), key=lambda r: r.linear.value)
    raw = found[RAW]
    return Sentence(
        f"Labels can be read off {best.of}: linear reader {percent(best.linear.value)} right, nearest neighbours "
        f"{percent(best.knn.value)} (of x itself {percent(raw.linear.value)} and {percent(raw.knn.value)})."
    )
