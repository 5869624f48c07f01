"""A probe: what simple readers make of the codes of data, beside the same readers of the data themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.figures.table import Figures, Row
from pvae.analysis.samples.features import CLASSES, COMPONENTS, affordable, principal
from pvae.analysis.samples.fidelity import mean_of
from pvae.analysis.samples.generate import encode, opened
from pvae.data.split import Split
from pvae.errors import DataError
from pvae.runs.run import Run
from pvae.util import seeds

MOST = 10_000
"""Most rows that readers are asked about."""
MOST_TRAINED = 20_000
"""Most training rows that readers learn from."""
NEIGHBOURS = 5
STEPS = 200
"""Most steps of the linear reader's fit."""
TOGETHER, RAW = "all latents", "x"
Matrix = Any
"""Float64 numbers `(n, F)`, or scipy's sparse ones: it ships no types."""


@dataclass(frozen=True)
class Reading:
    """How often two readers of one and the same columns name the label."""

    of: str
    """The latent; `all latents`; or `x`, the data."""
    knn: Estimate
    """By the `NEIGHBOURS` nearest training rows."""
    linear: Estimate
    """By logistic regression."""
    knn_gain: Estimate | None = None
    """Over the same reader of x, paired; None of x itself."""
    linear_gain: Estimate | None = None
    """The same of the linear reader."""


@dataclass(frozen=True, repr=False)
class Probe(Figures):
    """Accuracy of simple readers of codes: shares, no nats."""

    readings: tuple[Reading, ...]
    """Of each latent, of all together where there are several, of x."""
    majority: Estimate
    """Of always naming the label that is most frequent among the training rows."""
    trained: int
    """Training rows that readers learnt from."""
    asked: int
    """Rows they were asked about."""
    split: str

    def __getitem__(self, of: str) -> Reading:
        """The reading of a latent, of `all latents` or of `x`."""
        return next(reading for reading in self.readings if reading.of == of)

    @property
    def title(self) -> str:
        """See `Figures.title`."""
        return f"Labels read from codes ({self.asked} of {self.split}, {self.trained} training rows)"

    @property
    def unit(self) -> str:
        """See `Figures.unit`."""
        return "share"

    def rows(self) -> Iterator[Row]:
        """See `Figures.rows`."""
        for reading in self.readings:
            what = f"of the {COMPONENTS} first principal components of x" if reading.of == RAW else "of the code"
            yield f"{reading.of}/knn", reading.knn, f"right by {NEIGHBOURS} nearest neighbours {what}"
            yield f"{reading.of}/knn_gain", reading.knn_gain, "more than by those of x, on the same rows"
            yield f"{reading.of}/linear", reading.linear, f"right by logistic regression {what}"
            yield f"{reading.of}/linear_gain", reading.linear_gain, "more than by that of x, on the same rows"
        yield "majority", self.majority, "right by naming the most frequent label"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {"split": self.split, "trained": self.trained, "asked": self.asked, **self.figures()}


def probe(
    run: Run,
    split: str = "test",
    rows: int | None = None,
    seed: int = 0,
    *,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Probe:
    """How well simple readers find the label in the codes of data.

    Two readers learn from codes of training rows and name the labels of others: the `NEIGHBOURS` nearest codes
    (Euclidean, coordinates as they are: one that holds nothing moves nothing), and logistic regression on standardised
    coordinates (scikit-learn's, penalty C = 1, at most `STEPS` steps). A code is the centre of q(z | x), see `encode`:
    a posterior mean, of codes the one-hots of the most probable. Beside them stand the same readers of x, as its
    `COMPONENTS` first principal components. A code may beat x: it is smoother; it cannot hold more than x does.

    Standard errors are those of shares of independent rows, the readers as they are; gains are paired.

    References:
        Understanding intermediate layers using linear classifier probes (Alain, Bengio, 2016),
        https://arxiv.org/abs/1610.01644

    Arguments:
        run: a run.
        split: the rows that readers are asked about.
        rows: ask about this many, drawn at random; default: all, at most `MOST`.
        seed: of the rows; at most `MOST_TRAINED` training rows are learnt from.
        on_progress: called with (steps done, steps in all).

    Returns:
        Probe: estimates, shares.

    Raises:
        DataError: the data have no labels, or but one; the model is told the label; x has values that are not finite;
            nothing is inferred of single data.
    """
    pair, part, train = opened(run), run.data.split(split), run.data.train
    if pair.frame.covariates:
        told = ", ".join(pair.frame.covariates)
        raise DataError(
            f"probe: expected a model that is not told the label; got one conditioned on {told}: its codes need not "
            f"hold what they are given."
        )
    (x, y), (asked, labels) = _some(train, MOST_TRAINED, seed), _some(part, min(rows or MOST, MOST), seed)
    there = np.unique(y)
    if not 1 < len(there) <= CLASSES:
        raise DataError(f"probe: expected 2 to {CLASSES} labels among the training rows; got {len(there)}.")
    known = np.isin(labels, there)
    y, labels = (np.where(np.isin(side, there), np.searchsorted(there, side), len(there)) for side in (y, labels))
    if not known.any():
        raise DataError("probe: expected rows of labels that train has; got none.")
    if not all(bool(side.isfinite().all()) for side in (x, asked)):
        raise DataError("probe: expected finite numbers; got NaN or infinity, of which x has no principal components.")
    codes = [encode(run, side, mean=True, seed=seed).latents for side in (x, asked)]
    read = {name: _read(*(side[name].value for side in codes)) for name in codes[0]}
    if not read:
        raise DataError("probe: expected latents of single data; got a model without any.")
    if len(read) > 1:
        read[TOGETHER] = _joined(tuple(read.values()))
    read[RAW] = _principal(x, asked)
    right = {}
    for done, (name, columns) in enumerate(read.items()):
        on_progress(done, len(read))
        right[name] = _right(columns, y, labels)
    on_progress(len(read), len(read))
    majority = mean_of(torch.from_numpy(labels == np.bincount(y).argmax()).double())
    readings = tuple(_reading(name, found, right[RAW]) for name, found in right.items())
    return Probe(readings, majority, len(y), len(labels), split)


def _some(split: Split, most: int, seed: int) -> tuple[Tensor, NDArray[Any]]:
    """Rows `(m, *row)` and labels `(m,)` of a split, at most so many."""
    if split.y is None:
        raise DataError(f"probe: expected labels, which codes are read for; got none in {split.name}.")
    index = seeds.subset(len(split), affordable(most, tuple(split.rows.shape[1:])), seed)
    return split.rows[index.to(split.rows.device)], split.y[index.to(split.y.device)].cpu().numpy()


@dataclass(frozen=True)
class Columns:
    """What readers read, of training rows and of those they are asked about."""

    plain: tuple[Matrix, Matrix]
    """As they are."""
    standard: tuple[Matrix, Matrix]
    """Real numbers standardised by the training rows; one-hots as they are."""


def _read(train: Tensor, asked: Tensor) -> Columns:
    """Columns of a latent `(n, *event)` and `(m, *event)`; of indices, one-hots."""
    sides = [side.reshape(len(side), -1).numpy() for side in (train, asked)]
    if train.is_floating_point():
        return _real(sides[0].astype(np.float64), sides[1].astype(np.float64))
    states = int(max(side.max() for side in sides)) + 1
    learnt, seen = (_one_hots(side, states) for side in sides)
    return Columns((learnt, seen), (learnt, seen))


def _real(train: NDArray[np.float64], asked: NDArray[np.float64]) -> Columns:
    scaler = StandardScaler().fit(train)
    return Columns((train, asked), (scaler.transform(train), scaler.transform(asked)))


def _one_hots(index: NDArray[Any], states: int) -> sparse.csr_matrix:
    """Indices `(n, P)` to `(n, P states)`."""
    n, positions = index.shape
    at = (index + states * np.arange(positions)).ravel()
    return sparse.csr_matrix((np.ones(n * positions), at, np.arange(n + 1) * positions), (n, positions * states))


def _principal(train: Tensor, asked: Tensor) -> Columns:
    """The leading principal components of the training rows."""
    loc, directions = principal(train)
    learnt, seen = (((side.flatten(1).double().cpu() - loc) @ directions).numpy() for side in (train, asked))
    return _real(learnt, seen)


def _joined(parts: tuple[Columns, ...]) -> Columns:
    """Columns of several latents side by side; sparse where any are."""

    def beside(sides: list[Matrix]) -> Matrix:
        return sparse.hstack(sides, "csr") if any(map(sparse.issparse, sides)) else np.hstack(sides)

    return Columns(
        (beside([part.plain[0] for part in parts]), beside([part.plain[1] for part in parts])),
        (beside([part.standard[0] for part in parts]), beside([part.standard[1] for part in parts])),
    )


def _right(columns: Columns, learnt: NDArray[Any], asked: NDArray[Any]) -> tuple[Tensor, Tensor]:
    """Whether each row's label is named by neighbours, and by the linear reader, `(m,)` both."""
    knn = KNeighborsClassifier(min(NEIGHBOURS, len(learnt)), algorithm="brute").fit(columns.plain[0], learnt)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # where it stands after `STEPS` is the reader
        linear = LogisticRegression(max_iter=STEPS).fit(columns.standard[0], learnt)
    named = knn.predict(columns.plain[1]), linear.predict(columns.standard[1])
    by_knn, by_linear = (torch.from_numpy(found == asked).double() for found in named)
    return by_knn, by_linear


def _reading(of: str, right: tuple[Tensor, Tensor], raw: tuple[Tensor, Tensor]) -> Reading:
    gains = (
        (None, None) if of == RAW else tuple(mean_of(mine - theirs) for mine, theirs in zip(right, raw, strict=True))
    )
    return Reading(of, mean_of(right[0]), mean_of(right[1]), *gains)
