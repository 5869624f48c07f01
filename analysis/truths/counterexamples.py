"""Two textbook counterexamples: good samples with a poor likelihood, and a good likelihood with poor samples."""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Protocol

import pandas
import torch
from torch import Tensor

from pvae.analysis.figures.estimate import Estimate, Figures, Row, annotated, exact_mean, refuse, text
from pvae.analysis.samples.fidelity import DISTANCES_PER_BLOCK, fidelity
from pvae.analysis.samples.quality import two_sample
from pvae.analysis.truths.linear import probabilistic_pca
from pvae.data.dataset import Dataset
from pvae.errors import DataError
from pvae.records import Record
from pvae.util import StageProgress, seeds, silent

KEPT_WEIGHT = 0.01
"""Weight of the good model in its mixture with noise, whose log p(x) is at most log 100 nats lower."""
COMPARED_ROWS = 5000
"""Largest number of samples that are compared with as many held-out data, and of training data that are scored."""


# ---------------------------------------------------------------------- exact densities


class KnownDensity(Protocol):
    """Base class of models of data with exact log p(x) and exact samples."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log p(x) of rows `(n, D)`, nats, `(n,)`, float64."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Return n independent samples of x, `(n, D)`, float64."""


class FactorNormal(KnownDensity):
    r"""Probabilistic PCA fitted by maximum likelihood: N(mu, C), C = U (L - s^2 I) U' + s^2 I.

    L holds the leading q eigenvalues of the 1/n covariance, s^2 is the mean of the others, and with y = U' (x - mu)

        log p(x) = -1/2 [D log 2 pi + sum_i log l_i + (D - q) log s^2 + sum_i y_i^2 / l_i + (|x - mu|^2 - |y|^2) / s^2].

    References:
        Probabilistic Principal Component Analysis (Tipping, Bishop, 1999), https://doi.org/10.1111/1467-9868.00196
    """

    def __init__(self, x: Tensor, q: int) -> None:
        self.law = probabilistic_pca(x.numpy(), q)

    def log_prob(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.law.log_p(x.numpy()))

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        loc, slope = torch.from_numpy(self.law.b), torch.from_numpy(self.law.w)
        z, noise = (torch.randn(n, k, generator=generator, dtype=torch.float64) for k in slope.T.shape)
        return loc + z @ slope.T + self.law.noise * noise


class TrainingMixture(KnownDensity):
    """Mixture 1/n sum_i N(x_i, eps^2 I) over the training data x_i: a sample is a training datum plus small noise."""

    def __init__(self, x: Tensor, scale: float) -> None:
        self.x, self.scale = x, scale

    def log_prob(self, x: Tensor) -> Tensor:
        return memory_log_prob(x, self.x, [self.scale])[0]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        chosen = self.x[torch.randint(len(self.x), (n,), generator=generator)]
        return chosen + self.scale * torch.randn(chosen.shape, generator=generator, dtype=torch.float64)


def memory_log_prob(x: Tensor, centres: Tensor, scales: Sequence[float]) -> Tensor:
    """Return log 1/n sum_i N(x; x_i, eps^2 I) of rows `(m, D)` for every eps, `(scales, m)`, nats, float64; exact.

    Squared distances to all n centres are computed once for all scales, in blocks of bounded size.
    """
    n, dim = centres.shape
    square = centres.square().sum(1)
    found = []
    for part in x.split(max(1, DISTANCES_PER_BLOCK // n)):
        distance = (part.square().sum(1, keepdim=True) + square).addmm_(part, centres.T, alpha=-2).clamp_(min=0)
        found.append(torch.stack([(-0.5 / s**2 * distance).logsumexp(1) for s in scales]))
    level = 0.5 * dim * (2 * math.pi * torch.tensor(scales, dtype=torch.float64).square()).log() + math.log(n)
    return torch.cat(found, 1) - level[:, None]


class Box(KnownDensity):
    """Uniform noise in the box [low, high]^D."""

    def __init__(self, low: float, high: float, dim: int) -> None:
        self.low, self.high, self.dim = low, high, dim

    def log_prob(self, x: Tensor) -> Tensor:
        inside = ((x >= self.low) & (x <= self.high)).all(1)
        return torch.where(inside, x.new_tensor(-self.dim * math.log(self.high - self.low)), -torch.inf)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return self.low + (self.high - self.low) * torch.rand(n, self.dim, generator=generator, dtype=torch.float64)


class Diluted(KnownDensity):
    """Mixture w p + (1 - w) r of a good model p with noise r: log p(x) falls by at most log 1/w nats."""

    def __init__(self, good: KnownDensity, noise: KnownDensity, weight: float) -> None:
        self.good, self.noise, self.weight = good, noise, weight

    def log_prob(self, x: Tensor) -> Tensor:
        good, noise = self.good.log_prob(x), self.noise.log_prob(x)
        return torch.logaddexp(math.log(self.weight) + good, math.log1p(-self.weight) + noise)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        good, noise = self.good.sample(n, generator), self.noise.sample(n, generator)
        return torch.where(torch.rand(n, 1, generator=generator, dtype=torch.float64) < self.weight, good, noise)


# ---------------------------------------------------------------------- the study


class Example(Record):
    """Results for one of the compared models: its exact likelihoods and the quality of its samples."""

    name: str
    train_log_p: Estimate
    """Mean log p(x) of training data, nats; exact."""
    test_log_p: Annotated[Estimate, "{0.name}: test log p", "nats; of training data {0.train_log_p.value:.2f}"]
    """Mean log p(x) of held-out data, nats; exact."""
    accuracy: Annotated[Estimate, "{0.name}: classifier accuracy", "counterexamples.accuracy"]
    """Classifier two-sample test accuracy between samples of the model and held-out data; an estimate."""
    precision: Annotated[Estimate, "{0.name}: precision", "proportion of samples that look like data"]
    """Proportion of samples inside a k-nearest-neighbour ball around a held-out datum, see `fidelity`; an estimate."""
    coverage: Annotated[Estimate, "{0.name}: coverage", "proportion of data with samples near"]
    """Proportion of held-out data whose k-nearest-neighbour ball contains a sample, see `fidelity`; an estimate."""


class CounterExamples(Figures):
    """Exact likelihoods, nats per datum, and sample quality of the compared models; the result of `counterexamples`."""

    examples: tuple[Example, ...]
    """Results for each of the compared models."""
    lost: Annotated[Estimate, "lost to noise", "nats of test log p; at most log 100 = {0.bound:.4f}"]
    """Mean held-out log-likelihood of probabilistic PCA minus that of its mixture with noise, nats; exact."""
    bound: float
    """Largest possible value of `lost`, log 1/w with the weight w of probabilistic PCA in the mixture, nats."""
    data_accuracy: Annotated[Estimate, "data: classifier accuracy", "between training and held-out data"]
    """Classifier two-sample test accuracy between training and held-out data, which good samples would have as well."""
    source: str
    """Name of the data set."""
    n: int
    """Number of training data."""
    dim: int
    """Number of elements of a datum."""

    def rows(self) -> Iterator[Row]:
        for example in self.examples:
            yield from annotated(example)
        yield from super().rows()

    def models(self) -> pandas.DataFrame:
        """Return a data frame of the values with one row for every model."""
        return pandas.DataFrame(map(vars, self.examples)).set_index("name").rename_axis("model").map(float)


def counterexamples(
    data: Dataset,
    seed: int = 0,
    *,
    scales: Sequence[float] = (0.01, 0.03, 0.1, 0.2),
    components: int = 10,
    on_progress: StageProgress = silent,
) -> CounterExamples:
    r"""Show good samples with a poor likelihood, and a good likelihood with poor samples, on real-valued data.

    - `memory`: 1/n sum_i N(x_i, eps^2 I) over the training data. Its samples are data, up to eps; with eps -> 0 its
      likelihood of training data grows without bound, and that of any other datum falls without bound.
    - `ppca`: probabilistic PCA in closed form, a plain model with a decent likelihood and blurred, noisy samples.
    - `diluted`: 0.01 ppca + 0.99 noise, uniform over a box of thrice the data's range. log(w p + (1 - w) r) >= log p -
      log 1/w, so that it loses at most log 100 = 4.6 nats of the hundreds that a datum has (and gains where noise
      explains a datum better); 99 of 100 samples are noise.

    Likelihoods are exact, float64; the quality of samples is estimated by `two_sample` and, by distances of x, by
    `fidelity`.

    References:
        A note on the evaluation of generative models (Theis, van den Oord, Bethge, 2016),
        https://arxiv.org/abs/1511.01844

    Arguments:
        data: real numbers, at least 100 in train and test each.
        seed: seed of samples and classifiers.
        scales: values of eps, in units of the range of the data.
        components: number q of components of the probabilistic PCA.
        on_progress: called with (models done, models in all, name of the next model).

    Returns:
        CounterExamples: exact likelihoods in nats per datum, and estimated proportions.

    Raises:
        DataError: the data are binary or too few, or have no more elements than components.
    """
    train, test = (part.data.flatten(1).double() for part in (data.train, data.test))
    low, high = float(train.min()), float(train.max())
    refuse(data.binarize != "none", "refused.binarized", data=data)
    if min(len(train), len(test)) < 100 or train.shape[1] <= components:
        raise DataError(text("refused.few_rows", train=train, test=test, components=components))
    ppca = FactorNormal(train, components)
    spread = high - low
    diluted = Diluted(ppca, Box(low - spread, high + spread, train.shape[1]), KEPT_WEIGHT)
    memories = [TrainingMixture(train, s * spread) for s in scales]
    models: dict[str, KnownDensity] = {f"memory eps={s:g}": m for s, m in zip(scales, memories, strict=True)}
    models |= {f"ppca q={components}": ppca, "diluted ppca": diluted}
    total = len(models) + 1
    held = data.test.data[seeds.subset(len(test), COMPARED_ROWS, seed)]
    on_progress(0, total, "likelihoods")
    scored = []
    for rows in (train[seeds.subset(len(train), COMPARED_ROWS, seed)], test):
        of_memories = memory_log_prob(rows, train, [m.scale for m in memories])
        scored.append([*of_memories, ppca.log_prob(rows), diluted.log_prob(rows)])
    found = []
    for i, (name, model) in enumerate(models.items()):
        on_progress(i + 1, total, name)
        fake = model.sample(len(held), seeds.generator(seed, seeds.ANALYSIS, 30)).reshape(held.shape).float()
        near, accuracy = fidelity(held, fake), two_sample(held, fake, seed).accuracy
        train_log_p, test_log_p = (exact_mean(log_p[i]) for log_p in scored)
        found.append(Example(name, train_log_p, test_log_p, accuracy, near.precision, near.coverage))
    own = two_sample(held, data.train.data[seeds.subset(len(train), len(held), seed + 1)], seed).accuracy
    lost, bound = exact_mean(scored[1][-2] - scored[1][-1]), -math.log(KEPT_WEIGHT)
    return CounterExamples(tuple(found), lost, bound, own, data.source, *train.shape)
