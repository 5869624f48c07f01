"""Scripts for Pyro: run as printed, they give the ELBO of the declared pair and the losses of its eager engine."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor, nn
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from pvae.data import load
from pvae.errors import DeclarationError
from pvae.experiment import zoo
from pvae.experiment.experiment import Experiment
from pvae.nn.schedules import Scheduled
from pvae.objectives.base import Loss
from pvae.pair.pair import Pair
from pvae.training.begin import begin
from pvae.training.step import Step, set_lr

ANOTHER_LOOP = {
    "em_mixture": "closed-form steps of EM",
    "kmeans": "closed-form steps of hard EM",
    "gan": "no ELBO: generator and critic take turns",
}
"""Systems that SVI does not fit."""
ANOTHER_ESTIMATE = {"bernoulli_vae": "a closed-form KL beside a score function: TraceGraph_ELBO estimates this KL"}
STEPS = 10


class Done(Exception):
    """Raised to leave the script's loop."""


def declared(name: str) -> Experiment:
    data: Any = Experiment.load(name).data
    small = ["data.rows=300"] if data.source == "toy" else ["data.splits.train=[0, 100]"]
    return Experiment.load(name, [*small, "train.batch_size=20"])


def counterpart(name: str, pair: Any) -> nn.Module:
    """Return the part of the declared pair that a part of the script stands for."""
    model, guide = pair.model, pair.guide
    kind, _, latent = name.partition("_")
    if kind == "decoder":
        return model.decoder.network
    if kind == "likelihood":
        return model.decoder.likelihood
    if kind == "encoder":
        return guide.encoder.networks[latent] if latent else guide.encoder
    return (model.priors if kind == "prior" else guide.posteriors)[latent]


@torch.no_grad()
def take_weights(script: dict[str, Any], pair: Pair) -> None:
    if "pair" in script:  # made by the same declaration
        expected = pair.state_dict()
        assert all(value.equal(expected[name]) for name, value in script["pair"].state_dict().items())
        return
    for name, part in script.items():
        if isinstance(part, nn.Module):
            for mine, theirs in zip(part.parameters(), counterpart(name, pair).parameters(), strict=True):
                mine.copy_(theirs)


class Engine:
    """Declared pair and its eager engine, a step at a time."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment, self.train = experiment, experiment.train
        data = experiment.conditioned(load(experiment.data, seed=experiment.seed))
        self.pair = experiment.build(data.shape).attend(data.train.data)
        self.per_epoch = -(-len(data.train) // self.train.batch_size)
        begin(self.pair, data.train, self.train.batch_size, experiment.seed)
        self.loss = Loss(experiment.objective, self.pair, len(data.train))
        self.optimizer = self.train.optimizer.build(list(self.pair.parameters()))
        self.stepper = Step(self.loss, self.optimizer, "eager", data.train.rows[: self.train.batch_size])

    def rows(self, *arguments: Tensor) -> Tensor:
        """Return a batch as the pair takes it: labels are numbers behind x."""
        x, *labels = arguments
        return torch.cat([x.flatten(1), labels[0].argmax(1, keepdim=True)], 1) if labels else x

    def follow(self, step: int, index: Tensor) -> None:
        epoch = step / self.per_epoch
        self.loss.beta.fill_(self.experiment.objective.beta.at(epoch, self.train.epochs))
        for part in self.pair.modules():
            if isinstance(part, Scheduled):
                part.follow(epoch, self.train.epochs)
        for part in self.pair.made_of_data():
            part.start(index)
        set_lr(self.optimizer, self.train.optimizer.lr * self.train.schedule.at(epoch, self.train.epochs))


def same_noise(self: ExpRelaxedCategorical, sample_shape: torch.Size = torch.Size()) -> Tensor:
    """Sample Pyro's relaxed one-hot from the noise that pvae draws."""
    shape = self._extended_shape(sample_shape)
    scores = self.logits.expand(shape) - torch.empty(shape).exponential_().log()
    return (scores / self.temperature).log_softmax(-1)


@pytest.mark.parametrize("name", sorted({*zoo.names()} - {*ANOTHER_LOOP}))
def test_the_script_runs_as_the_pair(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same ELBO on the same seed, and the losses of ten steps."""
    experiment = declared(name)
    engine = Engine(experiment)
    losses: list[float] = []
    steps: list[float] = []
    script: dict[str, Any] = {"__name__": "__main__"}
    take = SVI.step

    def step(svi: SVI, *arguments: Any, **numbers: Any) -> float:
        done, rows = len(steps), engine.rows(*arguments)
        engine.follow(done, script["index"])
        if not done:
            take_weights(script, engine.pair)
            whole = {**numbers, "beta": 1.0} if "beta" in numbers else numbers
            torch.manual_seed(1)
            found = svi.evaluate_loss(*arguments, **whole)
            torch.manual_seed(1)
            with torch.no_grad():
                terms = experiment.objective.terms(engine.pair, rows)
                beta = torch.tensor(1.0 if "beta" in numbers else experiment.objective.beta.at(0, 1))
                expected = experiment.objective.loss(terms, beta).item()
            if name not in ANOTHER_ESTIMATE:
                assert found == pytest.approx(expected, rel=1e-5)
        torch.manual_seed(2 + done)
        losses.append(engine.stepper(rows)[0].item())
        torch.manual_seed(2 + done)
        steps.append(take(svi, *arguments, **numbers))
        if len(steps) == STEPS:
            raise Done
        return steps[-1]

    monkeypatch.setattr(SVI, "step", step)
    monkeypatch.setattr(ExpRelaxedCategorical, "rsample", same_noise)
    with pyro.get_param_store().scope(), torch.random.fork_rng(), pytest.raises(Done):
        exec(compile(experiment.to_pyro(), name, "exec", dont_inherit=True), script)  # noqa: S102 - printed by pvae
    if name not in ANOTHER_ESTIMATE:
        assert steps == pytest.approx(losses, rel=2e-5)


@pytest.mark.parametrize("name", sorted(ANOTHER_LOOP))
def test_other_loops_are_refused(name: str) -> None:
    with pytest.raises(DeclarationError, match="objective: expected trace_elbo or"):
        Experiment.load(name).to_pyro()
