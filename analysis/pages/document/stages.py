"""Progress of computing a page: named stages in sequence, whose parts report their own progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from pvae.analysis.pages.document.blocks import PageSection
from pvae.util.progress import StageProgress, silent

T = TypeVar("T")
STAGE_UNITS = 100
"""Units of progress that one stage counts for."""


class PartProgress(Protocol):
    """Callback that serves both as a `Progress` (done, total) and as a `StageProgress` (done, total, stage)."""

    def __call__(self, done: int, total: int, stage: str = "", /) -> None: ...


class Stages:
    """Reporter of the progress of a page in stages; it never falls, although the parts of a stage are not known ahead.

    Arguments:
        total: number of stages.
        on_progress: called with (units done, total units, name of the stage and of its part).
    """

    def __init__(self, total: int = 1, on_progress: StageProgress = silent) -> None:
        self.total, self.on_progress = total, on_progress
        self.stage, self.done, self.inside = "", -1, 0.0

    def begin(self, stage: str) -> None:
        """Start the next stage, which completes the one before, and report its name."""
        self.stage, self.done, self.inside = stage, self.done + 1, 0.0
        self._tell(self.inside, stage)

    def part(self, name: str) -> PartProgress:
        """Return a progress callback for a part of the present stage; the part fills half of the stage's remainder."""
        start = self.inside

        def report(done: int, total: int, _stage: str = "", /) -> None:
            self.inside = max(self.inside, start + (1 - start) / 2 * done / max(total, 1))
            self._tell(self.inside, f"{self.stage}: {name}" if self.stage else name)

        return report

    def _tell(self, inside: float, what: str) -> None:
        self.on_progress(STAGE_UNITS * max(self.done, 0) + int(STAGE_UNITS * inside), STAGE_UNITS * self.total, what)

    def sections(self, table: Mapping[str, Callable[[T], PageSection | None]], subject: T) -> tuple[PageSection, ...]:
        """Return the sections of a page: each function of `table` is called on `subject`, as one stage; drop Nones."""
        found = []
        for name, make in table.items():
            self.begin(name)
            found.append(make(subject))
        self.begin("written")
        return tuple(section for section in found if section is not None)
