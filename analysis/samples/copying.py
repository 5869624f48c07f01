"""Are samples copies of training rows? Their nearest ones, and tests against data that were not trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.stats import mannwhitneyu, rankdata, tiecorrect
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate, exact
from pvae.analysis.figures.table import Figures, Row
from pvae.analysis.samples.features import Features, affordable
from pvae.analysis.samples.fidelity import BLOCK, mean_of
from pvae.analysis.samples.generate import Samples, opened, sample
from pvae.errors import DataError
from pvae.runs.run import Run
from pvae.util import seeds

MOST = 5000
"""Most held-out rows, and samples, unless samples are given."""
MOST_TRAINED = 100_000
"""Most training rows that are looked through."""
CLOSE = 0.01
"""Share of held-out rows that counts as close to a training row."""
FEW = 8
"""Most rows of a kind for which the p-value counts all orders of distances."""
WIDTH = 8192
"""Training rows in one block of distances."""


@dataclass(frozen=True, repr=False, eq=False)
class Copying(Figures):
    """How near samples come to training rows, beside how near held-out data come."""

    z: Estimate
    p_value: Estimate
    share: Estimate
    nearer: Estimate
    nearest: Tensor
    """Row of train that is nearest to each sample, `(m,)`, int64."""
    distance: Tensor
    """How far it is, `(m,)`, float64."""
    held_distance: Tensor
    """How far the nearest training row is from each held-out one, `(h,)`."""
    trained: int
    """Training rows that were looked through."""
    is_mean: bool = False
    """Whether the samples are means of p(x | z)."""
    space: str = "the elements of x"
    """Where distances are taken."""

    @property
    def held_share(self) -> float:
        """Share of held-out rows as near to a training row as `share` counts: `CLOSE`, or more where distances tie."""
        return float((self.held_distance <= close(self.held_distance)).double().mean())

    @property
    def title(self) -> str:
        """See `Figures.title`."""
        m, h = len(self.distance), len(self.held_distance)
        return f"Copies of training rows ({m} samples, {h} held-out data, {self.trained} training rows)"

    @property
    def unit(self) -> str:
        """See `Figures.unit`."""
        return "share"

    def rows(self) -> Iterator[Row]:
        """See `Figures.rows`."""
        yield "z", self.z, "far below 0: nearer to training rows than held-out data are; above 0: farther"
        yield "p_value", self.p_value, "probability of as low a z by chance, if samples are of the data's own law"
        yield "share", self.share, f"of samples as near to a training row as the nearest {self.held_share:.3f} of data"
        yield (
            "nearer",
            self.nearer,
            "share of samples nearer to training rows than to as many held-out ones: 1/2 is none",
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """See `Figures.remarks`."""
        unlike = ("samples are means of p(x | z), without noise: z and share compare unlike things; read nearer",)
        return (f"distances in {self.space}", *(unlike if self.is_mean else ()))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON: of distances the quartiles."""
        quarters = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
        spread = {"distance": self.distance, "held_distance": self.held_distance}
        return {
            "samples": len(self.distance), "held": len(self.held_distance), "trained": self.trained,
            "is_mean": self.is_mean, "space": self.space, "held_share": self.held_share, **self.figures(),
            "quartiles": {name: values.quantile(quarters).tolist() for name, values in spread.items()},
        }  # fmt: skip


def copying(
    run: Run,
    split: str = "test",
    rows: int | None = None,
    seed: int = 0,
    *,
    mean: bool = False,
    samples: Samples | None = None,
    space: Features | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Copying:
    """Look for copies of training rows among the samples of a run; see `data_copying` for what is measured.

    Which samples: `z` and `share` are fair for draws of p(x | z) alone, for only those are of the law of data, noise
    included. But the noise of draws hides what the means have copied, while means, which have none, are nearer to
    everything than data are. `nearer` is fair for both, as it asks the same samples of two kinds of rows: take means
    (`mean`) for the keener test and for pictures, draws for z. A feature space (`space`) looks past part of the noise.

    Arguments:
        run: a run.
        split: the held-out data: "validation" or "test".
        rows: compare with this many of them, drawn at random, and as many samples; default: all, at most `MOST`.
        seed: of rows and samples.
        mean: sample means of p(x | z).
        samples: those of the run, where they are there already; `mean` then says nothing.
        space: where distances are taken; default: the elements of x.
        on_progress: called with (rows done, rows in all).

    Returns:
        Copying; `nearest` are row numbers of `run.data.train`. Of more than `MOST_TRAINED` training rows as many are
        looked through, drawn at random.

    Raises:
        DataError: the split is train, or has fewer than two rows; values that are not finite.
    """
    pair, part, train = opened(run), run.data.split(split), run.data.train
    if part.name == train.name:
        raise DataError("copying: expected data that the run was not trained on; got train. Take validation or test.")
    chosen = seeds.subset(len(part), min(rows or MOST, MOST), seed)
    if samples is None:
        samples = sample(run, len(chosen), mean=mean, seed=seed)
    kept = seeds.subset(len(train), affordable(MOST_TRAINED, tuple(train.rows.shape[1:])), seed)
    found = data_copying(
        train.observed(train.rows[kept.to(train.rows.device)]).cpu(),
        part.observed(part.rows[chosen.to(part.rows.device)]).cpu(),
        samples.x.reshape(len(samples.x), *pair.frame.x),
        seed,
        space=space,
        on_progress=on_progress,
    )
    return replace(found, nearest=kept[found.nearest], is_mean=samples.is_mean)


def data_copying(
    train: Tensor,
    held: Tensor,
    fake: Tensor,
    seed: int = 0,
    *,
    space: Features | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Copying:
    r"""Measure how near samples come to training rows, beside held-out data.

    - z: with d(v) the distance of v to its nearest training row, U counts the pairs of a sample and a held-out row in
      which the sample is farther (ties by half). Given the training rows, the d of samples and of held-out data are
      independent and of one law, if the samples are of the data's: z = (U - mh/2) / sd(U) is then standard normal
      (Mann, Whitney), its sd corrected for ties. Copies have z << 0; a model that spreads too far z >> 0, and so has
      noise: copies under noise are not found.
    - share: of samples with d no larger than that of the nearest `CLOSE` of the held-out rows; a few copies among many
      good samples leave z alone and show here.
    - nearer: of as many training rows (by the seed) and held-out ones, mixed, how often is the nearest to a sample a
      training row? Unless the model knows which rows it was trained on, each is as likely as not, whatever law the
      samples are of: 1/2, and more for copies. The standard error is the exact one under that exchange of rows, which
      many samples near to one and the same row widen.

    Distances are Euclidean, by single-precision products in blocks; those returned are float64 of the rows found. For
    whole numbers (bits, counts) the nearest is exact, else up to rounding of squared distances.

    Warning: with enough rows any overfit shows in a p-value; read how large share and nearer are. One test over all
    samples: copies in one region can be balanced by spread in another (the paper cuts the space in cells).

    References:
        A Non-Parametric Test to Detect Data-Copying in Generative Models (Meehan, Chaudhuri, Dasgupta, 2020),
        https://arxiv.org/abs/2004.05675
        Holdout-Based Empirical Assessment of Mixed-Type Synthetic Data (Platzer, Reutterer, 2021),
        https://arxiv.org/abs/2104.00635

    Arguments:
        train: training rows `(n, *shape)`.
        held: data not trained on, `(h, *shape)`.
        fake: samples `(m, *shape)`.
        seed: of the training rows and the order behind `nearer`.
        space: where distances are taken; default: the elements of x.
        on_progress: called with (rows done, rows in all).

    Returns:
        Copying: z, share and nearer are estimates (the error of z is 1, that of one law); p_value is one-sided, exact
        for at most 8 rows of a kind without ties, else of the normal.

    Raises:
        DataError: fewer than two rows of a kind, rows of different shapes, or values that are not finite.
    """
    kinds = (train, held, fake)
    if min(map(len, kinds)) < 2 or len({tuple(x.shape[1:]) for x in kinds}) > 1:
        shapes = ", ".join(str(list(x.shape)) for x in kinds)
        raise DataError(
            f"copying: expected at least two rows of train, held-out data and samples each, of one shape; got {shapes}."
        )
    if not all(bool(x.isfinite().all()) for x in kinds):
        raise DataError(
            "copying: expected finite numbers; got NaN or infinity. Rows with missing values have no distance."
        )
    train, held, fake = (x.flatten(1) if space is None else space.embed(x) for x in kinds)
    total = len(fake) + len(held)
    nearest, distance = nearest_of(fake, train)
    on_progress(len(fake), total)
    held_distance = nearest_of(held, train)[1]
    on_progress(total, total)
    return Copying(
        *_farther(distance, held_distance),
        share=mean_of((distance <= close(held_distance)).double()),
        nearer=_nearer(train, held, fake, seed),
        nearest=nearest,
        distance=distance,
        held_distance=held_distance,
        trained=len(train),
        space="the elements of x" if space is None else space.note,
    )


def close(held_distance: Tensor) -> float:
    """The distance that the nearest `CLOSE` of held-out rows keep."""
    return float(held_distance.kthvalue(math.ceil(CLOSE * len(held_distance))).values)


def nearest_of(points: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest of rows `(n, F)` to each point `(m, F)`: its number `(m,)`, and how far it is, `(m,)`, float64.

    Distances are compared in single precision, from |b|^2 - 2 <a, b>; that of the best of every block then in float64.
    """
    loc = among.mean(0).round()  # whole numbers stay whole: their products are exact
    found = torch.zeros(len(points), dtype=torch.int64)
    least = torch.full((len(points),), math.inf, dtype=torch.float64)
    for start in range(0, len(among), WIDTH):
        block = among[start : start + WIDTH]
        b = (block - loc).float()
        for top in range(0, len(points), BLOCK // WIDTH):
            rows = slice(top, top + BLOCK // WIDTH)
            a = (points[rows] - loc).float()
            best = torch.addmm(b.square().sum(1), a, b.T, alpha=-2).argmin(1)
            distance = (points[rows].double() - block[best].double()).square().sum(1).sqrt()
            is_nearer = distance < least[rows]
            least[rows] = torch.where(is_nearer, distance, least[rows])
            found[rows] = torch.where(is_nearer, best + start, found[rows])
    return found, least


def _farther(distance: Tensor, held: Tensor) -> tuple[Estimate, Estimate]:
    """z of U, and the probability of one as low."""
    m, h = len(distance), len(held)
    ties = float(tiecorrect(rankdata(torch.cat([distance, held]).numpy())))
    if not ties:  # all distances are the same
        return Estimate(0.0, 1.0, "estimate"), exact(1.0)
    method = "exact" if min(m, h) <= FEW and ties == 1 else "asymptotic"
    tested = mannwhitneyu(distance.numpy(), held.numpy(), alternative="less", method=method)
    z = (float(tested.statistic) - m * h / 2) / math.sqrt(m * h * (m + h + 1) / 12 * ties)
    p = float(tested.pvalue)
    return Estimate(z, 1.0, "estimate"), exact(p) if method == "exact" else Estimate(p, note="of the normal")


def _nearer(train: Tensor, held: Tensor, fake: Tensor, seed: int) -> Estimate:
    """Share of samples whose nearest row is a training one, among equally many of both kinds.

    In random order, so that ties fall to either. Under exchange of rows c_r samples each, L_r = 1 for h of the 2h rows,
    share = sum_r c_r L_r / m has the variance of a draw without replacement.
    """
    half = min(len(train), len(held))
    generator = torch.Generator().manual_seed(seeds.mix(seed, seeds.ANALYSIS, 15))
    kept = [torch.randperm(len(rows), generator=generator)[:half] for rows in (train, held)]
    order = torch.randperm(2 * half, generator=generator)
    mixed = torch.cat([train[kept[0]], held[kept[1]].to(train)])[order]
    found, _ = nearest_of(fake, mixed)
    counts = found.bincount(minlength=2 * half).double() / len(fake)
    variance = (counts - 1 / (2 * half)).square().sum() * half / (2 * half - 1) / 2
    return Estimate(float((order[found] < half).double().mean()), float(variance.sqrt()), "estimate")
