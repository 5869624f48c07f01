"""`pvae` and `python -m pvae`: the command line; signals are answered from its imports to the very end."""

import sys


def main() -> None:
    """Run the command line, and end the process without a teardown, in which signals would go unanswered."""
    import atexit
    import os
    from contextlib import suppress

    from pvae.signals import Answer

    code = [1]

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(code[0])

    atexit.register(leave)  # the first to be registered is the last to be called
    Answer().__enter__()
    from pvae.cli import main as run

    try:
        run()
    except SystemExit as ended:
        code[0] = ended.code if isinstance(ended.code, int) else 0


if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the working directory, in which Python has looked for pvae itself
    main()
