"""Annealed importance sampling against densities known exactly or by quadrature; and what it leaves alone."""

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from rich.console import Console
from torch import Tensor

from pvae.analysis.bounds.ais import ais, bracket
from pvae.analysis.bounds.targets import AnnealingPlan, Target, schedule, transition
from pvae.errors import DataError
from pvae.experiment.experiment import Experiment
from pvae.pair.pair import Pair

# A wrong start is passed on purpose.
# mypy: disable-error-code="arg-type"

Program = Callable[[Tensor], object]
STARTS = ("guide", "prior")


def parameter() -> Tensor:
    """Every pair needs one."""
    return pyro.param("offset", torch.zeros(()).double())


# ---------------------------------------------------------------------- pairs whose log p(x) is known

W = torch.tensor([[1.0, 0.3], [0.2, 0.8], [-0.5, 0.4], [0.3, -0.2]]).double()
S2 = 0.3
MARGINAL = torch.distributions.MultivariateNormal(torch.zeros(4).double(), W @ W.T + S2 * torch.eye(4).double())


def linear(z: Tensor) -> Tensor:
    return z @ W.T


def linear_reshaped(z: Tensor) -> Tensor:
    """Takes no plate of particles."""
    return torch.einsum("nd,kd->nk", z.reshape(len(z), 2), W)


def ppca(decoder: Callable[[Tensor], Tensor] = linear) -> Pair:
    """x = W z + noise, and a guide that is rather off."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z) + parameter(), S2**0.5).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.4 * x[:, :2], 0.8).to_event(1))

    return Pair(model=model, guide=guide)


def ppca_rows(n: int) -> Tensor:
    return torch.tensor(
        np.random.default_rng(1).multivariate_normal(np.zeros(4), MARGINAL.covariance_matrix.numpy(), n)
    )


def curved() -> Pair:
    """A one-dimensional latent, a curve in the plane: posteriors with two modes."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            loc = torch.cat([torch.sin(2 * z), z**2 / 2], -1)
            pyro.sample("x", dist.Normal(loc + parameter(), 0.4).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * x[:, :1], 1.0).to_event(1))

    return Pair(model=model, guide=guide)


def curved_log_p(x: Tensor) -> np.ndarray:
    z = np.linspace(-9, 9, 40_001)
    loc = np.stack([np.sin(2 * z), z**2 / 2], 1)
    log_joint = scipy.stats.norm.logpdf(z) + scipy.stats.norm.logpdf(x.numpy()[:, None], loc, 0.4).sum(2)
    return np.log(np.trapezoid(np.exp(log_joint), z, axis=1))


def positive() -> Pair:
    """A Gamma prior with a LogNormal guide: both on the positive numbers; one plate beside that of the data."""

    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("copies", 2, dim=-1):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.5))
            pyro.sample("x", dist.Normal(rate.sqrt() + parameter(), 0.3), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("copies", 2, dim=-1):
            pyro.sample("rate", dist.LogNormal(x - 1.0, 0.6))

    return Pair(model=model, guide=guide)


def positive_log_p(x: Tensor) -> np.ndarray:
    z = np.linspace(1e-6, 5, 20_001) ** 2  # smooth in the root
    log_prior = scipy.stats.gamma.logpdf(z, 2.0, scale=1 / 1.5)
    log_joint = [log_prior + scipy.stats.norm.logpdf(one, np.sqrt(z), 0.3) for one in x.numpy().reshape(-1)]
    return np.log(np.trapezoid(np.exp(log_joint), z, axis=1)).reshape(len(x), 2).sum(1)


CONCENTRATION = torch.tensor([0.8, 2.0, 3.0]).double()


def simplex() -> Pair:
    """Counts of three kinds whose shares lie on a simplex; two free numbers."""

    def model(x):
        with pyro.plate("data", len(x)):
            shares = pyro.sample("shares", dist.Dirichlet(CONCENTRATION.to(x)))
            pyro.sample("x", dist.Multinomial(6, shares + parameter()), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("shares", dist.Dirichlet(1.5 + x / 2))

    return Pair(model=model, guide=guide)


COUNTS = torch.tensor([[6, 0, 0], [1, 2, 3], [0, 1, 5], [0, 6, 0]]).double()
PLANE = torch.tensor([[0.9, 0.3], [-0.5, 1.2], [0.0, 0.0], [0.7, 2.5]]).double()
RATES = torch.tensor([[0.4, 1.0], [1.5, 2.0], [0.1, 1.2]]).double()
KNOWN = {
    "linear": (ppca, ppca_rows(4), MARGINAL.log_prob(ppca_rows(4)).numpy()),
    "linear, side by side": (lambda: ppca(linear_reshaped), ppca_rows(4), MARGINAL.log_prob(ppca_rows(4)).numpy()),
    "curved": (curved, PLANE, curved_log_p(PLANE)),
    "positive": (positive, RATES, positive_log_p(RATES)),
    "simplex": (simplex, COUNTS, dist.DirichletMultinomial(CONCENTRATION, 6).log_prob(COUNTS).numpy()),
}


@pytest.mark.fast("simplex-guide", "linear-prior", "curved-guide")
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("make", "x", "log_p"), KNOWN.values(), ids=list(KNOWN))
def test_the_mean_weight_is_p_of_x(make, x, log_p, start):
    # 4 standard errors, 38 data in all: one new seed in 400 fails, somewhat more for the weights' skew.
    found = ais(make(), x, temperatures=8, chains=1500, leapfrog=3, start=start)
    ratio = (found.log_weights - torch.tensor(log_p)).exp()
    deviation = (ratio.mean(0) - 1) / (ratio.std(0) / math.sqrt(1500))
    assert deviation.abs().max() < 4
    assert found.log_p.tolist() == pytest.approx(found.log_weights.exp().mean(0).log().tolist())
    assert found.lower.kind == "lower_bound"
    assert found.acceptance.min() > 0.4


@pytest.mark.parametrize("name", ["linear", "curved", "positive", "simplex"])
def test_many_temperatures_come_near_log_p(name):
    # Few chains, so the bound would lie far below with few temperatures. 4 standard errors and .02: one in 4000.
    make, x, log_p = KNOWN[name]
    found = ais(make(), x, temperatures=40, chains=100, leapfrog=3)
    assert abs(found.lower.value - log_p.mean()) < 4 * found.lower.standard_error + 0.02
    assert found.lower.standard_error < 0.1
    assert found.ess.min() > 10


# ---------------------------------------------------------------------- between two bounds


@pytest.mark.slow
def test_a_bracket_of_many_temperatures_is_narrow():
    found = bracket(ppca(), ppca_rows(3), rows=50, temperatures=120, leapfrog=3)
    truth = float(MARGINAL.log_prob(found.x).mean())
    # 4 standard errors on each side: one new seed in 10 000 fails.
    assert (
        found.lower.value - 4 * found.lower.standard_error < truth < found.upper.value + 4 * found.upper.standard_error
    )
    assert abs(found.width.value) < 0.05
    assert abs(found.lower.value - truth) < 0.05
    assert (found.lower.kind, found.upper.kind, found.width.kind) == ("lower_bound", "upper_bound", "estimate")
    assert 0.55 < found.acceptance.mean() < 0.75


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("temperatures", [1, 4])
def test_a_bracket_of_few_temperatures_is_wide_and_holds_the_truth(temperatures, start):
    found = bracket(ppca(), ppca_rows(3), rows=300, temperatures=temperatures, chains=4, leapfrog=3, start=start)
    truth = float(MARGINAL.log_prob(found.x).mean())
    # The bounds lie several standard errors off: one new seed in 10 000 fails.
    assert found.lower.value < truth < found.upper.value
    assert found.width.value > 0.2
    assert found.width.value == pytest.approx(found.upper.value - found.lower.value, abs=1e-12)
    assert found.upper_per_datum.mean().item() == pytest.approx(found.upper.value)


def test_a_bracket_of_a_positive_latent():
    found = bracket(positive(), RATES, rows=60, temperatures=50, chains=10, leapfrog=3)
    truth = positive_log_p(found.x).mean()
    # 4 standard errors on each side: one new seed in 10 000 fails.
    assert (
        found.lower.value - 4 * found.lower.standard_error < truth < found.upper.value + 4 * found.upper.standard_error
    )
    assert abs(found.width.value) < 0.1


def test_simulated_data_have_the_form_of_x():
    pair = Experiment.from_dict({"latents": {"z": {"dim": 2}}}).build((1, 4, 4))
    x = torch.rand(3, 1, 4, 4)
    found = bracket(pair, x, rows=7, temperatures=5, chains=3, leapfrog=2)
    assert found.x.shape == (7, 1, 4, 4)
    assert set(found.x.unique().tolist()) <= {0.0, 1.0}
    assert found.lower_per_datum.shape == found.upper_per_datum.shape == (7,)


# ---------------------------------------------------------------------- parts


def test_the_schedule_rises_from_0_to_1_and_is_dense_at_both_ends():
    betas = np.array(schedule(100))
    widths = np.diff(betas)
    assert (betas[0], betas[-1], len(betas)) == (0, 1, 101)
    assert (widths > 0).all()
    assert widths[50] > 5 * widths[0]
    np.testing.assert_allclose(widths, widths[::-1])
    assert schedule(1) == [0, 1]


@pytest.mark.parametrize("step", [0.2, 0.7])
def test_a_transition_leaves_its_density_invariant(step):
    # Kolmogorov-Smirnov on two coordinates of two data, at p > 1e-4: one new seed in 2500 fails, for each step size.
    x = ppca_rows(2)
    pair = ppca().adopt(x)
    precision = torch.eye(2).double() + W.T @ W / S2
    posterior = torch.distributions.MultivariateNormal(
        torch.linalg.solve(precision, W.T @ x.T / S2).T, precision_matrix=precision
    )
    with torch.no_grad():
        target = Target(pair, x, AnnealingPlan("ais", 2, 1, 1, "prior"))
        point = target.at(posterior.sample((3000,)))
        start, accepted = point.u, []
        for _ in range(25):
            point, probability = transition(target, point, 1.0, torch.full((2,), step), 3)
            accepted.append(probability)
    assert (torch.stack(accepted).mean() < 0.9) == (step > 0.5)  # a large step would show a wrong acceptance
    correlation = np.corrcoef(start[:, 0, 0].numpy(), point.u[:, 0, 0].numpy())[0, 1]
    assert abs(correlation) < 0.2  # the chains have moved
    white = ((point.u - posterior.mean)[..., None, :] @ torch.linalg.cholesky(precision))[..., 0, :]
    for column in white.reshape(3000, 4).T:
        assert scipy.stats.kstest(column.numpy(), "norm").pvalue > 1e-4


def test_the_gradient_is_that_of_the_tempered_density():
    x = RATES
    with torch.no_grad():
        target = Target(positive().adopt(x), x, AnnealingPlan("ais", 2, 1, 1, "guide"))
        u = torch.randn(3, 3, 2).double()
        _, gradient = target.slope(u, 0.3)
        nudge = 1e-6 * torch.randn_like(u)
        change = target.at(u + nudge).tempered(0.3) - target.at(u - nudge).tempered(0.3)
    torch.testing.assert_close(change, 2 * (gradient * nudge).sum(-1), rtol=1e-6, atol=1e-10)


# ---------------------------------------------------------------------- what is left alone


@pytest.mark.parametrize(("call", "factors"), [(ais, 2), (bracket, 3)])
def test_progress_reaches_its_total(call, factors):
    seen: list[tuple[int, int]] = []
    call(
        ppca(),
        ppca_rows(5),
        temperatures=3,
        chains=2000,
        leapfrog=1,
        on_progress=lambda *p: seen.append(p),
        **{"ais": {}, "bracket": {"rows": 5}}[call.__name__],
    )
    total = factors * 3 * 3  # temperatures times chunks of two rows
    assert seen == [(i + 1, total) for i in range(total)]


# ---------------------------------------------------------------------- one draw, one chain, one temperature


def test_one_temperature_is_plain_importance_sampling():
    x = ppca_rows(3)
    found = ais(ppca(), x, temperatures=1, chains=2000, start="guide")
    assert found.acceptance.isnan().all()
    assert found.to_dict()["acceptance"] is None
    assert "no transitions" in str(found)
    # 4 standard errors: one new seed in 10 000 fails.
    assert abs(found.lower.value - MARGINAL.log_prob(x).mean()) < 4 * found.lower.standard_error + 1e-3


def test_one_chain_says_conservative():
    found = ais(ppca(), ppca_rows(30), temperatures=4, chains=1, leapfrog=2)
    assert found.lower.note == "conservative"
    assert found.lower.standard_error == found.lower.data_error
    assert math.isnan(ais(ppca(), ppca_rows(1), temperatures=2, chains=1, leapfrog=2).lower.standard_error)


def test_figures_are_shown():
    found = ais(ppca(), ppca_rows(3), temperatures=4, chains=3, leapfrog=2)
    held = bracket(ppca(), ppca_rows(3), rows=4, temperatures=4, chains=3, leapfrog=2)
    for result, terms in ((found, ["ais_4"]), (held, ["lower", "upper", "width"])):
        assert list(json.loads(json.dumps(result.to_dict()))["figures"]) == terms
        console = Console(width=160, record=True, file=None, quiet=True)
        console.print(result)
        assert all(term in str(result) for term in terms)
    assert "mean acceptance" in str(held)


# ---------------------------------------------------------------------- refusals


def pair_of(model: Program, guide: Program) -> Pair:
    return Pair(model=model, guide=guide)


def normal_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, 0], 1.0))


def global_latent(x):
    z = pyro.sample("z", dist.Normal(parameter(), 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, x.new_ones(4)).to_event(1), obs=x)


def global_guide(x):
    pyro.sample("z", dist.Normal(parameter(), 1.0))


def model_of(latent: Callable[[Tensor], Any], observe: Callable[[Tensor, Tensor], object]) -> Program:
    def model(x):
        with pyro.plate("data", len(x)):
            observe(x, pyro.sample("z", latent(x)))

    return model


def standard(x):
    return dist.Normal(x.new_tensor(0.0), 1.0)


def whole(x, z, factor=1.0):
    pyro.sample("x", dist.Normal(z[..., None] + parameter(), x.new_ones(4)).to_event(1), obs=factor * x)


def half(x, z, name="x", column=0):
    pyro.sample(name, dist.Normal(z + parameter(), 1.0), obs=x[:, column])


discrete = model_of(lambda x: dist.Poisson(x.new_tensor(2.0)), whole)
gamma_prior = model_of(lambda x: dist.Gamma(x.new_tensor(2.0), 1.0), whole)
normal_model = model_of(standard, whole)
moving_support = model_of(standard, lambda x, z: whole(x, pyro.sample("y", dist.Uniform(z, z + 1))))
observes_half = model_of(standard, half)
observes_twice = model_of(standard, lambda x, z: whole(x, z, 2.0))
two_observed = model_of(standard, lambda x, z: (half(x, z, "a"), half(x, z, "b", 1)))


def discrete_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Poisson(x[:, 0].exp()))


def with_more(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, 0], 1.0))
        pyro.sample("extra", dist.Normal(x[:, 0], 1.0), infer={"is_auxiliary": True})


ROWS = ppca_rows(3)
REFUSALS = {
    "no temperatures": (lambda: ais(ppca(), ROWS, temperatures=0), "ais: expected temperatures of at least 1; got 0"),
    "no chains": (lambda: ais(ppca(), ROWS, chains=0), "expected chains of at least 1; got 0"),
    "no steps": (lambda: bracket(ppca(), ROWS, leapfrog=-1), "bracket: expected leapfrog of at least 1; got -1"),
    "unknown start": (lambda: ais(ppca(), ROWS, start="end"), "expected start 'guide' or 'prior'; got 'end'"),
    "no data": (lambda: ais(ppca(), ROWS[:0]), "expected at least one row"),
    "no rows": (lambda: bracket(ppca(), ROWS, rows=0), "expected at least one row to simulate; got rows=0"),
    "global": (lambda: ais(pair_of(global_latent, global_guide), ROWS), "latents of single data only; got global z"),
    "discrete": (lambda: ais(pair_of(discrete, discrete_guide), ROWS), "expected a continuous z .* got Poisson"),
    "other support": (
        lambda: ais(pair_of(gamma_prior, normal_guide), ROWS),
        "expected the guide's z on the model's support .* got",
    ),
    "other latents": (
        lambda: ais(pair_of(normal_model, with_more), ROWS),
        "expected a guide of the model's latents z; got extra, z. Pass start='prior'",
    ),
    "moving support": (lambda: ais(pair_of(moving_support, with_more), ROWS), "a support of y that reads no other"),
    "two observed": (lambda: bracket(pair_of(two_observed, normal_guide), ROWS), "one observed site .* got a, b"),
    "half observed": (
        lambda: bracket(pair_of(observes_half, normal_guide), ROWS),
        "observed as it is, whole at one site",
    ),
    "changed": (lambda: bracket(pair_of(observes_twice, normal_guide), ROWS), "observed as it is, whole at one site"),
}


@pytest.mark.parametrize(("call", "message"), REFUSALS.values(), ids=list(REFUSALS))
def test_refusal(call, message):
    with pytest.raises(DataError, match=message):
        call()


@pytest.mark.parametrize("start", ["guide", pytest.param("prior", marks=pytest.mark.slow)])
def test_relaxed_codes_stay_on_the_simplex(start):
    flow = {"kind": "realnvp", "layers": 2, "hidden": [8]}
    latent = {"codes": 4, "prior": flow, "posterior": {"kind": "relaxed_onehot", "kl": "relaxed"}}
    networks = {
        "encoder": {"network": {"kind": "mlp", "hidden": [8]}},
        "decoder": {"network": {"kind": "mlp", "hidden": []}},
    }
    pair = Experiment.from_dict({"latents": {"c": latent}, **networks}).build((12,))
    x = (torch.rand(6, 12, generator=torch.Generator().manual_seed(1)) < 0.4).float()
    model: Any = pair.model
    with torch.no_grad():
        model.decoder.network.head.weight.copy_((4 * x[:4] - 2).T)  # every code means a datum
        c = model.priors["c"]({}).sample(torch.Size([100_000]))
        law = model.decoder({"c": c.exp()})
        log_p = torch.stack([law.log_prob(row) for row in x]).double().logsumexp(1) - math.log(len(c))
    found = ais(pair, x, temperatures=100, chains=16, leapfrog=3, start=start)
    assert found.log_p.mean() == pytest.approx(float(log_p.mean()), abs=5 * found.lower.standard_error + 0.02)


@pytest.mark.parametrize("pair", [pair_of(gamma_prior, normal_guide), pair_of(normal_model, with_more)])
def test_the_prior_needs_no_guide(pair):
    found = ais(pair, ROWS, temperatures=3, chains=4, leapfrog=2, start="prior")
    assert found.log_p.isfinite().all()
