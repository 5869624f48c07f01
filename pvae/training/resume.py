"""Continuation of a run: `resume` goes on from its newest checkpoint, `refit` fits new priors in a second stage."""

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from pvae.data import Dataset
from pvae.errors import CheckpointError, DataError, DeclarationError, misdeclared, refuse, text
from pvae.experiment.experiment import Experiment
from pvae.experiment.plan import Plan
from pvae.objectives import base, elbo
from pvae.pair.pair import Pair
from pvae.runs import RunDirectory, checkpoint, find
from pvae.runs.export.exporting import exporting, remembered, require
from pvae.runs.run import Run
from pvae.runs.weights import attended, load_weights
from pvae.training import launch as start, loop, recovery, step
from pvae.training.trainer import Trainer
from pvae.util import digest, follows, group
from pvae.util.threads import threads

NOT_FROZEN = re.compile(r"latents\.\w+\.prior(\.|$)|train\.|objective\.|analysis\.|refit|(name|description|seed)$")
"""Keys that a second stage may change."""


def resume(
    run: Run | str | Path, *overrides: str, allow_changes: bool = False, device: str = "auto",
    export: Sequence[str] = (), root: str | Path = "runs", data_dir: str | Path | None = None,
    data: Dataset | None = None, pair: Pair | None = None, progress: bool = True,
) -> Run:  # fmt: skip
    """Continue a run from its newest checkpoint; on a CPU the result is bit for bit that of an uninterrupted run.

    That is so because noise and order of the data are functions of seed and step.

    Arguments:
        run: a `Run`, its folder, its name, or "latest".
        overrides: changes to the declaration, such as `"train.epochs=40"`; they need `allow_changes`.
        allow_changes: accept another declaration, machine, device, thread count or versions; the continuation is then
            no longer exact.
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
    refuse("engine" not in run.files.manifest, "training.resume.no_step", path=run.path)
    files, plan, where = run.files, run.plan.with_overrides(*overrides), start.pick_device(device)
    recorded = files.manifest.get("threads") if plan.train.shards > 1 else None
    if recorded not in (None, torch.get_num_threads()):
        files.log_event("threads", text("training.resume.threads", before=recorded, here=torch.get_num_threads()))
    with threads(recorded), group.joined(where):
        changed = group.from_first(lambda: start.differences(run, plan, where))
        start.require_accepted(changed, files, allow_changes=allow_changes)
        with files.lock():
            for name in checkpoint.sweep(files.path / "checkpoints"):
                files.log_event("sweep", f"removed the unfinished {name}")
            kinds = remembered(files, asked)
            if group.from_first(lambda: run.status.get("state")) != "finished" or changed:
                with exporting(files, kinds, show=progress):
                    _go_on(run, plan, group.local(where), changed, progress=progress and not follows())
        group.wait()
        again = Run(files, data=run.data, pair=run._given_pair)
        return second_stage(again, device, progress, allow_changes=allow_changes)


def _go_on(run: Run, plan: Plan, where: torch.device, changed: list[str], *, progress: bool) -> None:
    """Train from the newest checkpoint to the end; return at once for a pair without trainable parameters."""
    files, pair, data = run.files, run.fresh_pair(), run.data
    start.freeze(pair, files.manifest.get("trainable"))
    if not step.learned(pair):
        _ = run.checkpoint  # raises where there is none
        return
    engine = str(files.manifest.get("engine", "eager"))
    judged, is_old = _judged(start.own_plan(run)) != _judged(plan), "spec" not in files.manifest
    if changed:
        own = {"figure": base.ranked_by(plan.objective, plan.train.epochs, pair)} if judged or not is_old else {}
        own |= {} if is_old else {"spec": digest(plan.to_toml().encode())}
        files.write_manifest({**files.manifest, **start.computing(run, plan, where), **own})
    group.wait()
    trainer = Trainer(plan, pair, data, files, where, engine, progress)
    if is_old:
        trainer.tell("seal", "not sealed: the run is of an earlier version, so that edits of its files are not seen")
    if (saved := recovery.newest(trainer)) is not None:
        recovery.restore(trainer, saved)
    elif files.manifest.get("trainable") is not None:
        first = (files.manifest.get("parent") or {}).get("run")
        raise CheckpointError.of("training.resume.frozen", path=files.path, parent=first)
    if changed:
        trainer.state.stopped = False
        if judged:  # by another figure than until now
            trainer.state.best = trainer.state.elbo = -math.inf
        files.write_spec(plan.to_toml())
        files.log_event("changed", "; ".join(changed))
        if saved is not None:  # the newest checkpoint says what the run is now
            trainer.started -= trainer.state.seconds
            recovery.save(trainer)
    loop.train(trainer)


def _judged(plan: Plan) -> tuple[str, float, float]:
    """Return what ranks the weights of a fit: name of the figure, weight of the KL at the end, free bits."""
    objective, epochs = plan.objective, plan.train.epochs
    return objective.figure(epochs), objective.beta.at(epochs, epochs), objective.free_bits


def second_stage(run: Run, device: str, progress: bool, *, allow_changes: bool = False) -> Run:
    """Fit or resume the second stage that the run's declaration has under `refit`, and return its run.

    Returns `run` itself if the declaration has no second stage.
    """
    plan, root = run.plan, run.path.parent.parent
    if not isinstance(plan, Experiment) or plan.refit is None:
        return run
    stage = plan.second_stage()
    if (child := group.from_first(lambda: _stage_run(run, stage))) is None or child[1] != "finished":
        with run.files.held():  # the work belongs to one process, which looks again now that it is alone
            if (child := group.from_first(lambda: _stage_run(run, stage))) is None:
                return fit_stage(run, stage, root, device, progress, export=run.files.manifest.get("exports", []))
            if child[1] != "finished":
                found = Run(RunDirectory(Path(child[0])), data=run.data)
                return resume(found, device=device, progress=progress, allow_changes=allow_changes)
    return Run(RunDirectory(Path(child[0])), data=run.data)


def _stage_run(run: Run, stage: Experiment) -> tuple[str, object] | None:
    """Return folder and state of the newest second stage `stage` of `run` that reads, found beside it; else None."""
    wanted = run.files.id, run.status.get("epoch")
    for child in (Run(RunDirectory(path), data=run.data) for path in find.beside(run.path)):
        is_sound = False
        with suppress(DataError, DeclarationError, CheckpointError):
            of_both = child.files.parent == wanted and child.experiment.latents == stage.latents
            is_sound = of_both and bool(child.checkpoint)
        if is_sound:
            return str(child.path), child.status.get("state")
    return None


# ---------------------------------------------------------------------- second stages


def refit(
    run: Run | str | Path, *overrides: str, root: str | Path = "runs", run_dir: str | Path | None = None,
    data_dir: str | Path | None = None, device: str = "auto", export: Sequence[str] = (), progress: bool = True,
) -> Run:  # fmt: skip
    """Freeze a fitted pair of model and guide and fit new priors to its aggregated posterior by maximum likelihood.

    The surgery of the run on held-out rows gives an interval for what a better prior wins on new data while the guide
    stays (`Surgery.population`); `pvae.analysis.gain` measures what the new prior won, beside that interval. For an
    autoencoder this makes a model that can be sampled.

    Arguments:
        run: a finished `Run`, its folder, its name, or "latest".
        overrides: the new priors, `"latents.z.prior.kind=realnvp"`, and how to train them, `"train.epochs=50"`;
            nothing else may change. Training settings that are not overridden are those of the run.
        root: folder in which runs are looked up by name.
        run_dir: folder of the new run's directory; default: that of the old run.
        data_dir: folder that is searched first for data files.
        device: as in `fit`.
        export: as in `fit`.
        progress: as in `fit`.

    Returns:
        The new run, with the weights of the whole pair; its manifest names the old run as the parent.

    Raises:
        DeclarationError: no prior changes, or something else does.
        CheckpointError: the run has no checkpoint.

    References:
        ELBO surgery (Hoffman, Johnson, 2016), http://approximateinference.org/accepted/HoffmanJohnson2016.pdf

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import pvae
        >>> runs = TemporaryDirectory()
        >>> few = "data.splits.train=[0, 200]"
        >>> run = pvae.fit("vae", few, "train.epochs=1", run_dir=runs.name, progress=False)
        >>> mixture = "latents.z.prior={kind='mixture', components=5}"
        >>> second = pvae.refit(run, mixture, progress=False)
        >>> second.experiment.latents["z"].prior.kind, second.files.manifest["parent"]["run"] == f"vae/{run.path.name}"
        ('mixture', True)
        >>> runs.cleanup()
    """
    kinds = require(export)
    if not isinstance(run, Run):
        run = Run.load(run, root=root, data_dir=data_dir)
    stage = stage_of(run.experiment, run.experiment.with_overrides(*overrides))
    where = Path(run_dir) if run_dir else run.path.parent.parent
    with group.joined(start.pick_device(device)):
        return fit_stage(run, stage, where, device, progress, export=kinds)


def stage_of(old: Experiment, changed: Experiment) -> Experiment:
    """Return the declaration of a second stage of `old`: priors and training of `changed`, the plain ELBO as objective.

    Raises:
        DeclarationError: no prior changes, or something else does.
    """
    misdeclared(not old.objective.scores, "training.resume.no_encoder", kind=old.objective.kind)
    misdeclared(changed.objective != old.objective, "training.resume.objective")
    name = f"{old.name}_refit" if changed.name == old.name else changed.name
    train = {**changed.train.model_dump(exclude_none=True, exclude_unset=True), "alternate": 0}
    stage = changed.with_changes({"name": name, "refit": None, "objective": elbo.TraceELBO(), "train": train})
    if frozen := [line for key, line in start.changed_keys(old, stage).items() if not NOT_FROZEN.match(key)]:
        raise DeclarationError([text("training.resume.own", line=line) for line in frozen])
    if stage.seed != old.seed and getattr(stage.data, "data_seed", 0) == "experiment":
        raise DeclarationError(f"refit: expected the run's own seed, which its data follow; got {stage.seed}.")
    old.refitted(stage)
    return stage


def fit_stage(
    run: Run, stage: Experiment, run_dir: Path, device: str, progress: bool, *, export: Sequence[str] = ()
) -> Run:
    """Fit the second stage of a finished run, with all but its new priors frozen, in a new run directory.

    Arguments as in `refit`, but for the stage's declaration.
    """
    trainable = tuple(f"model.priors.{name}." for name in run.experiment.refitted(stage))
    pair = attended(stage.build(run.data.shape), lambda: run.data.train)
    weights = {k: v for k, v in run.pair.state_dict().items() if not k.startswith(trainable)}
    fresh = {k: v for k, v in pair.state_dict().items() if k.startswith(trainable)}
    load_weights(pair, {**weights, **fresh}, str(run.path))
    parent = {"run": f"{run.path.parent.name}/{run.files.id}", "epoch": run.status.get("epoch")}
    if begun := start.begun_before(run_dir, stage):
        return resume(begun, allow_changes=True, device=device, export=export, data=run.data, progress=progress)
    return start.launch(
        stage, pair, run.data, run_dir, start.pick_device(device),
        parent=parent, trainable=trainable, export=export, progress=progress,
    )  # fmt: skip
