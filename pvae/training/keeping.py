"""Checkpoints of a fit: writing them, with retries on a full disk, and restoring them."""

from __future__ import annotations

import math
import time
from dataclasses import asdict

import torch
from torch import Tensor

from pvae.errors import CheckpointError, StorageError
from pvae.runs import checkpoint
from pvae.runs.run import load_weights
from pvae.training.diagnose import bad_weights
from pvae.training.step import load_optimizer_tensors, make_capturable, optimizer_tensors
from pvae.training.trainer import State, Trainer

RETRY_SECONDS = (0.1, 0.5, 2.0)
"""Seconds to wait before each further attempt to write the last checkpoint of a fit."""


def newest(trainer: Trainer) -> checkpoint.Checkpoint | None:
    """Return the newest readable checkpoint of a fit; None if it has none. Damaged ones are reported as events."""
    return checkpoint.latest(trainer.files.path / "checkpoints", report=lambda line: trainer.tell("fallback", line))


def save(trainer: Trainer) -> None:
    """Write a checkpoint of the fit, unless a weight is NaN or infinite.

    A full disk is reported as an event, and the next checkpoint is the next attempt; the last one of a fit must
    succeed.

    Raises:
        StorageError: the last checkpoint cannot be written.
    """
    if bad := bad_weights(trainer.pair):
        trainer.tell("nonfinite", f"no checkpoint at step {trainer.state.step}: weights not finite ({bad[0]})")
        return
    tensors: dict[str, dict[str, Tensor]] = {
        "weights": dict(trainer.pair.state_dict()),
        "optimizer": optimizer_tensors(trainer.optimizer),
    }
    select = "weights"
    if trainer.average is not None:
        tensors["average"], select = dict(zip(trainer.names, trainer.average, strict=True)), "average"
    if trainer.best is not None:
        tensors["best"], select = trainer.best, "best"
    if trainer.sums is not None:
        tensors["progress"] = {"sums": trainer.sums, **trainer.gathered}
    state = {k: v for k, v in asdict(trainer.state).items() if v != -math.inf}
    last = trainer.state.stopped or trainer.state.epoch >= trainer.train.epochs
    for wait in (*RETRY_SECONDS, None) if last else (None,):
        try:
            folder = trainer.files.path / "checkpoints"
            checkpoint.write(folder, trainer.state.step, tensors, {**state, "select": select})
            break
        except StorageError as error:
            if wait is None and last:
                raise
            trainer.tell("storage", str(error) if wait is None else f"{error} Trying again.")
            time.sleep(wait or 0.0)
    trainer.last_checkpoint = time.monotonic()


def restore(trainer: Trainer, saved: checkpoint.Checkpoint) -> None:
    """Restore weights, optimiser state, averaged weights and progress of a fit from a checkpoint.

    Raises:
        CheckpointError: the checkpoint does not belong to this fit.
    """
    try:
        _restore(trainer, saved)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{saved.path}: expected the state of this fit; got another: {error}. Go on from the checkpoint before."
        ) from error


def _restore(trainer: Trainer, saved: checkpoint.Checkpoint) -> None:
    tensors, device, keeps_best = saved.tensors, trainer.device, trainer.train.keep == "best"
    for group in ("best", "weights"):  # the best are kept as they are: they too must be of this pair
        if group == "weights" or group in tensors:
            load_weights(trainer.pair, tensors[group], str(saved.path))
    load_optimizer_tensors(trainer.optimizer, tensors["optimizer"])
    if device.type == "cuda":
        make_capturable(trainer.optimizer, device)
    trainer.best = tensors.get("best") if keeps_best else None
    average = tensors.get("average")
    if trainer.average is not None and average is not None:  # in place: the step holds these tensors
        torch._foreach_copy_(trainer.average, [average[name].to(device) for name in trainer.names])
    progress = {name: value.to(device) for name, value in tensors.get("progress", {}).items()}
    trainer.sums = progress.pop("sums", None)
    trainer.gathered.clear()  # in place: the stepper holds it
    trainer.gathered.update(progress)
    trainer.state = State.of(saved.state)
    if keeps_best and trainer.best is None:
        trainer.state.best = -math.inf
    if trainer.state.step:
        trainer.follow_schedules(trainer.state.step - 1)  # of the last step: the end of its epoch may be to come
