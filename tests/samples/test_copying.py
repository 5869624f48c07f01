"""Copies of training rows: caught where there are some, and nowhere else."""

# mypy: disable-error-code="arg-type, attr-defined, union-attr"

import json
import math
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy.stats import kstest, mannwhitneyu

from pvae.analysis import copying, data_copying, features, sample
from pvae.analysis.samples.copying import nearest_of
from tests.samples.models import normals, refused

# ---------------------------------------------------------------------- the nearest row


def test_the_nearest_row_is_that_of_all_pairs():
    a, b = normals(40, 5, 0) + 300, normals(60, 5, 1) + 300
    pairs = ((a[:, None].double() - b[None].double()) ** 2).sum(2).sqrt()
    found, distance = nearest_of(a, b)
    assert torch.equal(found, pairs.argmin(1))
    assert torch.allclose(distance, pairs.amin(1), rtol=1e-12)
    bits, others = (normals(30, 20, seed).sign().clamp(min=0) for seed in (2, 3))
    counted = (bits[:, None] != others[None]).sum(2).amin(1)
    assert torch.equal(nearest_of(bits, others)[1].square().round(), counted.double())


# ---------------------------------------------------------------------- copies, fresh rows, spread


def test_of_the_law_itself_p_is_uniform_and_every_other_row_as_near():
    # Kolmogorov-Smirnov at 1 of 10 000; z of the mean share at 4 standard errors, 1 of 15 000.
    found = [
        data_copying(normals(200, 3, i), normals(150, 3, 1000 + i), normals(150, 3, 2000 + i), i) for i in range(60)
    ]
    assert kstest([one.p_value.value for one in found], "uniform").pvalue > 1e-4
    scores = np.array([(one.nearer.value - 0.5) / one.nearer.standard_error for one in found])
    assert abs(scores.mean()) < 4 / math.sqrt(60)
    assert 0.6 < scores.std() < 1.4  # the 1e-4 tails of the deviation of 60 normals
    assert np.mean([one.share.value for one in found]) == pytest.approx(0.01, abs=0.02)


def test_copies_with_a_little_noise_are_caught():
    train, held = normals(300, 4, 0), normals(200, 4, 1)
    rows = torch.randperm(300, generator=torch.Generator().manual_seed(2))[:200]
    found = data_copying(train, held, train[rows] + 1e-3 * normals(200, 4, 3))
    assert torch.equal(found.nearest, rows)
    assert found.distance.max() < 0.01
    assert found.z.value < -10
    assert found.p_value.value < 1e-20
    assert found.share.value == 1.0
    assert found.nearer.value > 0.8
    assert found.nearer.value > 0.5 + 5 * found.nearer.standard_error


def test_a_few_copies_among_good_samples_show_in_the_share_alone():
    train, held, good = normals(300, 4, 0), normals(400, 4, 1), normals(380, 4, 4)
    found = data_copying(train, held, torch.cat([good, train[:20] + 1e-3 * normals(20, 4, 3)]))
    assert abs(found.z.value) < 4
    assert 0.05 <= found.share.value < 0.09
    assert found.held_share == 0.01


def test_samples_that_spread_too_far_are_no_copies():
    found = data_copying(normals(300, 4, 0), normals(200, 4, 1), 2 * normals(200, 4, 2))
    assert found.z.value > 5
    assert found.p_value.value > 0.999
    assert abs(found.nearer.value - 0.5) < 4 * found.nearer.standard_error


def test_copies_under_noise_or_without_any_are_found_by_the_rows_they_are_nearer_to():
    # Blurred copies are farther from training rows than data are, and still nearer to these than to others.
    train, held = normals(300, 40, 0), normals(300, 40, 1)
    found = data_copying(train, held, train + 1.1 * normals(300, 40, 2))
    assert found.nearer.value > 0.5 + 5 * found.nearer.standard_error
    shrunk = data_copying(train, held, 0.5 * normals(300, 40, 3))  # means: nearer to all rows than data are, no copies
    assert shrunk.z.value < -10
    assert abs(shrunk.nearer.value - 0.5) < 4 * shrunk.nearer.standard_error


# ---------------------------------------------------------------------- what the figures are


def test_z_counts_pairs():
    distances = torch.tensor([[0.5, 1.5, 2.5, 2.5], [1.0, 2.0, 2.5, 4.0]], dtype=torch.float64)
    train = torch.zeros(2, 1, dtype=torch.float64)
    fake, held = distances[0][:, None], distances[1][:, None]
    found = data_copying(train, held, fake)
    assert (found.p_value.kind, found.p_value.note) == ("estimate", "of the normal")
    u = sum((s > h) + 0.5 * (s == h) for s in distances[0] for h in distances[1])
    ties = 1 - (3**3 - 3) / (8**3 - 8)
    assert found.z.value == pytest.approx(float((u - 8) / math.sqrt(4 * 4 * 9 / 12 * ties)))
    apart = torch.tensor([[0.1], [0.2], [0.3]]), torch.tensor([[0.15], [1.0], [2.0]])
    exact = data_copying(torch.zeros(2, 1), apart[1], apart[0]).p_value
    ranks = [sum(r) for r in combinations(range(1, 7), 3)]
    assert exact.value == pytest.approx(np.mean([r <= 1 + 3 + 4 for r in ranks]))
    assert exact.kind == "exact"
    assert exact.value == pytest.approx(mannwhitneyu([0.1, 0.2, 0.3], [0.15, 1.0, 2.0], alternative="less").pvalue)


def test_the_error_of_nearer_is_that_of_all_exchanges_of_rows():
    fake = torch.tensor([[0.0], [0.1], [0.2], [1.0], [3.0]])
    points = torch.tensor([0.0, 1.0, 2.0, 3.0])
    shares = []
    for order in permutations(range(4)):
        train, held = points[list(order[:2]), None], points[list(order[2:]), None]
        found = data_copying(train, held, fake).nearer
        shares.append(found.value)
    assert np.mean(shares) == pytest.approx(0.5)
    assert found.standard_error == pytest.approx(np.std(shares))


def test_where_all_distances_tie_nothing_is_said():
    x = torch.zeros(20, 2)
    found = data_copying(x, x, x)
    assert (found.z.value, found.p_value.value, found.share.value, found.held_share) == (0.0, 1.0, 1.0, 1.0)
    assert 0.2 < found.nearer.value < 0.8 or found.nearer.standard_error == pytest.approx(0.5, rel=0.1)


def test_distances_of_a_feature_space():
    x = normals(300, 5, 0) * torch.tensor([9.0, 1.0, 1.0, 1.0, 1.0])
    space = features(x[:100])
    plain, found = data_copying(x[:100], x[100:200], x[200:]), data_copying(x[:100], x[100:200], x[200:], space=space)
    assert torch.allclose(plain.distance, found.distance)  # all components: a rotation
    assert "5 principal components" in found.remarks[0]


def test_what_cannot_be_looked_at():
    """FAULTS 19 and 24: values that are not finite, too few rows."""
    x, few = torch.zeros(9, 2), "copying: expected at least two rows of train, held-out data and samples"
    refused(rf"{few} each, of one shape; got \[9, 2\], \[9, 2\], \[9, 3\]", data_copying, x, x, torch.zeros(9, 3))
    refused(few, data_copying, x, x[:1], x)
    refused("copying: expected finite numbers; got NaN or infinity", data_copying, x, x, x + math.nan)


# ---------------------------------------------------------------------- of a run


def test_a_run(vae, monkeypatch):
    found = copying(vae, rows=40, seed=1)
    assert json.loads(json.dumps(found.to_dict()))["samples"] == 40
    assert copying(vae, rows=40, seed=1).to_dict() == found.to_dict()
    train = vae.data.train.data
    drawn = sample(vae, 40, seed=1).x
    assert torch.allclose((drawn - train[found.nearest]).flatten(1).norm(dim=1).double(), found.distance)
    means = copying(vae, rows=40, samples=sample(vae, 30, mean=True))
    assert len(means.nearest) == 30
    assert means.is_mean
    assert "use nearer" in means.remarks[1]
    assert "z" in str(found)
    monkeypatch.setattr("pvae.analysis.samples.copying.COPIED_FROM_ROWS", 50)
    some = copying(vae, rows=40, seed=1)
    assert some.trained == 50
    assert torch.allclose((drawn - train[some.nearest]).flatten(1).norm(dim=1).double(), some.distance)


def test_a_run_that_was_trained_on_the_rows(vae):
    refused("copying: expected data that the run was not trained on; got train", copying, vae, "train")
