"""Data copying: tests of whether samples are closer to training rows than held-out data are."""

import math
from dataclasses import replace
from typing import Annotated, Any

import torch
from scipy.stats import mannwhitneyu, rankdata, tiecorrect
from sklearn.metrics import pairwise_distances_argmin
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate, Figures, exact, proportion, refuse
from pvae.analysis.samples import features, running, sample
from pvae.runs.run import Run
from pvae.util import Progress, seeds, silent

COPYING_ROWS = 5000
"""Largest number of held-out rows that are compared with training rows, and of samples unless these are given."""
COPIED_FROM_ROWS = 100_000
"""Largest number of training rows among which nearest neighbours are searched."""
CLOSE_PROPORTION = 0.01
"""Proportion of held-out rows, the nearest ones, that counts as close to a training row."""
EXACT_TEST_ROWS = 8
"""Largest size of the smaller set, samples or held-out rows, for which the Mann-Whitney p-value is exact."""


class Copying(Figures, eq=False):
    """Distances of samples and of held-out data to training rows; the result of `copying` and `data_copying`."""

    z: Annotated[Estimate, "far below 0: samples are nearer to training rows than held-out data are; above 0: farther"]
    """Mann-Whitney statistic; standard normal if samples have the distribution of the data, negative for copies."""
    p_value: Annotated[Estimate, "probability of a z as low by chance, if samples have the distribution of the data"]
    """One-sided p-value: probability of a z as low if samples have the distribution of the data."""
    share: Annotated[Estimate, "copying.share"]
    """Proportion of samples that are as near to a training row as the nearest `CLOSE_PROPORTION` of held-out rows."""
    nearer: Annotated[Estimate, "copying.nearer"]
    """Proportion of samples nearer to training rows than to as many held-out rows: 1/2 without copying; an estimate."""
    nearest: Tensor
    """Index of the training row nearest to each sample, `(m,)`, int64."""
    distance: Tensor
    """Distance of each sample to its nearest training row, `(m,)`, float64."""
    held_distance: Tensor
    """Distance of each held-out row to its nearest training row, `(h,)`, float64."""
    trained: int
    """Number of training rows among which the nearest was searched."""
    is_mean: bool = False
    """True if the samples are means of p(x | z)."""
    space: str = "the elements of x"
    """Description, in words, of the space in which distances are measured."""

    @property
    def held_share(self) -> float:
        """Proportion of held-out rows that count as close to a training row: `CLOSE_PROPORTION`, or more for ties."""
        return float((self.held_distance <= close(self.held_distance)).double().mean())

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain numbers and strings, for JSON, with the quartiles of the distances."""
        quarters = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
        spread = {"distance": self.distance, "held_distance": self.held_distance}
        quartiles = {name: values.quantile(quarters).tolist() for name, values in spread.items()}
        sizes = {"samples": len(self.distance), "held": len(self.held_distance)}
        return {**sizes, **super().to_dict(), "quartiles": quartiles}


def copying(
    run: Run, split: str = "test", rows: int | None = None, seed: int = 0, *, mean: bool = False,
    samples: sample.Samples | None = None, space: features.Features | None = None, on_progress: Progress = silent,
) -> Copying:  # fmt: skip
    """Test whether the samples of a run are copies of training rows; see `data_copying` for the statistics.

    `z` and `share` are valid for samples of p(x | z) only, which like data include the noise of the likelihood. This
    noise can hide that a mean of p(x | z) is a copy, while means themselves, being without noise, are nearer to all
    rows than data are. `nearer` is valid for both, as it compares the same samples with two kinds of rows: use means
    (`mean`) for the more sensitive test and for pictures, samples for `z`. A feature space (`space`) ignores part of
    the noise.

    Arguments:
        run: a run.
        split: the held-out data: "validation" or "test".
        rows: number of held-out rows, chosen at random, and of samples; default: all, at most `COPYING_ROWS`.
        seed: seed of rows and samples.
        mean: test means of p(x | z) instead of samples.
        samples: samples of the run to test, if they exist already; `mean` is then ignored.
        space: feature space of the distances; default: the elements of x.
        on_progress: called with (rows done, rows in all).

    Returns:
        Copying: estimates; `nearest` are row numbers of `run.data.train`. At most `COPIED_FROM_ROWS` training rows,
        chosen at random, are searched.

    Raises:
        DataError: the split is train or has fewer than two rows, or values are not finite.

    References:
        See `data_copying`.

    Example:
        >>> from pvae.analysis.truths.example import example_run
        >>> found = copying(example_run())
        >>> len(found.distance), 0 <= found.nearer.value <= 1
        (400, True)
    """
    pair, part, train = running.opened(run), run.data.split(split), run.data.train
    refuse(part.name == train.name, "refused.copied_from_train")
    chosen = seeds.subset(len(part), min(rows or COPYING_ROWS, COPYING_ROWS), seed)
    if samples is None:
        samples = sample.sample(run, len(chosen), mean=mean, seed=seed)
    kept = seeds.subset(len(train), features.affordable(COPIED_FROM_ROWS, tuple(train.rows.shape[1:])), seed)
    learnt, held = running.observed_rows(train, kept), running.observed_rows(part, chosen)
    fake = samples.x.reshape(len(samples.x), *pair.frame.x)
    found = data_copying(learnt, held, fake, seed, space=space, on_progress=on_progress)
    return replace(found, nearest=kept[found.nearest], is_mean=samples.is_mean)


def data_copying(
    train: Tensor, held: Tensor, fake: Tensor, seed: int = 0, *, space: features.Features | None = None,
    on_progress: Progress = silent,
) -> Copying:  # fmt: skip
    r"""Test whether samples are nearer to training rows than held-out data are.

    - z: with d(v) the distance of v to its nearest training row, U counts the pairs of a sample and a held-out row in
      which the sample is farther (ties count half). Given the training rows, and if the samples have the distribution
      of the data, all d are independent and identically distributed, and z = (U - mh/2) / sd(U) is standard normal
      (Mann, Whitney), with sd corrected for ties. Copies give z << 0; a model that is too spread out, or adds noise,
      gives z >> 0, so copies with noise are not detected.
    - share: proportion of samples with d at most that of the nearest `CLOSE_PROPORTION` of the held-out rows. A few
      copies among many good samples hardly change z, but raise this.
    - nearer: in a mixture of as many training rows (chosen with the seed) as held-out rows, the proportion of samples
      whose nearest row is a training row. It is 1/2 for samples of any distribution that does not depend on which rows
      were trained on, and larger for copies. The standard error is exact under exchange of the two kinds of rows; it is
      wider if many samples are near to the same row.

    Distances are Euclidean, searched by products of matrices; those returned are float64 for the rows found. For
    integers (bits, counts) the nearest row is exact, else exact up to rounding of squared distances.

    Warning: with enough rows any overfitting is significant; consider the size of share and nearer. The test covers all
    samples together: copies in one region can be balanced by spread in another (the paper divides the space).

    References:
        A Non-Parametric Test to Detect Data-Copying in Generative Models (Meehan, Chaudhuri, Dasgupta, 2020),
        https://arxiv.org/abs/2004.05675
        Holdout-Based Empirical Assessment of Mixed-Type Synthetic Data (Platzer, Reutterer, 2021),
        https://arxiv.org/abs/2104.00635

    Arguments:
        train: training rows `(n, *shape)`.
        held: held-out data, `(h, *shape)`.
        fake: samples `(m, *shape)`.
        seed: seed of the rows and their order behind `nearer`.
        space: feature space of the distances; default: the elements of x.
        on_progress: called with (rows done, rows in all).

    Returns:
        Copying: z, share and nearer are estimates (the error of z is 1, that under the null hypothesis); p_value is
        one-sided, exact for at most 8 rows of a kind without ties, else that of the normal distribution.

    Raises:
        DataError: there are fewer than two rows of a kind, shapes differ, or values are not finite.

    Example:
        >>> train, held = torch.randn(200, 2), torch.randn(200, 2)
        >>> data_copying(train, held, fake=train[:50]).nearer.value > 0.9
        True
    """
    kinds = (train, held, fake)
    refuse(min(map(len, kinds)) < 2 or len({x.shape[1:] for x in kinds}) > 1, "refused.other_rows", kinds=kinds)
    refuse(not all(bool(x.isfinite().all()) for x in kinds), "refused.no_distance")
    train, held, fake = (x.flatten(1) if space is None else space.embed(x) for x in kinds)
    total = len(fake) + len(held)
    nearest, distance = nearest_of(fake, train)
    on_progress(len(fake), total)
    held_distance = nearest_of(held, train)[1]
    on_progress(total, total)
    z, p_value = _farther(distance, held_distance)
    share, nearer = _share(distance, held_distance), _nearer(train, held, fake, seed)
    where = "the elements of x" if space is None else space.note
    return Copying(z, p_value, share, nearer, nearest, distance, held_distance, len(train), space=where)


def close(held_distance: Tensor) -> float:
    """Return the `CLOSE_PROPORTION` quantile of the distances of held-out rows to their nearest training rows."""
    return float(held_distance.kthvalue(math.ceil(CLOSE_PROPORTION * len(held_distance))).values)


def nearest_of(points: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Return index and Euclidean distance, float64, of the row of `among` `(n, F)` nearest to each point `(m, F)`."""
    loc = among.mean(0).round()  # integers stay integers, so their products are exact
    centred = ((rows - loc).numpy() for rows in (points.to(among), among))
    found = torch.from_numpy(pairwise_distances_argmin(*centred))
    return found, (points.double() - among[found].double()).square().sum(1).sqrt()


def _share(distance: Tensor, held: Tensor) -> Estimate:
    """Return the proportion of samples as near to a training row as the nearest `CLOSE_PROPORTION` of held-out rows.

    The limit is that of the c nearest of h held-out rows, so that the proportion p of samples below it moves with it:
    by p sqrt((1 - c / h) / c) where it is in proportion to that of held-out rows, in addition to its own error.
    """
    limit = close(held)
    found, count = proportion(distance <= limit), int((held <= limit).sum())
    p = (found.value * len(distance) + 1) / (len(distance) + 2)
    return replace(found, standard_error=math.hypot(found.standard_error, p * math.sqrt(1 / count - 1 / len(held))))


def _farther(distance: Tensor, held: Tensor) -> tuple[Estimate, Estimate]:
    """Return the standardised Mann-Whitney statistic z of samples against held-out rows, and its one-sided p-value."""
    m, h = len(distance), len(held)
    ties = float(tiecorrect(rankdata(torch.cat([distance, held]).numpy())))
    if not ties:  # all distances are the same
        return Estimate(0.0, 1.0, "estimate"), exact(1.0)
    method = "exact" if min(m, h) <= EXACT_TEST_ROWS and ties == 1 else "asymptotic"
    tested = mannwhitneyu(distance.numpy(), held.numpy(), alternative="less", method=method)
    z = (float(tested.statistic) - m * h / 2) / math.sqrt(m * h * (m + h + 1) / 12 * ties)
    p = float(tested.pvalue)
    return Estimate(z, 1.0, "estimate"), exact(p) if method == "exact" else Estimate(p, note="of the normal")


def _nearer(train: Tensor, held: Tensor, fake: Tensor, seed: int) -> Estimate:
    """Return the proportion of samples whose nearest row is a training row, among as many training as held-out rows.

    The rows are in random order, so that ties go to either kind. With c_r samples nearest to row r, and L_r = 1 for h
    of the 2h rows, sum_r c_r L_r / m has the variance of sampling without replacement.
    """
    half = min(len(train), len(held))
    generator = seeds.generator(seed, seeds.ANALYSIS, 15)
    kept = [torch.randperm(len(rows), generator=generator)[:half] for rows in (train, held)]
    order = torch.randperm(2 * half, generator=generator)
    found, _ = nearest_of(fake, torch.cat([train[kept[0]], held[kept[1]].to(train)])[order])
    counts = found.bincount(minlength=2 * half).double() / len(fake)
    variance = (counts - 1 / (2 * half)).square().sum() * half / (2 * half - 1) / 2
    return Estimate(float((order[found] < half).double().mean()), float(variance.sqrt()), "estimate")
