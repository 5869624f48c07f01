"""The command line in the process of a test: output, errors and exit code of one command."""

import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pvae import cli

TINY = ["encoder.network.hidden=[16]", "decoder.network.hidden=[16]", "train.engine=eager"]
"""Overrides that make an entry of the zoo cheap to fit."""


class Stream(TextIOWrapper):
    """Stream into memory that may pretend to be a terminal."""

    terminal = False

    def isatty(self) -> bool:
        return self.terminal


def run_cli(*arguments: str, code: int = 0, terminal: bool = False) -> tuple[str, str]:
    """Run `pvae ARGUMENTS` in this process and return what it writes to standard output and standard error.

    The test fails where the exit code is not `code`, or a traceback is shown that was not asked for.
    """
    out, err = (Stream(BytesIO(), encoding="utf-8") for _ in range(2))
    out.terminal = terminal
    with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pvae", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
    for stream in (out, err):
        stream.seek(0)
    written = out.read(), err.read()
    assert (caught.value.code or 0) == code, written[1]
    assert "--traceback" in arguments or "Traceback" not in written[1], written[1]
    return written


def run_cli_json(*arguments: str, code: int = 0) -> Any:
    """Run `pvae ARGUMENTS --json` in this process and return the document that it writes."""
    return json.loads(run_cli(*arguments, "--json", code=code)[0])


def npz(path: Path, x: np.ndarray) -> str:
    """Write x to an npz file and return the override that declares it as the data."""
    np.savez(path, x=x)
    return f"data.path={json.dumps(str(path))}"


def write_schedule(path: Path, kind: str) -> None:
    """Write a module that defines a kind of schedule, always 0.5."""
    path.write_text(
        "from typing import Literal\nfrom pvae.nn.schedules import Schedule\n"
        "class Half(Schedule):\n"
        f"    kind: Literal['{kind}'] = '{kind}'\n"
        "    def at(self, epoch, epochs):\n        return 0.5\n"
    )
