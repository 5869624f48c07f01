"""Tiny fits that tests share: how they are declared, interrupted, and compared bit for bit."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pvae
from pvae.experiment.experiment import Experiment
from pvae.runs import checkpoint
from pvae.training import loop
from pvae.training.trainer import Trainer

TINY_TABLE: dict[str, Any] = {
    "latents": {"z": {"dim": 3}},
    "data": {"source": "digits", "binarize": "dynamic"},
    "encoder": {"network": {"kind": "mlp", "hidden": [16]}},
    "decoder": {"network": {"kind": "mlp", "hidden": [16]}},
    "train": {"epochs": 3, "batch_size": 96, "checkpoint_seconds": 1000.0, "engine": "eager"},
}


def tiny(**train: object) -> Experiment:
    """A small experiment on digits: 33 steps of which every eleventh is a short one; a checkpoint at start and end."""
    return Experiment.from_dict({**TINY_TABLE, "train": {**TINY_TABLE["train"], **train}})


def fit(what: Any, where: Path, *overrides: str, **options: Any) -> pvae.Run:
    """A silent fit on the CPU."""
    return pvae.fit(what, *overrides, run_dir=where, device="cpu", progress=False, **options)


def resume(run: Any, *overrides: str, **options: Any) -> pvae.Run:
    """A silent continuation on the CPU."""
    return pvae.resume(run, *overrides, device="cpu", progress=False, **options)


def everything(run: pvae.Run) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint."""
    saved = checkpoint.latest(run.path / "checkpoints")
    assert saved is not None
    return {f"{group}/{name}": value for group, part in saved.tensors.items() for name, value in part.items()}


def assert_same(a: pvae.Run | Mapping[str, Tensor], b: pvae.Run | Mapping[str, Tensor]) -> None:
    """Tensors by name, or those of the newest checkpoints of runs, are equal bit for bit."""
    one, two = (everything(side) if isinstance(side, pvae.Run) else side for side in (a, b))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@contextmanager
def at_step(step: int, act: Callable[[], None], name: str | None = None) -> Iterator[None]:
    """Act during the step that leads a fit (of one name) to `step`."""
    original = loop.step

    def acting(trainer: Trainer, index: Tensor) -> bool:
        if trainer.state.step == step - 1 and name in (None, trainer.plan.name):
            act()
        return original(trainer, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "step", acting)
        yield


def signalled_at(step: int, number: int = signal.SIGTERM, name: str | None = None) -> Any:
    """Send a signal to this process during the step that leads a fit to `step`."""
    return at_step(step, lambda: os.kill(os.getpid(), number), name)


def interrupted(what: Any, where: Path, step: int, **options: Any) -> Path:
    """The folder of a fit that got SIGTERM and kept a checkpoint of `step`."""
    with signalled_at(step), pytest.raises(pvae.PvaeError, match="SIGTERM") as caught:
        fit(what, where, **options)
    assert caught.value.exit_code == 143
    newest = max(where.glob("*/*"), key=lambda p: p.stat().st_mtime_ns)
    run = pvae.Run.load(newest, data=options.get("data"))
    assert run.status["state"] == "interrupted"
    assert run.checkpoint.step == step
    return newest


def assert_resumes_exactly(
    what: Any, where: Path, step: int, *, whole: pvae.Run | None = None, **options: Any
) -> pvae.Run:
    """A fit that was interrupted at a step and resumed ends in the same bits as one that was not; returns it."""
    whole = whole or fit(what, where / "whole", **options)
    data = {"data": options["data"]} if "data" in options else {}
    done = resume(interrupted(what, where / "part", step, **options), **data)
    assert_same(whole, done)
    columns = [name for name in whole.metrics.columns if name != "seconds"]
    assert done.metrics[columns].equals(whole.metrics[columns])
    return done
