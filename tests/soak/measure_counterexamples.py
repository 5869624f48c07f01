"""Table of two textbook counterexamples: good samples with a poor likelihood, and a good likelihood with poor samples.

    python -m tests.soak.measure_counterexamples OUT.csv [--data fashion_mnist] [--data-dir FOLDER] [--seed 0]

Exact log p(x) of training and held-out data, nats per datum, and the quality of samples: copies of training data with
noise, probabilistic PCA, and 1 part of it in 99 of noise, which loses at most log 100 nats. The last row compares
training with held-out data, as good samples would be.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas
import torch
from torch import Tensor

import pvae
from pvae.analysis.samples import fidelity, quality
from pvae.analysis.truths.linear import probabilistic_pca
from pvae.data.dataset import Dataset
from pvae.errors import DataError
from pvae.util import seeds

KEPT_WEIGHT = 0.01
"""Weight of the good model in its mixture with noise, whose log p(x) is at most log 100 nats lower."""
COMPARED_ROWS = 5000
"""Largest number of samples that are compared with as many held-out data, and of training data that are scored."""


# ---------------------------------------------------------------------- exact densities


class KnownDensity(NamedTuple):
    """Model of data with exact log p(x) and exact samples."""

    log_prob: Callable[[Tensor], Tensor]
    """Function from rows `(n, D)` to log p(x), nats, `(n,)`, float64."""
    sample: Callable[[int, torch.Generator], Tensor]
    """Function from n and a generator to n independent samples of x, `(n, D)`, float64."""


def factor_normal(x: Tensor, q: int) -> KnownDensity:
    r"""Return probabilistic PCA fitted by maximum likelihood: N(mu, C), C = U (L - s^2 I) U' + s^2 I.

    L holds the leading q eigenvalues of the 1/n covariance, s^2 is the mean of the others, and with y = U' (x - mu)

        log p(x) = -1/2 [D log 2 pi + sum_i log l_i + (D - q) log s^2 + sum_i y_i^2 / l_i + (|x - mu|^2 - |y|^2) / s^2].

    References:
        Probabilistic Principal Component Analysis (Tipping, Bishop, 1999), https://doi.org/10.1111/1467-9868.00196
    """
    law = probabilistic_pca(x.numpy(), q)
    loc, slope = torch.from_numpy(law.b), torch.from_numpy(law.w)

    def sample(n: int, generator: torch.Generator) -> Tensor:
        z, noise = (torch.randn(n, k, generator=generator, dtype=torch.float64) for k in slope.T.shape)
        return loc + z @ slope.T + law.noise * noise

    return KnownDensity(lambda rows: torch.from_numpy(law.log_p(rows.numpy())), sample)


def training_mixture(x: Tensor, scale: float) -> KnownDensity:
    """Return 1/n sum_i N(x_i, eps^2 I) over the training data x_i: a sample is a training datum plus small noise."""

    def sample(n: int, generator: torch.Generator) -> Tensor:
        chosen = x[torch.randint(len(x), (n,), generator=generator)]
        return chosen + scale * torch.randn(chosen.shape, generator=generator, dtype=torch.float64)

    return KnownDensity(lambda rows: memory_log_prob(rows, x, [scale])[0], sample)


def memory_log_prob(x: Tensor, centres: Tensor, scales: Sequence[float]) -> Tensor:
    """Return log 1/n sum_i N(x; x_i, eps^2 I) of rows `(m, D)` for every eps, `(scales, m)`, nats, float64; exact.

    Squared distances to all n centres are computed once for all scales, in blocks of bounded size.
    """
    n, dim = centres.shape
    square = centres.square().sum(1)
    found = []
    for part in x.split(max(1, fidelity.DISTANCES_PER_BLOCK // n)):
        distance = (part.square().sum(1, keepdim=True) + square).addmm_(part, centres.T, alpha=-2).clamp_(min=0)
        found.append(torch.stack([(-0.5 / s**2 * distance).logsumexp(1) for s in scales]))
    level = 0.5 * dim * (2 * math.pi * torch.tensor(scales, dtype=torch.float64).square()).log() + math.log(n)
    return torch.cat(found, 1) - level[:, None]


def box(low: float, high: float, dim: int) -> KnownDensity:
    """Return uniform noise in the box [low, high]^D."""

    def log_prob(x: Tensor) -> Tensor:
        inside = ((x >= low) & (x <= high)).all(1)
        return torch.where(inside, x.new_tensor(-dim * math.log(high - low)), -torch.inf)

    def sample(n: int, generator: torch.Generator) -> Tensor:
        return low + (high - low) * torch.rand(n, dim, generator=generator, dtype=torch.float64)

    return KnownDensity(log_prob, sample)


def diluted(good: KnownDensity, noise: KnownDensity, weight: float) -> KnownDensity:
    """Return the mixture w p + (1 - w) r of a good model p with noise r: log p(x) falls by at most log 1/w nats."""

    def log_prob(x: Tensor) -> Tensor:
        return torch.logaddexp(math.log(weight) + good.log_prob(x), math.log1p(-weight) + noise.log_prob(x))

    def sample(n: int, generator: torch.Generator) -> Tensor:
        both = good.sample(n, generator), noise.sample(n, generator)
        return torch.where(torch.rand(n, 1, generator=generator, dtype=torch.float64) < weight, *both)

    return KnownDensity(log_prob, sample)


# ---------------------------------------------------------------------- the study


def counterexamples(
    data: Dataset, seed: int = 0, *, scales: Sequence[float] = (0.01, 0.03, 0.1, 0.2), components: int = 10
) -> pandas.DataFrame:
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

    Returns:
        DataFrame: a row for every model, and one of training data in the place of samples.
            - train_log_p, test_log_p: mean log p(x) of training and of held-out data, nats; exact.
            - accuracy: classifier two-sample test accuracy between samples and held-out data; 1/2 for good samples.
            - precision: proportion of samples inside a k-nearest-neighbour ball around a held-out datum.
            - coverage: proportion of held-out data whose k-nearest-neighbour ball contains a sample.

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
    ppca, spread = factor_normal(train, components), high - low
    noisy = diluted(ppca, box(low - spread, high + spread, train.shape[1]), KEPT_WEIGHT)
    models = {f"memory eps={s:g}": training_mixture(train, s * spread) for s in scales}
    models |= {f"ppca q={components}": ppca, "diluted ppca": noisy}
    held = data.test.data[seeds.subset(len(test), COMPARED_ROWS, seed)]
    scored = []
    for rows in (train[seeds.subset(len(train), COMPARED_ROWS, seed)], test):
        of_memories = memory_log_prob(rows, train, [s * spread for s in scales])
        scored.append([float(log_p.mean()) for log_p in (*of_memories, ppca.log_prob(rows), noisy.log_prob(rows))])

    def compared(fake: Tensor) -> dict[str, float]:
        near, told = fidelity.fidelity(held, fake), quality.two_sample(held, fake, seed)
        return {"accuracy": told.accuracy.value, "precision": near.precision.value, "coverage": near.coverage.value}

    found = []
    for (name, model), train_log_p, test_log_p in zip(models.items(), *scored, strict=True):
        fake = model.sample(len(held), seeds.generator(seed, seeds.ANALYSIS, 30)).reshape(held.shape).float()
        found.append({"model": name, "train_log_p": train_log_p, "test_log_p": test_log_p, **compared(fake)})
    own = data.train.data[seeds.subset(len(train), len(held), seed + 1)]
    return pandas.DataFrame([*found, {"model": "training data", **compared(own)}]).set_index("model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--data", default="fashion_mnist", choices=("digits", "fashion_mnist", "mnist"))
    parser.add_argument("--data-dir", type=Path, help="folder in which files are looked for first")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    data = pvae.data.load(pvae.data.Data.parse(asked.data), data_dir=asked.data_dir)
    found = counterexamples(data, asked.seed).round(4)
    found.to_csv(asked.table)
    lost = found.test_log_p["ppca q=10"] - found.test_log_p["diluted ppca"]
    print(found.to_string(), f"lost to noise: {lost:.4f} nats of test log p", sep="\n")
    print(f"at most log {1 / KEPT_WEIGHT:g} = {-math.log(KEPT_WEIGHT):.4f}")


if __name__ == "__main__":
    main()
