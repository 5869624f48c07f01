"""Labels in codes: accuracy of simple classifiers, compared with that from x; separation and mixing of groups."""

import warnings
from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
import torch
from scipy.stats import entropy
from sklearn import compose, exceptions, linear_model, metrics, pipeline, preprocessing
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from pvae.analysis.figures.estimate import Estimate, Figures, Row, annotated, over_rows, proportion, refuse
from pvae.analysis.samples import encode, features, running
from pvae.data.split import Split
from pvae.errors import DataError
from pvae.runs.run import Run
from pvae.util import Progress, Record, seeds, silent

PROBE_ROWS = 10_000
"""Largest number of rows whose labels the classifiers predict."""
PROBE_TRAINING_ROWS = 20_000
"""Largest number of training rows of the classifiers."""
PROBE_NEIGHBOURS = 5
"""Number of neighbours of the k-nearest-neighbour classifier."""
LINEAR_STEPS = 200
"""Largest number of optimiser steps of logistic regression."""
GROUPED_ROWS, MIXED_NEIGHBOURS = 5000, 50
"""Largest number of rows whose groups are looked at, and of neighbours of each."""
TOGETHER, RAW = "all latents", "x"
Block = tuple[torch.Tensor, torch.Tensor]
"""Values `(n, ...)` that a classifier reads: of the training rows, and of those to classify; integers are codes."""


class Reading(Record):
    """Accuracies of the two classifiers that predict labels from the same input, such as one latent; estimates."""

    of: str
    """Input of the classifiers: name of a latent, `all latents`, or `x` for the data."""
    knn: Annotated[Estimate, "{0.of}/knn", "accuracy of {neighbours} nearest neighbours of {what}"]
    """Accuracy of the classifier by the `PROBE_NEIGHBOURS` nearest training rows."""
    knn_gain: Annotated[Estimate | None, "{0.of}/knn_gain", "difference from the neighbours of x, on the same rows"]
    """Accuracy of nearest neighbours minus their accuracy with x as input, paired by row; None for x itself."""
    linear: Annotated[Estimate, "{0.of}/linear", "accuracy of logistic regression of {what}"]
    """Accuracy of logistic regression."""
    linear_gain: Annotated[Estimate | None, "{0.of}/linear_gain", "difference from that of x, on the same rows"]
    """Accuracy of logistic regression minus its accuracy with x as input, paired by row; None for x itself."""


class Probe(Figures):
    """Accuracy of simple classifiers of codes, estimates; the result of `probe`."""

    readings: tuple[Reading, ...]
    """Accuracies of classifiers of each latent, of all latents together if there are several, and of x."""
    majority: Annotated[Estimate, "accuracy of always predicting the most frequent label"]
    """Accuracy of always predicting the most frequent training label."""
    trained: int
    """Number of training rows of the classifiers."""
    asked: int
    """Number of rows whose labels were predicted."""
    split: str
    """Name of the split of the rows whose labels were predicted."""

    def __getitem__(self, of: str) -> Reading:
        """Return the accuracies of the classifiers of a latent, of `all latents` or of `x`."""
        return next(reading for reading in self.readings if reading.of == of)

    def rows(self) -> Iterator[Row]:
        for reading in self.readings:
            raw = reading.of == RAW
            what = f"the {features.PRINCIPAL_COMPONENTS} first principal components of x" if raw else "the code"
            yield from annotated(reading, what=what, neighbours=PROBE_NEIGHBOURS)
        yield from super().rows()


def probe(
    run: Run, split: str = "test", rows: int | None = None, seed: int = 0, *, on_progress: Progress = silent
) -> Probe:
    """Measure how well simple classifiers predict the label from the codes of data.

    Two classifiers are trained on the codes of training rows and predict the labels of others: the `PROBE_NEIGHBOURS`
    nearest codes (Euclidean, in unscaled coordinates), and logistic regression on standardised coordinates
    (scikit-learn's, penalty C = 1, at most `LINEAR_STEPS` steps). The code is the centre of q(z | x), see `encode`; of
    discrete latents the one-hot vectors of the most probable values. The same classifiers are applied to x, as its
    `PRINCIPAL_COMPONENTS` first principal components. A code may beat x because it is smoother; it cannot contain more
    information than x.

    Standard errors are those of proportions of independent rows with fixed classifiers; gains are paired.

    References:
        Understanding intermediate layers using linear classifier probes (Alain, Bengio, 2016),
        https://arxiv.org/abs/1610.01644

    Arguments:
        run: a run.
        split: split of the rows to classify.
        rows: number of these, chosen at random; default: all, at most `PROBE_ROWS`.
        seed: seed of the rows; at most `PROBE_TRAINING_ROWS` training rows are used.
        on_progress: called with (steps done, steps in all).

    Returns:
        Probe: accuracies between 0 and 1, estimates.

    Raises:
        DataError: the data have no labels, only one or more than `MAX_CLASSES`, the model is conditioned on the label,
            x has values that are not finite, or the model has no local latents (one value per datum).

    Example:
        >>> from pvae.analysis.truths.example import example_run
        >>> 0 <= probe(example_run())["z"].linear.value <= 1
        True
    """
    pair, part, train = running.opened(run), run.data.split(split), run.data.train
    given = [name for name, entry in pair.frame.covariates.items() if entry.source == "label"]
    refuse(given, "refused.given_label", covariates=given)
    x, y = _some(train, PROBE_TRAINING_ROWS, seed)
    asked, labels = _some(part, min(rows or PROBE_ROWS, PROBE_ROWS), seed)
    there = np.unique(y)
    refuse(not 1 < len(there) <= features.MAX_CLASSES, "refused.probed_labels", most=features.MAX_CLASSES, found=there)
    refuse(not np.isin(labels, there).any(), "probe: expected rows of labels that train has; got none.")
    y, labels = (np.where(np.isin(side, there), np.searchsorted(there, side), len(there)) for side in (y, labels))
    data = [split.observed(side) for split, side in ((train, x), (part, asked))]
    refuse(not all(side.isfinite().all() for side in data), "refused.no_components")
    codes = [encode.encode(run, side, mean=True, seed=seed).latents for side in (x, asked)]
    read: dict[str, list[Block]] = {name: [(codes[0][name].value, codes[1][name].value)] for name in codes[0]}
    refuse(not read, "probe: expected latents of single data; got a model without any.")
    if len(read) > 1:
        read[TOGETHER] = [block for blocks in read.values() for block in blocks]
    loc, directions = features.principal(data[0])
    learnt, seen = ((side.flatten(1).double().cpu() - loc) @ directions for side in data)
    read[RAW] = [(learnt, seen)]
    right = {}
    for done, (name, blocks) in enumerate(read.items()):
        on_progress(done, len(read))
        right[name] = _right(blocks, y, labels)
    on_progress(len(read), len(read))
    readings = []
    for name, found in right.items():
        gains = [None, None] if name == RAW else [over_rows(m - raw) for m, raw in zip(found, right[RAW], strict=True)]
        knn, linear = map(proportion, found)
        readings.append(Reading(name, knn, gains[0], linear, gains[1]))
    majority = proportion(torch.from_numpy(labels == np.bincount(y).argmax()))
    return Probe(tuple(readings), majority, len(y), len(labels), split)


def _some(split: Split, most: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Return at most `most` random rows of a split `(m, *row)`, and their labels `(m,)`."""
    if (y := split.labels) is None or y.isnan().all():
        raise DataError(f"probe: expected labels; got none in {split.name}.")
    index = seeds.subset(len(split), features.affordable(most, tuple(split.rows.shape[1:])), seed)
    index = index[~y[index.to(y.device)].isnan().cpu()]
    return split.rows[index.to(split.rows.device)], y[index.to(y.device)].long().cpu().numpy()


def _right(blocks: Sequence[Block], y: np.ndarray, labels: np.ndarray) -> list[torch.Tensor]:
    """Return 1 for each row whose label is predicted correctly, else 0, by nearest neighbours and logistic regression.

    Arguments:
        blocks: inputs of the classifiers, side by side; codes become one-hot vectors. Logistic regression sees real
            numbers standardised.
        y: labels of the training rows, `(n,)`.
        labels: true labels of the rows to classify, `(m,)`.

    Returns:
        Two tensors `(m,)`, float64.
    """
    sides = ([t.reshape(len(t), -1).double().numpy() for t in side] for side in zip(*blocks, strict=True))
    train, asked = map(np.hstack, sides)
    is_code = np.concatenate([np.full(t[0].numel(), not t.is_floating_point()) for t, _ in blocks])
    knn = KNeighborsClassifier(min(PROBE_NEIGHBOURS, len(y)), algorithm="brute")
    right, logistic = [], linear_model.LogisticRegression(max_iter=LINEAR_STEPS)
    for scaler, classifier in (("passthrough", knn), (preprocessing.StandardScaler(), logistic)):
        columns = [("codes", preprocessing.OneHotEncoder(handle_unknown="ignore"), is_code), ("real", scaler, ~is_code)]
        reader = pipeline.make_pipeline(compose.ColumnTransformer(columns, sparse_threshold=1.0), classifier)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", exceptions.ConvergenceWarning)  # after `LINEAR_STEPS` steps it is used
            right.append(torch.from_numpy(reader.fit(train, y).predict(asked) == labels).double())
    return right


# ---------------------------------------------------------------------- groups of rows


class GroupedCodes(Figures):
    """Separation and mixing of groups of rows among codes, estimates; the result of `groups`."""

    separated: dict[str, Estimate]
    """Silhouette by what groups the rows: -1 to 1, large where codes of a group lie closer to each other than to those
    of the nearest other group."""
    mixed: dict[str, Estimate]
    """Entropy of the groups among the nearest codes, divided by that among all rows: 0 to 1, 1 if mixed evenly."""
    asked: int
    """Number of rows."""
    split: str
    """Name of the split of the rows."""

    def rows(self) -> Iterator[Row]:
        for name, silhouette in self.separated.items():
            yield f"{name}/silhouette", silhouette, "separation of the groups, -1 to 1"
            yield f"{name}/mixing", self.mixed[name], f"entropy among {MIXED_NEIGHBOURS} neighbours; 1: as in all rows"


def groups(run: Run, split: str = "test", seed: int = 0) -> GroupedCodes:
    """Measure how far labels, and levels of categorical covariates such as batches, lie apart in the codes of data.

    Codes are centres of q(z | x), real coordinates of all latents side by side; at most `GROUPED_ROWS` rows are taken.
    Few neighbours make the mixing too small, by about (levels - 1) / (2 neighbours) over the entropy of all rows.
    Errors take rows as independent. Rows whose label is missing are left out.

    References:
        Silhouettes (Rousseeuw, 1987), https://doi.org/10.1016/0377-0427(87)90125-7
        Batch effects in single-cell RNA-sequencing data (Haghverdi et al., 2018), https://doi.org/10.1038/nbt.4091

    Arguments:
        run: a run.
        split: split of the rows.
        seed: seed of the rows.

    Raises:
        DataError: rows have no labels and no categorical covariates of two or more values, or there is no real latent.

    Example:
        >>> from pvae.analysis.truths.example import example_run
        >>> found = groups(example_run())  # two clusters
        >>> found.separated["label"].value > 0.2, found.mixed["label"].value < 0.5
        (True, True)
    """
    pair, part = running.opened(run), run.data.split(split)
    index = seeds.subset(len(part), features.affordable(GROUPED_ROWS, tuple(part.rows.shape[1:])), seed)
    x = part.rows[index.to(part.rows.device)]
    given = {name: e for name, e in pair.frame.covariates.items() if e.codes and e.vocabulary is None}
    known = {name: value for name, value in pair.frame.columns(x).items() if name in given}
    labels = part.labels
    if labels is not None and not any(entry.source == "label" for entry in pair.frame.covariates.values()):
        known["label"] = labels[index.to(labels.device)]
    values = [code.value for code in encode.encode(run, x, mean=True, seed=seed).latents.values()]
    real = [value.flatten(1).double().cpu() for value in values if value.is_floating_point()]
    separated, mixed = {}, {}
    for name, value in known.items() if real else ():
        have = (~value.isnan()).cpu()  # rows whose label is missing are in no group
        group = np.unique(value.cpu()[have].numpy(), return_inverse=True)[1]
        if not 0 < group.max(initial=0) < len(group) - 1:
            continue
        z, hot = torch.cat(real, 1)[have].numpy(), np.eye(group.max() + 1)[group]
        near = NearestNeighbors(n_neighbors=min(MIXED_NEIGHBOURS, len(z) - 1)).fit(z).kneighbors(return_distance=False)
        separated[name] = over_rows(torch.from_numpy(metrics.silhouette_samples(z, group)))
        mixed[name] = over_rows(torch.from_numpy(entropy(hot[near].mean(1), axis=1) / entropy(hot.mean(0))))
    refuse(not separated, "refused.no_groups")
    return GroupedCodes(separated, mixed, len(x), split)
