"""Quality of samples: classifier two-sample test, and all comparisons of the samples of a run with data."""

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any

import torch
from scipy.stats import hypergeom
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate, Figures, Row, exact, over_rows, proportion, refuse, text
from pvae.analysis.samples import running, sample
from pvae.analysis.samples.distances import Distances, distances
from pvae.analysis.samples.features import MAX_CLASSES, Features, affordable, classify, features, in_chunks, sharpness
from pvae.analysis.samples.fidelity import FIDELITY_NEIGHBOURS, Fidelity, among, ratio_of
from pvae.errors import DataError, DeclarationError
from pvae.runs.run import Run
from pvae.util import StageProgress, plain, seeds, silent

QUALITY_ROWS = 10_000
"""Largest number of data, and of samples, that are compared."""
FEATURE_TRAINING_ROWS = 100_000
"""Largest number of training rows that a feature space is learned from."""
SHARPNESS_ROWS = 1000
"""Largest number of means of p(x | z) whose sharpness is measured."""
QUALITY_STAGES = ("samples", "two-sample test", "feature space", "neighbours", "distances")
"""Names of the steps of `sample_quality`, as its progress shows them."""
FEWEST_TEST_ROWS = 8
"""Smallest number of data, and of samples, that the test accepts."""


class TwoSample(Figures):
    """Accuracy of a classifier between samples and data, on held-out rows; the result of `two_sample`."""

    accuracy: Annotated[Estimate, "classifier accuracy: 1/2 for samples of the distribution of the data"]
    """Accuracy of the classifier on held-out rows; an estimate."""
    p_value: Annotated[Estimate, "probability of an accuracy as high by chance, if the distributions are equal"]
    """P-value of the test: probability of an accuracy as high if samples have the distribution of the data; exact."""
    total_variation: Annotated[Estimate, "2 accuracy - 1: a lower bound on this distance"]
    """2 accuracy - 1: a lower bound of the total variation distance between samples and data, in expectation."""
    n: int
    """Number of data, and equally of samples, that the classifier is trained on (a fifth of them for validation)."""
    held: int
    """Number of data, and equally of samples, that the classifier is evaluated on."""


def two_sample(real: Tensor, fake: Tensor, seed: int = 0) -> TwoSample:
    r"""Test whether samples and data have the same distribution, by a classifier (classifier two-sample test).

    The classifier is trained on half of the data and samples and evaluated on the other half, `held` rows of each kind.
    If the distributions are equal, its predictions are independent of the kind: of the a rows that it predicts to be
    data, the number H that are data is hypergeometric, so P(H >= h) is an exact p-value for any classifier (Fisher's
    exact test; the binomial of the paper is its limit). In expectation accuracy <= 1/2 + TV / 2 with TV the total
    variation distance: 2 accuracy - 1 is a lower bound of it, attained by the best classifier.

    The standard error of the accuracy is that of a given classifier, from the proportions of data and of samples that
    it calls data: sqrt(v_1 + v_2) / 2 of their variances.

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
    refuse(real.shape[1:] != fake.shape[1:], "refused.other_shape", caller="two_sample", real=real, fake=fake)
    if (n := min(len(real), len(fake))) < FEWEST_TEST_ROWS:
        raise DataError(text("refused.few_samples", least=FEWEST_TEST_ROWS, real=len(real), fake=len(fake)))
    sides = []
    for i, x in ((12, real), (13, fake)):
        order = torch.randperm(len(x), generator=seeds.generator(seed, seeds.ANALYSIS, i))
        sides.append(x.float()[order[:n].to(x.device)])
    refuse(not all(side.isfinite().all() for side in sides), "refused.infinite_sides")
    half, held = n // 2, n - n // 2
    fitting = half - half // 5
    parts = [[side[:fitting], side[fitting:half], side[half:]] for side in sides]
    (x, y), watched, (asked, truth) = (_labelled(*both) for both in zip(*parts, strict=True))
    called = in_chunks(classify(x, y, 2, seed, watched if len(watched[0]) else None), asked).argmax(1).bool()
    hits, named = int(called[truth.cpu().bool()].sum()), int(called.sum())
    accuracy = (hits + held - (named - hits)) / (2 * held)
    error = math.hypot(*(proportion(part).standard_error for part in called.split(held))) / 2
    variation = Estimate(2 * accuracy - 1, 2 * error, "lower_bound", note="in expectation")
    return TwoSample(Estimate(accuracy, error, "estimate"), exact(by_chance(hits, named, held)), variation, half, held)


def by_chance(hits: int, named: int, held: int) -> float:
    """Return P(H >= hits), exact, where H is the number of data among `named` rows chosen at random from 2 * held rows.

    Half of the 2 * held rows are data and half are samples, so H is hypergeometric.
    """
    return float(hypergeom.sf(hits - 1, 2 * held, held, named))


def _labelled(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Return data and samples in one tensor, and their labels: 1 for data, 0 for samples."""
    y = torch.cat([torch.ones(len(real), dtype=torch.int64), torch.zeros(len(fake), dtype=torch.int64)])
    return torch.cat([real, fake.to(real.device)]), y.to(real.device)


# ---------------------------------------------------------------------- all comparisons


class SampleQuality(Figures):
    """Two-sample test, fidelity, distances and sharpness of samples of a run; the result of `sample_quality`."""

    test: TwoSample
    """Classifier two-sample test between samples and data."""
    fidelity: Fidelity
    """Precision, recall, density and coverage of the samples in the feature space."""
    distances: Distances
    """Fréchet and kernel distance between samples and data in the feature space."""
    split: str
    """Name of the data split that the samples are compared with."""
    is_mean: bool = False
    """True if the samples are means of p(x | z)."""
    sharpness: Annotated[Estimate | None, "of samples divided by that of data: below 1 blurred, above 1 noisy"] = None
    """Sharpness of samples divided by that of data; None if data are not images."""
    sharpness_of_means: Annotated[Estimate | None, "quality.sharpness_of_means"] = None
    """Sharpness of means of p(x | z) divided by that of data.

    None if the samples are means already, if the likelihood has no mean, or if data are not images.
    """

    def rows(self) -> Iterator[Row]:
        yield from self.test.rows()
        yield from self.fidelity.rows()
        yield from self.distances.rows()
        yield from super().rows()

    def to_dict(self) -> dict[str, Any]:
        sharp = {"samples": self.sharpness, "means": self.sharpness_of_means}
        parts = {"two_sample": self.test, "fidelity": self.fidelity, "distances": self.distances, "sharpness": sharp}
        return {"split": self.split, "is_mean": self.is_mean, **plain(parts)}


def sample_quality(
    run: Run, split: str = "test", rows: int | None = None, seed: int = 0, *, mean: bool = False,
    k: int = FIDELITY_NEIGHBOURS, space: Features | None = None, fake: sample.Samples | None = None,
    on_progress: StageProgress = silent,
) -> SampleQuality:  # fmt: skip
    """Compare samples of a run with the data of a split, for any model that can be sampled.

    This runs the classifier two-sample test (`two_sample`), precision and coverage by neighbours (`fidelity`) and
    distances (`distances`) in a feature space, and for images sharpness (`relative_sharpness`).

    References:
        See `two_sample`, `fidelity`, `frechet` and `kernel_distance`.

    Arguments:
        run: a run.
        split: the data: "train", "validation" or "test".
        rows: number of data, chosen at random, and of samples; default: all, at most `QUALITY_ROWS`.
        seed: seed of rows, samples and classifiers.
        mean: compare means of p(x | z), which lack the noise of the likelihood, instead of samples.
        k: number of the nearest neighbour whose distance is the radius of the balls of `fidelity`.
        space: feature space; default: the one that `space_of` learns from the training rows of the run.
        fake: samples of the run, if they exist already; `mean` is then ignored.
        on_progress: called with (steps done, steps in all, name of the next step).

    Returns:
        SampleQuality: proportions and distances; estimates, but for an exact p-value and bounds that say so.

    Raises:
        DataError: the split has too few rows.

    Example:
        >>> from pvae.analysis.truths.example import example_run
        >>> found = sample_quality(example_run(), k=3)
        >>> found.fidelity.n, 0 <= found.test.accuracy.value <= 1
        (400, True)
    """
    part, pair = run.data.split(split), running.opened(run)
    real = running.observed_rows(part, seeds.subset(len(part), min(rows or QUALITY_ROWS, QUALITY_ROWS), seed))
    on_progress(0, len(QUALITY_STAGES), QUALITY_STAGES[0])
    if fake is None:
        fake = sample.sample(run, len(real), mean=mean, seed=seed)
    drawn = fake.x.reshape(len(fake.x), *pair.frame.x)
    on_progress(1, len(QUALITY_STAGES), QUALITY_STAGES[1])
    test = two_sample(real, drawn, seed)
    on_progress(2, len(QUALITY_STAGES), QUALITY_STAGES[2])
    space = space_of(run, seed) if space is None else space
    on_progress(3, len(QUALITY_STAGES), QUALITY_STAGES[3])
    of_data, of_samples = space.embed(real), space.embed(drawn)
    near = among(of_data, of_samples, k, space)
    on_progress(4, len(QUALITY_STAGES), QUALITY_STAGES[4])
    far = distances(of_data, of_samples, seed)
    of_means = None
    if not fake.is_mean and sharpness(drawn[:1]) is not None:
        with suppress(DeclarationError):  # the likelihood has no mean
            means = sample.sample(run, min(len(real), SHARPNESS_ROWS), mean=True, seed=seed).x
            of_means = relative_sharpness(means.reshape(len(means), *pair.frame.x), real)
    of_draws = relative_sharpness(drawn, real)
    on_progress(len(QUALITY_STAGES), len(QUALITY_STAGES), "")
    return SampleQuality(test, near, far, split, fake.is_mean, of_draws, of_means)


def relative_sharpness(samples: Tensor, data: Tensor) -> Estimate | None:
    """Return the mean sharpness of samples `(m, *shape)` divided by that of data `(n, *shape)`, an estimate.

    It is 1 for samples from the distribution of the data, and lower for blurred ones. None where `sharpness` is None,
    and for data of zero sharpness.
    """
    made, real = sharpness(samples), sharpness(data)
    return None if made is None or real is None or not bool(real.any()) else ratio_of(over_rows(made), over_rows(real))


def space_of(run: Run, seed: int = 0) -> Features:
    """Return the feature space learned by `features` from at most `FEATURE_TRAINING_ROWS` training rows of a run.

    With 2 to `MAX_CLASSES` labels it is that of a classifier of the labels, otherwise principal components.
    Rows without a label are left out of the classifier's.
    """
    train = run.data.train
    kept = seeds.subset(len(train), affordable(FEATURE_TRAINING_ROWS, tuple(train.rows.shape[1:])), seed)
    x = running.observed_rows(train, kept)
    if (y := train.labels) is not None:
        y = y[kept.to(y.device)].cpu()
        there, labels = torch.unique(y[~y.isnan()].long(), return_inverse=True)
        if 1 < len(there) <= MAX_CLASSES:
            own = run.data.label_names
            names = tuple(own[i] if own and 0 <= i < len(own) else str(i) for i in there.tolist())
            return features(x[~y.isnan().to(x.device)], labels, names, seed)
    return features(x, seed=seed)
