"""Exporter of runs to TensorBoard."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from time import time_ns
from typing import Any, final

from pvae.errors import printable
from pvae.runs.export.base import LARGEST_ATTACHMENT, Exported, Exporter, MetricPoint, safe_key
from pvae.runs.rundir import RunDirectory
from pvae.util.files import read_inside


@final
class TensorBoard(Exporter):
    """Exporter of a run to TensorBoard event files in the run's folder `exports/tensorboard/`.

    Every process writes the files anew: metrics as float32 scalars, hyperparameters, tags and alerts as text, and PNG
    files as images.
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

        for path in self.folder.glob("events.out.tfevents.*"):
            path.unlink()
        self.path = self.folder / f"events.out.tfevents.{time_ns()}.pvae"
        self._add(file_version="brain.Event:2")
        # a TensorBoard that is open drops what it read before this event
        self._add(session_log=self.event.SessionLog(status=self.event.SessionLog.START))
        plain = self.parameters().items()
        values = {k: v if isinstance(v, bool | int | float) else printable(str(v)) for k, v in plain}
        experiment, session, self.end = hparams(values, {self.key("validation", "elbo"): None})
        self._add(summary=experiment)
        self._add(summary=session)
        self._add_text("run", [f"{key}: {value}" for key, value in self.tags().items()])
        self._flush()
        return {}

    def write(self, points: Sequence[MetricPoint]) -> None:
        for point in points:
            self._add_value(point.step, point.time, tag=point.key, simple_value=point.value)
        self._flush()

    def finish(self) -> str:
        self._add_text("alerts", self.files.alerts() or ["none"])
        for path in self.attached(".png"):
            content = read_inside(path.parent, path.name, LARGEST_ATTACHMENT)
            width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
            image = self.proto.Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=content)
            self._add_value(0, self.started, tag=safe_key(f"{path.parent.name}/{path.name}", "/"), image=image)
        self._add(summary=self.end)
        self._flush()
        return f"{self.folder} (look at it with: tensorboard --logdir {self.folder})"

    def _add_value(self, step: int, time: float, **fields: Any) -> None:
        summary = self.proto.Summary(value=[self.proto.Summary.Value(**fields)])
        self._add(summary=summary, step=step, wall_time=time)

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

    def _flush(self) -> None:
        """Write the events added so far to the file; tensorboardX's own writer thread would lose errors."""
        with self.path.open("ab") as file:
            file.write(self.waiting)
        self.waiting = b""
