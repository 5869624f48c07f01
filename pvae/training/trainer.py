"""One fit in one process: steps, epochs, validation, checkpoints, signals."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import Any, NoReturn

import pyro
import torch
from torch import Tensor, nn

from pvae.data import Dataset
from pvae.errors import (
    CheckpointError,
    DeviceError,
    Interrupted,
    NonFiniteError,
    PvaeError,
    StorageError,
    device_lost,
    is_refused_draw,
    out_of_memory,
    printable,
)
from pvae.experiment.experiment import Plan
from pvae.nn.schedules import Scheduled
from pvae.objectives.base import Fitting, Loss, Stepper
from pvae.pair.code_usage import code_usage
from pvae.pair.pair import Pair
from pvae.runs import checkpoint
from pvae.runs.run import load_weights
from pvae.runs.rundir import RunDirectory
from pvae.training.alerts import ROWS, alerts
from pvae.training.begin import begin
from pvae.training.diagnose import bad_figures, bad_weights, diagnose
from pvae.training.evaluation import evaluate
from pvae.training.step import (
    CLIPPED,
    Step,
    is_finite,
    load_optimizer_tensors,
    make_capturable,
    optimizer_tensors,
    set_lr,
)
from pvae.util import seeds
from pvae.util.files import write_atomic
from pvae.util.progress import ProgressBar

STATUS_SECONDS = 2.0
MAX_ROLLBACKS = 3
DUMP = "nonfinite_batch.safetensors"
SIGNALS = tuple(s for s in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, s))


Record = Callable[[Plan, Pair, Dataset], dict[str, float]]
"""What `analysis.every` asks for: figures of a pair on its data, by name."""


def _told(row: Mapping[str, float]) -> str:
    """The figures of an epoch that progress shows: the ELBO, or what there is in its place."""
    shown = {"elbo": row["elbo"]} if "elbo" in row else {k: v for k, v in row.items() if "norm" not in k}
    return " ".join(f"{name} {value:.2f}" for name, value in shown.items())


@contextmanager
def swapped(parameters: Sequence[Tensor], values: Sequence[Tensor] | None) -> Iterator[None]:
    """Put other values into parameters for a while."""
    if values is None:
        yield
        return
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_copy_([p.data for p in parameters], list(values))
        try:
            yield
        finally:
            torch._foreach_copy_([p.data for p in parameters], kept)


# ---------------------------------------------------------------------- the loop


@dataclass
class State:
    """Where a fit is; all of it is in every checkpoint."""

    step: int = 0
    epoch: int = 0
    best: float = -math.inf
    best_epoch: int = -1
    waited: int = 0
    rollbacks: int = 0
    skipped: int = 0
    seconds: float = 0.0
    stopped: bool = False

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> State:
        """The state in a checkpoint, which also says what was `select`ed; raises ValueError for another."""
        known, found = asdict(cls()), {key: value for key, value in saved.items() if key != "select"}
        for key, value in found.items():
            kind = type(known.get(key))
            number = kind is not bool and isinstance(value, int | float) and not isinstance(value, bool)
            if type(value) is not kind and not (kind is float and number):
                raise ValueError(f"state.json has {key} = {value!r}")
            if number and key != "best" and not -1 <= value < 1 << 53:
                raise ValueError(f"state.json has {key} = {value!r}")
        return replace(cls(), **found)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


class Stop:
    """Remembers a signal so that the loop can finish its step; a second one exits at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.old: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = int(getattr(signal, name))
                self.old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number


class Trainer:
    """One fit in one process: owns weights, optimiser and state between two checkpoints."""

    def __init__(
        self,
        plan: Plan,
        pair: Pair,
        data: Dataset,
        files: RunDirectory,
        device: torch.device,
        engine: str,
        *,
        record: Record | None = None,
        show: bool = True,
    ) -> None:
        self.record = record
        self.plan, self.train, self.files, self.device, self.show = plan, plan.train, files, device, show
        self.data = data.to(device)
        self.pair = pair.to(device, plan.objective.dtype)
        self.dtype = plan.objective.dtype or data.train.rows.dtype
        self.loss = Loss(plan.objective, self.pair, len(data.train), self.train.precision).to(device)
        self.names = [name for name, p in self.pair.named_parameters() if p.requires_grad]
        self.parameters = [p for p in self.pair.parameters() if p.requires_grad]
        self.optimizer = self.train.optimizer.build(self.parameters)
        if device.type == "cuda":
            make_capturable(self.optimizer, device)
        decay = self.train.average
        self.average = [p.detach().clone() for p in self.parameters] if decay else None
        self.best: dict[str, Tensor] | None = None
        self.state = State()
        self.sums: Tensor | None = None
        self.gathered: dict[str, Tensor] = {}
        self.engine = engine
        self.made_of_data = self.pair.made_of_data()
        self.scheduled = [part for part in self.pair.modules() if isinstance(part, Scheduled)]
        self.batch = min(self.train.batch_size, len(data.train))
        self.per_epoch = math.ceil(len(data.train) / self.batch)
        self.groups = self._alternation()
        self.last_checkpoint = time.monotonic()
        self.last_status = 0.0

    def _alternation(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(frozen during guide steps, frozen during model steps)."""
        if not self.train.alternate:
            return [], []
        model = {name: p for name, p in self.pair.named_parameters(remove_duplicate=False) if name.startswith("model.")}
        guide = {name: p for name, p in self.pair.named_parameters(remove_duplicate=False) if name.startswith("guide.")}
        both = {id(p) for p in model.values()} & {id(p) for p in guide.values()}  # these move in every step
        return [p for p in model.values() if id(p) not in both], [p for p in guide.values() if id(p) not in both]

    def tell(self, kind: str, message: str) -> None:
        """An event for the record and for whoever watches."""
        self.files.log_event(kind, message)
        if self.show:
            print(printable(f"pvae: {message}"), file=sys.stderr, flush=True)

    # -------------------------------------------------------------- running

    def run(self) -> None:
        """Train until the end, a stop rule, or a signal; leaves the random state as it found it."""
        devices = [self.device] if self.device.type == "cuda" else []
        started = time.monotonic() - self.state.seconds
        self.files.truncate_metrics(self.state.epoch)
        self._status("running")
        with torch.random.fork_rng(devices=devices), pyro.validation_enabled(False), Stop() as stop, self._enough():
            if self.state.step == 0:
                self._schedules(0)
                begin(self.pair, self.data.train, self.batch, self.plan.seed)
                if self.average is not None:
                    torch._foreach_copy_(self.average, [p.detach() for p in self.parameters])
            self.stepper = self._stepper()
            if self.state.step == 0:
                self.stepper.begin()
                self._save()
            with ProgressBar(self.train.epochs * self.per_epoch, self.plan.name, show=self.show) as bar:
                while self.state.epoch < self.train.epochs and not self.state.stopped:
                    self._epoch(stop, bar, started)
            self.state.seconds = time.monotonic() - started
        if bad := bad_weights(self.pair):
            self._fail(f"weights not finite after the last step ({bad[0]})")
        self._save()
        self.pair.eval()  # nothing announced to it holds any longer
        self._alerts()
        self._status("finished")

    def _stepper(self) -> Stepper:
        average = (self.average, self.train.average) if self.average is not None and self.train.average else None
        watch = self.train.nonfinite != "stop"
        own = self.plan.objective.stepper(
            Fitting(
                self.loss, self.data.train, self.per_epoch, self.plan.seed, self.gathered, self.tell, self.optimizer,
                self.train.clip_norm or (math.inf if watch else None), average,
            )
        )  # fmt: skip
        if own is not None:
            return own
        example = self._rows(torch.arange(self.batch, device=self.device))
        make = {"clip_norm": self.train.clip_norm, "watch": watch, "average": average}
        try:
            if self.engine == "compiled":
                self.tell("engine", "compiling the step (export + Inductor): up to half a minute, once")
            stepper = Step(self.loss, self.optimizer, self.engine, example, **make)  # type: ignore[arg-type]
        except Exception as error:  # a missing compiler or an operation it cannot take must not stop a fit
            if self.engine == "eager":
                raise
            self.tell(
                "engine", f"{self.engine} step not available, going on eagerly: {str(error).splitlines()[0][:200]}"
            )
            self.engine = "eager"
            self.files.write_manifest({**self.files.manifest, "engine": "eager"})
            stepper = Step(self.loss, self.optimizer, "eager", example, **make)  # type: ignore[arg-type]
        self.tell("engine", f"{self.engine} step")
        return stepper

    def _epoch(self, stop: Stop, bar: ProgressBar, started: float) -> None:
        state = self.state
        order = self.data.train.order(self.plan.seed, state.epoch)
        if self.sums is None:
            self.sums = torch.zeros(len(self.stepper.names) + 1, dtype=torch.float64, device=self.device)
        while state.step < (state.epoch + 1) * self.per_epoch:
            position = (state.step - state.epoch * self.per_epoch) * self.batch
            index = order[position : position + self.batch]
            if not self._step(index):
                return
            if stop.signal is not None:
                self._interrupted(stop.signal, started)
            if self._due():
                state.seconds = time.monotonic() - started
                self._save()
            if state.step % 20 == 0:
                bar.update(state.step)
        state.seconds = time.monotonic() - started
        self._end_of_epoch(bar)

    def _step(self, index: Tensor) -> bool:
        """One optimisation step; False when the fit was rolled back."""
        state = self.state
        self._schedules(state.step)
        x = self._draw(index)
        frozen = self._frozen(state.step)
        try:
            out = self.stepper(x, frozen) if frozen else self.stepper(x)
        except (RuntimeError, ValueError) as error:
            if not is_refused_draw(error):
                raise
            return self._next(self._handle(f"no draw at step {state.step}: {_first_line(error)}", 1))
        if not out.is_cuda and not is_finite(out):
            return self._not_finite(x, index, out)
        self._accumulate(out)
        state.step += 1
        return state.step % self.per_epoch != 0 or self._all_finite()

    def _accumulate(self, out: Tensor) -> None:
        """Sums over the epoch, and in the last place how many steps were finite; no synchronisation."""
        assert self.sums is not None  # noqa: S101 - `_epoch` has made it
        if out.is_cuda:
            finite = out[0].isfinite() & out[-1].isfinite()
            self.sums[:-1] += torch.where(finite, out, 0.0)
            self.sums[-1] += finite
        else:
            self.sums[:-1] += out
            self.sums[-1] += 1

    def _noise_seed(self) -> int:
        """Of the step to come; another one after a rollback."""
        return seeds.mix(self.plan.seed, seeds.NOISE, self.state.step + (self.state.rollbacks << 40))

    def _frozen(self, step: int) -> list[nn.Parameter]:
        k = self.train.alternate
        return [] if not k else self.groups[0 if step % (k + 1) < k else 1]

    def _schedules(self, step: int) -> None:
        """Beta, temperatures and the learning rate as a step wants them."""
        train, epoch = self.train, step / self.per_epoch
        self.loss.beta.fill_(self.plan.objective.beta.at(epoch, train.epochs))
        warm = min(1.0, (step + 1) / (train.warmup * self.per_epoch)) if train.warmup else 1.0
        for part in self.scheduled:
            if part.training:
                part.follow(epoch, train.epochs)
        set_lr(self.optimizer, train.optimizer.lr * train.schedule.at(epoch, train.epochs) * warm)

    # -------------------------------------------------------------- when memory or the device goes

    @contextmanager
    def _enough(self) -> Iterator[None]:
        """Where memory runs out or the device is lost: keep what can be kept, and say what would fit."""
        try:
            yield
        except Exception as error:
            if is_refused_draw(error):
                self._fail(f"no draw after step {self.state.step}: {_first_line(error)}")
            lost = device_lost(error)
            if not lost and not out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed step
            message = f"{'device lost' if lost else 'out of memory'} at step {self.state.step} on {self.device}"
            advice = "" if lost else self._emergency()
            with suppress(RuntimeError):  # of a device that does not answer
                self._status("failed", error=message)
            raise DeviceError(
                f"Expected a fit that goes through; got {message} ({_first_line(error)}). {advice}Go on "
                f"from the last checkpoint with: pvae resume {self.files.path}, on another device if need be."
            ) from error

    def _emergency(self) -> str:
        """A checkpoint, and what would fit in place of the batch that did not."""
        for parameter in self.parameters:
            parameter.grad = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        stepper: Stepper | None = getattr(self, "stepper", None)
        if stepper is None or not stepper.moving_now:  # half of a step is in no weights that a run could go on from
            with suppress(StorageError):
                self._save()
        rows = self._fitting_rows() if self.plan.objective.scores else None
        if rows is None:
            return "A smaller train.batch_size or smaller networks need less. "
        if rows == 0:
            return "Not even one row fits: make the networks smaller. "
        return f"Batches of {rows} rows fit: add train.batch_size={rows} --allow-changes. "

    def _fitting_rows(self) -> int:
        """The largest batch whose loss and gradient go through, found by halving; 0 where none does."""
        rows = self.batch // 2
        while rows:
            try:
                self.loss(self._rows(torch.arange(rows, device=self.device)))[0].backward()
                return rows
            except Exception as error:
                if not out_of_memory(error):
                    raise
                traceback.clear_frames(error.__traceback__)
                rows //= 2
            finally:
                for parameter in self.parameters:
                    parameter.grad = None
        return 0

    # -------------------------------------------------------------- when it is not finite

    def _all_finite(self) -> bool:
        """At the end of an epoch: on a GPU steps are not watched one by one, their finite ones are counted."""
        assert self.sums is not None  # noqa: S101 - `_epoch` has made it
        if self.device.type != "cuda":
            return True
        missing = self.per_epoch - int(self.sums[-1])
        message = f"loss not finite in {missing} of {self.per_epoch} steps of epoch {self.state.epoch}"
        return not missing or self._handle(message, missing)

    def _draw(self, index: Tensor) -> Tensor:
        """The batch of the step to come, its noise drawn first."""
        seeds.set_noise(self._noise_seed(), self.device)
        return self._rows(index)

    def _rows(self, index: Tensor) -> Tensor:
        """Rows of the training data, announced to the parts that ask which they are."""
        for part in self.made_of_data:
            part.start(index)
        return self.data.train.draw(index).to(self.dtype)

    def _not_finite(self, x: Tensor, index: Tensor, out: Tensor) -> bool:
        """A step whose loss or gradient is not finite, before it moved anything; False when rolled back."""
        state = self.state
        if self.plan.objective.scores:
            why = diagnose(self.loss, lambda: self._draw(index), index)
        else:
            why = bad_figures(self.pair, self.stepper.names, out)
        message = (
            f"loss not finite at step {state.step} (epoch {state.epoch}): {why}; last finite step {state.step - 1}"
        )
        if self.train.nonfinite != "skip":
            self._dump(x, index)
        return self._next(self._handle(message, 1))

    def _next(self, going_on: bool) -> bool:
        """Count a step that moved nothing, unless the fit was rolled back."""
        self.state.step += going_on
        return going_on

    def _handle(self, message: str, steps: int) -> bool:
        """Follow the declared policy: True to go on with the next step, False after a rollback, else an error."""
        if self.train.nonfinite == "skip" and not bad_weights(self.pair):
            self.state.skipped += steps
            self.tell("nonfinite", f"{message}; skipped")
            return True
        if self.train.nonfinite == "rollback" and self.state.rollbacks < MAX_ROLLBACKS and self._roll_back(message):
            return False
        return self._fail(message)

    def _fail(self, message: str) -> NoReturn:
        self._status("failed", error=message)
        dumped = self.files.path / "analysis" / DUMP
        where = f" The batch is in analysis/{DUMP}." if dumped.is_file() else ""
        raise NonFiniteError(
            f"{message}. Lower the learning rate, set train.clip_norm, tighten log_variance bounds, or set "
            f"train.nonfinite = 'skip' or 'rollback'.{where}"
        )

    def _roll_back(self, message: str) -> bool:
        saved = checkpoint.latest(self.files.path / "checkpoints", report=lambda line: self.tell("fallback", line))
        if saved is None:
            return False
        rollbacks = self.state.rollbacks + 1
        self.restore(saved)
        self.state.rollbacks = rollbacks
        self.files.truncate_metrics(self.state.epoch)
        if self.engine == "captured":  # the graph holds the tensors of the optimiser's former state
            self.stepper = self._stepper()
        self.tell("nonfinite", f"{message}; rolled back to step {self.state.step}, with other noise")
        return True

    def _dump(self, x: Tensor, index: Tensor) -> None:
        from safetensors.torch import save

        content = save({"x": x.detach().cpu().contiguous(), "index": index.cpu().contiguous()})
        try:
            write_atomic(self.files.analysis / DUMP, content)
        except StorageError as error:  # the diagnosis is worth more than the batch
            self.tell("storage", str(error))

    # -------------------------------------------------------------- between epochs

    def _end_of_epoch(self, bar: ProgressBar) -> None:
        state = self.state
        self.stepper.end_epoch()
        assert self.sums is not None
        means = dict(zip(self.stepper.names, (self.sums[:-1] / self.sums[-1].clamp(min=1)).tolist(), strict=True))
        counted = dict(zip(self.stepper.names, self.sums[:-1].tolist(), strict=True))
        row = {name: counted[name] if name == CLIPPED else value for name, value in means.items()}
        self.sums.zero_()
        if self.plan.objective.scores:
            kl = sum(value for name, value in row.items() if name.startswith("kl/"))
            row |= {"kl": kl, "elbo": row["reconstruction"] - kl, "beta": float(self.loss.beta)}
        state.epoch += 1
        lr = float(self.optimizer.param_groups[0]["lr"])
        common = {"epoch": state.epoch, "step": state.step, "seconds": round(state.seconds, 3)}
        self.files.log_metrics({**common, "split": "train", **row, "lr": lr, "skipped": state.skipped})
        note = f"epoch {state.epoch}/{self.train.epochs} {_told(row)}"
        if state.epoch % self.train.validate_every == 0 or state.epoch == self.train.epochs:
            note = f"{note} validation {self._validate(common)}"
        bar.update(state.step, note)
        if self.record and self.plan.analysis.every and state.epoch % self.plan.analysis.every == 0:
            self._record(self.record, common)
        if time.monotonic() - self.last_status > STATUS_SECONDS:
            self._status("running")

    def _record(self, record: Record, common: dict[str, Any]) -> None:
        """An analysis of the weights that would be kept; one that fails is told and not tried again."""
        try:
            with swapped(self.parameters, self.average):
                row = record(self.plan, self.pair, self.data)
        except PvaeError as error:
            self.tell("analysis", f"no analysis during this fit: {error}")
            self.record = None
            return
        self.files.log_metrics({**common, "split": "analysis", **row})

    def _validate(self, common: dict[str, Any]) -> str:
        """Validation of the weights that would be kept, in words; by ELBO remembers the best and counts patience."""
        state, held = self.state, self.data.validation.rows
        with swapped(self.parameters, self.average):
            row = self.plan.objective.measure(self.pair, held, self.plan.seed)
            if row is not None:
                self.files.log_metrics({**common, "split": "validation", **row})
                return _told(row)
            seed, fitted = self.plan.seed, len(self.data.train)
            row = {**evaluate(self.pair, held, seed, fitted), **code_usage(self.pair, held, seed)}
            better = row["elbo"] > state.best
            if better:
                state.best, state.best_epoch, state.waited = row["elbo"], state.epoch, 0
                self._remember()
        if not better and self._beta_rests():
            state.waited += 1
        self.files.log_metrics({**common, "split": "validation", **row})
        if self.train.patience is not None and state.waited >= self.train.patience:
            state.stopped = True
            self.tell(
                "stop", f"validation ELBO not better for {state.waited} validations: stopped at epoch {state.epoch}"
            )
        return f"{row['elbo']:.2f}"

    def _beta_rests(self) -> bool:
        """Patience waits while beta moves: the model is still being led to its bound."""
        beta, epochs, epoch = self.plan.objective.beta, self.train.epochs, self.state.epoch
        return beta.at(epoch, epochs) == beta.at(epoch - self.train.validate_every, epochs)

    def _remember(self) -> None:
        if self.train.keep == "best":
            self.best = {name: value.detach().clone() for name, value in self.pair.state_dict().items()}

    def _alerts(self) -> None:
        """What is worth an alert in the weights that the run keeps; an alert stops nothing."""
        if self.files.degraded is not None:
            self.tell("alert", f"the record of this run has gaps: {self.files.degraded}")
        if not self.plan.objective.scores:
            return
        places: Sequence[Tensor] = self.parameters
        kept: Sequence[Tensor] | None = self.average
        if self.best is not None:  # with codebooks and the like, which are no parameters
            own = self.pair.state_dict()
            places, kept = list(own.values()), [self.best[name].to(self.device) for name in own]
        with swapped(places, kept):
            try:
                found = list(alerts(self.plan, self.pair, self.data.validation.rows[:ROWS], self.plan.seed))
            except (RuntimeError, ValueError) as error:
                if not is_refused_draw(error):
                    raise
                found = [f"the weights that are kept give no distribution: {_first_line(error)}"]
            for message in found:
                self.tell("alert", message)

    # -------------------------------------------------------------- keeping

    def _due(self) -> bool:
        return time.monotonic() - self.last_checkpoint >= self.train.checkpoint_seconds

    def _select(self) -> str:
        return "best" if self.best is not None else "average" if self.average is not None else "weights"

    def _save(self) -> None:
        """Write a checkpoint; a full disk is told and retried at the next occasion, at the end it is an error."""
        if bad := bad_weights(self.pair):
            self.tell("nonfinite", f"no checkpoint at step {self.state.step}: weights not finite ({bad[0]})")
            return
        tensors: dict[str, dict[str, Tensor]] = {
            "weights": dict(self.pair.state_dict()),
            "optimizer": optimizer_tensors(self.optimizer),
        }
        if self.average is not None:
            tensors["average"] = dict(zip(self.names, self.average, strict=True))
        if self.best is not None:
            tensors["best"] = self.best
        if self.sums is not None:
            tensors["progress"] = {"sums": self.sums, **self.gathered}
        state = {k: v for k, v in asdict(self.state).items() if v != -math.inf}
        self._write(tensors, {**state, "select": self._select()})
        self.last_checkpoint = time.monotonic()

    def _write(self, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        last = self.state.stopped or self.state.epoch >= self.train.epochs
        for wait in (0.1, 0.5, 2.0) if last else ():
            try:
                checkpoint.write(self.files.path / "checkpoints", self.state.step, tensors, state)
                return
            except StorageError as error:
                self.tell("storage", f"{error} Trying again.")
                time.sleep(wait)
        try:
            checkpoint.write(self.files.path / "checkpoints", self.state.step, tensors, state)
        except StorageError as error:
            if last:
                raise
            self.tell("storage", str(error))

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Put weights, optimiser, averages and state back as a checkpoint has them.

        Raises:
            CheckpointError: its content is not that of a checkpoint of this fit.
        """
        try:
            self._restore(saved)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{saved.path}: expected the state of this fit; got another: {error}. Go on from the checkpoint before."
            ) from error

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        for group in ("best", "weights"):  # the best are kept as they are: they too must be of this pair
            if group == "weights" or group in saved.tensors:
                load_weights(self.pair, saved.tensors[group], str(saved.path))
        load_optimizer_tensors(self.optimizer, saved.tensors["optimizer"])
        if self.device.type == "cuda":
            make_capturable(self.optimizer, self.device)
        best, average = saved.tensors.get("best"), saved.tensors.get("average")
        self.best = best if self.train.keep == "best" else None
        if self.average is not None and average is not None:  # in place: the step holds these tensors
            torch._foreach_copy_(self.average, [average[name].to(self.device) for name in self.names])
        progress = {name: value.to(self.device) for name, value in saved.tensors.get("progress", {}).items()}
        self.sums = progress.pop("sums", None)
        self.gathered.clear()  # in place: the stepper holds it
        self.gathered.update(progress)
        self.state = State.of(saved.state)
        if self.train.keep == "best" and self.best is None:
            self.state.best = -math.inf
        if self.state.step:
            self._schedules(self.state.step - 1)  # as the last step left them: the end of its epoch may be to come

    def _interrupted(self, number: int, started: float) -> None:
        self.state.seconds = time.monotonic() - started
        self._save()
        self._status("interrupted")
        word = signal.Signals(number).name
        raise Interrupted(
            f"{word} at step {self.state.step}: checkpoint written. Go on with: pvae resume {self.files.path}", number
        )

    def _status(self, state: str, **fields: Any) -> None:
        s = self.state
        if self.plan.objective.scores:
            fields["elbo"] = s.best if math.isfinite(s.best) else None
        self.files.update_status(
            state=state, epoch=s.epoch, epochs=self.train.epochs, step=s.step, engine=self.engine,
            seconds=round(s.seconds, 1), skipped=s.skipped, **fields,
        )  # fmt: skip
        self.last_status = time.monotonic()
