"""The validation figure that ranks the weights of a fit is what its objective maximises."""

import json
import math
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae.analysis.pages.plots import curves
from pvae.experiment.experiment import Experiment
from pvae.objectives.base import FITTED, Loss, Objective, known_apart, named
from pvae.objectives.elbo import PyroELBO, TraceELBO
from pvae.objectives.em import EM
from pvae.objectives.importance import IWAE
from pvae.runs import checkpoint
from pvae.training import loop
from pvae.training.evaluation import evaluate, held_out
from tests.runs_shared import TINY_TABLE, fit, resume

X = torch.randn(60, 1, generator=torch.Generator().manual_seed(0)) * math.sqrt(2)


def experiment(objective: dict[str, Any], **train: Any) -> Experiment:
    return Experiment.from_dict({**TINY_TABLE, "objective": objective, "train": {**TINY_TABLE["train"], **train}})


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> None:
        pyro.module("model", self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + self.loc, 1.0).to_event(1), obs=x)


class Guide(nn.Module):
    """The exact posterior, times `wide`."""

    def __init__(self, wide: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(wide * math.sqrt(0.5)))

    def forward(self, x: Tensor) -> None:
        pyro.module("guide", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, self.scale).to_event(1))


def rows_of(run: pvae.Run, split: str = "validation") -> list[dict[str, Any]]:
    return [row for row in run.files.metrics_rows() if row["split"] == split]


def state_of(run: pvae.Run) -> dict[str, Any]:
    saved = checkpoint.latest(run.path / "checkpoints")
    assert saved is not None
    return dict(saved.state)


FIGURES: dict[str, tuple[Objective, str]] = {
    "ELBO": (TraceELBO(), "elbo"),
    "warmed up": (TraceELBO.model_validate({"beta": {"kind": "linear", "start": 0.1, "epochs": 5}}), "elbo"),
    "autoencoder": (TraceELBO.model_validate({"beta": 0.0}), "reconstruction"),
    "beta-VAE": (TraceELBO.model_validate({"beta": 4.0}), "beta_elbo"),
    "free bits": (TraceELBO(free_bits=0.5), "beta_elbo"),
    "IWAE": (IWAE(), "iwae"),
    "Renyi": (PyroELBO(elbo="RenyiELBO", particles=2), "RenyiELBO"),
    "EM": (EM(), FITTED),
}


@pytest.mark.parametrize("case", FIGURES)
def test_every_objective_names_its_figure(case: str) -> None:
    objective, name = FIGURES[case]
    assert objective.figure(10) == name
    assert name in named(name) or name in ("elbo", FITTED)


def test_the_bound_of_iwae_is_log_p_under_the_exact_posterior() -> None:
    """Between ELBO and log p(x) = log N(x; 0, 2) under another guide."""
    exact = float(dist.Normal(0.0, math.sqrt(2)).log_prob(X).mean())
    assert held_out(IWAE(), pvae.Pair(Model(), Guide(1.0)).adopt(X), X, 0, None, 1.0) == pytest.approx(exact, abs=1e-5)
    wide, many = pvae.Pair(Model(), Guide(1.5)).adopt(X), X.repeat(200, 1)
    values = [held_out(IWAE(particles=k), wide, many, 0, None, 1.0) for k in (2, 50)]
    assert values[0] < values[1] < exact
    assert values[1] == pytest.approx(exact, abs=5e-3)


@pytest.mark.parametrize(
    ("objective", "name"), [({"kind": "iwae"}, "iwae"), ({"beta": 0.0}, "reconstruction"), ({"beta": 4.0}, "beta_elbo")]
)
def test_the_best_weights_are_those_of_the_figure(objective: dict[str, Any], name: str, tmp_path: Path) -> None:
    """The recorded figure, status, manifest and listing; the ELBO stays where it is read."""
    run = fit(experiment(objective), tmp_path)
    rows, status = rows_of(run), run.status
    best = max(rows, key=lambda row: row[name])
    assert run.files.manifest["figure"] == name
    assert status[name] == best[name]
    assert status["elbo"] == best["elbo"]
    assert state_of(run)["best_epoch"] == best["epoch"]
    if name == "beta_elbo":
        assert best[name] == pytest.approx(best["reconstruction"] - 4 * best["kl"])
    if name == "iwae":
        assert all(row["iwae"] > row["elbo"] for row in rows)
    made = curves.training(run.files.metrics_rows(), ["z"], name)
    assert name in [line.get_label() for line in made.axes[0].lines]
    assert f"ELBO and {name}" in made.axes[0].get_title(loc="left")


def test_patience_and_best_follow_the_figure_and_not_the_elbo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ELBO of this fit rises for ever; its figure falls from the second epoch on."""
    values = iter([-3.0, -2.0, -4.0, -5.0, -6.0, -7.0, -8.0])
    monkeypatch.setattr(loop, "held_out", lambda *_: next(values))
    run = fit(experiment({"kind": "iwae"}, epochs=7, patience=3), tmp_path)
    elbo = [row["elbo"] for row in rows_of(run)]
    assert elbo == sorted(elbo)
    assert len(elbo) == 5
    assert (state_of(run)["best_epoch"], run.status["iwae"], run.status["elbo"]) == (2, -2.0, elbo[1])
    (said,) = [event["message"] for event in run.files.events() if event["kind"] == "stop"]
    assert said.startswith("validation iwae not better")


def test_a_loss_of_pyro_ranks_by_itself(tmp_path: Path) -> None:
    pair = pvae.Pair(Model(), Guide(1.5))
    loss = pyro.infer.RenyiELBO(alpha=0.5, num_particles=4)
    run = fit(pair, tmp_path, "train.epochs=2", "train.optimizer.lr=1e-3", data=X, loss=loss)
    rows = rows_of(run)
    assert run.status["RenyiELBO"] == max(row["RenyiELBO"] for row in rows)
    assert all(row["elbo"] < row["RenyiELBO"] < 0 for row in rows)


def test_em_keeps_the_weights_that_have_converged(tmp_path: Path) -> None:
    """Digits overfit from the tenth epoch on, long before the training data gain nothing any more."""
    run = fit("em_mixture", tmp_path, "train.epochs=60", "train.patience=4")
    losses = [row["loss"] for row in rows_of(run, "train")]
    best = state_of(run)["best_epoch"]
    assert max(losses[:best]) == losses[0]
    assert losses[best - 1] <= min(losses) + loop.CONVERGED
    held = [row["elbo"] for row in rows_of(run)]
    assert held.index(max(held)) + 1 < best
    assert run.status["epoch"] == best + 4
    assert run.status[FITTED] == -losses[best - 1]


def test_a_run_of_an_earlier_version_goes_on_by_its_elbo(tmp_path: Path) -> None:
    run = fit(experiment({"kind": "iwae"}), tmp_path)
    manifest = json.loads((run.path / "manifest.json").read_text())
    for entry in ("figure", "spec", "sha256"):
        del manifest[entry]
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    done = resume(run.path, "train.epochs=4", allow_changes=True)
    last = rows_of(done)[-1]
    assert "iwae" not in last
    assert done.status["elbo"] == max(row["elbo"] for row in rows_of(done))
    assert done.files.manifest.get("figure") is None


def test_another_objective_ranks_anew(tmp_path: Path) -> None:
    run = fit(experiment({"beta": 4.0}), tmp_path)
    done = resume(run.path, "objective.beta=1.0", "train.epochs=4", allow_changes=True)
    assert done.files.manifest["figure"] == "elbo"
    assert state_of(done)["best_epoch"] == 4
    assert done.status["elbo"] == rows_of(done)[-1]["elbo"]
    assert "beta_elbo" not in rows_of(done)[-1]


# ---------------------------------------------------------------------- metrics of training


def two_levels() -> pvae.Pair:
    return Experiment.load("hvae", ["encoder.network.hidden=[16]", "decoder.network.hidden=[16]"]).build((1, 8, 8))


@pytest.mark.parametrize("objective", [TraceELBO(), TraceELBO(particles=3), IWAE()], ids=["one", "three", "iwae"])
@pytest.mark.parametrize("case", ["one latent", "two levels", "by hand"])
def test_kl_metrics_are_in_closed_form(case: str, objective: Objective) -> None:
    """Those of the traces that the loss is made of, while the loss stays that of samples, bit for bit."""
    torch.manual_seed(0)
    x = X if case == "by hand" else (torch.rand(20, 1, 8, 8) > 0.5).float()
    pair = {
        "one latent": lambda: experiment({}).build((1, 8, 8)),
        "two levels": two_levels,
        "by hand": lambda: pvae.Pair(Model(), Guide(1.0)),
    }[case]()
    loss = Loss(objective, pair.adopt(x))
    torch.manual_seed(1)
    value, metrics = loss(x)
    torch.manual_seed(1)
    terms = objective.terms(pair, x)
    assert torch.equal(value, objective.loss(terms, torch.ones(())))
    torch.manual_seed(1)
    exact = pair.terms(x, getattr(objective, "particles", 1), closed_form=True)
    found = dict(zip(loss.names, metrics, strict=True))
    for name, kl in exact.kl.items():
        assert float(found[f"kl/{name}"]) == pytest.approx(float(kl.mean().detach()), rel=1e-5)
        assert not torch.equal(found[f"kl/{name}"], terms.kl[name].mean())
    assert torch.equal(found["reconstruction"], terms.reconstruction.mean())


def test_a_collapsed_latent_has_no_negative_kl() -> None:
    """Guide and prior are equal: single draws give KLs of either sign with noise in the parameters, the metric none."""

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.full((1,), 1e-3), 1.001).to_event(1))

    pair = pvae.Pair(Model(), guide).adopt(X)
    loss = Loss(TraceELBO(), pair)
    drawn = []
    for seed in range(20):
        torch.manual_seed(seed)
        drawn.append(float(pair.terms(X).kl["z"].mean().detach()))
        torch.manual_seed(seed)
        assert 0 <= float(loss(X)[1][loss.names.index("kl/z")]) < 1e-5
        assert 0 <= evaluate(pair, X, seed)["kl/z"] < 1e-5
    assert min(drawn) < 0


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_total_of_a_point_is_a_log_joint_everywhere(beta: float, tmp_path: Path) -> None:
    """Earlier versions named it `elbo` in the metrics, where it is still read."""
    table = {**TINY_TABLE, "objective": {"beta": beta}, "latents": {"z": {"dim": 2, "posterior": "delta"}}}
    run = fit(Experiment.from_dict(table), tmp_path)
    metrics, name = run.files.path / "metrics.jsonl", "log_joint" if beta else "reconstruction"
    assert run.files.manifest["figure"] == name
    assert all(isinstance(row["log_joint"], float) and "elbo" not in row for row in run.files.metrics_rows())
    assert run.status["log_joint"] == run.files.metrics_rows()[-1]["log_joint"]
    assert "log joint" in run._repr_html_()
    metrics.write_text(metrics.read_text().replace("log_joint", "elbo"))
    assert len(curves.series(run.files.metrics_rows(), "validation", "log_joint")[0]) == 3


def test_a_metric_never_stops_a_fit() -> None:
    """An infinite KL, of supports that differ, leaves the estimate: here that of a draw inside both."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None], 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(0.5 * torch.ones(len(x)), 1.0000001))

    pair = pvae.Pair(model, guide).adopt(X)
    torch.manual_seed(0)
    _, metrics = Loss(TraceELBO(), pair)(X)
    assert bool(metrics.isfinite().all())
    assert float(metrics[-1]) == pytest.approx(math.log(2), abs=1e-3)


BOTTOM_UP = ["latents.z1.posterior.given=['x']", "latents.z2.posterior.given=['z1']"]
"""z1 from x, z2 from z1, while p(z1 | z2): E_q[log q - log p] of z1 is no mean of closed forms."""


@pytest.mark.parametrize(
    ("zoo", "overrides"), [("hvae", []), ("hvae", BOTTOM_UP), ("ladder", []), ("bidirectional", [])]
)
def test_levels_are_known_apart_as_found_by_perturbing_them(zoo: str, overrides: list[str]) -> None:
    pair = Experiment.load(zoo, overrides).build((1, 8, 8))
    x = torch.rand(20, 1, 8, 8).round()
    names = frozenset(pair.adopt(x).layout.latents)
    assert known_apart(pair) == names - pair.dependencies(x).bottom_up
    assert ("z1" in known_apart(pair)) is not bool(overrides)
