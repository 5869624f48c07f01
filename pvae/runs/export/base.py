"""Base of exporters: the metrics of a run as points, of which each is exported once."""

from __future__ import annotations

import hashlib
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from pvae import __version__
from pvae.errors import DataError, printable
from pvae.runs.rundir import RunDirectory
from pvae.util import toml

LONGEST_KEY, LONGEST_VALUE = 200, 500
"""Characters that every MLflow server accepts in a key and in a value (newer servers accept more)."""
LARGEST_ATTACHMENT = 16 << 20
"""Bytes of the largest file of a run that is exported."""


@dataclass(frozen=True)
class MetricPoint:
    """One number of the metrics: `<split>/<term>`, the step (x axis), the value, and Unix seconds."""

    key: str
    step: int
    value: float
    time: float


Exported = dict[tuple[str, int], float]
"""Values that were exported before, by key and step."""


def safe_key(name: str, separator: str) -> str:
    """Return `name` as a key that every tracker accepts: letters, digits, `_`, `.`, `-`, joined by `separator`.

    A name that has to be changed gets a digest, so that no two names share a key.
    """
    parts = [re.sub(r"[^A-Za-z0-9_.-]", "_", part).strip(".") or "_" for part in name.split("/")]
    key = separator.join(parts)
    if key.replace(separator, "/") == name and len(key) <= LONGEST_KEY:
        return key
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{key[: LONGEST_KEY - 9]}-{digest}"


class Exporter(ABC):
    """One place that a run is exported to. It reads the run's files and changes none of them.

    A point is a number in a row of `metrics.jsonl`, at the step of that row. No step ever holds two values: rows that
    a crash or a rollback removed are compared with what was exported of them, and where the fit continued with other
    values the run is exported anew.

    Arguments:
        files: of the run.

    Raises:
        ImportError: its package is not installed, or any other error that importing the package raises.
    """

    kind: ClassVar[str]
    package: ClassVar[str]

    def __init__(self, files: RunDirectory) -> None:
        self.files = files
        self.started = datetime.fromisoformat(str(files.manifest["started"])).timestamp()
        self.rows: list[dict[str, Any]] = []
        self.exported: Exported | None = None

    @abstractmethod
    def begin(self, *, anew: bool) -> Exported:
        """Open what was exported of this run, or with `anew` something empty in its place; returns what it holds."""

    @abstractmethod
    def write(self, points: Sequence[MetricPoint]) -> None:
        """Export points, none of which is there yet."""

    @abstractmethod
    def finish(self) -> str:
        """Export what is complete only at the end (alerts, pictures, state); returns a sentence that says where."""

    @abstractmethod
    def key(self, split: str, term: str) -> str:
        """Return the name that a term of a split has there."""

    def catch_up(self, *more: MetricPoint) -> None:
        """Export the rows that were added since the last call, and more points."""
        rows = self.files.metrics_rows()
        if self.exported is None or rows[: len(self.rows)] != self.rows:  # at first, and where rows were removed
            self.exported, self.rows = self.begin(anew=False), []
        points = [*self._points(rows[len(self.rows) :]), *more]
        if any(self.exported.get((p.key, p.step), p.value) != p.value for p in points):
            self.exported, points = self.begin(anew=True), [*self._points(rows), *more]
        fresh = [p for p in points if self.exported.pop((p.key, p.step), None) is None]
        if fresh:
            self.write(fresh)
        self.rows = rows

    def close(self) -> str:
        """Export everything up to the end of the run; returns a sentence that says where it is."""
        status = self.files.status()
        time, step = self.started + float(status.get("seconds") or 0.0), int(status.get("step") or 0)
        figures = {name: status.get(name) for name in ("elbo", "epoch", "skipped")}
        last = (MetricPoint(self.key("last", k), step, float(v), time) for k, v in figures.items() if v is not None)
        self.catch_up(*last)
        return self.finish()

    def _points(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[MetricPoint]:
        """Yield the numbers of rows; null (not finite) is left out, seconds become the time of a point."""
        for row in rows:
            try:
                step, split = int(row["step"]), str(row["split"])
                time = self.started + float(row.get("seconds", 0.0))
            except (ValueError, KeyError, TypeError):
                raise DataError(
                    f"{self.files.path / 'metrics.jsonl'}: expected rows with a step and a split; got {str(row)[:60]}. "
                    "Delete that line to go on without it."
                ) from None
            for term, value in row.items():
                if term not in ("step", "split", "seconds") and isinstance(value, int | float):
                    yield MetricPoint(self.key(split, term), step, float(value), time)

    def parameters(self) -> dict[str, Any]:
        """Return the declaration as dotted names and their values."""
        return toml.flat(toml.parse(self.files.spec_text, "spec.toml"))

    def tags(self) -> dict[str, str]:
        """Return name, id, seed, fingerprint of the data, device, version and parent of the run."""
        manifest = self.files.manifest
        found = {
            "fingerprint": manifest.get("data", {}).get("fingerprint"), "version": __version__,
            "parent": (manifest.get("parent") or {}).get("run"),
            **{key: manifest.get(key) for key in ("name", "id", "seed", "device")},
        }  # fmt: skip
        return {key: printable(str(value))[:LONGEST_VALUE] for key, value in found.items() if value is not None}

    def attached(self, *suffixes: str) -> list[Path]:
        """Return the plain files of analyses and reports with one of these suffixes, sorted; links are left out."""
        folders = [self.files.path / name for name in ("analysis", "report")]
        paths = [path for folder in folders if not folder.is_symlink() for path in sorted(folder.glob("*"))]
        return [path for path in paths if path.suffix in suffixes and _is_plain(path)]


def _is_plain(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_size <= LARGEST_ATTACHMENT
