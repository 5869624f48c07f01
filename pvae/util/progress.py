"""Progress of long computations: types of callbacks, and the progress bar of the command line and of fits."""

import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Self

from pvae.errors import printable

Progress = Callable[[int, int], None]
"""Progress callback of a long computation, called with the number of finished units of work and their total."""

StageProgress = Callable[[int, int, str], None]
"""Progress callback of a computation in stages, called with finished units, their total, and the stage's name."""

EVERY_SECONDS = 5.0


def silent(_done: int, _total: int, _stage: str = "") -> None:
    """Ignore progress: the default callback of analyses, which shows nothing."""


class ProgressBar:
    """Progress bar on a terminal and in notebooks with ipywidgets; elsewhere a line of text every few seconds.

    Arguments:
        total: total number of units of work.
        label: name of the task.
        show: False to show nothing.
    """

    def __init__(self, total: int, label: str, *, show: bool = True) -> None:
        self.total, self.label, self.show, self.note = total, printable(label), show, ""
        self.started = self.last = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> Self:
        in_notebook = "ipykernel" in sys.modules and find_spec("ipywidgets")  # rich draws on its widgets
        if self.show and (sys.stderr.isatty() or in_notebook):
            from rich.console import Console
            from rich.progress import Progress as Bar, TextColumn, TimeElapsedColumn

            label, note = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[note]"))
            figures = (*Bar.get_default_columns()[1:], TimeElapsedColumn())
            self.bar = Bar(label, *figures, note, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task(self.label, total=self.total, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def report(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` units are finished, as a fraction of the bar; usable as a progress callback."""
        self.update(self.total * done // max(total, 1), note)

    def update(self, done: int, note: str | None = None) -> None:
        """Show that `done` units of work are finished; cheap enough to call often. A note stays until the next one."""
        finished = done == self.total and note is not None
        self.note = self.note if note is None else printable(note)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, note=self.note)
        elif self.show and (time.monotonic() - self.last > EVERY_SECONDS or finished):
            self.last = time.monotonic()
            seconds = self.last - self.started
            print(f"{self.label} {done}/{self.total} {seconds:.0f} s  {self.note}", file=sys.stderr, flush=True)
