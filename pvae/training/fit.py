"""Entry point of stochastic variational inference: `fit`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pvae.data import Dataset, load
from pvae.data.sources.python import TensorSource, is_bare
from pvae.data.sources.tabular import FrameSource, Tabular
from pvae.errors import DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.experiment.plan import Plan, Train
from pvae.experiment.rules import refused
from pvae.objectives.base import Objective
from pvae.objectives.elbo import TraceMeanFieldELBO
from pvae.pair.pair import Pair
from pvae.runs.export.exporting import require
from pvae.runs.run import Run, attended
from pvae.training.launch import launch, pick_device
from pvae.training.resume import second_stage
from pvae.util.memory import require_training_memory


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
    """Fit an experiment by stochastic variational inference and write weights, metrics and events to a run directory.

    Arguments:
        what: a zoo name, a TOML file, an `Experiment`, or a hand-written `Pair` (then `data` is needed).
        overrides: dotted overrides, `"train.epochs=20"`.
        data: replaces the declared source: anything that `Dataset.of` takes, such as a `Dataset`, a tensor or array
            `(n, *event)`, a torch `Dataset`, AnnData.
        objective: objective of a hand-written pair; default `trace_elbo`.
        train: training settings of a hand-written pair; default `Train()`.
        seed: replaces the declared seed.
        name: replaces the declared name.
        run_dir: folder of the run directories.
        data_dir: folder that is searched first for data files.
        device: "auto" (a GPU when there is one), "cpu" or "cuda".
        export: `"tensorboard"`, `"mlflow"`: trackers to which the run is also recorded, then and when it is resumed.
        progress: show a bar on a terminal, a line every few seconds elsewhere.

    Returns:
        The run, with the best (or last, as declared) weights in `run.pair`; for a declaration with `refit`, the run of
        the second stage, whose manifest names the first run.

    Raises:
        DeclarationError: the declaration is wrong, needs too much memory, or its objective cannot fit the pair.
        MissingExtraError: a package that `export` needs is not installed.
        DataError: data are missing, broken, or outside the likelihood's support.
        NonFiniteError: the loss became NaN or infinite and the policy is "stop".
        DeviceError: memory ran out, or the device was lost; a checkpoint was written if it could be.
        Interrupted: a signal arrived; a checkpoint was written.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import pvae
        >>> runs = TemporaryDirectory()
        >>> few = "data.splits.train=[0, 200]"
        >>> run = pvae.fit("vae", few, "train.epochs=1", run_dir=runs.name, progress=False)
        >>> run.status["state"]
        'finished'
        >>> found = pvae.analysis.surgery(run.pair, run.data.test.x[:50])
        >>> found.elbo.kind, -60 < found.elbo.value < -30  # nats per datum, after three steps
        ('estimate', True)
        >>> runs.cleanup()
    """
    kinds, where = require(export), pick_device(device)
    changes = {k: v for k, v in (("seed", seed), ("name", name)) if v is not None}
    if isinstance(what, Pair):
        given = {k: v for k, v in (("objective", objective), ("train", train)) if v is not None}
        plan: Plan = Plan(name="pair", **given).with_overrides(*overrides).with_changes(changes)  # type: ignore[arg-type]
        dataset, pair = _handwritten(what, data)
    elif objective is not None or train is not None:
        raise DeclarationError("fit: objective= and train= belong to a hand-written pair; declare them, or override.")
    else:
        read = what.with_overrides(*overrides) if isinstance(what, Experiment) else Experiment.load(what, overrides)
        plan, dataset, pair = _declared(read.with_changes(changes), data, data_dir)
    rows = min(plan.train.batch_size, len(dataset.train)) * getattr(plan.objective, "particles", 1)
    require_training_memory(pair, math.prod(dataset.shape), rows, where)
    attended(pair, dataset.train)
    given_pair = what if isinstance(what, Pair) else None
    _require_fittable(plan, pair, dataset, given_pair is not None)
    run = launch(plan, pair, dataset, Path(run_dir), where, given_pair=given_pair, export=kinds, progress=progress)
    return second_stage(run, device, progress)


def _handwritten(given: Pair, data: Any) -> tuple[Dataset, Pair]:
    """Return the data set to fit and the pair adopted to it."""
    if data is None:
        raise DeclarationError("fit: expected data=... for a hand-written pair; got none.")
    dataset = Dataset.of(data, TensorSource(shape=()) if is_bare(data) else TensorSource())  # bare numbers are allowed
    if problems := given.check(dataset.train.rows[:3]):
        raise DeclarationError([f"pair: {problem}" for problem in problems])
    return dataset, given.adopt(dataset.train.rows[:2])


def _declared(plan: Experiment, data: Any, data_dir: str | Path | None) -> tuple[Experiment, Dataset, Pair]:
    """Return the data set to fit, the pair built for it, and the declaration with the source of data passed in."""
    if data is None:
        dataset = load(plan.data, data_dir=Path(data_dir) if data_dir else None, seed=plan.seed)
    else:
        source = passed_source(plan)
        plan, dataset = plan.model_copy(update={"data": source}), Dataset.of(data, source)
    dataset = plan.conditioned(dataset)
    dataset.require_support(plan.observed().support, plan.decoder.likelihood.hint)
    return plan, dataset, plan.build(dataset.shape)


def passed_source(plan: Experiment) -> TensorSource | FrameSource:
    """Return a source for data passed in Python, with the declared transforms (scale, shape, splits, columns ...)."""
    kind = FrameSource if isinstance(plan.data, Tabular) else TensorSource
    shared = (plan.data.model_fields_set & kind.model_fields.keys()) - {"source"}
    return kind(**{name: getattr(plan.data, name) for name in shared})


def _require_fittable(plan: Plan, pair: Pair, data: Dataset, foreign: bool) -> None:
    """Raise DeclarationError if the objective and training settings of `plan` cannot fit `pair` correctly.

    Called before a run directory is made; `foreign` is True for a hand-written pair, which gets further checks.
    """
    rows, problems = data.train.rows[:3], plan.objective.misfits(pair, len(data.train))
    if foreign:
        problems += [f"{loc}: expected {text}; got {found}." for loc, text, found in refused(plan)]
        wrong = {str(p.dtype) for p in pair.parameters() if p.is_floating_point() and p.dtype != rows.dtype}
        if wrong and plan.objective.dtype is None:
            raise DeclarationError(f"pair: expected parameters of {rows.dtype} to fit; got {wrong}. Use pair.float().")
        if plan.train.alternate and not all(n.startswith(("model.", "guide.")) for n, _ in pair.named_parameters()):
            problems.append("train.alternate: expected a pair of two Modules; got plain functions' parameters. Use 0.")
    if isinstance(plan.objective, TraceMeanFieldELBO) and foreign:
        names = ", ".join(sorted(pair.dependencies(rows).bottom_up))
        if names:
            problems.append(f"objective.kind: expected trace_elbo; the guide infers parents of {names} from it.")
    if problems:
        raise DeclarationError(problems)
