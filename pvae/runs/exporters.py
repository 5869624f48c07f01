"""Exporters: the record of a run, told to TensorBoard or MLflow while it is fitted, or afterwards.

An exporter is a reader of the run's files in a thread of its own: the training neither waits for it nor hears of it,
and whatever goes wrong in it is one alert. A point is a number of a row of ``metrics.jsonl`` at the step of that row.
No step ever holds two values: rows that a crash or a rollback took back are compared with what was exported of them,
and a record that goes on otherwise is exported anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import struct
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from time import time_ns
from typing import Any, ClassVar, final

from pvae import __version__
from pvae.errors import DataError, DeclarationError, MissingExtraError, PvaeError, StorageError, near, printable
from pvae.runs.rundir import RunDirectory
from pvae.util import toml
from pvae.util.files import read_inside

SECONDS = 2.0
"""Between two looks at the metrics."""
PATIENCE_SECONDS = 60.0
"""That the end of a fit waits for an exporter."""
LONGEST_KEY, LONGEST_VALUE = 200, 500
"""Characters; what every MLflow server takes (newer ones take more)."""
BATCH = 100
"""Parameters and metrics that go to MLflow at a time."""
ATTACHED = 16 << 20
"""Bytes of the largest file of a run that is exported."""


@dataclass(frozen=True)
class Point:
    """A number of the metrics: `<split>/<term>`, the step (x axis), the value, and Unix seconds."""

    key: str
    step: int
    value: float
    time: float


Held = dict[tuple[str, int], float]
"""Values that were exported before, by key and step."""


def safe_key(name: str, separator: str) -> str:
    """`name` as a key that every tracker takes: letters, digits, `_`, `.`, `-`, parts joined by `separator`.

    A name that has to be changed gets a digest, so that no two names share a key.
    """
    parts = [re.sub(r"[^A-Za-z0-9_.-]", "_", part).strip(".") or "_" for part in name.split("/")]
    key = separator.join(parts)
    if key.replace(separator, "/") == name and len(key) <= LONGEST_KEY:
        return key
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{key[: LONGEST_KEY - 9]}-{digest}"


class Exporter(ABC):
    """One place that a run is exported to; it reads the run's files and is called from one thread.

    Arguments:
        files: of the run.

    Raises:
        ImportError: its package is not installed, or whatever else importing it raises.
    """

    kind: ClassVar[str]
    package: ClassVar[str]

    def __init__(self, files: RunDirectory) -> None:
        self.files = files
        manifest = files.manifest
        self.started = datetime.fromisoformat(str(manifest["started"])).timestamp()
        self.seen = b""
        self.held: Held | None = None

    @abstractmethod
    def begin(self, *, anew: bool) -> Held:
        """Open what was exported of this run, or with `anew` something empty in its place; returns what it holds."""

    @abstractmethod
    def write(self, points: Sequence[Point]) -> None:
        """Export points, none of which is there yet."""

    @abstractmethod
    def finish(self) -> str:
        """Export what is complete only at the end (alerts, pictures, state); returns where it all is."""

    @abstractmethod
    def key(self, split: str, term: str) -> str:
        """The name of a term of a split there."""

    def catch_up(self, *more: Point) -> None:
        """Export the rows that came since the last call, and more."""
        content = _whole_lines(self.files)
        if self.held is None or not content.startswith(self.seen):  # at first, and where rows were taken back
            self.held, self.seen = self.begin(anew=False), b""
        points = [*self._points(content[len(self.seen) :]), *more]
        if any(self.held.get((p.key, p.step), p.value) != p.value for p in points):
            self.held, points = self.begin(anew=True), [*self._points(content), *more]
        fresh = [p for p in points if self.held.pop((p.key, p.step), None) is None]
        if fresh:
            self.write(fresh)
        self.seen = content

    def close(self) -> str:
        """Catch up and finish; returns where it all is."""
        self.catch_up(*self.last())
        return self.finish()

    def _points(self, lines: bytes) -> Iterator[Point]:
        """The numbers of rows: null (not finite) is left out, seconds become the time of a point."""
        for line in lines.splitlines():
            try:
                row = json.loads(line)
                step, split = int(row.pop("step")), str(row.pop("split"))
                time = self.started + float(row.pop("seconds", 0.0))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise DataError(
                    f"{self.files.path / 'metrics.jsonl'}: expected rows with a step and a split; got {line[:60]!r}. "
                    "Delete that line to go on without it."
                ) from None
            for term, value in row.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    yield Point(self.key(split, term), step, float(value), time)

    def parameters(self) -> dict[str, Any]:
        """The declaration, flat: dotted names and their values."""
        return toml.flat(toml.parse(self.files.spec_text, "spec.toml"))

    def tags(self) -> dict[str, str]:
        """What the run is: name, id, seed, fingerprint of the data, device, version, parent."""
        manifest = self.files.manifest
        found = {
            "name": manifest.get("name"), "id": manifest.get("id"), "seed": manifest.get("seed"),
            "fingerprint": manifest.get("data", {}).get("fingerprint"), "device": manifest.get("device"),
            "version": __version__, "parent": (manifest.get("parent") or {}).get("run"),
        }  # fmt: skip
        return {key: printable(str(value))[:LONGEST_VALUE] for key, value in found.items() if value is not None}

    def last(self) -> list[Point]:
        """Figures of the whole run at its last step: best validation ELBO (nats per datum), epoch, skipped steps."""
        status = self.files.status()
        time, step = self.started + float(status.get("seconds") or 0.0), int(status.get("step") or 0)
        figures = {name: status.get(name) for name in ("elbo", "epoch", "skipped")}
        return [Point(self.key("last", k), step, float(v), time) for k, v in figures.items() if v is not None]

    def attached(self, *suffixes: str) -> list[Path]:
        """Plain files of analyses and reports with one of these suffixes, sorted; links are left alone."""
        folders = [self.files.path / name for name in ("analysis", "report")]
        paths = [path for folder in folders if not folder.is_symlink() for path in sorted(folder.glob("*"))]
        return [path for path in paths if path.suffix in suffixes and _is_plain(path)]


def _is_plain(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_size <= ATTACHED


def _whole_lines(files: RunDirectory) -> bytes:
    """The metrics without a line that is being written."""
    if not os.path.lexists(files.path / "metrics.jsonl"):
        return b""
    content = read_inside(files.path, "metrics.jsonl", 1 << 31)
    return content[: content.rfind(b"\n") + 1]


# ---------------------------------------------------------------------- TensorBoard


@final
class TensorBoard(Exporter):
    """Event files in `exports/tensorboard/` of the run, written anew by every process: they mirror the metrics.

    Scalars in single precision, as TensorBoard keeps them; hyperparameters, alerts and tags as text, PNG files.
    """

    kind = "tensorboard"
    package = "tensorboardX"

    def __init__(self, files: RunDirectory) -> None:
        super().__init__(files)
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c

        self.event, self.proto, self.checksum = event_pb2, summary_pb2, masked_crc32c
        self.folder = files.exports(self.kind)
        self.path, self.waiting = self.folder, b""

    def key(self, split: str, term: str) -> str:
        """See `Exporter.key`."""
        return safe_key(f"{split}/{term}", "/")

    def begin(self, *, anew: bool) -> Held:
        """See `Exporter.begin`; there is never anything to go on with."""
        from tensorboardX.summary import hparams

        for path in self.folder.glob("events.out.tfevents.*"):
            path.unlink()
        self.path = self.folder / f"events.out.tfevents.{time_ns()}.pvae"
        start = self.event.SessionLog(status=self.event.SessionLog.START)  # who watches forgets what was there
        self._keep(file_version="brain.Event:2")
        self._keep(session_log=start)
        plain = self.parameters().items()
        values = {k: v if isinstance(v, bool | int | float) else printable(str(v)) for k, v in plain}
        experiment, session, self.end = hparams(values, {self.key("validation", "elbo"): None})
        self._summary(experiment)
        self._summary(session)
        self._text("run", [f"{key}: {value}" for key, value in self.tags().items()])
        self._flush()
        return {}

    def write(self, points: Sequence[Point]) -> None:
        """See `Exporter.write`."""
        for point in points:
            value = self.proto.Summary.Value(tag=point.key, simple_value=point.value)
            self._summary(self.proto.Summary(value=[value]), point.step, point.time)
        self._flush()

    def finish(self) -> str:
        """See `Exporter.finish`."""
        self._text("alerts", self.files.alerts() or ["none"])
        for path in self.attached(".png"):
            content = read_inside(path.parent, path.name, ATTACHED)
            width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
            image = self.proto.Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=content)
            tag = safe_key(f"{path.parent.name}/{path.name}", "/")
            self._summary(self.proto.Summary(value=[self.proto.Summary.Value(tag=tag, image=image)]))
        self._summary(self.end)
        self._flush()
        return f"{self.folder} (look at it with: tensorboard --logdir {self.folder})"

    def _summary(self, summary: Any, step: int = 0, time: float | None = None) -> None:
        self._keep(summary=summary, step=step, wall_time=time or self.started)

    def _keep(self, **fields: Any) -> None:
        """Frame an event for the file: its length and itself, each with a checksum."""
        data = self.event.Event(**{"wall_time": self.started, **fields}).SerializeToString()
        for part in (struct.pack("<Q", len(data)), data):
            self.waiting += part + struct.pack("<I", self.checksum(part))

    def _flush(self) -> None:
        """Write what waits; tensorboardX would do so in a thread that loses its errors."""
        with self.path.open("ab") as file:
            file.write(self.waiting)
        self.waiting = b""

    def _text(self, tag: str, lines: Sequence[str]) -> None:
        """Lines as code: TensorBoard reads text as Markdown."""
        from tensorboardX.summary import text

        self._summary(text(tag, "\n".join(f"    {line}" for raw in lines for line in printable(raw).splitlines())))


# ---------------------------------------------------------------------- MLflow


@final
class MLflow(Exporter):
    """One MLflow run for a run, found again by its id: under MLFLOW_TRACKING_URI, or `mlflow.db` beside the runs.

    The experiment is MLFLOW_EXPERIMENT_NAME, or the folder of the runs of that name. A record that goes on otherwise
    than exported (a resume that is not exact) begins another MLflow run and marks the one before `pvae.superseded`.
    """

    kind = "mlflow"
    package = "mlflow"

    def __init__(self, files: RunDirectory) -> None:
        super().__init__(files)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read on import
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow import entities
        from mlflow.tracking import MlflowClient

        self.entities, self.open = entities, MlflowClient
        self.client: Any = None
        self.id = ""

    def key(self, split: str, term: str) -> str:
        """See `Exporter.key`; one slash alone: a store of files cannot hold both `a` and `a/b`."""
        return f"{safe_key(split, '.')}/{safe_key(term, '.')}"

    def begin(self, *, anew: bool) -> Held:
        """See `Exporter.begin`."""
        if self.client is None:
            root = self.files.path.parent.parent.absolute()
            self.client = self.open(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}")
        experiment, found = self._experiment(), None
        mine = f"tags.`pvae.id` = '{safe_key(self.tags()['id'], '/')}'"
        for run in self.client.search_runs([experiment], mine):
            if "pvae.superseded" in run.data.tags:
                continue
            if anew:
                self.client.set_tag(run.info.run_id, "pvae.superseded", "its record went on otherwise")
                self.client.set_terminated(run.info.run_id, "KILLED")
            else:
                found = found or run
        if found is None:
            found = self.client.create_run(
                experiment, int(1000 * self.started), {"pvae.id": safe_key(self.tags()["id"], "/")}, self._name()
            )
        self.id = found.info.run_id
        self.client.update_run(self.id, "RUNNING")
        self._describe(found.data.params)
        return self._held(found.data.metrics)

    def _name(self) -> str:
        tags = self.tags()
        return f"{tags['name'][:LONGEST_KEY]} {tags['id'][:40]}"

    def _experiment(self) -> str:
        """The experiment's id; made where it is not there, by whichever process comes first."""
        root, name = self.files.path.parent.parent.absolute(), self.files.path.parent.name
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or name
        local = not os.environ.get("MLFLOW_TRACKING_URI")
        place = (root / "mlflow-files" / name).as_uri() if local else None
        found = self.client.get_experiment_by_name(name)
        try:
            return str(found.experiment_id if found else self.client.create_experiment(name, place))
        except Exception:
            if found := self.client.get_experiment_by_name(name):  # another process was faster
                return str(found.experiment_id)
            raise

    def _describe(self, known: Mapping[str, str]) -> None:
        """Parameters and tags; MLflow never changes a parameter, so that another value of one becomes a tag."""
        values = {safe_key(k, "/"): printable(str(v))[:LONGEST_VALUE] for k, v in self.parameters().items()}
        fresh = [self.entities.Param(key, value) for key, value in values.items() if key not in known]
        for start in range(0, len(fresh), BATCH):
            self.client.log_batch(self.id, params=fresh[start : start + BATCH])
        tags = {f"pvae.{key}": value for key, value in self.tags().items() if key != "id"}
        tags |= {f"pvae.now.{key}": value for key, value in values.items() if known.get(key, value) != value}
        for key, value in tags.items():
            self.client.set_tag(self.id, key, value)

    def _held(self, keys: Mapping[str, float]) -> Held:
        points = (metric for key in keys for metric in self.client.get_metric_history(self.id, key))
        return {(metric.key, metric.step): metric.value for metric in points}

    def write(self, points: Sequence[Point]) -> None:
        """See `Exporter.write`."""
        metrics = [self.entities.Metric(p.key, p.value, int(1000 * p.time), p.step) for p in points]
        for start in range(0, len(metrics), BATCH):
            self.client.log_batch(self.id, metrics=metrics[start : start + BATCH])

    def finish(self) -> str:
        """See `Exporter.finish`."""
        self.client.log_text(self.id, "".join(f"{printable(line)}\n" for line in self.files.alerts()), "alerts.txt")
        self.client.log_text(self.id, self.files.spec_text, "spec.toml")
        for path in self.attached(".png", ".html", ".json", ".csv"):
            self.client.log_artifact(self.id, str(path), path.parent.name)
        status = self.files.status()
        state = {"finished": "FINISHED", "interrupted": "KILLED"}.get(str(status.get("state")), "FAILED")
        end = self.started + float(status.get("seconds") or 0.0)
        self.client.set_terminated(self.id, state, int(1000 * end))
        return f"MLflow run {self.id} ({_without_secrets(str(self.client.tracking_uri))})"


# ---------------------------------------------------------------------- exporting

KINDS: Mapping[str, type[Exporter]] = {cls.kind: cls for cls in (TensorBoard, MLflow)}


def require(kinds: Sequence[str]) -> tuple[str, ...]:
    """`kinds` without doubles, all known and their packages installed.

    Raises:
        DeclarationError: a kind is unknown.
        MissingExtraError: its package is not installed.
    """
    asked = tuple(dict.fromkeys([kinds] if isinstance(kinds, str) else kinds))
    for kind in asked:
        if kind not in KINDS:
            raise DeclarationError(
                f"export: expected {' or '.join(KINDS)}; got {str(kind)[:60]!r}{near(str(kind), KINDS)}."
            )
        if find_spec(KINDS[kind].package) is None:
            raise MissingExtraError(
                f"export: expected {KINDS[kind].package}, which exports to {kind}; it is not installed. "
                f"Run `pip install 'pvae-pyro[{kind}]'`."
            )
    return asked


def remembered(files: RunDirectory, asked: Sequence[str]) -> tuple[str, ...]:
    """The kinds a run was exported to, and those `asked` for now, which its manifest says from here on."""
    manifest = files.manifest
    before = [str(kind) for kind in manifest.get("exports", [])]
    kinds = tuple(dict.fromkeys([*before, *asked]))
    if list(kinds) != before:
        files.write_manifest({**manifest, "exports": list(kinds)})
    return kinds


def export(files: RunDirectory, kind: str) -> str:
    """Export a run that no process is at work on; what is there already stays as it is.

    Arguments:
        files: of the run, finished or not.
        kind: `tensorboard` or `mlflow`.

    Returns:
        Where it is, in words.

    Raises:
        DeclarationError: the kind is unknown.
        MissingExtraError: its package is not installed.
        BusyError: a process is at work on the run.
        DataError: the run's files are damaged.
        StorageError: it cannot be written there.
    """
    require([kind])
    with files.held():
        try:
            return KINDS[kind](files).close()
        except PvaeError:
            raise
        except Exception as error:
            raise StorageError(f"Expected to export {files.path} to {kind}; got {_brief(error)}. Try again.") from error


@contextmanager
def exporting(files: RunDirectory, kinds: Sequence[str], *, show: bool) -> Iterator[None]:
    """Export a run while the block is at work on it; an exporter that fails is one alert, and is left out from there.

    Arguments:
        files: of the run, held by this process.
        kinds: what to export to; one that is unknown here is an alert.
        show: tell alerts on standard error, too.
    """

    def tell(kind: str, what: str) -> None:
        message = f"Expected to export to {kind}; got {what}. The fit goes on. Later: pvae export RUN {kind}"
        files.log_event("alert", message)
        if show:
            print(printable(f"pvae: {message}"), file=sys.stderr, flush=True)

    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(_followed(files, kind, tell))
        yield


@contextmanager
def _followed(files: RunDirectory, kind: str, tell: Callable[[str, str], None]) -> Iterator[None]:
    """One exporter in a thread of its own, from the first row to the last."""
    over, given_up = threading.Event(), threading.Event()

    def follow(exporter: Exporter) -> None:
        try:
            while not over.wait(SECONDS):
                exporter.catch_up()
            if not given_up.is_set():
                exporter.close()
        except Exception as error:
            if not given_up.is_set():
                tell(kind, _brief(error))

    def begun() -> threading.Thread | None:
        try:
            if kind not in KINDS:
                raise DataError(f"no exporter of that name, only {', '.join(KINDS)}")
            thread = threading.Thread(target=follow, args=(KINDS[kind](files),), name=f"pvae-{kind}", daemon=True)
            thread.start()
        except Exception as error:
            tell(kind, _brief(error))
            return None
        return thread

    thread = begun()
    try:
        yield
    finally:
        over.set()
        if thread is not None:
            thread.join(PATIENCE_SECONDS)
            if thread.is_alive():
                given_up.set()
                tell(kind, f"no answer for {PATIENCE_SECONDS:g} s")


def _brief(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    first = (str(error).splitlines() or [""])[0]
    return _without_secrets(f"{type(error).__name__}: {first}"[:300].rstrip(". "))


def _without_secrets(text: str) -> str:
    """`text` without the user and password of an address."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)
