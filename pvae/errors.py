"""Every error pvae raises on purpose, each with the exit code the command line gives it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class PvaeError(Exception):
    """Base of all deliberate errors: the message says what was expected, what was found, what to do."""

    exit_code = 1


class DeclarationError(PvaeError):
    """A declaration, override or argument is wrong; ``problems`` holds every finding, one line each."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(PvaeError):
    """Data are missing, broken, or outside what the declared likelihood can score."""

    exit_code = 65


class CheckpointError(PvaeError):
    """A checkpoint is missing, damaged, foreign, or of another declaration."""

    exit_code = 65


class MissingExtraError(PvaeError):
    """An optional package is needed and not installed."""

    exit_code = 69


class DeviceError(PvaeError):
    """The device asked for is absent, lost or out of memory."""

    exit_code = 71


class OutputError(PvaeError):
    """A file or folder cannot be created."""

    exit_code = 73


class StorageError(PvaeError):
    """Writing or reading failed half way (disk full, input/output error)."""

    exit_code = 74


class BusyError(PvaeError):
    """Another process holds the run."""

    exit_code = 75


class NonFiniteError(PvaeError):
    """The loss, a gradient or a weight became NaN or infinite."""


class Interrupted(PvaeError):
    """A signal stopped the fit after a checkpoint; ``exit_code`` is 128 + signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def near(name: str, names: Iterable[str]) -> str:
    """`` (did you mean "a" or "b"?)`` for the names close to ``name``, or nothing."""
    close = get_close_matches(name, list(names), n=2, cutoff=0.6)
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""
