"""Progress of long work: callbacks, and the bar that the command line and a fit show."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from pvae.errors import printable

Progress = Callable[[int, int], None]
"""Callback of long work: called with the number of finished units and their total."""

StageProgress = Callable[[int, int, str], None]
"""Callback of long work in named stages: finished units, their total, and the name of the present stage."""

EVERY_SECONDS = 5.0


def silent(_done: int, _total: int, _stage: str = "") -> None:
    """Show no progress: default callback of analyses."""


class ProgressBar:
    """Bar on a terminal, a line every few seconds elsewhere: a label, the finished fraction and a few figures.

    Arguments:
        total: number of units of work.
        label: what is being done.
        show: False for silence.
    """

    def __init__(self, total: int, label: str, *, show: bool = True) -> None:
        self.total = total
        self.label = printable(label)
        self.show = show
        self.started = self.last = time.monotonic()
        self.bar: Any = None
        self.note = ""

    def __enter__(self) -> Self:
        if self.show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
            )
            times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False))
            self.bar = Bar(*columns, *times, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task(self.label, total=self.total, note="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def report(self, done: int, total: int, note: str = "") -> None:
        """Show `done` of `total` units as a fraction of the bar: a `Progress` and a `StageProgress`."""
        self.update(self.total * done // max(total, 1), note)

    def update(self, done: int, note: str | None = None) -> None:
        """Show that `done` units are done; cheap enough to call often. A note stays until the next one."""
        finished = done == self.total and note is not None
        self.note = self.note if note is None else printable(note)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note=self.note)
        elif self.show and (time.monotonic() - self.last > EVERY_SECONDS or finished):
            self.last = time.monotonic()
            seconds = self.last - self.started
            print(f"{self.label} {done}/{self.total} {seconds:.0f} s  {self.note}", file=sys.stderr, flush=True)
