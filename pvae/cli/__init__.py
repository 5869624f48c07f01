"""The command line: thin over the Python interface; heavy imports happen inside the commands that need them.

One module for each group of commands; each registers its commands on `pvae.cli.app.app`.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

from pvae.cli.app import app
from pvae.errors import PvaeError

__all__ = ["app", "main"]

for group in ("declarations", "fitting", "analyses", "making"):  # in the order of `pvae --help`
    import_module(f"pvae.cli.{group}")


def main() -> None:
    """Run the command line; every deliberate error becomes its message and its exit code."""
    try:
        code = app(standalone_mode=False)
    except PvaeError as error:
        for line in str(error).splitlines():
            print(line, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        _usage_or_bug(error)
    sys.exit(code if isinstance(code, int) else 0)


def _usage_or_bug(error: Exception) -> None:
    """Wrong usage is shown as the parser words it; anything else is a bug and keeps its traceback."""
    show_usage = getattr(error, "show", None)
    if show_usage is None:
        raise error
    show_usage()
    sys.exit(2)
