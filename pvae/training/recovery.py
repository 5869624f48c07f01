"""Recovery of a fit from a loss that is not finite, from exhausted memory and from a lost device."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch
from torch import Tensor

from pvae.errors import DeviceError, NonFiniteError, StorageError, device_lost, is_refused_draw, out_of_memory
from pvae.training.diagnose import bad_figures, bad_weights, diagnose
from pvae.training.keeping import newest, restore, save
from pvae.training.trainer import Trainer, first_line
from pvae.util.files import write_atomic

MAX_ROLLBACKS = 3
DUMP = "nonfinite_batch.safetensors"


# ---------------------------------------------------------------------- not finite


def not_sampled(trainer: Trainer, error: Exception) -> bool:
    """Apply the policy `train.nonfinite` to a step in which a distribution had invalid parameters.

    Returns False if the fit was rolled back to a checkpoint.
    """
    return _next(trainer, handle(trainer, f"no draw at step {trainer.state.step}: {first_line(error)}", 1))


def not_finite(trainer: Trainer, x: Tensor, index: Tensor, out: Tensor) -> bool:
    """Apply the policy `train.nonfinite` to a step with a loss or gradient that is not finite, which changed no weight.

    Returns False if the fit was rolled back to a checkpoint.
    """
    state = trainer.state
    if trainer.plan.objective.scores:
        why = diagnose(trainer.loss, lambda: trainer.draw(index), index)
    else:
        why = bad_figures(trainer.pair, trainer.stepper.names, out)
    message = f"loss not finite at step {state.step} (epoch {state.epoch}): {why}; last finite step {state.step - 1}"
    if trainer.train.nonfinite != "skip":
        dump(trainer, x, index)
    return _next(trainer, handle(trainer, message, 1))


def all_finite(trainer: Trainer) -> bool:
    """Return False if the fit was rolled back because steps of the epoch on a GPU were not finite.

    On a GPU non-finite steps are only counted, and the policy `train.nonfinite` is applied here, at the end of an
    epoch; on a CPU every step has been checked already.
    """
    if trainer.device.type != "cuda":
        return True
    assert trainer.sums is not None  # noqa: S101 - the epoch has made it
    missing = trainer.per_epoch - int(trainer.sums[-1])
    message = f"loss not finite in {missing} of {trainer.per_epoch} steps of epoch {trainer.state.epoch}"
    return not missing or handle(trainer, message, missing)


def _next(trainer: Trainer, going_on: bool) -> bool:
    """Advance the step counter past a failed step unless the fit was rolled back (`going_on` is False)."""
    trainer.state.step += going_on
    return going_on


def handle(trainer: Trainer, message: str, steps: int) -> bool:
    """Apply the policy `train.nonfinite` to `steps` failed steps: return True to go on, False after a rollback.

    Raises:
        NonFiniteError: the policy is to stop, or to skip although a weight is not finite, or no further rollback is
            possible.
    """
    policy, state = trainer.train.nonfinite, trainer.state
    if policy == "skip" and not bad_weights(trainer.pair):
        state.skipped += steps
        trainer.tell("nonfinite", f"{message}; skipped")
        return True
    if policy == "rollback" and state.rollbacks < MAX_ROLLBACKS and roll_back(trainer, message):
        return False
    return fail(trainer, message)


def fail(trainer: Trainer, message: str) -> NoReturn:
    """Record the failure in the status file of the run and raise NonFiniteError."""
    trainer.status("failed", error=message)
    dumped = trainer.files.path / "analysis" / DUMP
    where = f" The batch is in analysis/{DUMP}." if dumped.is_file() else ""
    raise NonFiniteError(
        f"{message}. Lower the learning rate, set train.clip_norm, tighten log_variance bounds, or set "
        f"train.nonfinite = 'skip' or 'rollback'.{where}"
    )


def roll_back(trainer: Trainer, message: str) -> bool:
    """Restore the newest checkpoint and continue with other random noise; return False if there is no checkpoint."""
    saved = newest(trainer)
    if saved is None:
        return False
    rollbacks = trainer.state.rollbacks + 1
    restore(trainer, saved)
    trainer.state.rollbacks = rollbacks
    trainer.files.truncate_metrics(trainer.state.epoch)
    if trainer.engine == "captured":  # the graph holds the tensors of the optimiser's former state
        trainer.make_stepper()
    trainer.tell("nonfinite", f"{message}; rolled back to step {trainer.state.step}, with other noise")
    return True


def dump(trainer: Trainer, x: Tensor, index: Tensor) -> None:
    """Write a batch with a loss that is not finite, and its row numbers, to the run's analysis folder."""
    from safetensors.torch import save as serialise

    content = serialise({"x": x.detach().cpu().contiguous(), "index": index.cpu().contiguous()})
    try:
        write_atomic(trainer.files.analysis / DUMP, content)
    except StorageError as error:  # the diagnosis is worth more than the batch
        trainer.tell("storage", str(error))


# ---------------------------------------------------------------------- memory and devices


@contextmanager
def explained_errors(trainer: Trainer) -> Iterator[None]:
    """Raise DeviceError in place of an out-of-memory or lost-device error, after writing a checkpoint if possible."""
    try:
        yield
    except Exception as error:
        if is_refused_draw(error):
            fail(trainer, f"no draw after step {trainer.state.step}: {first_line(error)}")
        lost = device_lost(error)
        if not lost and not out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed step
        message = f"{'device lost' if lost else 'out of memory'} at step {trainer.state.step} on {trainer.device}"
        advice = "" if lost else _emergency(trainer)
        with suppress(RuntimeError):  # of a device that does not answer
            trainer.status("failed", error=message)
        raise DeviceError(
            f"Expected a fit that goes through; got {message} ({first_line(error)}). {advice}Go on "
            f"from the last checkpoint with: pvae resume {trainer.files.path}, on another device if need be."
        ) from error


def _emergency(trainer: Trainer) -> str:
    """Write a checkpoint after memory ran out, and return advice on the batch size for the error message."""
    _clear_gradients(trainer)
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    stepper = getattr(trainer, "stepper", None)
    if stepper is None or not stepper.moving_now:  # half of a step is in no weights that a run could go on from
        with suppress(StorageError):
            save(trainer)
    if not trainer.plan.objective.scores:
        return "A smaller train.batch_size or smaller networks need less. "
    rows = _fitting_rows(trainer)
    if rows == 0:
        return "Not even one row fits: make the networks smaller. "
    return f"Batches of {rows} rows fit: add train.batch_size={rows} --allow-changes. "


def _fitting_rows(trainer: Trainer) -> int:
    """Return the largest batch size, found by halving, whose loss and gradient fit into memory; 0 if none does."""
    rows = trainer.batch // 2
    while rows:
        try:
            trainer.loss(trainer.rows(torch.arange(rows, device=trainer.device)))[0].backward()
            return rows
        except Exception as error:
            if not out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
            rows //= 2
        finally:
            _clear_gradients(trainer)
    return 0


def _clear_gradients(trainer: Trainer) -> None:
    for parameter in trainer.parameters:
        parameter.grad = None
