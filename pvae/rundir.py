"""The files of one run: locked, replaced atomically, readable after a crash, and cheap to list.

Imports only the standard library: ``pvae runs`` must answer at once. Everything read stays inside the
run folder (plain files only, no links), and a full disk never stops a training: see ``RunDirectory.degraded``.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import re
import stat
import sys
import threading
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pvae.errors import BusyError, DataError, DeclarationError, Interrupted, OutputError, PvaeError, StorageError, near

if TYPE_CHECKING:
    import pandas

STATES = ("running", "finished", "interrupted", "failed")
STALE_AFTER_SECONDS = 300.0
GIT_SECONDS = 5.0
PACKAGES = ("pvae-pyro", "torch", "pyro-ppl", "numpy", "arviz", "pandas", "pydantic", "safetensors", "scikit-learn")

_MIB = 1 << 20
_RESERVED = {"latest", "con", "nul", "prn", "aux"}
_SLUG_LENGTH = 64
_PLAIN_NAME = re.compile(r"(?!\.{1,2}\Z)[^/\\\0]+\Z")


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


def _age_seconds(time: object, until: datetime | None = None) -> float | None:
    """Seconds from an ISO time to ``until`` (now), or None if it is no such time."""
    try:
        return ((until or datetime.now(UTC)) - datetime.fromisoformat(str(time))).total_seconds()
    except (ValueError, TypeError):
        return None


# ---------------------------------------------------------------------------------------------- writing and reading


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_new(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file that must not exist yet, with the mode the umask gives; raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        if durable:
            os.fsync(descriptor)


def _require_plain_target(path: Path) -> None:
    """Refuse to replace what is no plain file: replacing a device node or a link destroys it."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError(errno.EINVAL, "not a plain file (a device, link or folder stands there)")


def write_atomic(path: Path, text: str | bytes, *, durable: bool = True) -> None:
    """Replace ``path`` whole or not at all; raises StorageError, and the old file then stands.

    ``durable=False`` leaves out the fsync, for heartbeats that are written all the time.
    """
    content = text.encode(errors="backslashreplace") if isinstance(text, str) else text
    temporary = path.with_name(f".tmp-{_token()}{_token()}")
    try:
        _require_plain_target(path)
        try:
            write_new(temporary, content, durable=durable)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            sync_folder(path.parent)
    except OSError as problem:
        raise StorageError(
            f"{path}: expected to be written; got {problem.strerror or problem}. What stood there is unchanged."
        ) from problem


def _open_plain(path: Path, flags: int) -> int:
    """A descriptor of a plain file: a link raises, and a device or pipe neither opens for long nor blocks."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a plain file")


def read_inside(folder: Path, name: str, limit: int = 16 * _MIB) -> bytes:
    """The bytes of the plain file ``name`` in ``folder``.

    Raises DataError for a name with a path in it, a link, a device, a missing or unreadable file, or one over
    ``limit`` bytes: what is read from a run that was handed on must not lead out of it.
    """
    if not _PLAIN_NAME.match(name):
        raise DataError(f"{folder}: expected a plain file name; got {name!r}.")
    try:
        with os.fdopen(_open_plain(folder / name, os.O_RDONLY), "rb") as file:
            content = file.read(limit + 1)
    except OSError as problem:
        raise DataError(
            f"{folder / name}: expected a plain readable file; got {problem.strerror or problem}."
        ) from problem
    if len(content) > limit:
        raise DataError(f"{folder / name}: expected at most {limit} bytes; got more.")
    return content


def read_object(folder: Path, name: str, limit: int = 16 * _MIB) -> dict[str, Any]:
    """The JSON object in the file ``name`` of ``folder``; raises DataError for anything else."""
    content = read_inside(folder, name, limit)
    found = _json_object(content)
    if found is None:
        raise DataError(
            f"{folder / name}: expected a JSON object; got {len(content)} bytes that start {content[:24]!r}."
        )
    return found


def _json_object(content: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(content.decode())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _plain(value: Any) -> Any:  # noqa: ANN401  (any value goes in, its JSON twin comes out)
    """``value`` as finite JSON: NaN and infinities become null, numbers of other libraries floats, the rest text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return str(value)
    return number if math.isfinite(number) else None


def _pretty(fields: Mapping[str, Any]) -> str:
    return json.dumps(_plain(fields), indent=2, allow_nan=False) + "\n"


def _line(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(_plain(fields), allow_nan=False).encode() + b"\n"


# ---------------------------------------------------------------------------------------------- lines of JSON


def _append(path: Path, line: bytes) -> None:
    """Add one whole line, or nothing (raises OSError); a torn line left by a crash is cut off first."""
    descriptor = _open_plain(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        _mend(descriptor)
        _write_whole(descriptor, line)
    finally:
        os.close(descriptor)


def _mend(descriptor: int) -> None:
    """End the file with a whole line: the newline is added if only that is missing, else the last line goes."""
    size = os.fstat(descriptor).st_size
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return
    content = os.pread(descriptor, size, 0)
    start = content.rfind(b"\n") + 1
    if _json_object(content[start:]) is None:
        os.ftruncate(descriptor, start)
    else:
        _write_whole(descriptor, b"\n")


def _write_whole(descriptor: int, line: bytes) -> None:
    size = os.fstat(descriptor).st_size
    try:
        written = 0
        while written < len(line):
            written += os.write(descriptor, line[written:])
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _read_lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines ([] without a file); a torn or garbage last line is dropped.

    Raises DataError with the number of any other line that is damaged: dropping data silently is no answer.
    """
    if not os.path.lexists(folder / name):
        return []
    lines = [line for line in read_inside(folder, name, 1 << 31).split(b"\n") if line.strip()]
    rows = [_json_object(line) for line in lines]
    if rows and rows[-1] is None:
        rows.pop()
    if None in rows:
        raise DataError(
            f"{folder / name}: expected one JSON object a line; got garbage in line {rows.index(None) + 1}. "
            "Delete that line to go on without it."
        )
    return [row for row in rows if row is not None]


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


def _is_stale(status: Mapping[str, Any]) -> bool:
    if status.get("host") == platform.node():
        return not _alive(status.get("pid"), status.get("birth"))
    age = _age_seconds(status.get("heartbeat"))
    return age is None or age > STALE_AFTER_SECONDS


# ---------------------------------------------------------------------------------------------- the run


class RunDirectory:
    """The folder of one run. Only its lock's owner writes; anybody may read, also while it runs.

    ``degraded`` says why metrics, events or status could not be written (None: all is well). Such a failure is
    remembered and never raised, because hours of training are worth more than a row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.degraded: str | None = None
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
        raise DeclarationError(
            f"Expected a run directory (it holds manifest.json), or a run of {root}; got {str(path)!r}"
            f"{near(str(path).rstrip('/').rpartition('/')[2], _names_near(Path(path), Path(root)))}."
        )

    # -- who owns it

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Own the run: raises BusyError, naming pid and host, where another process does.

        On the way out a state still ``running`` becomes ``failed`` or ``interrupted``: nobody runs it any more.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self._plain_or_new(".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise BusyError(f"{self.path}: expected a run that nobody holds; got {self._owner()}.") from None
        except (OSError, NotImplementedError) as problem:
            raise OutputError(f"{self.path / '.lock'}: expected a file to lock; got {problem}.") from problem
        try:
            self._claim()
            yield
        except BaseException as problem:
            self._leave("interrupted" if isinstance(problem, KeyboardInterrupt | Interrupted) else "failed")
            raise
        else:
            self._leave("interrupted")
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
            _require_plain_target(path)
        except OSError as problem:
            raise DataError(f"{path}: expected a plain file; got {problem.strerror}.") from problem
        return path

    # -- what it is

    @property
    def manifest(self) -> dict[str, Any]:
        """What the run is: name, id, start, versions, seeds; raises DataError if damaged."""
        return read_object(self.path, "manifest.json")

    def write_manifest(self, fields: Mapping[str, Any]) -> None:
        """Replace the manifest; ``name``, ``id`` and ``started`` from the creation stay. Raises StorageError."""
        kept: dict[str, Any] = {}
        with suppress(DataError):
            kept = {key: value for key, value in self.manifest.items() if key in ("name", "id", "started")}
        write_atomic(self.path / "manifest.json", _pretty({**fields, **kept}))

    @property
    def spec_text(self) -> str:
        """The resolved declaration, TOML; raises DataError if missing, over 1 MiB or not UTF-8."""
        try:
            return read_inside(self.path, "spec.toml", _MIB).decode()
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
                write_atomic(self.path / "status.json", _pretty(status), durable=False)
            except StorageError as problem:
                self.degraded = self.degraded or str(problem)

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row to ``metrics.jsonl``: NaN and infinities as null; a failure degrades the run."""
        self._log("metrics.jsonl", row)

    def log_event(self, kind: str, message: str, **fields: Any) -> None:  # noqa: ANN401  (anything JSON can say)
        """Append an event (an alert, a fallback, a stop) to ``events.jsonl``; a failure degrades the run."""
        self._log("events.jsonl", {**fields, "time": utc_now(), "kind": kind, "message": message})

    def _log(self, name: str, fields: Mapping[str, Any]) -> None:
        with self._writing:
            try:
                _append(self.path / name, _line(fields))
            except OSError as problem:
                self._degrade(f"{name} could not be written: {problem.strerror or problem}")

    def _degrade(self, why: str) -> None:
        first = self.degraded is None
        self.degraded = self.degraded or why
        if first:
            self.update_status()

    def metrics_rows(self) -> list[dict[str, Any]]:
        """Every row of the metrics; a torn last line is dropped; raises DataError for other damage."""
        return _read_lines(self.path, "metrics.jsonl")

    def metrics(self) -> pandas.DataFrame:
        """The metrics as a table, null as NaN."""
        import pandas

        rows = self.metrics_rows()
        return pandas.DataFrame([{k: math.nan if v is None else v for k, v in row.items()} for row in rows])

    def truncate_metrics(self, step: int) -> None:
        """Drop the rows after ``step``, atomically: a resumed run writes them again. Raises StorageError."""
        with self._writing:
            if os.path.lexists(self.path / "metrics.jsonl"):
                kept = [row for row in self.metrics_rows() if not _is_after(row, step)]
                write_atomic(self.path / "metrics.jsonl", b"".join(map(_line, kept)))

    def events(self) -> list[dict[str, Any]]:
        """Every event; a torn last line is dropped; raises DataError for other damage."""
        return _read_lines(self.path, "events.jsonl")

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

    def _folder(self, name: str) -> Path:
        folder = self.path / name
        if folder.is_symlink():
            raise DataError(f"{folder}: expected a folder inside the run; got a link to {os.readlink(folder)!r}.")
        try:
            folder.mkdir(exist_ok=True)
        except OSError as problem:
            raise OutputError(f"{folder}: expected a folder; got {problem.strerror}.") from problem
        return folder


def _is_after(row: Mapping[str, Any], step: int) -> bool:
    found = row.get("step")
    return isinstance(found, int | float) and found > step


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


def _folders(parent: Path) -> list[Path]:
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
        yield from _newest([run for name in _folders(root) for run in _folders(name)])
        return
    for folder in (Path(path), root / path, root / slug(path)):
        yield folder
        yield from _newest(_folders(folder))


def _names_near(path: Path, root: Path) -> list[str]:
    runs = _folders(path.parent) + _folders(root)
    return sorted({folder.name for folder in runs})


def list_runs(root: Path) -> list[dict[str, Any]]:
    """A row for every run under ``root``, by start: name, id, path, state, epoch, epochs, elbo, started, seconds, why.

    Never raises. ``state`` is that of the status, or ``created`` before the first, ``stale`` for a running one whose
    process is dead on this host or silent for five minutes on another, ``broken`` (then ``why`` says what).
    """
    rows = [_row(run) for name in _folders(Path(root)) for run in _folders(name)]
    return sorted(rows, key=lambda row: (row["started"], row["id"]))


def _row(path: Path) -> dict[str, Any]:
    nothing = dict.fromkeys(("epoch", "epochs", "elbo", "seconds", "why"))
    row = {"name": path.parent.name, "id": path.name, "path": str(path), **nothing, "started": _started(path.name)}
    try:
        return {**row, **_facts(RunDirectory(path))}
    except (PvaeError, OSError) as problem:
        return {**row, "state": "broken", "why": str(problem)}


def _started(run_id: str) -> str:
    """The start that a run id tells, or nothing."""
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
    if state not in (*STATES, "created"):
        raise DataError(f"{run.path / 'status.json'}: expected a state of {', '.join(STATES)}; got {state!r}.")
    return "stale" if state == "running" and _is_stale(status) else str(state)


def _number(value: object) -> int | float | None:
    """``value`` if it is a number that a table can show (a status may say anything, also 10^400)."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300
    return cast("int | float", value) if known else None


def _seconds(status: Mapping[str, Any]) -> float | None:
    """The training time the status tells, else the time from the owner's start to its last sign of life."""
    told = _number(status.get("seconds"))
    if told is not None:
        return float(told)
    begun, silent = _age_seconds(status.get("started")), _age_seconds(status.get("heartbeat"))
    return None if begun is None or silent is None else round(max(0.0, begun - silent), 3)


# ---------------------------------------------------------------------------------------------- provenance


def provenance() -> dict[str, Any]:
    """What a run was made with: versions, git commit, command, host, platform; no user's name; never fails."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "git": _git_state(),
        "argv": [_without_home(argument) for argument in sys.argv],
        "host": platform.node(),
        "platform": platform.platform(),
    }


def _versions() -> dict[str, str]:
    """The installed versions, from their metadata: importing the packages takes seconds."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _git_state() -> dict[str, Any] | None:
    """The commit of the working folder and whether it differs from it, or None outside of git."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain") if commit else None
    return {"commit": commit, "dirty": None if changes is None else bool(changes)} if commit else None


def _git(*arguments: str) -> str | None:
    import subprocess

    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            ["git", *arguments],
            capture_output=True,
            check=True,
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=GIT_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").strip()


def _without_home(argument: str) -> str:
    home = os.path.expanduser("~")
    return argument if len(home) < 2 else argument.replace(home, "~")
