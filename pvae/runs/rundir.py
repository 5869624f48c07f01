"""Directory of one run: its files are locked, replaced atomically, readable after a crash, and cheap to list.

Imports only the standard library, so that ``pvae runs`` is fast. Only regular files inside the run folder are read, no
links, and a full disk never stops a fit: see ``RunDirectory.degraded``.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pvae.errors import DataError, Interrupted, OutputError, PvaeError, StorageError, instead
from pvae.runs import find
from pvae.runs.find import Claim, busy, utc_now
from pvae.util import files, write_atomic

if TYPE_CHECKING:
    import pandas

RUN_STATES = ("running", "finished", "interrupted", "failed")
TRANSFORMS = "transforms.json"
"""Name of the file of what a fit learned of its data."""
ALERT_KINDS = frozenset(["alert", "analysis", "fallback", "nonfinite", "storage"])
"""Kinds of events that are shown to the user as alerts."""
MANIFEST: dict[str, list[str]] = tomllib.loads(Path(__file__).with_name("manifest.toml").read_text())
"""Each known entry of a manifest, or of a seal, in words, with a pattern of its JSON; see the file."""
KEPT_KEYS = frozenset(["name", "id", "started", "order"])
"""Entries of a manifest that never change."""


class RunDirectory:
    """Directory of one run. Only the process that holds its lock writes; every process may read, also during the fit.

    ``degraded`` is the reason why metrics, events or status could not be written, or None. Such a failure is recorded
    and never raised, because hours of training are worth more than a row of metrics. ``on_metrics`` is a function that
    is called with each row of metrics.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.degraded: str | None = None
        self.on_metrics: Callable[[Mapping[str, Any]], None] = lambda _row: None
        self._writing = threading.RLock()

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    @classmethod
    def create(
        cls, root: Path, name: str, spec: str | None = None, fields: Mapping[str, Any] = {}, transforms: str = ""
    ) -> RunDirectory:
        """Return a new run directory ``<root>/<slug of name>/<UTC time>-<8 hex digits>/``, with these files.

        Raises OutputError if it cannot be created, StorageError on a full disk; nothing of it is left then.
        """
        named = Path(root) / find.slug(name)
        begun = files.temporary_for(named / "run")  # named when it has its manifest: a run never lacks one
        made = [folder for folder in (named, named.parent) if not folder.exists()]
        try:
            with files.raising(OutputError, f"{root}: expected a folder to write runs into", "Choose another."):
                order = find.next_order(named.parent)
                begun.mkdir(parents=True)
                path = find.free_path(named)
                own = {"name": name, "id": path.name, "started": utc_now(), "order": order}
                if spec is not None:
                    cls(begun).write_spec(spec)
                    own["spec"] = files.digest(spec.encode())
                if transforms:
                    write_atomic(begun / TRANSFORMS, transforms)
                    own["transforms"] = files.digest(transforms.encode())
                cls(begun).write_manifest({**fields, **own})
                os.rename(begun, path)
        finally:
            shutil.rmtree(begun, ignore_errors=True)
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()  # where nothing is in it
        return cls(path)

    @classmethod
    def open(cls, path: Path | str, root: Path = Path("runs")) -> RunDirectory:
        """Return the directory of an existing run.

        ``path`` is its folder, or under ``root`` a ``<name>`` (for its newest run), ``<name>/<id>`` or ``latest``.
        Raises DeclarationError, which suggests similar names, if there is no such run.
        """
        return cls(find.find_run(str(path), Path(root)))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Claim the run in the context and record this process in the status, as a fit does.

        At the end a state that is still ``running`` becomes ``failed`` or ``interrupted``. Raises BusyError, with pid
        and host, if another process holds the lock.
        """
        with self.held() as claim:
            left = "interrupted"
            try:
                self.update_status(**find.this_process(), started=claim.own.get("since"))
                yield
            except BaseException as problem:
                left = "interrupted" if isinstance(problem, KeyboardInterrupt | Interrupted) else "failed"
                raise
            finally:
                if self._status_or_empty().get("state", "running") == "running":
                    self.update_status(state=left)

    @contextmanager
    def held(self) -> Iterator[Claim]:
        """Claim the run in the context without changing the status; raises BusyError if another process has it.

        A fit that is at work is found by its status, too, where its claim was removed.
        """
        if files.follows():
            yield Claim(self.path / ".lock", "a run")
            return
        with Claim(self.path / ".lock", "a run") as claim:
            status = self._status_or_empty()
            if status.get("state") == "running" and not find.is_stale(status):
                silent = f" It counts as gone after {find.STALE_AFTER_SECONDS:.0f} s without a heartbeat."
                raise busy(self.path, "a run", {**status, "since": status.get("started", "unknown")}, silent)
            yield claim

    @property
    def manifest(self) -> dict[str, Any]:
        """Manifest of the run: its name, id, start time, versions, seed and so on; raises DataError if damaged."""
        found = files.read_object(self.path, "manifest.json")
        found.pop("sha256", None)
        require_sound(self.path / "manifest.json", found)
        return found

    def write_manifest(self, fields: Mapping[str, Any]) -> None:
        """Replace the manifest, but for name, id, start and order, which never change; its digest is added.

        Raises StorageError.
        """
        kept: dict[str, Any] = {}
        with suppress(DataError):
            kept = {key: value for key, value in self.manifest.items() if key in KEPT_KEYS}
        write_atomic(self.path / "manifest.json", files.pretty(files.sealed({**fields, **kept})))

    @property
    def id(self) -> str:
        """Id of the run, by which it is known wherever its folder was moved to; the folder's name if it is damaged."""
        with suppress(DataError):
            return str(self.manifest.get("id", self.path.name))
        return self.path.name

    @property
    def parent(self) -> tuple[str, object] | None:
        """Id and last epoch of the run whose second stage this is; None if it is none."""
        found = self.manifest.get("parent")
        return None if found is None else (str(found.get("run")).rpartition("/")[2], found.get("epoch"))

    def first_stage(self) -> RunDirectory | None:
        """Return the run whose second stage this is, found by its id beside this one; None if it is not there."""
        runs = map(RunDirectory, find.beside(self.path) if self.parent else ())
        return next((run for run in runs if self.parent and run.id == self.parent[0]), None)

    @property
    def spec_text(self) -> str:
        """Complete declaration of the experiment as TOML; raises DataError if missing, over 1 MiB or not UTF-8."""
        with instead(UnicodeDecodeError, f"{self.path / 'spec.toml'}: expected UTF-8; got {{problem}}."):
            return files.read_inside(self.path, "spec.toml", files.MIB).decode()

    def spec_is_own(self) -> bool:
        """Return False if the declaration is not the text whose digest the manifest holds."""
        written = files.digest(self.spec_text.encode())
        return bool(self.manifest.get("spec", written) == written)

    def write_spec(self, text: str) -> None:
        """Write the complete declaration of the experiment (TOML) to the run; raises StorageError."""
        write_atomic(self.path / "spec.toml", text)

    def status(self) -> dict[str, Any]:
        """Return the latest status of the run (state, epoch, ELBO), {} if none yet; raises DataError if damaged."""
        return files.read_object(self.path, "status.json") if os.path.lexists(self.path / "status.json") else {}

    def _status_or_empty(self) -> dict[str, Any]:
        with suppress(DataError):
            return self.status()
        return {}

    def update_status(self, **fields: Any) -> None:  # noqa: ANN401  (anything JSON can say)
        """Update the status with ``fields`` and a new heartbeat, atomically; a failure is recorded in `degraded`."""
        with self._writing:
            status = {**self._status_or_empty(), "heartbeat": utc_now(), **fields}
            if self.degraded is not None:
                status["degraded"] = self.degraded
            try:
                write_atomic(self.path / "status.json", files.pretty(status), durable=False)
            except StorageError as problem:
                self.degraded = self.degraded or str(problem)

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row to ``metrics.jsonl``, with NaN and infinities as null, and call ``on_metrics``.

        A failure to write is recorded in `degraded`.
        """
        self._log("metrics.jsonl", row)
        self.on_metrics(row)

    def log_event(self, kind: str, message: str, **fields: Any) -> None:  # noqa: ANN401  (anything JSON can say)
        """Append an event, such as an alert, to ``events.jsonl``; a failure to write is recorded in `degraded`."""
        self._log("events.jsonl", {**fields, "time": utc_now(), "kind": kind, "message": message})

    def _log(self, name: str, fields: Mapping[str, Any]) -> None:
        with self._writing:
            try:
                files.append(self.path / name, files.json_line(fields))
            except OSError as problem:
                if self.degraded is None:
                    self.degraded = f"{name} could not be written: {problem.strerror or problem}"
                    self.update_status()

    def metrics_rows(self) -> list[dict[str, Any]]:
        """Return all rows of metrics; an incomplete last line is dropped; raises DataError for other damage."""
        return files.read_lines(self.path, "metrics.jsonl")

    def metrics_digest(self, size: int | None = None) -> dict[str, Any]:
        """Return size (bytes) and SHA-256 of the metrics on the disk, or of their first `size` bytes."""
        there = os.path.lexists(self.path / "metrics.jsonl")
        content = files.read_inside(self.path, "metrics.jsonl", 1 << 31)[:size] if there else b""
        return {"bytes": len(content), "sha256": files.digest(content)}

    def metrics(self) -> pandas.DataFrame:
        """Return the metrics as a data frame, with null as NaN; raises DataError if they cannot be converted."""
        import pandas

        rows, where = self.metrics_rows(), self.path / "metrics.jsonl"
        with instead((ValueError, OverflowError), "runs.rundir.table", path=where):  # half a surrogate pair, say
            return pandas.DataFrame([{k: math.nan if v is None else v for k, v in row.items()} for row in rows])

    def truncate_metrics(self, epoch: int) -> None:
        """Remove the rows of metrics after ``epoch``, which a resumed fit writes again. Raises StorageError."""
        with self._writing:
            if os.path.lexists(self.path / "metrics.jsonl"):
                epochs = ((row, row.get("epoch")) for row in self.metrics_rows())
                kept = [row for row, found in epochs if not isinstance(found, int | float) or found <= epoch]
                write_atomic(self.path / "metrics.jsonl", b"".join(map(files.json_line, kept)))

    def events(self) -> list[dict[str, Any]]:
        """Return all events; an incomplete last line is dropped; raises DataError for other damage."""
        return files.read_lines(self.path, "events.jsonl")

    def alerts(self) -> list[str]:
        """Return the messages of all alerts, in order of time; raises DataError as `events` does."""
        return [str(event.get("message")) for event in self.events() if event.get("kind") in ALERT_KINDS]

    @property
    def analysis(self) -> Path:
        """Folder of the run's analyses, created on first access."""
        return files.make_folder(self.path / "analysis")

    @property
    def report(self) -> Path:
        """Folder of the run's reports, created on first access."""
        return files.make_folder(self.path / "report")

    def exports(self, kind: str) -> Path:
        """Return the folder for the files of an exporter, such as `tensorboard`, created on first access."""
        return files.make_folder(files.make_folder(self.path / "exports") / kind)


def require_sound(where: Path, found: Mapping[str, Any]) -> None:
    """Raise DataError, which names the entry, unless every known entry of a manifest or seal is of its kind."""
    for key, (words, pattern) in MANIFEST.items():
        table, _, inner = key.rpartition(".")
        here = (found.get(table) or {}) if table else found
        if inner in here and not re.fullmatch(pattern, json.dumps(here[inner])):
            raise DataError.of("runs.rundir.entry", where=where, words=words, key=key, found=str(here[inner])[:60])


def state_of(run: RunDirectory, status: Mapping[str, Any]) -> str:
    """Return the state in a run's status, `created` before the first one; raises DataError if it is unknown."""
    if (state := status.get("state", "created")) not in (*RUN_STATES, "created"):
        raise DataError(f"{run.path / 'status.json'}: expected a state of {', '.join(RUN_STATES)}; got {state!r}.")
    return str(state)


def list_runs(root: Path) -> list[dict[str, Any]]:
    """Return one row (dict) for every run under ``root``, in the order in which they were begun; never raises.

    The keys of a row are name, id, path, state, epoch, epochs, elbo, log_joint (in its place where the guide sets a
    continuous latent to a point), started, seconds, why. ``state`` is the state in the run's status; ``created`` before
    the first status; ``stale`` for a running one whose process is dead (or, on another host, has written no heartbeat
    for five minutes); ``broken`` if files are damaged (``why`` is the reason).
    """
    rows = [(find.begun(run), _row(run)) for name in find.folders(Path(root)) for run in find.folders(name)]
    return [row for _, row in sorted(rows, key=lambda found: found[0])]


def _row(path: Path) -> dict[str, Any]:
    nothing = dict.fromkeys(("epoch", "epochs", "elbo", "log_joint", "seconds", "why"))
    row = {"name": path.parent.name, "id": path.name, "path": str(path), **nothing}
    row["started"] = find.started_by(path)
    run = RunDirectory(path)
    try:
        manifest, status = run.manifest, run.status()
        state = state_of(run, status)
    except (PvaeError, OSError) as problem:
        return {**row, "state": "broken", "why": str(problem)}
    row |= {key: manifest[key] for key in ("name", "started") if key in manifest}
    row |= {key: _number(status.get(key)) for key in ("epoch", "epochs", "elbo", "log_joint", "seconds")}
    return {**row, "state": "stale" if state == "running" and find.is_stale(status) else state}


def _number(value: object) -> int | float | None:
    """Return ``value`` if it is a number of displayable size, else None; a damaged status may contain anything."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300
    return cast("int | float", value) if known else None
