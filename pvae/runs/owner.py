"""Liveness of the process that owns a run. Standard library only."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvae.runs.names import age_seconds

STALE_AFTER_SECONDS = 300.0
"""Silence after which a run on another host is stale, and a temporary file is left over."""


def birth_of(pid: int) -> str | None:
    """Return the start time of process ``pid`` in ticks; "dead" for a zombie; None where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "dead" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return None


def is_alive(pid: object, birth: object) -> bool:
    """True if the process that wrote ``pid`` and ``birth`` lives on this host; a re-used pid has another birth."""
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
    """True if the process of a running status is gone, or silent for too long on another host."""
    if status.get("host") == platform.node():
        return not is_alive(status.get("pid"), status.get("birth"))
    age = age_seconds(status.get("heartbeat"))
    return age is None or age > STALE_AFTER_SECONDS
