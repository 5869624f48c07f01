"""Bayesian regression with each AutoGuide, and AutoGuides over latents of the rows; log p(x) is that of one normal."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoLaplaceApproximation, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from tests.programs.program import Program, gaussian_log_p, normal

NOISE = 0.7
ALL = ("train.batch_size=100",)
"""All rows in one batch, where the programs have parameters for each of them."""


def rows(count: int = 20) -> Tensor:
    """Two inputs and an output."""
    inputs = normal((count, 2), 60)
    return torch.cat([inputs, inputs @ torch.tensor([[1.0], [-0.5]]) + NOISE * normal((count, 1), 61)], 1)


def regression(x: Tensor) -> None:
    b = pyro.sample("b", dist.Normal(0.0, 1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        mean = b + (x[:, :2] * w[..., None, :] if w.dim() > 1 else x[:, :2] * w).sum(-1)
        pyro.sample("y", dist.Normal(mean, NOISE), obs=x[:, 2])


def exact(x: Tensor) -> float:
    """log p(y) of all rows together, divided by their number."""
    seen = torch.cat([torch.ones(len(x), 1), x[:, :2]], 1)
    return gaussian_log_p(x[None, :, 2], seen @ seen.T + NOISE**2 * torch.eye(len(x))) / len(x)


def regression_with(kind: str, **options: Any) -> Callable[[], Program]:
    def made() -> Program:
        guide = getattr(autoguide, kind)(regression, **options)
        point = kind in ("AutoDelta", "AutoLaplaceApproximation")  # its evidence is given the point
        return Program(regression, guide, rows(), None if point else exact(rows()))

    return made


def regression_after_laplace() -> Program:
    """Laplace's approximation at the mode, which is the exact posterior here: the ELBO is log p."""
    x = rows()
    seen = torch.cat([torch.ones(len(x), 1), x[:, :2]], 1)
    mode = torch.linalg.solve(seen.T @ seen / NOISE**2 + torch.eye(3), seen.T @ x[:, 2] / NOISE**2)
    guide = AutoLaplaceApproximation(regression, init_loc_fn=init_to_value(values={"b": mode[0], "w": mode[1:]}))
    guide(x)
    fitted = guide.laplace_approximation(x)
    pyro.clear_param_store()
    return Program(regression, fitted, x, exact(x), elbo=lambda: exact(x))


def regression_with_a_list() -> Program:
    guide = AutoGuideList(regression)
    guide.append(AutoNormal(poutine.block(regression, expose=["w"]), init_scale=0.2))
    guide.append(AutoNormal(poutine.block(regression, expose=["b"]), init_scale=0.2))
    return Program(regression, guide, rows(), exact(rows()))


def regression_with_a_list_and_a_point() -> Program:
    """A Delta for the intercept: a figure at a point, whose evidence is conditional on it."""
    guide = AutoGuideList(regression)
    guide.append(AutoNormal(poutine.block(regression, expose=["w"]), init_scale=0.2))
    guide.append(AutoDelta(poutine.block(regression, expose=["b"])))
    return Program(regression, guide, rows())


def local_model(x: Tensor) -> None:
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def rows_with(kind: str, **options: Any) -> Callable[[], Program]:
    """An AutoGuide with parameters for every row."""

    def made() -> Program:
        x = normal(12, 62, 1.4)
        log_p = float(dist.Normal(0.0, 2.0**0.5).log_prob(x).mean())
        return Program(local_model, getattr(autoguide, kind)(local_model, **options), x, log_p, options=ALL)

    return made
