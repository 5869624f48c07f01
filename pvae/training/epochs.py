"""Work at the end of an epoch (metrics, validation, early stopping, analyses) and alerts at the end of a fit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pvae.errors import PvaeError, is_refused_draw
from pvae.pair.code_usage import code_usage
from pvae.training.alerts import ALERT_ROWS, alerts
from pvae.training.evaluation import evaluate
from pvae.training.step import CLIPPED
from pvae.training.trainer import Trainer, first_line, swapped
from pvae.util.progress import ProgressBar

STATUS_SECONDS = 2.0


def end_epoch(trainer: Trainer, bar: ProgressBar) -> None:
    """Log the mean training metrics of an epoch, then validate and analyse if they are due."""
    state, stepper, sums, objective = trainer.state, trainer.stepper, trainer.sums, trainer.plan.objective
    stepper.end_epoch()
    assert sums is not None  # noqa: S101 - the epoch has made it
    *totals, finite = sums.tolist()
    named = zip(stepper.names, totals, strict=True)
    row = {name: total if name == CLIPPED else total / max(finite, 1.0) for name, total in named}
    sums.zero_()
    if objective.scores and "reconstruction" not in row:  # Pyro's own loss
        row |= {"beta": float(trainer.loss.beta)}
    elif objective.scores:
        kl = sum(value for name, value in row.items() if name.startswith("kl/"))
        row |= {"kl": kl, "elbo": row["reconstruction"] - kl, "beta": float(trainer.loss.beta)}
    state.epoch += 1
    common = {"epoch": state.epoch, "step": state.step, "seconds": round(state.seconds, 3)}
    lr = float(trainer.optimizer.param_groups[0]["lr"])
    trainer.files.log_metrics({**common, "split": "train", **row, "lr": lr, "skipped": state.skipped})
    note = f"epoch {state.epoch}/{trainer.train.epochs} {in_words(row)}"
    if state.epoch % trainer.train.validate_every == 0 or state.epoch == trainer.train.epochs:
        note = f"{note} validation {validate(trainer, common)}"
    bar.update(state.step, note)
    every = trainer.plan.analysis.every
    if trainer.record and every and state.epoch % every == 0:
        analyse(trainer, common)
    if time.monotonic() - trainer.last_status > STATUS_SECONDS:
        trainer.status("running")


def in_words(row: Mapping[str, float]) -> str:
    """Return an epoch's metrics as text for the progress bar: the ELBO, or all metrics but norms if there is none."""
    shown = {"elbo": row["elbo"]} if "elbo" in row else {k: v for k, v in row.items() if "norm" not in k}
    return " ".join(f"{name} {value:.2f}" for name, value in shown.items())


def analyse(trainer: Trainer, common: Mapping[str, Any]) -> None:
    """Log the ELBO surgery that `analysis.every` asks for, of the averaged weights if the fit averages them.

    An analysis that fails is reported as an event, and no further one is tried.
    """
    assert trainer.record is not None  # noqa: S101 - narrows the type
    try:
        with swapped(trainer.parameters, trainer.average):
            row = trainer.record(trainer.plan, trainer.pair, trainer.data)
    except PvaeError as error:
        trainer.tell("analysis", f"no analysis during this fit: {error}")
        trainer.record = None
        return
    trainer.files.log_metrics({**common, "split": "analysis", **row})


def validate(trainer: Trainer, common: Mapping[str, Any]) -> str:
    """Log the validation metrics, of the averaged weights if there are any, and update the best weights and patience.

    Returns the result as text for the progress bar.
    """
    state, train, held, seed = trainer.state, trainer.train, trainer.data.validation.rows, trainer.plan.seed
    common = {**common, "split": "validation"}
    with swapped(trainer.parameters, trainer.average):
        measured = trainer.plan.objective.measure(trainer.pair, held, seed)
        if measured is not None:
            trainer.files.log_metrics({**common, **measured})
            return in_words(measured)
        figures = evaluate(trainer.pair, held, seed, len(trainer.data.train))
        figures |= code_usage(trainer.pair, held, seed)
        score = figures["elbo"] - sum(v for name, v in figures.items() if name.startswith("penalty/"))
        better = score > state.best
        if better:
            state.best, state.best_epoch, state.waited = score, state.epoch, 0
            if train.keep == "best":
                trainer.best = {name: value.detach().clone() for name, value in trainer.pair.state_dict().items()}
    if not better and beta_rests(trainer):
        state.waited += 1
    trainer.files.log_metrics({**common, **figures})
    if train.patience is not None and state.waited >= train.patience:
        state.stopped = True
        trainer.tell(
            "stop", f"validation ELBO not better for {state.waited} validations: stopped at epoch {state.epoch}"
        )
    return f"{figures['elbo']:.2f}"


def beta_rests(trainer: Trainer) -> bool:
    """Return True if the KL weight beta has not changed since the last validation; patience counts only then."""
    beta, epochs, epoch = trainer.plan.objective.beta, trainer.train.epochs, trainer.state.epoch
    return beta.at(epoch, epochs) == beta.at(epoch - trainer.train.validate_every, epochs)


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
            rows = trainer.data.validation.rows[:ALERT_ROWS]
            found = alerts(trainer.plan, trainer.pair, rows, trainer.plan.seed)
        except (RuntimeError, ValueError) as error:
            if not is_refused_draw(error):
                raise
            found = [f"the weights that are kept give no distribution: {first_line(error)}"]
        for message in found:
            trainer.tell("alert", message)
