"""The command line, a thin layer over the Python interface; commands import heavy packages when they run.

One module for each group of commands; each registers its commands on `pvae.cli.app.app`.
"""

import errno
import os
import sys
import traceback
from importlib import import_module
from io import StringIO, TextIOWrapper
from signal import Signals

from pvae.cli.app import app
from pvae.errors import DeviceError, PvaeError, StorageError, out_of_memory, printable
from pvae.signals import STOPPED, Raising

__all__ = ["app", "main"]

for group in ("declarations", "fitting", "analyses", "making", "rows", "upkeep"):  # in the order of `pvae --help`
    import_module(f"pvae.cli.{group}")


def main() -> None:
    """Run the command line; every error becomes a message on standard error and an exit code (`EXIT_CODES`)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may know no more than ASCII
    settings: dict[str, bool] = {}
    with Raising() as answer:
        try:
            try:
                answer.working = True
                code = app(standalone_mode=False, obj=settings)
                sys.stdout.flush()
            finally:
                answer.working = False
        except KeyboardInterrupt:
            code = 130
        except (BrokenPipeError, SystemExit):  # the latter is the parser's own answer to a broken pipe
            _forget_output()
            code = 141
        except Exception as error:
            code, message = _exit_code_and_message(error)
            shown = traceback.format_exc() if settings.get("traceback") else ""
            if answer.signal is None:
                print(printable(f"{shown}{message}"), file=sys.stderr)
        if answer.signal is not None:  # whatever became of the KeyboardInterrupt
            code = 128 + answer.signal
            print(f"{Signals(answer.signal).name}: {STOPPED}", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _exit_code_and_message(error: Exception) -> tuple[int, str]:
    """Return the exit code and the message that the command line gives for an error."""
    if isinstance(error, PvaeError):
        return error.exit_code, str(error)
    if show := getattr(error, "show", None):  # wrong usage, in the parser's words
        text = StringIO()
        show(text)
        return 2, text.getvalue().rstrip()
    if out_of_memory(error):
        return DeviceError.exit_code, f"Expected enough memory; got {error or 'none left'}. Use fewer rows or draws."
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            _forget_output()
        where = error.filename or "output or a temporary file"
        message = f"{where}: expected to be read or written; got {error.strerror or error}."
        return StorageError.exit_code, f"{message} Make room there, or set TMPDIR and XDG_CACHE_HOME to other folders."
    message = f"unexpected error {type(error).__name__}: {error}"
    return 1, f"{message}; run again with `pvae --traceback ...` and report it"


def _forget_output() -> None:
    """Redirect standard output to nothing: Python would report what is left in its buffer once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
