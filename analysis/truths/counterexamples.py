"""Two textbook counterexamples: samples tell little of a likelihood, and a likelihood little of samples."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate, exact_mean
from pvae.analysis.figures.table import Figures, Row
from pvae.analysis.samples.fidelity import BLOCK, fidelity
from pvae.analysis.samples.two_sample import two_sample
from pvae.data import Dataset
from pvae.errors import DataError
from pvae.util import seeds

if TYPE_CHECKING:
    import pandas

WEIGHT = 0.01
"""Weight of the good model in the mixture with noise: all it can lose is log 100 nats."""
SCALES = (0.01, 0.03, 0.1, 0.2)
"""eps, in units of the data's range."""
COMPONENTS = 10
COMPARED = 5000
"""Most samples and data whose likeness is measured."""


# ---------------------------------------------------------------------- densities that are known


class Density(ABC):
    """A density of data whose log and whose draws are both exact."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of rows `(n, D)`, nats, `(n,)`, float64."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draws `(n, D)`, float64."""


class FactorNormal(Density):
    r"""Probabilistic PCA at its maximum of likelihood: N(mu, C), C = U (L - s^2 I) U' + s^2 I.

    L holds the leading q eigenvalues of the 1/n covariance, s^2 is the mean of the others, and with y = U' (x - mu)

        log p(x) = -1/2 [D log 2 pi + sum_i log l_i + (D - q) log s^2 + sum_i y_i^2 / l_i + (|x - mu|^2 - |y|^2) / s^2].

    References:
        Probabilistic Principal Component Analysis (Tipping, Bishop, 1999), https://doi.org/10.1111/1467-9868.00196
    """

    def __init__(self, x: Tensor, q: int) -> None:
        self.loc = x.mean(0)
        centred = x - self.loc
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
        self.values, self.directions = values.flip(0)[:q], vectors.flip(1)[:, :q]
        self.rest = float(values.flip(0)[q:].mean())
        self.dim = x.shape[1]

    def log_prob(self, x: Tensor) -> Tensor:
        """See `Density.log_prob`."""
        centred = x - self.loc
        y = centred @ self.directions
        outside = (centred.square().sum(1) - y.square().sum(1)) / self.rest
        log_det = self.values.log().sum() + (self.dim - len(self.values)) * math.log(self.rest)
        return -0.5 * (self.dim * math.log(2 * math.pi) + log_det + (y.square() / self.values).sum(1) + outside)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """See `Density.sample`."""
        z = torch.randn(n, len(self.values), generator=generator, dtype=torch.float64)
        noise = torch.randn(n, self.dim, generator=generator, dtype=torch.float64)
        return self.loc + z * (self.values - self.rest).sqrt() @ self.directions.T + math.sqrt(self.rest) * noise


class Memory(Density):
    """1/n sum_i N(x_i, eps^2 I) over the training data: a draw is a datum, up to noise too small to see."""

    def __init__(self, x: Tensor, scale: float) -> None:
        self.x, self.scale = x, scale

    def log_prob(self, x: Tensor) -> Tensor:
        """See `Density.log_prob`; over all components."""
        return memory_log_prob(x, self.x, [self.scale])[0]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """See `Density.sample`."""
        chosen = self.x[torch.randint(len(self.x), (n,), generator=generator)]
        return chosen + self.scale * torch.randn(chosen.shape, generator=generator, dtype=torch.float64)


def memory_log_prob(x: Tensor, centres: Tensor, scales: Sequence[float]) -> Tensor:
    """log 1/n sum_i N(x; x_i, eps^2 I) of rows `(m, D)` for every eps, `(scales, m)`, nats, float64; exact.

    Squared distances to all n centres are made once for all scales, in blocks of bounded size.
    """
    n, dim = centres.shape
    square = centres.square().sum(1)
    found = []
    for part in x.split(max(1, BLOCK // n)):
        distance = (part.square().sum(1, keepdim=True) + square).addmm_(part, centres.T, alpha=-2).clamp_(min=0)
        found.append(torch.stack([(-0.5 / s**2 * distance).logsumexp(1) for s in scales]))
    level = 0.5 * dim * (2 * math.pi * torch.tensor(scales, dtype=torch.float64).square()).log() + math.log(n)
    return torch.cat(found, 1) - level[:, None]


class Box(Density):
    """Noise: uniform over the box [low, high]^D."""

    def __init__(self, low: float, high: float, dim: int) -> None:
        self.low, self.high, self.dim = low, high, dim

    def log_prob(self, x: Tensor) -> Tensor:
        """See `Density.log_prob`; minus infinity outside."""
        inside = ((x >= self.low) & (x <= self.high)).all(1)
        level = x.new_tensor(-self.dim * math.log(self.high - self.low))
        return torch.where(inside, level, -torch.inf)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """See `Density.sample`."""
        u = torch.rand(n, self.dim, generator=generator, dtype=torch.float64)
        return self.low + (self.high - self.low) * u


class Diluted(Density):
    """w p + (1 - w) noise, at least w p everywhere: log p(x) falls by log 1/w nats at most, and never by more."""

    def __init__(self, good: Density, noise: Density, weight: float) -> None:
        self.good, self.noise, self.weight = good, noise, weight

    def log_prob(self, x: Tensor) -> Tensor:
        """See `Density.log_prob`."""
        return torch.logaddexp(
            math.log(self.weight) + self.good.log_prob(x), math.log1p(-self.weight) + self.noise.log_prob(x)
        )

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """See `Density.sample`."""
        good, noise = self.good.sample(n, generator), self.noise.sample(n, generator)
        kept = torch.rand(n, 1, generator=generator, dtype=torch.float64) < self.weight
        return torch.where(kept, good, noise)


# ---------------------------------------------------------------------- the study


@dataclass(frozen=True)
class Example:
    """One model of the study."""

    name: str
    train_log_p: Estimate
    """Of training data, nats; exact."""
    test_log_p: Estimate
    """Of held-out data, nats; exact."""
    accuracy: Estimate
    """Of a classifier that tells its samples from held-out data."""
    precision: Estimate
    """Share of its samples that lie as near to data as data do, in the elements of x."""
    coverage: Estimate
    """Share of data with a sample as near as data are."""


@dataclass(frozen=True, repr=False)
class CounterExamples(Figures):
    """Likelihoods, in nats per datum, beside what a classifier and neighbours say of samples."""

    examples: tuple[Example, ...]
    lost: Estimate
    """What the mixture with noise loses, nats."""
    bound: float
    """The most that it can."""
    data_accuracy: Estimate
    """Of a classifier that tells training from held-out data: what good samples have."""
    source: str
    n: int
    dim: int

    @property
    def title(self) -> str:
        """See `Figures.title`."""
        return f"Likelihood and samples are two things ({self.source}: {self.n} training data of {self.dim} elements)"

    @property
    def unit(self) -> str:
        """See `Figures.unit`."""
        return "nats or share"

    def rows(self) -> Iterator[Row]:
        """See `Figures.rows`."""
        for e in self.examples:
            yield f"{e.name}: test log p", e.test_log_p, f"nats; of training data {e.train_log_p.value:.2f}"
            yield f"{e.name}: told apart", e.accuracy, "share of its samples and data; 1/2 for good samples"
            yield f"{e.name}: precision", e.precision, "share of samples that look like data"
            yield f"{e.name}: coverage", e.coverage, "share of data with samples near"
        yield "lost to noise", self.lost, f"nats of test log p; never more than log 100 = {self.bound:.4f}"
        yield "data: told apart", self.data_accuracy, "training from held-out data"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for JSON."""
        return {"source": self.source, "n": self.n, "dim": self.dim, "bound": self.bound, **self.figures()}

    def models(self) -> pandas.DataFrame:
        """One row for every model."""
        import pandas

        known = ("train_log_p", "test_log_p", "accuracy", "precision", "coverage")
        rows = []
        for e in self.examples:
            found = {name: getattr(e, name) for name in known}
            rows.append({"model": e.name, **{key: figure.value for key, figure in found.items()}})
        return pandas.DataFrame(rows).set_index("model")


def counterexamples(
    data: Dataset,
    seed: int = 0,
    *,
    scales: Sequence[float] = SCALES,
    components: int = COMPONENTS,
    on_progress: Callable[[int, int, str], None] = lambda _done, _total, _what: None,
) -> CounterExamples:
    r"""Great samples with a poor likelihood, and a great likelihood with poor samples, on data of real numbers.

    - `memory`: 1/n sum_i N(x_i, eps^2 I) over the training data. Its samples are data, up to eps; with eps -> 0 its
      likelihood of training data grows without bound, and that of any other datum falls without bound.
    - `ppca`: probabilistic PCA in closed form, a plain model with a decent likelihood and blurred, noisy samples.
    - `diluted`: 0.01 ppca + 0.99 noise, uniform over a box of thrice the data's range. log(w p + (1 - w) r) >= log p -
      log 1/w, so that it loses at most log 100 = 4.6 nats of the hundreds that a datum has (and gains where noise
      explains a datum better); 99 of 100 samples are noise.

    Likelihoods are exact, in float64; how samples look is estimated by `two_sample` and, in the elements of x
    themselves, `fidelity`.

    References:
        A note on the evaluation of generative models (Theis, van den Oord, Bethge, 2016),
        https://arxiv.org/abs/1511.01844

    Arguments:
        data: real numbers, at least 100 in train and test each.
        seed: of samples and classifiers.
        scales: every eps, in units of the data's range.
        components: q of the probabilistic PCA.
        on_progress: called with (models done, models in all, what comes next).

    Returns:
        CounterExamples.

    Raises:
        DataError: binary or too few data, or not more elements than components.
    """
    train, test = (part.data.flatten(1).double() for part in (data.train, data.test))
    low, high = float(train.min()), float(train.max())
    if data.binarize != "none":
        raise DataError(f"counterexamples: expected real numbers; got data.binarize = {data.binarize!r}. Use 'none'.")
    if min(len(train), len(test)) < 100 or train.shape[1] <= components:
        raise DataError(
            f"counterexamples: expected at least 100 rows of train and test, of more than {components} elements; got "
            f"{len(train)} and {len(test)}, of {train.shape[1]}."
        )
    ppca = FactorNormal(train, components)
    spread = high - low
    diluted = Diluted(ppca, Box(low - spread, high + spread, train.shape[1]), WEIGHT)
    memories = [Memory(train, s * spread) for s in scales]
    models: dict[str, Density] = {f"memory eps={s:g}": m for s, m in zip(scales, memories, strict=True)}
    models |= {f"ppca q={components}": ppca, "diluted ppca": diluted}
    total = len(models) + 1
    chosen = seeds.subset(len(test), COMPARED, seed)
    held = data.test.data[chosen]
    on_progress(0, total, "likelihoods")
    scored = []
    for rows in (train[seeds.subset(len(train), COMPARED, seed)], test):
        of_memories = memory_log_prob(rows, train, [m.scale for m in memories])
        scored.append([*of_memories, ppca.log_prob(rows), diluted.log_prob(rows)])
    found = []
    for i, (name, model) in enumerate(models.items()):
        on_progress(i + 1, total, name)
        found.append(_measured(name, model, scored[0][i], scored[1][i], held, seed))
    own = data.train.data[seeds.subset(len(train), len(held), seed + 1)]
    of_data = two_sample(held, own, seed)
    return CounterExamples(
        examples=tuple(found),
        lost=exact_mean(scored[1][-2] - scored[1][-1]),
        bound=-math.log(WEIGHT),
        data_accuracy=of_data.accuracy,
        source=data.source,
        n=len(train),
        dim=train.shape[1],
    )


def _measured(name: str, model: Density, train_log_p: Tensor, test_log_p: Tensor, held: Tensor, seed: int) -> Example:
    """One model: its likelihoods of train (at most `COMPARED` rows) and test, and its samples beside held-out data."""
    generator = torch.Generator().manual_seed(seeds.mix(seed, seeds.ANALYSIS, 30))
    fake = model.sample(len(held), generator).reshape(held.shape).float()
    near = fidelity(held, fake)
    return Example(
        name,
        exact_mean(train_log_p),
        exact_mean(test_log_p),
        two_sample(held, fake, seed).accuracy,
        near.precision,
        near.coverage,
    )
