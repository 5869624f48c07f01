"""Checkpoints of a fit; recovery from a loss that is not finite, exhausted memory and a lost device."""

import math
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import NoReturn

import torch
from torch import Tensor, nn

from pvae import errors
from pvae.errors import CheckpointError, DeviceError, NonFiniteError, Stopped, StorageError, instead, text
from pvae.objectives.base import Loss
from pvae.pair import Pair, log_prob, samples
from pvae.runs import checkpoint, seal
from pvae.runs.weights import chosen, load_weights, require_same
from pvae.training import step
from pvae.training.trainer import State, Trainer, first_line
from pvae.util import follows, write_atomic

RETRY_SECONDS = (0.1, 0.5, 2.0)
"""Seconds to wait before each further attempt to write the last checkpoint of a fit."""
MAX_ROLLBACKS = 3
DUMP = "nonfinite_batch.safetensors"


# ---------------------------------------------------------------------- checkpoints


def newest(trainer: Trainer, every: int = 1) -> checkpoint.Checkpoint | None:
    """Return the newest readable checkpoint of a fit, of a step that is a multiple of `every`; None if it has none.

    Damaged ones are reported as events.
    """
    folder = trainer.files.path / "checkpoints"
    return checkpoint.latest(folder, report=lambda line: trainer.tell("fallback", line), every=every)


def save(trainer: Trainer, *, last: bool = False) -> None:
    """Write a checkpoint of the fit, unless a weight is NaN or infinite; that of the epoch's start stays.

    A full disk is reported as an event, and the next checkpoint is the next attempt; the last one of a process must
    succeed, after some attempts.

    Raises:
        StorageError: the last checkpoint cannot be written.
    """
    trainer.clock()
    trainer.last_checkpoint = time.monotonic()
    if follows():
        return
    if bad := bad_weights(trainer.pair):
        trainer.tell("nonfinite", f"no checkpoint at step {trainer.state.step}: weights not finite ({bad[0]})")
        return
    tensors = {"weights": dict(trainer.pair.state_dict()), "optimizer": step.optimizer_tensors(trainer.optimizer)}
    select = "weights"
    if trainer.average is not None:
        tensors["average"], select = dict(zip(trainer.names, trainer.average, strict=True)), "average"
    if trainer.best is not None:
        tensors["best"], select = trainer.best, "best"
    if trainer.state.step:
        tensors["progress"] = {"sums": trainer.sums, **trainer.gathered}
    state = {k: v for k, v in asdict(trainer.state).items() if v != -math.inf} | {"select": select}
    folder, start = trainer.files.path / "checkpoints", trainer.state.epoch * trainer.per_epoch
    ended = trainer.state.stopped or trainer.state.epoch >= trainer.train.epochs
    last, run = last or ended, seal.recorded(trainer.files, trainer.sealed, ended)
    for wait in (*RETRY_SECONDS, None) if last else (None,):
        try:
            checkpoint.write(folder, trainer.state.step, tensors, state, run=run, spared=start)
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
    broken = KeyError, TypeError, ValueError, RuntimeError
    with instead(broken, "training.recovery.state", CheckpointError, path=saved.path):
        chosen(saved)  # raises where the state selects none
        tensors, device, keeps_best = saved.tensors, trainer.device, trainer.train.keep == "best"
        for group in ("best", "weights"):  # the best are kept as they are: they too must be of this pair
            if group == "weights" or group in tensors:
                load_weights(trainer.pair, tensors[group], str(saved.path))
        step.load_optimizer_tensors(trainer.optimizer, tensors["optimizer"])
        if device.type == "cuda":
            step.make_capturable(trainer.optimizer, device)
        trainer.best = tensors.get("best") if keeps_best else None
        average = tensors.get("average")
        if trainer.average is not None and average is not None:  # in place: the step holds these tensors
            require_same(dict(zip(trainer.names, trainer.average, strict=True)), average, f"{saved.path}, average")
            torch._foreach_copy_(trainer.average, [average[name].to(device) for name in trainer.names])
        progress = {name: value.to(device) for name, value in tensors.get("progress", {}).items()}
        trainer.sums = progress.pop("sums", torch.zeros_like(trainer.sums, dtype=torch.float64))
        if trainer.sums.dtype != torch.float64 or trainer.sums.dim() != 1:
            raise ValueError(f"progress has sums of shape {list(trainer.sums.shape)}, {trainer.sums.dtype}")
        trainer.gathered.clear()  # in place: the stepper holds it
        trainer.gathered.update(progress)
        trainer.state = State.of(saved)
        trainer.files.truncate_metrics(trainer.state.epoch)
        if keeps_best and trainer.best is None:
            trainer.state.best = trainer.state.elbo = -math.inf
        if trainer.state.step:
            trainer.follow_schedules(trainer.state.step - 1)  # of the last step: the end of its epoch may be to come


# ---------------------------------------------------------------------- not finite


def failed_step(trainer: Trainer, message: str) -> bool:
    """Apply the policy `train.nonfinite` to a step that changed no weight; return False after a rollback."""
    going_on = handle(trainer, message, 1)
    trainer.state.step += going_on
    return going_on


def all_finite(trainer: Trainer) -> bool:
    """Return False if the fit was rolled back because steps of the epoch on a GPU were not finite.

    On a GPU non-finite steps are only counted, and the policy `train.nonfinite` is applied here, at the end of an
    epoch; on a CPU every step has been checked already.
    """
    if trainer.device.type != "cuda":
        return True
    missing = trainer.per_epoch - int(trainer.sums[-1])
    message = f"loss not finite in {missing} of {trainer.per_epoch} steps of epoch {trainer.state.epoch}"
    return not missing or handle(trainer, message, missing)


def handle(trainer: Trainer, message: str, steps: int) -> bool:
    """Apply the policy `train.nonfinite` to `steps` failed steps: return True to go on, False after a rollback.

    A rollback restores the checkpoint of the start of the epoch, which does not depend on interruptions; the fit
    continues from there with other random noise.

    Raises:
        NonFiniteError: the policy is to stop, or to skip although a weight is not finite, or no further rollback is
            possible.
    """
    policy, state = trainer.train.nonfinite, trainer.state
    if policy == "skip" and not bad_weights(trainer.pair):
        state.skipped += steps
        trainer.tell("nonfinite", f"{message}; skipped")
        return True
    saved = newest(trainer, trainer.per_epoch) if policy == "rollback" and state.rollbacks < MAX_ROLLBACKS else None
    if saved is None:
        fail(trainer, message)
    restore(trainer, saved)
    trainer.state.rollbacks = state.rollbacks + 1
    if trainer.engine == "captured":  # the graph holds the tensors of the optimiser's former state
        trainer.make_stepper()
    trainer.tell("nonfinite", f"{message}; rolled back to step {trainer.state.step}, with other noise")
    return False


def fail(trainer: Trainer, message: str) -> NoReturn:
    """Record the failure in the status file of the run and raise NonFiniteError."""
    trainer.status("failed", error=message)
    dumped = trainer.files.path / "analysis" / DUMP
    raise NonFiniteError.of("training.recovery.not_finite", message=message, dump=dumped)


def not_finite(trainer: Trainer, index: Tensor, out: Tensor) -> str:
    """Describe a step with a loss or gradient that is not finite; write its batch unless such steps are skipped.

    Arguments:
        trainer: the fit; the step has changed no weight.
        index: row numbers of the batch in the training data.
        out: metrics of the step.
    """
    if trainer.train.nonfinite != "skip":
        from safetensors.torch import save as serialise

        content = serialise({"x": trainer.draw(index).detach().cpu().contiguous(), "index": index.cpu().contiguous()})
        try:
            write_atomic(trainer.files.analysis / DUMP, content)
        except StorageError as error:  # the diagnosis is worth more than the batch
            trainer.tell("storage", str(error))
    state, why = trainer.state, diagnose(trainer, index, out)
    return f"loss not finite at step {state.step} (epoch {state.epoch}): {why}; last finite step {state.step - 1}"


def diagnose(trainer: Trainer, index: Tensor, out: Tensor) -> str:
    """Describe in one sentence why a step failed: the bad sample site, its data rows and the gradient norm.

    A parameter that is not finite is named instead, and without an ELBO the metrics of the step.
    """
    if weights := bad_weights(trainer.pair):
        return text("training.recovery.weights", weights=weights)
    if not trainer.plan.objective.scores:
        return ", ".join(f"{k} {v:.3g}" for k, v in zip(trainer.stepper.names, out.tolist(), strict=True))
    norm = gradient_norm(trainer.loss, trainer.draw(index))
    found = first_bad_site(trainer.pair, trainer.draw(index))
    bad = index[found[1]].tolist() if found else []
    return text("training.recovery.bad_site", site=found[0] if found else "", rows=bad, batch=len(index), norm=norm)


def bad_weights(module: nn.Module) -> list[str]:
    """Return the names of the parameters of a module that contain NaN or infinity."""
    return [name for name, p in module.named_parameters() if not bool(p.isfinite().all())]


def first_bad_site(pair: Pair, x: Tensor) -> tuple[str, list[int]] | None:
    """Return the first sample site whose log density is not finite, and the indices of its rows in the batch.

    Sites of the guide are checked before those of the model; None if every log density is finite.
    """
    with torch.no_grad():
        guide_trace, model_trace = pair.traces(x)
    for side, trace in (("guide", guide_trace), ("model", model_trace)):
        for name, node in samples(trace).items():
            bad = ~log_prob(node, pair.layout, 0).isfinite()
            bad = bad.flatten(0, -2).any(0) if bad.dim() > 1 else bad  # in any state of a sum
            if bool(bad.any()):
                return f"{side}.{name}", bad.nonzero().flatten().tolist()
    return None


def gradient_norm(loss: Loss, x: Tensor) -> float:
    """Return the global L2 norm of the gradient of the loss of batch `x` over all trainable parameters."""
    with torch.enable_grad():
        return float(torch.stack([g.norm() for g in step.gradients(loss, loss(x)[0])]).norm())


# ---------------------------------------------------------------------- memory and devices


@contextmanager
def explained_errors(trainer: Trainer) -> Iterator[None]:
    """Raise DeviceError in place of an out-of-memory or lost-device error, after writing a checkpoint if possible."""
    try:
        yield
    except Stopped as error:
        if not getattr(getattr(trainer, "stepper", None), "moving_now", True):
            with suppress(StorageError):
                save(trainer)
        trainer.status("failed", error=str(error))
        raise
    except Exception as error:
        if errors.is_refused_draw(error):
            fail(trainer, f"no draw after step {trainer.state.step}: {first_line(error)}")
        full = errors.out_of_memory(error)
        lost = isinstance(error, RuntimeError) and "CUDA error" in str(error) and not full
        if not lost and not full:
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed step
        message = f"{'device lost' if lost else 'out of memory'} at step {trainer.state.step} on {trainer.device}"
        advice = "" if lost else _emergency(trainer)
        with suppress(RuntimeError):  # of a device that does not answer
            trainer.status("failed", error=message)
        found, path = f"{message} ({first_line(error)})", trainer.files.path
        raise DeviceError.of("training.recovery.device", found=found, advice=advice, path=path) from error


def _emergency(trainer: Trainer) -> str:
    """Write a checkpoint after memory ran out, and return advice on the batch size for the error message."""
    step.clear_gradients(trainer.parameters)
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    stepper = getattr(trainer, "stepper", None)
    if stepper is None or not stepper.moving_now:  # half of a step is in no weights that a run could go on from
        with suppress(StorageError):
            save(trainer)
    if not trainer.plan.objective.scores:
        return "A smaller train.batch_size or smaller networks need less. "
    if (rows := _fitting_rows(trainer)) == 0:
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
            if not errors.out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
            rows //= 2
        finally:
            step.clear_gradients(trainer.parameters)
    return 0
