"""Precision, recall, density and coverage, feature spaces and sharpness."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, union-attr"

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from pvae.analysis import features, fidelity, sharpness
from pvae.analysis.samples.fidelity import expected_coverage
from pvae.analysis.samples.quality import relative_sharpness
from tests.samples.models import normals, refused


def by_hand(real: np.ndarray, fake: np.ndarray, k: int) -> dict[str, float]:
    """As the two papers write them, pair by pair."""

    def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.array([[np.sqrt(((x - y) ** 2).sum()) for y in b] for x in a])

    reach_real = np.sort(distance(real, real), 1)[:, k]
    reach_fake = np.sort(distance(fake, fake), 1)[:, k]
    between = distance(real, fake)
    return {
        "precision": np.mean([any(between[i, j] <= reach_real[i] for i in range(len(real))) for j in range(len(fake))]),
        "recall": np.mean([any(between[i, j] <= reach_fake[j] for j in range(len(fake))) for i in range(len(real))]),
        "density": np.mean([sum(between[:, j] <= reach_real) / k for j in range(len(fake))]),
        "coverage": np.mean([between[i].min() <= reach_real[i] for i in range(len(real))]),
    }  # fmt: skip


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [7, 2**23])
def test_figures_are_those_of_the_papers(k, block, monkeypatch):
    monkeypatch.setattr("pvae.analysis.samples.fidelity.DISTANCES_PER_BLOCK", block)
    rng = np.random.default_rng(k)
    real, fake = rng.normal(size=(40, 3)), rng.normal(0.4, 0.8, size=(30, 3))
    found = fidelity(torch.tensor(real), torch.tensor(fake), k)
    for name, value in by_hand(real, fake, k).items():
        assert getattr(found, name).value == pytest.approx(value, abs=1e-12), name


def clusters(n: int, seed: int, *centres: float) -> Tensor:
    return torch.cat([normals(n, 2, seed + i, centre) for i, centre in enumerate(centres)])


def test_a_dropped_mode_halves_recall_and_coverage():
    real = clusters(200, 0, 0.0, 100.0)
    found = fidelity(real, real[:200] + 1e-6)
    assert found.precision.value == 1.0
    assert found.recall.value == 0.5
    assert found.coverage.value == 0.5


def test_noise_lowers_precision_and_not_coverage():
    real = normals(200, 2, 0)
    noise = 1000 * torch.stack([torch.arange(1, 201), -torch.arange(1, 201)], 1).float()
    found = fidelity(real, torch.cat([real + 1e-6, noise]))
    assert found.precision.value == 0.5
    assert found.coverage.value == 1.0


def test_an_outlier_fools_precision_and_recall_alone():
    real = torch.cat([normals(200, 2, 0), torch.full((1, 2), 400.0)])  # its ball reaches the others
    fake = normals(200, 2, 1, 200.0)
    found = fidelity(real, fake)
    assert found.precision.value == 1.0
    assert found.density.value == pytest.approx(1 / 5)
    assert found.coverage.value == pytest.approx(1 / 201)


def test_expected_coverage_counts_orders():
    n, m, k = 4, 3, 2  # a datum's 3 other data and the samples, in every order of distance
    orders = set(itertools.permutations("ddd" + "sss"))
    missed = np.mean([order[:k] == ("d",) * k for order in orders])
    assert expected_coverage(n, m, k) == pytest.approx(1 - missed)
    found = [fidelity(normals(300, 2, 2 * i), normals(300, 2, 2 * i + 1)) for i in range(10)]
    covered = np.array([one.coverage.value for one in found])
    assert covered.mean() == pytest.approx(expected_coverage(300, 300, 5), abs=4 * covered.std() / math.sqrt(10))
    assert np.mean([one.density.value for one in found]) == pytest.approx(1.0, abs=0.1)


def test_what_has_no_neighbours():
    x = torch.zeros(20, 2)
    refused(r"fidelity: expected samples of shape \[2\]; got \[3\]", fidelity, x, torch.zeros(20, 3))
    refused("fidelity: expected more rows of each kind than k = 5", fidelity, x, x[:5])
    refused("fidelity: expected more rows of each kind than k = 0, at least 1", fidelity, x, x, 0)
    refused("features: expected at least two rows", features, x[:1])


def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.images / 16, dtype=torch.float32)[:, None], torch.tensor(found.target)


def test_a_classifier_of_the_labels_is_the_space():
    x, y = digits()
    before = torch.random.get_rng_state()
    space, again = features(x[:1000], y[:1000]), features(x[:1000], y[:1000])
    assert torch.equal(before, torch.random.get_rng_state())
    held = x[1350:]
    assert space.embed(held).shape == (447, 128)
    assert torch.equal(space.embed(held), again.embed(held))
    assert (space.probs(held).argmax(1) == y[1350:]).double().mean() > 0.88
    found = fidelity(x[1000:1350], held, space=space)
    assert set(found.shares) == set("0123456789")
    assert sum(share.value for share in found.shares.values()) == pytest.approx(1.0)
    counted = (space.probs(held).argmax(1) == 3).double().mean()
    assert found.shares["3"].value == pytest.approx(counted.item())
    assert found.relative_confidence.value == pytest.approx(found.confidence.value / found.data_confidence.value)
    assert found.precision.value > 0.8


def test_without_labels_it_is_principal_components():
    x = normals(300, 5, 0) * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    space = features(x)
    assert space.probs(x) is None
    embedded = space.embed(x)
    assert torch.allclose(torch.cdist(embedded, embedded), torch.cdist(x.double(), x.double()), atol=1e-6)
    variances = embedded.var(0)
    assert torch.equal(variances, variances.sort(descending=True).values)
    wide = normals(100, 80, 1)
    centred = (wide - wide.mean(0)).double().numpy()
    singular = np.linalg.svd(centred, compute_uv=False)[:50]
    assert features(wide).embed(wide).square().sum(0).sqrt().numpy() == pytest.approx(singular, rel=1e-6)


def board(size: int) -> Tensor:
    return (torch.arange(size)[:, None] + torch.arange(size)).remainder(2).float().expand(2, 1, size, size)


def test_the_sharpness_of_known_images():
    assert sharpness(board(8)).tolist() == [4.0, 4.0]
    assert sharpness(board(8)[:, 0]).tolist() == [4.0, 4.0]
    assert sharpness(torch.full((3, 3, 8, 8), 0.7)).tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    assert sharpness(torch.arange(8.0).expand(1, 1, 8, 8)).tolist() == [0.0]  # a ramp
    point = torch.zeros(1, 1, 5, 5)
    point[0, 0, 2, 2] = 3.0
    assert sharpness(point).item() == pytest.approx((4 + 4) * 3 / 9)
    assert sharpness(torch.zeros(2, 64)) is None
    assert sharpness(torch.zeros(2, 2, 8, 8)) is None
    assert sharpness(torch.zeros(2, 1, 2, 8)) is None


def test_blurring_lowers_sharpness_and_noise_raises_it():
    x = digits()[0][:200]
    kernel = torch.ones(1, 1, 3, 3) / 9
    blurred = [x]
    for _ in range(3):
        blurred.append(torch.nn.functional.conv2d(blurred[-1], kernel, padding=1))
    found = [relative_sharpness(images, x) for images in blurred]
    assert found[0].value == 1.0
    assert all(a.value > b.value + 4 * b.standard_error for a, b in itertools.pairwise(found))
    assert relative_sharpness(x + normals(200, 64, 0).reshape(x.shape), x).value > 1
    halves = relative_sharpness(x[:100], x[100:])
    assert abs(halves.value - 1) < 4 * halves.standard_error
    assert relative_sharpness(x, 0 * x) is None
