"""Continuation of a run from its newest checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pvae.data import Dataset
from pvae.errors import CheckpointError, DataError, DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.experiment.plan import Plan
from pvae.pair.pair import Pair
from pvae.runs import checkpoint
from pvae.runs.export.exporting import exporting, remembered, require
from pvae.runs.find import slug
from pvae.runs.run import Run
from pvae.runs.rundir import RunDirectory
from pvae.training import loop
from pvae.training.keeping import newest, restore
from pvae.training.launch import freeze, learns, pick_device, recorder
from pvae.training.refit import changed_keys, fit_stage, parent_of
from pvae.training.trainer import Trainer

RESUMABLE = ("train.", "objective.", "analysis.", "description", "device", "threads")
"""Prefixes of the keys that `allow_changes` permits to change in a run: settings of training, never of model or
data."""


def resume(
    run: Run | str | Path,
    *overrides: str,
    allow_changes: bool = False,
    device: str = "auto",
    export: Sequence[str] = (),
    root: str | Path = "runs",
    data_dir: str | Path | None = None,
    data: Dataset | None = None,
    pair: Pair | None = None,
    progress: bool = True,
) -> Run:
    """Continue a run from its newest checkpoint; on a CPU the result is bit for bit that of an uninterrupted run.

    That is so because noise and order of the data are functions of seed and step.

    Arguments:
        run: a `Run`, its folder, its name, or "latest".
        overrides: changes to the declaration, such as `"train.epochs=40"`; they need `allow_changes`.
        allow_changes: accept another declaration, device or thread count; the continuation is then no longer exact.
        device: as in `fit`.
        export: trackers to record the run to, besides those of the fit.
        root: folder in which runs are looked up by name.
        data_dir: folder that is searched first for data files.
        data: the tensors of the fit, if they were passed in Python.
        pair: the pair of the fit, if it was written by hand.
        progress: as in `fit`.

    Returns:
        The run, or that of its second stage if the declaration has `refit`; a finished run is returned as it is.

    Raises:
        DeclarationError: something differs and `allow_changes` is not given; the differences are listed.
        DataError: the run was stopped before it began.
        CheckpointError: no checkpoint verifies, or it belongs to another declaration.
        MissingExtraError: as in `fit`.
        BusyError: another process holds the run.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import pvae
        >>> runs = TemporaryDirectory()
        >>> few = "data.splits.train=[0, 200]"
        >>> run = pvae.fit("vae", few, "train.epochs=1", run_dir=runs.name, progress=False)
        >>> longer = pvae.resume(run, "train.epochs=2", allow_changes=True, progress=False)
        >>> longer.path == run.path, longer.status["epoch"]
        (True, 2)
        >>> runs.cleanup()
    """
    asked = require(export)
    if not isinstance(run, Run):
        run = Run.load(run, root=root, data_dir=data_dir, data=data, pair=pair)
    if "engine" not in run.files.manifest:
        raise DataError(f"{run.path}: expected a run that began; got one stopped before its first step. Fit it anew.")
    files, plan, where = run.files, run.plan.with_overrides(*overrides), pick_device(device)
    changed = differences(run, plan, where)
    other = [line for line in changed if not line.startswith(RESUMABLE)]
    if other:
        raise DeclarationError(
            [f"{files.path.name}: expected the run's own {line}" for line in other]
            + ["This would be another model or other data, which a run cannot become: fit it anew."]
        )
    if changed and not allow_changes:
        raise DeclarationError(
            [f"{files.path.name}: expected the run's own {line}" for line in changed]
            + ["The continuation would not be exact; say --allow-changes (allow_changes=True) to go on all the same."]
        )
    with files.lock():
        found = files.path / "checkpoints"
        for name in checkpoint.sweep(found):
            files.log_event("sweep", f"removed the unfinished {name}")
        kinds = remembered(files, asked)
        if run.status.get("state") != "finished" or changed:
            with exporting(files, kinds, show=progress):
                _go_on(run, plan, where, changed, progress=progress)
    return second_stage(Run(files, data=run.data, pair=run._given_pair), device, progress, allow_changes=allow_changes)


def _go_on(run: Run, plan: Plan, where: torch.device, changed: list[str], *, progress: bool) -> None:
    """Train from the newest checkpoint to the end; return at once for a pair without trainable parameters."""
    files, pair = run.files, run.fresh_pair()
    freeze(pair, files.manifest.get("trainable"))
    if not learns(pair):
        _ = run.checkpoint  # raises where there is none
        return
    engine = str(files.manifest.get("engine", "eager"))
    trainer = Trainer(plan, pair, run.data, files, where, engine, record=recorder(plan), show=progress)
    saved = newest(trainer)
    if saved is not None:
        restore(trainer, saved)
    elif files.manifest.get("trainable") is not None:
        raise CheckpointError(
            f"{files.path}: expected a checkpoint, which holds the frozen weights too; got none. "
            f"Refit {(files.manifest.get('parent') or {}).get('run')} again."
        )
    if changed:
        trainer.state.stopped = False
        files.write_spec(plan.to_toml())
        files.log_event("changed", "; ".join(changed))
    loop.train(trainer)


def second_stage(run: Run, device: str, progress: bool, *, allow_changes: bool = False) -> Run:
    """Fit or resume the second stage that the run's declaration has under `refit`, and return its run.

    Returns `run` itself if the declaration has no second stage.
    """
    plan, root = run.plan, run.path.parent.parent
    if not isinstance(plan, Experiment) or plan.refit is None:
        return run
    stage = plan.second_stage()
    for path in sorted((root / slug(stage.name)).glob("*"), reverse=True):
        child = Run(RunDirectory(path), data=run.data)
        if not _is_stage(child, run, stage):
            continue
        if child.status.get("state") == "finished":
            return child
        return resume(child, device=device, progress=progress, allow_changes=allow_changes)
    return fit_stage(run, stage, root, device, progress, export=run.files.manifest.get("exports", []))


def _is_stage(child: Run, run: Run, stage: Experiment) -> bool:
    """Return True if `child` is the second stage `stage` of `run` and has a readable checkpoint."""
    try:
        same = child.files.manifest.get("parent") == parent_of(run) and child.experiment.latents == stage.latents
        return same and bool(child.checkpoint)
    except (DataError, DeclarationError, CheckpointError):
        return False


def differences(run: Run, plan: Plan, device: torch.device) -> list[str]:
    """Return a line for each change of declaration, device or threads that makes a run's continuation inexact."""
    lines = list(changed_keys(run.plan, plan).values())
    here = {"device": str(device), "threads": torch.get_num_threads()}
    there = run.files.manifest
    return lines + [f"{k} = {there[k]!r}; got {v!r}." for k, v in here.items() if k in there and there[k] != v]
