"""Precision, recall, density and coverage of samples by nearest neighbours, and what a classifier makes of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate
from pvae.analysis.figures.table import Figures, Row
from pvae.analysis.samples.features import Features
from pvae.errors import DataError

NEIGHBOURS = 5
BLOCK = 2**23
"""Distances in one block of work."""


@dataclass(frozen=True, repr=False)
class Fidelity(Figures):
    """How samples lie among data in a feature space: shares between 0 and 1, no nats."""

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate
    n: int
    """Data."""
    m: int
    """Samples."""
    k: int
    """Which neighbour the balls reach."""
    confidence: Estimate | None = None
    """Mean probability of a sample's most probable class."""
    data_confidence: Estimate | None = None
    """The same of the data."""
    shares: dict[str, Estimate] = field(default_factory=dict)
    """Of the samples, by most probable class."""
    data_shares: dict[str, Estimate] = field(default_factory=dict)
    """Of the data."""
    space: str = ""

    @property
    def relative_confidence(self) -> Estimate | None:
        """Confidence in samples by confidence in data; None without a classifier."""
        if self.confidence is None or self.data_confidence is None:
            return None
        return ratio_of(self.confidence, self.data_confidence)

    @property
    def expected_coverage(self) -> float:
        """Of samples of the data's own law; exact."""
        return expected_coverage(self.n, self.m, self.k)

    @property
    def title(self) -> str:
        """See `Figures.title`."""
        return f"Samples among data ({self.m} among {self.n}, k = {self.k})"

    @property
    def unit(self) -> str:
        """See `Figures.unit`."""
        return "share"

    def rows(self) -> Iterator[Row]:
        """See `Figures.rows`."""
        yield "precision", self.precision, "share of samples within the reach of data: do they look like data?"
        yield "recall", self.recall, "share of data within the reach of samples: could they have been drawn?"
        yield "density", self.density, "how many data reach a sample, by k: 1 for samples of the data's own law"
        expected = f"{self.expected_coverage:.3f}"
        yield "coverage", self.coverage, f"share of data that reach a sample: {expected} for the data's own law"
        yield "confidence", self.confidence, "mean probability of a sample's most probable class"
        yield "data_confidence", self.data_confidence, "the same of the data"
        yield "relative_confidence", self.relative_confidence, "the former by the latter"
        for name, share in self.shares.items():
            among = self.data_shares.get(name)
            yield f"share/{name}", share, f"of samples; {float(among):.3f} of the data" if among else "of samples"

    @property
    def remarks(self) -> tuple[str, ...]:
        """See `Figures.remarks`."""
        return (f"feature space: {self.space}",) if self.space else ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        shares = {name: e.to_dict() for name, e in self.data_shares.items()}
        counts = {"n": self.n, "m": self.m, "k": self.k, "space": self.space}
        return {**counts, **self.figures(), "data_shares": shares}


def expected_coverage(n: int, m: int, k: int) -> float:
    """Expected coverage of n data by m samples of their own law, 1 - prod_{j<k} (n - 1 - j) / (n + m - 1 - j); exact.

    A datum is not covered where its k nearest among the other n - 1 data and the m samples are all data: of all
    equally likely orders of those n + m - 1 points, the share that begins with k data. No matter which law or space.

    References:
        Reliable Fidelity and Diversity Metrics for Generative Models (Naeem et al., 2020), eq. 8
    """
    return 1 - math.prod((n - 1 - j) / (n + m - 1 - j) for j in range(k))


def fidelity(real: Tensor, fake: Tensor, k: int = NEIGHBOURS, space: Features | None = None) -> Fidelity:
    """Precision and recall, density and coverage of samples among data.

    With B_k(v) the ball around v that reaches its k-th nearest other point of its own kind:

    - precision: share of samples in the union of B_k(data); recall: share of data in the union of B_k(samples)
    - density: mean over samples of how many B_k(data) hold it, divided by k: unlike precision it is not fooled by one
      outlier among the data, whose ball is large; it may exceed 1
    - coverage: share of data whose B_k holds a sample: unlike recall it is not fooled by outliers among samples

    Distances are Euclidean, float64, in blocks of bounded size.

    Warning: standard errors are those of shares of independent rows, with the balls as they are; another sample of the
    other kind would move the balls too. Compare figures of equal n, m, k and space.

    References:
        Improved Precision and Recall Metric (Kynkäänniemi et al., 2019), https://arxiv.org/abs/1904.06991
        Reliable Fidelity and Diversity Metrics for Generative Models (Naeem et al., 2020),
        https://arxiv.org/abs/2002.09797

    Arguments:
        real: data `(n, *shape)`.
        fake: samples `(m, *shape)`.
        k: which neighbour the balls reach.
        space: where distances are taken; default: the elements of x themselves.

    Returns:
        Fidelity, estimates; of a space with a classifier, also its confidence and the shares of its classes.

    Raises:
        DataError: no more than k rows of a kind, or rows of different shapes.
    """
    if real.shape[1:] != fake.shape[1:]:
        raise DataError(f"fidelity: expected samples of shape {list(real.shape[1:])}; got {list(fake.shape[1:])}.")
    if not 0 < k < min(len(real), len(fake)):
        raise DataError(
            f"fidelity: expected more rows of each kind than k = {k}, at least 1; got {len(real)} and {len(fake)}."
        )
    embed = (lambda x: x.flatten(1).double()) if space is None else space.embed
    return among(embed(real), embed(fake), k, space)


def among(data: Tensor, samples: Tensor, k: int = NEIGHBOURS, space: Features | None = None) -> Fidelity:
    """`fidelity` of features of data `(n, F)` and of samples `(m, F)` that are there already."""
    data_reach, reach = radii(data, k), radii(samples, k)
    held, holding, near = within(data, samples, data_reach, reach)
    named: dict[str, Any] = {}
    if space is not None and space.classifier is not None:
        p, of_data = space.read(samples), space.read(data)
        named = {
            "confidence": mean_of(p.amax(1)),
            "data_confidence": mean_of(of_data.amax(1)),
            "shares": shares_of(p, space.names),
            "data_shares": shares_of(of_data, space.names),
        }
    return Fidelity(
        precision=mean_of((held > 0).double()),
        recall=mean_of(near.double()),
        density=mean_of(held.double() / k),
        coverage=mean_of(holding.double()),
        n=len(data),
        m=len(samples),
        k=k,
        space="the elements of x" if space is None else space.note,
        **named,
    )


def radii(points: Tensor, k: int) -> Tensor:
    """Distance of every point `(n, F)` to its k-th nearest other one, `(n,)`."""
    found = []
    for start, block in blocks(points, len(points)):
        distance = torch.cdist(block, points)
        distance[torch.arange(len(block)), torch.arange(start, start + len(block))] = math.inf
        found.append(distance.kthvalue(k, 1).values)
    return torch.cat(found)


def within(data: Tensor, samples: Tensor, data_reach: Tensor, reach: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Who lies in whose ball: balls of data that hold each sample, `(m,)`; data whose ball holds one; data in one."""
    held = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
    holding, near = [], []
    for start, block in blocks(data, len(samples)):
        distance = torch.cdist(block, samples)
        inside = distance <= data_reach[start : start + len(block), None]
        held += inside.sum(0)
        holding.append(inside.any(1))
        near.append((distance <= reach).any(1))
    return held, torch.cat(holding), torch.cat(near)


def blocks(points: Tensor, width: int) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of pieces whose distances to `width` points fill one block."""
    size = max(1, BLOCK // max(1, width))
    return ((start, points[start : start + size]) for start in range(0, len(points), size))


def mean_of(values: Tensor) -> Estimate:
    """The mean over independent rows `(n,)` with its standard error."""
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), error, "estimate")


def ratio_of(part: Estimate, whole: Estimate) -> Estimate:
    """One positive estimate by another that is independent of it, with its error to the first order."""
    ratio = part.value / whole.value
    relative = [e.standard_error / e.value if e.value else 0.0 for e in (part, whole)]
    return Estimate(ratio, ratio * math.hypot(*relative), "estimate")


def shares_of(probs: Tensor, names: tuple[str, ...]) -> dict[str, Estimate]:
    """Share of each most probable class among rows `(n, classes)`."""
    chosen = probs.argmax(1)
    return {name: mean_of((chosen == i).double()) for i, name in enumerate(names[: probs.shape[1]])}
