"""Progress of a page: named stages, one after the other, each with parts that may report their own progress."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from pvae.analysis.pages.document.blocks import PageSection
from pvae.util.progress import StageProgress, silent

T = TypeVar("T")
STAGE_UNITS = 100
"""Units of progress of one stage."""


class PartProgress(Protocol):
    """A `Progress` and a `StageProgress` at once."""

    def __call__(self, done: int, total: int, stage: str = "", /) -> None: ...


class Stages:
    """Reports progress that never falls, although nobody knows beforehand how many parts a stage has.

    Arguments:
        total: number of stages.
        on_progress: called with (units done, units in all, name of the stage and of its part).
    """

    def __init__(self, total: int = 1, on_progress: StageProgress = silent) -> None:
        self.total, self.on_progress = total, on_progress
        self.stage, self.done, self.inside = "", -1, 0.0

    def begin(self, stage: str) -> None:
        """Start the next stage."""
        self.stage, self.done, self.inside = stage, self.done + 1, 0.0
        self._tell(self.inside, stage)

    def part(self, name: str) -> PartProgress:
        """Callback for a part of the present stage: all of it moves the bar by half of what the stage has left."""
        start = self.inside

        def report(done: int, total: int, _stage: str = "", /) -> None:
            self.inside = max(self.inside, start + (1 - start) / 2 * done / max(total, 1))
            self._tell(self.inside, f"{self.stage}: {name}" if self.stage else name)

        return report

    def _tell(self, inside: float, what: str) -> None:
        self.on_progress(STAGE_UNITS * max(self.done, 0) + int(STAGE_UNITS * inside), STAGE_UNITS * self.total, what)

    def sections(self, table: Mapping[str, Callable[[T], PageSection | None]], subject: T) -> tuple[PageSection, ...]:
        """Make every section of a page of `subject`, a stage each; sections that mean nothing here give None."""
        found = []
        for name, make in table.items():
            self.begin(name)
            found.append(make(subject))
        self.begin("written")
        return tuple(section for section in found if section is not None)
