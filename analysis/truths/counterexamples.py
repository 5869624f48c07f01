"""Two textbook counterexamples: good samples with a poor likelihood, and a good likelihood with poor samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from pvae.analysis.figures.estimate import Estimate, exact_mean
from pvae.analysis.figures.table import Figures, Row
from pvae.analysis.samples.fidelity import fidelity
from pvae.analysis.samples.two_sample import two_sample
from pvae.analysis.truths.densities import Box, Diluted, FactorNormal, KnownDensity, TrainingMixture, memory_log_prob
from pvae.data.dataset import Dataset
from pvae.errors import DataError
from pvae.util import seeds
from pvae.util.progress import StageProgress, silent

if TYPE_CHECKING:
    import pandas

KEPT_WEIGHT = 0.01
"""Weight of the good model in its mixture with noise, whose log p(x) is at most log 100 nats lower."""
MEMORY_SCALES = (0.01, 0.03, 0.1, 0.2)
"""Standard deviations eps of the mixtures of normals around the training data, in units of the range of the data."""
PPCA_COMPONENTS = 10
"""Number of components of the probabilistic PCA."""
COMPARED_ROWS = 5000
"""Largest number of samples that are compared with as many held-out data, and of training data that are scored."""


@dataclass(frozen=True)
class Example:
    """Results for one of the compared models: its exact likelihoods and the quality of its samples."""

    name: str
    train_log_p: Estimate
    """Mean log p(x) of training data, nats; exact."""
    test_log_p: Estimate
    """Mean log p(x) of held-out data, nats; exact."""
    accuracy: Estimate
    """Classifier two-sample test accuracy between samples of the model and held-out data; an estimate."""
    precision: Estimate
    """Proportion of samples inside a k-nearest-neighbour ball around a held-out datum, see `fidelity`; an estimate."""
    coverage: Estimate
    """Proportion of held-out data whose k-nearest-neighbour ball contains a sample, see `fidelity`; an estimate."""


@dataclass(frozen=True, repr=False)
class CounterExamples(Figures):
    """Exact likelihoods, nats per datum, and sample quality of the compared models; the result of `counterexamples`."""

    unit = "nats or proportion"
    counts = ("source", "n", "dim", "bound")

    examples: tuple[Example, ...]
    """Results for each of the compared models."""
    lost: Estimate
    """Mean held-out log-likelihood of probabilistic PCA minus that of its mixture with noise, nats; exact."""
    bound: float
    """Largest possible value of `lost`, log 1/w with the weight w of probabilistic PCA in the mixture, nats."""
    data_accuracy: Estimate
    """Classifier two-sample test accuracy between training and held-out data, which good samples would have as well."""
    source: str
    """Name of the data set."""
    n: int
    """Number of training data."""
    dim: int
    """Number of elements of a datum."""

    @property
    def title(self) -> str:
        return f"Likelihood and samples are two things ({self.source}: {self.n} training data of {self.dim} elements)"

    def rows(self) -> Iterator[Row]:
        for e in self.examples:
            yield f"{e.name}: test log p", e.test_log_p, f"nats; of training data {e.train_log_p.value:.2f}"
            yield (
                f"{e.name}: classifier accuracy",
                e.accuracy,
                "classifier accuracy between its samples and data; 1/2 for good samples",
            )
            yield f"{e.name}: precision", e.precision, "proportion of samples that look like data"
            yield f"{e.name}: coverage", e.coverage, "proportion of data with samples near"
        yield "lost to noise", self.lost, f"nats of test log p; at most log 100 = {self.bound:.4f}"
        yield "data: classifier accuracy", self.data_accuracy, "between training and held-out data"

    def models(self) -> pandas.DataFrame:
        """Return a data frame of the values with one row for every model."""
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
    scales: Sequence[float] = MEMORY_SCALES,
    components: int = PPCA_COMPONENTS,
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
    if data.binarize != "none":
        raise DataError(f"counterexamples: expected real numbers; got data.binarize = {data.binarize!r}. Use 'none'.")
    if min(len(train), len(test)) < 100 or train.shape[1] <= components:
        raise DataError(
            f"counterexamples: expected at least 100 rows of train and test, of more than {components} elements; got "
            f"{len(train)} and {len(test)}, of {train.shape[1]}."
        )
    ppca = FactorNormal(train, components)
    spread = high - low
    diluted = Diluted(ppca, Box(low - spread, high + spread, train.shape[1]), KEPT_WEIGHT)
    memories = [TrainingMixture(train, s * spread) for s in scales]
    models: dict[str, KnownDensity] = {f"memory eps={s:g}": m for s, m in zip(scales, memories, strict=True)}
    models |= {f"ppca q={components}": ppca, "diluted ppca": diluted}
    total = len(models) + 1
    chosen = seeds.subset(len(test), COMPARED_ROWS, seed)
    held = data.test.data[chosen]
    on_progress(0, total, "likelihoods")
    scored = []
    for rows in (train[seeds.subset(len(train), COMPARED_ROWS, seed)], test):
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
        bound=-math.log(KEPT_WEIGHT),
        data_accuracy=of_data.accuracy,
        source=data.source,
        n=len(train),
        dim=train.shape[1],
    )


def _measured(
    name: str, model: KnownDensity, train_log_p: Tensor, test_log_p: Tensor, held: Tensor, seed: int
) -> Example:
    """Return the results for one model, from its log p(x) of train and test rows and as many samples as `held` rows."""
    generator = seeds.generator(seed, seeds.ANALYSIS, 30)
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
