"""A hand-written pair of two numbers, which a marked row breaks; steps of optimisation that are compared."""

from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pvae
from pvae.experiment.experiment import Experiment
from pvae.objectives.base import Loss
from pvae.training.step import Step, make_capturable, set_lr
from tests.runs_shared import fit


class Fragile(nn.Module):
    """A decoder whose scale overflows for the marked row."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2))

    def model(self, x: Tensor) -> None:
        """z ~ N(0, 1), x ~ N(z + loc, 1), with a NaN density for rows that hold 99."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            bad = torch.where((x == 99).any(-1, keepdim=True), torch.nan, 0.0)
            pyro.sample("x", dist.Normal(z + self.loc + bad, 1.0, validate_args=False).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """q(z | x) around loc."""
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc.expand(len(x), 2), 1.0).to_event(1))

    def pair(self) -> pvae.Pair:
        """Model and guide."""
        return pvae.Pair(model=self.model, guide=self.guide)


def fit_pair(part: Fragile, where: Path, *overrides: str, **options: Any) -> pvae.Run:
    """A silent fit of a hand-written pair, to sixty rows of noise unless data are given."""
    return fit(part.pair(), where, *overrides, **{"data": torch.randn(60, 2), **options})


def stepper(experiment: Experiment, engine: str, device: str = "cpu") -> Step:
    """A step of batches of 96 digits as `fit` makes it, with clipping and an average."""
    pair = experiment.build((1, 8, 8)).to(device)
    optimizer = experiment.train.optimizer.build(pair.parameters())
    if device == "cuda":
        make_capturable(optimizer, torch.device(device))
    average = [p.detach().clone() for p in pair.parameters()]
    example, loss = torch.zeros(96, 1, 8, 8, device=device), Loss(experiment.objective, pair).to(device)
    with pyro.validation_enabled(False):
        return Step(loss, optimizer, engine, example, clip_norm=50.0, average=(average, 0.9))


def assert_equal_steps(eager: Step, fast: Step, *, tolerance: float, weights: float) -> None:
    """Both draw the same noise, and see beta and the learning rate change; batches of another size run eagerly."""
    for i in range(20):
        torch.manual_seed(100 + i)
        x = (torch.rand(96 if i % 6 else 40, 1, 8, 8, device=eager.loss.beta.device) > 0.5).float()
        outs = []
        for step in (eager, fast):
            step.loss.beta.fill_(0.05 * i)
            set_lr(step.optimizer, 1e-3 * (1 + i))
            torch.manual_seed(i)
            with pyro.validation_enabled(False):
                outs.append(step(x).clone())
        torch.testing.assert_close(*outs, rtol=tolerance, atol=tolerance)
    moved = ([*step.parameters, *(step.average[0] if step.average else ())] for step in (eager, fast))
    for one, other in zip(*moved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=weights)
