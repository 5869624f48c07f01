"""The SVI loop: exact resume, equal engines, stop rules, faults 8, 10, 11, 12, 13, 14, 18."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pvae
from pvae.analysis import evidence, surgery
from pvae.errors import CheckpointError, DataError, DeclarationError, DeviceError, NonFiniteError, StorageError
from pvae.experiment.experiment import Experiment
from pvae.experiment.plan import Train
from pvae.objectives.base import Loss
from pvae.objectives.elbo import TraceELBO
from pvae.runs import checkpoint
from pvae.runs.run import load_weights
from pvae.training.evaluation import evaluate
from pvae.training.launch import pick_device
from pvae.training.signals import Stop
from pvae.training.step import Step, choose_engine, compile_forward, require_equal, set_lr
from tests.runs_shared import TINY_TABLE, assert_same, everything, fit, interrupted, tiny

# ---------------------------------------------------------------------- fitting


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


def test_linear_vae_from_random_weights_reaches_the_ppca_optimum(tmp_path: Path) -> None:
    """TRUTHS: digits / 16, first 1000 rows, q = 10: log-likelihood 18.688612; SGD within 0.05 nats."""
    linear = {"network": {"kind": "mlp", "hidden": []}}
    experiment = Experiment.from_dict(
        {
            "latents": {"z": {"dim": 10}},
            "encoder": linear,
            "decoder": {**linear, "likelihood": {"kind": "normal", "scale": "shared"}},
            "objective": "trace_mean_field_elbo",
            "train": {
                "epochs": 3000,
                "batch_size": 250,
                "optimizer": {"kind": "adam", "lr": 0.01},
                "schedule": {"kind": "cosine"},
                "validate_every": 1000,
                "keep": "last",
                "engine": "eager",
            },
        }
    )
    run = fit(experiment, tmp_path)
    result = surgery(run.pair, run.data.train.x, samples=20)
    assert result.elbo.value == pytest.approx(18.688612, abs=0.05)
    assert result.elbo.value < 18.688612 + 3 * result.elbo.standard_error


def test_same_seed_same_weights_and_nothing_leaks(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a = fit(tiny(), tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
    b = fit(tiny(), tmp_path)
    c = fit(tiny(), tmp_path, seed=1)
    assert_same(a, b)
    assert any(not torch.equal(v, everything(c)[k]) for k, v in everything(a).items())


def test_validation_moves_nothing(tmp_path: Path) -> None:
    often = fit(tiny(validate_every=1, keep="last"), tmp_path)
    seldom = fit(tiny(validate_every=4, keep="last"), tmp_path)
    assert_same(often, seldom)


@pytest.mark.parametrize(
    "train",
    [
        {"optimizer": {"kind": "adamw"}, "schedule": {"kind": "cosine"}, "warmup": 1.0},
        {"optimizer": {"kind": "sgd", "momentum": 0.9, "lr": 1e-4}, "clip_norm": 5.0},
        {"average": 0.9, "alternate": 2},
    ],
    ids=["adamw+schedule", "sgd+clip", "average+alternate"],
)
def test_interrupted_fit_resumes_bit_for_bit(tmp_path: Path, train: dict[str, object]) -> None:
    """FAULTS 10: in the middle of an epoch and at its end."""
    whole = fit(tiny(**train), tmp_path)
    for stop_at in (15, 22):
        part = interrupted(tiny(**train), tmp_path, stop_at)
        done = pvae.resume(part, device="cpu", progress=False)
        assert_same(whole, done)
        columns = ["epoch", "split", "elbo", "reconstruction", "lr", "beta"]
        assert done.metrics[columns].equals(whole.metrics[columns])


def test_killed_process_resumes_bit_for_bit(tmp_path: Path) -> None:
    """FAULTS 1 and 10: train(20) = train(10) + kill -9 + resume(10)."""
    whole = fit(tiny(epochs=20), tmp_path / "whole")
    spec = tmp_path / "spec.toml"
    spec.write_text(tiny(epochs=20).to_toml())
    command = [sys.executable, "-m", "pvae", "fit", str(spec), "--run-dir", str(tmp_path / "killed"), "--quiet"]
    child = subprocess.Popen([*command, "--device", "cpu"], env={**os.environ, "PYTHONPATH": os.getcwd()})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        rows = [line for f in (tmp_path / "killed").glob("*/*/metrics.jsonl") for line in f.read_text().splitlines()]
        if len(rows) >= 20:
            break
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL, "the fit was over before it could be killed"
    done = pvae.resume(next((tmp_path / "killed").glob("*/*")), device="cpu", progress=False)
    assert_same(whole, done)


def test_signals_are_remembered_and_handlers_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 14: the first is remembered, a second exits at once, the handlers of before come back."""
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    for name in before:
        with Stop() as stop:
            os.kill(os.getpid(), name)
            assert stop.signal == name
            assert not exits
            os.kill(os.getpid(), name)
        assert exits == [128 + name]
        exits.clear()
    assert before == {name: signal.getsignal(name) for name in before}


def test_full_disk_during_a_fit_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 2: told and tried again; an error only when the last one cannot be written."""
    original, calls = checkpoint.write, []

    def full(*arguments: Any, **options: Any) -> Path:
        calls.append(arguments[1])
        if len(calls) in (3, 4):
            raise StorageError("No space left on device")
        return original(*arguments, **options)

    monkeypatch.setattr(checkpoint, "write", full)
    run = fit(tiny(epochs=1), tmp_path)
    assert run.status["state"] == "finished"
    assert sum("No space left" in event["message"] for event in run.files.events()) == 2

    def always(*_: Any, **__: Any) -> Path:
        raise StorageError("No space left on device")

    monkeypatch.setattr(checkpoint, "write", always)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(StorageError) as caught:
        fit(tiny(epochs=1), tmp_path)
    assert caught.value.exit_code == 74


def test_finished_run_is_left_alone(tmp_path: Path) -> None:
    """FAULTS 12."""
    run = fit(tiny(epochs=1), tmp_path)
    before = everything(run)
    assert pvae.resume(run.path, device="cpu", progress=False).status["epoch"] == 1
    assert_same(before, everything(run))


def test_changes_are_listed_and_refused_unless_allowed(tmp_path: Path) -> None:
    """FAULTS 11 and 13; more epochs on a constant schedule continue exactly."""
    whole = fit(tiny(epochs=4), tmp_path)
    half = fit(tiny(epochs=2), tmp_path)
    with pytest.raises(DeclarationError, match=r"train\.epochs = 2; got 4") as caught:
        pvae.resume(half, "train.epochs=4", "train.batch_size=50", device="cpu", progress=False)
    assert "train.batch_size = 96; got 50" in str(caught.value)
    done = pvae.resume(half, "train.epochs=4", allow_changes=True, device="cpu", progress=False)
    assert_same(whole, done)


def test_a_run_cannot_become_another_model(tmp_path: Path) -> None:
    """FAULTS 13: what a run is cannot change, not even when changes are allowed; its files stay as they are."""
    run = fit(tiny(epochs=2), tmp_path)
    before = run.files.spec_text
    for change in ("latents.z.dim=5", "data.binarize=threshold", "decoder.network.hidden=[8]", "seed=3"):
        with pytest.raises(DeclarationError, match="another model or other data"):
            pvae.resume(run.path, change, allow_changes=True, device="cpu", progress=False)
    assert run.files.spec_text == before
    last = pvae.resume(run.path, "train.keep=last", allow_changes=True, device="cpu", progress=False)
    assert last.checkpoint.state["select"] == "weights"


def test_metrics_are_exact_after_a_checkpoint_on_the_last_step_of_an_epoch(tmp_path: Path) -> None:
    whole = fit(tiny(epochs=5, batch_size=1000), tmp_path)
    part = interrupted(tiny(epochs=5, batch_size=1000), tmp_path, 2)
    done = pvae.resume(part, device="cpu", progress=False)
    columns = ["epoch", "split", "elbo", "reconstruction"]
    assert done.metrics[columns].equals(whole.metrics[columns])


def test_stopped_early_and_killed_before_it_was_noted_stays_stopped(tmp_path: Path) -> None:
    experiment = tiny(epochs=60, patience=2, optimizer={"kind": "adam", "lr": 0.05})
    run = fit(experiment, tmp_path)
    epoch = run.status["epoch"]
    run.files.update_status(state="running")
    assert pvae.resume(run.path, device="cpu", progress=False).status["epoch"] == epoch


def test_fit_checks_seed_and_name(tmp_path: Path) -> None:
    for wrong, message in (({"seed": -1}, "seed: expected"), ({"name": ""}, "name: expected")):
        with pytest.raises(DeclarationError, match=message):
            fit(tiny(), tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_tensors_get_the_declared_transforms_and_are_found_again(tmp_path: Path) -> None:
    x = torch.rand(60, 8)
    run = fit(tiny(epochs=1), tmp_path, data=x)
    assert run.data.binarize == "dynamic"
    again = pvae.Run.load(run.path, data=x)
    assert again.data.fingerprint == run.data.fingerprint
    assert_same(dict(again.pair.state_dict()), dict(run.pair.state_dict()))


def test_pair_that_cannot_be_fitted_leaves_no_run(tmp_path: Path) -> None:
    part = Fragile().double()
    with pytest.raises(DeclarationError, match=r"Use pair\.float\(\)"):
        fit_pair(part, tmp_path)
    with pytest.raises(DeclarationError, match="alternate: expected a pair of two Modules"):
        fit_pair(Fragile(), tmp_path, "train.alternate=2")
    assert not list(tmp_path.iterdir())


def fit_pair(part: Fragile, where: Path, *overrides: str) -> pvae.Run:
    """A silent fit of a hand-written pair."""
    pair = pvae.Pair(model=part.model, guide=part.guide)
    return pvae.fit(pair, *overrides, data=torch.randn(60, 2), run_dir=where, device="cpu", progress=False)


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
    run = pvae.fit(pvae.Pair(model, guide), data=data, train=train, run_dir=tmp_path, device="cpu", progress=False)
    found = {name.rpartition(".")[2]: p.item() for name, p in run.pair.named_parameters()}
    assert found["loc"] == pytest.approx(float(x.sum() / 401), abs=0.03)
    assert found["log_scale"] == pytest.approx(-0.5 * math.log(401), abs=0.15)
    q, p = dist.Normal(found["loc"], math.exp(found["log_scale"])), dist.Normal(0.0, 1.0)
    exact = float(torch.distributions.kl_divergence(q, p)) / 400  # shared by the training rows, not the 50 held out
    assert run.metrics.query("split == 'validation'")["kl/b"].iloc[-1] == pytest.approx(exact, abs=4 / 400)


def test_other_data_are_refused(tmp_path: Path) -> None:
    """FAULTS 13."""
    x = torch.rand(60, 5)
    spec = Experiment.from_dict(
        {"latents": {"z": {"dim": 2}}, "decoder": {"likelihood": {"kind": "normal"}}, "train": {"epochs": 1}}
    )
    run = fit(spec, tmp_path, data=x)
    with pytest.raises(pvae.DataError, match="fitted on other data"):
        _ = pvae.Run.load(run.path, data=pvae.Dataset.from_tensors(x + 1)).pair
    with pytest.raises(pvae.DataError, match="Pass data="):
        _ = pvae.Run.load(run.path).pair


def test_checkpoint_of_another_declaration_lists_the_differences(tmp_path: Path) -> None:
    """FAULTS 8."""
    small = fit(tiny(epochs=1), tmp_path)
    other = Experiment.from_dict({**TINY_TABLE, "latents": {"w": {"dim": 3}}}).build((1, 8, 8))
    with pytest.raises(CheckpointError, match=r"guide\.posteriors\.w\..*not in the checkpoint") as caught:
        load_weights(other, small.checkpoint.tensors["weights"], "here")
    assert "guide.posteriors.z" in str(caught.value)
    wider = Experiment.from_dict({**TINY_TABLE, "latents": {"z": {"dim": 4}}}).build((1, 8, 8))
    with pytest.raises(CheckpointError, match=r"expected shape \[8, 16\]; got \[6, 16\]"):
        load_weights(wider, small.checkpoint.tensors["weights"], "here")


def test_damaged_checkpoint_falls_back_and_says_so(tmp_path: Path) -> None:
    """FAULTS 4 and 5."""
    run = fit(tiny(epochs=2, checkpoint_seconds=0.0), tmp_path)
    newest = run.checkpoint.path
    weights = newest / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    again = pvae.Run.load(run.path)
    assert again.checkpoint.path != newest
    assert any("falling back" in event["message"] for event in again.files.events())


# ---------------------------------------------------------------------- stopping


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    run = fit(tiny(epochs=60, patience=2, optimizer={"kind": "adam", "lr": 0.05}), tmp_path)
    validation = run.metrics.query("split == 'validation'")
    assert run.status["epoch"] < 60  # type: ignore[operator]
    best = validation["elbo"].idxmax()
    assert len(validation.loc[best:]) == 3
    kept = evaluate(run.pair, run.data.validation.x, run.plan.seed)["elbo"]
    assert kept == pytest.approx(validation["elbo"].max(), abs=1e-4)


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


def test_alternate_moves_one_side_at_a_time() -> None:
    experiment = tiny(alternate=2)
    pair = experiment.build((1, 8, 8))
    step = stepper(experiment, pair)
    x = (torch.rand(96, 1, 8, 8) > 0.5).float()
    before = {name: p.detach().clone() for name, p in pair.named_parameters()}
    step(x, [p for name, p in pair.named_parameters() if name.startswith("model.")])
    moved = {name for name, p in pair.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name in before if name.startswith("guide.")}


def test_alternation_is_so_many_guide_steps_and_then_one_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    run = Step.run

    def watched(self: Step, x: Tensor, frozen: Sequence[torch.nn.Parameter] = ()) -> Tensor:
        named = list(self.loss.pair.named_parameters())
        before = [p.detach().clone() for _, p in named]
        out = run(self, x, frozen)
        moved = {n.split(".")[0] for (n, p), old in zip(named, before, strict=True) if not torch.equal(p, old)}
        order.append("".join(sorted(side[0] for side in moved)))
        return out

    monkeypatch.setattr(Step, "run", watched)
    experiment = tiny(alternate=2, epochs=1, batch_size=150, engine="eager", schedule={"kind": "constant"})
    pvae.fit(experiment, run_dir=tmp_path, device="cpu", progress=False)
    assert order[:6] == ["g", "g", "m", "g", "g", "m"]


def test_gpu_asked_for_and_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 40."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(DeviceError, match="Use --device cpu"):
        pick_device("cuda")
    with pytest.raises(DeclarationError, match="expected auto, cpu or cuda"):
        pick_device("gpu")


# ---------------------------------------------------------------------- not finite


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


def broken_data() -> Tensor:
    """Forty rows; row 7 breaks the model."""
    x = torch.zeros(40, 2)
    x[7] = 99
    return x


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_not_finite(tmp_path: Path, policy: str) -> None:
    """FAULTS 18: the site, the rows, the last finite step; the policies."""
    part = Fragile()
    with pyro.validation_enabled(False):
        pair = pvae.Pair(model=part.model, guide=part.guide)
        data = pvae.Dataset.from_tensors(broken_data(), validation=torch.zeros(5, 2), test=torch.zeros(5, 2))
        train = Train(epochs=2, batch_size=10, nonfinite=policy, engine="eager", checkpoint_seconds=0.0)  # type: ignore[arg-type]
        options = {"data": data, "train": train, "run_dir": tmp_path, "device": "cpu", "progress": False}
        if policy == "skip":
            run = pvae.fit(pair, **options)  # type: ignore[arg-type]
            assert run.status["skipped"] == 2
            assert torch.isfinite(part.loc).all()
            return
        with pytest.raises(NonFiniteError, match=r"first bad site model\.x, 1 of 10 rows \(data rows 7\)") as caught:
            pvae.fit(pair, **options)  # type: ignore[arg-type]
    assert "last finite step" in str(caught.value)
    folder = next(tmp_path.glob("*/*"))
    assert (folder / "analysis" / "nonfinite_batch.safetensors").is_file()
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    rolled = [e for e in pvae.Run.load(folder, pair=pair, data=data).files.events() if "rolled back" in e["message"]]
    assert len(rolled) == (3 if policy == "rollback" else 0)


class Overflowing(Fragile):
    """A finite loss whose gradient is NaN for the marked row: sqrt at zero."""

    def model(self, x: Tensor) -> None:
        """As before, with a term of value 0 and derivative NaN."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            marked = (x == 99).any(-1, keepdim=True)
            zero = torch.where(marked, (self.loc * 0.0).square().sqrt() * 0.0, torch.zeros(()))
            pyro.sample("x", dist.Normal(z + self.loc + zero, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("clip", [None, 10.0])
def test_gradient_that_is_not_finite_never_reaches_a_checkpoint(tmp_path: Path, clip: float | None) -> None:
    """FAULTS 18: found at once where the norm is known, else at the next step; kept weights stay finite."""
    part = Overflowing()
    pair = pvae.Pair(model=part.model, guide=part.guide)
    data = pvae.Dataset.from_tensors(broken_data(), validation=torch.zeros(5, 2), test=torch.zeros(5, 2))
    train = Train(epochs=2, batch_size=10, clip_norm=clip, engine="eager", checkpoint_seconds=0.0)
    with pytest.raises(NonFiniteError, match="weights" if clip is None else "gradient norm nan"):
        pvae.fit(pair, data=data, train=train, run_dir=tmp_path, device="cpu", progress=False)
    saved = checkpoint.latest(next(tmp_path.glob("*/*")) / "checkpoints")
    assert saved is None or all(v.isfinite().all() for v in saved.tensors["weights"].values())


# ---------------------------------------------------------------------- engines


def stepper(experiment: Experiment, pair: pvae.Pair, engine: str = "eager", clip: float | None = None) -> Step:
    """A step over a pair as `fit` makes it."""
    example = torch.zeros(96, 1, 8, 8)
    optimizer = experiment.train.optimizer.build(pair.parameters())
    return Step(Loss(experiment.objective, pair), optimizer, engine, example, clip_norm=clip)


def test_fast_step_equals_the_eager_one_while_beta_and_lr_change() -> None:
    """The compiled step draws the same noise, and sees beta and the learning rate change; odd batches run eagerly."""
    experiment = tiny()
    pairs = {engine: experiment.build((1, 8, 8)) for engine in ("eager", "compiled")}
    with pyro.validation_enabled(False):
        steps = {engine: stepper(experiment, pair, engine, clip=50.0) for engine, pair in pairs.items()}
        for i in range(12):
            x = (torch.rand(96 if i % 5 else 40, 1, 8, 8) > 0.5).float()
            outs = []
            for step in steps.values():
                step.loss.beta.fill_(0.1 * i)
                set_lr(step.optimizer, 1e-3 * (1 + i))
                torch.manual_seed(i)
                outs.append(step(x))
            assert torch.allclose(outs[0], outs[1], rtol=1e-5, atol=1e-5), (i, outs)
    for (name, a), b in zip(pairs["eager"].named_parameters(), pairs["compiled"].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=2e-5), name


def test_compiled_fit_resumes_bit_for_bit(tmp_path: Path) -> None:
    """FAULTS 10 with the fast step; the engine of a run stays its own."""
    experiment = tiny(engine="compiled", epochs=3)
    whole = fit(experiment, tmp_path)
    assert whole.status["engine"] == "compiled"
    done = pvae.resume(interrupted(experiment, tmp_path, 17), device="cpu", progress=False)
    assert done.status["engine"] == "compiled"
    assert_same(whole, done)


KINDS: dict[str, tuple[str, list[str]]] = {
    "iwae on two levels": ("hvae", ["objective.kind=iwae"]),
    "iwae of scored bits": ("bernoulli_vae", ["objective={kind='iwae'}", "latents.b.posterior.baseline=none"]),
    "mean field with free bits": ("hvae", ["objective.kind=trace_mean_field_elbo", "objective.free_bits=0.5"]),
    "convolutions": ("vae", ["encoder.network.kind=conv", "decoder.network.kind=conv"]),
    "counts": ("vae", ["data.binarize=none", "data.scale=raw", "decoder.likelihood.kind=poisson"]),
    "levels": (
        "vae",
        ["data.binarize=none", "data.scale=raw", 'decoder.likelihood={kind="categorical", levels=17}'],
    ),
    "grey values": ("vae", ["data.binarize=none", 'decoder.likelihood={kind="discretized_logistic", levels=17}']),
    "predicted scale": ("vae_normal", ["decoder.likelihood.scale=per_datum"]),
    "fixed scale, several draws": ("vae_normal", ["decoder.likelihood.scale=fixed", "objective.particles=3"]),
    "mixture prior": ("mixture_prior", []),
    "pseudo-inputs": ("vamp", []),
    "real nvp": ("realnvp_prior", ["latents.z.dim=4"]),
    "autoregressive density": ("maf_prior", ["latents.z.dim=4"]),
    "autoregressive draws": ("maf_prior", ["latents.z.dim=4", "latents.z.prior.kind=iaf"]),
    "splines": ("spline_prior", ["latents.z.dim=4"]),
    "autoregressive splines": ("spline_prior", ["latents.z.dim=4", "latents.z.prior.kind=spline_autoregressive"]),
    "full rank": ("vae", ["latents.z.dim=5", "latents.z.posterior.kind=full_rank_normal"]),
    "pseudo-inputs of full rank": ("vamp", ["latents.z.dim=4", "latents.z.posterior.kind=full_rank_normal"]),
    "cyclical beta": ("vae", ["data.binarize=static", "objective.beta.kind=cyclical"]),
}
SMALL = ["train.epochs=2", "train.engine=eager", "encoder.network.hidden=[16]", "decoder.network.hidden=[16]"]


@pytest.mark.parametrize("case", KINDS, ids=list(KINDS))
def test_every_kind_is_fitted_and_read(tmp_path: Path, case: str) -> None:
    name, overrides = KINDS[case]
    run = fit(Experiment.load(name, [*SMALL, *overrides]), tmp_path)
    elbo = run.metrics.query("split == 'train'")["elbo"]
    assert elbo.iloc[1] > elbo.iloc[0]
    x = run.data.test.x[:50]
    result = surgery(run.pair, x)
    assert evidence(run.pair, x, samples=20).iwae.value > result.elbo.value - 3 * result.elbo.standard_error


@pytest.mark.parametrize(
    "case",
    [
        "iwae on two levels",
        "iwae of scored bits",
        "grey values",
        "mixture prior",
        "pseudo-inputs",
        "full rank",
        "real nvp",
    ],
)
def test_other_kinds_compile_to_the_same_numbers(case: str) -> None:
    """`compile_forward` itself compares value and gradient with the eager program's."""
    name, overrides = KINDS[case]
    experiment = Experiment.load(name, [*SMALL, *overrides])
    compile_forward(Loss(experiment.objective, experiment.build((1, 8, 8))), torch.ones(50, 1, 8, 8))


def test_a_fast_step_with_other_numbers_is_refused() -> None:
    with pytest.raises(RuntimeError, match="gradient differs"):
        require_equal(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.01]), "gradient")
    with pytest.raises(RuntimeError, match="value differs"):
        require_equal(torch.tensor([torch.nan]), torch.tensor([1.0]), "value")


def test_engine_is_chosen_by_the_work_to_come() -> None:
    cpu = torch.device("cpu")
    assert choose_engine(200, 10_000, 100, cpu) == "eager"
    assert choose_engine(250_000, 700_000, 100, cpu) == "compiled"
    assert choose_engine(10, 10, 10, torch.device("cuda")) == "captured"


def test_uncompilable_pair_goes_on_eagerly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("pvae.training.step.compile_forward", broken)
    run = fit(tiny(engine="compiled", epochs=1), tmp_path)
    assert run.files.manifest["engine"] == "eager"
    assert any("no compiler here" in event["message"] for event in run.files.events())


# ---------------------------------------------------------------------- hand-written pairs


def test_hand_written_pair_is_fitted_and_loaded_again(tmp_path: Path) -> None:
    part = Fragile()
    pair = pvae.Pair(model=part.model, guide=part.guide)
    data = pvae.Dataset.from_tensors(torch.randn(200, 2) + 3)
    options = {"data": data, "objective": TraceELBO(), "run_dir": tmp_path, "device": "cpu", "progress": False}
    run = pvae.fit(pair, "train.epochs=30", "train.optimizer.lr=0.1", **options)  # type: ignore[arg-type]
    fitted = part.loc.detach().clone()
    assert (fitted > 1).all()
    fresh = Fragile()
    again = pvae.Run.load(run.path, data=data, pair=pvae.Pair(model=fresh.model, guide=fresh.guide))
    assert dict(again.pair.named_parameters()).keys() == dict(run.pair.named_parameters()).keys()
    assert torch.equal(next(iter(again.pair.parameters())), next(iter(run.pair.parameters())))


def test_unsound_pair_is_refused(tmp_path: Path) -> None:
    part = Fragile()
    with pytest.raises(DeclarationError, match="expected a latent of this name in the guide"):
        pvae.fit(
            pvae.Pair(model=part.model, guide=lambda x: part.loc),
            data=torch.randn(20, 2),
            run_dir=tmp_path,
            progress=False,
        )


# ---------------------------------------------------------------------- analysis while a fit goes on

QUICK = ["encoder.network.hidden=[16]", "decoder.network.hidden=[16]", "train.engine=eager"]


def test_information_is_noted_every_few_epochs(tmp_path):
    options = ["train.epochs=5", "analysis.every=2", "analysis.rows=50", *QUICK]
    watched = pvae.fit("vae", *options, run_dir=tmp_path / "a", progress=False)
    rows = [row for row in watched.files.metrics_rows() if row["split"] == "analysis"]
    assert [row["epoch"] for row in rows] == [2, 4]
    for row in rows:
        assert row["kl"] == pytest.approx(row["mutual_information"] + row["marginal_kl"], abs=1e-9)
        assert row["mutual_information"] <= row["log_n"] == pytest.approx(math.log(50))
        assert row["active/z"] <= 10
    plain = pvae.fit("vae", *options, "analysis.every=0", run_dir=tmp_path / "b", progress=False)
    for name, weight in plain.pair.state_dict().items():
        assert torch.equal(weight, watched.pair.state_dict()[name]), name


def test_a_pair_that_cannot_be_analysed_is_fitted_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise DataError("surgery: expected something else")

    monkeypatch.setattr("pvae.analysis.decompose.history.surgery", lambda *_, **__: refuse())
    run = pvae.fit("vae", "train.epochs=3", "analysis.every=1", *QUICK, run_dir=tmp_path, progress=False)
    assert run.status["state"] == "finished"
    told = [event for event in run.files.events() if event["kind"] == "analysis"]
    assert len(told) == 1
    assert "expected something else" in told[0]["message"]
