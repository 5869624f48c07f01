"""Training loop: steps and epochs, with validation, early stopping and checkpoints, until the end or a signal."""

import signal
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import pyro
import torch
from torch import Tensor

from pvae.errors import Interrupted, PvaeError, StorageError, is_refused_draw, text
from pvae.objectives.base import FITTED, named
from pvae.pair.code_usage import code_usage
from pvae.runs import checkpoint
from pvae.signals import Answer
from pvae.training import recovery
from pvae.training.begin import begin
from pvae.training.evaluation import ALERT_ROWS, alerts, evaluate, held_out, maximised, seen_by
from pvae.training.step import CLIPPED, is_finite
from pvae.training.trainer import SIGNALS, ShardedBatch, Trainer, first_line, swapped
from pvae.util import ProgressBar, group

SHOWN_STEPS = 20
"""Number of steps between two updates of the progress bar."""
STATUS_SECONDS = 2.0
"""Smallest number of seconds between two updates of the status file."""
CONVERGED = 1e-6
"""Smallest gain per epoch, nats per datum, of a fit that has not converged."""


class Stop(Answer):
    """Context manager that records a stop signal, so that a step can be finished; a second one exits at once.

    While `at_once` is set, the first one raises KeyboardInterrupt.
    """

    numbers = SIGNALS
    at_once = False

    def first(self, _frame: FrameType | None) -> None:
        if self.at_once:
            raise KeyboardInterrupt


def train(trainer: Trainer) -> None:
    """Train until the last epoch, early stopping, or a signal; torch's global random state is restored at the end.

    Raises:
        NonFiniteError: the loss or the weights are not finite, and the policy is to stop.
        DeviceError: memory ran out, or the device was lost.
        Interrupted: a signal arrived; the message says which checkpoint stands.
    """
    state, epochs = trainer.state, trainer.train.epochs
    noise = torch.random.fork_rng(devices=[trainer.device] if trainer.device.type == "cuda" else [])
    trainer.started = time.monotonic() - state.seconds
    trainer.files.truncate_metrics(state.epoch)
    trainer.status("running")
    with noise, pyro.validation_enabled(False), Stop() as stop, recovery.explained_errors(trainer):
        try:
            stop.at_once = True  # there is no step to finish
            prepare(trainer)
            stop.at_once = False
        except KeyboardInterrupt:
            if stop.signal is None:
                raise
            interrupt(trainer, stop.signal, moved=False)
        with ProgressBar(epochs * trainer.per_epoch, trainer.plan.name, show=trainer.show) as bar:
            while trainer.state.epoch < epochs and not trainer.state.stopped:
                epoch(trainer, stop, bar)
    if stop.signal is not None:  # it came after the last step
        interrupt(trainer, stop.signal)
    if bad := recovery.bad_weights(trainer.pair):
        recovery.fail(trainer, f"weights not finite after the last step ({bad[0]})")
    recovery.save(trainer)
    trainer.pair.eval()  # rows announced to its parts are no longer those of the next batch
    final_alerts(trainer)
    trainer.status("finished")


def prepare(trainer: Trainer) -> None:
    """Compile the step; before the first one also initialise what is made of data, and write a checkpoint."""
    if fresh := trainer.state.step == 0:
        trainer.follow_schedules(0)
        begin(trainer.pair, trainer.data.train, trainer.batch, trainer.plan.seed)
        if trainer.average is not None:
            torch._foreach_copy_(trainer.average, [p.detach() for p in trainer.parameters])
    trainer.make_stepper()
    if fresh:
        if trainer.train.precision != "float32":
            trainer.tell("precision", text("training.loop.precision", precision=trainer.precision))
        trainer.stepper.begin()
    group.share_out([*trainer.pair.state_dict().values(), *(trainer.average or ())])
    if fresh:
        recovery.save(trainer)
        group.wait()


def epoch(trainer: Trainer, stop: Stop, bar: ProgressBar) -> None:
    """Take the remaining steps of the current epoch and end it; return early after a rollback to a checkpoint."""
    state = trainer.state
    order = trainer.data.train.order(trainer.plan.seed, state.epoch, trainer.batch, trainer.shards)
    while state.step < (state.epoch + 1) * trainer.per_epoch:
        position = (state.step - state.epoch * trainer.per_epoch) * trainer.batch
        trainer.stopping = stop.signal
        trainer.due = time.monotonic() - trainer.last_checkpoint >= trainer.train.checkpoint_seconds
        if not step(trainer, trainer.batch_of(order[position : position + trainer.batch])):
            return
        if (stopping := stop.signal if trainer.shards.count == 1 else trainer.stopping) is not None:
            interrupt(trainer, stopping)
        if trainer.due:
            recovery.save(trainer)
            group.wait()
        if state.step % SHOWN_STEPS == 0:
            bar.update(state.step)
    trainer.clock()
    trainer.stepper.moving_now = True  # half of an epoch's end is no state to go on from, either
    end_epoch(trainer, bar)
    trainer.stepper.moving_now = False
    if trainer.train.nonfinite == "rollback":
        recovery.save(trainer)
    group.wait()


def step(trainer: Trainer, index: Tensor) -> bool:
    """Take one step on the training rows `index`; return False if the fit was rolled back to a checkpoint."""
    state = trainer.state
    trainer.follow_schedules(state.step)
    turn = trainer.turns[state.step % len(trainer.turns)]
    try:
        if trainer.shards.count > 1:
            out = trainer.stepper.sharded(ShardedBatch(trainer, index), turn)
        else:
            out = trainer.stepper(trainer.draw(index), turn)
    except (RuntimeError, ValueError) as error:
        if not is_refused_draw(error):
            raise
        return recovery.failed_step(trainer, f"no draw at step {state.step}: {first_line(error)}")
    if not out.is_cuda and not is_finite(out):
        return recovery.failed_step(trainer, recovery.not_finite(trainer, index, out))
    accumulate(trainer.sums, out)
    state.step += 1
    return state.step % trainer.per_epoch != 0 or recovery.all_finite(trainer)


def accumulate(sums: Tensor, out: Tensor) -> None:
    """Add the metrics of a step to their sums over the epoch, without synchronising with a GPU."""
    finite: Tensor | int = 1
    if out.is_cuda:
        finite = out[0].isfinite() & out[-1].isfinite()
        out = torch.where(finite, out, 0.0)
    sums[:-1] += out
    sums[-1] += finite


def interrupt(trainer: Trainer, number: int, *, moved: bool = True) -> None:
    """Write a checkpoint, if the fit has `moved` on, and raise `Interrupted`, after the signal `number` arrived.

    Raises:
        Interrupted: the message says which checkpoint there is.
        StorageError: no checkpoint could be written.
        NonFiniteError: none was written, because a weight is not finite.
    """
    said, run = f"{signal.Signals(number).name} at step {trainer.state.step}", trainer.files.path
    said += "" if moved else ", before a step was taken"
    if bad := recovery.bad_weights(trainer.pair) if moved else []:
        recovery.fail(trainer, f"{said}: no checkpoint written: weights not finite ({bad[0]})")
    problem = None
    try:
        if moved:
            recovery.save(trainer, last=True)
    except StorageError as error:
        problem = error
    trainer.status("interrupted")
    kept = next((path.name for path in checkpoint.newest_first(run / "checkpoints")), None)
    first = trainer.files.first_stage() if kept is None else None
    written = "checkpoint written" if moved and problem is None else f"no checkpoint written, {kept or 'none'} stands"
    message = f"{said}: {written}. Go on with: pvae resume {run if first is None else first.path}"
    if problem is not None:
        raise StorageError(f"{message}\n{problem}") from problem
    raise Interrupted(message, number)


# ---------------------------------------------------------------------- the end of an epoch, and of the fit


def end_epoch(trainer: Trainer, bar: ProgressBar) -> None:
    """Log the mean training metrics of an epoch, then validate and analyse if they are due."""
    state, train, stepper = trainer.state, trainer.train, trainer.stepper
    stepper.end_epoch()
    *totals, finite = trainer.sums.tolist()
    named = zip(stepper.names, totals, strict=True)
    row = {name: total if name == CLIPPED else total / max(finite, 1.0) for name, total in named}
    trainer.sums.zero_()
    if trainer.plan.objective.scores and "reconstruction" not in row:  # Pyro's own loss
        row |= {"beta": float(trainer.loss.beta)}
    elif trainer.plan.objective.scores:
        kl = sum(value for name, value in row.items() if name.startswith("kl/"))
        row |= {"kl": kl, trainer.total: row["reconstruction"] - kl, "beta": float(trainer.loss.beta)}
    state.epoch += 1
    common = {"epoch": state.epoch, "step": state.step, "seconds": round(state.seconds, 3)}
    lr = float(trainer.optimizer.param_groups[0]["lr"])
    trainer.files.log_metrics({**common, "split": "train", **row, "lr": lr, "skipped": state.skipped})
    note = f"epoch {state.epoch}/{train.epochs} {in_words(row)}"
    if state.epoch % train.validate_every == 0 or state.epoch == train.epochs:
        note = f"{note} validation {validate(trainer, common, row.get('loss', 0.0))}"
    bar.update(state.step, note)
    if trainer.analyse_every and state.epoch % trainer.analyse_every == 0:
        analyse(trainer, common)
    if time.monotonic() - trainer.last_status > STATUS_SECONDS:
        trainer.status("running")


def in_words(row: Mapping[str, float]) -> str:
    """Return an epoch's metrics as text for the progress bar: the ELBO (log joint), or all but norms without one."""
    total = [name for name in ("elbo", "log_joint") if name in row]
    shown = {name: row[name] for name in total or row if "norm" not in name}
    return " ".join(f"{name} {value:.2f}" for name, value in shown.items())


def analyse(trainer: Trainer, common: Mapping[str, Any]) -> None:
    """Log the ELBO surgery that `analysis.every` asks for, of the averaged weights if the fit averages them.

    An analysis that fails is reported as an event, and no further one is tried.
    """
    from pvae.analysis.decompose.surgery import record  # here, because it imports plots and tables

    try:
        with swapped(trainer.parameters, trainer.average):
            row = record(trainer.plan, trainer.pair, trainer.data)
    except PvaeError as error:
        trainer.tell("analysis", f"no analysis during this fit: {error}")
        trainer.analyse_every = 0
    else:
        trainer.files.log_metrics({**common, "split": "analysis", **row})


def judged(trainer: Trainer, figures: dict[str, float], loss: float) -> float:
    """Return the figure that ranks the weights, less penalties of the guide's factors; add it to the other figures."""
    plan, pair, name, epochs = trainer.plan, trainer.pair, trainer.figure, trainer.train.epochs
    if name == FITTED:
        return -loss
    beta, penalties = plan.objective.beta.at(epochs, epochs), 0.0
    if (ready := maximised(name, plan.objective, figures, beta)) is not None:
        figures[name], penalties = ready, sum(v for key, v in figures.items() if key.startswith("penalty/"))
    else:
        figures[name] = held_out(plan.objective, pair, trainer.data.validation.rows, plan.seed, trainer.loss.rows, beta)
    return figures[name] - penalties


def validate(trainer: Trainer, common: Mapping[str, Any], loss: float) -> str:
    """Log the validation metrics, of the averaged weights if there are any, and update the best weights and patience.

    `loss` is the mean of the epoch's training losses.

    Returns the result as text for the progress bar.
    """
    state, train, held, seed = trainer.state, trainer.train, trainer.data.validation.rows, trainer.plan.seed
    common = {**common, "split": "validation"}
    with swapped(trainer.parameters, trainer.average):
        if (measured := trainer.plan.objective.measure(trainer.pair, held, seed)) is not None:
            trainer.files.log_metrics({**common, **measured})
            return in_words(measured)
        figures = evaluate(trainer.pair, held, seed, len(trainer.data.train)) | code_usage(trainer.pair, held, seed)
        figures |= seen_by(trainer.plan, trainer.pair, trainer.data, trainer.data.validation)
        score = judged(trainer, figures, loss)
        if better := score > state.best + (CONVERGED if trainer.figure == FITTED else 0.0):
            state.best, state.best_epoch, state.waited, state.elbo = score, state.epoch, 0, figures[trainer.total]
            if train.keep == "best":
                trainer.best = {name: value.detach().clone() for name, value in trainer.pair.state_dict().items()}
    beta, before = trainer.plan.objective.beta, state.epoch - train.validate_every
    if not better and beta.at(state.epoch, train.epochs) == beta.at(before, train.epochs):
        state.waited += 1  # only while the weight of the KL has not changed since the last validation
    trainer.files.log_metrics({**common, **figures})
    if train.patience is not None and state.waited >= train.patience:
        state.stopped = True
        why = f"{named(trainer.figure)} not better for {state.waited} validations"
        trainer.tell("stop", f"{why}: stopped at epoch {state.epoch}")
    return f"{figures[trainer.total]:.2f}"


def final_alerts(trainer: Trainer) -> None:
    """Log the alerts (collapsed latents, dead codes, scales at bounds) for the weights that the run keeps."""
    if trainer.files.degraded is not None:
        trainer.tell("alert", f"the record of this run has gaps: {trainer.files.degraded}")
    if not trainer.plan.objective.scores:
        return
    places: Sequence[Tensor] = trainer.parameters
    kept: Sequence[Tensor] | None = trainer.average
    if trainer.best is not None:  # with codebooks and the like, which are no parameters
        own = trainer.pair.state_dict()
        places, kept = list(own.values()), [trainer.best[name].to(trainer.device) for name in own]
    with swapped(places, kept):
        try:
            found = alerts(trainer.plan, trainer.pair, trainer.data.validation.rows[:ALERT_ROWS], trainer.plan.seed)
        except (RuntimeError, ValueError) as error:
            if not is_refused_draw(error):
                raise
            found = [f"the weights that are kept give no distribution: {first_line(error)}"]
    for message in found:
        trainer.tell("alert", message)
