"""Samples beside data, as figures."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from pvae.analysis.pages.document.document import (
    Block,
    Column,
    Note,
    Section,
    Sentence,
    Table,
    Tile,
    nats,
    percent,
    side_by_side,
)
from pvae.analysis.pages.sections.examination import Case
from pvae.analysis.samples.quality import SampleQuality, sample_quality

ALIKE = 0.05
"""A p-value above which samples cannot be told from data."""
MISSED = 0.5
"""Share of the coverage that samples of the data's law have, below which data are missed."""


def section(case: Case) -> Section | None:
    """Two-sample test, distances in a feature space, coverage, sharpness; None of what cannot be drawn from."""
    found = measure(case)
    if not found:
        return None
    first = next(iter(found.values()))
    blocks: list[Block] = [_table(found), *(Note(text) for text in first.remarks)]
    fidelity = first.fidelity
    if fidelity.shares:
        rows = tuple((name, share, fidelity.data_shares[name]) for name, share in fidelity.shares.items())
        columns = (Column("label"), Column("samples"), Column("data"))
        caption = "Share of each label, as a classifier of the data names it"
        blocks.append(Table("labels_of_samples", caption, columns, rows, folded=len(rows) > 10))
    tiles = (
        Tile("told apart", f"{first.test.accuracy.value:.2f}", "of draws and data; 0.50 is the aim"),
        Tile(
            "Fréchet distance", nats(first.distances.frechet), f"{nats(first.distances.frechet_floor)} among data alone"
        ),
        Tile(
            "coverage", percent(fidelity.coverage.value), f"of data; {percent(fidelity.expected_coverage)} is the aim"
        ),
    )
    lead = (
        "Samples beside data: can a classifier tell samples from data, how far apart do they "
        "lie in a space of features, and what of the data is never drawn? None of it says how probable a datum is."
    )
    numbers = {"sample_quality": {name: quality.to_dict() for name, quality in found.items()}}
    said = (_on_test(case, first), *_on_fidelity(case, first))
    return Section("quality", "Sample quality", tuple(blocks), lead, said, tiles, numbers)


def measure(case: Case, wanted: Collection[str] = ("draws", "means")) -> dict[str, SampleQuality]:
    """Of draws of the model and, where data are not binary, of means of p(x | z), as is the custom."""
    kinds = {"draws": case.draws}
    if case.sampled is not None and case.sampled.is_mean and not case.binary:
        kinds["means"] = case.sampled
    found = {}
    for name, drawn in kinds.items():
        if name not in wanted or drawn is None or case.space is None:
            continue
        quality = case.attempt(
            f"sample quality of {name}",
            partial(sample_quality, case.run, case.split, len(drawn.x), case.seed, space=case.space, fake=drawn),
        )
        if quality is not None:
            found[name] = quality
    return found


def _table(found: Mapping[str, SampleQuality]) -> Table:
    titles = (Column("figure"), *(Column(name, 4) for name in found), Column("what it is", is_text=True))
    title = next(iter(found.values())).title
    return Table("sample_quality", f"{title}; shares, and distances", titles, whole(found))


def whole(found: Mapping[str, SampleQuality]) -> list[tuple[Any, ...]]:
    """The figures side by side, without those of single labels, which have a table of their own."""
    return [row for row in side_by_side(found) if not row[0].startswith("share/")]


def _on_test(case: Case, quality: SampleQuality) -> Sentence:
    accuracy, p = quality.test.accuracy, quality.test.p_value.value
    text = f"A classifier tells samples from data of {case.split} in {percent(accuracy.value)} of cases"
    if p > ALIKE:
        return Sentence(f"{text}, no better than chance would (p = {p:.2g}; {quality.test.held} of each kind).")
    return Sentence(f"{text}; of samples of the data's own law it would in 50 % (p = {p:.2g}).")


def _on_fidelity(case: Case, quality: SampleQuality) -> list[Sentence]:
    f = quality.fidelity
    expected = f.expected_coverage
    sentences = [
        Sentence(
            f"{percent(f.precision.value)} of the samples look like data, {percent(f.recall.value)} of the data could "
            f"have been drawn, and {percent(f.coverage.value)} have a sample near ({percent(expected)} would with "
            f"samples of the data's own law)."
        )
    ]
    if f.coverage.value < MISSED * expected:
        knob = (
            "Raise objective.r1, or train longer with a lower rate."
            if case.implicit
            else "Fit a richer prior (pvae refit), or train longer; draws of a noisy likelihood are far from data, too."
        )
        sentences.append(Sentence(f"Most data have no sample near. {knob}", True))
    if f.confidence is not None and f.data_confidence is not None:
        there = [name for name in f.shares if f.data_shares[name].value > 0]
        least = min(there, key=lambda name: f.shares[name].value)
        sentences.append(
            Sentence(
                f"A classifier of the data is {percent(f.confidence.value / f.data_confidence.value)} as sure of the "
                f"samples as of data; it finds least of {least}, {percent(f.shares[least].value)}."
            )
        )
    return sentences
