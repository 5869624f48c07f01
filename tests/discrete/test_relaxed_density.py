"""Densities of relaxed codes, and flows over them."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, typeddict-item, union-attr"

import math
from functools import cache
from typing import Any

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from pvae.distributions.relaxed import RelaxedCodes, from_coordinates, to_coordinates
from pvae.errors import DeclarationError
from pvae.graph.site import Space
from pvae.pair.pair import Pair
from pvae.training.evaluation import evaluate
from tests.discrete.pairs import X, built, declared, relaxed, rows, steps
from tests.laws import FLOWS


@pytest.mark.parametrize("k", [2, 3, 10])
@pytest.mark.parametrize("tau", [0.1, 0.7, 2.0])
def test_the_largest_entry_has_the_law_of_the_code(k, tau):
    # Chi-square of 20 000 draws at each of two positions: one new seed in 500 fails.
    q = relaxed(k, 1, 2, tau=tau)
    found = q.rsample((20_000,)).argmax(-1)[:, 0]
    for position in range(2):
        counts = found[:, position].bincount(minlength=k).numpy()
        want = 20_000 * q.logits[0, position].exp().numpy()
        assert scipy.stats.chisquare(counts, want).pvalue > 1e-3


@pytest.mark.parametrize("lead", [(4,), (4, 3), (4, 3, 2)])
def test_the_density_is_torch_s(lead):
    q = relaxed(5, *lead)
    value = q.rsample((7,))
    torch.testing.assert_close(value.exp().sum(-1), torch.ones(7, *lead, dtype=torch.float64))
    torch_s = ExpRelaxedCategorical(q.temperature, logits=q.logits, validate_args=False)
    want = (
        torch_s.log_prob(value).sum(tuple(range(1 - len(lead), 0)) or ()) if len(lead) > 1 else torch_s.log_prob(value)
    )
    torch.testing.assert_close(q.log_prob(value), want, rtol=1e-10, atol=1e-10)
    wide = q.expand((6, 4))
    assert wide.rsample().shape == (6, *lead, 5)
    assert (wide.rsample()[0] != wide.rsample()[1]).all()
    torch.testing.assert_close(wide.log_prob(value[:6]), want[:6], rtol=1e-10, atol=1e-10)
    assert q.expand((4,)) is q


@pytest.mark.parametrize("tau", [0.4, 1.0])
def test_the_density_integrates_to_one_in_coordinates_of_the_simplex(tau):
    axis = torch.linspace(-40, 40, 8001, dtype=torch.float64)
    density = relaxed(2, 1, tau=tau).log_prob(from_coordinates(axis[:, None])).exp()
    assert float(torch.trapezoid(density, axis)) == pytest.approx(1, abs=1e-6)
    axis = torch.linspace(-40, 40, 801, dtype=torch.float64)
    density = relaxed(3, 1, tau=tau).log_prob(from_coordinates(torch.cartesian_prod(axis, axis))).exp()
    total = torch.trapezoid(torch.trapezoid(density.reshape(801, 801), axis), axis)
    assert float(total) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("k", [2, 3, 7])
def test_coordinates_go_both_ways_and_change_the_volume_by_the_product(k):
    log_c = torch.randn(4, 3, k, dtype=torch.float64).mul(3).log_softmax(-1)
    u = to_coordinates(log_c)
    assert u.shape == (4, 3, k - 1)
    torch.testing.assert_close(from_coordinates(u), log_c, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(to_coordinates(torch.full((k,), -math.log(k)).double()), torch.zeros(k - 1).double())
    jacobian = torch.autograd.functional.jacobian(lambda u: from_coordinates(u).exp()[:-1], u[0, 0])
    assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(float(log_c[0, 0].sum()), abs=1e-9)


@pytest.mark.parametrize("tau", [0.1, 0.01])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_grids_stay_finite_in_single_precision(tau, scale):
    logits = (scale * torch.randn(50, 4, 4, 10)).requires_grad_()
    q = RelaxedCodes(logits, torch.tensor(tau), 2)
    value = q.rsample()
    assert value.isfinite().all()
    flat = value.reshape(50, -1).reshape(50, 4, 4, 10)
    score = q.log_prob(flat)
    assert score.isfinite().all()
    space = Space.codes(10, (4, 4))
    for hard in (False, True):
        seen = space.relaxed(is_hard=hard).see(flat, logits)
        assert seen.isfinite().all()
        (found,) = torch.autograd.grad(seen.square().sum() + score.sum(), logits, retain_graph=True)
        assert found.isfinite().all()
    back = to_coordinates(value)
    assert back.isfinite().all()
    assert from_coordinates(back).isfinite().all()


def flow_pair(kind: str, grid: list[int] | None = None) -> Pair:
    latent = {"codes": 3, "prior": FLOWS[kind], "posterior": "relaxed_onehot"}
    return declared({**latent, **({} if grid is None else {"grid": grid})}, off=0.05)


every_flow = pytest.mark.parametrize("kind", FLOWS)


@cache
def flow_and_density(kind: str) -> tuple[Any, Tensor, Tensor]:
    """A flow over relaxed codes, an axis of free coordinates, and its density on the square of that axis.

    The density of a spline has kinks at its knots, where the grid's own error is first order: its grid is finer.
    """
    axis = torch.linspace(-14, 14, 701 if kind.startswith("spline") else 351)
    with torch.no_grad():
        p = flow_pair(kind).model.prior("c", {})
        density = p.log_prob(from_coordinates(torch.cartesian_prod(axis, axis))).double().exp()
    return p, axis.double(), density.reshape(len(axis), -1)


@pytest.mark.fast("neural_autoregressive", "maf", "realnvp", "iaf")
@every_flow
def test_a_flow_over_relaxed_codes_integrates_to_one(kind):
    _, axis, density = flow_and_density(kind)
    total = torch.trapezoid(torch.trapezoid(density, axis), axis)
    assert float(total) == pytest.approx(1, abs=1e-3 if kind.startswith("spline") else 1e-4)


@every_flow
def test_what_a_flow_draws_is_what_it_scores(kind):
    # Marginals of 5000 draws by Kolmogorov-Smirnov: one new seed in 500 fails for a kind.
    p, axis, density = flow_and_density(kind)
    step = 28 / (len(axis) - 1)
    with torch.no_grad():
        draws = p.expand((5000,)).sample()
    assert draws.shape == (5000, 3)
    u = to_coordinates(draws).double()
    for d in range(2):
        integral = density.sum(1 - d).cumsum(0) * step**2
        uniform = np.interp(u[:, d].numpy(), axis.numpy() + step / 2, integral.numpy())
        assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-3


def test_a_flow_over_a_grid_scores_what_it_draws_and_has_no_twin():
    pair = flow_pair("realnvp", [2, 2])
    assert pair.layout.relaxed == ()
    assert pair.check(rows()) == []
    with torch.no_grad():
        draws = pair.model.prior("c", {}).expand((4,)).sample((2,))
        assert draws.shape == (2, 4, 2, 2, 3)
        assert pair.model.prior("c", {}).log_prob(draws).isfinite().all()
    assert "relaxed_elbo" not in evaluate(pair, rows(), 0)


def test_a_flow_improves_the_elbo_over_even_codes():
    # Two prototypes, 9 in 10 rows of the first: 20 standard errors apart, so that no new seed fails.
    torch.manual_seed(0)
    first = torch.tensor([1.0, 1, 1, 0, 0, 0])
    x = torch.where(torch.rand(600, 1) < 0.9, first, 1 - first)
    x = torch.where(torch.rand(600, X) < 0.05, 1 - x, x)
    bound = {}
    for name, prior in (("uniform", "uniform"), ("flow", FLOWS["realnvp"])):
        pair = built({"c": {"codes": 3, "prior": prior, "posterior": "relaxed_onehot"}})
        steps(pair, x, 400)
        with torch.no_grad():
            pyro.set_rng_seed(9)
            terms = pair.terms(x, particles=50)
        bound[name] = (terms.reconstruction - terms.kl["c"]).mean(0)
    gain = bound["flow"] - bound["uniform"]
    assert float(gain.mean()) > 0.1
    assert float(gain.mean()) > 10 * float(gain.std()) / len(gain) ** 0.5


def test_a_density_of_relaxed_codes_prices_no_categoricals():
    with pytest.raises(
        DeclarationError, match="latents.c.posterior.kl: expected relaxed, because the prior realnvp is a"
    ):
        built({"c": {"codes": 3, "prior": FLOWS["realnvp"], "posterior": "straight_through"}})


def test_a_point_has_no_relaxed_density():
    with pytest.raises(DeclarationError, match='expected kl = "categorical" without noise'):
        built({"c": {"codes": 3, "posterior": {"kind": "straight_through", "noise": False, "kl": "relaxed"}}})


@pytest.mark.parametrize("tau", [0.3, 1.0])
def test_gradients_of_density_and_samples_are_torch_s_at_the_same_noise(tau, monkeypatch):
    """By value, logits and temperature; both draw Gumbel noise, here from the same uniform numbers."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(6, 4, 3, dtype=torch.float64, generator=generator)
    value = torch.randn(6, 4, 3, dtype=torch.float64, generator=generator).log_softmax(-1)
    weights = torch.randn(6, 4, 3, dtype=torch.float64, generator=generator)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_(-uniform.log()))
    monkeypatch.setattr("torch.distributions.relaxed_categorical.clamp_probs", lambda _probs: uniform)
    found = []
    for kind in (ExpRelaxedCategorical, RelaxedCodes):
        logits = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()
        temperature = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
        at = value.clone().requires_grad_()
        theirs = kind is ExpRelaxedCategorical
        made: Any = RelaxedCodes(logits, temperature, 0)
        if theirs:
            made = ExpRelaxedCategorical(temperature, logits=logits, validate_args=False)
        score, drawn = made.log_prob(at).sum(), made.rsample((6,))
        slopes = torch.autograd.grad(score, [at, logits, temperature], retain_graph=True)
        found.append([score, drawn, *slopes, *torch.autograd.grad((weights * drawn).sum(), [logits, temperature])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
