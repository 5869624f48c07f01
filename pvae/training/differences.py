"""Differences of a continuation from what a run is, by which it would be another one or inexact."""

from typing import Any

import torch

from pvae.errors import DeclarationError
from pvae.experiment.plan import Plan
from pvae.nn.precision import resolved
from pvae.runs import find
from pvae.runs.run import Run
from pvae.runs.rundir import RunDirectory
from pvae.runs.seal import edits, sealed
from pvae.util.provenance import UNCOUNTED, surroundings
from pvae.util.toml import flat

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
    other = [line for line in changed if not line.startswith(RESUMABLE)]
    if other or (asked and not allow_changes):
        advice = "The continuation would not be exact; say --allow-changes (allow_changes=True) to go on all the same."
        if other:
            advice = "This would be another model or other data, which a run cannot become: fit it anew."
        lines = [f"{files.path.name}: expected the run's own {line}" for line in other or asked]
        raise DeclarationError([*lines, advice])


def precision_of(run: Run, plan: Plan, device: torch.device) -> str:
    """Return the precision of a continuation on a device: that recorded in the run, unless `plan` declares another."""
    recorded, declared = str(run.files.manifest.get("precision", "")), plan.train.precision
    return resolved(recorded.split()[0] if recorded and declared == own_plan(run).train.precision else declared, device)


def computing(run: Run, plan: Plan, device: torch.device) -> dict[str, Any]:
    """Return manifest entries of a continuation: device, threads, precision; versions and machine of a sealed run."""
    here = surroundings() if "spec" in run.files.manifest else {}
    here |= {"device": str(device), "threads": torch.get_num_threads(), "precision": precision_of(run, plan, device)}
    return here


def differences(run: Run, plan: Plan, device: torch.device) -> list[str]:
    """Return a line for each difference from what a run is, by which its continuation would be another or inexact.

    They are changes and edits of the declaration, edits of the manifest, and, unless a finished run stays as it is,
    another device, machine or versions.
    """
    lines = [*changed_keys(own_plan(run), plan).values(), *edits(run.files)]
    if not lines and not run.files.spec_is_own() and not sealed(run.files):
        lines = ["spec.toml, as it was written; got an edited one (its digest differs)."]
    if not lines and run.status.get("state") == "finished":
        return []
    there, here = flat(run.files.manifest), flat(computing(run, plan, device))
    changed = {k: v for k, v in here.items() if k in there and there[k] != v and k not in UNCOUNTED}
    return lines + [f"{k} = {there[k]!r}; got {v!r}." for k, v in changed.items()]


def changed_keys(old: Plan, new: Plan) -> dict[str, str]:
    """Return a message line for every value that differs between two declarations, by its dotted key."""
    was, now = flat(old.model_dump()), flat(new.model_dump())
    lines = {key: f"{key} = {was.get(key)!r}; got {now.get(key)!r}." for key in sorted({*was, *now})}
    return {key: line for key, line in lines.items() if was.get(key) != now.get(key)}


def own_plan(run: Run) -> Plan:
    """Return the declaration that a run was fitted by, as its newest checkpoint repeats it, else that of its file."""
    text = sealed(run.files).get("declaration")
    return run.plan if text is None else type(run.plan).from_toml(text, f"{run.path}, 'declaration' of a checkpoint")
