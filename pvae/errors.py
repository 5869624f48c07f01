"""Exceptions that pvae raises deliberately, each with the exit code of the command line, and texts of messages."""

import re
import tomllib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from pvae.words import near as near, text as text

_MEANINGS = tomllib.loads(Path(__file__).with_name("exit_codes.toml").read_text())
EXIT_CODES: Mapping[int, str] = {int(code): meaning for code, meaning in _MEANINGS.items()}
"""Exit codes of the command line and their meanings."""


class PvaeError(Exception):
    """Base of all deliberate errors: the message says what was expected, what was found, what to do.

    `exit_code` is that of the command line.

    Example:
        >>> issubclass(DataError, PvaeError), DataError.exit_code, DeclarationError.exit_code
        (True, 65, 2)
    """

    exit_code = 1

    def __init_subclass__(cls, exit_code: int | None = None) -> None:
        cls.exit_code = cls.exit_code if exit_code is None else exit_code

    @classmethod
    def of(cls, name: str, /, **fields: Any) -> Self:
        """Return the error whose message is an entry of `pvae/<room>/words.toml`, with its fields filled in."""
        return cls(text(name, **fields))


class DeclarationError(PvaeError, exit_code=2):
    """A declaration, override or argument is wrong; ``problems`` holds every finding, one line each.

    Example:
        >>> DeclarationError(["vae: train.epoch: expected ...", "vae: latents: expected ..."]).problems[0]
        'vae: train.epoch: expected ...'
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(PvaeError, exit_code=65):
    """Data are missing, broken, or outside the support of the declared likelihood.

    Example:
        >>> import torch
        >>> from pvae.data import Dataset
        >>> Dataset.of(torch.tensor([[0.0], [float("nan")], [1.0]]))
        Traceback (most recent call last):
            ...
        pvae.errors.DataError: ...
    """


class CheckpointError(PvaeError, exit_code=65):
    """A checkpoint is missing, damaged, or belongs to another declaration."""


class MissingExtraError(PvaeError, exit_code=69):
    """An optional package that is needed is not installed."""


def require_extra(module: str, extra: str, expected: str) -> None:
    """Raise MissingExtraError, which begins with what is `expected`, unless the module of an extra is installed."""
    if find_spec(module) is None:
        raise MissingExtraError(f"{expected}; it is not installed. Run `pip install 'pvae-pyro[{extra}]'`.")


class DeviceError(PvaeError, exit_code=71):
    """The device asked for is absent, lost or out of memory."""


class StorageError(PvaeError, exit_code=74):
    """Writing or reading failed half way (disk full, input/output error)."""


class OutputError(StorageError, exit_code=73):
    """A file or folder cannot be created: no such folder, no permission, something else in its place."""


class BusyError(PvaeError, exit_code=75):
    """Another process is working on the run and holds its lock."""


class Stopped(PvaeError):
    """Another process of the same fit ended, or did not answer in time."""


class NonFiniteError(PvaeError):
    """The loss, a gradient or a weight became NaN or infinite."""


class Interrupted(PvaeError):
    """A signal stopped the fit; the message says which checkpoint stands, ``exit_code`` is 128 + signal."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


ENTRY = re.compile(r"\w+\.\w+\.\w+")
"""Names of entries of `pvae/<room>/words.toml`."""


def refuse(problem: object, words: str | Sequence[str], error: type[Exception] = DataError, /, **fields: Any) -> None:
    """Raise a DataError if there is a problem; its message is `words`, or the text of that name with its fields."""
    if problem:
        raise error(text(words, **fields) if isinstance(words, str) and ENTRY.fullmatch(words) else words)


def misdeclared(problem: object, words: str | Sequence[str], /, **fields: Any) -> None:
    """Raise a DeclarationError if there is a problem, as `refuse` does."""
    refuse(problem, words, DeclarationError, **fields)


@contextmanager
def instead(
    of: type[Exception] | tuple[type[Exception], ...], words: str, error: type[PvaeError] = DataError, /, **fields: Any
) -> Iterator[None]:
    """Raise a DataError in place of an exception in the context, whose message stands for `{problem}` in the words.

    The words are a message, or the name of a text, which is given the exception as the field `problem`, as `refuse` has
    it.
    """
    try:
        yield
    except of as problem:
        named = ENTRY.fullmatch(words)
        found = error.of(words, **fields, problem=problem) if named else error(words.replace("{problem}", str(problem)))
        raise found from problem


def printable(text: str) -> str:
    """Return a text with control and format characters as escapes, so that it cannot move a terminal's cursor."""
    kept = {c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs")}
    return "".join(c if c in kept else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)


REFUSED_PARAMETERS = "probability tensor contains|Expected parameter |normal expects all elements of std|Expected p_in"
"""Parts of the messages by which torch and Pyro reject distribution parameters that are NaN or out of range."""


def is_refused_draw(error: Exception) -> bool:
    """Return True if an error says that the parameters of a distribution are not finite or out of range."""
    return isinstance(error, RuntimeError | ValueError) and re.search(REFUSED_PARAMETERS, str(error)) is not None


def out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that memory ran out: Python's, torch's on a GPU, or torch's on a CPU."""
    on_cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or on_cpu


@contextmanager
def at(path: str) -> Iterator[None]:
    """Put the path of a table before the problems of a DeclarationError, unless they name a latent themselves."""
    try:
        yield
    except DeclarationError as error:
        below = [f"{path}." if re.match(r"\w+: ", problem) else f"{path}: " for problem in error.problems]
        pairs = zip(below, error.problems, strict=True)
        found = [problem if problem.startswith("latents.") else place + problem for place, problem in pairs]
        raise DeclarationError(found) from None
