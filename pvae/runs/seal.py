"""Seal of a run: every checkpoint repeats its declaration, data, versions and machine, so that edits are seen."""

from contextlib import suppress
from typing import Any

from pvae.errors import CheckpointError, DataError
from pvae.runs import checkpoint
from pvae.runs.rundir import RunDirectory
from pvae.util import files

UNSEALED = frozenset(["exports", "engine", "git", "argv", "started", "order", "spec", "declaration"])
"""Entries of the manifest that a checkpoint does not repeat."""


def seal(run: RunDirectory, declaration: str) -> dict[str, Any]:
    """Return what checkpoints repeat of a run: its declaration and entries of its manifest.

    {} for a run of an earlier version, which is not sealed.
    """
    found = run.manifest
    known = {key: value for key, value in found.items() if key not in UNSEALED}
    return {**known, "declaration": declaration} if "spec" in found else {}


def sealed(run: RunDirectory) -> dict[str, Any]:
    """Return what the newest checkpoint of a run with a readable manifest says that it is; {} where none says it."""
    for path in checkpoint.newest_first(run.path / "checkpoints"):
        with suppress(CheckpointError, DataError):
            return checkpoint.manifest_of(path)[3]
    return {}


def edits(run: RunDirectory) -> list[str]:
    """Return a line for every entry of the manifest that is not as it was written: its own digest and a checkpoint say.

    Raises:
        DataError: the manifest cannot be read.
    """
    known, found = sealed(run), run.manifest
    keys = sorted((known.keys() | found.keys()) - UNSEALED) if known else []
    pairs = ((key, known.get(key), found.get(key)) for key in keys)
    lines = [f"{key} = {was!r}; got {now!r} in manifest.json." for key, was, now in pairs if was != now]
    raw = files.read_object(run.path, "manifest.json")
    if not lines and ("sha256" in raw or known) and not (files.is_sealed(raw) and bool(known) <= ("spec" in raw)):
        lines = ["manifest.json, as it was written; got an edited one (its digest differs)."]
    if "spec" in found and not known and checkpoint.newest_first(run.path / "checkpoints"):
        lines.append("checkpoint, sealed as its run is; got one without a seal.")
    return lines
