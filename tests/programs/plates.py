"""Programs about plates: without a size, subsampled, of a declared full size, nested and side by side, of levels."""

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints

from tests.programs.amortised import Encoder, decoder
from tests.programs.program import Program, bits, gaussian_log_p, normal
from tests.programs.regression import ALL

ROOT = math.sqrt(2.0)


def log_normal(x: Tensor) -> float:
    return float(dist.Normal(0.0, ROOT).log_prob(x).mean())


def bare_plates() -> Program:
    """Plates without a size."""

    def model(x: Tensor) -> None:
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(0.4))
        with pyro.plate("data"):
            pyro.sample("z", dist.Normal(a * x, 0.7))

    x = normal(20, 70, 1.4)
    return Program(model, guide, x, log_normal(x))


def subsample_plate() -> Program:
    """A plate that draws 5 rows of x by itself, as in Pyro's tutorial on minibatches."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), subsample_size=5) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(0.4))
        with pyro.plate("data", len(x), subsample_size=5) as i:
            pyro.sample("z", dist.Normal(a * x[i], 0.7))

    x = normal(20, 71, 1.4)
    return Program(model, guide, x, log_normal(x), options=ALL)


def declared_full_size() -> Program:
    """A batch of a data set of 100 rows, with a global latent, whose KL is shared by all 100."""

    def model(x: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 100, subsample=torch.arange(len(x))):
            z = pyro.sample("z", dist.Normal(b, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("b", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.3))
        a = pyro.param("a", torch.tensor(0.4))
        with pyro.plate("data", 100, subsample=torch.arange(len(x))):
            pyro.sample("z", dist.Normal(a * x, 0.7))

    return Program(model, guide, normal(20, 72, 1.4), size=100)


def global_and_local() -> Program:
    """A common mean of all rows: log p(x) is that of one normal."""

    def model(x: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(b, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(pyro.param("loc", torch.tensor(0.1)), 0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.5)) * (x + b), 0.7))

    x = normal(12, 73, 1.4)
    covariance = torch.ones(12, 12) + 2 * torch.eye(12)
    return Program(model, guide, x, gaussian_log_p(x[None], covariance) / 12)


def eight_schools() -> Program:
    """Effects of schools around a common mean of unknown spread, given the errors of the estimates."""

    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", len(y)):
            eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * eta, sigma), obs=y)

    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    return Program(model, AutoNormal(model), (y, sigma), options=ALL)


def baseball() -> Program:
    """Partially pooled batting: a beta prior of hits with global mean and strength, a beta guide of every row."""

    def model(data: Tensor) -> None:
        m = pyro.sample("m", dist.Uniform(0.0, 1.0))
        kappa = pyro.sample("kappa", dist.LogNormal(2.0, 0.5))
        with pyro.plate("players", len(data)):
            phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
            pyro.sample("hits", dist.Binomial(data[:, 0], phi), obs=data[:, 1])

    def guide(data: Tensor) -> None:
        a = pyro.param("a", torch.tensor(8.0), constraint=constraints.positive)
        pyro.sample("m", dist.Beta(a, 2.5 * a))
        pyro.sample("kappa", dist.LogNormal(pyro.param("log_kappa", torch.tensor(2.0)), 0.3))
        with pyro.plate("players", len(data)):
            pyro.sample("phi", dist.Beta(2.0 + data[:, 1], 5.0 + data[:, 0] - data[:, 1]))

    hits = torch.tensor([18.0, 17, 16, 15, 14, 14, 13, 12, 11, 11, 10, 10, 8, 7])
    return Program(model, guide, torch.stack([torch.full_like(hits, 45.0), hits], 1))


def plate_inside() -> Program:
    """Pixels in a plate of their own, inside the rows: latents and data both have it."""
    net = nn.Linear(3, 6)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
            with pyro.plate("pixels", 3, dim=-1):
                z = pyro.sample("z", dist.Normal(a, 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("net", net)
        loc, log_scale = net(x).chunk(2, -1)
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("a", dist.Normal(0.5 * x.mean(1, keepdim=True), 0.6))
            with pyro.plate("pixels", 3, dim=-1):
                pyro.sample("z", dist.Normal(loc, (0.3 * log_scale).exp()))

    x = normal((16, 3), 74)
    return Program(model, guide, x, gaussian_log_p(x, torch.ones(3, 3) + 1.25 * torch.eye(3)), plates=2)


def plates_beside_and_inside() -> Program:
    """Levels of columns (global, in a plate) and of rows (local), with a plate of columns inside the rows."""

    def model(x: Tensor) -> None:
        columns = pyro.plate("columns", 3, dim=-1)
        with columns:
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x), dim=-2):
            a = pyro.sample("a", dist.Normal(torch.zeros(()), 1.0))
            with columns:
                pyro.sample("x", dist.Normal(a + level, 0.8), obs=x)

    def guide(x: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(3))
        with pyro.plate("columns", 3, dim=-1):
            pyro.sample("level", dist.Normal(loc, 0.3))
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("a", dist.Normal(pyro.param("b", torch.tensor(0.7)) * x.mean(1, keepdim=True), 0.5))

    x = normal((6, 3), 75)
    rows, columns = torch.kron(torch.eye(6), torch.ones(3, 3)), torch.kron(torch.ones(6, 6), torch.eye(3))
    log_p = gaussian_log_p(x.reshape(1, -1), rows + columns + 0.64 * torch.eye(18)) / 6
    return Program(model, guide, x, log_p, plates=2)


def factor_in_the_model() -> Program:
    """A soft constraint of the joint: it is data, and enters ELBO and evidence."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("soft", -0.5 * (z - 1.0) ** 2)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(0.3))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a * x + 0.3, 0.6))

    x = normal(20, 76, 1.4)
    one = dist.Normal(1.0, ROOT).log_prob(torch.tensor(0.0)) + 0.5 * math.log(2 * math.pi)  # of the factor
    log_p = one + dist.Normal(0.5, math.sqrt(1.5)).log_prob(x).mean()
    return Program(model, guide, x, float(log_p))


def missing_entries() -> Program:
    """Entries that are missing (nan in Pyro's tutorials, here a mask) count nothing."""
    encoder, net = Encoder(4, 2), decoder(2, 4)

    def model(data: Tensor) -> None:
        pyro.module("net", net)
        x, known = data[..., :4], data[..., 4:].bool()
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.7).mask(known).to_event(1), obs=x)

    def guide(data: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Normal(*encoder(data[..., :4] * data[..., 4:])).to_event(1))

    return Program(model, guide, torch.cat([normal((20, 4), 77), bits((20, 4), 78, 0.7)], 1))


def bayesian_network_of_weights() -> Program:
    """A Bayesian neural network: weights are global, rows have no latent."""

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        v = pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        mean = ((x[:, :2] @ w).tanh() * v[..., None, :]).sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, 0.7), obs=x[:, 2])

    return Program(model, AutoNormal(model, init_scale=0.2), normal((20, 3), 79))
