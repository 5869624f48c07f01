"""The classifier two-sample test: can a classifier tell samples from data it has not seen?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import hypergeom
from torch import Tensor

from pvae import seeds
from pvae.analysis.estimate import Estimate, exact
from pvae.analysis.features import Features, classify, features, in_chunks
from pvae.analysis.fidelity import NEIGHBOURS, Fidelity, fidelity
from pvae.analysis.generate import opened, sample
from pvae.analysis.table import Figures, Row
from pvae.errors import DataError
from pvae.run import Run

FEWEST = 8
"""Fewest rows of each kind that are split in four."""
MOST = 10_000
"""Most rows of each kind that a run's samples are compared on."""
MOST_TRAINED = 100_000
"""Most training rows that features are learnt from."""


@dataclass(frozen=True, repr=False)
class TwoSample(Figures):
    """What a classifier makes of samples and data that it has not been trained on: shares and a probability."""

    accuracy: Estimate
    p_value: Estimate
    total_variation: Estimate
    n: int
    """Rows of each kind that the classifier was trained on."""
    held: int
    """Rows of each kind that it was asked about."""

    @property
    def title(self) -> str:
        """See `Figures.title`."""
        return f"Classifier two-sample test ({self.held} samples and {self.held} data not trained on)"

    @property
    def unit(self) -> str:
        """See `Figures.unit`."""
        return "share"

    def rows(self) -> Iterator[Row]:
        """See `Figures.rows`."""
        yield (
            "accuracy",
            self.accuracy,
            "share told apart: 1/2 for samples of the data's own law, 1 for others",
        )
        yield "p_value", self.p_value, "probability of as much by chance, if they are of one law"
        yield "total_variation", self.total_variation, "2 accuracy - 1: no classifier tells more than this distance"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {"n": self.n, "held": self.held, **self.figures()}


@dataclass(frozen=True, repr=False)
class Comparison(Figures):
    """Samples of a run beside its data: the two-sample test, and how they lie among each other."""

    test: TwoSample
    fidelity: Fidelity
    split: str

    @property
    def title(self) -> str:
        """See `Figures.title`."""
        return f"Samples beside {self.split}: {self.fidelity.m} samples, {self.fidelity.n} data"

    @property
    def unit(self) -> str:
        """See `Figures.unit`."""
        return "share"

    def rows(self) -> Iterator[Row]:
        """See `Figures.rows`."""
        yield from self.test.rows()
        yield from self.fidelity.rows()

    @property
    def remarks(self) -> tuple[str, ...]:
        """See `Figures.remarks`."""
        asked = f"the classifier of the test was asked about {self.test.held} of each kind"
        return (*self.fidelity.remarks, f"k = {self.fidelity.k}; {asked}")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {"split": self.split, "two_sample": self.test.to_dict(), "fidelity": self.fidelity.to_dict()}


def two_sample(real: Tensor, fake: Tensor, seed: int = 0) -> TwoSample:
    r"""Train a classifier on half of the data and samples, and count what it gets right on the other half.

    If both are drawn from one law, the h right answers among data and the others are no more than a labelling by
    chance: with `held` rows of each kind, of which the classifier calls a data, the number of data among those is
    hypergeometric, so that P(H >= h) is an exact p-value whatever the classifier (Fisher's exact test; the paper's
    binomial is what it tends to). In expectation accuracy <= 1/2 + TV / 2, TV the total variation distance: twice the
    accuracy less one is a lower bound of it, and reaches it with the best classifier.

    Warning: a test on enough rows tells any two laws apart; a p-value is no measure of a model. Compare accuracies.

    References:
        Revisiting Classifier Two-Sample Tests (Lopez-Paz, Oquab, 2017), https://arxiv.org/abs/1610.06545

    Arguments:
        real: data `(n, *shape)`.
        fake: samples `(m, *shape)`; of the larger kind, rows drawn by the seed are used, as many as of the smaller.
        seed: of the split, of the classifier's weights and of the order of its data.

    Returns:
        TwoSample: accuracy (an estimate), p_value (exact), total_variation (a lower bound in expectation).

    Raises:
        DataError: fewer than `FEWEST` rows of a kind, rows of different shapes, or numbers that are not finite.
    """
    if real.shape[1:] != fake.shape[1:]:
        raise DataError(f"two_sample: expected samples of shape {list(real.shape[1:])}; got {list(fake.shape[1:])}.")
    n = min(len(real), len(fake))
    if n < FEWEST:
        raise DataError(f"two_sample: expected at least {FEWEST} data and samples; got {len(real)} and {len(fake)}.")
    sides = [side.float()[_shuffled(len(side), seed, i)[:n].to(side.device)] for i, side in enumerate((real, fake))]
    if not all(bool(side.isfinite().all()) for side in sides):
        raise DataError("two_sample: expected finite numbers; got NaN or infinity among data or samples.")
    half, held = n // 2, n - n // 2
    fitting = half - half // 5
    parts = [[side[:fitting], side[fitting:half], side[half:]] for side in sides]
    (x, y), watched, (asked, truth) = (_labelled(*both) for both in zip(*parts, strict=True))
    model = classify(x, y, 2, seed, watched if len(watched[0]) else None)
    called = in_chunks(model, asked).argmax(1).bool()
    hits, named = int(called[truth.cpu().bool()].sum()), int(called.sum())
    accuracy = (hits + held - (named - hits)) / (2 * held)
    error = math.sqrt(accuracy * (1 - accuracy) / (2 * held))
    return TwoSample(
        Estimate(accuracy, error, "estimate"),
        exact(by_chance(hits, named, held)),
        Estimate(2 * accuracy - 1, 2 * error, "lower_bound", note="in expectation"),
        half,
        held,
    )


def by_chance(hits: int, named: int, held: int) -> float:
    """P(H >= hits), exact: of 2 held rows, half of them data, `named` drawn at random hold H data."""
    return float(hypergeom.sf(hits - 1, 2 * held, held, named))


def _shuffled(n: int, seed: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(seeds.mix(seed, seeds.ANALYSIS, 12 + side))
    return torch.randperm(n, generator=generator)


def _labelled(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Both kinds, and 1 for data, 0 for samples."""
    y = torch.cat([torch.ones(len(real), dtype=torch.int64), torch.zeros(len(fake), dtype=torch.int64)])
    return torch.cat([real, fake.to(real.device)]), y.to(real.device)


STEPS = ("samples", "two-sample test", "feature space", "neighbours")


def compare(
    run: Run,
    split: str = "test",
    rows: int | None = None,
    seed: int = 0,
    *,
    mean: bool = False,
    k: int = NEIGHBOURS,
    space: Features | None = None,
    on_progress: Callable[[int, int, str], None] = lambda _done, _total, _what: None,
) -> Comparison:
    """Samples of a run beside the data of a split, of any model that can be sampled.

    Arguments:
        run: a run.
        split: the data: "train", "validation" or "test".
        rows: compare this many data, drawn at random, with as many samples; default: all, at most `MOST`.
        seed: of rows, samples, and of the classifiers.
        mean: take means of p(x | z) for samples: what the model draws without the likelihood's own noise.
        k: which neighbour `fidelity` reaches.
        space: the feature space; default: `features` of the training rows and their labels.
        on_progress: called with (steps done, steps in all, what comes next).

    Returns:
        Comparison.

    Raises:
        DataError: the split has too few rows.
    """
    part, pair = run.data.split(split), opened(run)
    chosen = seeds.subset(len(part), min(rows or MOST, MOST), seed)
    real = part.observed(part.rows[chosen.to(part.rows.device)]).cpu()
    on_progress(0, len(STEPS), STEPS[0])
    fake = sample(run, len(real), mean=mean, seed=seed).x
    on_progress(1, len(STEPS), STEPS[1])
    test = two_sample(real, fake, seed)
    on_progress(2, len(STEPS), STEPS[2])
    train = run.data.train
    if space is None:
        kept = seeds.subset(len(train), MOST_TRAINED, seed).to(train.rows.device)
        labels = None if train.y is None else train.y[kept].cpu()
        space = features(train.observed(train.rows[kept]).cpu(), labels, run.data.label_names, seed)
    on_progress(3, len(STEPS), STEPS[3])
    found = Comparison(test, fidelity(real, fake.reshape(len(fake), *pair.frame.x), k, space), split)
    on_progress(len(STEPS), len(STEPS), "")
    return found
