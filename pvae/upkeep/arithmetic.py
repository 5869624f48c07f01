"""Doctor's checks of the arithmetic: an ELBO against its exact value, and reproducible gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pvae.upkeep.packages import CheckArguments
from pvae.util.checks import Check

if TYPE_CHECKING:
    from torch import Tensor

ELBO_ROUNDING_NATS = 1e-9
"""Largest accepted error (nats, float64) of the ELBO of the check."""


def elbo(_: CheckArguments) -> Iterator[Check]:
    """Yield a check that fails if the ELBO of a Gaussian model differs from its exact value.

    With p(z) = N(0, 1), p(x | z) = N(z, 1) and the true posterior as guide, every sample of the ELBO is log p(x).
    """
    import pyro
    import torch
    from pyro.distributions import Normal

    from pvae.pair.pair import Pair
    from pvae.training.evaluation import evaluate

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", Normal(z, pyro.param("noise", torch.ones((), dtype=x.dtype))), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", Normal(x / 2, math.sqrt(0.5)))

    x = torch.linspace(-3, 3, 64, dtype=torch.float64)
    exact = -0.5 * math.log(4 * math.pi) - float((x**2).mean()) / 4
    found = evaluate(Pair(model, guide).adopt(x), x, 0)["elbo"]
    text = f"{found:.9f} nats per datum; exactly {exact:.9f}"
    if abs(found - exact) <= ELBO_ROUNDING_NATS:
        yield Check("elbo", "ok", text)
    else:
        advice = "Trust no figure of this installation: see pvae selfcheck, and install torch anew."
        yield Check("elbo", "failed", text, advice)


def determinism(_: CheckArguments) -> Iterator[Check]:
    """Yield a check that fails if the same seed gives different gradients."""
    first, second = _gradients(), _gradients()
    if first.equal(second):
        yield Check("determinism", "ok", "same seed, same bits of the loss and all gradients (eager, on the CPU)")
    else:
        off = float((first - second).abs().max())
        advice = "Runs are not resumed bit for bit here: set OMP_NUM_THREADS=1, and look again."
        yield Check("determinism", "failed", f"same seed, gradients that differ by up to {off:.1e}", advice)


def _gradients() -> Tensor:
    """Return loss and gradients of a small VAE with fixed seeds, as one vector; the global random state is restored."""
    import torch

    from pvae.experiment.experiment import Experiment
    from pvae.objectives.base import Loss
    from pvae.util import seeds

    experiment = Experiment.from_dict({"latents": {"z": {"dim": 4}}})
    pair = experiment.build((16, 16))
    parameters = list(pair.parameters())
    with torch.random.fork_rng(devices=[]):
        seeds.set_noise(0, torch.device("cpu"))
        x = torch.rand(128, 16, 16).round()
        loss = Loss(experiment.objective, pair, len(x))(x)[0]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat([loss.detach()[None], *(g.flatten() for g in gradients if g is not None)])
