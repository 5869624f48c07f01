"""Entry points of stochastic variational inference: `fit` and `resume`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvae.component import IMPORTED
from pvae.data import Dataset, load
from pvae.data.sources.python import TensorSource, is_bare
from pvae.data.sources.tabular import FrameSource, Tabular
from pvae.errors import CheckpointError, DataError, DeclarationError, DeviceError
from pvae.experiment.experiment import Experiment, Plan, Train
from pvae.experiment.rules import refused
from pvae.models.likelihoods.base import Likelihood
from pvae.objectives.base import Objective, TraceELBO, TraceMeanFieldELBO
from pvae.pair.pair import Pair
from pvae.runs import checkpoint
from pvae.runs.exporters import exporting, remembered, require
from pvae.runs.run import Run, attended, load_weights
from pvae.runs.rundir import RunDirectory, slug
from pvae.training.evaluation import evaluate
from pvae.training.step import choose_engine
from pvae.training.trainer import Record, Trainer
from pvae.util.memory import require_training_memory
from pvae.util.provenance import provenance
from pvae.util.toml import flat

RESUMABLE = ("train.", "objective.", "analysis.", "description", "device", "threads")
"""What `allow_changes` may change in a run: how it is trained, never what it is."""


def fit(
    what: str | Path | Experiment | Pair,
    *overrides: str,
    data: Any = None,
    objective: Objective | None = None,
    train: Train | None = None,
    seed: int | None = None,
    name: str | None = None,
    run_dir: str | Path = "runs",
    data_dir: str | Path | None = None,
    device: str = "auto",
    export: Sequence[str] = (),
    progress: bool = True,
) -> Run:
    """Fit an experiment by stochastic variational inference and keep everything in a run directory.

    Arguments:
        what: a zoo name, a TOML file, an `Experiment`, or a hand-written `Pair` (then `data` is needed).
        overrides: dotted overrides, `"train.epochs=20"`.
        data: instead of the declared source, what `Dataset.of` takes: a `Dataset`, a tensor or array `(n, *event)`, a
            torch `Dataset`, AnnData.
        objective: for a pair; default `trace_elbo`.
        train: for a pair; default `Train()`.
        seed: replaces the declared seed.
        name: replaces the declared name.
        run_dir: where runs are kept.
        data_dir: where to look for data first.
        device: "auto" (a GPU when there is one), "cpu" or "cuda".
        export: `"tensorboard"`, `"mlflow"`: where else the run is recorded, also when it is resumed.
        progress: show a bar on a terminal, a line every few seconds elsewhere.

    Returns:
        The run, with the best (or last, as declared) weights in `run.pair`; of a declaration with `refit`, the run of
        the second stage, whose manifest names the first.

    Raises:
        DeclarationError: the declaration is wrong or fits into no memory here, or this objective cannot fit the pair.
        MissingExtraError: a package that `export` needs is not installed.
        DataError: data are missing, broken, or outside the likelihood's support.
        NonFiniteError: the loss became NaN or infinite and the policy is "stop".
        DeviceError: memory ran out, or the device was lost; a checkpoint was written if it could be.
        Interrupted: a signal arrived; a checkpoint was written.

    Example:
        run = pvae.fit("vae", "train.epochs=50")
        print(pvae.analysis.surgery(run.pair, run.data.test.x))
    """
    kinds = require(export)
    plan, given_pair = _plan(what, overrides, objective, train)
    plan = plan.with_changes({k: v for k, v in (("seed", seed), ("name", name)) if v is not None})
    where = pick_device(device)
    dataset, plan = _dataset(plan, data, data_dir)
    if given_pair and (problems := given_pair.check(dataset.train.rows[:3])):
        raise DeclarationError([f"pair: {problem}" for problem in problems])
    pair = given_pair.adopt(dataset.train.rows[:2]) if given_pair else _experiment(plan).build(dataset.shape)
    rows = min(plan.train.batch_size, len(dataset.train)) * getattr(plan.objective, "particles", 1)
    require_training_memory(pair, math.prod(dataset.shape), rows, where)
    attended(pair, dataset.train)
    _require_fittable(plan, pair, dataset, given_pair is not None)
    run = _launch(plan, pair, dataset, Path(run_dir), where, given_pair=given_pair, export=kinds, progress=progress)
    return _second(run, device, progress)


def refit(
    run: Run | str | Path,
    *overrides: str,
    root: str | Path = "runs",
    run_dir: str | Path | None = None,
    data_dir: str | Path | None = None,
    device: str = "auto",
    export: Sequence[str] = (),
    progress: bool = True,
) -> Run:
    """Freeze a fitted pair and fit other priors to its aggregated posterior, by maximum likelihood.

    With the encoder fixed, the marginal KL of the run's surgery is the most that a prior can win here; see
    `pvae.analysis.gain` for what it did win. For an autoencoder this makes a model that can be sampled.

    Arguments:
        run: a finished `Run`, its folder, its name, or "latest".
        overrides: the new priors, `"latents.z.prior.kind=realnvp"`, and how to train them, `"train.epochs=50"`;
            nothing else may change. What is not said of training is as the run had it.
        root: where runs are looked up by name.
        run_dir: where the new run is kept; default: beside the old one.
        data_dir: where to look for data first.
        device: as in `fit`.
        export: as in `fit`.
        progress: as in `fit`.

    Returns:
        A run of its own, complete, its manifest naming the parent.

    Raises:
        DeclarationError: no prior changes, or something else does.
        CheckpointError: the run has no checkpoint.
    """
    kinds = require(export)
    if not isinstance(run, Run):
        run = Run.load(run, root=root, data_dir=data_dir)
    stage = stage_of(run.experiment, run.experiment.with_overrides(*overrides))
    return fit_stage(run, stage, Path(run_dir) if run_dir else run.path.parent.parent, device, progress, export=kinds)


NOT_FROZEN = re.compile(r"latents\.\w+\.prior(\.|$)|train\.|objective\.|analysis\.|refit|(name|description|seed)$")


def stage_of(old: Experiment, changed: Experiment) -> Experiment:
    """The declaration of a second stage of `old`: what `changed` says of priors and training, and the plain ELBO.

    Raises:
        DeclarationError: no prior changes, or something else does.
    """
    if not old.objective.scores:
        raise DeclarationError(
            f"refit: expected a run with an encoder, whose codes a prior can be fitted to; got one of the objective "
            f"{old.objective.kind}."  # type: ignore[attr-defined]
        )
    if changed.objective != old.objective:
        raise DeclarationError("refit: expected no other objective; got one. Priors are fitted by the plain ELBO.")
    name = f"{old.name}_refit" if changed.name == old.name else changed.name
    train = {**changed.train.model_dump(exclude_none=True, exclude_unset=True), "alternate": 0}
    stage = changed.with_changes({"name": name, "refit": None, "objective": TraceELBO(), "train": train})
    _refitted(old, stage)
    return stage


def _refitted(first: Experiment, stage: Experiment) -> list[str]:
    """The latents whose priors a second stage replaces; raises DeclarationError where it changes anything else."""
    old, new = flat(first.model_dump()), flat(stage.model_dump())
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    frozen = [f"{key} = {old.get(key)!r}; got {new.get(key)!r}." for key in changed if not NOT_FROZEN.match(key)]
    if frozen:
        raise DeclarationError(
            [f"refit: expected the run's own {line} Only priors are fitted anew." for line in frozen]
        )
    if stage.seed != first.seed and getattr(stage.data, "data_seed", 0) == "experiment":
        raise DeclarationError(f"refit: expected the run's own seed, which its data follow; got {stage.seed}.")
    return first.refitted(stage)


def fit_stage(
    run: Run, stage: Experiment, run_dir: Path, device: str, progress: bool, *, export: Sequence[str] = ()
) -> Run:
    """Freeze a fitted run and fit a second stage of it, in a run of its own; see `refit`."""
    names = _refitted(run.experiment, stage)
    pair = attended(stage.build(run.data.shape), run.data.train)
    trainable = tuple(f"model.priors.{name}." for name in names)
    weights = {k: v for k, v in run.pair.state_dict().items() if not k.startswith(trainable)}
    fresh = {k: v for k, v in pair.state_dict().items() if k.startswith(trainable)}
    load_weights(pair, {**weights, **fresh}, str(run.path))
    parent = parent_of(run)
    return _launch(
        stage, pair, run.data, run_dir, pick_device(device),
        parent=parent, trainable=trainable, export=export, progress=progress,
    )  # fmt: skip


def _second(run: Run, device: str, progress: bool, *, allow_changes: bool = False) -> Run:
    """The second stage that a declaration asks for, if it does: begun, or gone on with where it left weights."""
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
    """Whether a run is this second stage of this first one, and has weights; a broken one is not."""
    try:
        same = child.files.manifest.get("parent") == parent_of(run) and child.experiment.latents == stage.latents
        return same and bool(child.checkpoint)
    except (DataError, DeclarationError, CheckpointError):
        return False


def parent_of(run: Run) -> dict[str, Any]:
    """What the manifest of a second stage says of the first: name and id, as `Run.load` takes them, and its epoch."""
    return {"run": f"{run.path.parent.name}/{run.path.name}", "epoch": run.status.get("epoch")}


def _launch(
    plan: Plan,
    pair: Pair,
    dataset: Dataset,
    run_dir: Path,
    where: torch.device,
    *,
    given_pair: Pair | None = None,
    parent: dict[str, Any] | None = None,
    trainable: tuple[str, ...] | None = None,
    export: Sequence[str] = (),
    progress: bool,
) -> Run:
    """Make the run directory and train."""
    files = RunDirectory.create(run_dir, plan.name)
    files.write_spec(plan.to_toml())
    freeze(pair, trainable)
    engine = _engine(plan, pair, dataset, where)
    files.write_manifest(
        {
            **provenance(),
            "declared": given_pair is None,
            "imports": list(IMPORTED),
            "seed": plan.seed,
            "device": str(where),
            "engine": engine,
            "threads": torch.get_num_threads(),
            "parent": parent,
            "trainable": None if trainable is None else list(trainable),
            "data": {"source": dataset.source, "shape": list(dataset.shape), "fingerprint": dataset.fingerprint},
            "exports": list(export),
        }
    )
    for note in dataset.notes:
        files.log_event("alert" if "also occur in train" in note else "data", note)
    with files.lock(), exporting(files, export, show=progress):
        if learns(pair):
            Trainer(plan, pair, dataset, files, where, engine, record=_record(plan), show=progress).run()
        else:
            _nothing_to_learn(pair, dataset, plan, files)
    return Run(files, data=dataset, pair=given_pair)


def learns(pair: Pair) -> bool:
    """Whether a parameter is free: a refit with q_agg itself as the prior has none."""
    return any(p.requires_grad for p in pair.parameters())


def freeze(pair: Pair, trainable: Sequence[str] | None) -> None:
    """Let only parts move whose names start with one of `trainable`, the others in evaluation mode; None lets all."""
    pair.train()
    if trainable is None:
        return
    for name, parameter in pair.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(trainable)))
    for name, module in pair.named_modules():
        module.training = not name or any(f"{name}.".startswith(t) or t.startswith(f"{name}.") for t in trainable)


def _nothing_to_learn(pair: Pair, data: Dataset, plan: Plan, files: RunDirectory) -> None:
    """A run of a pair without free parameters (a refit with q_agg itself as the prior): measured and kept."""
    row = evaluate(pair, data.validation.rows, plan.seed, len(data.train))
    files.log_metrics({"epoch": 0, "step": 0, "seconds": 0.0, "split": "validation", **row})
    tensors: dict[str, dict[str, Tensor]] = {"weights": dict(pair.state_dict()), "optimizer": {}}
    checkpoint.write(files.path / "checkpoints", 0, tensors, {"select": "weights"})
    files.update_status(state="finished", epoch=0, epochs=0, step=0, elbo=row["elbo"], engine="none", seconds=0.0)


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
    return _second(Run(files, data=run.data, pair=run._given_pair), device, progress, allow_changes=allow_changes)


def _go_on(run: Run, plan: Plan, where: torch.device, changed: list[str], *, progress: bool) -> None:
    """Train from the newest checkpoint; a pair without free parameters has nothing to go on with."""
    files, pair = run.files, run.fresh_pair()
    freeze(pair, files.manifest.get("trainable"))
    if not learns(pair):
        _ = run.checkpoint  # says so where there is none
        return
    engine = str(files.manifest.get("engine", "eager"))
    trainer = Trainer(plan, pair, run.data, files, where, engine, record=_record(plan), show=progress)
    saved = checkpoint.latest(files.path / "checkpoints", report=lambda line: trainer.tell("fallback", line))
    if saved is not None:
        trainer.restore(saved)
    elif files.manifest.get("trainable") is not None:
        raise CheckpointError(
            f"{files.path}: expected a checkpoint, which holds the frozen weights too; got none. "
            f"Refit {(files.manifest.get('parent') or {}).get('run')} again."
        )
    if changed:
        trainer.state.stopped = False
        files.write_spec(plan.to_toml())
        files.log_event("changed", "; ".join(changed))
    trainer.run()


def _record(plan: Plan) -> Record | None:
    """The surgery during a fit: imported when it is asked for, because it brings plots and tables with it."""
    if not plan.analysis.every:
        return None
    from pvae.analysis.decompose.history import record

    return record


def _plan(
    what: str | Path | Experiment | Pair, overrides: Sequence[str], objective: Objective | None, train: Train | None
) -> tuple[Plan, Pair | None]:
    if isinstance(what, Pair):
        given = {k: v for k, v in (("objective", objective), ("train", train)) if v is not None}
        return Plan(name="pair", **given).with_overrides(*overrides), what  # type: ignore[arg-type]
    if objective is not None or train is not None:
        raise DeclarationError("fit: objective= and train= belong to a hand-written pair; declare them, or override.")
    if isinstance(what, Experiment):
        return (what.with_overrides(*overrides) if overrides else what), None
    return Experiment.load(what, overrides), None


def _experiment(plan: Plan) -> Experiment:
    assert isinstance(plan, Experiment)  # noqa: S101 - narrows the type; `fit` has checked it
    return plan


def _dataset(plan: Plan, data: Any, data_dir: str | Path | None) -> tuple[Dataset, Plan]:
    """The data to fit; a declaration given other data says so."""
    if data is not None:
        declared = passed_source(plan)
        if not isinstance(plan, Experiment) and is_bare(data):
            declared = TensorSource(shape=())  # a hand-written pair may observe bare numbers
        dataset = Dataset.of(data, declared)
        if isinstance(plan, Experiment):
            plan = plan.model_copy(update={"data": declared})
    elif isinstance(plan, Experiment):
        dataset = load(plan.data, data_dir=Path(data_dir) if data_dir else None, seed=plan.seed)
    else:
        raise DeclarationError("fit: expected data=... for a hand-written pair; got none.")
    if isinstance(plan, Experiment):
        likelihood: Likelihood = plan.decoder.likelihood
        dataset = plan.conditioned(dataset)
        dataset.require_support(plan.observed().support, likelihood.hint)
    return dataset, plan


def passed_source(plan: Plan) -> TensorSource | FrameSource:
    """The declaration of data passed in Python: of a table's columns, where a table is declared."""
    if not isinstance(plan, Experiment) or not isinstance(plan.data, Tabular):
        return tensor_source(plan)
    shared = (plan.data.model_fields_set & FrameSource.model_fields.keys()) - {"source"}
    return FrameSource(**{name: getattr(plan.data, name) for name in shared})


def tensor_source(plan: Plan) -> TensorSource:
    """The declared transforms (binarize, scale, shape, splits) for data passed in Python."""
    if not isinstance(plan, Experiment):
        return TensorSource()
    shared = (plan.data.model_fields_set & TensorSource.model_fields.keys()) - {"source"}
    return TensorSource(**{name: getattr(plan.data, name) for name in shared})


def _require_fittable(plan: Plan, pair: Pair, data: Dataset, foreign: bool) -> None:
    """Refuse what would fail later, or silently give wrong numbers; before a run directory is made."""
    rows, problems = data.train.rows[:3], plan.objective.misfits(pair, len(data.train))
    if foreign:
        problems += [f"{'.'.join(loc)}: expected {text}; got {found}." for loc, text, found in refused(plan)]
        wrong = {str(p.dtype) for p in pair.parameters() if p.is_floating_point() and p.dtype != rows.dtype}
        if wrong and plan.objective.dtype is None:
            raise DeclarationError(f"pair: expected parameters of {rows.dtype} to fit; got {wrong}. Use pair.float().")
        if plan.train.alternate and not all(n.startswith(("model.", "guide.")) for n, _ in pair.named_parameters()):
            problems.append("train.alternate: expected a pair of two Modules; got plain functions' parameters. Use 0.")
    if isinstance(plan.objective, TraceMeanFieldELBO) and foreign and (names := pair.reads_itself(rows)):
        problems.append(f"objective.kind: expected trace_elbo; the guide infers parents of {', '.join(names)} from it.")
    if problems:
        raise DeclarationError(problems)


def _engine(plan: Plan, pair: Pair, data: Dataset, device: torch.device) -> str:
    if plan.objective.engine is not None:
        return plan.objective.engine
    if plan.train.alternate and device.type == "cuda":
        return "eager"
    if plan.train.engine != "auto":
        return "captured" if plan.train.engine == "compiled" and device.type == "cuda" else plan.train.engine
    batch = min(plan.train.batch_size, len(data.train))
    steps = plan.train.epochs * math.ceil(len(data.train) / batch)
    return choose_engine(steps, sum(p.numel() for p in pair.parameters()), batch, device)


def pick_device(name: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda[:i]" means here.

    Raises:
        DeviceError: a GPU was asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not name.startswith("cuda"):
        raise DeclarationError(f"device: expected auto, cpu or cuda; got {name!r}.")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(f"device: expected a CUDA GPU for {name!r}; this machine shows none. Use --device cpu.")
    return torch.device(name)


def differences(run: Run, plan: Plan, device: torch.device) -> list[str]:
    """What would make a continuation inexact: declaration, device, threads."""
    old, new = flat(run.plan.model_dump()), flat(plan.model_dump())
    lines = [f"{k} = {old.get(k)!r}; got {new.get(k)!r}." for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
    here = {"device": str(device), "threads": torch.get_num_threads()}
    there = run.files.manifest
    return lines + [f"{k} = {there[k]!r}; got {v!r}." for k, v in here.items() if k in there and there[k] != v]
