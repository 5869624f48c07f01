"""State of one fit in one process: weights, optimiser, data, schedules, and the noise of every step.

A batch that the processes of a fit share: the noise and rows of every shard, sums over them, and signals.
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any, Self

import torch
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from pvae.data import Dataset
from pvae.errors import is_refused_draw, printable
from pvae.experiment.experiment import Experiment
from pvae.experiment.plan import Plan
from pvae.nn import precision, schedules
from pvae.objectives.base import Fitting, Loss, Stepper
from pvae.pair.pair import Pair
from pvae.runs import RunDirectory, checkpoint, seal
from pvae.training.step import Step, learned, make_capturable, restored, set_lr
from pvae.util import group, seeds

Count = Annotated[int, Field(ge=0, lt=1 << 53)]
Figure = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(config=ConfigDict(strict=True, extra="forbid"))
class State:
    """Progress of a fit, stored in every checkpoint.

    `best` is the best validation figure that the objective names, `elbo` the validation ELBO of these weights, `waited`
    the number of validations that patience has counted, `skipped` the number of steps that were not finite and changed
    no weight.
    """

    step: Count = 0
    epoch: Count = 0
    best: Figure = -math.inf
    elbo: Figure = -math.inf
    best_epoch: Annotated[int, Field(ge=-1, lt=1 << 53)] = -1
    waited: Count = 0
    rollbacks: Count = 0
    skipped: Count = 0
    seconds: Annotated[float, Field(ge=0, lt=1 << 53)] = 0.0
    stopped: bool = False

    @classmethod
    def of(cls, saved: checkpoint.Checkpoint) -> Self:
        """Return the state stored in a checkpoint, without its key `select`.

        Raises ValueError, which names the entry, if one is invalid.
        """
        try:
            state = cls(**{key: value for key, value in saved.state.items() if key != "select"})
        except ValidationError as error:
            wrong = error.errors()[0]
            raise ValueError(f"state.json has {wrong['loc'][0]} = {wrong['input']!r}") from error
        late = [key for key in ("epoch", "best_epoch", "waited") if getattr(state, key) > saved.step]
        for key in late or ["step"] * (state.step != saved.step):
            raise ValueError(f"state.json has {key} = {getattr(state, key)} in a checkpoint of step {saved.step}")
        return state


class Trainer:
    """Weights, optimiser, averaged weights and progress of a fit, with its data and run directory.

    The functions of `loop` and `recovery` act on it.

    Arguments:
        plan: objective and settings of the fit.
        pair: model and guide to fit; parameters without `requires_grad` stay unchanged.
        data: the data set, of which the training split is fitted.
        files: the run directory.
        device: device of weights and data.
        engine: "eager", "compiled" or "captured"; see `Step`.
        show: print events and progress on standard error.
    """

    stepper: Stepper

    def __init__(
        self, plan: Plan, pair: Pair, data: Dataset, files: RunDirectory, device: torch.device, engine: str, show: bool
    ) -> None:
        self.plan, self.train, self.files, self.device = plan, plan.train, files, device
        self.sealed = seal.seal(files, plan.to_toml())
        self.engine, self.show = engine, show
        self.data = data.to(device)
        known = [*plan.known(self.data.train).values()] if isinstance(plan, Experiment) else []
        self.known = torch.cat(known, 1) if known else None
        """Values of observed latents in the training rows, which a batch has in its last columns; None without any."""
        self.labelled = None if self.known is None else (~self.known.isnan()).any(1).nonzero().squeeze(1)
        """Numbers of the training rows in which a latent is observed."""
        self.pair = pair.to(device, plan.objective.dtype)
        self.dtype = plan.objective.dtype or data.train.rows.dtype
        self.precision = str(files.manifest.get("precision", precision.resolved(self.train.precision, device)))
        self.total = self.pair.structure.total
        """Name of reconstruction - KL among the metrics."""
        figure = str(files.manifest.get("figure", "elbo"))
        self.figure = self.total if figure == "elbo" else figure
        """Name of the validation figure that ranks weights; the total in runs of earlier versions."""
        self.loss = Loss(plan.objective, self.pair, len(data.train), self.precision).to(device)
        self.names = [name for name, p in self.pair.named_parameters() if p.requires_grad]
        self.parameters = learned(self.pair)
        self.optimizer = self.train.optimizer.build(self.parameters)
        if device.type == "cuda":
            make_capturable(self.optimizer, device)
        self.average = [p.detach().clone() for p in self.parameters] if self.train.average else None
        self.best: dict[str, Tensor] | None = None
        self.state = State()
        self.analyse_every = plan.analysis.every
        self.sums = torch.zeros(0)
        """Sums of the metrics over the finite steps of an epoch; the last entry is the number of these steps."""
        self.gathered: dict[str, Tensor] = {}
        """Sums that an objective with a step of its own keeps over an epoch; see `Fitting.gathered`."""
        self.made_of_data = self.pair.made_of_data()
        self.scheduled = [part for part in self.pair.modules() if isinstance(part, schedules.Scheduled)]
        self.batch = min(self.train.batch_size, len(data.train))
        self.per_epoch = math.ceil(len(data.train) / self.batch)
        self.shards = group.Shards(self.train.shards)
        self.stopping: int | None = None
        """Signal that this process received before the step; after a step in shards, one that any process received."""
        self.due = False
        """True if a checkpoint is to be written after the step; with several processes by the clock of the first."""
        self.turns = turns(self.pair, self.train.alternate)
        self.started = self.last_checkpoint = time.monotonic()
        self.last_status = 0.0

    def tell(self, kind: str, message: str) -> None:
        """Log an event in the run directory, and print it if `show` is set."""
        self.files.log_event(kind, message)
        if self.show:
            print(printable(f"pvae: {message}"), file=sys.stderr, flush=True)

    def status(self, state: str, **fields: Any) -> None:
        """Write the status file of the run: state, epoch, step, best figure, elapsed seconds and `fields`."""
        s = self.state
        if self.plan.objective.scores:
            less = "_less_penalties" if self.pair.layout.factors else ""
            found = {self.total: s.elbo, self.figure: s.best} if not less else {f"{self.figure}{less}": s.best}
            fields |= {name: value if math.isfinite(value) else None for name, value in found.items()}
        told = {"state": state, "epoch": s.epoch, "epochs": self.train.epochs, "step": s.step, "engine": self.engine}
        self.files.update_status(**told, seconds=round(s.seconds, 1), skipped=s.skipped, **fields)
        self.last_status = time.monotonic()

    def clock(self) -> None:
        """Update the elapsed seconds in the state of the fit."""
        self.state.seconds = time.monotonic() - self.started

    # ------------------------------------------------------------------ a step

    def follow_schedules(self, step: int) -> None:
        """Set beta, temperatures and the learning rate to their scheduled values at a step."""
        train, epoch = self.train, step / self.per_epoch
        self.loss.beta.fill_(self.plan.objective.beta.at(epoch, train.epochs))
        warm = min(1.0, (step + 1) / (train.warmup * self.per_epoch)) if train.warmup else 1.0
        for part in self.scheduled:
            if part.training:
                part.follow(epoch, train.epochs)
        set_lr(self.optimizer, train.optimizer.lr * train.schedule.at(epoch, train.epochs) * warm)

    def draw(self, index: Tensor, shard: int | None = None, phase: int = 0) -> Tensor:
        """Seed the noise of the next step, differently after each rollback; return its batch: training rows `index`.

        With a shard the rows are those of the shard, and the noise is that of this shard and phase of the step.
        """
        seed = seeds.mix(self.plan.seed, seeds.NOISE, self.state.step + (self.state.rollbacks << 40))
        if shard is not None:
            seed = seeds.mix(seed, seeds.SHARD, phase * self.shards.count + shard)
        seeds.set_noise(seed, self.device)
        return self.rows(index)

    def rows(self, index: Tensor) -> Tensor:
        """Return the training rows `index`, after passing `index` to the modules that hold the training data."""
        for part in self.made_of_data:
            part.start(index)
        rows = self.data.train.draw(index).to(self.dtype)
        if self.known is not None:
            rows[:, -self.known.shape[1] :] = self.known[index]
        return rows

    def batch_of(self, index: Tensor) -> Tensor:
        """Return the rows of the next batch: `index`, of which `train.labelled` are labelled rows in place of others.

        They are spread over the batch, and drawn with replacement.
        """
        count = round((self.train.labelled or 0.0) * len(index))
        if not count or self.labelled is None or not len(self.labelled):
            return index
        chosen = seeds.generator(self.plan.seed, seeds.LABELS, self.state.step)
        index = torch.as_tensor(index).clone()
        drawn = torch.randint(len(self.labelled), (count,), generator=chosen).to(self.device)
        index[torch.arange(count) * len(index) // count] = self.labelled[drawn]
        return index

    def make_stepper(self) -> None:
        """Build the step of the fit: the objective's own, or a gradient step, eager if compilation fails."""
        average = (self.average, self.train.average) if self.average is not None and self.train.average else None
        clip = self.train.clip_norm or (None if self.train.nonfinite == "stop" else math.inf)
        how = self.gathered, self.tell, self.optimizer, clip, average
        fitting = Fitting(self.loss, self.data.train, self.per_epoch, self.plan.seed, *how)
        self.stepper = self.plan.objective.stepper(fitting) or self._step(clip, average)
        if len(self.sums) != len(self.stepper.names) + 1:
            self.sums = torch.zeros(len(self.stepper.names) + 1, dtype=torch.float64, device=self.device)

    def _step(self, clip: float | None, average: tuple[Sequence[Tensor], float] | None) -> Step:
        example = self.rows(torch.arange(self.shards.rows(self.batch), device=self.device))
        engine = self.engine
        make = partial(Step, self.loss, self.optimizer, example=example, clip_norm=clip, average=average)
        if self.engine == "compiled":
            self.tell("engine", "compiling the step (export + Inductor): half a minute, less if its code is kept")
        try:
            step = make(engine=self.engine)
        except Exception as error:  # a missing compiler or an operation it cannot take must not stop a fit
            if self.engine == "eager":
                raise
            self.tell("engine", f"{self.engine} step not available, going on eagerly: {first_line(error)}")
            self.engine, step = "eager", make(engine="eager")
        eager = group.dealt(group.size(), lambda _: {"eager": torch.tensor(self.engine == "eager")})
        if self.engine != "eager" and any(bool(part["eager"]) for part in eager):  # another process has no faster one
            self.engine, step = "eager", make(engine="eager")
        if self.engine != engine:
            self.files.write_manifest({**self.files.manifest, "engine": self.engine})
        self.tell("engine", f"{self.engine} step")
        return step


def turns(pair: Pair, guide_steps: int) -> list[list[nn.Parameter]]:
    """Return the parameters that each step of a cycle leaves unchanged, if guide and model take turns.

    First come `guide_steps` steps of the guide, then one of the model; 0 makes every step update both, as every step
    does for parameters that model and guide share.
    """
    if not guide_steps:
        return [[]]
    named = list(pair.named_parameters(remove_duplicate=False))
    model, guide = ({p for name, p in named if name.startswith(side)} for side in ("model.", "guide."))
    return [*[[*(model - guide)]] * guide_steps, [*(guide - model)]]


@contextmanager
def swapped(parameters: Sequence[Tensor], values: Sequence[Tensor] | None) -> Iterator[None]:
    """Set tensors to other values inside a `with` block and restore them after it; None leaves them unchanged."""
    if values is None:
        yield
        return
    with torch.no_grad(), restored(parameters):
        torch._foreach_copy_([p.data for p in parameters], list(values))
        yield


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, at most 200 characters."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


# ---------------------------------------------------------------------- a batch that processes share


SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Signals that ask a fit to stop."""


class ShardedBatch:
    """One batch in shards (`Parts`): every process adds its own shards, and all get the same sum.

    Arguments:
        trainer: the fit.
        index: rows of the batch in the training data.
    """

    def __init__(self, trainer: Trainer, index: Tensor) -> None:
        self.trainer, self.index = trainer, index
        self.count = trainer.shards.count

    def total(self, work: Callable[[Tensor, float, int], Tensor], width: int, phase: int = 0) -> Tensor:
        """Return the sum of `work` over the shards; tell the trainer of a signal that any process received.

        The first process alone decides if a checkpoint is due: the others wait until it is written.
        """
        flags, total = self.trainer.shards.total(self._parts(work, width, phase)).split([len(SIGNALS) + 1, width])
        *told, due = flags.tolist()
        self.trainer.due = due > 0
        self.trainer.stopping = next((int(number) for number, n in zip(SIGNALS, told, strict=True) if n > 0), None)
        return total

    def _parts(self, work: Callable[[Tensor, float, int], Tensor], width: int, phase: int) -> Iterator[Tensor]:
        """Yield the vectors of this process's shards, after numbers for all to know; NaN where nothing is drawn."""
        bounds = self.trainer.shards.bounds(len(self.index))
        told = [float(self.trainer.stopping == number) for number in SIGNALS]
        for shard in self.trainer.shards.mine:
            start, stop = bounds[shard]
            found = torch.zeros(width, device=self.index.device)
            if stop > start:
                try:
                    x = self.trainer.draw(self.index[start:stop], shard, phase)
                    found = work(x, (stop - start) / len(self.index), shard)
                except (RuntimeError, ValueError) as error:
                    if not is_refused_draw(error):
                        raise
                    found = torch.full((width,), torch.nan, device=self.index.device)
            yield torch.cat([found.new_tensor([*told, float(self.trainer.due and shard == 0)]), found])
