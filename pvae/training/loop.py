"""Training loop: steps, epochs and checkpoints, until the last epoch, early stopping, or a signal."""

from __future__ import annotations

import signal
import time

import pyro
import torch
from torch import Tensor

from pvae.errors import Interrupted, is_refused_draw
from pvae.training.begin import begin
from pvae.training.diagnose import bad_weights
from pvae.training.epochs import end_epoch, final_alerts
from pvae.training.keeping import save
from pvae.training.recovery import all_finite, explained_errors, fail, not_finite, not_sampled
from pvae.training.signals import Stop
from pvae.training.step import is_finite
from pvae.training.trainer import Trainer
from pvae.util.progress import ProgressBar

SHOWN_STEPS = 20
"""Number of steps between two updates of the progress bar."""


def train(trainer: Trainer) -> None:
    """Train until the last epoch, early stopping, or a signal; torch's global random state is restored at the end.

    Raises:
        NonFiniteError: the loss or the weights are not finite, and the policy is to stop.
        DeviceError: memory ran out, or the device was lost.
        Interrupted: a signal arrived; a checkpoint was written.
    """
    state, epochs = trainer.state, trainer.train.epochs
    devices = [trainer.device] if trainer.device.type == "cuda" else []
    trainer.started = time.monotonic() - state.seconds
    trainer.files.truncate_metrics(state.epoch)
    trainer.status("running")
    with (
        torch.random.fork_rng(devices=devices),
        pyro.validation_enabled(False),
        Stop() as stop,
        explained_errors(trainer),
    ):
        if state.step == 0:
            trainer.follow_schedules(0)
            begin(trainer.pair, trainer.data.train, trainer.batch, trainer.plan.seed)
            if trainer.average is not None:
                torch._foreach_copy_(trainer.average, [p.detach() for p in trainer.parameters])
        trainer.make_stepper()
        if state.step == 0:
            trainer.stepper.begin()
            save(trainer)
        with ProgressBar(epochs * trainer.per_epoch, trainer.plan.name, show=trainer.show) as bar:
            while trainer.state.epoch < epochs and not trainer.state.stopped:
                epoch(trainer, stop, bar)
        trainer.clock()
    if bad := bad_weights(trainer.pair):
        fail(trainer, f"weights not finite after the last step ({bad[0]})")
    save(trainer)
    trainer.pair.eval()  # rows announced to its parts are no longer those of the next batch
    final_alerts(trainer)
    trainer.status("finished")


def epoch(trainer: Trainer, stop: Stop, bar: ProgressBar) -> None:
    """Take the remaining steps of the current epoch and end it; return early after a rollback to a checkpoint."""
    state = trainer.state
    order = trainer.data.train.order(trainer.plan.seed, state.epoch)
    if trainer.sums is None:
        figures = len(trainer.stepper.names) + 1
        trainer.sums = torch.zeros(figures, dtype=torch.float64, device=trainer.device)
    while state.step < (state.epoch + 1) * trainer.per_epoch:
        position = (state.step - state.epoch * trainer.per_epoch) * trainer.batch
        if not step(trainer, order[position : position + trainer.batch]):
            return
        if stop.signal is not None:
            interrupt(trainer, stop.signal)
        if time.monotonic() - trainer.last_checkpoint >= trainer.train.checkpoint_seconds:
            trainer.clock()
            save(trainer)
        if state.step % SHOWN_STEPS == 0:
            bar.update(state.step)
    trainer.clock()
    end_epoch(trainer, bar)


def step(trainer: Trainer, index: Tensor) -> bool:
    """Take one step on the training rows `index`; return False if the fit was rolled back to a checkpoint."""
    state = trainer.state
    trainer.follow_schedules(state.step)
    x = trainer.draw(index)
    frozen = trainer.frozen(state.step)
    try:
        out = trainer.stepper(x, frozen) if frozen else trainer.stepper(x)
    except (RuntimeError, ValueError) as error:
        if not is_refused_draw(error):
            raise
        return not_sampled(trainer, error)
    if not out.is_cuda and not is_finite(out):
        return not_finite(trainer, x, index, out)
    accumulate(trainer, out)
    state.step += 1
    return state.step % trainer.per_epoch != 0 or all_finite(trainer)


def accumulate(trainer: Trainer, out: Tensor) -> None:
    """Add the metrics of a step to their sums over the epoch, without synchronising with a GPU."""
    sums = trainer.sums
    assert sums is not None  # noqa: S101 - `epoch` has made it
    if out.is_cuda:
        finite = out[0].isfinite() & out[-1].isfinite()
        sums[:-1] += torch.where(finite, out, 0.0)
        sums[-1] += finite
    else:
        sums[:-1] += out
        sums[-1] += 1


def interrupt(trainer: Trainer, number: int) -> None:
    """Write a checkpoint and raise `Interrupted`, after the signal `number` arrived."""
    trainer.clock()
    save(trainer)
    trainer.status("interrupted")
    raise Interrupted(
        f"{signal.Signals(number).name} at step {trainer.state.step}: checkpoint written. Go on with: "
        f"pvae resume {trainer.files.path}",
        number,
    )
