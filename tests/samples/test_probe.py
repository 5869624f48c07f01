"""Probes: codes whose accuracy is known, the readers by hand, and runs of every kind of latent."""

# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, union-attr"

import json
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import pvae
from pvae.analysis import encode, probe
from pvae.analysis.samples.probe import _right, groups
from pvae.data.dataset import Dataset
from pvae.runs.run import Run
from tests.samples.models import Beside, refused


def blobs(n: int, shift: float, seed: int) -> tuple[Tensor, Tensor]:
    """A label, and rows of which the first number is shifted by it, the second is noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=generator)
    x = torch.randn(n, 2, generator=generator)
    x[:, 0] += shift * y
    return x, y


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Run:
    module, (x, y) = Beside(), blobs(2000, 2.0, 0)
    data = Dataset.from_tensors(x, y, test=blobs(4000, 2.0, 1))
    pair = pvae.Pair(model=module.model, guide=module.guide)
    where = tmp_path_factory.mktemp("runs")
    return pvae.fit(
        pair, "train.epochs=1", "train.optimizer.lr=1e-9", data=data, run_dir=where, device="cpu", progress=False
    )


def test_the_linear_reader_is_bayes_and_noise_reads_nothing(told):
    # Two normals 2 apart: the best reader is right with probability Phi(1); 4 standard errors, 1 of 15 000.
    found, bayes = probe(told), norm.cdf(1)
    for of in ("a", "all latents", "x"):
        assert abs(found[of].linear.value - bayes) < 4 * found[of].linear.standard_error + 0.003
        assert bayes - 0.06 < found[of].knn.value < bayes + 4 * found[of].knn.standard_error
    for reading in (found["b"].linear, found["b"].knn, found.majority):
        assert abs(reading.value - 0.5) < 4 * reading.standard_error + 0.01
    p = found["a"].linear.value
    assert found["a"].linear.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 4000), rel=1e-3)
    assert found["a"].linear.kind == "estimate"
    assert (found.asked, found.trained) == (4000, len(told.data.train))


def test_gains_are_paired(told):
    found = probe(told)
    both = found["all latents"]
    assert both.linear_gain.value == pytest.approx(both.linear.value - found["x"].linear.value)
    # a and b are x, turned: the same rows are right, which unpaired errors would not know
    assert both.knn_gain.value == 0
    assert both.knn_gain.standard_error == 0
    assert found["b"].knn_gain.value < -0.2
    assert found["b"].knn_gain.standard_error > both.knn.standard_error
    assert found["x"].knn_gain is None


def test_the_readers_are_scikit_learns(told):
    found = probe(told, rows=300, seed=3)
    chosen = pvae.util.seeds.subset(4000, 300, 3)
    x, y = told.data.train.x, told.data.train.y.numpy()
    asked, labels = told.data.test.x[chosen], told.data.test.y[chosen].numpy()
    learnt, seen = (encode(told, rows, mean=True)["b"].double().numpy() for rows in (x, asked))
    linear = make_pipeline(StandardScaler(), LogisticRegression()).fit(learnt, y)
    assert found["b"].linear.value == pytest.approx(linear.score(seen, labels))
    knn = KNeighborsClassifier(5).fit(PCA(2).fit_transform(x.double()), y)
    assert found["x"].knn.value == pytest.approx(knn.score(PCA(2).fit(x.double()).transform(asked.double()), labels))
    assert found.to_dict() == probe(told, rows=300, seed=3).to_dict()


def test_few_training_rows_are_drawn_by_the_seed(told, monkeypatch):
    monkeypatch.setattr("pvae.analysis.samples.probe.PROBE_TRAINING_ROWS", 3)
    found = probe(told, rows=50, seed=1)
    assert (found.trained, found.asked) == (3, 50)
    monkeypatch.setattr("pvae.analysis.samples.probe.LINEAR_STEPS", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe(told, rows=50, seed=1)["a"].linear.value > 0.2  # cut short, and no warning


def test_codes_are_read_as_one_hots():
    """A parity of codes is linear in one-hot vectors alone; a code that no training row has is read as none of them."""
    c = torch.arange(40).reshape(-1, 1) % 4
    asked, y = torch.cat([c, torch.tensor([[9]])]), (c[:, 0] % 2).numpy()
    noise = torch.zeros(41, 2)
    for blocks in ([(c, asked)], [(noise[:40], noise), (c, asked)]):
        for right in _right(blocks, y, np.append(y, 2)):
            assert right.tolist() == [1.0] * 40 + [0.0]


SMALL = ["train.epochs=1", "train.engine=eager"]


@pytest.mark.parametrize(
    ("name", "overrides", "of"),
    [
        ("em_mixture", [], ["c", "x"]),
        ("bernoulli_vae", ["latents.b.bits=6"], ["b", "x"]),
        ("hvae", ["encoder.network.hidden=[8]", "decoder.network.hidden=[8]"], ["z2", "z1", "all latents", "x"]),
        ("vq_vae", [f"{side}.network={{kind='mlp',hidden=[8]}}" for side in ("encoder", "decoder")], ["c", "x"]),
    ],
)
def test_every_kind_of_latent_is_read(name, overrides, of, tmp_path):
    run = pvae.fit(name, *overrides, *SMALL, run_dir=tmp_path, device="cpu", progress=False)
    found = probe(run, rows=100)
    assert sorted(reading.of for reading in found.readings) == sorted(of)
    assert found["x"].knn.value > 0.6  # digits, black and white or not
    assert json.loads(json.dumps(found.to_dict()))["x/linear"]["value"] > 0.6
    assert "majority" in str(found)
    assert np.isfinite(found.majority.value)


def test_where_there_is_nothing_to_read(moons, gan, tmp_path):
    """FAULTS 24: no labels, or one; and a model that is told the label."""
    refused("a model that is not conditioned on the label; got one conditioned on y", probe, moons)
    refused("without a likelihood", probe, gan)
    (x, y), module = blobs(100, 1.0, 0), Beside()
    for labels, message in (
        (None, "probe: expected labels.*got none in train"),
        (0 * y, "probe: expected 2 to 50 labels.*got 1"),
    ):
        pair, data = pvae.Pair(model=module.model, guide=module.guide), Dataset.from_tensors(x, labels)
        run = pvae.fit(pair, "train.epochs=1", data=data, run_dir=tmp_path, device="cpu", progress=False)
        refused(message, probe, run)


# ---------------------------------------------------------------------- groups of rows


def test_groups_are_scored_as_by_hand(told: Run):
    found = groups(told)
    rows, y = told.data.test.rows, told.data.test.y.numpy()
    codes = encode(told, rows, mean=True).latents
    z = torch.cat([code.value.flatten(1).double() for code in codes.values()], 1).numpy()
    assert found.asked == len(rows) == 4000
    assert found.separated["label"].value == pytest.approx(silhouette_score(z, y), abs=1e-9)
    distance = np.square(z[:, None] - z[None, :500]).sum(-1)  # to the first rows alone
    near = np.argsort(distance[:500] + np.diag(np.full(500, np.inf)), axis=1)[:, :50]
    share = np.clip(y[:500][near].mean(1), 1e-12, 1 - 1e-12)
    by_hand = -(share * np.log(share) + (1 - share) * np.log(1 - share)).mean() / np.log(2)
    assert found.mixed["label"].value == pytest.approx(by_hand, abs=0.06)


def test_groups_that_codes_do_not_know_are_mixed(told: Run):
    y = told.data.test.y
    kept = y.clone()
    y.copy_(torch.randint(3, (4000,), generator=torch.Generator().manual_seed(3)))
    found = groups(told)
    y.copy_(kept)
    assert found.mixed["label"].value == pytest.approx(1 - 2 / (2 * 50) / math.log(3), abs=0.01)
    assert abs(found.separated["label"].value) < 0.02
