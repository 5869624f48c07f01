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
from pvae.runs.names import slug
from pvae.runs.run import Run
from pvae.runs.rundir import RunDirectory
from pvae.training import loop
from pvae.training.keeping import newest, restore
from pvae.training.launch import freeze, learns, pick_device, recorder
from pvae.training.refit import changed_keys, fit_stage, parent_of
from pvae.training.trainer import Trainer

RESUMABLE = ("train.", "objective.", "analysis.", "description", "device", "threads")
"""Declared keys that `allow_changes` may change in a run: how it is trained, never what it is."""


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
    """Go on where a run stopped: bit for bit on a CPU, because noise and order are functions of (seed, step).

    Arguments:
        run: a `Run`, its folder, its name, or "latest".
        overrides: changes to the declaration, such as `"train.epochs=40"`; they need `allow_changes`.
        allow_changes: accept another declaration, device or thread count; the continuation is then no longer exact.
        device: as in `fit`.
        export: where to record it too, besides where it was recorded before.
        root: where runs are looked up by name.
        data_dir: where to look for data first.
        data: the tensors of the fit, if they were passed in Python.
        pair: the pair of the fit, if it was written by hand.
        progress: as in `fit`.

    Returns:
        The run; a finished one is returned as it is.

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
    """Train from the newest checkpoint; a pair without free parameters has nothing to go on with."""
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
    """Fit or resume the second stage that a declaration asks for and return its run; else return `run`."""
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
    """Return whether a run is this second stage of this first one, and has weights; a broken one is not."""
    try:
        same = child.files.manifest.get("parent") == parent_of(run) and child.experiment.latents == stage.latents
        return same and bool(child.checkpoint)
    except (DataError, DeclarationError, CheckpointError):
        return False


def differences(run: Run, plan: Plan, device: torch.device) -> list[str]:
    """Return a line for each difference that makes a continuation inexact: declaration, device, threads."""
    lines = list(changed_keys(run.plan, plan).values())
    here = {"device": str(device), "threads": torch.get_num_threads()}
    there = run.files.manifest
    return lines + [f"{k} = {there[k]!r}; got {v!r}." for k, v in here.items() if k in there and there[k] != v]
