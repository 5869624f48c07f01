"""Feature spaces for comparing samples with data: hidden units or principal components; sharpness of images."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from pvae.analysis.figures.estimate import refuse
from pvae.component import Shape
from pvae.nn.conv import Conv
from pvae.nn.network import MLP, NetworkModule
from pvae.nn.schedules import LeanAdam
from pvae.util import Record, seeds

EXPOSURES = 40_000
"""Smallest number of training rows that a classifier sees, counted over all its epochs (at least two)."""
HELD_ELEMENTS = 100_000_000
"""Largest number of data elements that are kept in memory at once: rows times elements of a row."""
ALWAYS_HELD_ROWS = 1000
"""Number of rows that are kept in memory at once however large a row is."""
MAX_CLASSES = 50
"""Largest number of labels that a classifier or a probe distinguishes."""
CLASSIFIER_BATCH = 100
"""Batch size in the training of the classifier."""
FEATURE_WIDTH = 128
"""Width of the hidden dense layers of the classifier, hence the number of features."""
PRINCIPAL_COMPONENTS = 50
"""Largest number of principal components of a feature space without labels."""
FEATURE_CHUNK = 2000
"""Number of rows that are mapped to features at a time."""
CLASSIFIER_RATE = 1e-3
"""Initial learning rate of the classifier."""
PATIENCE = 0.25
"""Proportion of all epochs without a lower validation cross-entropy after which training of a classifier stops."""
X = "x"


def affordable(most: int, shape: Shape) -> int:
    """Return the number of rows of a shape to keep in memory at once: `most`, or fewer if a row is large."""
    return min(most, max(ALWAYS_HELD_ROWS, HELD_ELEMENTS // max(1, math.prod(shape))))


class Classifier(nn.Module):
    """Small network from data to class logits: with stride-2 convolutions for images, otherwise an MLP."""

    def __init__(self, x: Tensor, classes: int) -> None:
        super().__init__()
        shape: Shape = tuple(x.shape[1:])
        network = Conv(channels=(32, 64), dense=FEATURE_WIDTH) if len(shape) == 3 else MLP(hidden=(FEATURE_WIDTH,) * 2)
        self.network: NetworkModule = network.build({X: shape}, None)
        self.head = nn.Linear(self.network.width, classes)
        self.loc, self.scale = nn.Buffer(x.mean()), nn.Buffer(x.std().clamp(min=1e-6))

    def features(self, x: Tensor) -> Tensor:
        """Map data `(n, *shape)` to the activations of the penultimate layer, `(n, FEATURE_WIDTH)`."""
        return self.network({X: (x - self.loc) / self.scale})

    def read(self, h: Tensor) -> Tensor:
        """Map features `(n, FEATURE_WIDTH)` to logits `(n, classes)`."""
        return self.head(h.to(self.loc.device))

    def forward(self, x: Tensor) -> Tensor:
        """Map data `(n, *shape)` to logits `(n, classes)`."""
        return self.read(self.features(x))


def classify(x: Tensor, y: Tensor, classes: int, seed: int, held: tuple[Tensor, Tensor] | None = None) -> Classifier:
    """Train a `Classifier` with Adam and a learning rate that falls to zero; on a CPU a seed gives the same weights.

    Arguments:
        x: data `(n, *shape)`.
        y: classes `(n,)`.
        classes: number of classes.
        seed: seed of weights and batches; the global random state is not changed.
        held: validation data and classes, whose cross-entropy selects the epoch, and ends the training when it has not
            fallen for a fourth of all epochs; default: the last epoch is kept.
    """
    x = x.float()
    epochs = max(2, math.ceil(EXPOSURES / len(x)))
    with torch.enable_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        seeds.set_noise(seeds.mix(seed, seeds.ANALYSIS, 11), torch.device("cpu"))
        model = Classifier(x, classes).to(x.device)
        optimizer = LeanAdam(model.parameters())
        steps, step = epochs * math.ceil(len(x) / CLASSIFIER_BATCH), 0
        best, best_epoch, kept = math.inf, 0, None
        for epoch in range(epochs):
            for index in torch.randperm(len(x)).to(x.device).split(CLASSIFIER_BATCH):
                loss = nn.functional.cross_entropy(model(x[index]), y[index])
                optimizer.step(torch.autograd.grad(loss, optimizer.parameters), CLASSIFIER_RATE * (1 - step / steps))
                step += 1
            if held is None:
                continue
            loss_of_held = float(nn.functional.cross_entropy(in_chunks(model, held[0]), held[1].cpu()))
            if loss_of_held < best:
                best, best_epoch, kept = loss_of_held, epoch, {k: t.clone() for k, t in model.state_dict().items()}
            elif epoch - best_epoch > PATIENCE * epochs:
                break
    if kept is not None:
        model.load_state_dict(kept)
    return model.eval()


@torch.no_grad()
def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the values of a row-wise function on data `(n, *shape)`, in chunks without gradient, on the CPU."""
    return torch.cat([function(part.float()).cpu() for part in x.split(FEATURE_CHUNK)])


class Features(Record, eq=False):
    """Feature space in which samples are compared with data; the result of `features`."""

    embed: Callable[[Tensor], Tensor]
    """Map from data `(n, *shape)` to features `(n, F)`, float64, on the CPU."""
    classifier: Classifier | None
    """Classifier whose penultimate layer gives the features; None without labels."""
    names: tuple[str, ...]
    """Names of the classes that the classifier distinguishes; empty without labels."""
    note: str
    """Description of the feature space in words, for reports."""

    def probs(self, x: Tensor) -> Tensor | None:
        """Return class probabilities `(n, classes)` of data `(n, *shape)`; None without labels."""
        return None if self.classifier is None else self.read(self.embed(x))

    def read(self, found: Tensor) -> Tensor:
        """Return class probabilities `(n, classes)` from features `(n, F)`; only for a space with a classifier."""
        assert self.classifier is not None  # noqa: S101 - the caller has checked
        return in_chunks(self.classifier.read, found).double().softmax(-1)


def features(x: Tensor, y: Tensor | None = None, names: tuple[str, ...] | None = None, seed: int = 0) -> Features:
    """Learn a feature space in which distances are more meaningful than between pixels.

    With labels it is the penultimate layer of a small network (convolutional for images) trained on them, without
    labels the `PRINCIPAL_COMPONENTS` first principal components. It is learned from these data and is not that of
    Inception: distances in it compare models of one data set with each other, not with published numbers.

    Arguments:
        x: training data `(n, *shape)`.
        y: labels `(n,)`, integers from 0, or None.
        names: names of the labels.
        seed: seed of the weights and batches of the network.

    Raises:
        DataError: there are fewer than two rows.

    Returns:
        Features, whose `embed` maps data `(n, *shape)` to `(n, F)`.

    Example:
        >>> features(torch.randn(30, 4)).embed(torch.zeros(2, 4)).shape
        torch.Size([2, 4])
    """
    refuse(len(x) < 2, f"features: expected at least two rows of data; got {len(x)}.")
    classes = 0 if y is None else int(y.max()) + 1
    if y is not None and classes > 1:
        model = classify(x, y, classes, seed)
        known = names if names and len(names) >= classes else tuple(map(str, range(classes)))
        note = f"penultimate layer of a classifier of {len(x)} training rows"
        return Features(lambda rows: in_chunks(model.features, rows).double(), model, known, note)
    loc, directions = principal(x)
    note = f"{directions.shape[1]} principal components of {len(x)} training rows"
    return Features(
        lambda rows: in_chunks(lambda part: (part.flatten(1).double().cpu() - loc) @ directions, rows), None, (), note
    )


def principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean `(D,)` and principal directions `(D, at most PRINCIPAL_COMPONENTS)` of data `(n, *shape)`, float64.

    The covariance is summed over chunks of rows, so that memory is of order D^2 for any n.
    """
    refuse(bool(x.isnan().any()), "features: expected finite numbers; got NaN. Rows with missing values have none.")
    rows = [part.flatten(1).double().cpu() for part in x.split(FEATURE_CHUNK)]
    loc = torch.stack([part.sum(0) for part in rows]).sum(0) / len(x)
    covariance = torch.stack([(part - loc).T @ (part - loc) for part in rows]).sum(0) / len(x)
    return loc, torch.linalg.eigh(covariance).eigenvectors.flip(-1)[:, :PRINCIPAL_COMPONENTS]


# ---------------------------------------------------------------------- images


def is_image(shape: Sequence[int]) -> bool:
    """Return True if data of this shape can be shown as images: `(1|3, H, W)` or `(H, W)`."""
    return (len(shape) == 3 and shape[0] in (1, 3)) or (len(shape) == 2 and min(shape) > 1)


def sharpness(x: Tensor) -> Tensor | None:
    """Return the mean absolute 4-neighbour Laplacian over the inner pixels and channels of every image; exact.

    It is 0 for a constant image or a ramp, and 4 for a checkerboard of zeros and ones. Blurring lowers it, apart from
    the border: a kernel of mass one cannot increase the response.

    Warning: noise is sharp too. Samples of a likelihood with noise can be sharper than data; the means of p(x | z) show
    blur. For binary data the means are grey, hence less sharp, for any model.

    Arguments:
        x: images `(n, 1|3, H, W)` or `(n, H, W)`.

    Returns:
        `(n,)`, float64, in units of the pixels; None for data that are not images, or less than 3 pixels wide or high.

    Example:
        >>> board = (torch.arange(6)[:, None] + torch.arange(6)) % 2
        >>> sharpness(board[None].float())
        tensor([4.], dtype=torch.float64)
    """
    return in_chunks(_laplacian, x).double() if is_image(x.shape[1:]) and min(x.shape[-2:]) >= 3 else None


def _laplacian(images: Tensor) -> Tensor:
    """Return the mean absolute 4-neighbour Laplacian of images `(n, ..., H, W)`, `(n,)`."""
    across = images[..., 1:-1, :-2] + images[..., 1:-1, 2:]
    along = images[..., :-2, 1:-1] + images[..., 2:, 1:-1]
    return torch.abs(across + along - 4 * images[..., 1:-1, 1:-1]).flatten(1).mean(1)
