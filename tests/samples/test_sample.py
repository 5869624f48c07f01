"""Samples: their distribution, what is given, and what is saved and shown."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, union-attr"

from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import pvae
from pvae.analysis import Traversal, encode, interpolate, reconstruct, sample, traverse
from pvae.analysis.pages.plots import base, pictures
from pvae.analysis.samples.encode import Reconstructions
from pvae.analysis.samples.running import CHUNK_NUMBERS, CHUNK_ROWS, Generated, by_chunks
from pvae.analysis.samples.sample import Samples
from pvae.data.dataset import Dataset
from pvae.errors import DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.pair.pair import Pair
from tests.samples import models
from tests.samples.conftest import MOONS
from tests.samples.models import MEANS, NOISE, Linear, N, array, command, is_png, pair_of, refused, rows


def test_samples_of_a_linear_decoder_have_the_exact_marginal():
    module = Linear()
    x, w = array(sample(pair_of(module, 3), N).x), array(module.w)
    covariance = w @ w.T + NOISE**2 * np.eye(3)
    assert np.abs(x.mean(0) - array(module.b)).max() < 4 * np.sqrt(covariance.diagonal().max() / N)
    variances = covariance.diagonal()
    errors = np.sqrt((np.outer(variances, variances) + covariance**2) / N)
    assert (np.abs(np.cov(x.T) - covariance) < 4 * errors).all()


def test_means_have_no_noise_and_draws_have_the_likelihoods():
    module = Linear()
    pair = pair_of(module, 3)
    means, draws = sample(pair, N, mean=True), sample(pair, N)
    assert means.is_mean
    assert not draws.is_mean
    expected = array(means.latents["z"]) @ array(module.w).T + array(module.b)
    np.testing.assert_allclose(array(means.x), expected, atol=1e-5)
    noise = array(draws.x) - array(draws.latents["z"]) @ array(module.w).T - array(module.b)
    assert noise.std() == pytest.approx(NOISE, abs=4 * NOISE / np.sqrt(2 * 3 * N))
    assert abs(np.corrcoef(noise[:, 0], array(draws.latents["z"])[:, 0])[0, 1]) < 4 / np.sqrt(N)


def test_means_of_bernoulli_pixels_are_probabilities(digits):
    found = sample(digits, 20, mean=True)
    logits = digits.pair.model.decoder({"z": found.latents["z"]}).base_dist.logits
    torch.testing.assert_close(found.x, logits.sigmoid().detach())
    assert 0 < found.x.min() < found.x.max() < 1
    assert set(sample(digits, 20).x.unique().tolist()) == {0.0, 1.0}


def test_same_seed_same_samples_and_nothing_moves(digits):
    digits.pair.train()
    state = torch.get_rng_state()
    first, again, other = sample(digits, 300, seed=1), sample(digits, 300, seed=1), sample(digits, 300, seed=2)
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.latents["z"], other.latents["z"])
    assert torch.equal(state, torch.get_rng_state())
    assert digits.pair.training
    assert len(first.latents["z"].unique(dim=0)) == 300  # chunks do not repeat each other


def test_progress_comes_in_chunks(digits):
    told: list[tuple[int, int]] = []
    sample(digits, 2 * CHUNK_ROWS + 1, on_progress=lambda *step: told.append(step))
    n = 2 * CHUNK_ROWS + 1
    assert told == [(CHUNK_ROWS, n), (2 * CHUNK_ROWS, n), (n, n)]
    assert torch.equal(by_chunks(lambda *at: torch.tensor([at]), 5, 2 * CHUNK_NUMBERS)[:, 0], torch.arange(5))


def test_conditional_samples_follow_their_label(moons):
    for label in (0, 1):
        found = sample(moons, 2000, given={"y": label})
        mine = moons.data.train.data[moons.data.train.y == label]
        assert found.covariates["y"].tolist() == [label] * 2000
        assert (found.x.mean(0) - mine.mean(0)).abs().max() < 0.6  # the labels' means are 2 apart
    means = [sample(moons, 50, mean=True, given={"y": y}) for y in (0, 1)]
    assert torch.equal(means[0].latents["z"], means[1].latents["z"])
    assert not torch.allclose(means[0].x, means[1].x, atol=0.1)
    mixed = sample(moons, 3, mean=True, given={"y": [0, 1, 0]})
    expected = torch.stack([sample(moons, 3, mean=True, given={"y": y}).x[i] for i, y in enumerate((0, 1, 0))])
    torch.testing.assert_close(mixed.x, expected)


def test_labels_are_drawn_as_they_occur(tmp_path):
    y = (torch.arange(200) % 5 == 0).long()  # a fifth are ones
    data = Dataset.from_tensors(torch.randn(200, 2), y)
    raw = {**MOONS, "train": {"epochs": 1, "engine": "eager"}, "data": {"source": "tensor"}}
    run = pvae.fit(Experiment.from_dict(raw), data=data, run_dir=tmp_path, progress=False)
    share = float(run.data.train.y.double().mean())
    found = sample(run, 4000)
    assert float(found.covariates["y"].double().mean()) == pytest.approx(
        share, abs=4 * (share * (1 - share) / 4000) ** 0.5
    )
    assert torch.equal(found.covariates["y"], sample(run, 4000).covariates["y"])


def test_what_is_given_is_checked(moons, digits):
    refused(r"one of y; got 'yy' \(did you mean 'y'\?\)", sample, moons, 2, given={"yy": 1}, by=DeclarationError)
    refused(r"given.y: expected 0 .. 1; got 2", sample, moons, 3, given={"y": [0, 2, 1]}, by=DeclarationError)
    refused(r"given.y: expected 0 .. 1; got -1", sample, moons, 3, given={"y": -1}, by=DeclarationError)
    half = {"y": torch.tensor(0.5)}
    refused("expected an integer, or 3 of them; got tensor", sample, moons, 3, given=half, by=DeclarationError)
    refused("no covariates; got 'y'", sample, digits, 2, given={"y": 1}, by=DeclarationError)
    refused(r"'y': 0 .. 1.*Say given=", sample, moons.pair, 2, by=DeclarationError)
    refused("n=0", sample, digits, 0)
    refused("a pvae.Run or a pvae.Pair; got str", sample, "digits", 2, by=DeclarationError)
    refused("adopt", sample, Pair(Linear().model, Linear().guide), 2, by=DeclarationError)


def test_a_likelihood_without_a_mean_gives_draws_only():
    pair = pair_of(models.Skewed(dist.Cauchy), 1)
    assert sample(pair, 5).x.shape == (5, 1)
    refused("known mean; got Cauchy", sample, pair, 5, mean=True, by=DeclarationError)


def test_global_latents_are_the_guides_and_one_for_all():
    x = sample(pair_of(models.Global(), 1), 600).x.flatten()
    assert 3 < float(x.mean()) < 7  # the prior's w lies around 0
    assert float(x.std()) < 0.3  # chunks that drew w anew would differ by 0.5


def test_summed_codes_are_sampled_from_their_prior():
    found = sample(pair_of(models.Mixture()), N)
    share = float((found.latents["a"] == 1).double().mean())
    assert share == pytest.approx(0.3, abs=4 * (0.21 / N) ** 0.5)
    noise = found.x - MEANS[found.latents["a"], found.latents["b"]]
    assert float(noise.std()) == pytest.approx(1, abs=4 / (2 * N) ** 0.5)


def test_what_is_saved_loads_without_pickle(tmp_path, moons):
    x = moons.data.test.x[:9]
    way = {"at": (9,), "log_prior": (9,)}
    results: dict[str, tuple[Generated, dict[str, tuple[int, ...]]]] = {
        "sample": (sample(moons, 5), {"x": (5, 2), "latents/z": (5, 2), "covariates/y": (5,)}),
        "encode": (encode(moons, x), {f"{key}/z": (9, 2) for key in ("latents", "loc", "scale")} | {"log_q/z": (9,)}),
        "reconstruct": (reconstruct(moons, x), {"x": (9, 2), "log_p": (9,), "latents/z": (9, 2)}),
        "interpolate": (interpolate(moons, *x[:2]), dict.fromkeys(("x", "latents/z"), (9, 2)) | way),
        "traverse": (traverse(moons, x[0], steps=4), {"x": (2, 4, 2), "values": (2, 4), "dims": (2,)}),
    }
    for name, (found, shapes) in results.items():
        path = found.save(tmp_path / f"{name}.npz")
        with np.load(path, allow_pickle=False) as file:
            loaded = dict(file)
        assert {key: a.shape for key, a in loaded.items()} == shapes
        for key, t in found.tensors().items():
            np.testing.assert_array_equal(loaded[key], t.numpy())
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"] * 5  # nothing temporary stays
    assert "latents/z [5, 2]" in repr(results["sample"][0])


@pytest.mark.parametrize(
    ("shape", "shown"),
    [
        ((1, 8, 8), True),
        ((3, 8, 4), True),
        ((8, 8), True),
        ((8, 4), False),
        ((2,), True),
        ((3,), False),
        ((2, 8, 8), False),
    ],
)
def test_pictures_are_made_of_images_and_points(shape, shown):
    assert pictures.is_shown(shape) == shown
    data = rows(20, *shape)
    drawn = Samples(data, {}, {}, True)
    moved = Traversal(data.reshape(4, 5, *shape), torch.arange(5.0).expand(4, 5), "z", (0, 1, 2, 3), "KL")
    rebuilt = Reconstructions(data, torch.arange(20.0), {}, True)
    shapes = array(data)
    made = [
        pictures.sampled(drawn, shapes),
        pictures.traversed(moved, shapes),
        pictures.reconstructed(rebuilt, shapes, shapes),
    ]
    assert [figure is not None for figure in made] == [shown] * 3
    for figure in made:
        assert figure is None or base.png(figure).startswith(b"\x89PNG")


def test_cli_sample(folder, tmp_path, moons):
    out = command(folder, f"sample moons -n 30 --given y=1 --mean --out {tmp_path / 's'}")
    assert out.splitlines() == [f"npz: {tmp_path / 's.npz'}", f"png: {tmp_path / 's.png'}"]
    with np.load(tmp_path / "s.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["x"], sample(moons, 30, mean=True, given={"y": 1}).x.numpy())
        assert set(file["covariates/y"]) == {1}
    assert is_png(str(tmp_path / "s.png"))
    record = command(folder, "sample digits --json")
    assert record["npz"] == str(Path(record["run"]) / "analysis" / "sample.npz")
    assert record["shapes"] == {"x": [64, 1, 8, 8], "latents/z": [64, 3]}
    assert is_png(record["png"][0])


def test_cli_says_what_is_wrong(folder, tmp_path):
    for line, message in {
        "sample moons --given yy=1": "did you mean 'y'",
        "sample moons --given y=one": "expected a label of the fit, upper, lower; got 'one'",
        "traverse digits --row 9999": "expected a row of test",
        "traverse digits --dims a": "expected an integer",
        "encode digits --split tset": "Expected a split",
    }.items():
        assert message in command(folder, line, code=2)
    assert "expected to be written" in command(folder, f"sample digits --out {tmp_path}/missing/s", code=73)
