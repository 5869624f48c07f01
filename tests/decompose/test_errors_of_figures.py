"""Standard errors against the spread over seeds; what an analysis leaves alone, and what it refuses."""

# Attributes of Modules and Pyro programs have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, union-attr"

import math
from importlib.util import find_spec

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import nn

import pvae.analysis
from pvae.analysis.bounds.ais import ais, bracket
from pvae.analysis.bounds.evidence import evidence
from pvae.analysis.bounds.gap import gap
from pvae.analysis.decompose import account
from pvae.analysis.decompose.surgery import surgery
from pvae.analysis.figures.estimate import Estimate, exact, over_draws
from pvae.errors import DataError
from pvae.pair.pair import Pair
from tests.decompose.pairs import channel, correlated, number, small


def test_evidence_rises_with_samples_and_stays_below_log_p():
    # Noise N(x / 4, .9) for the true posterior N(x / 2, .5): 4 standard errors, four comparisons, one in 5000.
    def model(x):
        bias = pyro.param("bias", number(0.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + bias, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 4, 0.9**0.5).to_event(1))

    x = torch.tensor(np.random.default_rng(6).standard_normal((300, 3)) * 2**0.5)
    log_p = scipy.stats.norm.logpdf(x.numpy(), 0, 2**0.5).sum(1)
    pair = Pair(model=model, guide=guide)
    found = {k: evidence(pair, x, samples=k).iwae for k in (1, 4, 32, 512)}
    for few, many in ((1, 4), (4, 32), (32, 512)):
        error = math.hypot(found[few].standard_error, found[many].standard_error)
        assert found[many].value > found[few].value - 4 * error
    assert found[32].value > found[1].value + 10 * found[32].standard_error
    last = evidence(pair, x, samples=2000)
    assert last.iwae.value == pytest.approx(log_p.mean(), abs=4 * last.iwae.standard_error + 1e-3)
    np.testing.assert_allclose(last.log_p.numpy(), log_p, atol=0.5)
    # The ELBO exactly: log p - KL(q || posterior), per coordinate.
    kl = 0.5 * (0.9 / 0.5 - 1 - math.log(0.9 / 0.5) + ((x / 4) ** 2 / 0.5)).sum(1).mean().item()
    assert last.elbo.value == pytest.approx(log_p.mean() - kl, abs=4 * last.elbo.standard_error)
    assert last.gap == pytest.approx(kl, abs=4 * math.hypot(last.elbo.standard_error, last.iwae.standard_error) + 1e-3)


TERMS = ("kl", "elbo", "reconstruction", "mutual_information", "marginal_kl")


def test_one_draw_says_conservative_and_errs_on_that_side():
    x = torch.tensor(np.random.default_rng(3).standard_normal((200, 2)))
    pair = channel(lambda x: torch.full_like(x, 0.5))
    one, many = surgery(pair, x), surgery(pair, x, samples=20)
    for name in TERMS:
        assert getattr(one, name).note == "conservative"
        assert getattr(many, name).note == ""
        assert getattr(one, name).standard_error > 0.9 * math.sqrt(20) * getattr(many, name).standard_error
    assert "conservative" in one.to_frame().loc["kl", "note"]


def test_over_draws_by_hand():
    terms = torch.tensor([[1.0, 4.0], [3.0, 8.0]])  # means 2 and 6; variances 2 and 8; their mean over 2 draws
    found = over_draws(terms)
    assert found.value == 4.0
    assert found.standard_error == pytest.approx(math.sqrt(2 / 2 + 8 / 2) / 2)
    assert found.data_error == pytest.approx(math.sqrt(np.var([2, 6], ddof=1) / 2 - found.standard_error**2))
    assert float(found) == 4.0
    assert str(found) == f"4.0000 +- {found.standard_error:.4f} (estimate)"
    assert str(exact(2.5)) == "2.5000 (exact)"
    assert Estimate(1.0, 0.1, "lower_bound").to_dict()["kind"] == "lower_bound"


def test_error_of_a_random_subset_of_draws():
    # The spread over seeds of the scored rows is in it: half to twice, with 20 seeds.
    x = correlated(0.2, 400) * torch.linspace(0.1, 6, 400)[:, None]
    pair = channel(lambda x: torch.full_like(x, 0.4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(account, "MULTIPLICATIONS", 400 * 4 * 40)
        found = [surgery(pair, x, samples=8, seed=seed).mutual_information for seed in range(20)]
    spread = np.std([e.value for e in found], ddof=1)
    assert 0.5 < np.mean([e.standard_error for e in found]) / spread < 2


class Noisy(PyroModule):
    """A model with a parameter, dropout and batch statistics: everything that training mode moves."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.noise = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            h = self.net(z.reshape(-1, 2)).reshape(*z.shape[:-1], 3)
            pyro.sample("x", dist.Normal(h, self.noise).to_event(1), obs=x)


def noisy_pair() -> Pair:
    def guide(x):
        slope = pyro.param("slope", torch.full((3, 2), 0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ slope, 0.5).to_event(1))

    return Pair(model=Noisy(), guide=guide)


ANALYSES = {
    "surgery": lambda pair, x, seed: surgery(pair, x, samples=2, seed=seed).to_dict(),
    "evidence": lambda pair, x, seed: evidence(pair, x, samples=7, seed=seed).to_dict(),
    "gap": lambda pair, x, seed: gap(pair, x[:6], steps=5, samples=5, evidence_samples=5, seed=seed).to_dict(),
    "ais": lambda pair, x, seed: ais(pair, x[:6], temperatures=4, chains=3, leapfrog=2, seed=seed).to_dict(),
    "bracket": lambda pair, x, seed: bracket(pair, x, rows=6, temperatures=4, chains=3, seed=seed).to_dict(),
}


every_analysis = pytest.mark.parametrize("analyse", ANALYSES.values(), ids=list(ANALYSES))


@pytest.mark.fast("False-ais", "True-evidence", "False-gap", "True-surgery")
@every_analysis
@pytest.mark.parametrize("training", [True, False])
def test_analysis_moves_nothing(analyse, training):
    x = torch.randn(20, 3)
    pair = noisy_pair().adopt(x).train(training)
    pyro.param("mine", torch.tensor(4.0))
    state = {name: t.clone() for name, t in pair.state_dict().items()}
    random = torch.get_rng_state()
    analyse(pair, x, 0)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, state[name]) for name, t in pair.state_dict().items())
    assert {m.training for m in pair.modules()} == {training}
    assert all(p.grad is None and p.requires_grad for p in pair.parameters())
    assert torch.is_grad_enabled()
    assert torch.distributions.Distribution._validate_args
    assert list(pyro.get_param_store()) == ["mine"]
    pyro.clear_param_store()


@every_analysis
def test_analysis_keeps_the_mode_of_every_module(analyse):
    x = torch.randn(20, 3)
    pair = noisy_pair().adopt(x).train()
    pair.model.net[1].eval()  # frozen batch statistics in a pair that trains
    modes = [m.training for m in pair.modules()]
    analyse(pair, x, 0)
    assert [m.training for m in pair.modules()] == modes


@pytest.mark.fast("surgery", "gap", "evidence")
@every_analysis
def test_same_seed_same_numbers(analyse):
    x = torch.randn(20, 3)
    pair = noisy_pair().adopt(x)
    first = analyse(pair, x, 5)
    torch.manual_seed(99)
    torch.rand(3)
    assert analyse(pair, x, 5) == first
    assert analyse(pair.eval(), x, 5) == first
    assert analyse(pair, x, 6) != first


@pytest.mark.parametrize("analysis", [surgery, evidence])
def test_analysis_refuses_what_it_cannot_analyse(analysis):
    pair = channel(torch.ones_like)
    with pytest.raises(DataError, match=r"got samples=0|samples of at least 1; got 0"):
        analysis(pair, torch.zeros(3, 2).double(), samples=0)
    analysis(pair, torch.zeros(3, 2).double(), samples=1)
    for shape in ((0, 2), (3, 5), (3, 2, 1), ()):
        with pytest.raises(DataError, match=r"expected at least one row, of shape \(2\)"):
            analysis(pair, torch.zeros(shape), samples=1)


@pytest.mark.parametrize("analysis", [surgery, evidence])
def test_analysis_takes_other_types_of_the_same_numbers(analysis):
    pair = channel(torch.ones_like)
    wanted = analysis(pair, torch.ones(4, 2).double(), samples=3).elbo.value
    for x in (torch.ones(4, 2), torch.ones(4, 2, dtype=torch.int64), np.ones((4, 2))):
        assert analysis(pair, x, samples=3).elbo.value == wanted


def test_weights_of_handlers_are_no_part_of_the_figures():
    pair, x = channel(lambda x: torch.full_like(x, 0.5)), torch.randn(60, 2).double()
    weighed = Pair(model=poutine.scale(pair.model, scale=0.1), guide=poutine.scale(pair.guide, scale=0.1))
    assert surgery(weighed, x).to_dict() == surgery(pair, x).to_dict()
    assert evidence(weighed, x, samples=5).to_dict() == evidence(pair, x, samples=5).to_dict()


def test_modules_named_by_pyro_module_are_put_in_evaluation_mode():
    noisy = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))

    def model(x):
        net = pyro.module("net", noisy)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, :2], 0.5).to_event(1))

    pair, x = Pair(model=model, guide=guide).adopt(torch.randn(20, 3)), torch.randn(20, 3)
    before = noisy[1].running_mean.clone()
    first, second = surgery(pair, x), surgery(pair, x)
    assert first.elbo == second.elbo
    assert torch.equal(noisy[1].running_mean, before)
    assert any("running_mean" in name for name in pair.state_dict())
    assert surgery(pair, x[:1]).n == 1


def test_a_model_of_global_latents_alone_has_a_bound_of_all_rows():
    """w ~ N(0, 1), x_i ~ N(w, 1): log p(x_1, ..., x_n) in closed form; the guide is the exact posterior of w."""
    x = torch.randn(6).double()

    def model(x):
        w = pyro.sample("w", dist.Normal(0 * number(0.0), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(number(float(x.sum()) / 7), math.sqrt(1 / 7)))

    exact = dist.MultivariateNormal(torch.zeros(6).double(), torch.eye(6).double() + 1).log_prob(x).item() / 6
    found, bound = surgery(small(model, guide), x), evidence(small(model, guide), x, samples=5)
    assert found.elbo.value == pytest.approx(exact, abs=1e-9)
    assert bound.iwae.value == pytest.approx(exact, abs=1e-9)
    assert bound.joint
    assert found.mutual_information is None
    assert found.latents == {}


def test_labels_that_are_no_numbers_are_refused():
    with pytest.raises(DataError, match="labels: expected 3 integers; got something else: list"):
        surgery(channel(torch.ones_like), torch.zeros(3, 2).double(), labels=["a", "b", "c"])


def test_no_module_has_the_name_of_a_public_function():
    """Importing it would put it in the place of the function."""
    assert [name for name in pvae.analysis.__all__ if find_spec(f"pvae.analysis.{name}")] == []
