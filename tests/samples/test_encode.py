"""Codes and reconstructions: exact posteriors, means fed down, densities."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, union-attr"

import numpy as np
import pytest
import scipy.stats
import torch

from pvae.analysis import encode, reconstruct
from pvae.analysis.samples.running import CHUNK_ROWS
from pvae.errors import DeclarationError
from pvae.experiment.experiment import Experiment
from tests.cli_runner import TINY
from tests.samples import models
from tests.samples.models import MEANS, NOISE, array, command, is_png, pair_of, refused, rows


def test_codes_are_the_encoders():
    module, x = models.Linear(), rows(600, 3)
    pair = pair_of(module, 3)
    loc, scale = array(x) @ array(module.g).T + array(module.c), array(module.scale)
    centres, drawn = encode(pair, x, mean=True), encode(pair, x, seed=3)
    np.testing.assert_allclose(array(centres["z"]), loc, atol=1e-5)
    np.testing.assert_allclose(array(drawn.latents["z"].loc), loc, atol=1e-5)
    np.testing.assert_allclose(array(drawn.latents["z"].scale), np.broadcast_to(scale, loc.shape), atol=1e-6)
    standard = (array(drawn["z"]) - loc) / scale
    assert abs(standard.mean()) < 4 / np.sqrt(1200)
    assert standard.std() == pytest.approx(1, abs=4 / np.sqrt(2400))
    expected = scipy.stats.norm.logpdf(array(drawn["z"]), loc, scale).sum(1)
    np.testing.assert_allclose(drawn.log_q.numpy(), expected, atol=1e-4)
    assert drawn.latents["z"].is_draw
    assert not centres.latents["z"].is_draw


def test_draws_of_codes_repeat_with_the_seed():
    pair, x = pair_of(models.Linear(), 3), rows(300, 3)
    assert torch.equal(encode(pair, x, seed=1)["z"], encode(pair, x, seed=1)["z"])
    assert not torch.equal(encode(pair, x, seed=1)["z"], encode(pair, x, seed=2)["z"])
    assert torch.equal(encode(pair, x, mean=True, seed=1)["z"], encode(pair, x, mean=True, seed=2)["z"])


def test_means_are_fed_down_a_hierarchy():
    x = rows(50, 1)
    found = encode(pair_of(models.Hierarchy(), 1), x, mean=True)
    torch.testing.assert_close(found["z1"], x / 3)
    torch.testing.assert_close(found["z2"], x / 3 - 1)
    drawn = encode(pair_of(models.Hierarchy(), 1), x)
    torch.testing.assert_close(drawn.latents["z2"].loc, drawn["z1"] - 1)


def test_full_rank_posteriors_have_loc_and_scale_and_flows_neither():
    raw = {"latents": {"z": {"dim": 2, "posterior": {"kind": "full_rank_normal"}}}}
    pair = Experiment.from_dict(raw).with_overrides(*TINY).build((1, 8, 8))
    x = (rows(4, 1, 8, 8) > 0).float()
    code = encode(pair, x, mean=True).latents["z"]
    fn = pair.guide_trace(x).nodes["z"]["fn"]
    torch.testing.assert_close(code.loc, fn.loc.detach())
    torch.testing.assert_close(code.scale, fn.stddev.detach())
    assert torch.equal(code.value, code.loc)
    raw["latents"]["z"]["posterior"] = {"kind": "flow"}
    code = encode(Experiment.from_dict(raw).with_overrides(*TINY).build((1, 8, 8)), x, mean=True).latents["z"]
    assert code.is_draw
    assert code.loc is None
    assert code.scale is None


def joint_posterior(x: np.ndarray) -> np.ndarray:
    """p(a, b | x), (n, 2, 3), by Bayes."""
    prior = array(models.P_A)[:, None] * array(models.P_B)
    joint = prior * scipy.stats.norm.pdf(x[:, None, None], array(MEANS), 1.0)
    return joint / joint.sum((1, 2), keepdims=True)


def test_codes_that_are_summed_out_have_their_posterior():
    x = 3 * rows(600)
    found, exact = encode(pair_of(models.Mixture()), x), joint_posterior(array(x))
    np.testing.assert_allclose(found.latents["a"].probs.numpy(), exact.sum(2), atol=1e-5)
    np.testing.assert_allclose(found.latents["b"].probs.numpy(), exact.sum(1), atol=1e-5)
    a, b = found["a"].numpy(), found["b"].numpy()
    np.testing.assert_allclose(found.log_q.numpy(), np.log(exact[np.arange(600), a, b]), atol=1e-4)
    expected = exact.sum(0)
    counts = np.zeros((2, 3))
    np.add.at(counts, (a, b), 1)
    assert (np.abs(counts - expected) < 4 * np.sqrt(expected) + 1).all()
    likely = encode(pair_of(models.Mixture()), x, mean=True)["a"]
    np.testing.assert_array_equal(likely.numpy(), exact.sum(2).argmax(1))


def test_encode_refuses_rows_of_another_shape(digits):
    refused(r"of shape \(1, 8, 8\)", encode, digits, torch.zeros(2, 64))
    codes = encode(digits, digits.data.test.x[:2])
    refused(r"one of z; got 'zz' \(did you mean 'z'", lambda: codes["zz"], by=DeclarationError)


def test_reconstructions_are_scored_at_their_own_code():
    module, x = models.Linear(), rows(600, 3)
    pair = pair_of(module, 3)
    means, draws = reconstruct(pair, x), reconstruct(pair, x, mean=False)
    assert torch.equal(means.latents["z"], draws.latents["z"])
    expected = array(means.latents["z"]) @ array(module.w).T + array(module.b)
    np.testing.assert_allclose(array(means.x), expected, atol=1e-5)
    scored = scipy.stats.norm.logpdf(array(x), expected, NOISE).sum(1)
    np.testing.assert_allclose(means.log_p.numpy(), scored, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(draws.log_p.numpy(), scored, rtol=1e-4, atol=1e-4)
    noise = array(draws.x) - expected
    assert noise.std() == pytest.approx(NOISE, abs=4 * NOISE / np.sqrt(2 * 1800))
    standard = (array(means.latents["z"]) - array(x) @ array(module.g).T - array(module.c)) / array(module.scale)
    size = CHUNK_ROWS  # the noise of x in one chunk is not that of z in the next
    of_x, of_z = noise[:size].ravel()[: 2 * size], standard[size : 2 * size].ravel()
    assert abs(np.corrcoef(of_x, of_z)[0, 1]) < 4 / np.sqrt(2 * size)


def test_reconstructions_with_codes_and_global_latents():
    x = 3 * rows(300)
    found = reconstruct(pair_of(models.Mixture()), x)
    torch.testing.assert_close(found.x, MEANS[found.latents["a"], found.latents["b"]])
    np.testing.assert_allclose(found.log_p.numpy(), scipy.stats.norm.logpdf(array(x), array(found.x), 1.0), atol=1e-4)
    found = reconstruct(pair_of(models.Global(), 1), rows(600, 1))
    w = found.x - found.latents["z"]
    assert float(w.std()) < 1e-5
    assert 3 < float(w.mean()) < 7


def test_reconstructions_of_conditioned_data_have_the_shape_of_data(moons):
    x = moons.data.test.x[:7]
    assert x.shape == (7, 3)
    found = reconstruct(moons, x)
    assert found.x.shape == (7, 2)
    flipped = torch.cat([x[:, :2], 1 - x[:, 2:]], 1)
    assert (reconstruct(moons, flipped).x - found.x).abs().max() > 0.1


def test_cli_encode_and_reconstruct(folder, digits):
    record = command(folder, "encode digits --rows 40 --mean --json")
    with np.load(record["npz"], allow_pickle=False) as file:
        split = digits.data.test
        chosen = np.searchsorted(split.numbers, file["row"])
        np.testing.assert_array_equal(split.numbers[chosen], file["row"])
        np.testing.assert_array_equal(file["latents/z"], encode(digits, split.x[chosen], mean=True)["z"])
        np.testing.assert_array_equal(file["label"], split.words[chosen])
    assert len(chosen) == 40
    assert is_png(record["png"][0])
    record = command(folder, "reconstruct digits --split validation --rows 30 --draw --json")
    assert record["npz"].endswith("reconstruct-validation.npz")
    with np.load(record["npz"], allow_pickle=False) as file:
        assert set(np.unique(file["x"])) == {0.0, 1.0}
        assert (file["log_p"] < 0).all()
    assert is_png(record["png"][0])
