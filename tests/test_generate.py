"""Samples, codes, reconstructions and traversals against what is known exactly; what they write; the command line."""

# Attributes of Modules and Pyro programs have no types.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, union-attr"

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

import pvae
from pvae import cli
from pvae.analysis import encode, reconstruct, sample, traverse
from pvae.analysis.pages import plots
from pvae.analysis.samples import generate, traversal
from pvae.data import Dataset
from pvae.errors import DataError, DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.pair.pair import Pair
from pvae.runs.run import Run

N = 20_000
NOISE = 0.4


class Linear(nn.Module):
    """x = W z + b + noise, z ~ N(0, I); q(z | x) = N(G x + c, diag scale^2)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.w = nn.Parameter(torch.randn(3, 2, generator=generator))
        self.b = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
        self.g = nn.Parameter(torch.randn(2, 3, generator=generator) * torch.tensor([[0.1], [1.0]]))
        self.c = nn.Parameter(torch.tensor([0.2, -0.1]))
        self.scale = nn.Parameter(torch.tensor([0.9, 0.3]))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.w.T + self.b, NOISE).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.g.T + self.c, self.scale).to_event(1))


class Hierarchy(nn.Module):
    """z2 ~ N(0, 1), z1 ~ N(2 z2 + 1, 0.5), x ~ N(3 z1, 1); q(z1 | x) = N(x / 3, 0.2), q(z2 | z1) = N(z1 - 1, 0.3)."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(2.0))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(self.slope * z2 + 1, 0.5).to_event(1))
            pyro.sample("x", dist.Normal(3 * z1, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x / 3, 0.2).to_event(1))
            pyro.sample("z2", dist.Normal(z1 - 1, 0.3).to_event(1))


P_A = torch.tensor([0.7, 0.3])
P_B = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])
MEANS = torch.tensor([[0.0, 3.0, 5.0], [1.0, 4.0, -2.0]])


class Mixture(nn.Module):
    """Codes a and b given a, both summed out; x ~ N(MEANS[a, b], 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Categorical(P_A), infer={"enumerate": "parallel"})
            b = pyro.sample("b", dist.Categorical(P_B[a]), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(MEANS[a, b], self.scale), obs=x)

    def guide(self, x: Tensor) -> None:
        pass


class Global(nn.Module):
    """One w ~ N(0, 1) for all data, found to be 5; x ~ N(w + z, 0.1)."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(5.0))

    def model(self, x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 0.1).to_event(1))
            pyro.sample("x", dist.Normal(w + z, 0.1).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("w", dist.Normal(self.at, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x, 0.1).to_event(1))


class Skewed(nn.Module):
    """z ~ Gamma(4, 2), a prior that is no normal; x ~ N(z, 1)."""

    def __init__(self, likelihood: Callable[..., dist.TorchDistribution] = dist.Normal) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.likelihood = likelihood

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.full((1,), 4.0), 2.0).to_event(1))
            pyro.sample("x", self.likelihood(z, self.scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(0.1 * x, 0.2).to_event(1))


def pair_of(module: nn.Module, *event: int) -> Pair:
    return Pair(module.model, module.guide).adopt(torch.zeros(3, *event))


def array(t: Tensor) -> np.ndarray:
    return t.detach().double().numpy()


def rows(n: int = 600, *event: int, seed: int = 0) -> Tensor:
    return torch.randn(n, *event, generator=torch.Generator().manual_seed(seed))


TINY = ["encoder.network.hidden=[16]", "decoder.network.hidden=[16]", "train.engine=eager"]
MOONS = {
    "name": "moons",
    "data": {"source": "toy", "density": "moons", "rows": 1000},
    "covariates": {"y": {"codes": 2}},
    "latents": {"z": {"dim": 2, "posterior": {"given": ["x", "y"]}}},
    "decoder": {"given": ["z", "y"], "likelihood": {"kind": "normal"}, "network": {"kind": "mlp", "hidden": [32]}},
    "encoder": {"network": {"kind": "mlp", "hidden": [32]}},
    "train": {"epochs": 30, "engine": "eager", "optimizer": {"kind": "adam", "lr": 0.01}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs `moons`, conditioned on its label, and `digits`, of pictures."""
    where = tmp_path_factory.mktemp("runs")
    pvae.fit(Experiment.from_dict(MOONS), run_dir=where, device="cpu", progress=False)
    pvae.fit("vae", *TINY, "latents.z.dim=3", "train.epochs=1", name="digits", run_dir=where, progress=False)
    return where


@pytest.fixture
def moons(folder: Path) -> Run:
    return Run.load("moons", root=folder)


@pytest.fixture
def digits(folder: Path) -> Run:
    return Run.load("digits", root=folder)


# ---------------------------------------------------------------------- sample


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
    sample(digits, 2 * generate.CHUNK + 1, on_progress=lambda *step: told.append(step))
    n = 2 * generate.CHUNK + 1
    assert told == [(generate.CHUNK, n), (2 * generate.CHUNK, n), (n, n)]
    assert list(generate.chunks(5, 2 * generate.NUMBERS)) == [(i, i + 1) for i in range(5)]


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
    with pytest.raises(DeclarationError, match=r"one of y; got 'yy' \(did you mean 'y'\?\)"):
        sample(moons, 2, given={"yy": 1})
    with pytest.raises(DeclarationError, match=r"given.y: expected 0 .. 1; got 2"):
        sample(moons, 3, given={"y": [0, 2, 1]})
    with pytest.raises(DeclarationError, match=r"given.y: expected 0 .. 1; got -1"):
        sample(moons, 3, given={"y": -1})
    with pytest.raises(DeclarationError, match="expected an integer, or 3 of them; got tensor"):
        sample(moons, 3, given={"y": torch.tensor(0.5)})
    with pytest.raises(DeclarationError, match="no covariates; got 'y'"):
        sample(digits, 2, given={"y": 1})
    with pytest.raises(DeclarationError, match=r"'y': 0 .. 1.*Say given="):
        sample(moons.pair, 2)
    with pytest.raises(DataError, match="n=0"):
        sample(digits, 0)
    with pytest.raises(DeclarationError, match="a pvae.Run or a pvae.Pair; got str"):
        sample("digits", 2)
    with pytest.raises(DeclarationError, match="adopt"):
        sample(Pair(Linear().model, Linear().guide), 2)


def test_a_likelihood_without_a_mean_gives_draws_only():
    pair = pair_of(Skewed(dist.Cauchy), 1)
    assert sample(pair, 5).x.shape == (5, 1)
    with pytest.raises(DeclarationError, match="known mean; got Cauchy"):
        sample(pair, 5, mean=True)


def test_global_latents_are_the_guides_and_one_for_all():
    x = sample(pair_of(Global(), 1), 600).x.flatten()
    assert 3 < float(x.mean()) < 7  # the prior's w lies around 0
    assert float(x.std()) < 0.3  # chunks that drew w anew would differ by 0.5


def test_summed_codes_are_sampled_from_their_prior():
    found = sample(pair_of(Mixture()), N)
    share = float((found.latents["a"] == 1).double().mean())
    assert share == pytest.approx(0.3, abs=4 * (0.21 / N) ** 0.5)
    noise = found.x - MEANS[found.latents["a"], found.latents["b"]]
    assert float(noise.std()) == pytest.approx(1, abs=4 / (2 * N) ** 0.5)


# ---------------------------------------------------------------------- encode


def test_codes_are_the_encoders():
    module, x = Linear(), rows(600, 3)
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
    pair, x = pair_of(Linear(), 3), rows(300, 3)
    assert torch.equal(encode(pair, x, seed=1)["z"], encode(pair, x, seed=1)["z"])
    assert not torch.equal(encode(pair, x, seed=1)["z"], encode(pair, x, seed=2)["z"])
    assert torch.equal(encode(pair, x, mean=True, seed=1)["z"], encode(pair, x, mean=True, seed=2)["z"])


def test_means_are_fed_down_a_hierarchy():
    x = rows(50, 1)
    found = encode(pair_of(Hierarchy(), 1), x, mean=True)
    torch.testing.assert_close(found["z1"], x / 3)
    torch.testing.assert_close(found["z2"], x / 3 - 1)
    drawn = encode(pair_of(Hierarchy(), 1), x)
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
    prior = array(P_A)[:, None] * array(P_B)
    joint = prior * scipy.stats.norm.pdf(x[:, None, None], array(MEANS), 1.0)
    return joint / joint.sum((1, 2), keepdims=True)


def test_codes_that_are_summed_out_have_their_posterior():
    x = 3 * rows(600)
    found, exact = encode(pair_of(Mixture()), x), joint_posterior(array(x))
    np.testing.assert_allclose(found.latents["a"].probs.numpy(), exact.sum(2), atol=1e-5)
    np.testing.assert_allclose(found.latents["b"].probs.numpy(), exact.sum(1), atol=1e-5)
    a, b = found["a"].numpy(), found["b"].numpy()
    np.testing.assert_allclose(found.log_q.numpy(), np.log(exact[np.arange(600), a, b]), atol=1e-4)
    expected = exact.sum(0)
    counts = np.zeros((2, 3))
    np.add.at(counts, (a, b), 1)
    assert (np.abs(counts - expected) < 4 * np.sqrt(expected) + 1).all()
    likely = encode(pair_of(Mixture()), x, mean=True)["a"]
    np.testing.assert_array_equal(likely.numpy(), exact.sum(2).argmax(1))


def test_encode_refuses_rows_of_another_shape(digits):
    with pytest.raises(DataError, match=r"of shape \(1, 8, 8\)"):
        encode(digits, torch.zeros(2, 64))
    with pytest.raises(DeclarationError, match=r"one of z; got 'zz' \(did you mean 'z'"):
        encode(digits, digits.data.test.x[:2])["zz"]


# ---------------------------------------------------------------------- reconstruct


def test_reconstructions_are_scored_at_their_own_code():
    module, x = Linear(), rows(600, 3)
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
    size = generate.CHUNK  # the noise of x in one chunk is not that of z in the next
    of_x, of_z = noise[:size].ravel()[: 2 * size], standard[size : 2 * size].ravel()
    assert abs(np.corrcoef(of_x, of_z)[0, 1]) < 4 / np.sqrt(2 * size)


def test_reconstructions_with_codes_and_global_latents():
    x = 3 * rows(300)
    found = reconstruct(pair_of(Mixture()), x)
    torch.testing.assert_close(found.x, MEANS[found.latents["a"], found.latents["b"]])
    np.testing.assert_allclose(found.log_p.numpy(), scipy.stats.norm.logpdf(array(x), array(found.x), 1.0), atol=1e-4)
    found = reconstruct(pair_of(Global(), 1), rows(600, 1))
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


# ---------------------------------------------------------------------- traverse


def test_a_traversal_moves_one_coordinate_at_a_time():
    module, x = Linear(), rows(400, 3)
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
    module = Linear()
    found = traverse(pair_of(module, 3), None, "z", dims=[1], steps=3, span=1.0)
    expected = array(module.b) + np.array([-1, 0, 1])[:, None] * array(module.w)[:, 1]
    np.testing.assert_allclose(array(found.x[0]), expected, atol=1e-6)
    assert found.dims == (1,)


def test_other_priors_are_crossed_by_their_own_spread():
    found = traverse(pair_of(Skewed(), 1), None, steps=3, span=2.0)
    n = traversal.PRIOR_DRAWS
    assert float(found.values[0, 1]) == pytest.approx(2, abs=4 / np.sqrt(n))  # Gamma(4, 2): mean 2, deviation 1
    assert float(found.values[0, 2] - found.values[0, 0]) / 4 == pytest.approx(1, abs=8 / np.sqrt(n))
    torch.testing.assert_close(found.x[0, :, 0], found.values[0])


def test_latents_below_follow_and_others_stay():
    pair, x = pair_of(Hierarchy(), 1), torch.tensor([[6.0]])
    top = traverse(pair, x, "z2", steps=3, span=1.0)
    np.testing.assert_allclose(array(top.x).ravel(), 3 * (2 * np.array([-1, 0, 1]) + 1), atol=1e-5)
    bottom = traverse(pair, x, "z1", steps=3, span=1.0)
    np.testing.assert_allclose(array(bottom.x).ravel(), 3 * array(bottom.values).ravel(), atol=1e-5)
    assert float(bottom.values[0, 2] - bottom.values[0, 0]) / 2 == pytest.approx(4.25**0.5, rel=0.12)


def test_two_latents_side_by_side_stay_where_the_row_put_them():
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.tensor(1.0))

        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                b = pyro.sample("b", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(torch.cat([a, self.one * b], -1), 1.0).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("a", dist.Normal(x[:, :1], 0.1).to_event(1))
                pyro.sample("b", dist.Normal(x[:, 1:], 0.1).to_event(1))

    found = traverse(pair_of(Beside(), 2), torch.tensor([0.3, 0.8]), "a", steps=3, span=1.0)
    torch.testing.assert_close(found.x[0], torch.tensor([[-1.0, 0.8], [0.0, 0.8], [1.0, 0.8]]))


def test_a_code_takes_all_its_values():
    found = traverse(pair_of(Mixture()), torch.tensor([2.9]), "b")
    assert found.values.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(found.x[0], MEANS[0])  # x = 2.9 is most likely of a = 0
    torch.testing.assert_close(traverse(pair_of(Mixture()), None, "a").x[0], torch.tensor([3.0, 1.0]))


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
    with pytest.raises(DeclarationError, match=r"latent: expected one of z; got 'zz' \(did you mean 'z'"):
        traverse(digits, x[0], "zz")
    with pytest.raises(DeclarationError, match=r"coordinates of z, 0 .. 2; got \[3\]"):
        traverse(digits, x[0], dims=[0, 3])
    with pytest.raises(DataError, match="expected one row of data; got 2"):
        traverse(digits, x[:2])
    with pytest.raises(DataError, match="steps=0"):
        traverse(digits, x[0], steps=0)
    with pytest.raises(DeclarationError, match="beside a row"):
        traverse(moons, moons.data.test.x[0], given={"y": 1})


# ---------------------------------------------------------------------- files and pictures


def test_what_is_saved_loads_without_pickle(tmp_path, moons):
    x = moons.data.test.x[:9]
    results: dict[str, tuple[generate.Generated, dict[str, tuple[int, ...]]]] = {
        "sample": (sample(moons, 5), {"x": (5, 2), "latents/z": (5, 2), "covariates/y": (5,)}),
        "encode": (encode(moons, x), {f"{key}/z": (9, 2) for key in ("latents", "loc", "scale")} | {"log_q/z": (9,)}),
        "reconstruct": (reconstruct(moons, x), {"x": (9, 2), "log_p": (9,), "latents/z": (9, 2)}),
        "traverse": (traverse(moons, x[0], steps=4), {"x": (2, 4, 2), "values": (2, 4), "dims": (2,)}),
    }
    for name, (found, shapes) in results.items():
        path = found.save(tmp_path / f"{name}.npz", row=torch.arange(3))
        with np.load(path, allow_pickle=False) as file:
            loaded = dict(file)
        assert {key: a.shape for key, a in loaded.items()} == {**shapes, "row": (3,)}
        for key, t in found.tensors().items():
            np.testing.assert_array_equal(loaded[key], t.numpy())
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"] * 4  # nothing temporary stays
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
    assert plots.is_shown(shape) == shown
    data = rows(20, *shape)
    drawn = generate.Samples(data, {}, {}, True)
    moved = traversal.Traversal(data.reshape(4, 5, *shape), torch.arange(5.0).expand(4, 5), "z", (0, 1, 2, 3), "KL")
    rebuilt = generate.Reconstructions(data, torch.arange(20.0), {}, True)
    made = [
        plots.sampled(drawn, array(data)),
        plots.traversed(moved, array(data)),
        plots.reconstructed(rebuilt, array(data), array(data)),
    ]
    assert [figure is not None for figure in made] == [shown] * 3
    for figure in made:
        assert figure is None or plots.png(figure).startswith(b"\x89PNG")


# ---------------------------------------------------------------------- the command line


def run_cli(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str, code: int = 0) -> str:
    """What a command prints in this process; its errors where it fails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pvae", *arguments, "--run-dir", str(folder)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    captured = capsys.readouterr()
    assert caught.value.code == code, captured.err
    assert "Traceback" not in captured.err
    return captured.err if code else captured.out


def is_png(path: str) -> bool:
    return Path(path).read_bytes().startswith(b"\x89PNG")


def test_cli_sample(folder, tmp_path, capsys, moons):
    out = run_cli(
        capsys, folder, "sample", "moons", "-n", "30", "--given", "y=1", "--mean", "--out", str(tmp_path / "s")
    )
    assert out.splitlines() == [f"npz: {tmp_path / 's.npz'}", f"png: {tmp_path / 's.png'}"]
    with np.load(tmp_path / "s.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["x"], sample(moons, 30, mean=True, given={"y": 1}).x.numpy())
        assert set(file["covariates/y"]) == {1}
    assert is_png(str(tmp_path / "s.png"))
    record = json.loads(run_cli(capsys, folder, "sample", "digits", "--json"))
    assert record["npz"] == str(Path(record["run"]) / "analysis" / "sample.npz")
    assert record["shapes"] == {"x": [64, 1, 8, 8], "latents/z": [64, 3]}
    assert is_png(record["png"][0])


def test_cli_encode_and_reconstruct(folder, capsys, digits):
    record = json.loads(run_cli(capsys, folder, "encode", "digits", "--rows", "40", "--mean", "--json"))
    with np.load(record["npz"], allow_pickle=False) as file:
        chosen = torch.from_numpy(file["row"])
        np.testing.assert_array_equal(file["latents/z"], encode(digits, digits.data.test.x[chosen], mean=True)["z"])
        np.testing.assert_array_equal(file["label"], digits.data.test.y[chosen])
    assert len(chosen) == 40
    assert is_png(record["png"][0])
    record = json.loads(
        run_cli(capsys, folder, "reconstruct", "digits", "--split", "validation", "--rows", "30", "--draw", "--json")
    )
    assert record["npz"].endswith("reconstruct-validation.npz")
    with np.load(record["npz"], allow_pickle=False) as file:
        assert set(np.unique(file["x"])) == {0.0, 1.0}
        assert (file["log_p"] < 0).all()
    assert is_png(record["png"][0])


def test_cli_traverse(folder, capsys, digits):
    out = run_cli(capsys, folder, "traverse", "digits", "--dims", "2,0", "--steps", "4", "--row", "5")
    path = digits.files.analysis / "traverse-z.npz"
    assert f"npz: {path}" in out
    with np.load(path, allow_pickle=False) as file:
        assert file["dims"].tolist() == [2, 0]
        expected = traverse(digits, digits.data.test.x[5], dims=(2, 0), steps=4)
        np.testing.assert_allclose(file["x"], expected.x, atol=1e-6)
    assert is_png(str(path.with_suffix(".png")))
    record = json.loads(run_cli(capsys, folder, "traverse", "moons", "--prior", "--given", "y=0", "--json"))
    assert record["shapes"]["x"] == [2, 9, 2]


def test_cli_says_what_is_wrong(folder, tmp_path, capsys):
    assert "did you mean 'y'" in run_cli(capsys, folder, "sample", "moons", "--given", "yy=1", code=2)
    assert "or 64 of them; got one" in run_cli(capsys, folder, "sample", "moons", "--given", "y=one", code=2)
    assert "expected a row of test" in run_cli(capsys, folder, "traverse", "digits", "--row", "9999", code=2)
    assert "expected an integer" in run_cli(capsys, folder, "traverse", "digits", "--dims", "a", code=2)
    assert "Expected a split" in run_cli(capsys, folder, "encode", "digits", "--split", "tset", code=2)
    out = str(tmp_path / "missing" / "s")
    assert "expected to be written" in run_cli(capsys, folder, "sample", "digits", "--out", out, code=73)
