"""Detection of runs whose fitting process is no longer alive. Standard library only."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvae.runs.names import age_seconds

STALE_AFTER_SECONDS = 300.0
"""Seconds without heartbeat after which a run on another host counts as dead, or a temporary file as abandoned."""


def birth_of(pid: int) -> str | None:
    """Return the start time of process ``pid`` in clock ticks; "dead" for a zombie; None if it cannot be found out."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "dead" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return None


def is_alive(pid: object, birth: object) -> bool:
    """Return True if the process with this pid and start time (`birth`, against re-used pids) is alive on this host."""
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return False
    found = birth_of(pid)
    return found != "dead" and (found is None or birth is None or found == birth)


def is_stale(status: Mapping[str, Any]) -> bool:
    """Return True if the process that fits a run is dead, or has written no heartbeat for too long on another host."""
    if status.get("host") == platform.node():
        return not is_alive(status.get("pid"), status.get("birth"))
    age = age_seconds(status.get("heartbeat"))
    return age is None or age > STALE_AFTER_SECONDS
