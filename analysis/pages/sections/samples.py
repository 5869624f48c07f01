"""Sections on what the model makes: samples (memorisation, quality), reconstructions, traversals, interpolations."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from pvae.analysis.aggregate.entry import quiet
from pvae.analysis.export.sites import as_value
from pvae.analysis.figures.estimate import merged
from pvae.analysis.pages.document.blocks import Note, PageTable, Part, Sentence, Tile, columns, picture, section
from pvae.analysis.pages.document.text import nats, percent
from pvae.analysis.pages.plots import pictures
from pvae.analysis.pages.plots.base import array
from pvae.analysis.pages.sections.examination import Examination
from pvae.analysis.samples.copying import Copying, copying
from pvae.analysis.samples.encode import reconstruct
from pvae.analysis.samples.features import is_image
from pvae.analysis.samples.fidelity import Fidelity
from pvae.analysis.samples.quality import SampleQuality, sample_quality
from pvae.analysis.samples.running import decoded_mean
from pvae.analysis.samples.sample import Samples
from pvae.analysis.samples.traversal import Traversal, interpolate, traverse
from pvae.util import seeds

ON_SHEET, BESIDE_NEIGHBOURS = 40, 10
"""Numbers of samples: shown in total, and shown with their nearest training data."""
MEMORISED = 0.6
"""Proportion of samples nearer to training than to held-out rows above which the report warns of memorisation."""


@section("samples", "Samples")
def samples(exam: Examination) -> Iterator[Part]:
    """Yield samples and their nearest training rows; nothing if the model cannot be sampled."""
    if (drawn := exam.sampled) is None:
        return
    data = array(exam.data.train.observed(exam.rows["train"].x[:1000]))
    x = array(drawn.x[:ON_SHEET]).reshape(-1, *exam.shape)
    what = "Means of p(x | z)" if drawn.is_mean else "Samples of the model"
    noise = "Without the likelihood's own noise they look smoother than data. " if drawn.is_mean else ""
    yield picture(
        "samples",
        pictures.samples(x, data, *exam.scale_of_grey),
        f"{len(x)} samples of the model.",
        f"{what}, each at its own sample of the prior. {noise}Look for samples that mix kinds (they come from holes of "
        "the prior), for kinds that are missing, and for samples that repeat.",
    )
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
    if is_image(exam.shape):
        train = exam.data.train
        nearest = train.observed(train.rows[first.nearest[:BESIDE_NEIGHBOURS].to(exam.x.device)])
        pairs = np.stack([x[:BESIDE_NEIGHBOURS], array(nearest)[: len(x)]])
        yield picture(
            "nearest",
            pictures.gallery(pairs, *exam.scale_of_grey, row_names=("sample", "nearest")),
            f"{len(pairs[0])} samples, and below each the training datum nearest to it.",
            "Above a sample, below the training datum nearest to it. Identical pairs are memorised data.",
        )
    yield _table(known)
    yield from (Note(text) for text in next(reversed(known.values())).remarks)
    yield on_copies(known)
    yield Tile("nearer to train", percent(first.nearer.value), "of samples, than to held-out; 50 % expected")


def _table(known: Mapping[str, Copying]) -> PageTable:
    """Return the table of the copying tests of samples and of means; for means, which lack noise, only `nearer`."""
    shown = []
    for term, *found, what in merged(known):
        figures = [e if kind != "means" or term == "nearer" else None for kind, e in zip(known, found, strict=True)]
        if any(e is not None for e in figures):
            shown.append((term, *figures, what))
    caption = f"{next(iter(known.values())).title}; proportions"
    return PageTable("copying", caption, columns("figure", *known, words=["what it is"]), shown)


def on_copies(known: Mapping[str, Copying]) -> Sentence:
    """Return the sentence on memorisation; an alert if samples or means are closer to training than held-out rows."""
    first, last = next(iter(known.values())), known.get("draws")
    text = f"{percent(first.nearer.value)} of samples are nearer to training rows than to as many held-out rows"
    near = [copies.nearer for copies in known.values()]
    clear = any(e.value > max(MEMORISED, 0.5 + 4 * e.standard_error) for e in near)
    doubt = any(e.value > 0.5 + 2 * e.standard_error or not e.standard_error < 0.05 for e in near)
    if last is not None:
        by_chance = (last.held_share * (1 / len(last.distance) + 1 / len(last.held_distance))) ** 0.5  # without copies
        if last.share.value - last.held_share > max(4 * by_chance, last.held_share):
            clear = True
            text += f", and {percent(last.share.value)} are as near as {percent(last.held_share)} of held-out data"
    if clear:
        return Sentence(
            f"The model has memorised training data: {text}. Stop earlier (train.patience), use smaller networks or "
            "fewer components, or more data.",
            True,
        )
    error = percent(first.nearer.standard_error)
    return Sentence(f"{'' if doubt else 'No sign of memorisation: '}{text} (± {error}; 50 % expected).")


# ---------------------------------------------------------------------- quality

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
    titles = columns("figure", *found, digits=4, words=["what it is"])
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


# ---------------------------------------------------------------------- decoded codes

REBUILT_DATA = 8
"""Number of data per group: best, median and worst."""
TRAVERSED_LATENTS = 3
"""Largest number of latents for which traversals are shown."""
INTERPOLATED_PAIRS = 4
"""Number of pairs of data that are interpolated."""


@section("reconstructions", "Reconstructions", scored=True)
def reconstructions(exam: Examination) -> Iterator[Part]:
    """Yield best, median and worst reconstructions; nothing for a model without a likelihood."""
    if not (found := exam.attempt("reconstructions", _rebuild, exam)):
        return
    yield picture(
        "reconstructions",
        pictures.reconstructions(found, *exam.scale_of_grey),
        f"Data of {exam.split} beside their reconstructions.",
        "Above the datum, below the mean of p(x | z) for one sample of q(z | x); figures are log p(x | z) in nats. "
        "Look at the worst: rare data, or details that the decoder cannot produce.",
    )
    scores = {part.title: part.nats.tolist() for part in found}
    titles = columns("data", *(str(i + 1) for i in range(len(found[0].nats))), digits=1)
    rows = [(title, *values) for title, values in scores.items()]
    yield PageTable("reconstructions", "log p(x | z) of the data above, nats", titles, rows, folded=True)
    yield {"reconstructions": scores}


def _rebuild(exam: Examination) -> list[pictures.Rebuilt]:
    """Return the best, median and worst reconstructions by log p(x | z), with the mean of p(x | z) at the same z.

    Only the best are returned if there are fewer than three times `REBUILT_DATA` rows.
    """
    exam.require_whole_rows()
    pair, drawn, layout, found = exam.pair, exam.drawn, exam.pair.layout, []
    with quiet(pair, exam.x, exam.seed):
        for title, picked in pictures.best_to_worst(array(drawn.reconstruction), REBUILT_DATA).items():
            rows = torch.from_numpy(picked).to(exam.x.device)
            chosen = exam.x[rows]
            if layout.enumerated:  # the score sums over codes c: decode a sample of p(c | x, z)
                means = reconstruct(pair, chosen).x
            else:
                nodes = pair.guide_trace(chosen).nodes
                values: dict[str, Any] = {name: nodes[name]["value"] for name in (*layout.latents, *layout.shared)}
                values |= {name: as_value(z.value[rows], nodes[name], layout) for name, z in drawn.latents.items()}
                means = decoded_mean(pair.model_trace(chosen, values).nodes, layout, len(rows))
            data, scores = array(pair.frame.split(chosen)[0]), array(drawn.reconstruction[rows])
            found.append(pictures.Rebuilt(title, data, array(means).reshape(data.shape), scores))
    return found


@section("traversals", "Traversals", scored=True)
def traversals(exam: Examination) -> Iterator[Part]:
    """Yield latent traversals; nothing unless data are images or points in the plane."""
    if not pictures.is_shown(exam.shape) or not exam.whole_rows:
        return
    for name in list(exam.pair.layout.latents)[:TRAVERSED_LATENTS]:
        what = f"traversal of {name}"
        found = exam.attempt(what, traverse, exam.run, latent=name, seed=exam.seed, part=what)
        if found is not None:
            yield _rows(exam, found) if is_image(exam.shape) else _paths(exam, found)


def _rows(exam: Examination, found: Traversal) -> Part:
    """Return the traversal of a latent for image data: one row of images per coordinate."""
    names, steps, below = pictures.moved(found)
    return picture(
        f"traversal_{found.latent}",
        pictures.gallery(array(found.x), *exam.scale_of_grey, row_names=names, column_names=steps),
        f"{len(names)} rows of pictures: in each one coordinate of {found.latent} moves.",
        f"Means of p(x | z) as one coordinate moves and the others stay at the prior's mean, ordered by {found.order}, "
        f"largest first. {below} Look for coordinates that change one thing only. Rows that do not change belong to "
        "coordinates without information.",
    )


def _paths(exam: Examination, found: Traversal) -> Part:
    """Return the traversal of a latent for data in the plane: the path of the mean of p(x | z) for each coordinate."""
    made = pictures.traversed(found, array(exam.part.observed(exam.x[:1000])))
    assert made is not None  # noqa: S101 - points in the plane are shown
    return picture(
        f"traversal_{found.latent}",
        made,
        f"Data, and the path of the mean of p(x | z) as each of {len(found.dims)} coordinates of {found.latent} moves.",
        "Look for paths that follow the data. Dots without a path belong to coordinates without information.",
    )


@section("interpolations", "Interpolations", scored=True)
def interpolations(exam: Examination) -> Iterator[Part]:
    """Yield interpolations between codes of two data; nothing unless data are images and codes real."""
    if not is_image(exam.shape) or not exam.whole_rows:
        return
    found = exam.attempt(
        "interpolations", lambda: [interpolate(exam.run, exam.x[a], exam.x[b], seed=exam.seed) for a, b in _ends(exam)]
    )
    if not found:
        return
    yield picture(
        "interpolations",
        pictures.gallery(np.stack([array(path.x) for path in found]), *exam.scale_of_grey),
        f"{len(found)} rows of pictures, each from one datum of {exam.split} to another.",
        "Means of p(x | z) on the path between the codes of two data. Pictures in the middle should look like data, "
        "not like two data laid over each other.",
    )
    paths = [path.log_prior.tolist() for path in found if path.log_prior is not None]
    if len(paths) == len(found):
        rows = [(str(i), *path) for i, path in enumerate(paths, 1)]
        titles = columns("row", *(str(k + 1) for k in range(len(paths[0]))), digits=1)
        caption = "log p(z) on each path, nats: low values in the middle are codes that are improbable under the prior"
        yield PageTable("interpolations", caption, titles, rows, folded=True)


def _ends(exam: Examination) -> list[tuple[int, int]]:
    """Return random pairs of rows, chosen by the seed; the two rows of a pair differ in label if data have labels."""
    generator = torch.Generator().manual_seed(seeds.mix(exam.seed, seeds.ANALYSIS, 33))
    order = torch.randperm(len(exam.x), generator=generator).tolist()
    pairs: list[tuple[int, int]] = []
    while len(order) > 1 and len(pairs) < INTERPOLATED_PAIRS:
        a = order.pop(0)
        b = next((i for i in order if exam.labels is None or exam.labels[i] != exam.labels[a]), None)
        if b is None:
            break
        order.remove(b)
        pairs.append((a, b))
    return pairs
