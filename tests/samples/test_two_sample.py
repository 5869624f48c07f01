"""The classifier two-sample test, and the quality of samples of a run."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, union-attr"

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

import pvae
from pvae.analysis import distances, fidelity, sample, sample_quality, two_sample
from pvae.analysis.samples.quality import by_chance, relative_sharpness, space_of
from pvae.util import seeds
from tests.cli_runner import run_cli
from tests.samples.models import command, normals, refused


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
    before = torch.random.get_rng_state()
    assert two_sample(x, y).accuracy.value > 0.9
    assert torch.equal(before, torch.random.get_rng_state())
    assert two_sample(x, y) == two_sample(x, y)
    assert two_sample(x, y).accuracy != two_sample(x, y, seed=1).accuracy


def test_what_cannot_be_tested():
    x = torch.zeros(20, 2)
    refused(r"two_sample: expected samples of shape \[2\]; got \[3\]", two_sample, x, torch.zeros(20, 3))
    refused("two_sample: expected at least 8 data and samples; got 20 and 5", two_sample, x, x[:5])
    refused("two_sample: expected finite numbers; got NaN", two_sample, x, x + math.nan)


@pytest.mark.parametrize("name", ["vae", "gan"])
def test_any_run_is_compared(short, folder, name):
    run = pvae.Run.load(name, root=folder)
    found = sample_quality(run, rows=200)
    assert found.fidelity.n == found.fidelity.m == 200
    assert found.test.accuracy.value > 0.8
    assert found.fidelity.data_confidence is not None
    assert found.fidelity.unit == "proportion"
    assert json.loads(json.dumps(found.to_dict()))["two_sample"]["held"] == 100
    assert "precision" in str(found)
    assert sample_quality(run, rows=200).to_dict() == found.to_dict()
    assert found.distances.frechet.value > found.distances.frechet_floor.value
    assert {"frechet", "frechet_floor", "kernel", "sharpness"} <= {row for row, _, _ in found.known()}
    assert found.sharpness_of_means.value > 0


def test_samples_and_space_that_are_there_already(short, vae):
    run = vae
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


def test_commands(short, folder, tmp_path):
    found = command(folder, "two-sample gan --rows 100 --json")
    assert 0 <= found["fidelity"]["coverage"]["value"] <= 1
    assert "precision" in command(folder, "two-sample vae --rows 100 --mean")
    assert command(folder, "critic vae --rows 200 --json")["nwj"]["kind"] == "lower_bound"


def test_a_gan_is_refused_where_a_likelihood_is_needed(folder):
    lines = {("gan" in line): line for line in command(folder, "runs").splitlines()}
    assert "elbo" in lines[False]
    assert "elbo" not in lines[True]
    assert "npz:" in command(folder, "sample gan -n 4")
    assert "critic's loss" in run_cli("check", "gan", "--build")[0]
    for name in ("surgery", "evidence", "gap", "posterior", "critic", "encode", "reconstruct"):
        assert "without a likelihood" in command(folder, f"{name} gan", code=65)
    error = command(folder, "refit gan latents.z.prior.kind=realnvp", code=2)
    assert "refit: expected a run with an encoder" in error


def test_a_report_of_a_gan_has_no_elbo(short, folder):
    assert "elbo" not in command(folder, "report gan").lower()
