"""The files of one run: locked, replaced atomically, readable after a crash, and cheap to list.

Imports only the standard library: ``pvae runs`` must answer at once. Everything read stays inside the
run folder (plain files only, no links), and a full disk never stops a training: see ``RunDirectory.degraded``.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import platform
import re
import stat
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pvae.errors import BusyError, DataError, DeclarationError, Interrupted, OutputError, StorageError, near
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

STATES = ("running", "finished", "interrupted", "failed")
ALERTS = frozenset(["alert", "analysis", "fallback", "nonfinite", "storage"])
"""Kinds of events that are no errors and still want to be looked at."""
STALE_AFTER_SECONDS = 300.0

_RESERVED = {"latest", "con", "nul", "prn", "aux"}
_SLUG_LENGTH = 64


# ---------------------------------------------------------------------------------------------- names and times


def slug(name: str) -> str:
    """A safe folder name for ``name``: ASCII letters, digits, ``.``, ``_``, ``-``; 1 to 64 characters; idempotent.

    A name that has nothing to keep, is too long or is reserved gets a digest, so that it stays recognisable.
    """
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("-._")
    if kept and len(kept) <= _SLUG_LENGTH and kept.lower() not in _RESERVED:
        return kept
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{kept[: _SLUG_LENGTH - 9] or 'run'}-{digest}"


def utc_now() -> str:
    """The time in UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _token() -> str:
    return os.urandom(4).hex()


def _run_id() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{_token()}"


def age_seconds(time: object, until: datetime | None = None) -> float | None:
    """Seconds from an ISO time to ``until`` (now), or None if it is no such time."""
    try:
        return ((until or datetime.now(UTC)) - datetime.fromisoformat(str(time))).total_seconds()
    except (ValueError, TypeError):
        return None


# ---------------------------------------------------------------------------------------------- the owner


def _birth(pid: int) -> str | None:
    """When process ``pid`` started, in ticks; ``"dead"`` for a zombie; None where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "dead" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return None


def _alive(pid: object, birth: object) -> bool:
    """Whether the process that wrote ``pid`` and ``birth`` lives on this host; a re-used pid has another birth."""
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (OSError, OverflowError):
        return False
    found = _birth(pid)
    return found != "dead" and (found is None or birth is None or found == birth)


def is_stale(status: Mapping[str, Any]) -> bool:
    """Whether the process of a running status is gone, or silent for too long on another host."""
    if status.get("host") == platform.node():
        return not _alive(status.get("pid"), status.get("birth"))
    age = age_seconds(status.get("heartbeat"))
    return age is None or age > STALE_AFTER_SECONDS


# ---------------------------------------------------------------------------------------------- the run


MANIFEST: dict[str, type] = {
    "name": str, "device": str, "engine": str, "declared": bool, "imports": list, "trainable": list, "parent": dict,
    "data": dict, "exports": list,
}  # fmt: skip
"""What a manifest holds, where it says it at all."""
_OPTIONAL = ("trainable", "parent")
"""What may be null there."""


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
        """A fresh ``<root>/<slug>/<UTC>-<8 hex>/``; raises OutputError if it cannot be made."""
        try:
            run = cls(_fresh_folder(Path(root) / slug(name)))
            run.write_manifest({"name": name, "id": run.path.name, "started": utc_now()})
        except (OSError, StorageError) as problem:
            raise OutputError(
                f"{root}: expected a folder to write runs into; got {problem}. Choose another."
            ) from problem
        return run

    @classmethod
    def open(cls, path: Path | str, root: Path = Path("runs")) -> RunDirectory:
        """The run at ``path``: a folder, or under ``root`` ``<name>`` (its newest), ``<name>/<id>`` or ``latest``.

        Raises DeclarationError, with the run names that come near, if there is none.
        """
        for folder in _candidates(str(path), Path(root)):
            if _is_run(folder):
                return cls(folder.resolve())
        names = _names_near(Path(path), Path(root))
        there = f"; there are {', '.join(names[:8])}" if names else "; there is none yet, pvae fit vae makes one"
        raise DeclarationError(
            f"Expected a run directory (it holds manifest.json), or a run in {root}{there}; got {str(path)[:200]!r}"
            f"{near(str(path).rstrip('/').rpartition('/')[2], names)}."
        )

    # -- who owns it

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Own the run: raises BusyError, naming pid and host, where another process does.

        On the way out a state still ``running`` becomes ``failed`` or ``interrupted``: nobody runs it any more.
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
        """Keep every other process out, and say nothing of it in the status; raises BusyError as `lock` does."""
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
        self.update_status(pid=pid, host=platform.node(), birth=_birth(pid), started=utc_now())

    def _leave(self, state: str) -> None:
        if self._status_or_empty().get("state") == "running":
            self.update_status(state=state)

    def _owner(self) -> str:
        status = self._status_or_empty()
        pid, host, started = (status.get(key, "unknown") for key in ("pid", "host", "started"))
        return f"one held by process {pid} on host {host} since {started}; wait for it or stop it"

    def _plain_or_new(self, name: str) -> Path:
        """A path in the run that is a plain file or nothing yet: opening a link would lead out of the run."""
        path = self.path / name
        try:
            require_plain_target(path)
        except OSError as problem:
            raise DataError(f"{path}: expected a plain file; got {problem.strerror}.") from problem
        return path

    # -- what it is

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run is: name, id, start, versions, seeds; raises DataError if damaged."""
        found = read_object(self.path, "manifest.json")
        for key, kind in MANIFEST.items():
            if key in found and not isinstance(found[key], kind | None if key in _OPTIONAL else kind):
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

    # -- how it goes

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
        """What went wrong and was no error, in order; raises DataError as `events` does."""
        return [str(event.get("message")) for event in self.events() if event.get("kind") in ALERTS]

    # -- its folders

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


def _fresh_folder(parent: Path) -> Path:
    """A folder of its own even for runs of the same second; raises OSError."""
    parent.mkdir(parents=True, exist_ok=True)
    for _ in range(100):
        with suppress(FileExistsError):
            folder = parent / _run_id()
            folder.mkdir()
            return folder
    raise FileExistsError(errno.EEXIST, f"a hundred run ids that were all taken in {parent}")


# ---------------------------------------------------------------------------------------------- finding runs


def _is_run(folder: Path) -> bool:
    try:
        return stat.S_ISREG((folder / "manifest.json").lstat().st_mode)
    except (OSError, ValueError):
        return False


def folders(parent: Path) -> list[Path]:
    """The folders in ``parent``, no links and nothing hidden, [] if it cannot be read."""
    try:
        with os.scandir(parent) as entries:
            found = [e.name for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
    except (OSError, ValueError):
        return []
    return [parent / name for name in sorted(found)]


def _newest(folders: list[Path]) -> list[Path]:
    """The run whose id is the latest, as a list of one or none."""
    return sorted(filter(_is_run, folders), key=lambda folder: folder.name)[-1:]


def _candidates(path: str, root: Path) -> Iterator[Path]:
    """Where ``path`` may mean a run, in the order of precedence."""
    if path == "latest":
        yield from _newest([run for name in folders(root) for run in folders(name)])
        return
    for folder in (Path(path), root / path, root / slug(path)):
        yield folder
        yield from _newest(folders(folder))


def _names_near(path: Path, root: Path) -> list[str]:
    runs = folders(path.parent) + folders(root)
    return sorted({folder.name for folder in runs})
