"""Refit: a frozen pair with other priors, and what they won, beside the interval for new data."""

# A figure that may be None fails its test if it is.
# mypy: disable-error-code="union-attr"

import json
import os
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

import pvae
from pvae.analysis import gain, sample, surgery
from pvae.errors import BusyError, CheckpointError, DataError, DeclarationError, Interrupted
from pvae.experiment.experiment import Experiment
from pvae.runs.run import Run
from pvae.training import loop, resume as resumption
from pvae.training.evaluation import evaluate
from pvae.training.trainer import Trainer
from tests.cli_runner import run_cli
from tests.runs_shared import assert_same, fit, resume, signalled_at

NETWORK = {"network": {"kind": "mlp", "hidden": [32]}}
TABLE: dict[str, Any] = {
    "name": "small",
    "data": {"source": "digits", "binarize": "threshold"},
    "latents": {"z": {"dim": 4}},
    "encoder": NETWORK,
    "decoder": {**NETWORK, "likelihood": {"kind": "bernoulli"}},
    "train": {"epochs": 30, "optimizer": {"kind": "adam", "lr": 3e-3}},
}


STAGES = {
    "refit": {"priors": {"z": {"kind": "mixture", "components": 5}}, "train": {"epochs": 2}},
    "train": {"epochs": 2},
}


def declared(**changes: Any) -> Experiment:
    return Experiment.from_dict({**TABLE, **changes})


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(declared(), tmp_path_factory.mktemp("refit"))


def again(parent: Run, *overrides: str) -> Run:
    return pvae.refit(parent, *overrides, device="cpu", progress=False)


def part(run: Run, prefix: str) -> dict[str, Tensor]:
    """The weights whose names start with a prefix."""
    return {name: value for name, value in run.pair.state_dict().items() if name.startswith(prefix)}


def test_only_the_prior_moves_and_the_parent_is_recorded(parent):
    child = again(parent, "latents.z.prior.kind=realnvp", "train.epochs=3")
    loaded, fresh = Run.load(child.path), child.experiment.build(child.data.shape).state_dict()
    old, new, prior = part(parent, ""), part(loaded, ""), part(loaded, "model.priors.z.")
    shared = new.keys() - prior.keys()
    assert shared
    assert_same({name: old[name] for name in shared}, {name: new[name] for name in shared})
    assert not any(torch.equal(fresh[name], value) for name, value in prior.items())
    manifest = child.files.manifest
    assert manifest["parent"] == {"run": f"small/{parent.path.name}", "epoch": 30}
    assert manifest["trainable"] == ["model.priors.z."]
    assert child.name == "small_refit"
    assert child.path.parent.parent == parent.path.parent.parent
    assert parent.files.manifest["parent"] is None


def test_the_gain_is_the_marginal_kl_that_goes(parent):
    # With encoder and decoder frozen ELBO(after) - ELBO(before) = KL(q_agg || p) - KL(q_agg || p'), on the same draws.
    child = again(parent, "latents.z.prior.kind=mixture", "latents.z.prior.components=20", "train.epochs=60")
    x = parent.data.train.x
    found = gain(parent.pair, child.pair, x, samples=4)
    before, after = surgery(parent.pair, x, samples=4), surgery(child.pair, x, samples=4)
    assert found.gained.value == pytest.approx(after.elbo.value - before.elbo.value, abs=1e-6)
    assert found.gained.value == pytest.approx(before.marginal_kl.value - after.marginal_kl.value, abs=1e-6)
    assert 0.3 * before.marginal_kl.value < found.gained.value < before.marginal_kl.value
    assert found.gained.standard_error < before.elbo.standard_error  # paired
    assert json.loads(json.dumps(found.to_dict()))["gained"]["value"] == found.gained.value


def test_q_agg_itself_wins_all_on_train_and_less_on_test(parent):
    child = again(parent, "latents.z.prior.kind=aggregated")
    status = child.status
    assert (status["state"], status["epoch"]) == ("finished", 0)
    loaded = Run.load(child.path)
    train, test = (gain(parent.pair, loaded.pair, split.x, samples=2) for split in (child.data.train, child.data.test))
    assert train.after.marginal_kl.value == pytest.approx(0, abs=1e-6)
    assert train.gained.value == pytest.approx(train.before.marginal_kl.value, abs=1e-6)
    assert test.after.marginal_kl.value > 5 * abs(train.after.marginal_kl.value) + 0.01  # it overfits
    assert test.gained.value < test.before.marginal_kl.value - 0.01
    assert resume(child, "train.epochs=5", allow_changes=True).path == child.path  # it has no parameters to train


def test_an_autoencoder_gets_a_density_to_sample_from(tmp_path):
    likelihood = {"kind": "normal", "scale": "fixed", "value": 0.2}
    second = {
        "priors": {"z": {"kind": "mixture", "components": 20}},
        "train": {"epochs": 60, "optimizer": {"kind": "adam", "lr": 0.03}},
    }
    experiment = declared(
        name="auto", data={"source": "digits"}, latents={"z": {"dim": 4, "posterior": "delta"}}, refit=second,
        decoder={**NETWORK, "likelihood": likelihood}, objective={"kind": "trace_elbo", "beta": 0.0},
        train={**TABLE["train"], "keep": "last"},
    )  # fmt: skip
    auto = fit(experiment, tmp_path)
    assert auto.name == "auto_refit"
    first = Run.load(f"auto/{auto.files.manifest['parent']['run'].split('/')[1]}", root=tmp_path)
    assert first.experiment.refit is not None
    assert auto.experiment.refit is None
    with pytest.raises(
        DeclarationError, match=r"auto.*: expected a prior that was fitted .* pvae refit auto latents.z"
    ):
        sample(first)
    assert sample(auto, 5).x.shape == (5, *auto.data.shape)
    x = auto.data.train.x
    assert gain(first.pair, auto.pair, x).gained.value > 1  # codes are no N(0, I)
    with torch.no_grad():
        codes = auto.pair.guide_trace(x).nodes["z"]["value"]
        drawn = auto.pair.simulate(torch.zeros(4000, *auto.data.shape)).nodes["z"]["value"]
    assert (codes.mean(0) - drawn.mean(0)).abs().max() < 0.35 * codes.std()
    assert float((codes.std(0) / drawn.std(0)).log().abs().max()) < 0.35


def test_a_second_stage_that_was_interrupted_goes_on(tmp_path):
    experiment = declared(refit={"priors": {"z": "realnvp"}, "train": {"epochs": 4}}, train={"epochs": 2})
    whole, cut = fit(experiment, tmp_path / "whole"), tmp_path / "cut"
    with signalled_at(18, name="small_refit"), pytest.raises(Interrupted):
        fit(experiment, cut)
    done = resume("small", root=cut)  # the first stage is finished: the second goes on
    assert (done.name, done.status["epoch"]) == ("small_refit", 4)
    assert_same(whole.pair.state_dict(), done.pair.state_dict())
    assert len(list((cut / "small_refit").iterdir())) == 1
    assert resume("small", root=cut).path == done.path


BAD = {
    "nothing": ([], r"expected another prior, e\.g\. latents\.z\.prior\.kind=realnvp"),
    "the same": (["latents.z.prior.kind=standard_normal"], "expected another prior"),
    "the latent": (["latents.z.dim=3", "latents.z.prior.kind=maf"], r"the run's own latents\.z\.dim = 4; got 3"),
    "the data": (["data.binarize=dynamic", "latents.z.prior.kind=maf"], r"data\.binarize = 'threshold'; got 'dynamic'"),
    "the objective": (["latents.z.prior.kind=maf", "objective.particles=7"], "refit: expected no other objective"),
    "unknown": (["latents.z.prior.kind=real_nvp"], "realnvp"),
}
BAD_STAGES: list[tuple[dict[str, Any], str]] = [
    ({"priors": {"y": "maf"}}, r"refit\.priors\.y: expected one of z"),
    ({"priors": {"z": "conditional_normal"}}, r"refit: expected a valid second stage; .*latents\.z\.given"),
    ({"priors": {"z": "standard_normal"}}, "refit: expected a valid second stage; .*another prior"),
    ({"priors": {"z": "maf"}, "train": {"alternate": 3}}, r"refit\.train\.alternate: expected 0"),
]


@pytest.mark.parametrize("case", BAD)
def test_what_a_refit_may_not_change(parent, case):
    overrides, message = BAD[case]
    before = sorted(parent.path.parent.parent.rglob("manifest.json"))
    with pytest.raises(DeclarationError, match=message):
        again(parent, *overrides)
    assert sorted(parent.path.parent.parent.rglob("manifest.json")) == before


@pytest.mark.parametrize(("stage", "message"), BAD_STAGES)
def test_a_declared_second_stage_is_checked_with_the_file(stage, message):
    with pytest.raises(DeclarationError, match=message):
        declared(refit=stage)


def test_a_declared_second_stage_survives_its_file():
    experiment = declared(refit={"priors": {"z": "maf"}})
    assert Experiment.from_toml(experiment.to_toml()) == experiment


def test_guides_that_differ_are_not_compared(parent, tmp_path):
    other = fit(declared(seed=1, train={"epochs": 1}), tmp_path)
    with pytest.raises(DataError, match="one encoder under two priors"):
        gain(parent.pair, other.pair, parent.data.test.x)


def test_command_line(parent, tmp_path):
    overrides = "latents.z.prior.kind=maf", "train.epochs=2"
    out, _ = run_cli("refit", str(parent.path), *overrides, "--run-dir", str(tmp_path))
    assert "prior fitted anew; parent small/" in out
    assert out.count("this is no gain on new data") == 1  # on train
    assert out.count("new data before the refit was") + out.count("there is no interval for new data") == 1
    child = Run.load("small_refit", root=tmp_path)
    gains = child.path / "analysis" / "refit.json"
    assert set(json.loads(gains.read_text())["splits"]) == {"train", "test"}
    shutil.copytree(parent.path, tmp_path / "small" / parent.path.name)
    gains.unlink()  # as after a kill between the fit and its comparison
    assert "new data" in run_cli("resume", str(child.path))[0]
    assert gains.exists()
    assert "nothing to resume" in run_cli("resume", str(child.path))[0]


# ---------------------------------------------------------------------- second stages that are not what they seem


def test_a_second_stage_that_left_no_weights_is_fitted_anew(tmp_path, monkeypatch):
    train = loop.train

    def killed(trainer: Trainer) -> None:
        if trainer.plan.name == "small_refit":
            raise KeyboardInterrupt
        train(trainer)

    monkeypatch.setattr(loop, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(declared(**STAGES), tmp_path)
    monkeypatch.undo()
    orphan = next((tmp_path / "small_refit").iterdir())
    with pytest.raises(CheckpointError, match="holds the frozen weights too; got none. Refit small/"):
        resume(orphan)
    done = resume("small", root=tmp_path)
    assert done.path != orphan
    assert_same(part(Run.load("small", root=tmp_path), "guide."), part(done, "guide."))


def test_stages_find_each_other_wherever_they_were_moved(tmp_path, monkeypatch):
    """FAULTS 51: by id, from any folder; where one is not there the finished work does not fail."""
    second = fit(declared(**STAGES), tmp_path / "runs")
    first = Run.load("small", root=tmp_path / "runs")
    moved = tmp_path / "other"
    moved.mkdir()
    monkeypatch.chdir(moved)
    for run, name in ((first, "my best"), (second, "its prior")):
        run.path.rename(moved / name)
    longer = ["resume", "its prior", "--allow-changes", "--device", "cpu", "--quiet"]
    for given in (["resume", "my best", *longer[3:]], [*longer, "train.epochs=3"]):
        assert "prior fitted anew" in run_cli(*given)[0]
    assert resume(moved / "my best").path == moved / "its prior"
    assert len(list(tmp_path.rglob("manifest.json"))) == 2 + len(list(tmp_path.rglob("checkpoints/*/manifest.json")))
    (tmp_path / "far" / "away").mkdir(parents=True)
    (moved / "my best").rename(tmp_path / "far" / "away" / "first")
    out, err = run_cli(*longer, "train.epochs=4")
    assert "no comparison with the first stage" in err
    assert f"expected its first stage small/{first.path.name} beside it; got none" in err
    assert "epoch 4 of 4" in out


def test_one_process_makes_the_second_stage(tmp_path, monkeypatch):
    """FAULTS 52: the others are told who does, before there is a run of it, and find it afterwards."""
    make, others = resumption.fit_stage, []

    def meanwhile(run: Run, *arguments: Any, **named: Any) -> Run:
        with pytest.raises(BusyError, match=f"held by process {os.getpid()} "):
            resume("small", root=tmp_path)
        others.append(run)
        return make(run, *arguments, **named)

    monkeypatch.setattr(resumption, "fit_stage", meanwhile)
    second = fit(declared(**STAGES), tmp_path)
    assert resume("small", root=tmp_path).path == second.path
    assert len(others) == len(list((tmp_path / "small_refit").iterdir())) == 1


def test_a_first_stage_trained_longer_gets_a_new_second_stage(tmp_path):
    old = fit(declared(**STAGES), tmp_path)
    new = resume("small", "train.epochs=4", root=tmp_path, allow_changes=True)
    assert new.path != old.path
    assert new.files.manifest["parent"]["epoch"] == 4
    assert_same(part(Run.load("small", root=tmp_path), "guide."), part(new, "guide."))


def test_another_refit_of_the_same_name_is_not_the_second_stage(tmp_path):
    second = fit(declared(**STAGES), tmp_path)
    parent = Run.load("small", root=tmp_path)
    other = again(parent, "latents.z.prior.kind=maf", "train.epochs=1")
    assert other.path.parent == second.path.parent
    assert resume(parent).path == second.path


def test_posteriors_made_of_the_prior_are_not_frozen(tmp_path):
    given = {"dim": 2, "given": ["z2"], "prior": "conditional_normal", "posterior": "ladder"}
    latents, encoder = {"z2": {"dim": 2, "posterior": "ladder"}, "z1": given}, {"kind": "bottom_up", **NETWORK}
    ladder = fit(declared(latents=latents, encoder=encoder, train={"epochs": 1}), tmp_path)
    with pytest.raises(DeclarationError, match=r"z1 \(ladder\), made of the prior itself"):
        again(ladder, "latents.z1.prior.log_variance=[-4.0, 1.0]")
    assert again(ladder, "latents.z2.prior.kind=maf", "train.epochs=1").status["state"] == "finished"  # the top level


def test_how_a_refit_is_trained(parent):
    alternating = parent.experiment.with_overrides("train.alternate=9")
    object.__setattr__(parent.experiment, "train", alternating.train)
    child = again(parent, "latents.z.prior.kind=maf", "train.epochs=1")
    assert child.plan.train.alternate == 0


def test_what_stops_a_second_stage_is_told(tmp_path):
    with signalled_at(4, name="small_refit"), pytest.raises(Interrupted):
        fit(declared(**STAGES), tmp_path)
    child = Run.load("small_refit", root=tmp_path)
    child.files.write_manifest({**child.files.manifest, "threads": 99})
    with pytest.raises(DeclarationError, match="expected the run's own threads = 99"):
        resume("small", root=tmp_path)
    assert len(list((tmp_path / "small_refit").iterdir())) == 1  # none was fitted anew behind its back


def test_a_token_prior_that_overfits_is_caught_by_validation(tmp_path):
    few = ["data.splits.train=[0, 150]", "data.splits.validation=[1000, 1150]", "data.splits.test=[1350, 1400]"]
    first = fit("vq_vae", tmp_path, *few, "train.epochs=3", "train.engine=eager")
    second = again(
        first, 'latents.c.prior={kind="transformer", width=64, layers=2, heads=2}', "train.epochs=200",
        "train.optimizer.lr=3e-3", "train.batch_size=50", "train.patience=5", "train.engine=eager",
    )  # fmt: skip
    rows = second.files.metrics_rows()
    train, held = (
        [row["elbo"] for row in rows if row["split"] == split and "elbo" in row] for split in ("train", "validation")
    )
    assert len(train) < 200  # stopped
    assert train[-1] > train[0] + 10  # it went on learning the training codes
    assert held[-1] < max(held) - 1  # and unlearned all others
    kept = evaluate(second.pair, second.data.validation.x, second.plan.seed)
    assert kept["elbo"] == pytest.approx(max(held), abs=1e-3)
