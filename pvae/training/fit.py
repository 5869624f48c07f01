"""Entry point of stochastic variational inference: `fit`."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pvae.data import Dataset
from pvae.data.sources.python import TensorSource, is_bare
from pvae.data.sources.tabular import FrameSource, Tabular
from pvae.errors import DeclarationError, misdeclared, refuse, text
from pvae.experiment.experiment import Experiment, reading
from pvae.experiment.plan import Plan, Train
from pvae.experiment.rules import refused
from pvae.objectives import base, elbo
from pvae.pair import CHECKED_ROWS, Pair, evaluating, quiet
from pvae.runs.export.exporting import require
from pvae.runs.run import Run
from pvae.runs.weights import attended
from pvae.training.launch import begun_before, launch, pick_device
from pvae.training.resume import resume, second_stage
from pvae.util import group, memory

BATCHES_LOOKED_AT = 100
"""Largest number of batches of each split on which a hand-written pair is run before its fit, to find all its sites."""


def fit(
    what: str | Path | Experiment | Pair, *overrides: str, data: Any = None,
    covariates: Mapping[str, Any] | None = None, objective: base.Objective | None = None,
    loss: Any = None, train: Train | None = None, seed: int | None = None, name: str | None = None,
    run_dir: str | Path = "runs", data_dir: str | Path | None = None, device: str = "auto", export: Sequence[str] = (),
    progress: bool = True,
) -> Run:  # fmt: skip
    """Fit an experiment by stochastic variational inference and write weights, metrics and events to a run directory.

    Arguments:
        what: a zoo name, a TOML file, an `Experiment`, or a hand-written `Pair` (then `data` is needed).
        overrides: dotted overrides, `"train.epochs=20"`.
        data: replaces the declared source: anything that `Dataset.of` takes, such as a `Dataset`, a tensor or array
            `(n, *event)`, a torch `Dataset`, AnnData; for a hand-written pair of several arguments a tuple or a
            dictionary of tensors.
        covariates: values beside x by name, `(n,)` or `(n, d)`, with data that are a tensor, an array or a torch
            dataset: those that the `of` of a declared covariate names. `{"x": data, **covariates}` as data is the same.
        objective: objective of a hand-written pair; default `trace_elbo`.
        loss: an ELBO of `pyro.infer` for a hand-written pair, such as `TraceEnum_ELBO()`. Where pvae's own step has the
            same loss and gradient, found on a batch, it is taken; elsewhere Pyro's runs as it stands.
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
        Interrupted: a signal arrived; the message says which checkpoint stands.

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
        dataset, pair = _handwritten(what, data, plan.train.batch_size)
        if loss is not None:
            plan = plan.model_copy(update={"objective": objective_of(loss, pair, dataset)})
    elif objective is not None or loss is not None or train is not None:
        raise DeclarationError.of("training.fit.declared")
    else:
        read = what.with_overrides(*overrides) if isinstance(what, Experiment) else Experiment.load(what, overrides)
        plan, dataset, pair = _declared(read.with_changes(changes), data, covariates, data_dir, where)
    attended(pair, lambda: dataset.train)
    rows = min(plan.train.batch_size, len(dataset.train))
    step = partial(base.weigh_step, plan.objective, row=dataset.train.rows.shape[1:], rows=rows)
    particles, of_data = getattr(plan.objective, "particles", 1), step if pair.made_of_data() else None
    memory.require_training_memory(pair, math.prod(dataset.shape), rows * particles, where, of_data)
    given_pair = what if isinstance(what, Pair) else None
    _require_fittable(plan, pair, dataset, given_pair is not None)
    with group.joined(where):
        if begun := begun_before(Path(run_dir), plan):
            again = partial(resume, begun, allow_changes=True, device=device, export=export, progress=progress)
            return again(data=dataset, pair=given_pair)
        run = launch(plan, pair, dataset, Path(run_dir), where, given_pair=given_pair, export=kinds, progress=progress)
        return second_stage(run, device, progress)


def kept_as_it_is(pair: Pair, data: Any, run_dir: str | Path) -> Run:
    """Return a new run that holds a hand-written pair with its present parameters, without a fit, for a page on it."""
    plan = Plan(name="pair")
    (dataset, pair), cpu = _handwritten(pair, data, plan.train.batch_size), torch.device("cpu")
    return launch(plan, pair, dataset, Path(run_dir), cpu, given_pair=pair, trainable=(), progress=False)


def _handwritten(given: Pair, data: Any, batch: int) -> tuple[Dataset, Pair]:
    """Return the data set to fit and the pair adopted to it."""
    misdeclared(data is None, "fit: expected data=... for a hand-written pair; got none.")
    rows = given.pack(data)
    dataset = Dataset.of(rows, TensorSource(shape=()) if is_bare(rows) else TensorSource())  # bare numbers are allowed
    misdeclared(found := given.check(data if given.arguments else _first_rows(rows, dataset)), [*map(str, found)])
    return dataset, look_through(given, dataset, batch, rows)


def _first_rows(original: Any, dataset: Dataset) -> Any:
    """Return some rows of the data as they were passed, whole numbers as such; else of the data set."""
    whole = isinstance(original, torch.Tensor | np.ndarray) and not torch.as_tensor(original).is_floating_point()
    return torch.as_tensor(original)[:CHECKED_ROWS] if whole else dataset.train.rows[:CHECKED_ROWS]


def look_through(pair: Pair, dataset: Dataset, batch: int, original: Any) -> Pair:
    """Run a hand-written pair on batches of training and validation rows, so that the fit knows all its sites.

    Raises:
        DataError: the programs have parameters for every row, so that they cannot be fitted in batches.
    """
    first = _first_rows(original, dataset)
    pair.accept(first if len(first) <= len(dataset.train) else first[: len(dataset.train)])
    refuse(pair.structure.rows is not None, "training.fit.rows", rows=pair.structure.rows)
    with quiet(pair, dataset.train.rows[:1]):
        for rows in (dataset.train.rows, dataset.validation.rows):
            for start in range(0, min(len(rows), batch * BATCHES_LOOKED_AT), batch):
                pair.traces(pair.accept(rows[start : start + batch]))
    return pair


def objective_of(loss: Any, pair: Pair, dataset: Dataset) -> base.Objective:
    """Return pvae's own objective for an ELBO of `pyro.infer` where loss and gradient are the same, else Pyro's."""
    stock = elbo.PyroELBO.of(loss)
    own: base.Objective = elbo.TraceELBO(particles=stock.particles)
    if stock.elbo == "TraceMeanField_ELBO" and stock.particles == 1:
        own = elbo.TraceMeanFieldELBO()
    if stock.elbo not in ("Trace_ELBO", "TraceMeanField_ELBO", "TraceEnum_ELBO"):
        return stock
    single, one = stock.model_copy(update={"particles": 1}), own.model_copy(update={"particles": 1})
    x = pair.accept(dataset.train.rows[: min(len(dataset.train), 64)])
    with evaluating(pair):
        return own if elbo.same_step(single, one, pair, x) else stock


def _declared(
    plan: Experiment, data: Any, covariates: Mapping[str, Any] | None, data_dir: str | Path | None, device: torch.device
) -> tuple[Experiment, Dataset, Pair]:
    """Return the data set to fit, the pair built for it, and the declaration with the source of data passed in."""
    with reading(plan):
        if data is None:
            dataset = plan.load_data(Path(data_dir) if data_dir else None)
        else:
            plan = plan.model_copy(update={"data": passed_source(plan)})
            dataset = Dataset.of({"x": data, **covariates} if covariates else data, plan.source)  # type: ignore[arg-type]
    refuse(dataset.masked and not plan.observed().takes_missing, "training.fit.missing", plan=plan)
    dataset = plan.conditioned(dataset)
    dataset.require_support(plan.observed().support, plan.decoder.likelihood.hint)
    return plan, dataset, plan.build(dataset.shape, min(plan.train.batch_size, len(dataset.train)), device)


def passed_source(plan: Experiment) -> TensorSource | FrameSource:
    """Return a source for data passed in Python, with the declared transforms (scale, shape, splits, columns ...)."""
    kind = FrameSource if isinstance(plan.data, Tabular) else TensorSource
    shared = (plan.data.model_fields_set & kind.model_fields.keys()) - {"source"}
    return kind(**{name: getattr(plan.data, name) for name in shared})


def _require_fittable(plan: Plan, pair: Pair, data: Dataset, foreign: bool) -> None:
    """Raise DeclarationError if the objective and training settings of `plan` cannot fit `pair` correctly.

    Called before a run directory is made; `foreign` is True for a hand-written pair, which gets further checks.
    """
    rows = data.train.rows[: plan.train.batch_size if foreign else 3]
    problems = plan.objective.misfits(pair, len(data.train))
    if foreign:
        if not any(True for _ in pair.parameters()):
            problems.append(text("training.fit.no_parameter"))
        problems += [f"{loc}: expected {text}; got {found}." for loc, text, found in refused(plan)]
        wrong = {str(p.dtype) for p in pair.parameters() if p.is_floating_point() and p.dtype != rows.dtype}
        misdeclared(wrong and plan.objective.dtype is None, "training.fit.dtype", rows=rows, wrong=wrong)
        if plan.train.alternate and not all(n.startswith(("model.", "guide.")) for n, _ in pair.named_parameters()):
            problems.append("train.alternate: expected a pair of two Modules; got plain functions' parameters. Use 0.")
    if isinstance(plan.objective, elbo.TraceMeanFieldELBO) and foreign:
        if names := ", ".join(sorted(pair.dependencies(rows).bottom_up)):
            problems.append(f"objective.kind: expected trace_elbo; the guide infers parents of {names} from it.")
    misdeclared(problems, problems)
