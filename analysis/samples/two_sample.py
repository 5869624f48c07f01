"""Classifier two-sample test: accuracy of a classifier between samples and data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy.stats import hypergeom
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate, exact
from pvae.analysis.figures.table import Figures, Row
from pvae.analysis.samples.features import classify, in_chunks
from pvae.errors import DataError
from pvae.util import seeds

FEWEST_TEST_ROWS = 8
"""Smallest number of data, and of samples, that the test accepts."""


@dataclass(frozen=True, repr=False)
class TwoSample(Figures):
    """Accuracy of a classifier between samples and data, on held-out rows; the result of `two_sample`."""

    unit = "proportion"
    counts = ("n", "held")

    accuracy: Estimate
    """Accuracy of the classifier on held-out rows; an estimate."""
    p_value: Estimate
    """P-value of the test: probability of an accuracy as high if samples have the distribution of the data; exact."""
    total_variation: Estimate
    """2 accuracy - 1: a lower bound of the total variation distance between samples and data, in expectation."""
    n: int
    """Number of data, and equally of samples, that the classifier is trained on (a fifth of them for validation)."""
    held: int
    """Number of data, and equally of samples, that the classifier is evaluated on."""

    @property
    def title(self) -> str:
        return f"Classifier two-sample test ({self.held} held-out samples and data)"

    def rows(self) -> Iterator[Row]:
        return self.described(
            accuracy="classifier accuracy: 1/2 for samples of the distribution of the data",
            p_value="probability of an accuracy as high by chance, if the distributions are equal",
            total_variation="2 accuracy - 1: a lower bound on this distance",
        )


def two_sample(real: Tensor, fake: Tensor, seed: int = 0) -> TwoSample:
    r"""Test whether samples and data have the same distribution, by a classifier (classifier two-sample test).

    The classifier is trained on half of the data and samples and evaluated on the other half, `held` rows of each kind.
    If the distributions are equal, its predictions are independent of the kind: of the a rows that it predicts to be
    data, the number H that are data is hypergeometric, so P(H >= h) is an exact p-value for any classifier (Fisher's
    exact test; the binomial of the paper is its limit). In expectation accuracy <= 1/2 + TV / 2 with TV the total
    variation distance: 2 accuracy - 1 is a lower bound of it, attained by the best classifier.

    Warning: with enough rows any two distributions differ significantly; compare accuracies, not p-values.

    References:
        Revisiting Classifier Two-Sample Tests (Lopez-Paz, Oquab, 2017), https://arxiv.org/abs/1610.06545

    Arguments:
        real: data `(n, *shape)`.
        fake: samples `(m, *shape)`; if n and m differ, the larger set is reduced to the size of the smaller at random.
        seed: seed of the split and of the weights and batches of the classifier.

    Returns:
        TwoSample: accuracy (an estimate), p_value (exact), total_variation (a lower bound in expectation).

    Raises:
        DataError: there are fewer than `FEWEST_TEST_ROWS` rows of a kind, shapes differ, or values are not finite.

    Example:
        >>> found = two_sample(torch.randn(4000, 2), torch.randn(4000, 2) + 5)
        >>> found.accuracy.value > 0.9, found.p_value.kind
        (True, 'exact')
    """
    if real.shape[1:] != fake.shape[1:]:
        raise DataError(f"two_sample: expected samples of shape {list(real.shape[1:])}; got {list(fake.shape[1:])}.")
    n = min(len(real), len(fake))
    if n < FEWEST_TEST_ROWS:
        raise DataError(
            f"two_sample: expected at least {FEWEST_TEST_ROWS} data and samples; got {len(real)} and {len(fake)}."
        )
    orders = [
        torch.randperm(len(x), generator=seeds.generator(seed, seeds.ANALYSIS, i)) for i, x in ((12, real), (13, fake))
    ]
    sides = [x.float()[order[:n].to(x.device)] for x, order in zip((real, fake), orders, strict=True)]
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
    """Return P(H >= hits), exact, where H is the number of data among `named` rows chosen at random from 2 * held rows.

    Half of the 2 * held rows are data and half are samples, so H is hypergeometric.
    """
    return float(hypergeom.sf(hits - 1, 2 * held, held, named))


def _labelled(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Return data and samples in one tensor, and their labels: 1 for data, 0 for samples."""
    y = torch.cat([torch.ones(len(real), dtype=torch.int64), torch.zeros(len(fake), dtype=torch.int64)])
    return torch.cat([real, fake.to(real.device)]), y.to(real.device)
