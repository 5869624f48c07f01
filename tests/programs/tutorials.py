"""Programs as in Pyro's tutorials: a coin, PyroModules with random weights, reparametrised sites, sticks, causes."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.contrib.cevae import CEVAE
from pyro.infer import config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoHierarchicalNormalMessenger,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from pyro.infer.autoguide.initialization import init_to_value
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints

from tests.programs.program import Program, bits, normal
from tests.programs.regression import ALL, exact, regression, rows
from tests.programs.sequences import EMISSION, TRANSITION, forward_algorithm, ragged


def coin() -> Program:
    """The first tutorial: a fairness with a beta prior, tosses in a plate; log p(x) is a ratio of beta functions."""

    def model(x: Tensor) -> None:
        fairness = pyro.sample("fairness", dist.Beta(10.0, 10.0))
        with pyro.plate("tosses", len(x)):
            pyro.sample("toss", dist.Bernoulli(fairness), obs=x)

    def guide(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(15.0), constraint=constraints.positive)
        b = pyro.param("b", torch.tensor(14.0), constraint=constraints.positive)
        pyro.sample("fairness", dist.Beta(a, b))

    x = bits((20,), 80, 0.6)
    heads = float(x.sum())

    def log_beta(a: float, b: float) -> float:
        return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)

    return Program(model, guide, x, (log_beta(10 + heads, 30 - heads) - log_beta(10, 10)) / 20)


def coin_of_single_sites() -> Program:
    """The same with a site for every toss, in a sequential plate: rows of a batch are then no rows."""

    def model(x: Tensor) -> None:
        fairness = pyro.sample("fairness", dist.Beta(10.0, 10.0))
        for i in pyro.plate("tosses", len(x)):
            pyro.sample(f"toss_{i}", dist.Bernoulli(fairness), obs=x[i])

    def guide(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(15.0), constraint=constraints.positive)
        pyro.sample("fairness", dist.Beta(a, a))

    return Program(model, guide, bits((20,), 80, 0.6))


class Regression(PyroModule):
    """The tutorial's regression: weights of a layer are random, by PyroSample."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.linear.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.7), obs=y)
        return mean


def regression_of_random_weights() -> Program:
    model, data = Regression(), rows()
    return Program(model, AutoDiagonalNormal(model, init_scale=0.2), (data[:, :2], data[:, 2]), exact(data))


def regression_with_messenger() -> Program:
    return Program(regression, AutoNormalMessenger(regression, init_scale=0.2), rows(), exact(rows()))


def regression_structured() -> Program:
    guide = AutoStructured(regression, conditionals={"b": "normal", "w": "mvn"}, dependencies={"w": {"b": "linear"}})
    return Program(regression, guide, rows(), exact(rows()))


def reparametrised() -> Program:
    """Effects of groups around a mean, decentered by `LocScaleReparam`."""

    @poutine.reparam(config={"theta": LocScaleReparam(0.0)})
    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 0.5))
        with pyro.plate("groups", len(y)):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma), obs=y)

    return Program(model, AutoNormal(model, init_scale=0.5), (normal(8, 81, 2.0), torch.ones(8)), options=ALL)


def sticks() -> Program:
    """The Dirichlet process mixture of the tutorial: sticks, centres, assignments with parameters for every row."""
    components = 4

    def weights(beta: Tensor) -> Tensor:
        left = (1 - beta).cumprod(-1)
        return nn.functional.pad(beta, (0, 1), value=1) * nn.functional.pad(left, (1, 0), value=1)

    def model(x: Tensor) -> None:
        with pyro.plate("beta_plate", components - 1):
            beta = pyro.sample("beta", dist.Beta(1.0, 1.5))
        with pyro.plate("mu_plate", components):
            mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights(beta)))
            pyro.sample("obs", dist.Normal(mu[z], 0.8), obs=x)

    def guide(x: Tensor) -> None:
        kappa = pyro.param("kappa", torch.tensor([2.0, 1.5, 1.2]), constraint=constraints.positive)
        tau = pyro.param("tau", torch.tensor([-1.5, 0.0, 1.0, 2.0]))
        phi = pyro.param("phi", torch.full((12, components), 0.25), constraint=constraints.simplex)
        with pyro.plate("beta_plate", components - 1):
            pyro.sample("beta", dist.Beta(torch.ones(components - 1), kappa))
        with pyro.plate("mu_plate", components):
            pyro.sample("mu", dist.Normal(tau, 0.4))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(phi))

    return Program(model, guide, normal(12, 82, 1.5), options=ALL)


def hidden_markov_with_points() -> Program:
    """Pyro's HMM example as it stands: transitions and emissions have priors and an AutoDelta."""

    @config_enumerate
    def model(x: Tensor, lengths: Tensor) -> None:
        start = pyro.sample("probs_z", dist.Dirichlet(0.9 * torch.eye(3) + 0.1).to_event(1))
        emission = pyro.sample("probs_x", dist.Beta(0.8, 0.9).expand([3, 2]).to_event(2))
        tones = pyro.plate("tones", 2, dim=-1)
        with pyro.plate("sequences", len(x), dim=-2):
            state: Any = 0
            for t in pyro.markov(range(int(lengths.max()))):
                with poutine.mask(mask=(t < lengths)[:, None]):
                    state = pyro.sample(f"z_{t}", dist.Categorical(start[state]))
                    with tones as tone:
                        pyro.sample(f"x_{t}", dist.Bernoulli(emission[state, tone]), obs=x[:, t])

    start = {"probs_z": TRANSITION, "probs_x": EMISSION}
    guide = AutoDelta(poutine.block(model, expose=["probs_z", "probs_x"]), init_loc_fn=init_to_value(values=start))
    data = ragged(20, 83)
    log_p = forward_algorithm(*data)
    prior = dist.Dirichlet(0.9 * torch.eye(3) + 0.1).log_prob(TRANSITION).sum()
    prior = prior + dist.Beta(0.8, 0.9).log_prob(EMISSION).sum()
    return Program(model, guide, data, log_p, elbo=lambda: log_p + prior / 20)


def codes_in_a_plate() -> Program:
    """Codes of pixels in a plate of their own, which the guide enumerates."""
    centres = torch.tensor([-1.0, 0.0, 1.5])

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2), pyro.plate("pixels", 4, dim=-1):
            c = pyro.sample("c", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.Normal(centres[c], 0.7), obs=x)

    @config_enumerate
    def guide(x: Tensor) -> None:
        sharp = pyro.param("sharp", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("rows", len(x), dim=-2), pyro.plate("pixels", 4, dim=-1):
            pyro.sample("c", dist.Categorical(logits=-sharp * (x[..., None] - centres) ** 2))

    x = normal((16, 4), 84)
    log_x = dist.Normal(centres, 0.7).log_prob(x[..., None]) - math.log(3)
    log_q = (-0.7 * (x[..., None] - centres) ** 2).log_softmax(-1)
    elbo = (log_q.exp() * (log_x - log_q)).sum((1, 2)).mean()
    return Program(model, guide, x, float(log_x.logsumexp(-1).sum(1).mean()), elbo=lambda: elbo, plates=2)


class Ornstein(PyroModule):
    """A PyroModule with PyroParams: a latent path of Gaussian steps, observed in noise, by `GaussianHMM`."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    def forward(self, x: Tensor) -> None:
        decay = pyro.sample("decay", dist.Beta(4.0, 2.0))
        one = torch.eye(1)
        path = dist.GaussianHMM(
            dist.Normal(torch.zeros(1), 1.0).to_event(1),
            decay.reshape(1, 1),
            dist.Normal(torch.zeros(1), 0.6).to_event(1),
            one,
            dist.Normal(torch.zeros(1), self.noise).to_event(1),
            duration=5,
        )
        with pyro.plate("series", len(x)):
            pyro.sample("x", path, obs=x)


def gaussian_paths() -> Program:
    model = Ornstein()
    return Program(model, AutoNormal(model, init_scale=0.3), normal((10, 5, 1), 85))


def causes() -> Program:
    """`pyro.contrib.cevae` itself: covariates, a treatment, an outcome, and a latent confounder."""
    made = CEVAE(feature_dim=3, outcome_dist="bernoulli", latent_dim=2, hidden_dim=4, num_layers=2)
    data = normal((20, 3), 86), bits((20,), 87), bits((20,), 88)
    unpenalised = poutine.block(made.guide, hide=["t", "y"])  # what predicts them stands in the guide, as penalties
    return Program(made.model, made.guide, data, bound=(made.model, unpenalised))


def grouped_messenger() -> Program:
    """A hierarchical messenger guide, whose posteriors move with their priors."""

    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    return Program(model, AutoHierarchicalNormalMessenger(model, init_scale=0.3), normal(10, 89), options=ALL)
