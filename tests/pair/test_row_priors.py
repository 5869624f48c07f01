"""Priors that differ from row to row: no one marginal KL, said so, whatever the family and the level."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pvae import analysis
from pvae.pair.pair import Pair
from tests.programs.program import normal

ROWS = 30


def pair_of(prior, posterior, observe) -> Pair:
    """A pair with one latent, its prior and posterior functions of x."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            observe(pyro.sample("z", prior(x)), x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x))

    return Pair(model=model, guide=guide)


def near(z: Tensor, x: Tensor) -> None:
    pyro.sample("x", dist.Normal(z.reshape(len(x), -1).sum(-1), 1.0), obs=x)


def vector(x: Tensor) -> Tensor:
    return torch.stack([x, -x], -1)


DIFFERENT = {
    "location": (lambda x: dist.Normal(3 * x, 1.0), lambda x: dist.Normal(3 * x, 0.9)),
    "scale": (lambda x: dist.Normal(0.0, 0.5 + x.abs()), lambda x: dist.Normal(0.1 * x, 0.5)),
    "one coordinate": (
        lambda x: dist.Normal(vector(x) * torch.tensor([0.0, 1.0]), 1.0).to_event(1),
        lambda x: dist.Normal(vector(x), 0.5).to_event(1),
    ),
    "two groups": (lambda x: dist.Normal((x > 0).float(), 1.0), lambda x: dist.Normal(x, 0.5)),
    "one row only": (lambda x: dist.Normal((x == x.max()).float() * 5, 1.0), lambda x: dist.Normal(x, 0.5)),
    "full covariance": (
        lambda x: dist.MultivariateNormal(vector(x), torch.eye(2)),
        lambda x: dist.MultivariateNormal(vector(x), 0.5 * torch.eye(2)),
    ),
    "gamma": (lambda x: dist.Gamma(1.0 + x.abs(), 1.0), lambda x: dist.LogNormal(0.1 * x, 0.5)),
    "log-normal": (lambda x: dist.LogNormal(x, 1.0), lambda x: dist.LogNormal(x, 0.5)),
    "beta": (lambda x: dist.Beta(1.0 + x.abs(), 1.0), lambda x: dist.Beta(2.0 + x.abs(), 1.0)),
    "laplace": (lambda x: dist.Laplace(x, 1.0), lambda x: dist.Normal(x, 0.5)),
    "mixture": (
        lambda x: dist.MixtureSameFamily(
            dist.Categorical(logits=torch.zeros(2)), dist.Normal(torch.stack([x, x + 2], -1), 1.0)
        ),
        lambda x: dist.Normal(x, 0.5),
    ),
    "categorical": (
        lambda x: dist.Categorical(logits=x[:, None] * torch.arange(3.0)),
        lambda x: dist.Categorical(logits=x[:, None] * torch.arange(3.0)),
    ),
    "bits": (lambda x: dist.Bernoulli(logits=x), lambda x: dist.Bernoulli(logits=2 * x)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_prior_of_the_row_has_no_marginal_kl(name):
    prior, posterior = DIFFERENT[name]
    x = normal(ROWS)
    found = analysis.surgery(pair_of(prior, posterior, near), x, samples=3)
    assert found.marginal_kl is None
    assert found.latents["z"].marginal_kl is None
    assert found.latents["z"].coordinate_kl is None if hasattr(found.latents["z"], "coordinate_kl") else True
    assert any("prior" in note for note in found.notes)
    assert found.mutual_information is None or found.mutual_information.value < 4  # log 30 = 3.4
    assert found.elbo.value == pytest.approx(found.reconstruction.value - found.kl.value)


SAME = {
    "fixed": lambda x: dist.Normal(0.0, 1.0),
    "expanded by rows": lambda x: dist.Normal(torch.zeros(len(x)), 1.0),
    "a parameter": lambda x: dist.Normal(pyro.param("loc", torch.tensor(0.2)), 1.0),
    "a product with zero": lambda x: dist.Normal(0.0 * x, 1.0 + 0.0 * x),
    "mixture": lambda x: dist.MixtureSameFamily(
        dist.Categorical(logits=torch.zeros(2)), dist.Normal(torch.tensor([-1.0, 1.0]), 1.0)
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_one_prior_for_all_rows_has_a_marginal_kl_of_at_least_zero(name):
    x = normal(ROWS)
    found = analysis.surgery(pair_of(SAME[name], lambda x: dist.Normal(0.5 * x, 0.7), near), x, samples=20)
    pyro.clear_param_store()
    assert found.marginal_kl is not None
    assert found.marginal_kl.value > -3 * found.marginal_kl.standard_error


@pytest.mark.parametrize("reads", ["x at the second level", "x at the first level", "the latent alone", "a mask"])
def test_the_second_level_of_a_hierarchy(reads):
    """A conditional prior p(z1 | z2) is no prior of the row; p(z1 | z2, x) is one."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(2 * x if reads == "x at the second level" else 0.0 * x, 1.0))
            hidden = poutine.mask(mask=x > 0) if reads == "a mask" else poutine.mask(mask=True)
            with hidden:
                z1 = pyro.sample("z1", dist.Normal(z2 + (2 * x if reads == "x at the first level" else 0), 1.0))
            pyro.sample("x", dist.Normal(z1 * (x > 0) + z2, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.5 * x, 0.7))
            with poutine.mask(mask=x > 0) if reads == "a mask" else poutine.mask(mask=True):
                pyro.sample("z1", dist.Normal(z2 + 0.2 * x, 0.7))

    x = normal(ROWS)
    found = analysis.surgery(Pair(model=model, guide=guide), x, samples=10)
    if reads in ("the latent alone", "a mask"):  # rows with and without the masked latent have figures of their own
        assert found.marginal_kl is not None
        assert found.marginal_kl.value > -3 * found.marginal_kl.standard_error
    else:
        assert found.marginal_kl is None
        assert found.notes


def test_rows_that_a_batch_of_an_analysis_does_not_hold_together_are_compared():
    """The prior of row 1500 differs from all before: more rows than one batch."""
    x = torch.zeros(1600)
    x[1500] = 1.0
    pair = pair_of(lambda x: dist.Normal(3 * x, 1.0), lambda x: dist.Normal(0.5 * x, 0.7), near)
    assert analysis.surgery(pair, x).marginal_kl is None
