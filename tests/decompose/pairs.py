"""Small pairs, written by hand or declared, which several tests take apart."""

# Attributes of Modules and Pyro programs have no types.
# mypy: disable-error-code="index, misc, no-untyped-call, no-untyped-def"

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pvae.analysis.aggregate.aggregated import AggregatedPosterior
from pvae.distributions.codes import Certain
from pvae.experiment.experiment import Experiment
from pvae.pair.pair import Pair

Array = np.ndarray


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def small(model: Callable, guide: Callable) -> Pair:
    """A pair of two functions in float64, with one parameter to have one."""

    def with_parameter(x):
        pyro.param("unused", number(1.0))
        return guide(x)

    return Pair(model=model, guide=with_parameter)


def channel(scale: Callable[[Tensor], Tensor], *, blind: bool = False) -> Pair:
    """q(z | x) = N(x, scale^2) under the prior N(0, I); a blind guide does not look at x."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            loc = torch.full_like(x, 0.3) if blind else x
            pyro.sample("z", dist.Normal(loc, scale(x)).to_event(1))

    return small(model, guide)


def correlated(rho: float, n: int) -> Tensor:
    """Rows of a normal law with unit variances and correlation rho."""
    covariance = np.array([[1.0, rho], [rho, 1.0]])
    return torch.tensor(np.random.default_rng(2).multivariate_normal([0, 0], covariance, n))


def coded(table: Array, prior: Array | None = None, *, certain: bool = False) -> Pair:
    """q(c | x = i) = table[i] `(inputs, P, K)`, or its largest state for certain; a factorised prior."""
    log_q = torch.tensor(table).clamp(min=1e-300).log()
    log_p = torch.zeros(table.shape[1:]).double() if prior is None else torch.tensor(prior).log()

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=log_p).to_event(1))
            pyro.sample("x", dist.Normal(1.0 * c.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(x):
        logits = log_q[x[:, 0].long()]
        with pyro.plate("data", len(x)):
            codes = dist.Categorical(logits=logits).to_event(1)
            pyro.sample("c", Certain(logits.argmax(-1), table.shape[2], 1) if certain else codes)

    return small(model, guide)


def with_global() -> Pair:
    """x_i ~ N(z_i + b, 1) with one global b: log p is a joint Gaussian over all rows."""

    def model(x):
        b = pyro.sample("b", dist.Normal(0 * number(0.0), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0 * number(0.0), 1.0))
            pyro.sample("x", dist.Normal(z + b, 1.0), obs=x)

    def guide(x):
        pyro.sample("b", dist.Normal(number(0.3), 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7))

    return small(model, guide)


def random_global() -> Pair:
    """q(z | x, w) reads a global w that the guide samples."""

    def model(x):
        w = pyro.sample("w", dist.Normal(0 * number(0.0), 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(w, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        w = pyro.sample("w", dist.Normal(number(0.0), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x + w, 0.1))

    return small(model, guide)


A, B, C = np.array([[0.8], [-0.5]]), np.array([[0.3], [0.6]]), np.array([[0.9]])
S2, S1 = 0.4, 0.3


def two_levels(link: float = 1.0) -> Pair:
    """q(z2 | x) = N(x A, S2), q(z1 | x, z2) = N(x B + link z2 C, S1); the model p(z2) p(z1 | z2) p(x | z1)."""
    a, b, c = (torch.tensor(t) for t in (A, B, C))

    def model(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(0.5 * z2, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1.expand(-1, 2), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(x @ a, S2**0.5).to_event(1))
            pyro.sample("z1", dist.Normal(x @ b + link * (z2 @ c), S1**0.5).to_event(1))

    return small(model, guide)


# ---------------------------------------------------------------------- declared, of codes

SHAPE = (1, 2, 3)
VQ = {"codes": 16, "grid": [3, 2], "posterior": "nearest_code", "embedding": 4, "prior": "uniform"}
NEAREST, DRAWN = {"kind": "nearest_code"}, {"kind": "categorical", "estimator": "score"}


def declared(latents, seed: int = 0, shape=SHAPE, spread: float = 1.0, **more) -> Pair:
    """A tiny pair in float64 whose weights are far from where they begin."""
    net = {"kind": "mlp", "hidden": [8]}
    plan = {
        "data": {"source": "digits", "binarize": "dynamic"},
        "encoder": {"network": net},
        "decoder": {"network": net, "likelihood": {"kind": "bernoulli"}},
        "latents": latents,
    }
    pair = Experiment.from_dict({**plan, **more}).build(shape).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in pair.parameters():
            p.add_(spread * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return pair


def rows(n: int, shape=SHAPE, seed: int = 0) -> Tensor:
    """Binary data."""
    return (torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed)) > 0.5).double()


def leave_one_out(q: AggregatedPosterior, value: Tensor, index: Tensor | None = None) -> Tensor:
    """log 1/(n-1) sum_{j != index_i} q(z_i | x_j), `index_i` being i unless given."""
    index = torch.arange(len(value)) if index is None else index
    return -q.information(value, index, torch.zeros(len(value)).double()).leave_one_out
