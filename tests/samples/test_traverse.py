"""Traversals, and interpolations: what moves, what follows and what stays; ends, lines, densities of priors, codes."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, union-attr"

from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import norm
from torch import Tensor, nn

import pvae
from pvae.analysis import encode, interpolate, traverse
from pvae.analysis.samples.traversal import PRIOR_DRAWS
from pvae.data.dataset import Dataset
from pvae.errors import DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.runs.run import Run
from tests.samples import models
from tests.samples.models import MEANS, array, command, is_png, pair_of, refused, rows


def test_a_traversal_moves_one_coordinate_at_a_time():
    module, x = models.Linear(), rows(400, 3)
    pair = pair_of(module, 3)
    found = traverse(pair, x[0], rows=x, steps=5, span=2.0)
    loc, scale = array(x) @ array(module.g).T + array(module.c), array(module.scale)
    kl = (0.5 * (scale**2 + loc**2 - 1) - np.log(scale)).mean(0)
    assert found.dims == tuple(np.argsort(-kl).tolist())
    assert found.order == "KL"
    np.testing.assert_allclose(array(found.values), np.tile([-2, -1, 0, 1, 2], (2, 1)), atol=1e-6)
    for i, d in enumerate(found.dims):
        z = np.tile(loc[0], (5, 1))
        z[:, d] = [-2, -1, 0, 1, 2]
        np.testing.assert_allclose(array(found.x[i]), z @ array(module.w).T + array(module.b), atol=1e-5)


def test_a_traversal_without_data_starts_at_the_priors_mean():
    module = models.Linear()
    found = traverse(pair_of(module, 3), None, "z", dims=[1], steps=3, span=1.0)
    expected = array(module.b) + np.array([-1, 0, 1])[:, None] * array(module.w)[:, 1]
    np.testing.assert_allclose(array(found.x[0]), expected, atol=1e-6)
    assert found.dims == (1,)


def test_other_priors_are_crossed_by_their_own_spread():
    found = traverse(pair_of(models.Skewed(), 1), None, steps=3, span=2.0)
    n = PRIOR_DRAWS
    assert float(found.values[0, 1]) == pytest.approx(2, abs=4 / np.sqrt(n))  # Gamma(4, 2): mean 2, deviation 1
    assert float(found.values[0, 2] - found.values[0, 0]) / 4 == pytest.approx(1, abs=8 / np.sqrt(n))
    torch.testing.assert_close(found.x[0, :, 0], found.values[0])


def test_latents_below_follow_and_others_stay():
    pair, x = pair_of(models.Hierarchy(), 1), torch.tensor([[6.0]])
    top = traverse(pair, x, "z2", steps=3, span=1.0)
    np.testing.assert_allclose(array(top.x).ravel(), 3 * (2 * np.array([-1, 0, 1]) + 1), atol=1e-5)
    bottom = traverse(pair, x, "z1", steps=3, span=1.0)
    np.testing.assert_allclose(array(bottom.x).ravel(), 3 * array(bottom.values).ravel(), atol=1e-5)
    assert float(bottom.values[0, 2] - bottom.values[0, 0]) / 2 == pytest.approx(4.25**0.5, rel=0.12)


def test_two_latents_side_by_side_stay_where_the_row_put_them():
    found = traverse(pair_of(models.Beside(), 2), torch.tensor([0.3, 0.8]), "a", steps=3, span=1.0)
    torch.testing.assert_close(found.x[0], torch.tensor([[-3.0, 0.8], [0.0, 0.8], [3.0, 0.8]]))


def test_a_code_takes_all_its_values():
    found = traverse(pair_of(models.Mixture()), torch.tensor([2.9]), "b")
    assert found.values.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(found.x[0], MEANS[0])  # x = 2.9 is most likely of a = 0
    torch.testing.assert_close(traverse(pair_of(models.Mixture()), None, "a").x[0], torch.tensor([3.0, 1.0]))


def test_a_traversal_keeps_the_label(moons):
    x = moons.data.test.x[:1]
    found = traverse(moons, x, steps=3)
    assert sorted(found.dims) == [0, 1]
    own = encode(moons, x, mean=True)["z"]
    z = own.repeat(3, 1)
    z[:, found.dims[0]] = torch.tensor([-3.0, 0.0, 3.0])
    label = torch.nn.functional.one_hot(x[:, 2].long(), 2).float().repeat(3, 1)
    torch.testing.assert_close(found.x[0], moons.pair.model.decoder({"z": z, "y": label}).mean.detach())
    other = traverse(moons, None, steps=3, given={"y": 0})
    assert not torch.allclose(other.x, traverse(moons, None, steps=3, given={"y": 1}).x, atol=0.05)


def test_what_is_traversed_is_checked(digits, moons):
    x = digits.data.test.x
    message = r"latent: expected one of z; got 'zz' \(did you mean 'z'"
    refused(message, traverse, digits, x[0], "zz", by=DeclarationError)
    refused(r"coordinates of z, 0 .. 2; got \[3\]", traverse, digits, x[0], dims=[0, 3], by=DeclarationError)
    refused("expected one row of data; got 2", traverse, digits, x[:2])
    refused("steps=0", traverse, digits, x[0], steps=0)
    refused("beside a row", traverse, moons, moons.data.test.x[0], given={"y": 1}, by=DeclarationError)


def test_cli_traverse(folder, digits):
    out = command(folder, "traverse digits --dims 2,0 --steps 4 --row 5")
    path = digits.files.analysis / "traverse-z.npz"
    assert f"npz: {path}" in out
    with np.load(path, allow_pickle=False) as file:
        assert file["dims"].tolist() == [2, 0]
        expected = traverse(digits, digits.data.test.x[5], dims=(2, 0), steps=4)
        np.testing.assert_allclose(file["x"], expected.x, atol=1e-6)
    assert is_png(str(path.with_suffix(".png")))
    record = command(folder, "traverse moons --prior --given y=0 --json")
    assert record["shapes"]["x"] == [2, 9, 2]


# ---------------------------------------------------------------------- interpolations


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
    found = interpolate(pair_of(models.Hierarchy(), 1), X[0], X[1:], steps=5)
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
    pair = pair_of(models.Hierarchy(), 1)
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


def test_cli_interpolate(folder):
    found = command(folder, "interpolate vae 0 1 --steps 3 --json")
    assert found["shapes"]["x"][0] == 3
    assert all(Path(path).stat().st_size for path in (found["npz"], *found["png"]))
    assert len(found["png"]) == 1
    error = command(folder, "interpolate vae 0 99999", code=2)
    assert "J: expected a row of test, 0 .. 446; got 99999" in error
