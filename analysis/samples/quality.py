"""Quality of the samples of a run: two-sample test, precision and coverage, distances, sharpness."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.figures.table import Figures, Row
from pvae.analysis.samples.distances import Distances, distances
from pvae.analysis.samples.features import MAX_CLASSES, Features, affordable, features
from pvae.analysis.samples.fidelity import FIDELITY_NEIGHBOURS, Fidelity, among
from pvae.analysis.samples.running import observed_rows, opened
from pvae.analysis.samples.sample import Samples, sample
from pvae.analysis.samples.sharpness import relative_sharpness, sharpness
from pvae.analysis.samples.two_sample import TwoSample, two_sample
from pvae.errors import DeclarationError
from pvae.runs.run import Run
from pvae.util import seeds
from pvae.util.progress import StageProgress, silent

QUALITY_ROWS = 10_000
"""Largest number of data, and of samples, that are compared."""
FEATURE_TRAINING_ROWS = 100_000
"""Largest number of training rows that a feature space is learned from."""
SHARPNESS_ROWS = 1000
"""Largest number of means of p(x | z) whose sharpness is measured."""
QUALITY_STAGES = ("samples", "two-sample test", "feature space", "neighbours", "distances")
"""Names of the steps of `sample_quality`, as its progress shows them."""


@dataclass(frozen=True, repr=False)
class SampleQuality(Figures):
    """Two-sample test, fidelity, distances and sharpness of samples of a run; the result of `sample_quality`."""

    unit = "proportion"

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
    sharpness: Estimate | None = None
    """Sharpness of samples divided by that of data; None if data are not images."""
    sharpness_of_means: Estimate | None = None
    """Sharpness of means of p(x | z) divided by that of data.

    None if the samples are means already, if the likelihood has no mean, or if data are not images.
    """

    @property
    def title(self) -> str:
        return f"Samples and {self.split} data: {self.fidelity.m} samples, {self.fidelity.n} data"

    def rows(self) -> Iterator[Row]:
        yield from self.test.rows()
        yield from self.fidelity.rows()
        yield from self.distances.rows()
        yield from self.described(
            sharpness="of samples divided by that of data: below 1 blurred, above 1 noisy",
            sharpness_of_means="of means of p(x | z), which have no noise, divided by that of data",
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        asked = f"the classifier was evaluated on {self.test.held} rows of each kind"
        units = "distances are squared, in units of the features; their floor is not a bound"
        return (*self.fidelity.remarks, f"k = {self.fidelity.k}; {asked}", units)

    def to_dict(self) -> dict[str, Any]:
        sharp = {"samples": self.sharpness, "means": self.sharpness_of_means}
        return {
            "split": self.split,
            "is_mean": self.is_mean,
            "two_sample": self.test.to_dict(),
            "fidelity": self.fidelity.to_dict(),
            "distances": self.distances.to_dict(),
            "sharpness": {name: None if e is None else e.to_dict() for name, e in sharp.items()},
        }


def sample_quality(
    run: Run,
    split: str = "test",
    rows: int | None = None,
    seed: int = 0,
    *,
    mean: bool = False,
    k: int = FIDELITY_NEIGHBOURS,
    space: Features | None = None,
    fake: Samples | None = None,
    on_progress: StageProgress = silent,
) -> SampleQuality:
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
    part, pair = run.data.split(split), opened(run)
    chosen = seeds.subset(len(part), min(rows or QUALITY_ROWS, QUALITY_ROWS), seed)
    real = observed_rows(part, chosen)
    on_progress(0, len(QUALITY_STAGES), QUALITY_STAGES[0])
    if fake is None:
        fake = sample(run, len(real), mean=mean, seed=seed)
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
    means = None if fake.is_mean or sharpness(drawn[:1]) is None else _means(run, min(len(real), SHARPNESS_ROWS), seed)
    found = SampleQuality(
        test,
        near,
        far,
        split,
        fake.is_mean,
        relative_sharpness(drawn, real),
        None if means is None else relative_sharpness(means.reshape(len(means), *pair.frame.x), real),
    )
    on_progress(len(QUALITY_STAGES), len(QUALITY_STAGES), "")
    return found


def space_of(run: Run, seed: int = 0) -> Features:
    """Return the feature space learned by `features` from at most `FEATURE_TRAINING_ROWS` training rows of a run.

    With 2 to `MAX_CLASSES` labels it is that of a classifier of the labels, otherwise principal components.
    """
    train = run.data.train
    most = affordable(FEATURE_TRAINING_ROWS, tuple(train.rows.shape[1:]))
    kept = seeds.subset(len(train), most, seed)
    x = observed_rows(train, kept)
    if train.y is None:
        return features(x, None, None, seed)
    there, labels = torch.unique(train.y[kept.to(train.y.device)].cpu(), return_inverse=True)
    if not 1 < len(there) <= MAX_CLASSES:
        return features(x, None, None, seed)
    own = run.data.label_names
    return features(x, labels, tuple(own[i] if own and 0 <= i < len(own) else str(i) for i in there.tolist()), seed)


def _means(run: Run, n: int, seed: int) -> Tensor | None:
    """Return means of p(x | z) for n samples z of the prior, `(n, ...)`; None if the likelihood has no mean."""
    try:
        return sample(run, n, mean=True, seed=seed).x
    except DeclarationError:
        return None
