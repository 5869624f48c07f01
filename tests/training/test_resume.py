"""Resuming a fit, bit for bit; damaged checkpoints, changed declarations, signals, full disks."""

import os
import signal
from pathlib import Path

import pytest
import torch

import pvae
from pvae.errors import CheckpointError, DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.runs.weights import load_weights
from pvae.training.loop import Stop
from tests.runs_shared import TINY_TABLE, assert_resumes_exactly, assert_same, everything, fit, resume, tiny


def test_same_seed_same_weights_and_nothing_leaks(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a = fit(tiny(), tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
    b = fit(tiny(), tmp_path)
    c = fit(tiny(), tmp_path, seed=1)
    assert_same(a, b)
    assert any(not torch.equal(v, everything(c)[k]) for k, v in everything(a).items())


INTERRUPTED: dict[str, tuple[dict[str, object], tuple[int, ...]]] = {
    "adamw+schedule": ({"optimizer": {"kind": "adamw"}, "schedule": {"kind": "cosine"}, "warmup": 1.0}, (15, 22)),
    "sgd+clip": ({"optimizer": {"kind": "sgd", "momentum": 0.9, "lr": 1e-4}, "clip_norm": 5.0}, (15, 22)),
    "average+alternate": ({"average": 0.9, "alternate": 2}, (15, 22)),
    "an epoch is a step": ({"epochs": 5, "batch_size": 1000}, (2,)),
    "compiled": ({"engine": "compiled"}, (17,)),
}
"""Training settings, and the steps at which a fit is interrupted."""


@pytest.mark.parametrize("case", INTERRUPTED)
def test_interrupted_fit_resumes_bit_for_bit(tmp_path: Path, case: str) -> None:
    """FAULTS 10: in the middle of an epoch and at its end; the engine of a run stays its own."""
    train, steps = INTERRUPTED[case]
    whole = fit(tiny(**train), tmp_path)
    for step in steps:
        done = assert_resumes_exactly(tiny(**train), tmp_path / str(step), step, whole=whole)
        assert whole.status["engine"] == done.status["engine"] == train.get("engine", "eager")


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


def test_finished_run_is_left_alone(tmp_path: Path) -> None:
    """FAULTS 12."""
    run = fit(tiny(epochs=1), tmp_path)
    before = everything(run)
    assert resume(run.path).status["epoch"] == 1
    assert_same(before, everything(run))


def test_changes_are_listed_and_refused_unless_allowed(tmp_path: Path) -> None:
    """FAULTS 11 and 13; more epochs on a constant schedule continue exactly."""
    whole = fit(tiny(epochs=4), tmp_path)
    half = fit(tiny(epochs=2), tmp_path)
    with pytest.raises(DeclarationError, match=r"train\.epochs = 2; got 4") as caught:
        resume(half, "train.epochs=4", "train.batch_size=50")
    assert "train.batch_size = 96; got 50" in str(caught.value)
    done = resume(half, "train.epochs=4", allow_changes=True)
    assert_same(whole, done)


def test_a_run_cannot_become_another_model(tmp_path: Path) -> None:
    """FAULTS 13: what a run is cannot change, not even when changes are allowed; its files stay as they are."""
    run = fit(tiny(epochs=2), tmp_path)
    before = run.files.spec_text
    for change in ("latents.z.dim=5", "data.binarize=threshold", "decoder.network.hidden=[8]", "seed=3"):
        with pytest.raises(DeclarationError, match="another model or other data"):
            resume(run.path, change, allow_changes=True)
    assert run.files.spec_text == before
    last = resume(run.path, "train.keep=last", allow_changes=True)
    assert last.checkpoint.state["select"] == "weights"


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
        _ = pvae.Run.load(run.path).data


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


def test_damaged_checkpoint_falls_back_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """FAULTS 4, 5 and 50: a reader warns and writes nothing; the process that resumes the run logs an event."""
    run = fit(tiny(epochs=2, checkpoint_seconds=0.0), tmp_path)
    newest = run.checkpoint.path
    weights = newest / "weights.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    again = pvae.Run.load(run.path)
    assert again.checkpoint.path != newest
    assert not again.pair.training
    assert "falling back" in caplog.text
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert again.files.alerts() == []
    run.files.update_status(state="interrupted")
    assert any("falling back" in line for line in resume(run.path).files.alerts())
