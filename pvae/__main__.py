"""`python -m pvae`: the command line, which imports nothing from the working directory."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        del sys.path[0]  # the working directory, in which Python has looked for pvae itself
    from pvae.cli import main

    main()
