"""The classifier two-sample test: can a classifier tell samples from data it has not seen?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import hypergeom
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate, exact
from pvae.analysis.figures.table import Figures, Row
from pvae.analysis.samples.distances import Distances, distances
from pvae.analysis.samples.features import CLASSES, Features, affordable, classify, features, in_chunks
from pvae.analysis.samples.fidelity import NEIGHBOURS, Fidelity, among
from pvae.analysis.samples.generate import Samples, opened, sample
from pvae.analysis.samples.sharpness import relative_sharpness, sharpness
from pvae.errors import DataError, DeclarationError
from pvae.runs.run import Run
from pvae.util import seeds

FEWEST = 8
"""Fewest rows of each kind that are split in four."""
MOST = 10_000
"""Most rows of each kind that a run's samples are compared on."""
MOST_TRAINED = 100_000
"""Most training rows that features are learnt from."""
SHARP = 1000
"""Means of p(x | z) whose sharpness is taken beside that of the samples."""


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
class SampleQuality(Figures):
    """Samples of a run beside its data: the two-sample test, how they lie among each other, distances, sharpness."""

    test: TwoSample
    fidelity: Fidelity
    distances: Distances
    split: str
    is_mean: bool = False
    """Whether the samples are means of p(x | z)."""
    sharpness: Estimate | None = None
    """Of the samples by that of data; None where data are no images."""
    sharpness_of_means: Estimate | None = None
    """The same of means of p(x | z); None where the samples are means, or the likelihood has none."""

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
        yield from self.distances.rows()
        yield "sharpness", self.sharpness, "of samples by that of data: below 1 blurred, above 1 noisy"
        yield (
            "sharpness_of_means",
            self.sharpness_of_means,
            "of means of p(x | z), which have no noise, by that of data",
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """See `Figures.remarks`."""
        asked = f"the classifier of the test was asked about {self.test.held} of each kind"
        units = "distances are squared, in units of the features; their floor is no bound"
        return (*self.fidelity.remarks, f"k = {self.fidelity.k}; {asked}", units)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        sharp = {"samples": self.sharpness, "means": self.sharpness_of_means}
        return {
            "split": self.split,
            "is_mean": self.is_mean,
            "two_sample": self.test.to_dict(),
            "fidelity": self.fidelity.to_dict(),
            "distances": self.distances.to_dict(),
            "sharpness": {name: None if e is None else e.to_dict() for name, e in sharp.items()},
        }


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


STEPS = ("samples", "two-sample test", "feature space", "neighbours", "distances")


def sample_quality(
    run: Run,
    split: str = "test",
    rows: int | None = None,
    seed: int = 0,
    *,
    mean: bool = False,
    k: int = NEIGHBOURS,
    space: Features | None = None,
    fake: Samples | None = None,
    on_progress: Callable[[int, int, str], None] = lambda _done, _total, _what: None,
) -> SampleQuality:
    """Samples of a run beside the data of a split, of any model that can be sampled.

    A classifier's two-sample test (`two_sample`), neighbours (`fidelity`) and distances (`distances`) in a feature
    space, and, of images, sharpness (`relative_sharpness`).

    Arguments:
        run: a run.
        split: the data: "train", "validation" or "test".
        rows: compare this many data, drawn at random, with as many samples; default: all, at most `MOST`.
        seed: of rows, samples, and of the classifiers.
        mean: take means of p(x | z) for samples: what the model draws without the likelihood's own noise.
        k: which neighbour `fidelity` reaches.
        space: the feature space; default: `space_of` the run.
        fake: samples of the run, where they are there already; `mean` then says nothing.
        on_progress: called with (steps done, steps in all, what comes next).

    Returns:
        SampleQuality.

    Raises:
        DataError: the split has too few rows.
    """
    part, pair = run.data.split(split), opened(run)
    chosen = seeds.subset(len(part), min(rows or MOST, MOST), seed)
    real = part.observed(part.rows[chosen.to(part.rows.device)]).cpu()
    on_progress(0, len(STEPS), STEPS[0])
    if fake is None:
        fake = sample(run, len(real), mean=mean, seed=seed)
    drawn = fake.x.reshape(len(fake.x), *pair.frame.x)
    on_progress(1, len(STEPS), STEPS[1])
    test = two_sample(real, drawn, seed)
    on_progress(2, len(STEPS), STEPS[2])
    space = space_of(run, seed) if space is None else space
    on_progress(3, len(STEPS), STEPS[3])
    of_data, of_samples = space.embed(real), space.embed(drawn)
    near = among(of_data, of_samples, k, space)
    on_progress(4, len(STEPS), STEPS[4])
    far = distances(of_data, of_samples, seed)
    means = None if fake.is_mean or sharpness(drawn[:1]) is None else _means(run, min(len(real), SHARP), seed)
    found = SampleQuality(
        test,
        near,
        far,
        split,
        fake.is_mean,
        relative_sharpness(drawn, real),
        None if means is None else relative_sharpness(means.reshape(len(means), *pair.frame.x), real),
    )
    on_progress(len(STEPS), len(STEPS), "")
    return found


def space_of(run: Run, seed: int = 0) -> Features:
    """`features` of a run's training rows and their labels; of more than `MOST_TRAINED`, of as many by the seed.

    Without labels, with one alone, or with more than `CLASSES` (numbers of rows, say): principal components.
    """
    train = run.data.train
    most = affordable(MOST_TRAINED, tuple(train.rows.shape[1:]))
    kept = seeds.subset(len(train), most, seed).to(train.rows.device)
    x = train.observed(train.rows[kept]).cpu()
    if train.y is None:
        return features(x, None, None, seed)
    there, labels = torch.unique(train.y[kept].cpu(), return_inverse=True)
    if not 1 < len(there) <= CLASSES:
        return features(x, None, None, seed)
    own = run.data.label_names
    return features(x, labels, tuple(own[i] if own and 0 <= i < len(own) else str(i) for i in there.tolist()), seed)


def _means(run: Run, n: int, seed: int) -> Tensor | None:
    """Means of p(x | z) `(n, ...)`; None of a likelihood without one."""
    try:
        return sample(run, n, mean=True, seed=seed).x
    except DeclarationError:
        return None
