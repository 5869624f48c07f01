"""Directory of one run: its files are locked, replaced atomically, readable after a crash, and cheap to list.

Imports only the standard library, so that ``pvae runs`` is fast. Only regular files inside the run folder are read, no
links, and a full disk never stops a fit: see ``RunDirectory.degraded``.
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
"""Kinds of events that are shown to the user as alerts."""
MANIFEST_KEYS: dict[str, type] = {
    "name": str, "device": str, "engine": str, "declared": bool, "imports": list, "trainable": list, "parent": dict,
    "data": dict, "exports": list,
}  # fmt: skip
"""Type of each known entry of a run's manifest; every entry may be missing."""
NULLABLE_KEYS = ("trainable", "parent")
"""Entries of a run's manifest that may also be null."""


class RunDirectory:
    """Directory of one run. Only the process that holds its lock writes; every process may read, also during the fit.

    ``degraded`` is the reason why metrics, events or status could not be written, or None. Such a failure is recorded
    and never raised, because hours of training are worth more than a row of metrics. ``on_metrics`` is a function that
    is called after each row of metrics.
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
        """Return a new run directory ``<root>/<slug of name>/<UTC time>-<8 hex digits>/``; raises OutputError."""
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
        """Return the directory of an existing run.

        ``path`` is its folder, or under ``root`` a ``<name>`` (for its newest run), ``<name>/<id>`` or ``latest``.
        Raises DeclarationError, which suggests similar names, if there is no such run.
        """
        return cls(find_run(str(path), Path(root)))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run's lock in the context and record this process in the status, as a fit does.

        At the end a state that is still ``running`` becomes ``failed`` or ``interrupted``. Raises BusyError, with pid
        and host, if another process holds the lock.
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
        """Hold the run's lock in the context without changing the status; raises BusyError if it is taken."""
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
        """Return the path of a file of the run after checking that it is a regular file or does not exist yet."""
        path = self.path / name
        try:
            require_plain_target(path)
        except OSError as problem:
            raise DataError(f"{path}: expected a plain file; got {problem.strerror}.") from problem
        return path

    @property
    def manifest(self) -> dict[str, Any]:
        """Manifest of the run: its name, id, start time, versions, seed and so on; raises DataError if damaged."""
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
        """Replace the manifest, except ``name``, ``id`` and ``started``, which never change. Raises StorageError."""
        kept: dict[str, Any] = {}
        with suppress(DataError):
            kept = {key: value for key, value in self.manifest.items() if key in ("name", "id", "started")}
        write_atomic(self.path / "manifest.json", pretty({**fields, **kept}))

    @property
    def spec_text(self) -> str:
        """Complete declaration of the experiment as TOML; raises DataError if missing, over 1 MiB or not UTF-8."""
        try:
            return read_inside(self.path, "spec.toml", MIB).decode()
        except UnicodeDecodeError as problem:
            raise DataError(f"{self.path / 'spec.toml'}: expected UTF-8; got {problem}.") from problem

    def write_spec(self, text: str) -> None:
        """Write the complete declaration of the experiment (TOML) to the run; raises StorageError."""
        write_atomic(self.path / "spec.toml", text)

    def status(self) -> dict[str, Any]:
        """Return the latest status of the run (state, epoch, ELBO), {} if none yet; raises DataError if damaged."""
        return read_object(self.path, "status.json") if os.path.lexists(self.path / "status.json") else {}

    def _status_or_empty(self) -> dict[str, Any]:
        try:
            return self.status()
        except DataError:
            return {}

    def update_status(self, **fields: Any) -> None:  # noqa: ANN401  (anything JSON can say)
        """Update the status with ``fields`` and a new heartbeat, atomically; a failure is recorded in `degraded`."""
        with self._writing:
            status = {**self._status_or_empty(), "heartbeat": utc_now(), **fields}
            if self.degraded is not None:
                status["degraded"] = self.degraded
            try:
                write_atomic(self.path / "status.json", pretty(status), durable=False)
            except StorageError as problem:
                self.degraded = self.degraded or str(problem)

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row to ``metrics.jsonl``, with NaN and infinities as null, and call ``on_metrics``.

        A failure to write is recorded in `degraded`.
        """
        self._log("metrics.jsonl", row)
        self.on_metrics()

    def log_event(self, kind: str, message: str, **fields: Any) -> None:  # noqa: ANN401  (anything JSON can say)
        """Append an event, such as an alert, to ``events.jsonl``; a failure to write is recorded in `degraded`."""
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
        """Return all rows of metrics; an incomplete last line is dropped; raises DataError for other damage."""
        return read_lines(self.path, "metrics.jsonl")

    def metrics(self) -> pandas.DataFrame:
        """Return the metrics as a data frame, with null as NaN; raises DataError if they cannot be converted."""
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
        """Remove the rows of metrics after ``epoch``, which a resumed fit writes again. Raises StorageError."""
        with self._writing:
            if os.path.lexists(self.path / "metrics.jsonl"):
                kept = [row for row in self.metrics_rows() if not _is_after(row, epoch)]
                write_atomic(self.path / "metrics.jsonl", b"".join(map(json_line, kept)))

    def events(self) -> list[dict[str, Any]]:
        """Return all events; an incomplete last line is dropped; raises DataError for other damage."""
        return read_lines(self.path, "events.jsonl")

    def alerts(self) -> list[str]:
        """Return the messages of all alerts, in order of time; raises DataError as `events` does."""
        return [str(event.get("message")) for event in self.events() if event.get("kind") in ALERT_KINDS]

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints, created on first access."""
        return self._folder("checkpoints")

    @property
    def analysis(self) -> Path:
        """Folder of the run's analyses, created on first access."""
        return self._folder("analysis")

    @property
    def report(self) -> Path:
        """Folder of the run's reports, created on first access."""
        return self._folder("report")

    def exports(self, kind: str) -> Path:
        """Return the folder for the files of an exporter, such as `tensorboard`, created on first access."""
        self._folder("exports")
        return self._folder(f"exports/{kind}")

    def _folder(self, name: str) -> Path:
        return make_folder(self.path / name)


def _is_after(row: Mapping[str, Any], epoch: int) -> bool:
    found = row.get("epoch")
    return isinstance(found, int | float) and found > epoch
