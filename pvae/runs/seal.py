"""Seal of a run: every checkpoint repeats its declaration, data, versions and machine, so that edits are seen."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pvae.errors import CheckpointError, DataError
from pvae.runs import checkpoint, rundir
from pvae.util import files

ENDS = ("metrics", "ended")
"""Entries that only a checkpoint has: digest of the metrics until then, and True if the fit had ended."""
UNSEALED = frozenset(["exports", "engine", "git", "argv", "started", "order", "spec", "declaration", *ENDS])
"""Entries of the manifest that a checkpoint does not repeat."""


def seal(run: rundir.RunDirectory, declaration: str) -> dict[str, Any]:
    """Return what checkpoints repeat of a run: its declaration and entries of its manifest.

    {} for a run of an earlier version, which is not sealed.
    """
    found = run.manifest
    known = {key: value for key, value in found.items() if key not in UNSEALED}
    return {**known, "declaration": declaration} if "spec" in found else {}


def sealed(run: rundir.RunDirectory) -> dict[str, Any]:
    """Return what the newest checkpoint of a run with a readable manifest says that it is; {} where none says it."""
    for path in checkpoint.newest_first(run.path / "checkpoints"):
        with suppress(CheckpointError, DataError):
            return checkpoint.manifest_of(path)[3]
    return {}


def recorded(run: rundir.RunDirectory, sealed: dict[str, Any], ended: bool) -> dict[str, Any]:
    """Return the seal of a run with the digest of its metrics, flushed to the disk, and True if the fit has ended."""
    with suppress(FileNotFoundError):
        files.sync_folder(run.path / "metrics.jsonl")
    return {**sealed, "metrics": run.metrics_digest(), "ended": ended} if sealed else {}


def edits(run: rundir.RunDirectory) -> list[str]:
    """Return a line for what is not as it was written: entries of the manifest, metrics, the end told by the status.

    The manifest's own digest and the newest checkpoint say what it was.

    Raises:
        DataError: the manifest cannot be read.
    """
    known, found = sealed(run), run.manifest
    keys = sorted((known.keys() | found.keys()) - UNSEALED) if known else []
    keys = [key for key in keys if known.get(key) != found.get(key)]
    lines = [f"{key} = {known.get(key)!r}; got {found.get(key)!r} in manifest.json." for key in keys]
    raw = files.read_object(run.path, "manifest.json")
    if not lines and ("sha256" in raw or known) and not (files.is_sealed(raw) and bool(known) <= ("spec" in raw)):
        lines = ["manifest.json, as it was written; got an edited one (its digest differs)."]
    with suppress(CheckpointError, DataError):
        lines += _ends(run)
    if "spec" in found and not known and checkpoint.newest_first(run.path / "checkpoints"):
        lines.append("checkpoint, sealed as its run is; got one without a seal.")
    return lines


def _ends(run: rundir.RunDirectory) -> Iterator[str]:
    """Yield a line for metrics, and entries of a finished status, that the last checkpoint contradicts."""
    status = run.status()  # read first: a fit writes its last checkpoint before it says that it is finished
    if (saved := checkpoint.latest(run.path / "checkpoints", report=lambda _: None)) is None:
        return
    told, state = saved.run.get("metrics"), {**saved.state, "log_joint": saved.state.get("elbo")}
    if told is not None and told != run.metrics_digest(told.get("bytes")):
        yield "metrics.jsonl, as it was written; got an edited one (its digest differs)."
    if (finished := status.get("state") == "finished") and not saved.run.get("ended", True):
        yield "checkpoint of the end, which status.json tells; got one from before it."
    for key in ("epoch", "skipped", "elbo", "log_joint") if finished and "epoch" in state else ():
        if key in status and status[key] not in (state.get(key), state.get("best")):
            yield f"status.json, {key} = {state.get(key)!r}; got {status[key]!r}."
