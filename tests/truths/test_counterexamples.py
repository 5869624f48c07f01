"""The counterexamples: exact densities, and a study of them."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, union-attr"

import math

import numpy as np
import pandas
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from sklearn.decomposition import PCA

from pvae.analysis.truths.selfcheck import digits
from pvae.data.dataset import Dataset, load
from pvae.data.sources.collections import Digits
from tests.samples.models import normals, refused
from tests.soak.measure_counterexamples import box, counterexamples, diluted, factor_normal, main, training_mixture


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classifiers that learn for a moment."""
    monkeypatch.setattr("pvae.analysis.samples.features.EXPOSURES", 4000)


def test_likelihoods_are_exact():
    x = torch.from_numpy(digits(None)[0])
    train, test = x[:1000], x[1350:]
    ppca = factor_normal(train, 10)
    assert ppca.log_prob(train).mean().item() == pytest.approx(
        18.688612, abs=1e-5
    )  # PPCA of these rows, in closed form
    assert ppca.log_prob(test).mean().item() == pytest.approx(15.5197, abs=1e-4)
    fitted = PCA(10).fit(train)  # its covariance is that of n - 1 rows
    covariance = fitted.get_covariance() * (len(train) - 1) / len(train)
    want = multivariate_normal(train.mean(0), covariance).logpdf(test)
    assert ppca.log_prob(test).numpy() == pytest.approx(want, abs=1e-8)
    memory = training_mixture(train[:50], 0.1)
    want = [
        np.logaddexp.reduce(norm.logpdf(t, train[:50].numpy(), 0.1).sum(1)) - math.log(50) for t in test[:5].numpy()
    ]
    assert memory.log_prob(test[:5]).numpy() == pytest.approx(want, rel=1e-9)
    noise = box(0.0, 2.0, 3)
    inside, outside = noise.log_prob(torch.tensor([[0.5, 1.0, 2.0], [0.5, 1.0, 2.1]], dtype=torch.float64))
    assert inside == pytest.approx(-3 * math.log(2))
    assert outside == -math.inf


def test_draws_follow_their_densities():
    train = normals(400, 3, 0).double() * torch.tensor([3.0, 2.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    ppca = factor_normal(train, 1)
    drawn = ppca.sample(20_000, generator)
    want = torch.from_numpy(PCA(1).fit(train).get_covariance())
    assert torch.allclose(drawn.T.cov(), want, atol=0.3)
    assert torch.allclose(drawn.mean(0), train.mean(0), atol=0.1)
    copies = training_mixture(train, 1e-9).sample(50, generator)
    assert torch.cdist(copies, train).amin(1).max() < 1e-6
    noise = box(50.0, 60.0, 3)
    mixed = diluted(ppca, noise, 0.01).sample(20_000, generator)
    good = (mixed < 40).all(1).double().mean().item()
    assert abs(good - 0.01) < 4 * math.sqrt(0.01 * 0.99 / 20_000)  # 1 of 15 000


def test_noise_costs_at_most_log_100():
    x = torch.from_numpy(digits(None)[0])
    ppca = factor_normal(x[:1000], 10)
    for noise in (box(-1.0, 2.0, 64), box(0.0, 1.0, 64), box(5.0, 6.0, 64)):
        lost = ppca.log_prob(x) - diluted(ppca, noise, 0.01).log_prob(x)
        assert lost.max() <= math.log(100) + 1e-9
    assert lost.min().item() == pytest.approx(math.log(100))  # noise that explains nothing


def test_the_study(short):
    table = counterexamples(load(Digits()), scales=(0.01, 0.1))
    memory, ppca, noisy, data = (
        table.loc[name] for name in ("memory eps=0.01", "ppca q=10", "diluted ppca", "training data")
    )
    assert memory["test_log_p"] < -7000 < 200 < memory["train_log_p"]
    assert memory["precision"] > 5 * ppca["precision"]
    assert memory["accuracy"] < data["accuracy"] + 0.1 < ppca["accuracy"]
    assert data["precision"] > 5 * ppca["precision"]
    assert 1 < ppca["test_log_p"] - noisy["test_log_p"] <= math.log(100) + 1e-9
    assert noisy["precision"] < 0.02


def test_the_study_needs_real_numbers():
    binary, few = load(Digits(binarize="threshold")), Dataset.from_tensors(torch.rand(150, 20))
    refused("counterexamples: expected real numbers; got data.binarize = 'threshold'", counterexamples, binary)
    refused("counterexamples: expected at least 100 rows of train and test", counterexamples, few)


def test_the_table(short, tmp_path, monkeypatch, capsys):
    file = tmp_path / "table.csv"
    monkeypatch.setattr("sys.argv", ["measure_counterexamples", str(file), "--data", "digits"])
    main()
    table = pandas.read_csv(file, index_col="model")
    assert [*table] == ["train_log_p", "test_log_p", "accuracy", "precision", "coverage"]
    lost = table.test_log_p["ppca q=10"] - table.test_log_p["diluted ppca"]
    assert f"lost to noise: {lost:.4f} nats of test log p\nat most log 100 = 4.6052" in capsys.readouterr().out
