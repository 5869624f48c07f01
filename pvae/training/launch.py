"""Start of a fit: run directory, device, engine of the optimisation step, and choice of the trainable parameters.

Differences of a continuation from what a run is, by which it would be another one or inexact.
"""

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pvae.component import IMPORTED
from pvae.data import Dataset
from pvae.errors import DataError, DeclarationError, DeviceError, misdeclared, refuse, text
from pvae.experiment.plan import Plan
from pvae.nn.precision import resolved
from pvae.objectives.base import ranked_by
from pvae.pair.pair import Pair
from pvae.runs import RunDirectory, checkpoint, find, seal
from pvae.runs.export.exporting import exporting
from pvae.runs.run import Run
from pvae.training import artefacts, evaluation, loop, step, trainer
from pvae.util import follows, group, toml
from pvae.util.provenance import UNCOUNTED, provenance, surroundings


def launch(
    plan: Plan, pair: Pair, dataset: Dataset, run_dir: Path, where: torch.device, *, given_pair: Pair | None = None,
    parent: dict[str, Any] | None = None, trainable: tuple[str, ...] | None = None, export: Sequence[str] = (),
    progress: bool,
) -> Run:  # fmt: skip
    """Make a run directory, train a pair, and return the run.

    Arguments:
        plan: objective and settings of the fit.
        pair: model and guide to fit.
        dataset: data set with its splits.
        run_dir: folder of the run directories.
        where: device of the fit.
        given_pair: the pair as the user wrote it by hand; None for a declared one.
        parent: name and last epoch of the first run of a second stage, for the manifest.
        trainable: prefixes of the names of the trainable parameters; None for all.
        export: kinds of exporters, such as "tensorboard".
        progress: print events and a progress bar.
    """
    group.Shards(plan.train.shards)  # before anything is made
    freeze(pair, trainable)
    engine = engine_of(plan, pair, dataset, where)
    fields = {
        **provenance(), "declared": given_pair is None, **({"origin": pair.origin} if pair.origin else {}),
        "imports": list(IMPORTED), "seed": plan.seed, "device": str(where), "engine": engine,
        "figure": ranked_by(plan.objective, plan.train.epochs, pair),
        "precision": resolved(plan.train.precision, where), "threads": torch.get_num_threads(), "parent": parent,
        "trainable": None if trainable is None else list(trainable),
        "data": {"source": dataset.source, "shape": list(dataset.shape), "fingerprint": dataset.fingerprint},
        "exports": list(export),
    }  # fmt: skip
    fitted = dataset.transforms.model_dump_json(exclude_defaults=True) if dataset.transforms else ""
    made = group.from_first(lambda: str(RunDirectory.create(run_dir, plan.name, plan.to_toml(), fields, fitted).path))
    files = RunDirectory(Path(made))
    for note in dataset.notes:
        files.log_event("alert" if "also occur in train" in note else "data", note)
    group.wait()
    progress = progress and not follows()
    with files.lock(), exporting(files, export, show=progress):
        if step.learned(pair):
            engine = str(files.manifest["engine"])
            loop.train(trainer.Trainer(plan, pair, dataset, files, group.local(where), engine, progress))
        else:
            keep_as_it_is(pair, dataset, plan, files)
    group.wait()
    return Run(files, data=dataset, pair=given_pair)


def freeze(pair: Pair, trainable: Sequence[str] | None) -> None:
    """Make trainable only the parameters whose names start with a prefix in `trainable`; None leaves all trainable.

    Modules outside of the prefixes are put into evaluation mode.
    """
    pair.train()
    if trainable is None:
        return
    for name, parameter in pair.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(trainable)))
    for name, module in pair.named_modules():
        module.training = not name or any(f"{name}.".startswith(t) or t.startswith(f"{name}.") for t in trainable)


def begun_before(run_dir: Path, plan: Plan) -> str | None:
    """Return the folder of the run of `plan` that this launch of torchrun began before it started its processes again.

    It starts them again where one ended or a machine joined; the launch is known by its id (`--rdzv-id`).
    """
    here = find.this_process()
    if here.get("launch", "none") == "none" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None

    def looked_for() -> str | None:
        for path in reversed(find.folders(run_dir / find.slug(plan.name))):
            with suppress(DataError, OSError):
                status, declared = RunDirectory(path).status(), (path / "spec.toml").read_text()
                other = any(status.get(key) != here[key] for key in ("pid", "birth", "host"))
                if other and status.get("launch") == here["launch"] and declared == plan.to_toml():
                    return str(path)
        return None

    return group.from_first(looked_for)


def keep_as_it_is(pair: Pair, data: Dataset, plan: Plan, files: RunDirectory) -> None:
    """Evaluate a pair without trainable parameters on the validation split, and write its checkpoint.

    This is the whole fit of a refit whose prior is q_agg itself.
    """
    row = evaluation.evaluate(pair, data.validation.rows, plan.seed, len(data.train))
    files.log_metrics({"epoch": 0, "step": 0, "seconds": 0.0, "split": "validation", **row})
    tensors, told = {"weights": dict(pair.state_dict()), "optimizer": {}}, seal.seal(files, plan.to_toml())
    where, run = files.path / "checkpoints", seal.recorded(files, told, ended=True)
    checkpoint.write(where, 0, tensors, {"select": "weights"}, run=run)
    total = pair.structure.total
    ended = {"epoch": 0, "epochs": 0, "step": 0, "engine": "none", "seconds": 0.0, total: row[total]}
    files.update_status(state="finished", **ended)


def engine_of(plan: Plan, pair: Pair, data: Dataset, device: torch.device) -> str:
    """Return the engine of a fit: the one its objective requires, the declared one, or the one expected faster."""
    if plan.objective.engine is not None:
        return plan.objective.engine
    if (plan.train.alternate or plan.train.shards > 1) and device.type == "cuda":
        return "eager"
    if plan.train.engine != "auto":
        return "captured" if plan.train.engine == "compiled" and device.type == "cuda" else plan.train.engine
    batch = min(plan.train.batch_size, len(data.train))
    steps = plan.train.epochs * math.ceil(len(data.train) / batch)
    shape = (-(-batch // plan.train.shards), *data.train.rows.shape[1:])
    entry = artefacts.entry_of(pair, plan.objective, resolved(plan.train.precision, device), shape)
    return step.choose_engine(steps, sum(p.numel() for p in pair.parameters()), batch, device, artefacts.is_kept(entry))


def pick_device(name: str) -> torch.device:
    """Return the device for "auto" (a GPU when there is one), "cpu" or "cuda[:i]".

    Raises:
        DeclarationError: it is none of these.
        DeviceError: a GPU was asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    misdeclared(name != "cpu" and not name.startswith("cuda"), f"device: expected auto, cpu or cuda; got {name!r}.")
    refuse(name.startswith("cuda") and not torch.cuda.is_available(), "training.launch.no_gpu", DeviceError, name=name)
    return torch.device(name)


# ---------------------------------------------------------------------- a continuation


RESUMABLE = ("train.", "objective.", "analysis.", "description", "device", "threads", "precision", "figure", "host",
             "platform", "versions", "manifest.json", "metrics.jsonl", "status.json", "checkpoint")  # fmt: skip
"""Prefixes of the keys that `allow_changes` permits to change in a run: settings of training, never of model or
data."""


def require_accepted(changed: list[str], files: RunDirectory, *, allow_changes: bool) -> None:
    """Raise DeclarationError for differences that no continuation may have, or that need `allow_changes`.

    Where a job of Slurm stopped, another one may go on on another node: that is how a queue works.
    """
    moved = ("host", "platform") if find.job() and files.status().get("job") else ()
    asked = [line for line in changed if not line.startswith(moved)]
    if (other := [line for line in changed if not line.startswith(RESUMABLE)]) or (asked and not allow_changes):
        lines = [f"{files.path.name}: expected the run's own {line}" for line in other or asked]
        raise DeclarationError([*lines, text("training.launch.advice", other=other)])


def computing(run: Run, plan: Plan, device: torch.device) -> dict[str, Any]:
    """Return manifest entries of a continuation: device, threads, precision; versions and machine of a sealed run.

    The precision is that recorded in the run, unless `plan` declares another.
    """
    found, precision = run.files.manifest, str(plan.train.precision)
    if "precision" in found and precision == own_plan(run).train.precision:
        precision = found["precision"].split()[0]
    here = surroundings() if "spec" in found else {}
    return {**here, "device": str(device), "threads": torch.get_num_threads(), "precision": resolved(precision, device)}


def differences(run: Run, plan: Plan, device: torch.device) -> list[str]:
    """Return a line for each difference from what a run is, by which its continuation would be another or inexact.

    They are changes and edits of the declaration, edits of the manifest, and, unless a finished run stays as it is,
    another device, machine or versions.
    """
    lines = [*changed_keys(own_plan(run), plan).values(), *seal.edits(run.files)]
    if not lines and not run.files.spec_is_own() and not seal.sealed(run.files):
        lines = ["spec.toml, as it was written; got an edited one (its digest differs)."]
    if not lines and run.status.get("state") == "finished":
        return []
    there, here = toml.flat(run.files.manifest), toml.flat(computing(run, plan, device))
    changed = {k: v for k, v in here.items() if k in there and there[k] != v and k not in UNCOUNTED}
    return lines + [f"{k} = {there[k]!r}; got {v!r}." for k, v in changed.items()]


def changed_keys(old: Plan, new: Plan) -> dict[str, str]:
    """Return a message line for every value that differs between two declarations, by its dotted key."""
    was, now = toml.flat(old.model_dump()), toml.flat(new.model_dump())
    lines = {key: f"{key} = {was.get(key)!r}; got {now.get(key)!r}." for key in sorted({*was, *now})}
    return {key: line for key, line in lines.items() if was.get(key) != now.get(key)}


def own_plan(run: Run) -> Plan:
    """Return the declaration that a run was fitted by, as its newest checkpoint repeats it, else that of its file."""
    text = seal.sealed(run.files).get("declaration")
    return run.plan if text is None else type(run.plan).from_toml(text, f"{run.path}, 'declaration' of a checkpoint")
