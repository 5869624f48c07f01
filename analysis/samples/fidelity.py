"""Precision, recall, density and coverage of samples by nearest neighbours, and the classes of samples and data."""

import math
from collections.abc import Iterator
from dataclasses import field, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate, Figures, Row, jackknife, over_rows, proportion, refuse
from pvae.analysis.samples.features import Features

FIDELITY_NEIGHBOURS = 5
"""Default k: the radius of the ball around a point is the distance to its k-th nearest neighbour."""
LEFT_OUT = 10
"""Number of groups of data, and of samples, that are left out one after another for the errors."""
DISTANCES_PER_BLOCK = 2**23
"""Number of pairwise distances that are computed at a time, which bounds memory."""


class Fidelity(Figures):
    """Precision, recall, density and coverage of samples among data, estimates; the result of `fidelity`."""

    precision: Annotated[Estimate, "proportion of samples within the balls of data: do they look like data?"]
    """Proportion of samples inside at least one of the k-nearest-neighbour balls around data."""
    recall: Annotated[Estimate, "proportion of data within the balls of samples: could the model produce them?"]
    """Proportion of data inside at least one of the k-nearest-neighbour balls around samples."""
    density: Annotated[Estimate, "fidelity.density"]
    """Number of k-nearest-neighbour balls around data that contain a sample, averaged over samples, divided by k."""
    coverage: Annotated[Estimate, "fidelity.coverage"]
    """Proportion of data whose k-nearest-neighbour ball contains at least one sample."""
    n: int
    """Number of data."""
    m: int
    """Number of samples."""
    k: int
    """Number k of the nearest neighbour whose distance is the radius of a ball."""
    confidence: Annotated[Estimate | None, "mean probability of the most probable class of samples"] = None
    """Classifier's probability of the most probable class, averaged over samples; None without a classifier."""
    data_confidence: Annotated[Estimate | None, "mean probability of the most probable class of data"] = None
    """Classifier's probability of the most probable class, averaged over data; None without a classifier."""
    shares: dict[str, Estimate] = field(default_factory=dict)
    """Proportion of samples that the classifier assigns to each class, by class name; empty without a classifier."""
    data_shares: dict[str, Estimate] = field(default_factory=dict)
    """Proportion of data that the classifier assigns to each class, by class name; empty without a classifier."""
    space: str = ""
    """Description, in words, of the feature space in which distances are measured."""

    @property
    def relative_confidence(self) -> Estimate | None:
        """Ratio of the classifier's mean confidence in samples to that in data; None without a classifier."""
        of_samples, of_data = self.confidence, self.data_confidence
        return None if of_samples is None or of_data is None else ratio_of(of_samples, of_data)

    @property
    def expected_coverage(self) -> float:
        """Expected coverage if samples had the distribution of the data; exact, see `expected_coverage`."""
        return expected_coverage(self.n, self.m, self.k)

    def rows(self) -> Iterator[Row]:
        yield from super().rows()
        yield "relative_confidence", self.relative_confidence, "confidence divided by data_confidence"
        for name, share in self.shares.items():
            among = self.data_shares.get(name)
            yield f"share/{name}", share, f"of samples; {float(among):.3f} of the data" if among else "of samples"

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "data_shares": {name: e.to_dict() for name, e in self.data_shares.items()}}


def expected_coverage(n: int, m: int, k: int) -> float:
    """Return the expected coverage of n data by m samples of the same distribution; exact.

    It is 1 - prod_{j<k} (n - 1 - j) / (n + m - 1 - j): a datum is not covered if its k nearest among the other n - 1
    data and the m samples are all data, and all orders of these n + m - 1 points are equally likely. It holds for any
    distribution and space.

    References:
        Reliable Fidelity and Diversity Metrics for Generative Models (Naeem et al., 2020), eq. 8
    """
    return 1 - math.prod((n - 1 - j) / (n + m - 1 - j) for j in range(k))


def fidelity(real: Tensor, fake: Tensor, k: int = FIDELITY_NEIGHBOURS, space: Features | None = None) -> Fidelity:
    """Estimate precision, recall, density and coverage of samples among data.

    With B_k(v) the ball around v that reaches its k-th nearest neighbour among its own kind, data or samples:

    - precision: proportion of samples in the union of B_k(data)
    - recall: proportion of data in the union of B_k(samples)
    - density: mean number of B_k(data) that contain a sample, divided by k; unlike precision it is robust against
      outliers among the data, whose balls are large; it may exceed 1
    - coverage: proportion of data whose B_k contains a sample; unlike recall it is robust against outlying samples

    Distances are Euclidean, float64, computed in blocks of bounded size.

    Warning: compare figures of equal n, m, k and space only. Standard errors are those over other data and samples: on
    average 1 to 1.7 times the spread; precision and recall may spread by twice their errors where few outlying rows
    have balls that hold many of the other kind.

    References:
        Improved Precision and Recall Metric (Kynkäänniemi et al., 2019), https://arxiv.org/abs/1904.06991
        Reliable Fidelity and Diversity Metrics for Generative Models (Naeem et al., 2020),
        https://arxiv.org/abs/2002.09797

    Arguments:
        real: data `(n, *shape)`.
        fake: samples `(m, *shape)`.
        k: number of the nearest neighbour whose distance is the radius of a ball.
        space: feature space of the distances; default: the elements of x.

    Returns:
        Fidelity: estimates; for a space with a classifier also its confidence and the proportions of classes.

    Raises:
        DataError: there are no more than k rows of a kind, or shapes differ.

    Example:
        >>> found = fidelity(torch.randn(60, 2), torch.randn(60, 2) + 20)
        >>> found.precision.value, found.coverage.value
        (0.0, 0.0)
    """
    refuse(real.shape[1:] != fake.shape[1:], "refused.other_shape", caller="fidelity", real=real, fake=fake)
    refuse(not 0 < k < min(len(real), len(fake)), "refused.few_neighbours", k=k, real=len(real), fake=len(fake))
    embed = (lambda x: x.flatten(1).double()) if space is None else space.embed
    return among(embed(real), embed(fake), k, space)


def among(data: Tensor, samples: Tensor, k: int = FIDELITY_NEIGHBOURS, space: Features | None = None) -> Fidelity:
    """Return the `Fidelity` (precision, recall, ...) of samples given as features `(m, F)`, for data `(n, F)`."""
    named: dict[str, Any] = {}
    if space is not None and space.classifier is not None:
        for kind, rows in (("", samples), ("data_", data)):
            p = space.read(rows)
            named |= {f"{kind}confidence": over_rows(p.amax(1)), f"{kind}shares": shares_of(p, space.names)}
    precision, recall, density, coverage = neighbours(data, samples, k)
    where = "the elements of x" if space is None else space.note
    return Fidelity(precision, recall, density, coverage, len(data), len(samples), k, space=where, **named)


def neighbours(data: Tensor, samples: Tensor, k: int) -> list[Estimate]:
    """Return precision, recall, density and coverage, with errors over other data and samples.

    The balls depend on all rows: one group of data and one of samples after another are left out, with their balls and
    from those of the others (`jackknife`). What single pairs of rows add to the variance is counted twice, so that the
    errors are too large on average. None is below that of independent rows under fixed balls.
    """
    (of, data_reach), (samples_of, reach) = radii(data, k), radii(samples, k)
    held = torch.zeros(LEFT_OUT + 1, len(samples), dtype=torch.float64, device=samples.device)
    holding, near = (torch.zeros(LEFT_OUT + 1, len(data), device=data.device) for _ in range(2))
    for start, block in blocks(data, len(samples)):
        distance, at = torch.cdist(block, samples), slice(start, start + len(block))
        row, column = (distance <= data_reach[:, at].amax(0)[:, None].maximum(reach.amax(0))).nonzero(as_tuple=True)
        pairs, groups = distance[row, column], samples_of[column]
        for g in range(LEFT_OUT + 1):
            inside, of_sample = pairs <= data_reach[g, at][row], pairs <= reach[g][column]
            held[g].index_add_(0, column, inside.double())
            holding[g, at].index_add_(0, row, (inside & (groups != g)).float())
            near[g, at].index_add_(0, row, of_sample.float())
    holding, near = holding.sign_(), near.sign_()
    found, recall, coverage = [], (proportion, near, of), (proportion, holding, of)
    for make, hits, group in ((proportion, held > 0, samples_of), recall, (over_rows, held / k, samples_of), coverage):
        fixed = make(hits[-1].double())
        left = torch.stack([hits[g, group != g].double().mean() for g in range(LEFT_OUT)])
        found.append(replace(fixed, standard_error=max(fixed.standard_error, jackknife(left, 1, LEFT_OUT))))
    return found


def radii(points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the group of every point, and the distance to its k-th nearest neighbour among the other points.

    The distances are `(LEFT_OUT + 1, n)`: without the points of each group (-1 for these), and last among all points.
    """
    group, found = torch.arange(len(points), device=points.device) % LEFT_OUT, []
    for start, block in blocks(points, len(points)):
        distance = torch.cdist(block, points)
        distance[torch.arange(len(block)), torch.arange(start, start + len(block))] = math.inf
        nearest, index = distance.topk(min(4 * k, len(points)), 1, largest=False)  # far faster than kthvalue
        others = group[index] != torch.arange(LEFT_OUT + 1, device=points.device)[:, None, None]
        kth = (others.cumsum(2) < k).sum(2, keepdim=True).clamp(max=nearest.shape[1] - 1)
        found.append(nearest.expand(len(kth), -1, -1).gather(2, kth)[..., 0])
    out = torch.cat(found, 1)
    return group, out.masked_fill_(group == torch.arange(LEFT_OUT + 1, device=points.device)[:, None], -1.0)


def blocks(points: Tensor, width: int) -> Iterator[tuple[int, Tensor]]:
    """Return an iterator over (index of first row, rows) of blocks of points.

    A block has at most `DISTANCES_PER_BLOCK` distances to `width` other points, and at least one row.
    """
    size = max(1, DISTANCES_PER_BLOCK // max(1, width))
    return ((start, points[start : start + size]) for start in range(0, len(points), size))


def ratio_of(part: Estimate, whole: Estimate) -> Estimate:
    """Return the ratio of two independent positive estimates, with its first-order (delta method) standard error."""
    ratio = part.value / whole.value
    relative = [e.standard_error / e.value if e.value else 0.0 for e in (part, whole)]
    return Estimate(ratio, ratio * math.hypot(*relative), "estimate")


def shares_of(probs: Tensor, names: tuple[str, ...]) -> dict[str, Estimate]:
    """Return the proportion of rows by most probable class, by class name, from class probabilities `(n, classes)`."""
    chosen = probs.argmax(1)
    return {name: proportion(chosen == i) for i, name in enumerate(names[: probs.shape[1]])}
