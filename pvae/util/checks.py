"""Results of the checks that `pvae verify` and `pvae doctor` make, with advice."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Self

from rich.table import Column, Table
from rich.text import Text

from pvae.errors import PvaeError, printable, text
from pvae.util.records import Record, field

Level = Literal["ok", "warning", "failed"]

_STYLES = {"ok": "", "warning": "yellow", "failed": "bold red"}


def one_line(text: str) -> str:
    """Return `text` on one line, with control characters escaped."""
    return printable(" ".join(text.split()))


class Check(Record):
    """Result of one check of an installation or of a run.

    Arguments:
        name: name of the file or part that was checked.
        level: verdict: ok, warning or failed.
        found: finding, one line.
        advice: remedy, one line; empty if there is nothing to do.
        facts: finding as JSON values, for programs.
    """

    name: str
    level: Level
    found: str
    advice: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def judged(cls, name: str, bad: Level, found: str, advice: str, facts: Mapping[str, Any] | None = None) -> Self:
        """Return a check that is ok if there is no advice, and else of the level `bad`."""
        return cls(name, bad if advice else "ok", found, advice, facts or {})

    def to_dict(self) -> dict[str, Any]:
        """Return name, level, found, advice and facts as JSON values."""
        texts = {key: one_line(getattr(self, key)) for key in ("name", "level", "found", "advice")}
        return {**texts, "facts": dict(self.facts)}


class Checks(Record, repr=False):
    """Results of several checks, in the order in which they were made.

    Arguments:
        title: name of the subject of the checks, such as "doctor".
        checks: result of every check.
        facts: findings about the whole subject as JSON values, for programs.
    """

    title: str
    checks: tuple[Check, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def of(self, level: Level) -> tuple[Check, ...]:
        """Return the checks with a given verdict: ok, warning or failed."""
        return tuple(check for check in self.checks if check.level == level)

    @property
    def ok(self) -> bool:
        """True if no check failed; some may be warnings."""
        return not self.of("failed")

    def summary(self) -> str:
        """Return a line with the title and the number of checks of each verdict."""
        counts = [f"{len(found)} {level}" for level in ("failed", "warning", "ok") if (found := self.of(level))]
        return f"{self.title}: {', '.join(counts)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the facts, `ok`, the numbers of failures and warnings, and every check, as JSON values."""
        counts = {"failed": len(self.of("failed")), "warnings": len(self.of("warning"))}
        return {**self.facts, "ok": self.ok, **counts, "checks": [check.to_dict() for check in self.checks]}

    def __rich__(self) -> Table:
        title, caption = Text(one_line(self.title)), Text(one_line(self.summary()))
        columns = ("check", Column("verdict", no_wrap=True), Column("found", overflow="fold"))
        table = Table(*columns, title=title, caption=caption, caption_justify="left")
        for row in self.to_dict()["checks"]:
            found = Text(row["found"]) if not row["advice"] else Text(f"{row['found']}\n-> {row['advice']}")
            table.add_row(Text(row["name"]), row["level"], found, style=_STYLES[row["level"]])
        return table

    def __str__(self) -> str:
        rows = self.to_dict()["checks"]
        width = max((len(row["name"]) for row in rows), default=0)
        lines = []
        for row in rows:
            lines.append(f"{row['level']:7}  {row['name']:{width}}  {row['found']}")
            lines += [f"{'':7}  {'':{width}}  -> {row['advice']}"] * bool(row["advice"])
        return "\n".join([*lines, one_line(self.summary())])

    __repr__ = __str__


def attempt(name: str, check: Callable[[], Iterable[Check] | None]) -> list[Check]:
    """Return the results that `check` yields; an error that it raises becomes a failed check called `name`."""
    found: list[Check] = []
    try:
        found += check() or ()  # one by one: what was found before an error is kept
    except Exception as problem:
        said = str(problem) if isinstance(problem, PvaeError) else f"{type(problem).__name__}: {problem}"
        advice = text("util.checks.advice", classes=[kind.__name__ for kind in type(problem).__mro__])
        found.append(Check(name, "failed", said, advice))
    return found
