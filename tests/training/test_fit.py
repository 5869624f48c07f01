"""A fit: learning, keeping, stop rules, averages, hand-written pairs, every kind, analyses while it goes on."""

import math
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae.analysis import evidence, surgery
from pvae.errors import DataError, DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.experiment.plan import Train
from pvae.objectives.elbo import TraceELBO
from pvae.training.evaluation import evaluate
from tests.cli_runner import TINY
from tests.runs_shared import TINY_TABLE, assert_same, fit, resume, tiny
from tests.training.kinds import KINDS, SMALL
from tests.training.pairs import Fragile, fit_pair


def test_fit_learns_and_keeps_everything(tmp_path: Path) -> None:
    run = fit(tiny(epochs=10), tmp_path)
    validation = run.metrics.query("split == 'validation'")
    assert list(validation["epoch"]) == list(range(1, 11))
    assert validation["elbo"].iloc[-1] > validation["elbo"].iloc[0] + 3
    assert (validation["elbo"] - (validation["reconstruction"] - validation["kl"])).abs().max() < 1e-9
    assert run.status["state"] == "finished"
    again = pvae.Run.load(run.path)
    assert again.experiment == run.experiment
    assert_same(dict(run.pair.state_dict()), dict(again.pair.state_dict()))
    assert {"versions", "argv", "data", "engine", "seed"} <= again.files.manifest.keys()


LINEAR = {"network": {"kind": "mlp", "hidden": []}}


def linear_vae(dim: int, **train: object) -> Experiment:
    """A linear VAE with one learned noise variance, whose best ELBO is the likelihood of probabilistic PCA."""
    return Experiment.from_dict(
        {
            "data": {"source": "digits" if dim == 10 else "tensor"},
            "latents": {"z": {"dim": dim}},
            "encoder": LINEAR,
            "decoder": {**LINEAR, "likelihood": {"kind": "normal", "scale": "shared"}},
            "objective": "trace_mean_field_elbo",
            "train": {
                "schedule": {"kind": "cosine"},
                "validate_every": 1000,
                "keep": "last",
                "engine": "eager",
                **train,
            },
        }
    )


def require_optimum(run: pvae.Run, optimum: float) -> None:
    """The ELBO of the training data is within 0.05 nats of its maximum."""
    result = surgery(run.pair, run.data.train.x, samples=20)
    assert result.elbo.value == pytest.approx(optimum, abs=0.05)
    assert result.elbo.value < optimum + 3 * result.elbo.standard_error


def test_linear_vae_from_random_weights_reaches_the_ppca_optimum(tmp_path: Path) -> None:
    x = torch.randn(200, 2) @ torch.randn(2, 6) + 0.5 * torch.randn(200, 6)
    signal, noise = torch.linalg.eigvalsh(x.double().T.cov(correction=0)).split([4, 2])[::-1]
    log_det = float(signal.log().sum() + 4 * noise.mean().log())
    train = {"epochs": 600, "batch_size": 200, "optimizer": {"kind": "adam", "lr": 0.1}}
    run = fit(linear_vae(2, **train), tmp_path, data=pvae.Dataset.from_tensors(x, validation=x[:20], test=x[:20]))
    require_optimum(run, -0.5 * (6 * math.log(2 * math.pi) + log_det + 6))


@pytest.mark.slow
def test_linear_vae_of_digits_reaches_the_ppca_optimum(tmp_path: Path) -> None:
    """The log-likelihood of PCA of the first 1000 digits / 16 with ten components, 18.688612, in closed form."""
    run = fit(linear_vae(10, epochs=3000, batch_size=250, optimizer={"kind": "adam", "lr": 0.01}), tmp_path)
    require_optimum(run, 18.688612)


def test_validation_moves_nothing(tmp_path: Path) -> None:
    assert_same(*(fit(tiny(validate_every=every, keep="last"), tmp_path) for every in (1, 4)))


def test_tensors_get_the_declared_transforms_and_are_found_again(tmp_path: Path) -> None:
    x = torch.rand(60, 8)
    run = fit(tiny(epochs=1), tmp_path, data=x)
    assert run.data.binarize == "dynamic"
    again = pvae.Run.load(run.path, data=x)
    assert again.data.fingerprint == run.data.fingerprint
    assert_same(dict(again.pair.state_dict()), dict(run.pair.state_dict()))


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda where: fit(tiny(), where, seed=-1), "seed: expected"),
        (lambda where: fit(tiny(), where, name=""), "name: expected"),
        (lambda where: fit_pair(Fragile().double(), where), r"Use pair\.float\(\)"),
        (lambda where: fit_pair(Fragile(), where, "train.alternate=2"), "alternate: expected a pair of two Modules"),
        (
            lambda where: fit(pvae.Pair(Fragile().model, lambda x: x), where, data=torch.randn(20, 2)),
            "expected a latent of this name in the guide",
        ),
    ],
    ids=["seed", "name", "doubles", "alternation of functions", "guide without z"],
)
def test_what_cannot_be_fitted_leaves_no_run(tmp_path: Path, attempt: Callable[[Path], object], message: str) -> None:
    with pytest.raises(DeclarationError, match=message):
        attempt(tmp_path)
    assert not list(tmp_path.iterdir())


def test_global_latents_are_fitted(tmp_path: Path) -> None:
    """x_i ~ N(b, 1) with a global b: the fitted guide is the exact posterior N(sum x / (n + 1), 1 / (n + 1))."""
    x = torch.randn(400, 1) + 2
    loc, log_scale = nn.Parameter(torch.zeros(())), nn.Parameter(torch.tensor(-1.0))

    def model(x: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(b.expand(len(x), 1), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("b", dist.Normal(pyro.param("loc", loc), pyro.param("log_scale", log_scale).exp()))

    data = pvae.Dataset.from_tensors(x, validation=x[:50], test=x)
    train = Train.model_validate(
        {"epochs": 3000, "batch_size": 400, "optimizer": {"kind": "adam", "lr": 0.05}, "schedule": {"kind": "cosine"},
         "validate_every": 500, "keep": "last", "engine": "eager"}
    )  # fmt: skip
    run = fit(pvae.Pair(model, guide), tmp_path, data=data, train=train)
    found = {name.rpartition(".")[2]: p.item() for name, p in run.pair.named_parameters()}
    assert found["loc"] == pytest.approx(float(x.sum() / 401), abs=0.03)
    assert found["log_scale"] == pytest.approx(-0.5 * math.log(401), abs=0.15)
    q, p = dist.Normal(found["loc"], math.exp(found["log_scale"])), dist.Normal(0.0, 1.0)
    exact = float(torch.distributions.kl_divergence(q, p)) / 400  # shared by the training rows, not the 50 held out
    assert run.metrics.query("split == 'validation'")["kl/b"].iloc[-1] == pytest.approx(exact, abs=4 / 400)


def test_early_stopping_keeps_the_best_and_lasts(tmp_path: Path) -> None:
    """A run that was killed before it noted that it had stopped stays stopped."""
    run = fit(tiny(epochs=60, patience=2, optimizer={"kind": "adam", "lr": 0.05}), tmp_path)
    validation = run.metrics.query("split == 'validation'")
    assert run.status["epoch"] < 60  # type: ignore[operator]
    best = validation["elbo"].idxmax()
    assert len(validation.loc[best:]) == 3
    kept = evaluate(run.pair, run.data.validation.x, run.plan.seed)["elbo"]
    assert kept == pytest.approx(validation["elbo"].max(), abs=1e-4)
    epoch = run.status["epoch"]
    run.files.update_status(state="running", birth="0")  # of a process that is no more
    assert resume(run.path).status["epoch"] == epoch


def test_average_is_what_validation_sees(tmp_path: Path) -> None:
    run = fit(tiny(average=0.99, keep="last"), tmp_path)
    saved = run.checkpoint
    assert saved.state["select"] == "average"
    name = next(iter(saved.tensors["average"]))
    assert not torch.equal(saved.tensors["average"][name], saved.tensors["weights"][name])
    assert torch.equal(dict(run.pair.state_dict())[name], saved.tensors["average"][name])


def test_the_average_begins_where_weights_do(tmp_path: Path) -> None:
    """Pseudo-inputs begin at training rows, after the trainer is made."""
    latents = {"z": {"dim": 2, "prior": {"kind": "vamp", "components": 5}}}
    decoder = {"network": {"kind": "mlp", "hidden": [4]}, "likelihood": {"kind": "normal"}}
    table = {**TINY_TABLE, "data": {"source": "toy", "rows": 50}, "latents": latents, "decoder": decoder}
    train = {"epochs": 1, "batch_size": 10, "average": 0.999, "keep": "last", "engine": "eager"}
    run = fit(Experiment.from_dict({**table, "train": train}), tmp_path)
    name = "model.priors.z.pseudo_inputs"
    weights, average = (run.checkpoint.tensors[group][name] for group in ("weights", "average"))
    torch.testing.assert_close(average, weights, rtol=0, atol=0.05)
    near = torch.cdist(weights, run.data.train.x).min(1).values
    assert near.max() < 0.1


@pytest.mark.parametrize("case", KINDS, ids=list(KINDS))
def test_every_kind_is_fitted_and_read(tmp_path: Path, case: str) -> None:
    name, overrides = KINDS[case]
    run = fit(Experiment.load(name, [*SMALL, *overrides]), tmp_path)
    elbo = run.metrics.query("split == 'train'")["elbo"]
    assert elbo.iloc[1] > elbo.iloc[0]
    x = run.data.test.x[:50]
    result = surgery(run.pair, x)
    assert evidence(run.pair, x, samples=20).iwae.value > result.elbo.value - 3 * result.elbo.standard_error


def test_hand_written_pair_is_fitted_and_loaded_again(tmp_path: Path) -> None:
    part = Fragile()
    data = pvae.Dataset.from_tensors(torch.randn(200, 2) + 3)
    changes = "train.epochs=30", "train.optimizer.lr=0.1"
    run = fit_pair(part, tmp_path, *changes, data=data, objective=TraceELBO())
    assert (part.loc > 1).all()
    again = pvae.Run.load(run.path, data=data, pair=Fragile().pair())
    assert_same(dict(again.pair.named_parameters()), dict(run.pair.named_parameters()))


def test_information_is_noted_every_few_epochs(tmp_path):
    options = ["train.epochs=5", "analysis.every=2", "analysis.rows=50", *TINY]
    watched = fit("vae", tmp_path / "a", *options)
    rows = [row for row in watched.files.metrics_rows() if row["split"] == "analysis"]
    assert [row["epoch"] for row in rows] == [2, 4]
    for row in rows:
        assert row["kl"] == pytest.approx(row["mutual_information"] + row["marginal_kl"], abs=1e-9)
        assert row["mutual_information"] <= row["log_n"] == pytest.approx(math.log(50))
        assert row["active/z"] <= 10
    plain = fit("vae", tmp_path / "b", *options, "analysis.every=0")
    assert_same(plain.pair.state_dict(), watched.pair.state_dict())


def test_a_pair_that_cannot_be_analysed_is_fitted_all_the_same(tmp_path, monkeypatch):
    refuse = Mock(side_effect=DataError("surgery: expected something else"))
    monkeypatch.setattr("pvae.analysis.decompose.surgery.surgery", refuse)
    run = fit("vae", tmp_path, "train.epochs=3", "analysis.every=1", *TINY)
    assert run.status["state"] == "finished"
    (told,) = [event["message"] for event in run.files.events() if event["kind"] == "analysis"]
    assert "expected something else" in told
