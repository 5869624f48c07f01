"""Exporters of runs to TensorBoard and MLflow."""

import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from threading import Thread
from time import time_ns
from typing import Any

from pvae.errors import printable
from pvae.runs.export.base import LONGEST_KEY, LONGEST_VALUE, Exported, Exporter, MetricPoint, safe_key
from pvae.runs.rundir import RunDirectory
from pvae.util import read_inside, write_atomic


class TensorBoard(Exporter):
    """Exporter of a run to TensorBoard event files in the run's folder `exports/tensorboard/`.

    Every process writes the files anew: metrics as float32 scalars, hyperparameters, tags and alerts as text, and PNG
    files as images. The first write replaces the files of earlier processes; `pvae export` writes once, at the end.
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
        return safe_key(f"{split}/{term}", "/")

    def begin(self, *, anew: bool) -> Exported:
        from tensorboardX.summary import hparams

        self.path, self.waiting = self.folder / f"events.out.tfevents.{time_ns()}.pvae", b""
        self._add(file_version="brain.Event:2")
        # a TensorBoard that is open drops what it read before this event
        self._add(session_log=self.event.SessionLog(status=self.event.SessionLog.START))
        plain = self.parameters().items()
        values = {k: v if isinstance(v, bool | int | float) else printable(str(v)) for k, v in plain}
        experiment, session, self.end = hparams(values, {self.key("validation", "elbo"): None})
        self._add(summary=experiment)
        self._add(summary=session)
        self._add_text("run", [f"{key}: {value}" for key, value in self.tags().items()])
        return {}

    def write(self, points: Sequence[MetricPoint]) -> None:
        for point in points:
            self._add_value(point.step, point.time, tag=point.key, simple_value=point.value)

    def finish(self) -> str:
        self._add_text("alerts", self.files.alerts() or ["none"])
        for path in self.attached(".png"):
            content = read_inside(path.parent, path.name)
            width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
            image = self.proto.Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=content)
            self._add_value(0, self.started, tag=safe_key(f"{path.parent.name}/{path.name}", "/"), image=image)
        self._add(summary=self.end)
        self.show()
        return f"{self.folder} (look at it with: tensorboard --logdir {self.folder})"

    def _add_value(self, step: int, time: float, **fields: Any) -> None:
        self._add(summary=self.proto.Summary(value=[self.proto.Summary.Value(**fields)]), step=step, wall_time=time)

    def _add_text(self, tag: str, lines: Sequence[str]) -> None:
        """Add lines of text, as a code block because TensorBoard renders text as Markdown."""
        from tensorboardX.summary import text

        block = "\n".join(f"    {line}" for raw in lines for line in printable(raw).splitlines())
        self._add(summary=text(tag, block))

    def _add(self, **fields: Any) -> None:
        """Add an event in TFRecord format: its length and its bytes, each followed by a checksum."""
        data = self.event.Event(**{"wall_time": self.started, **fields}).SerializeToString()
        for part in (struct.pack("<Q", len(data)), data):
            self.waiting += part + struct.pack("<I", self.checksum(part))

    def show(self) -> None:
        """Write the events added so far; tensorboardX's own writer thread would lose errors."""
        if self.path.exists():
            with self.path.open("ab") as file:
                file.write(self.waiting)
        else:
            write_atomic(self.path, self.waiting)
            for path in self.folder.glob("events.out.tfevents.*"):
                path.unlink() if path != self.path else None
        self.waiting = b""


SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "14",
}  # fmt: skip
"""Default environment variables of the MLflow client; short time-outs keep a dead server from delaying a fit."""
ANSWER_SECONDS = 30.0
"""Longest time (s) to wait for the client's answer: a server may delay or drip it for longer than its time-outs."""
BATCH_SIZE = 100
"""Largest number of parameters or metric values in one request."""
SUPERSEDED = "pvae.superseded"
"""Tag of the MLflow runs of a run that do not hold, because another has its values."""


class _Bounded:
    """MLflow client whose methods raise TimeoutError if they have not returned after `ANSWER_SECONDS`."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.client, name)
        return partial(_answer, found) if callable(found) else found


def _answer(asked: Callable[..., Any], *args: Any, **options: Any) -> Any:
    future: Future[Any] = Future()

    def ask() -> None:
        try:
            future.set_result(asked(*args, **options))
        except BaseException as error:
            future.set_exception(error)

    thread = Thread(target=ask, daemon=True)  # which does not keep the process from its end
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not future.done():
        raise TimeoutError(f"no answer within {ANSWER_SECONDS:g} seconds")
    return future.result()


class MLflow(Exporter):
    """Exporter of a run to an MLflow run, at MLFLOW_TRACKING_URI or in `mlflow.db` in the folder of all runs.

    The MLflow experiment is MLFLOW_EXPERIMENT_NAME, or the run's name (as in its folder). The MLflow run is found again
    by the run's id. If a resumed fit continues with other values than were exported, a new MLflow run begins, and the
    earlier one gets the tag `pvae.superseded`; until all earlier values are there, it is the new one that has the tag.
    """

    kind = "mlflow"
    package = "mlflow"

    def __init__(self, files: RunDirectory) -> None:
        super().__init__(files)
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)  # read on import
        from mlflow import entities
        from mlflow.tracking import MlflowClient

        self.entities, self.open = entities, MlflowClient
        self.client: Any = None
        self.id, self.older = "", list[str]()

    def key(self, split: str, term: str) -> str:
        # one slash alone: a store of files cannot hold both `a` and `a/b`
        return f"{safe_key(split, '.')}/{safe_key(term, '.')}"

    def begin(self, *, anew: bool) -> Exported:
        if self.client is None:
            root = self.files.path.parent.parent.absolute()
            local = f"sqlite:///{(root / 'mlflow.db').as_uri()}?uri=true"  # quoted: a path may hold ? # and %
            self.client = _Bounded(self.open(os.environ.get("MLFLOW_TRACKING_URI") or local))
        experiment, mine = self._experiment(), safe_key(self.tags()["id"], "/")
        known = self.client.search_runs([experiment], f"tags.`pvae.id` = '{mine}'")
        valid = [run for run in known if SUPERSEDED not in run.data.tags]
        self.older = [run.info.run_id for run in valid] if anew else []
        name, start = f"{self.tags()['name'][:LONGEST_KEY]} {self.tags()['id'][:40]}", int(1000 * self.started)
        tags = {"pvae.id": mine, **({SUPERSEDED: "not yet whole"} if self.older else {})}
        found = valid[0] if valid and not anew else self.client.create_run(experiment, start, tags, name)
        self.id = found.info.run_id
        self._describe(found.data.params)
        points = (metric for key in found.data.metrics for metric in self.client.get_metric_history(self.id, key))
        return {(metric.key, metric.step): metric.value for metric in points}

    def _experiment(self) -> str:
        """Return the id of the MLflow experiment, which is created if it does not exist."""
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
        """Log parameters and tags; MLflow cannot change a logged parameter, so its new value is logged as a tag."""
        values = {safe_key(k, "/"): printable(str(v))[:LONGEST_VALUE] for k, v in self.parameters().items()}
        fresh = [self.entities.Param(key, value) for key, value in values.items() if key not in known]
        for start in range(0, len(fresh), BATCH_SIZE):
            self.client.log_batch(self.id, params=fresh[start : start + BATCH_SIZE])
        tags = {f"pvae.{key}": value for key, value in self.tags().items() if key != "id"}
        tags |= {f"pvae.now.{key}": value for key, value in values.items() if known.get(key, value) != value}
        for key, value in tags.items():
            self.client.set_tag(self.id, key, value)

    def write(self, points: Sequence[MetricPoint]) -> None:
        metrics = [self.entities.Metric(p.key, p.value, int(1000 * p.time), p.step) for p in points]
        for start in range(0, len(metrics), BATCH_SIZE):
            self.client.log_batch(self.id, metrics=metrics[start : start + BATCH_SIZE])

    def show(self) -> None:
        self.client.update_run(self.id, "RUNNING")
        self._replace()

    def _replace(self) -> None:
        """Let this MLflow run stand in for those with other values."""
        for run in self.older:
            self.client.set_tag(run, SUPERSEDED, "the fit continued with other values")
            self.client.set_terminated(run, "KILLED")
        if self.older:
            self.client.delete_tag(self.id, SUPERSEDED)
        self.older = []

    def finish(self) -> str:
        self.client.log_text(self.id, "".join(f"{printable(line)}\n" for line in self.files.alerts()), "alerts.txt")
        self.client.log_text(self.id, self.files.spec_text, "spec.toml")
        for path in self.attached(".png", ".html", ".json", ".csv"):
            self.client.log_artifact(self.id, str(path), path.parent.name)
        status = self.files.status()
        state = {"finished": "FINISHED", "interrupted": "KILLED"}.get(str(status.get("state")), "FAILED")
        self.client.set_terminated(self.id, state, int(1000 * (self.started + float(status.get("seconds") or 0.0))))
        self._replace()
        return f"MLflow run {self.id} ({without_secrets(str(self.client.tracking_uri))})"


def without_secrets(text: str) -> str:
    """Return `text` with user name and password in URLs masked."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)
