"""The files of one run: locked, replaced atomically, readable after a crash, and cheap to list.

Imports only the standard library: ``pvae runs`` must answer at once. Everything read stays inside the
run folder (plain files only, no links), and a full disk never stops a training: see ``RunDirectory.degraded``.
"""

from __future__ import annotations

import math
import os
import platform
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae.errors import BusyError, DataError, Interrupted, OutputError, StorageError
from pvae.runs.find import find_run, fresh_folder
from pvae.runs.names import slug, utc_now
from pvae.runs.owner import birth_of
from pvae.util.files import (
    MIB,
    append,
    json_line,
    make_folder,
    pretty,
    read_inside,
    read_lines,
    read_object,
    require_plain_target,
    write_atomic,
)

if TYPE_CHECKING:
    import pandas

RUN_STATES = ("running", "finished", "interrupted", "failed")
ALERT_KINDS = frozenset(["alert", "analysis", "fallback", "nonfinite", "storage"])
"""Kinds of events that are no errors and still need attention."""
MANIFEST_KEYS: dict[str, type] = {
    "name": str, "device": str, "engine": str, "declared": bool, "imports": list, "trainable": list, "parent": dict,
    "data": dict, "exports": list,
}  # fmt: skip
"""Types of the entries of a manifest; each may be missing."""
NULLABLE_KEYS = ("trainable", "parent")
"""Entries that may also be null."""


class RunDirectory:
    """The folder of one run. Only its lock's owner writes; anybody may read, also while it runs.

    ``degraded`` says why metrics, events or status could not be written (None: all is well). Such a failure is
    remembered and never raised, because hours of training are worth more than a row. ``on_metrics`` is called after
    each row of metrics.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.degraded: str | None = None
        self.on_metrics: Callable[[], None] = lambda: None
        self._writing = threading.RLock()

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    @classmethod
    def create(cls, root: Path, name: str) -> RunDirectory:
        """Make a new ``<root>/<slug>/<UTC>-<8 hex>/``; raises OutputError where it cannot be made."""
        try:
            run = cls(fresh_folder(Path(root) / slug(name)))
            run.write_manifest({"name": name, "id": run.path.name, "started": utc_now()})
        except (OSError, StorageError) as problem:
            raise OutputError(
                f"{root}: expected a folder to write runs into; got {problem}. Choose another."
            ) from problem
        return run

    @classmethod
    def open(cls, path: Path | str, root: Path = Path("runs")) -> RunDirectory:
        """Open the run at ``path``: a folder, or under ``root`` ``<name>`` (its newest), ``<name>/<id>`` or ``latest``.

        Raises DeclarationError, with the run names that come near, if there is none.
        """
        return cls(find_run(str(path), Path(root)))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Own the run: raises BusyError, with pid and host, where another process owns it.

        At the end a state that is still ``running`` becomes ``failed`` or ``interrupted``.
        """
        with self.held():
            try:
                self._claim()
                yield
            except BaseException as problem:
                self._leave("interrupted" if isinstance(problem, KeyboardInterrupt | Interrupted) else "failed")
                raise
            else:
                self._leave("interrupted")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out without a change of the status; raises BusyError as `lock` does."""
        from filelock import FileLock, Timeout

        lock = FileLock(self._plain_or_new(".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise BusyError(f"{self.path}: expected a run that nobody holds; got {self._owner()}.") from None
        except (OSError, NotImplementedError) as problem:
            raise OutputError(f"{self.path / '.lock'}: expected a file to lock; got {problem}.") from problem
        try:
            yield
        finally:
            lock.release()

    def _claim(self) -> None:
        pid = os.getpid()
        self.update_status(pid=pid, host=platform.node(), birth=birth_of(pid), started=utc_now())

    def _leave(self, state: str) -> None:
        if self._status_or_empty().get("state") == "running":
            self.update_status(state=state)

    def _owner(self) -> str:
        status = self._status_or_empty()
        pid, host, started = (status.get(key, "unknown") for key in ("pid", "host", "started"))
        return f"one held by process {pid} on host {host} since {started}; wait for it or stop it"

    def _plain_or_new(self, name: str) -> Path:
        """Return the path of a plain file or of none yet: opening a link would lead out of the run."""
        path = self.path / name
        try:
            require_plain_target(path)
        except OSError as problem:
            raise DataError(f"{path}: expected a plain file; got {problem.strerror}.") from problem
        return path

    @property
    def manifest(self) -> dict[str, Any]:
        """Name, id, start, versions and seeds of the run; raises DataError if damaged."""
        found = read_object(self.path, "manifest.json")
        for key, kind in MANIFEST_KEYS.items():
            if key in found and not isinstance(found[key], kind | None if key in NULLABLE_KEYS else kind):
                wanted = "text" if kind is str else "true or false" if kind is bool else f"a {kind.__name__}"
                raise DataError(
                    f"{self.path / 'manifest.json'}: expected {wanted} for {key!r}; got {str(found[key])[:60]!r}. "
                    f"Restore it from a copy of the run."
                )
        return found

    def write_manifest(self, fields: Mapping[str, Any]) -> None:
        """Replace the manifest; ``name``, ``id`` and ``started`` from the creation stay. Raises StorageError."""
        kept: dict[str, Any] = {}
        with suppress(DataError):
            kept = {key: value for key, value in self.manifest.items() if key in ("name", "id", "started")}
        write_atomic(self.path / "manifest.json", pretty({**fields, **kept}))

    @property
    def spec_text(self) -> str:
        """The resolved declaration, TOML; raises DataError if missing, over 1 MiB or not UTF-8."""
        try:
            return read_inside(self.path, "spec.toml", MIB).decode()
        except UnicodeDecodeError as problem:
            raise DataError(f"{self.path / 'spec.toml'}: expected UTF-8; got {problem}.") from problem

    def write_spec(self, text: str) -> None:
        """Keep the resolved declaration; raises StorageError."""
        write_atomic(self.path / "spec.toml", text)

    def status(self) -> dict[str, Any]:
        """The last status, {} before the first; raises DataError if damaged."""
        return read_object(self.path, "status.json") if os.path.lexists(self.path / "status.json") else {}

    def _status_or_empty(self) -> dict[str, Any]:
        try:
            return self.status()
        except DataError:
            return {}

    def update_status(self, **fields: Any) -> None:  # noqa: ANN401  (anything JSON can say)
        """Merge ``fields`` and a fresh ``heartbeat`` into the status, atomically; a failure degrades the run."""
        with self._writing:
            status = {**self._status_or_empty(), "heartbeat": utc_now(), **fields}
            if self.degraded is not None:
                status["degraded"] = self.degraded
            try:
                write_atomic(self.path / "status.json", pretty(status), durable=False)
            except StorageError as problem:
                self.degraded = self.degraded or str(problem)

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row to ``metrics.jsonl``, NaN and infinities as null, and call ``on_metrics``.

        A failure to write degrades the run.
        """
        self._log("metrics.jsonl", row)
        self.on_metrics()

    def log_event(self, kind: str, message: str, **fields: Any) -> None:  # noqa: ANN401  (anything JSON can say)
        """Append an event (an alert, a fallback, a stop) to ``events.jsonl``; a failure degrades the run."""
        self._log("events.jsonl", {**fields, "time": utc_now(), "kind": kind, "message": message})

    def _log(self, name: str, fields: Mapping[str, Any]) -> None:
        with self._writing:
            try:
                append(self.path / name, json_line(fields))
            except OSError as problem:
                self._degrade(f"{name} could not be written: {problem.strerror or problem}")

    def _degrade(self, why: str) -> None:
        first = self.degraded is None
        self.degraded = self.degraded or why
        if first:
            self.update_status()

    def metrics_rows(self) -> list[dict[str, Any]]:
        """Every row of the metrics; a torn last line is dropped; raises DataError for other damage."""
        return read_lines(self.path, "metrics.jsonl")

    def metrics(self) -> pandas.DataFrame:
        """The metrics as a table, null as NaN; raises DataError where they cannot be one."""
        import pandas

        rows = self.metrics_rows()
        try:
            return pandas.DataFrame([{k: math.nan if v is None else v for k, v in row.items()} for row in rows])
        except (ValueError, OverflowError) as problem:  # half a surrogate pair, which JSON can spell
            raise DataError(
                f"{self.path / 'metrics.jsonl'}: expected names and values that a table can hold; got: {problem}. "
                f"Delete the line that holds them."
            ) from problem

    def truncate_metrics(self, epoch: int) -> None:
        """Drop the rows after ``epoch``, atomically: a resumed run writes them again. Raises StorageError."""
        with self._writing:
            if os.path.lexists(self.path / "metrics.jsonl"):
                kept = [row for row in self.metrics_rows() if not _is_after(row, epoch)]
                write_atomic(self.path / "metrics.jsonl", b"".join(map(json_line, kept)))

    def events(self) -> list[dict[str, Any]]:
        """Every event; a torn last line is dropped; raises DataError for other damage."""
        return read_lines(self.path, "events.jsonl")

    def alerts(self) -> list[str]:
        """Messages of the events that need attention, in order; raises DataError as `events` does."""
        return [str(event.get("message")) for event in self.events() if event.get("kind") in ALERT_KINDS]

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints, made on demand."""
        return self._folder("checkpoints")

    @property
    def analysis(self) -> Path:
        """The folder of analyses, made on demand."""
        return self._folder("analysis")

    @property
    def report(self) -> Path:
        """The folder of reports, made on demand."""
        return self._folder("report")

    def exports(self, kind: str) -> Path:
        """The folder of what an exporter of a kind writes, made on demand."""
        self._folder("exports")
        return self._folder(f"exports/{kind}")

    def _folder(self, name: str) -> Path:
        return make_folder(self.path / name)


def _is_after(row: Mapping[str, Any], epoch: int) -> bool:
    found = row.get("epoch")
    return isinstance(found, int | float) and found > epoch
