"""Trials of a search: Optuna chooses their values; any number of workers share them through its storage."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae.errors import BusyError, Interrupted, PvaeError, StorageError, require_extra
from pvae.runs.export.exporting import WATCH, brief
from pvae.runs.find import slug
from pvae.studies import cases, sweep
from pvae.studies.tasks import Task, claimed, fitted, own_folder
from pvae.util import digest

if TYPE_CHECKING:
    import optuna

PRUNERS = {"median": "Median", "hyperband": "Hyperband", "none": "Nop"}
"""Names of Optuna's pruners."""


class Searching:
    """A search of one study in one folder of runs, with the trials that its storage holds.

    Arguments:
        search: ranges, figure and number of trials.
        base: the declaration in which values are set.
        name: name of the study.
        root: folder of the run directories.
    """

    def __init__(self, search: sweep.Search, base: Mapping[str, Any], name: str, root: Path) -> None:
        require_extra("optuna", "search", "search: expected optuna, which chooses the values of [search]")
        self.search, self.base, self.name, self.root = search, base, name, root
        self.named = f"{name} trial"
        """Name of the runs of all trials."""
        what = [base, search.model_dump(include={"ranges", "choices", "figure", "seed"})]
        self.key = digest(json.dumps(what, sort_keys=True, default=str).encode())[:16]
        """Id of the search; `trials`, pruner and storage can change."""

    @cached_property
    def study(self) -> optuna.Study:
        """Optuna's study, created if it is not there; raises StorageError where its storage cannot be reached."""
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = getattr(optuna.pruners, f"{PRUNERS[self.search.pruner]}Pruner")()
        journal = JournalFileBackend(str(own_folder(self.root, slug(self.name)) / f"{self.key}.journal"))
        try:
            return optuna.create_study(
                storage=self.search.storage or optuna.storages.JournalStorage(journal), pruner=pruner,
                study_name=f"{self.name[:80]} {self.key}", load_if_exists=True,
                direction="maximize" if self.search.sign > 0 else "minimize",
            )  # fmt: skip
        except Exception as error:  # of whatever database the URL names
            raise StorageError.of("studies.search.storage", error=brief(error)) from None

    def trials(self) -> list[optuna.trial.FrozenTrial]:
        """Return all trials that were begun, by number."""
        return self.study.get_trials(deepcopy=False)

    def trial(self, number: int) -> optuna.trial.FrozenTrial | None:
        """Return the trial of a task; None if it was not begun."""
        return next((trial for trial in self.trials() if trial.user_attrs.get("task") == number), None)

    def is_done(self, number: int) -> bool:
        """Return True if the trial of a task is finished, was pruned or has failed."""
        return (trial := self.trial(number)) is not None and trial.state.is_finished()

    # ------------------------------------------------------------------ in the worker

    def open(self, number: int) -> optuna.Trial:
        """Return the trial of a task, on which this process has the claim; begun unless its worker has died."""
        from optuna import Trial, samplers
        from optuna.trial import TrialState, create_trial

        self.study.sampler = samplers.TPESampler(seed=(self.search.seed + number) % 2**32, constant_liar=True)
        while (found := self.trial(number)) is None:
            self.study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={"task": number}))
        return Trial(self.study, found._trial_id)

    def values(self, trial: optuna.Trial) -> dict[str, Any]:
        """Return the values of a trial by dotted path, chosen unless they were before its worker died."""
        found: dict[str, Any] = {}
        for path, choices in self.search.choices.items():
            found[path] = json.loads(trial.suggest_categorical(path, [json.dumps(choice) for choice in choices]))
        for path, given in self.search.ranges.items():
            whole = isinstance(given.low, int) and isinstance(given.high, int)
            suggest: Any = trial.suggest_int if whole else trial.suggest_float
            found[path] = suggest(path, given.low, given.high, log=given.log)
        return found

    def work(self, order: Mapping[str, Any]) -> None:
        """Do the trial of a task, with the claim on its case, too: fit or resume its run, and record its figure.

        A worker that is stopped or killed leaves it to the next one.
        """
        if self.is_done(order["number"]):
            return
        from optuna.trial import TrialState

        from pvae.analysis.pages.study import validation_figure

        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # outside of a fit it comes too late
        trial = self.open(order["number"])
        case = cases.Case.of(cases.overridden(self.base, self.values(trial), self.named))
        token = WATCH.set(partial(self._report, trial))
        try:
            with claimed(Task((case,)).claim(self.root)):
                run = fitted(case.experiment, None, order, self.search.measure)
            trial.set_user_attr("run", str(run.path))
            self.study.tell(trial.number, validation_figure(run, self.search.figure, self.search.measure))
        except Interrupted as stopped:
            if stopped.exit_code != 128 + signal.SIGUSR1:
                raise
            self.study.tell(trial.number, state=TrialState.PRUNED)
        except (BusyError, StorageError):
            raise
        except PvaeError as problem:
            trial.set_user_attr("error", str(problem).splitlines()[0])
            self.study.tell(trial.number, state=TrialState.FAIL)
        finally:
            WATCH.reset(token)

    def _report(self, trial: optuna.Trial, row: Mapping[str, Any]) -> None:
        """Report the validation ELBO of an epoch to the pruner; a fit that it stops gets SIGUSR1."""
        elbo = row.get("elbo", row.get("log_joint")) if row["split"] == "validation" else None
        if elbo is not None and math.isfinite(elbo):
            trial.report(self.search.sign * elbo, row["epoch"])
            if trial.should_prune():
                signal.raise_signal(signal.SIGUSR1)

    def history(self) -> list[dict[str, Any]]:
        """Return every trial as a dictionary: number, state, figure, values by path, run, error, seconds."""
        rows: list[dict[str, Any]] = []
        for trial in self.trials():
            told = {"value": trial.value if trial.state.name == "COMPLETE" else None}
            told |= {name: trial.user_attrs.get(name, "") for name in ("run", "error")}
            told["seconds"] = None if trial.duration is None else trial.duration.total_seconds()
            rows.append({"trial": trial.number, "state": trial.state.name.lower(), **trial.params, **told})
        return rows

    def importance(self) -> dict[str, float]:
        """Return the proportion of the figure's variance that each path explains (fANOVA); {} of too few trials."""
        from optuna.importance import get_param_importances

        with suppress(RuntimeError, ValueError):
            return dict(get_param_importances(self.study))
        return {}
