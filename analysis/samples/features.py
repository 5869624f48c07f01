"""A feature space for samples: what a small classifier of the data looks at, or principal components without labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pvae.component import Shape
from pvae.errors import DataError
from pvae.nn.conv import Conv
from pvae.nn.dense import MLP
from pvae.nn.network import NetworkModule
from pvae.util import seeds

EXPOSURES = 40_000
"""Data that a classifier is shown, at least; two epochs where there are more."""
NUMBERS = 100_000_000
"""Most numbers that rows which are held at once are made of."""
FEW = 1000
"""Rows that are taken however large they are."""
CLASSES = 50
"""Most labels that a classifier, or a reader of codes, is asked to tell apart."""
BATCH = 100
DENSE = 128
COMPONENTS = 50
"""Most principal components of a feature space without labels."""
CHUNK = 2000
X = "x"


def affordable(most: int, shape: Shape) -> int:
    """How many rows of a shape to hold: `most`, or fewer where they are large."""
    return min(most, max(FEW, NUMBERS // max(1, math.prod(shape))))


class Classifier(nn.Module):
    """A small network from data to logits of classes; images go through stride-2 convolutions."""

    loc: Tensor
    scale: Tensor

    def __init__(self, x: Tensor, classes: int) -> None:
        super().__init__()
        shape: Shape = tuple(x.shape[1:])
        network = Conv(channels=(32, 64), dense=DENSE) if len(shape) == 3 else MLP(hidden=(DENSE, DENSE))
        self.network: NetworkModule = network.build({X: shape}, None)
        self.head = nn.Linear(self.network.width, classes)
        self.register_buffer("loc", x.mean())
        self.register_buffer("scale", x.std().clamp(min=1e-6))

    def features(self, x: Tensor) -> Tensor:
        """What comes before the last layer, `(n, DENSE)`."""
        return self.network({X: (x - self.loc) / self.scale})

    def read(self, h: Tensor) -> Tensor:
        """Features `(n, DENSE)` to logits `(n, classes)`."""
        return self.head(h.to(self.loc.device))

    def forward(self, x: Tensor) -> Tensor:
        """Data `(n, *shape)` to logits `(n, classes)`."""
        return self.read(self.features(x))


def classify(x: Tensor, y: Tensor, classes: int, seed: int, held: tuple[Tensor, Tensor] | None = None) -> Classifier:
    """Train a `Classifier`: Adam, learning rate falling to zero, float32; the same seed, the same weights on a CPU.

    Arguments:
        x: data `(n, *shape)`.
        y: classes `(n,)`.
        classes: how many there are.
        seed: of weights and order; the global random state stays as it was.
        held: data and classes that choose the epoch by their cross-entropy; without them it is the last.
    """
    x = x.float()
    epochs = max(2, math.ceil(EXPOSURES / len(x)))
    with torch.enable_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        seeds.set_noise(seeds.mix(seed, seeds.ANALYSIS, 11), torch.device("cpu"))
        model = Classifier(x, classes).to(x.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        steps = epochs * math.ceil(len(x) / BATCH)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        best, kept = math.inf, None
        for _ in range(epochs):
            for index in torch.randperm(len(x)).to(x.device).split(BATCH):
                loss = nn.functional.cross_entropy(model(x[index]), y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            if held is not None:
                loss_of_held = cross_entropy(model, *held)
                if loss_of_held < best:
                    best, kept = loss_of_held, {name: t.clone() for name, t in model.state_dict().items()}
    if kept is not None:
        model.load_state_dict(kept)
    return model.eval()


def cross_entropy(model: Classifier, x: Tensor, y: Tensor) -> float:
    """Mean cross-entropy of data `(n, *shape)` of classes `(n,)`, nats."""
    return float(nn.functional.cross_entropy(in_chunks(model, x), y.cpu()))


@torch.no_grad()
def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of data `(n, *shape)` row by row, `CHUNK` rows at a time, without gradient; on the CPU."""
    return torch.cat([function(part.float()).cpu() for part in x.split(CHUNK)])


@dataclass(frozen=True, eq=False)
class Features:
    """A feature space of some data."""

    embed: Callable[[Tensor], Tensor]
    """Data `(n, *shape)` to features `(n, F)`, float64, on the CPU."""
    classifier: Classifier | None
    """What it was taken from, where the data have labels."""
    names: tuple[str, ...]
    """Of the classes."""
    note: str
    """How it was made, in words."""

    def probs(self, x: Tensor) -> Tensor | None:
        """Probabilities of the classes, `(n, classes)`; None without labels."""
        return None if self.classifier is None else self.read(self.embed(x))

    def read(self, found: Tensor) -> Tensor:
        """Probabilities of the classes, `(n, classes)`, of features `(n, F)`; only where there is a classifier."""
        assert self.classifier is not None  # noqa: S101 - the caller has looked
        return in_chunks(self.classifier.read, found).double().softmax(-1)


def features(x: Tensor, y: Tensor | None = None, names: tuple[str, ...] | None = None, seed: int = 0) -> Features:
    """A feature space in which distances between data mean more than distances between pixels.

    With labels the penultimate layer of a small network (convolutions for images) that was trained on them; without,
    the `COMPONENTS` first principal components. It is the data's own, not Inception's: figures found in it compare
    models of one data set with each other, not with published ones.

    Arguments:
        x: training data `(n, *shape)`.
        y: labels `(n,)`, integers from 0, or None.
        names: of the labels.
        seed: of the network's weights and of the order of its training data.

    Raises:
        DataError: fewer than two rows.
    """
    if len(x) < 2:
        raise DataError(f"features: expected at least two rows of data; got {len(x)}.")
    classes = 0 if y is None else int(y.max()) + 1
    if y is not None and classes > 1:
        model = classify(x, y, classes, seed)
        return Features(
            lambda rows: in_chunks(model.features, rows).double(),
            model,
            names if names and len(names) >= classes else tuple(map(str, range(classes))),
            f"penultimate layer of a classifier of {len(x)} training rows",
        )
    loc, directions = principal(x)
    return Features(
        lambda rows: in_chunks(lambda part: (part.flatten(1).double().cpu() - loc) @ directions, rows),
        None,
        (),
        f"{directions.shape[1]} principal components of {len(x)} training rows",
    )


def principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(D,)` and leading directions `(D, at most COMPONENTS)` of data `(n, *shape)`, float64, on the CPU.

    The covariance is summed up in chunks: D^2 numbers, whatever n.
    """
    rows = [part.flatten(1).double().cpu() for part in x.split(CHUNK)]
    loc = torch.stack([part.sum(0) for part in rows]).sum(0) / len(x)
    covariance = torch.stack([(part - loc).T @ (part - loc) for part in rows]).sum(0) / len(x)
    return loc, torch.linalg.eigh(covariance).eigenvectors.flip(-1)[:, :COMPONENTS]
