"""One set of values: Pyro's param store and the pair's own, before and after fits by Pyro and by pvae."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.optim import Adam
from torch import Tensor, nn

import pvae
from pvae import analysis
from pvae.pair.pair import Pair
from tests.programs.program import normal


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    a = pyro.param("a", torch.tensor(0.2))
    s = pyro.param("s", torch.tensor(0.7), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(a * x, s))


def elbo_at(x: Tensor, a: float, s: float = 0.7) -> float:
    loc = a * x
    kl = torch.distributions.kl_divergence(dist.Normal(loc, s), dist.Normal(0.0, 1.0))
    return (dist.Normal(loc, 1.0).log_prob(x) - s**2 / 2 - kl).mean().item()


def figure(pair: Pair, x: Tensor) -> float:
    return analysis.surgery(pair, x, samples=60).elbo.value


def put(a: float) -> None:
    pyro.get_param_store().setdefault("a", torch.tensor(0.0))
    pyro.get_param_store()["a"] = torch.tensor(a)


@pytest.fixture
def x():
    yield 1.4 * normal(60)
    pyro.clear_param_store()


@pytest.mark.parametrize("first", ["check", "surgery", "adopt", "nothing"])
def test_the_values_that_the_store_holds_now(first, x):
    pair = Pair(model=model, guide=guide)
    {"check": pair.check, "surgery": lambda x: figure(pair, x), "adopt": pair.adopt, "nothing": len}[first](x)
    for a in (0.5, -0.4, 0.9):
        put(a)
        assert figure(pair, x) == pytest.approx(elbo_at(x, a), abs=0.06)
        assert pyro.param("a").item() == pytest.approx(a)


@pytest.mark.parametrize("size", [1, 3])
def test_a_store_that_was_cleared_and_filled_again(size, x):
    def wide(x: Tensor) -> None:
        a = pyro.param("a", torch.full((size,), 0.2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a.mean() * x, 0.7))

    pair = Pair(model=model, guide=wide)
    for a in (0.2, 0.2, 0.7):
        pyro.clear_param_store()
        pyro.param("a", torch.full((size,), a))
        assert figure(pair, x) == pytest.approx(elbo_at(x, a), abs=0.06)


def test_a_value_of_another_shape_is_refused_in_words(x):
    pair = Pair(model=model, guide=guide)
    put(0.5)
    figure(pair, x)
    pyro.get_param_store()["a"] = torch.tensor([0.5, 0.5])
    with pytest.raises(pvae.PvaeError, match="param a: expected shape"):
        figure(pair, x)


def test_steps_of_svi_between_analyses(x):
    pair = Pair(model=model, guide=guide)
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    before = figure(pair, x)
    for _ in range(3):
        for _ in range(10):
            svi.step(x)
        a, s = pyro.param("a").item(), pyro.param("s").item()
        assert figure(pair, x) == pytest.approx(elbo_at(x, a, s), abs=0.06)
    assert figure(pair, x) > before


def test_a_cleared_store_leaves_the_pair_its_values(x):
    put(0.5)
    pair = Pair(model=model, guide=guide)
    want = figure(pair, x)
    pyro.clear_param_store()
    assert figure(pair, x) == want
    assert "a" not in pyro.get_param_store()


def test_check_changes_nothing(x):
    put(0.5)
    before = pyro.get_param_store().get_state()
    kept = {name: value.clone() for name, value in before["params"].items()}
    pair = Pair(model=model, guide=guide)
    state = torch.random.get_rng_state()
    assert not pair.check(x)
    assert torch.equal(state, torch.random.get_rng_state())
    assert list(pair.parameters()) == []
    after = pyro.get_param_store().get_state()["params"]
    assert after.keys() == kept.keys()
    assert all(torch.equal(after[name], kept[name]) for name in kept)


@pytest.mark.parametrize("kind", [AutoNormal, AutoDiagonalNormal])
def test_check_leaves_an_autoguide_as_it_was(kind, x):
    def regression(x: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    auto = kind(regression)
    pair = Pair(model=regression, guide=auto)
    assert not pair.check(x)
    assert list(auto.parameters()) == []
    assert auto.prototype_trace is None
    svi = SVI(regression, auto, Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(150):
        svi.step(x)
    with torch.no_grad():
        want = -sum(Trace_ELBO().loss(regression, auto, x) for _ in range(200)) / 200 / len(x)
    assert figure(pair, x) == pytest.approx(want, abs=0.02)


def fitted(x: Tensor, folder, pair: Pair | None = None) -> pvae.Run:
    options = ("train.epochs=30", "train.optimizer.lr=0.1", "train.batch_size=60")
    return pvae.fit(pair or Pair(model=model, guide=guide), *options, data=x, run_dir=folder, progress=False)


def test_after_a_fit_predictive_uses_the_fitted_values(x, tmp_path):
    run = fitted(x, tmp_path)
    assert "a" not in pyro.get_param_store() or pyro.param("a").item() == pytest.approx(0.2)
    with run.pair.own_store():
        a = pyro.param("a").item()
        found = Predictive(model, guide=guide, num_samples=400, return_sites=("z",))(x)["z"].mean(0)
    assert a > 0.3
    torch.testing.assert_close(found, a * x, atol=0.25, rtol=0)
    assert figure(run.pair, x) == pytest.approx(elbo_at(x, a, _scale(run.pair)), abs=0.06)


def _scale(pair: Pair) -> float:
    with pair.own_store():
        return pyro.param("s").item()


def test_a_fitted_pair_does_not_follow_the_global_store(x, tmp_path):
    run = fitted(x, tmp_path)
    want = figure(run.pair, x)
    put(-3.0)
    assert figure(run.pair, x) == want
    assert figure(copy.deepcopy(run.pair), x) == want


def test_a_pair_of_fitted_values_is_fitted_on(x, tmp_path):
    put(0.9)
    pair = Pair(model=model, guide=guide)
    figure(pair, x)
    put(0.6)
    run = pvae.fit(pair, "train.epochs=1", "train.optimizer.lr=1e-6", data=x, run_dir=tmp_path, progress=False)
    with run.pair.own_store():
        assert pyro.param("a").item() == pytest.approx(0.6, abs=1e-3)


def test_two_pairs_of_one_parameter_name_keep_their_own(x, tmp_path):
    first = fitted(x, tmp_path / "first").pair
    want = figure(first, x)
    fitted(-3 * x, tmp_path / "second")
    assert figure(first, x) == want


def test_modules_share_their_weights_with_pyro(x):
    net = nn.Linear(1, 1)

    def amortised(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x[:, None])[:, 0], 0.7))

    pair = Pair(model=model, guide=amortised)
    figure(pair, x)
    svi = SVI(model, amortised, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(60):
        svi.step(x)
    with torch.no_grad():
        want = -sum(Trace_ELBO().loss(model, amortised, x) for _ in range(60)) / 60 / len(x)
    assert figure(pair, x) == pytest.approx(want, abs=0.06)
