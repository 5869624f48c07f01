"""Fréchet and kernel distances against exact values and oracles."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, union-attr"

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.stats import norm
from torch import Tensor

from pvae.analysis import distances, kernel_distance
from pvae.analysis.samples.distances import normal_frechet
from tests.samples.models import normals, refused


def spread(seed: int, d: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of some normal, of full rank."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(d, generator=generator, dtype=torch.float64), a @ a.T + 0.1 * torch.eye(d)


@pytest.mark.parametrize("d", [1, 3, 20])
def test_the_frechet_distance_of_normals(d):
    (loc, cov), (other, wide) = spread(0, d), spread(1, d)
    root = sqrtm((cov @ wide).numpy())
    want = ((loc - other) ** 2).sum().item() + np.trace(cov.numpy() + wide.numpy() - 2 * root.real)
    assert normal_frechet(loc, cov, other, wide) == pytest.approx(want, rel=1e-8)
    assert normal_frechet(loc, cov, other, cov) == pytest.approx(((loc - other) ** 2).sum().item())  # shifted
    a, b = torch.rand(2, d, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert normal_frechet(loc, a.diag(), loc, b.diag()) == pytest.approx(
        ((a.sqrt() - b.sqrt()) ** 2).sum().item()
    )  # commuting
    flat = torch.ones(d, d, dtype=torch.float64)  # of rank one
    assert normal_frechet(loc, flat, loc, 4 * flat) == pytest.approx(d)
    assert normal_frechet(loc, cov, loc, cov) == pytest.approx(0, abs=1e-9)


def kernel_of_normals(shift: float, scale: Tensor) -> float:
    """MMD^2 of N(0, I_4) and N((shift, 0, 0, 0), diag scale^2): E(<x, y> / 4 + 1)^3 of independent x, y, by moments."""

    def expected(a: tuple[list[float], list[float]], b: tuple[list[float], list[float]]) -> float:
        total = 0.0
        for powers in itertools.product(range(4), repeat=4):
            if sum(powers) <= 3:
                ways = math.factorial(3) // math.prod(map(math.factorial, (*powers, 3 - sum(powers))))
                moments = [
                    norm.moment(p, *at) if p else 1.0 for law in (a, b) for p, *at in zip(powers, *law, strict=True)
                ]
                total += ways * math.prod(moments) / 4 ** sum(powers)
        return total

    p, q = ([0.0] * 4, [1.0] * 4), ([shift, 0.0, 0.0, 0.0], scale.tolist())
    return expected(p, p) + expected(q, q) - 2 * expected(p, q)


@pytest.mark.parametrize("block", [50, 2**23])
def test_the_kernel_distance_is_that_of_all_pairs(block, monkeypatch):
    monkeypatch.setattr("pvae.analysis.samples.fidelity.DISTANCES_PER_BLOCK", block)
    a, b = normals(30, 3, 0).double(), normals(20, 3, 1, 0.3).double()

    def brute(a: Tensor, b: Tensor) -> float:
        k = [[(x @ y / 3 + 1) ** 3 for y in right] for x, right in ((x, b) for x in a)]
        own = [
            sum((x @ y / 3 + 1) ** 3 for x, y in itertools.permutations(s, 2)) / len(s) / (len(s) - 1) for s in (a, b)
        ]
        return float(own[0] + own[1] - 2 * sum(map(sum, k)) / len(a) / len(b))

    found = kernel_distance(a, b)
    assert found.value == pytest.approx(brute(a, b), rel=1e-10)
    left_out = [
        np.array(
            [brute(*(torch.cat([s[:i], s[i + 1 :]]) if s is side else s for s in (a, b))) for i in range(len(side))]
        )
        for side in (a, b)
    ]
    variance = sum((len(v) - 1) / len(v) * ((v - v.mean()) ** 2).sum() for v in left_out)
    assert found.standard_error == pytest.approx(math.sqrt(variance), rel=1e-8)


def test_of_one_law_the_kernel_distance_is_nothing_and_frechets_is_the_floor():
    # Means of 40 at 4 standard errors, 1 of 15 000.
    found = [distances(normals(300, 5, 2 * i), normals(200, 5, 2 * i + 1), i) for i in range(40)]
    kernel, far, floor = (
        np.array([getattr(one, name).value for one in found]) for name in ("kernel", "frechet", "frechet_floor")
    )
    assert abs(kernel.mean()) < 4 * kernel.std() / math.sqrt(40)
    assert (kernel < 0).any()
    assert abs(far.mean() - floor.mean()) < 4 * math.hypot(far.std(), floor.std()) / math.sqrt(40) + 0.1 * far.mean()
    said = np.mean([one.frechet_floor.standard_error for one in found])
    assert 0.5 < said / far.std() < 2
    moved = distances(normals(300, 5, 0), normals(200, 5, 1, 1.0), 0)
    assert moved.kernel.value > 4 * moved.kernel.standard_error
    assert moved.frechet.value > moved.frechet_floor.value + 10 * moved.frechet_floor.standard_error
    assert moved.to_dict() == distances(normals(300, 5, 0), normals(200, 5, 1, 1.0), 0).to_dict()


def test_features_that_never_move():
    x = torch.cat([normals(50, 2, 0), torch.zeros(50, 3)], 1).double()
    found = distances(x, x[:30] + torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0], dtype=torch.float64))
    assert found.frechet.value >= 4
    assert math.isfinite(found.frechet.standard_error)
    refused("distances: expected at least 4 rows of data and 2 samples, of one width", distances, x[:3], x)
