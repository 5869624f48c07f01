"""Programs written for one sample per row, by everyday indexing: several particles give right figures all the same."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pvae import analysis
from tests.pair.against_pyro import require_right
from tests.programs.program import gaussian_log_p, normal

T = torch.tensor([1.0, 2.0])
WEIGHT = torch.stack([T, torch.ones(2)])
"""x = z @ WEIGHT + noise."""


def from_the_left(z: Tensor, x: Tensor) -> Tensor:
    return z[:, 0][:, None] * T + z[:, 1][:, None]


def from_the_left_with_none(z: Tensor, x: Tensor) -> Tensor:
    return z[:, 0, None] * T + z[:, 1, None]


def by_chunks(z: Tensor, x: Tensor) -> Tensor:
    first, second = z.chunk(2, 1)
    return first * T + second


def by_unpacking(z: Tensor, x: Tensor) -> Tensor:
    first, second = z.T
    return (T[:, None] * first + second).T


def by_reshape(z: Tensor, x: Tensor) -> Tensor:
    return z.reshape(len(x), -1) @ WEIGHT


def by_view_of_rows(z: Tensor, x: Tensor) -> Tensor:
    return z.view(-1, 2)[: len(x)] @ WEIGHT


def by_einsum(z: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("nd,dk->nk", z, WEIGHT)


def by_batched_product(z: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(z[:, None], WEIGHT.expand(len(x), 2, 2))[:, 0]


def with_an_assertion(z: Tensor, x: Tensor) -> Tensor:
    assert z.shape == (len(x), 2)
    return z @ WEIGHT


def by_a_loop_over_rows(z: Tensor, x: Tensor) -> Tensor:
    return torch.stack([z[i] @ WEIGHT for i in range(len(x))])


def by_addition_along_rows(z: Tensor, x: Tensor) -> Tensor:
    """An index of rows, which a further plate would take for that of samples."""
    return (z @ WEIGHT)[torch.arange(len(x))]


def by_dots(z: Tensor, x: Tensor) -> Tensor:
    return z[..., :1] * T + z[..., 1:]


def by_a_loop_over_numbers(z: Tensor, x: Tensor) -> Tensor:
    return torch.tensor([[float(v) for v in row] for row in z.tolist()]) @ WEIGHT


MEANS = [f for f in list(globals().values()) if getattr(f, "__module__", "") == __name__]


@pytest.mark.parametrize("mean", MEANS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("rows", [2, 3])
def test_every_way_to_take_coordinates(mean, rows):
    """Two rows or three: as many as coordinates of a row, and as particles are tried first."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(mean(z, x), 0.8).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = torch.linalg.solve(WEIGHT @ WEIGHT.T / 0.64 + torch.eye(2), (x @ WEIGHT.T / 0.64).T).T
            pyro.sample("z", dist.Normal(loc, 0.4).to_event(1))

    x = 1.5 * normal((rows, 2))
    log_p = gaussian_log_p(x, WEIGHT.T @ WEIGHT + 0.64 * torch.eye(2))
    pair = require_right(model, guide, x, log_p, slack=0.5)
    with torch.no_grad():
        several = pair.terms(x, particles=60)
    total = several.reconstruction - several.kl["z"]
    assert total.shape == (60, rows)
    sample = total.mean(1)
    found = analysis.surgery(pair, x, samples=60).elbo
    assert abs(sample.mean().item() - found.value) < 5 * (sample.std().item() / 60**0.5 + found.standard_error)
    if rows == 2 and mean is from_the_left:
        prior = analysis.prior_evidence(pair, x, samples=200).evidence
        assert prior.value < log_p + 5 * prior.standard_error
        gap = analysis.gap(pair, x, steps=1, samples=10).elbo
        assert gap.value < log_p + 5 * gap.standard_error


def test_a_global_vector_read_from_the_left():
    """w[0] is the first coefficient for one sample, the first sample under a plate of them."""

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w[0] + w[1] * x[:, 0], 0.5), obs=x[:, 1])

    def guide(x: Tensor) -> None:
        pyro.sample("w", dist.Normal(loc, 0.15).to_event(1))

    x = normal((20, 2))
    design = torch.stack([torch.ones(20), x[:, 0]], 1)
    covariance = (design @ design.T + 0.25 * torch.eye(20)).double()
    loc = torch.linalg.solve(design.T @ design + 0.25 * torch.eye(2), design.T @ x[:, 1])
    exact = dist.MultivariateNormal(torch.zeros(20).double(), covariance).log_prob(x[:, 1].double()).item() / 20
    require_right(model, guide, x, exact, slack=0.05)


@pytest.mark.parametrize("size", [(), (1,), (3,)])
def test_global_latents_of_every_shape_beside_local_ones(size):
    def model(x: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(size), 1.0).to_event(len(size)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(b.sum(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("b", dist.Normal(torch.full(size, 0.05), 0.4).to_event(len(size)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 0.75))

    x = normal(8)
    k = max(1, math.prod(size))
    covariance = 2 * torch.eye(8) + k * torch.ones(8, 8)
    exact = dist.MultivariateNormal(torch.zeros(8), covariance).log_prob(x).item() / 8
    require_right(model, guide, x, exact)


def test_a_nested_plate_read_from_the_left():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", 2, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            swapped = torch.stack([z[:, 1], z[:, 0]], 1)
            pyro.sample("x", dist.Normal(swapped, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", 2, dim=-1):
            pyro.sample("z", dist.Normal(0.5 * x.flip(1), 0.7))

    x = normal((5, 2))
    require_right(model, guide, x, 2 * dist.Normal(0.0, math.sqrt(2)).log_prob(x).mean().item())
