"""Sections on what the model makes: samples (memorisation, quality), reconstructions, traversals, interpolations."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from pvae.analysis.aggregate.entry import quiet
from pvae.analysis.export.sites import as_value
from pvae.analysis.figures.estimate import merged
from pvae.analysis.pages.document.blocks import Note, PageTable, Part, Sentence
from pvae.analysis.pages.document.words import alert, picture, section, table, text, texts, tile
from pvae.analysis.pages.plots import base, columns, pictures
from pvae.analysis.pages.sections.examination import Examination
from pvae.analysis.samples import encode, features, running, sample
from pvae.analysis.samples.copying import Copying, copying
from pvae.analysis.samples.fidelity import Fidelity
from pvae.analysis.samples.quality import SampleQuality, sample_quality as quality_of
from pvae.analysis.samples.score import score
from pvae.analysis.samples.traversal import Interpolation, Traversal, interpolate, traverse
from pvae.util import seeds

ON_SHEET, BESIDE_NEIGHBOURS = 40, 10
"""Numbers of samples: shown in total, and shown with their nearest training data."""
SCORED_ROWS, SCORED, WORST_CELLS = 500, 50, 10
"""Numbers of rows whose cells are scored, of importance samples of each, and of cells that the report shows."""
MEMORISED = 0.6
"""Proportion of samples nearer to training than to held-out rows above which the report warns of memorisation."""


@section("samples")
def samples(exam: Examination) -> Iterator[Part]:
    """Yield samples and their nearest training rows; nothing if the model cannot be sampled."""
    if (drawn := exam.sampled) is None:
        return
    data = base.array(exam.data.train.observed(exam.rows["train"].x[:1000]))
    x = base.array(drawn.x[:ON_SHEET]).reshape(-1, *exam.shape)
    if exam.is_table and exam.draws is not None:
        yield from _columns(exam, base.array(exam.draws.x))
    else:
        yield picture("samples", pictures.samples(x, data, *exam.scale_of_grey), count=len(x), means=drawn.is_mean)
    known = {}
    for kind, some in (("means", drawn), ("draws", exam.draws)):
        if some is not None and some.is_mean == (kind == "means"):
            given: dict[str, Any] = {"samples": some, "seed": exam.seed, "part": "nearest training data"}
            if (copies := exam.attempt("copying", copying, exam.run, exam.split, **given)) is not None:
                known[kind] = copies
    yield {"copying": {kind: copies.to_dict() for kind, copies in known.items()}}
    if not known:
        return
    first = next(iter(known.values()))
    if features.is_image(exam.shape):
        train = exam.data.train
        nearest = train.observed(train.rows[first.nearest[:BESIDE_NEIGHBOURS].to(exam.x.device)])
        pairs = np.stack([x[:BESIDE_NEIGHBOURS], base.array(nearest)[: len(x)]])
        made = pictures.gallery(pairs, *exam.scale_of_grey, row_names=("sample", "nearest"))
        yield picture("samples.nearest", made, count=len(pairs[0]))
    yield _table(known)
    yield from map(Note, next(reversed(known.values())).remarks)
    yield on_copies(known)
    yield tile("samples.nearer", first=first)


def _columns(exam: Examination, made: np.ndarray) -> Iterator[Part]:
    """Yield plots of columns of data beside samples `(m, D)`: each column, their correlations, and those of counts."""
    data = base.array(exam.observed)
    tables = exam.in_units(data), exam.in_units(made)
    count = min(columns.CHARTS, total := min(columns.COMPARED, data.shape[1]))
    yield picture("samples.columns", columns.beside(*tables), count=count, total=total)
    if len(tables[0].select_dtypes("number").columns) > 1:
        yield picture("samples.correlations", columns.correlations(*tables))
    if not exam.run.transforms.columns and bool((data == np.floor(data)).all()) and data.max() > 1 and data.min() >= 0:
        yield picture("samples.counts", columns.counts(data, made))


@section("cells", scored=True, where=lambda exam: exam.is_table)
def least_probable(exam: Examination) -> Iterator[Part]:
    """Yield the least probable cells of a table, each with its column and value; nothing without densities of cells."""
    rows = exam.some(exam.split, SCORED_ROWS)
    found = exam.attempt("cells", score, exam.pair, rows.x, samples=SCORED, seed=exam.seed, part="cells")
    if found is None or found.elements is None:
        return
    values, density = exam.in_units(base.array(exam.part.observed(rows.x))), base.array(found.elements)
    order = np.argsort(np.where(np.isfinite(density), density, np.inf), axis=None, kind="stable")[:WORST_CELLS]
    places = np.transpose(np.unravel_index(order, density.shape))
    of = [(exam.name_of(rows.chosen[i]), float(density[i, j]), values.columns[j], values.iloc[i, j]) for i, j in places]
    worst = [(*cell, f"{value:.5g}" if isinstance(value, float) else str(value)) for *cell, value in of]
    yield table("cells", worst, digits=2, split=exam.split, rows=rows)
    yield {"cells": [dict(zip(("row", "log_p", "column", "value"), cell, strict=True)) for cell in worst]}


def _table(known: Mapping[str, Copying]) -> PageTable:
    """Return the table of the copying tests of samples and of means; for means, which lack noise, only `nearer`."""
    shown = []
    for term, *found, what in merged(known):
        figures = [e if kind != "means" or term == "nearer" else None for kind, e in zip(known, found, strict=True)]
        if any(e is not None for e in figures):
            shown.append((term, *figures, what))
    return table("samples.copying", shown, *known, title=next(iter(known.values())).title)


def on_copies(known: Mapping[str, Copying]) -> Sentence:
    """Return the sentence on memorisation; an alert if samples or means are closer to training than held-out rows."""
    first, last = next(iter(known.values())), known.get("draws")
    near = [copies.nearer for copies in known.values()]
    clear = any(e.value > max(MEMORISED, 0.5 + 4 * e.standard_error) for e in near)
    doubt = any(e.value > 0.5 + 2 * e.standard_error or not e.standard_error < 0.05 for e in near)
    close = False
    if last is not None:
        by_chance = (last.held_share * (1 / len(last.distance) + 1 / len(last.held_distance))) ** 0.5  # without copies
        close = last.share.value - last.held_share > max(4 * by_chance, last.held_share)
    copies = text("samples.copies", first=first, draws=last, close=close)
    if clear or close:
        return alert("samples.memorised", copies=copies)
    return Sentence(text("samples.not_memorised", copies=copies, sure=not doubt, first=first))


# ---------------------------------------------------------------------- quality

CHANCE_P_VALUE = 0.05
"""p-value of the two-sample test above which the report calls the classifier no better than chance."""
SMALLEST_P_VALUE = 1e-4
"""Smallest p-value that is written out; smaller ones appear as p < 0.0001."""
MISSED = 0.5
"""Ratio of coverage to its expected value below which the report gives an alert."""
FOLDED_LABELS = 10
"""Largest number of labels whose table is not collapsed."""


@section("quality")
def sample_quality(exam: Examination) -> Iterator[Part]:
    """Yield the quality of samples; nothing if the model cannot be sampled."""
    kinds = {"draws": exam.draws}
    if exam.sampled is not None and exam.sampled.is_mean and not exam.binary:
        kinds["means"] = exam.sampled
    if not (found := {kind: got for kind, drawn in kinds.items() if (got := measure(exam, kind, drawn)) is not None}):
        return
    first = next(iter(found.values()))
    fidelity = first.fidelity
    yield table("quality.sample_quality", whole(found), *found, digits=4, title=first.title)
    yield from map(Note, first.remarks)
    if fidelity.shares:
        rows = tuple((name, share, fidelity.data_shares[name]) for name, share in fidelity.shares.items())
        yield table("quality.labels_of_samples", rows, folded=len(rows) > FOLDED_LABELS)
    yield tile("quality.accuracy", test=first.test)
    yield tile("quality.frechet", distances=first.distances)
    yield tile("quality.covered", fidelity=fidelity)
    p = {"least": SMALLEST_P_VALUE, "chance": CHANCE_P_VALUE, "value": first.test.p_value.value}
    yield text("quality.two_sample", split=exam.split, test=first.test, p=p)
    yield from _on_fidelity(exam, fidelity)
    yield {"sample_quality": {name: quality.to_dict() for name, quality in found.items()}}


def measure(exam: Examination, kind: str, drawn: sample.Samples | None) -> SampleQuality | None:
    """Return the quality of samples of the model (`draws`) or of means of p(x | z) (`means`); None on failure."""
    if drawn is None or exam.space is None:
        return None
    given = exam.run, exam.split, len(drawn.x), exam.seed
    what, part = f"sample quality of {kind}", "sample quality"
    return exam.attempt(what, quality_of, *given, space=exam.space, fake=drawn, part=part)


def whole(found: Mapping[str, SampleQuality]) -> list[tuple[Any, ...]]:
    """Return table rows that compare several sample qualities, without the proportions of single labels."""
    return [row for row in merged(found) if not row[0].startswith("share/")]


def _on_fidelity(exam: Examination, f: Fidelity) -> Iterator[Part]:
    yield from texts("quality.near", fidelity=f)
    if f.coverage.value < MISSED * f.expected_coverage:
        yield alert("quality.missed", gan=exam.implicit)
    if f.confidence is not None and f.data_confidence is not None:
        there = [name for name in f.shares if f.data_shares[name].value > 0]
        least = min(there, key=lambda name: f.shares[name].value)
        yield text("quality.confidence", ratio=f.confidence.value / f.data_confidence.value)
        yield text("quality.rarest", label=least, sampled=f.shares[least], of_data=f.data_shares[least])


# ---------------------------------------------------------------------- decoded codes

REBUILT_DATA = 8
"""Number of data per group: best, median and worst."""
TRAVERSED_LATENTS = 3
"""Largest number of latents for which traversals are shown."""
INTERPOLATED_PAIRS = 4
"""Number of pairs of data that are interpolated."""


@section("reconstructions", scored=True)
def reconstructions(exam: Examination) -> Iterator[Part]:
    """Yield best, median and worst reconstructions; nothing for a model without a likelihood."""
    if not (found := exam.attempt("reconstructions", _rebuild, exam)):
        return
    yield picture("reconstructions", pictures.reconstructions(found, *exam.scale_of_grey), split=exam.split)
    scores = {part.title: part.nats.tolist() for part in found}
    rows = [(title, *values) for title, values in scores.items()]
    yield table("reconstructions", rows, *map(str, range(1, len(rows[0]))), digits=1, folded=True)
    yield {"reconstructions": scores}


def _rebuild(exam: Examination) -> list[pictures.Rebuilt]:
    """Return the best, median and worst reconstructions by log p(x | z), with the mean of p(x | z) at the same z.

    Only the best are returned if there are fewer than three times `REBUILT_DATA` rows.
    """
    exam.require_whole_rows()
    pair, drawn, layout, found = exam.pair, exam.drawn, exam.pair.layout, []
    with quiet(pair, exam.x, exam.seed):
        for title, picked in pictures.best_to_worst(base.array(drawn.reconstruction), REBUILT_DATA).items():
            rows = torch.from_numpy(picked).to(exam.x.device)
            chosen = exam.x[rows]
            if layout.enumerated:  # the score sums over codes c: decode a sample of p(c | x, z)
                means = encode.reconstruct(pair, chosen).x
            else:
                nodes = pair.guide_trace(chosen).nodes
                values: dict[str, Any] = {name: nodes[name]["value"] for name in (*layout.latents, *layout.shared)}
                values |= {name: as_value(z.value[rows], nodes[name], layout) for name, z in drawn.latents.items()}
                means = running.decoded_mean(pair.model_trace(chosen, values).nodes, layout, len(rows))
            data, scores = base.array(pair.frame.split(chosen)[0]), base.array(drawn.reconstruction[rows])
            found.append(pictures.Rebuilt(title, data, base.array(means).reshape(data.shape), scores))
    return found


@section("traversals", scored=True, where=lambda exam: pictures.is_shown(exam.shape) and exam.whole_rows)
def traversals(exam: Examination) -> Iterator[Part]:
    """Yield latent traversals; nothing unless data are images or points in the plane."""
    for name in list(exam.pair.layout.latents)[:TRAVERSED_LATENTS]:
        what = f"traversal of {name}"
        if (found := exam.attempt(what, traverse, exam.run, latent=name, seed=exam.seed, part=what)) is not None:
            yield _traversal(exam, found)


def _traversal(exam: Examination, found: Traversal) -> Part:
    """Return the traversal of a latent: for images a row per coordinate, for points in the plane its path."""
    if features.is_image(exam.shape):
        names, steps, below = pictures.moved(found)
        made = pictures.gallery(base.array(found.x), *exam.scale_of_grey, row_names=names, column_names=steps)
        return picture("traversals.traversal", made, of=found.latent, count=len(names), order=found.order, below=below)
    paths: Any = pictures.traversed(found, base.array(exam.part.observed(exam.x[:1000])))  # points are shown
    return picture("traversals.paths.traversal", paths, of=found.latent, count=len(found.dims))


@section("interpolations", scored=True, where=lambda exam: features.is_image(exam.shape) and exam.whole_rows)
def interpolations(exam: Examination) -> Iterator[Part]:
    """Yield interpolations between codes of two data; nothing unless data are images and codes real."""
    if not (found := exam.attempt("interpolations", _interpolated, exam)):
        return
    made = pictures.gallery(np.stack([base.array(path.x) for path in found]), *exam.scale_of_grey)
    yield picture("interpolations", made, count=len(found), split=exam.split)
    if len(paths := [path.log_prior.tolist() for path in found if path.log_prior is not None]) == len(found):
        rows = [(str(i), *path) for i, path in enumerate(paths, 1)]
        yield table("interpolations", rows, *map(str, range(1, len(paths[0]) + 1)), digits=1, folded=True)


def _interpolated(exam: Examination) -> list[Interpolation]:
    """Interpolate random pairs of rows, chosen by the seed, whose two rows differ in label if data have labels."""
    generator = torch.Generator().manual_seed(seeds.mix(exam.seed, seeds.ANALYSIS, 33))
    order = torch.randperm(len(exam.x), generator=generator).tolist()
    found: list[Interpolation] = []
    while len(order) > 1 and len(found) < INTERPOLATED_PAIRS:
        a = order.pop(0)
        if (b := next((i for i in order if exam.labels is None or exam.labels[i] != exam.labels[a]), None)) is None:
            break
        order.remove(b)
        found.append(interpolate(exam.run, exam.x[a], exam.x[b], seed=exam.seed))
    return found
