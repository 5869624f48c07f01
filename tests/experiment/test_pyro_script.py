"""Scripts for Pyro: run as printed, they give the ELBO of the declared pair and the losses of its eager engine."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor, nn
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from pvae.component import IMPORTED, load_plugins
from pvae.data import load
from pvae.errors import DeclarationError
from pvae.experiment import zoo
from pvae.experiment.experiment import Experiment
from pvae.models.priors.base import Prior
from pvae.nn.schedules import Scheduled
from pvae.objectives.base import Loss
from pvae.training.begin import begin
from pvae.training.step import Step, set_lr
from tests.cli_runner import run_cli

ANOTHER_LOOP = {
    "em_mixture": "closed-form steps of EM",
    "kmeans": "closed-form steps of hard EM",
    "gan": "no ELBO: generator and critic take turns",
    "semi_supervised": "labels in some rows",
}
"""Systems that SVI does not fit."""
ANOTHER_ESTIMATE = {"bernoulli_vae": "a closed-form KL beside a score function: TraceGraph_ELBO estimates this KL"}
MORE = {
    "convolutions": ("vae", ["encoder.network.kind=conv"]),
    "closed-form KL": ("vae", ["objective.kind=trace_mean_field_elbo"]),
    "several particles": ("hvae", ["objective.particles=2"]),
    "an exact sum": ("em_mixture", ["objective={kind='trace_elbo'}", "train={}"]),
    "a sum over a grid": ("categorical_vae", ["latents.c.codes=2", "latents.c.grid=[3]"]),
    "relaxed codes with an embedding": ("gumbel_softmax_vae", ["latents.c.embedding=5"]),
    "residual codes": ("vq_vae", ["latents.c.posterior={kind='residual',depth=2,dropout=0.5,passes='rotation'}"]),
    "pseudo-inputs at one level": ("hvae", ["latents.z2.prior={kind='vamp',components=5}"]),
    "momentum": ("vae", ["train.optimizer={kind='sgd',lr=1e-3,momentum=0.9}", "train.schedule=constant"]),
}
"""Declarations beyond the zoo, each a zoo entry with overrides."""
STEPS = 10


class Done(Exception):
    """Raised to leave the script's loop."""


def declared(case: str) -> Experiment:
    name, overrides = MORE.get(case, (case, []))
    data: Any = Experiment.load(name).data
    small = ["data.rows=300"] if data.source == "toy" else ["data.splits.train=[0, 100]"]
    return Experiment.load(name, [*overrides, *small, "train.batch_size=20"])


@torch.no_grad()
def take_weights(script: dict[str, Any], pair: Any) -> None:
    """Give the modules of a script the weights of the parts of the declared pair that they stand for."""
    if "pair" in script:  # made by the same declaration
        expected = pair.state_dict()
        assert all(value.equal(expected[name]) for name, value in script["pair"].state_dict().items())
        return
    model, guide = pair.model, pair.guide
    parts = {"decoder": model.decoder.network, "likelihood": model.decoder.likelihood, "encoder": guide.encoder}
    groups = {"encoder": getattr(guide.encoder, "networks", {}), "prior": model.priors, "posterior": guide.posteriors}
    parts |= {f"{kind}_{latent}": part for kind, made in groups.items() for latent, part in made.items()}
    for name, part in script.items():
        if isinstance(part, nn.Module):
            for mine, theirs in zip(part.parameters(), parts[name].parameters(), strict=True):
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


@pytest.mark.fast(
    "flow_variational",
    "vae",
    "hvae",
    "vq_vae",
    "dvae",
    "cells",
    "realnvp_prior",
    "vamp",
    "momentum",
    "an exact sum",
    "conditional",
    "several particles",
    "residual codes",
    "a sum over a grid",
    "closed-form KL",
    "convolutions",
    "straight_through_vae",
    "exemplar",
)
@pytest.mark.parametrize("name", [*sorted({*zoo.names()} - {*ANOTHER_LOOP}), *MORE])
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


PLUGIN = """
from typing import Literal
from pvae.models.priors.base import Prior
from pvae.models.priors.base import StandardNormalModule

class Following(Prior):
    kind: Literal["following"] = "following"
    keeps_link: bool = False

    def build(self, site, given, link):
        module = StandardNormalModule(site.event)
        if self.keeps_link:
            vars(module)["link"] = link
        return module
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "following.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    load_plugins(("following",))
    yield "following"
    Prior.members.pop("following")
    IMPORTED.remove("following")
    sys.modules.pop("following")


@pytest.mark.parametrize("keeps_link", [False, True])
def test_a_kind_of_a_plugin_is_imported_by_name(plugin: str, keeps_link: bool) -> None:
    prior = {"kind": plugin, "keeps_link": keeps_link}
    data = {"source": "digits", "binarize": "dynamic"}
    text = Experiment.from_dict({"data": data, "latents": {"z": {"dim": 2, "prior": prior}}}).to_pyro((1, 8, 8))
    assert "from following import Following" in text
    assert ("pvae.Experiment.from_toml" in text) is keeps_link
    script: dict[str, Any] = {"__name__": "script"}
    with pyro.get_param_store().scope():
        exec(compile(text, "script", "exec", dont_inherit=True), script)  # noqa: S102 - printed by pvae
        assert 30 < script["svi"].step(script["data"].train.draw(torch.arange(10))) < 60


def test_show_prints_it() -> None:
    out, _ = run_cli("show", "vae", "--pyro")
    assert out == Experiment.load("vae").to_pyro()
    assert len(out.splitlines()) <= 62


def test_settings_of_training_are_written_out() -> None:
    overrides = ["train.warmup=2", "train.clip_norm=1", "train.schedule={kind='cyclical'}", "objective.particles=3"]
    text = Experiment.load("vae_normal", [*overrides, "seed=3"]).to_pyro((1, 8, 8))
    assert "# Left out of the declared training: clip_norm = 1.0" in text
    assert "Cyclical().at(step / STEPS, EPOCHS) * min((step + 1) / (2 * STEPS), 1)" in text
    assert "Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)" in text
    assert "load(Digits(), seed=3)" in text


@pytest.mark.parametrize("name", sorted(ANOTHER_LOOP))
def test_other_loops_are_refused(name: str) -> None:
    with pytest.raises(DeclarationError, match="objective: expected trace_elbo or"):
        Experiment.load(name).to_pyro()
