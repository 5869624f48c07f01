"""Samples beside data: two-sample test, precision to coverage, distances, sharpness, critic's KL, counterexamples."""

# A figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, union-attr"

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
from scipy.linalg import sqrtm
from scipy.stats import norm
from sklearn.datasets import load_digits
from torch import Tensor

import pvae
from pvae import cli
from pvae.analysis import (
    counterexamples,
    critic,
    distances,
    features,
    fidelity,
    frechet,
    kernel_distance,
    sample,
    sample_quality,
    sharpness,
    surgery,
    two_sample,
)
from pvae.analysis.samples.fidelity import expected_coverage
from pvae.analysis.samples.sharpness import relative_sharpness
from pvae.analysis.samples.two_sample import by_chance, space_of
from pvae.analysis.truths.counterexamples import Box, Diluted, FactorNormal, Memory
from pvae.analysis.truths.models import probabilistic_pca
from pvae.data import Dataset, load
from pvae.data.sources.digits import Digits
from pvae.errors import DataError
from pvae.pair.pair import Pair
from pvae.util import seeds

TINY = ["encoder.network.hidden=[16]", "decoder.network.hidden=[16]", "train.engine=eager"]


def normals(n: int, d: int, seed: int, loc: float = 0.0) -> Tensor:
    return loc + torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classifiers that learn for a moment, critics of few draws."""
    monkeypatch.setattr(sys.modules["pvae.analysis.samples.features"], "EXPOSURES", 4000)
    monkeypatch.setattr(sys.modules["pvae.analysis.samples.critic"], "DRAWS", 4000)


# ---------------------------------------------------------------------- the two-sample test


@pytest.mark.parametrize("named", range(9))
def test_p_value_counts_labellings(named):
    held, called = 4, [1] * named + [0] * (8 - named)
    hits = [sum(called[i] for i in data) for data in itertools.combinations(range(2 * held), held)]
    for h in range(held + 1):
        assert by_chance(h, named, held) == pytest.approx(np.mean([found >= h for found in hits]))


def test_of_one_law_p_values_are_uniform(short):
    # Of 40 uniform p-values more than 7 lie below .05 in 1 of 2000 cases, fewer than 8 above .5 in 1 of 10 000.
    found = [two_sample(normals(200, 2, 2 * i), normals(200, 2, 2 * i + 1), seed=i) for i in range(40)]
    p = np.array([one.p_value.value for one in found])
    assert (p < 0.05).sum() <= 7
    assert (p > 0.5).sum() >= 8
    assert len(set(p)) > 10
    mean = np.mean([one.accuracy.value for one in found])
    assert abs(mean - 0.5) < 4 * 0.5 / math.sqrt(40 * 200)


@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_of_shifted_normals_accuracy_is_bayes(shift):
    # The best classifier is right with probability Phi(shift / 2); 4 standard errors are passed in 1 of 15 000 cases.
    found = two_sample(normals(4000, 1, 1), normals(4000, 1, 2, shift), seed=0)
    bayes = norm.cdf(shift / 2)
    error = 4 * found.accuracy.standard_error
    assert bayes - error - 0.01 < found.accuracy.value < bayes + error
    assert found.total_variation.value == pytest.approx(2 * found.accuracy.value - 1)
    assert found.total_variation.value < 2 * bayes - 1 + 2 * error
    assert found.p_value.value < 1e-6
    assert (found.n, found.held) == (2000, 2000)


def test_images_that_differ_in_one_pixel_are_told_apart(short):
    x = normals(200, 36, 0).reshape(200, 1, 6, 6)
    y = normals(200, 36, 1).reshape(200, 1, 6, 6)
    y[:, 0, 2, 3] += 4
    assert two_sample(x, y).accuracy.value > 0.9
    assert two_sample(x, y) == two_sample(x, y)
    assert two_sample(x, y).accuracy != two_sample(x, y, seed=1).accuracy


def test_the_test_leaves_random_state_alone(short):
    before = torch.random.get_rng_state()
    two_sample(normals(20, 2, 0), normals(20, 2, 1))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (torch.zeros(20, 2), torch.zeros(20, 3), r"two_sample: expected samples of shape \[2\]; got \[3\]"),
        (torch.zeros(20, 2), torch.zeros(5, 2), "two_sample: expected at least 8 data and samples; got 20 and 5"),
        (torch.zeros(20, 2), torch.full((20, 2), math.nan), "two_sample: expected finite numbers; got NaN"),
    ],
)
def test_what_cannot_be_tested(real, fake, message):
    with pytest.raises(DataError, match=message):
        two_sample(real, fake)


# ---------------------------------------------------------------------- precision, recall, density, coverage


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
    monkeypatch.setattr(sys.modules["pvae.analysis.samples.fidelity"], "BLOCK", block)
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


@pytest.mark.parametrize(
    ("real", "fake", "k", "message"),
    [
        (torch.zeros(20, 2), torch.zeros(20, 3), 5, r"fidelity: expected samples of shape \[2\]; got \[3\]"),
        (torch.zeros(20, 2), torch.zeros(5, 2), 5, "fidelity: expected more rows of each kind than k = 5"),
        (torch.zeros(20, 2), torch.zeros(20, 2), 0, "fidelity: expected more rows of each kind than k = 0, at least 1"),
    ],
)
def test_what_has_no_neighbours(real, fake, k, message):
    with pytest.raises(DataError, match=message):
        fidelity(real, fake, k)


# ---------------------------------------------------------------------- feature spaces


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


def test_one_row_has_no_space():
    with pytest.raises(DataError, match="features: expected at least two rows"):
        features(torch.zeros(1, 3))


# ---------------------------------------------------------------------- distances of features


def spread(seed: int, d: int) -> tuple[Tensor, Tensor]:
    """Mean and covariance of some normal, of full rank."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(d, generator=generator, dtype=torch.float64), a @ a.T + 0.1 * torch.eye(d)


def of_distances(name: str) -> Any:
    return getattr(sys.modules["pvae.analysis.samples.distances"], name)


@pytest.mark.parametrize("d", [1, 3, 20])
def test_the_frechet_distance_of_normals(d):
    (loc, cov), (other, wide) = spread(0, d), spread(1, d)
    root = sqrtm((cov @ wide).numpy())
    want = ((loc - other) ** 2).sum().item() + np.trace(cov.numpy() + wide.numpy() - 2 * root.real)
    exact = of_distances("normal_frechet")
    assert exact(loc, cov, other, wide) == pytest.approx(want, rel=1e-8)
    assert exact(loc, cov, other, cov) == pytest.approx(((loc - other) ** 2).sum().item())  # shifted
    a, b = torch.rand(2, d, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert exact(loc, a.diag(), loc, b.diag()) == pytest.approx(((a.sqrt() - b.sqrt()) ** 2).sum().item())  # commuting
    flat = torch.ones(d, d, dtype=torch.float64)  # of rank one
    assert exact(loc, flat, loc, 4 * flat) == pytest.approx(d)
    assert exact(loc, cov, loc, cov) == pytest.approx(0, abs=1e-9)


def test_frechet_and_kernel_distances_and_their_errors():
    # Errors beside the spread of 60 repetitions, whose own error is 1 / sqrt(120): 4 of them, and the bias of the first
    # order for the Frechet distance; means at 4 standard errors. Each fails in 1 of 15 000 cases.
    scale = torch.tensor([1.0, 1.5, 1.0, 0.5], dtype=torch.float64)
    found = []
    for i in range(60):
        real, fake = normals(400, 4, 2 * i).double(), normals(300, 4, 2 * i + 1).double() * scale
        fake[:, 0] += 0.7
        found.append((frechet(real, fake), kernel_distance(real, fake)))
    for far, truth, over in ((0, 0.49 + 0.25 + 0.25, 0.12), (1, _kernel_of_normals(0.7, scale), 0.0)):
        values, errors = (np.array([getattr(one[far], what) for one in found]) for what in ("value", "standard_error"))
        error = 4 * values.std() / math.sqrt(60)
        assert -error < values.mean() - truth < error + over
        assert 0.63 < values.std() / errors.mean() < 1.37


def _kernel_of_normals(shift: float, scale: Tensor) -> float:
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
    monkeypatch.setattr(sys.modules["pvae.analysis.samples.fidelity"], "BLOCK", block)
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
    with pytest.raises(DataError, match="distances: expected at least 4 rows of data and 2 samples, of one width"):
        distances(x[:3], x)


# ---------------------------------------------------------------------- sharpness


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


# ---------------------------------------------------------------------- of a run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    pvae.fit("vae", *TINY, "train.epochs=2", run_dir=folder, device="cpu", progress=False)
    small = ["decoder.network.hidden=[16]", "objective.critic.hidden=[16]"]
    pvae.fit("gan", *small, "train.epochs=2", run_dir=folder, device="cpu", progress=False)
    return folder


@pytest.mark.parametrize("name", ["vae", "gan"])
def test_any_run_is_compared(short, runs, name):
    run = pvae.Run.load(name, root=runs)
    found = sample_quality(run, rows=200)
    assert found.fidelity.n == found.fidelity.m == 200
    assert found.test.accuracy.value > 0.8
    assert found.fidelity.data_confidence is not None
    assert found.fidelity.unit == "share"
    assert json.loads(json.dumps(found.to_dict()))["two_sample"]["held"] == 100
    assert "precision" in str(found)
    assert sample_quality(run, rows=200).to_dict() == found.to_dict()
    assert found.distances.frechet.value > found.distances.frechet_floor.value
    assert {"frechet", "frechet_floor", "kernel", "sharpness"} <= {row for row, _, _ in found.known()}
    assert found.sharpness_of_means.value > 0


def test_samples_and_space_that_are_there_already(short, runs):
    run = pvae.Run.load("vae", root=runs)
    drawn, space = sample(run, 200), space_of(run)
    found = sample_quality(run, rows=200, fake=drawn, space=space)
    assert found.to_dict() == sample_quality(run, rows=200).to_dict()
    data = run.data.test.data[seeds.subset(len(run.data.test), 200, 0)]
    assert found.fidelity.to_dict() == fidelity(data, drawn.x, space=space).to_dict()
    assert found.distances.to_dict() == distances(space.embed(data), space.embed(drawn.x)).to_dict()
    assert found.sharpness == relative_sharpness(drawn.x, data)
    means = sample_quality(run, rows=200, fake=sample(run, 100, mean=True), space=space)
    assert (means.is_mean, means.fidelity.m) == (True, 100)
    assert means.sharpness_of_means is None
    assert means.sharpness.value < found.sharpness.value


def run_cli(*arguments: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> tuple[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pvae", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    captured = capsys.readouterr()
    assert caught.value.code == code, captured.err
    return captured.out, captured.err


def test_commands(short, runs, tmp_path, capsys):
    where = ["--run-dir", str(runs)]
    out, _ = run_cli("two-sample", "gan", "--rows", "100", "--json", *where, capsys=capsys)
    assert 0 <= json.loads(out)["fidelity"]["coverage"]["value"] <= 1
    out, _ = run_cli("two-sample", "vae", "--rows", "100", "--mean", *where, capsys=capsys)
    assert "precision" in out
    out, _ = run_cli("critic", "vae", "--rows", "200", "--json", *where, capsys=capsys)
    assert json.loads(out)["nwj"]["kind"] == "lower_bound"
    out, _ = run_cli("counterexamples", "--json", "--out", str(tmp_path / "table"), capsys=capsys)
    assert json.loads(out)["bound"] == pytest.approx(math.log(100))
    assert (tmp_path / "table.csv").read_text().startswith("model,train_log_p,test_log_p,accuracy,precision,coverage")
    out, _ = run_cli("runs", *where, capsys=capsys)
    lines = {("gan" in line): line for line in out.splitlines()}
    assert "elbo" in lines[False]
    assert "elbo" not in lines[True]
    out, _ = run_cli("report", "gan", *where, capsys=capsys)
    assert "elbo" not in out.lower()
    out, _ = run_cli("sample", "gan", "-n", "4", *where, capsys=capsys)
    assert "npz:" in out
    out, _ = run_cli("check", "gan", "--build", capsys=capsys)
    assert "critic's loss" in out
    for command in ("surgery", "evidence", "gap", "posterior", "critic", "encode", "reconstruct"):
        _, error = run_cli(command, "gan", *where, capsys=capsys, code=65)
        assert "without a likelihood" in error
    _, error = run_cli("refit", "gan", "latents.z.prior.kind=realnvp", *where, capsys=capsys, code=2)
    assert "refit: expected a run with an encoder" in error
    _, error = run_cli("counterexamples", "--data", "tensor", capsys=capsys, code=2)
    assert "--data: expected one of digits, fashion_mnist, mnist" in error


# ---------------------------------------------------------------------- KL(q_agg || p) from samples


def channel(gain: float, noise: float, loc: float, d: int) -> Pair:
    """z = gain x + loc + noise, against p = N(0, I); with no noise at all, a point."""

    def model(x: Tensor) -> None:
        one = pyro.param("one", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(d), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * one, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            at = gain * x + loc
            pyro.sample("z", dist.Normal(at, noise).to_event(1) if noise else dist.Delta(at, event_dim=1))

    return Pair(model, guide).adopt(torch.zeros(3, d))


@pytest.mark.parametrize(("gain", "noise", "loc", "d"), [(0.8, 0.6, 0.0, 2), (0.5, 0.3, 0.7, 2), (1.3, 0.0, 0.2, 1)])
def test_of_normals_the_critic_finds_the_exact_kl(gain, noise, loc, d):
    x, variance = normals(4000, d, 1), gain**2 + noise**2
    exact = d * 0.5 * (variance + loc**2 - 1 - math.log(variance))
    found = critic(channel(gain, noise, loc, d), x)
    # 4 standard errors, 1 of 15 000, and what a network of finite data misses.
    assert abs(found.kl.value - exact) < 4 * found.kl.standard_error + 0.02 + 0.02 * exact
    assert abs(found.nwj.value - exact) < 4 * found.nwj.standard_error + 0.02 + 0.02 * exact
    assert found.nwj.value <= found.dv.value + 1e-12
    if exact == 0:
        assert found.cross_entropy.value == pytest.approx(math.log(2), abs=2e-3)


def test_it_agrees_with_surgery_where_densities_are_known():
    x = normals(3000, 1, 0)
    x = 0.4 * x + torch.where(torch.arange(3000)[:, None] % 2 == 0, 1.5, -1.5)  # two humps
    pair = channel(1.0, 0.3, 0.0, 1)
    found, taken = critic(pair, x), surgery(pair, x, samples=4).marginal_kl

    def integrand(z: float) -> float:
        q = (norm.pdf(z, 1.5, 0.5) + norm.pdf(z, -1.5, 0.5)) / 2
        return q * (math.log(q) - norm.logpdf(z)) if q > 1e-300 else 0.0

    exact = quad(integrand, -6, 6, limit=200)[0]
    assert taken.value == pytest.approx(exact, abs=0.03)
    assert abs(found.kl.value - exact) < 4 * found.kl.standard_error + 0.02
    assert abs(found.kl.value - taken.value) < 4 * found.kl.standard_error + 0.04


def test_a_code_is_seen_as_it_is(short):
    table = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1]])
    log_table = table.log()

    def model(x: Tensor) -> None:
        one = pyro.param("one", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(c.float()[:, None] * one, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=log_table[x[:, 0].long()]))

    x = (torch.arange(3000) % 3).float()[:, None]
    q = table.mean(0).double()
    found = critic(Pair(model, guide).adopt(x[:3]), x)
    assert found.dim == 2
    assert found.kl.value == pytest.approx(float((q * (2 * q).log()).sum()), abs=0.01)


def test_given_a_label_it_is_the_mean_over_labels(short):
    """q(z | y) = N(2 y, 1) against p(z) = N(0, 1): KL is 0 or 2, and E_y of it 1; that of q(z) alone would be less."""
    experiment = pvae.Experiment.from_dict(
        {
            "data": {"source": "tensor"},
            "covariates": {"y": {"codes": 2}},
            "latents": {"z": {"dim": 1, "posterior": {"kind": "normal", "given": ["x", "y"]}}},
            "encoder": {"kind": "shared", "network": {"kind": "mlp", "hidden": []}},
            "decoder": {"given": ["z", "y"], "network": {"kind": "mlp", "hidden": []}, "likelihood": "normal"},
        }
    )
    pair = experiment.build((1,))
    ((name, weight),) = [(name, p) for name, p in pair.guide.posteriors.named_parameters() if p.dim() == 2]
    assert weight.shape == (2, 3), name  # location and log-variance, of x and the label's two columns
    with torch.no_grad():
        for p in pair.guide.posteriors.parameters():
            p.zero_()
        weight[0, 2] = 2.0
    rows = torch.cat([normals(4000, 1, 0), (torch.arange(4000) % 2).float()[:, None]], 1)
    found = critic(pair, rows)
    assert found.dim == 3
    assert abs(found.kl.value - 1) < 4 * found.kl.standard_error + 0.03


def test_few_rows_are_refused():
    with pytest.raises(DataError, match="critic: expected at least 40 rows; got 10"):
        critic(channel(1.0, 0.5, 0.0, 1), torch.zeros(10, 1))


# ---------------------------------------------------------------------- the counterexamples


def test_likelihoods_are_exact():
    x = digits()[0].flatten(1).double()
    train, test = x[:1000], x[1350:]
    ppca = FactorNormal(train, 10)
    assert ppca.log_prob(train).mean().item() == pytest.approx(18.688612, abs=1e-5)  # TRUTHS: PPCA of these rows
    assert ppca.log_prob(test).mean().item() == pytest.approx(15.5197, abs=1e-4)
    law = probabilistic_pca(train.numpy(), 10)
    assert ppca.log_prob(test).numpy() == pytest.approx(law.log_p(test.numpy()), abs=1e-8)
    memory = Memory(train[:50], 0.1)
    want = [
        np.logaddexp.reduce(norm.logpdf(t, train[:50].numpy(), 0.1).sum(1)) - math.log(50) for t in test[:5].numpy()
    ]
    assert memory.log_prob(test[:5]).numpy() == pytest.approx(want, rel=1e-9)
    box = Box(0.0, 2.0, 3)
    inside, outside = box.log_prob(torch.tensor([[0.5, 1.0, 2.0], [0.5, 1.0, 2.1]], dtype=torch.float64))
    assert inside == pytest.approx(-3 * math.log(2))
    assert outside == -math.inf


def test_draws_follow_their_densities():
    train = normals(400, 3, 0).double() * torch.tensor([3.0, 2.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    ppca = FactorNormal(train, 1)
    drawn = ppca.sample(20_000, generator)
    vectors = ppca.directions[:, 0]
    want = (ppca.values[0] - ppca.rest) * torch.outer(vectors, vectors) + ppca.rest * torch.eye(3)
    assert torch.allclose(drawn.T.cov(), want, atol=0.3)
    assert torch.allclose(drawn.mean(0), train.mean(0), atol=0.1)
    copies = Memory(train, 1e-9).sample(50, generator)
    assert torch.cdist(copies, train).amin(1).max() < 1e-6
    noise = Box(50.0, 60.0, 3)
    mixed = Diluted(ppca, noise, 0.01).sample(20_000, generator)
    good = (mixed < 40).all(1).double().mean().item()
    assert abs(good - 0.01) < 4 * math.sqrt(0.01 * 0.99 / 20_000)  # 1 of 15 000


def test_noise_costs_at_most_log_100():
    x = digits()[0].flatten(1).double()
    ppca = FactorNormal(x[:1000], 10)
    for noise in (Box(-1.0, 2.0, 64), Box(0.0, 1.0, 64), Box(5.0, 6.0, 64)):
        lost = ppca.log_prob(x) - Diluted(ppca, noise, 0.01).log_prob(x)
        assert lost.max() <= math.log(100) + 1e-9
    assert lost.min().item() == pytest.approx(math.log(100))  # noise that explains nothing


def test_the_study(short):
    found = counterexamples(load(Digits()), scales=(0.01, 0.1))
    table = found.models()
    memory, ppca, diluted = (table.loc[name] for name in ("memory eps=0.01", "ppca q=10", "diluted ppca"))
    assert memory["test_log_p"] < -7000 < 200 < memory["train_log_p"]
    assert memory["precision"] > 5 * ppca["precision"]
    assert memory["accuracy"] < found.data_accuracy.value + 0.1 < ppca["accuracy"]
    assert ppca["test_log_p"] - diluted["test_log_p"] == pytest.approx(found.lost.value)
    assert 1 < found.lost.value <= math.log(100) + 1e-9
    assert diluted["precision"] < 0.02
    assert found.lost.kind == "exact"
    assert json.loads(json.dumps(found.to_dict()))["dim"] == 64


def test_the_study_needs_real_numbers():
    with pytest.raises(DataError, match="counterexamples: expected real numbers; got data.binarize = 'threshold'"):
        counterexamples(load(Digits(binarize="threshold")))
    with pytest.raises(DataError, match="counterexamples: expected at least 100 rows of train and test"):
        counterexamples(Dataset.from_tensors(torch.rand(150, 20)))
