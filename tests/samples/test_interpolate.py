"""Interpolations: their ends, lines under linear decoders, densities of priors, and codes, which have no in-between."""

# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, union-attr"

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn

import pvae
from pvae.analysis import encode, interpolate
from pvae.analysis.pages.plots import sheets
from pvae.data.dataset import Dataset
from pvae.experiment.experiment import Experiment
from pvae.runs.run import Run
from tests.samples.models import Hierarchy, command, pair_of, refused

X = torch.tensor([[1.0], [-2.0]])


class Coded(nn.Module):
    """A code c of three, summed out, beside a real z; x ~ N(5 c + z, 1), z nearly known."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.tensor(1.0))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(self.one * 5 * c + z, 0.1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x - 5 * (x / 5).round(), 0.01))


def test_of_a_linear_decoder_the_way_is_a_line_and_its_prior_known():
    found = interpolate(pair_of(Hierarchy(), 1), X[0], X[1:], steps=5)
    at = torch.linspace(0, 1, 5)[:, None]
    z1 = torch.lerp(X[:1] / 3, X[1:] / 3, at)
    assert torch.equal(found.at, at[:, 0])
    assert torch.allclose(found.latents["z1"], z1, atol=1e-6)
    assert torch.allclose(found.latents["z2"], z1 - 1, atol=1e-6)  # all levels move together
    assert torch.allclose(found.x, 3 * z1, atol=1e-5)
    assert torch.allclose(found.x.diff(dim=0), (found.x[1] - found.x[0]).expand(4, -1), atol=1e-5)
    log_prior = norm.logpdf(z1 - 1).sum(1) + norm.logpdf(z1, 2 * (z1 - 1) + 1, 0.5).sum(1)
    np.testing.assert_allclose(found.log_prior.numpy(), log_prior, rtol=1e-5)
    assert found.log_prior.dtype is torch.float64


def test_a_code_that_both_rows_share_stays_and_others_have_no_in_between():
    pair = pair_of(Coded())
    found = interpolate(pair, torch.tensor([5.4]), torch.tensor([4.8]), steps=3)
    assert found.latents["c"].tolist() == [1, 1, 1]
    assert found.x.tolist() == pytest.approx([5.4, 5.1, 4.8], abs=1e-5)
    z = np.array([0.4, 0.1, -0.2])
    assert found.log_prior.numpy() == pytest.approx(norm.logpdf(z) - np.log(3), abs=1e-5)
    message = "interpolate: expected latents of real numbers.*got c, .* cannot be interpolated"
    refused(message, interpolate, pair, torch.tensor([0.1]), torch.tensor([5.1]))


def test_what_has_no_way():
    """FAULTS 24: too few rows, too few steps."""
    pair = pair_of(Hierarchy(), 1)
    refused("interpolate: expected at least two steps; got steps=1", interpolate, pair, X[0], X[1], 1)
    refused("interpolate: expected one row of data; got 2. Pass", interpolate, pair, X, X[1])


# ---------------------------------------------------------------------- of declared systems


SMALL = ["encoder.network.hidden=[8]", "decoder.network.hidden=[8]"]
ZOO = ["vae", "hvae", "ladder", "realnvp_prior", "iaf_posterior"]


@pytest.mark.parametrize("name", ZOO)
def test_the_ends_are_the_reconstructions_of_both_rows(name):
    x = torch.bernoulli(torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    pair = Experiment.load(name, SMALL).build((1, 8, 8)).adopt(x)
    a, b = x[:1], x[1:2]
    found = interpolate(pair, a, b, steps=3)
    for x, end in ((a, 0), (b, -1)):
        codes = encode(pair, x, mean=True)
        values = {z: code.value for z, code in codes.latents.items()}
        with torch.no_grad():
            trace = pair.eval().model_trace(x, values)
        node = trace.nodes["x"]
        assert torch.allclose(found.x[end], node["fn"].mean[0], atol=1e-6)
        for z, value in values.items():
            assert torch.equal(found.latents[z][end], value[0])
    assert torch.equal(found.x, interpolate(pair, a, b, steps=3).x)
    assert found.log_prior.isfinite().all()


@pytest.fixture(scope="module")
def told_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two classes in the plane, told to the model."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (200,), generator=generator)
    x = torch.randn(200, 2, generator=generator) + 3 * y[:, None]
    spec = {
        "name": "told", "covariates": {"y": {"codes": 2}},
        "latents": {"z": {"dim": 2, "given": ["y"], "prior": {"kind": "conditional_normal"}}},
        "decoder": {"given": ["z", "y"], "likelihood": {"kind": "normal"}}, "train": {"epochs": 1, "engine": "eager"},
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("runs")
    return pvae.fit(
        Experiment.from_dict(spec), data=Dataset.from_tensors(x, y), run_dir=folder, device="cpu", progress=False
    )


def test_covariates_are_those_of_the_first_row(told_run):
    rows = told_run.data.test.x
    a, b = rows[rows[:, 2] == 0][:1], rows[rows[:, 2] == 1][:1]
    found = interpolate(told_run, a, b, steps=3)
    z = encode(told_run, b, mean=True)["z"]
    told = torch.tensor([[1.0, 0.0]])
    with torch.no_grad():
        assert torch.allclose(found.x[-1:], told_run.pair.model.decoder({"z": z, "y": told}).mean, atol=1e-6)
        prior = told_run.pair.model.prior("z", {"y": told}).log_prob(z)
    assert float(found.log_prior[-1]) == pytest.approx(float(prior), rel=1e-5)


def test_it_is_saved_and_shown(told_run, tmp_path):
    found = interpolate(told_run, told_run.data.test.x[0], told_run.data.test.x[1])
    with np.load(found.save(tmp_path / "way.npz"), allow_pickle=False) as saved:
        assert set(saved) == {"x", "at", "latents/z", "log_prior"}
        assert saved["x"].shape == (9, 2)
    assert sheets.interpolated(found, told_run.data.train.data.numpy()) is not None


def test_the_command(folder):
    found = command(folder, "interpolate vae 0 1 --steps 3 --json")
    assert found["shapes"]["x"][0] == 3
    assert all(Path(path).stat().st_size for path in (found["npz"], *found["png"]))
    assert len(found["png"]) == 1
    error = command(folder, "interpolate vae 0 99999", code=2)
    assert "J: expected a row of test, 0 .. 446; got 99999" in error
