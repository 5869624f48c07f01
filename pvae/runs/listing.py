"""Listing of all runs below a folder with their states, as `pvae runs` prints it. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from pvae.errors import DataError, PvaeError
from pvae.runs.find import folders
from pvae.runs.names import age_seconds
from pvae.runs.owner import is_stale
from pvae.runs.rundir import RUN_STATES, RunDirectory


def list_runs(root: Path) -> list[dict[str, Any]]:
    """Return one row (dict) for every run under ``root``, sorted by start time; never raises.

    The keys of a row are name, id, path, state, epoch, epochs, elbo, started, seconds, why. ``state`` is the state in
    the run's status; ``created`` before the first status; ``stale`` for a running one whose process is dead (or, on
    another host, has written no heartbeat for five minutes); ``broken`` if files are damaged (``why`` is the reason).
    """
    rows = [_row(run) for name in folders(Path(root)) for run in folders(name)]
    return sorted(rows, key=lambda row: (row["started"], row["id"]))


def _row(path: Path) -> dict[str, Any]:
    nothing = dict.fromkeys(("epoch", "epochs", "elbo", "seconds", "why"))
    row = {"name": path.parent.name, "id": path.name, "path": str(path), **nothing, "started": _started(path.name)}
    try:
        return {**row, **_facts(RunDirectory(path))}
    except (PvaeError, OSError) as problem:
        return {**row, "state": "broken", "why": str(problem)}


def _started(run_id: str) -> str:
    """Return the start time (ISO 8601) that is part of a run id, or an empty string."""
    try:
        return datetime.strptime(run_id[:16], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).isoformat(timespec="milliseconds")
    except ValueError:
        return ""


def _facts(run: RunDirectory) -> dict[str, Any]:
    manifest, status = run.manifest, run.status()
    started = _text(run, manifest, "started", _started(run.path.name))
    return {
        "name": _text(run, manifest, "name", run.path.parent.name),
        "state": _state(run, status),
        **{key: _number(status.get(key)) for key in ("epoch", "epochs", "elbo")},
        "started": started,
        "seconds": _seconds(status),
    }


def _text(run: RunDirectory, fields: Mapping[str, Any], key: str, default: str) -> str:
    found = fields.get(key, default)
    if not isinstance(found, str):
        raise DataError(f"{run.path / 'manifest.json'}: expected text for {key!r}; got {found!r}.")
    return found


def _state(run: RunDirectory, status: Mapping[str, Any]) -> str:
    state = status.get("state", "created")
    if state not in (*RUN_STATES, "created"):
        raise DataError(f"{run.path / 'status.json'}: expected a state of {', '.join(RUN_STATES)}; got {state!r}.")
    return "stale" if state == "running" and is_stale(status) else str(state)


def _number(value: object) -> int | float | None:
    """Return ``value`` if it is a number of displayable size, else None; a damaged status may contain anything."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300
    return cast("int | float", value) if known else None


def _seconds(status: Mapping[str, Any]) -> float | None:
    """Return the training time in a run's status, else the seconds from the process's start to its last heartbeat."""
    told = _number(status.get("seconds"))
    if told is not None:
        return float(told)
    begun, silent = age_seconds(status.get("started")), age_seconds(status.get("heartbeat"))
    return None if begun is None or silent is None else round(max(0.0, begun - silent), 3)
