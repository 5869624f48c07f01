"""Base class of exporters, which send every point of a run's metrics exactly once."""

import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from pvae import __version__
from pvae.errors import DataError, printable
from pvae.runs.rundir import RunDirectory
from pvae.util import Record, digest, toml

LONGEST_KEY, LONGEST_VALUE = 200, 500
"""Largest length (characters) of a key and of a value that every MLflow server accepts."""
LARGEST_ATTACHMENT = 16 << 20
"""Largest size (bytes) of a file of a run that is exported."""


class MetricPoint(Record):
    """Single value of a metric: key `<split>/<term>`, training step (x axis), value, and time in Unix seconds."""

    key: str
    step: int
    value: float
    time: float


Exported = dict[tuple[str, int], float]
"""Metric values that were already exported, by key and step."""


def safe_key(name: str, separator: str) -> str:
    """Return a metric's name as a key that every tracker accepts: letters, digits, `_`, `.`, `-` and `separator`.

    A name that has to be changed gets a digest as suffix, so that no two names have the same key.
    """
    parts = [re.sub(r"[^A-Za-z0-9_.-]", "_", part).strip(".") or "_" for part in name.split("/")]
    if (key := separator.join(parts)).replace(separator, "/") == name and len(key) <= LONGEST_KEY:
        return key
    return f"{key[: LONGEST_KEY - 9]}-{digest(name.encode('utf-8', 'surrogatepass'))[:8]}"


class Exporter(ABC):
    """Exporter of one run to one tracker, such as MLflow; it reads the run's files and changes none of them.

    Every number in a row of `metrics.jsonl` is exported as a point at the step of that row. A step never has two
    values of a metric: if the fit was rolled back and continued with other values, the run is exported anew.

    Arguments:
        files: directory of the run.

    Raises:
        ImportError: the tracker's package is not installed; other errors of the import are raised unchanged.
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
        """Open the existing export of this run, or start an empty one if `anew`; return its metric values."""

    @abstractmethod
    def write(self, points: Sequence[MetricPoint]) -> None:
        """Export metric values that were not exported before."""

    @abstractmethod
    def show(self) -> None:
        """Let a reader see what was exported so far, in place of an earlier export."""

    @abstractmethod
    def finish(self) -> str:
        """Export alerts, images and the final state of the run; return a description of the export's place."""

    @abstractmethod
    def key(self, split: str, term: str) -> str:
        """Return the tracker's key of a metric: a term, such as the ELBO, of a split."""

    def catch_up(self) -> None:
        """Export the metric rows that were added since the last call, during a fit."""
        self._send()
        self.show()

    def _send(self, *more: MetricPoint) -> None:
        rows = self.files.metrics_rows()
        if self.exported is None or rows[: len(self.rows)] != self.rows:  # at first, and where rows were removed
            self.exported, self.rows = self.begin(anew=False), []
        points = [*self._points(rows[len(self.rows) :]), *more]
        if any(self.exported.get((p.key, p.step), p.value) != p.value for p in points):
            self.exported, points = self.begin(anew=True), [*self._points(rows), *more]
        if fresh := [p for p in points if self.exported.pop((p.key, p.step), None) is None]:
            self.write(fresh)
        self.rows = rows

    def close(self) -> str:
        """Export everything up to the end of the run; return a description of the export's place."""
        status = self.files.status()
        time, step = self.started + float(status.get("seconds") or 0.0), int(status.get("step") or 0)
        figures = {name: status.get(name) for name in ("elbo", "log_joint", "epoch", "skipped")}
        last = (MetricPoint(self.key("last", k), step, float(v), time) for k, v in figures.items() if v is not None)
        self._send(*last)
        return self.finish()

    def _points(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[MetricPoint]:
        """Yield the metric values of rows as points; null (a value that is not finite) is left out."""
        for row in rows:
            try:
                step, split = int(row["step"]), str(row["split"])
                time = self.started + float(row.get("seconds", 0.0))
            except (ValueError, KeyError, TypeError):
                found = {"path": self.files.path / "metrics.jsonl", "row": str(row)[:60]}
                raise DataError.of("runs.export.row", **found) from None
            for term, value in row.items():
                if term not in ("step", "split", "seconds") and isinstance(value, int | float):
                    yield MetricPoint(self.key(split, term), step, float(value), time)

    def parameters(self) -> dict[str, Any]:
        """Return the declared settings of the experiment by dotted name, such as `train.epochs`."""
        return toml.flat(toml.parse(self.files.spec_text, "spec.toml"))

    def tags(self) -> dict[str, str]:
        """Return name, id, seed, device, parent, data fingerprint and pvae version of the run, as strings."""
        manifest = self.files.manifest
        data, parent = (manifest.get(key) or {} for key in ("data", "parent"))
        found = {"fingerprint": data.get("fingerprint"), "version": __version__, "parent": parent.get("run")}
        found |= {key: manifest.get(key) for key in ("name", "id", "seed", "device")}
        return {key: printable(str(value))[:LONGEST_VALUE] for key, value in found.items() if value is not None}

    def attached(self, *suffixes: str) -> list[Path]:
        """Return the files of the run's analyses and reports with one of the suffixes; not links and large files."""
        folders = [self.files.path / name for name in ("analysis", "report")]
        paths = [path for folder in folders if not folder.is_symlink() for path in sorted(folder.glob("*"))]
        found = [(path, path.lstat()) for path in paths if path.suffix in suffixes]
        return [path for path, s in found if stat.S_ISREG(s.st_mode) and s.st_size <= LARGEST_ATTACHMENT]
