"""Names of run folders, and time stamps in the files of a run. Standard library only."""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from datetime import UTC, datetime

RESERVED_SLUGS = frozenset(["latest", "con", "nul", "prn", "aux"])
LONGEST_SLUG = 64


def slug(name: str) -> str:
    """Return a safe folder name for an experiment: 1 to 64 ASCII letters, digits, ``.``, ``_`` and ``-``.

    A safe name stays unchanged; one that has no such characters, is too long or is reserved gets a digest as suffix.
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")
    if kept and len(kept) <= LONGEST_SLUG and kept.lower() not in RESERVED_SLUGS:
        return kept
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{kept[: LONGEST_SLUG - 9] or 'run'}-{digest}"


def utc_now() -> str:
    """Return the current time in UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def new_run_id() -> str:
    """Return a new run id: the current time in UTC and 8 random hexadecimal digits."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{os.urandom(4).hex()}"


def age_seconds(time: object, until: datetime | None = None) -> float | None:
    """Return the seconds from an ISO 8601 time to ``until`` (default now), or None if ``time`` is not such a time."""
    try:
        return ((until or datetime.now(UTC)) - datetime.fromisoformat(str(time))).total_seconds()
    except (ValueError, TypeError):
        return None
