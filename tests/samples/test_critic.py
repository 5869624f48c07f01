"""The critic against exact divergences."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, union-attr"

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

import pvae
from pvae.analysis import critic, surgery
from pvae.analysis.samples.critic import LogRatio
from pvae.pair.pair import Pair
from tests.samples.models import normals, refused


def channel(gain: float, noise: float, loc: float, d: int) -> Pair:
    """z = gain x + loc + noise, against p = N(0, I); with no noise at all, a point."""

    def model(x: Tensor) -> None:
        one = pyro.param("one", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(d), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * one, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            at = gain * x + loc
            pyro.sample("z", dist.Normal(at, noise).to_event(1) if noise else dist.Delta(at, event_dim=1))

    return Pair(model, guide).adopt(torch.zeros(3, d))


@pytest.mark.parametrize(("gain", "noise", "loc", "d"), [(0.8, 0.6, 0.0, 2), (0.5, 0.3, 0.7, 2), (1.3, 0.0, 0.2, 1)])
def test_of_normals_the_critic_finds_the_exact_kl(gain, noise, loc, d):
    x, variance = normals(4000, d, 1), gain**2 + noise**2
    exact = d * 0.5 * (variance + loc**2 - 1 - math.log(variance))
    found = critic(channel(gain, noise, loc, d), x)
    # 4 standard errors, 1 of 15 000, and what a network of finite data misses.
    assert abs(found.kl.value - exact) < 4 * found.kl.standard_error + 0.02 + 0.02 * exact
    assert abs(found.nwj.value - exact) < 4 * found.nwj.standard_error + 0.02 + 0.02 * exact
    assert found.nwj.value <= found.dv.value + 1e-12
    if exact == 0:
        assert found.cross_entropy.value == pytest.approx(math.log(2), abs=2e-3)


def test_it_agrees_with_surgery_where_densities_are_known():
    x = normals(3000, 1, 0)
    x = 0.4 * x + torch.where(torch.arange(3000)[:, None] % 2 == 0, 1.5, -1.5)  # two humps
    pair = channel(1.0, 0.3, 0.0, 1)
    found, taken = critic(pair, x), surgery(pair, x, samples=4).marginal_kl

    def integrand(z: float) -> float:
        q = (norm.pdf(z, 1.5, 0.5) + norm.pdf(z, -1.5, 0.5)) / 2
        return q * (math.log(q) - norm.logpdf(z)) if q > 1e-300 else 0.0

    exact = quad(integrand, -6, 6, limit=200)[0]
    assert taken.value == pytest.approx(exact, abs=0.03)
    assert abs(found.kl.value - exact) < 4 * found.kl.standard_error + 0.02
    assert abs(found.kl.value - taken.value) < 4 * found.kl.standard_error + 0.04


def test_a_code_is_seen_as_it_is(short):
    table = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1]])
    log_table = table.log()

    def model(x: Tensor) -> None:
        one = pyro.param("one", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(c.float()[:, None] * one, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(logits=log_table[x[:, 0].long()]))

    x = (torch.arange(3000) % 3).float()[:, None]
    q = table.mean(0).double()
    found = critic(Pair(model, guide).adopt(x[:3]), x)
    assert found.dim == 2
    assert found.kl.value == pytest.approx(float((q * (2 * q).log()).sum()), abs=0.01)


def test_given_a_label_it_is_the_mean_over_labels(short):
    """q(z | y) = N(2 y, 1) against p(z) = N(0, 1): KL is 0 or 2, and E_y of it 1; that of q(z) alone would be less."""
    experiment = pvae.Experiment.from_dict(
        {
            "data": {"source": "tensor"},
            "covariates": {"y": {"codes": 2}},
            "latents": {"z": {"dim": 1, "posterior": {"kind": "normal", "given": ["x", "y"]}}},
            "encoder": {"kind": "shared", "network": {"kind": "mlp", "hidden": []}},
            "decoder": {"given": ["z", "y"], "network": {"kind": "mlp", "hidden": []}, "likelihood": "normal"},
        }
    )
    pair = experiment.build((1,))
    ((name, weight),) = [(name, p) for name, p in pair.guide.posteriors.named_parameters() if p.dim() == 2]
    assert weight.shape == (2, 3), name  # location and log-variance, of x and the label's two columns
    with torch.no_grad():
        for p in pair.guide.posteriors.parameters():
            p.zero_()
        weight[0, 2] = 2.0
    rows = torch.cat([normals(4000, 1, 0), (torch.arange(4000) % 2).float()[:, None]], 1)
    found = critic(pair, rows)
    assert found.dim == 3
    assert abs(found.kl.value - 1) < 4 * found.kl.standard_error + 0.03


def test_a_value_that_training_never_saw_is_not_blown_up():
    """One of many codes: its one-hot is constant, 0, in training."""
    z = torch.cat([torch.randn(200, 2), torch.zeros(200, 1)], 1)
    network = LogRatio(z).requires_grad_(False)
    assert float((network(z + torch.tensor([0.0, 0.0, 1.0])) - network(z)).abs().max()) < 10


def test_few_rows_are_refused():
    refused("critic: expected at least 40 rows; got 10", critic, channel(1.0, 0.5, 0.0, 1), torch.zeros(10, 1))
