"""Errors of the programs of a pair, told in words: the site, the shapes and the line of the user's program."""

from __future__ import annotations

import re
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyro
import torch
from pyro.poutine.runtime import NonlocalExit
from torch import Tensor

from pvae.errors import DeclarationError, PvaeError
from pvae.pair.sides import Problem

PASSED_ON = (PvaeError, NonlocalExit, MemoryError, torch.OutOfMemoryError, OSError)
"""Exceptions that say nothing about the program that raised them."""
HOUSES = (
    *(str(Path(module.__file__ or "").parent) for module in (torch, pyro)),
    str(Path(__file__).parents[1]),
    sysconfig.get_paths()["stdlib"],
)
"""Folders of the libraries, whose lines are not the user's."""


class ProgramError(DeclarationError):
    """A program of a pair failed on a batch; `site` is the site at fault, or "pair.model" or "pair.guide"."""

    def __init__(self, problem: Problem) -> None:
        self.site, self.said = problem.site, problem.message
        super().__init__(str(problem))


@contextmanager
def told(side: str, x: Tensor) -> Iterator[None]:
    """Context manager that turns an exception of a program into a `ProgramError` with a plain message."""
    try:
        yield
    except PASSED_ON:
        raise
    except Exception as error:
        raise ProgramError(explained(error, side, x)) from error


def explained(error: Exception, side: str, x: Tensor) -> Problem:
    """Return an exception raised while a program ran on the batch `x` as a `Problem` with a plain message."""
    text, at = str(error), _line(error)
    found = re.search(r"inside plate\('([^']*)'\) at site (\S+) dim (-\d+), (\d+) vs (\d+)", text)
    if found:
        plate, site, dim, want, got = found.groups()
        return Problem(
            site,
            f"expected batch size {want} at dim {dim} inside plate {plate!r}; got {got}{at}. Its event dimensions are "
            f"not declared: write `.to_event(1)` after the distribution.",
        )
    if "within the support" in text:
        support = re.search(r"within the support \((.*?)\) of the distribution (\w+)", text)
        what = f"{support[2]} scores only {support[1]}" if support else "the distribution cannot score it"
        return Problem(
            side,
            f"expected data in the support of the observed site; {what}{at}. Transform x, or use another distribution.",
        )
    words = text.splitlines()[0][:200] if text else "no message"
    return Problem(
        side,
        f"expected the program to run on a batch of shape {list(x.shape)}; got {type(error).__name__}: {words}{at}.",
    )


def _line(error: Exception) -> str:
    """Return the last line of the user's program in the traceback of an error, as ", at FILE:LINE `CODE`"."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(HOUSES)]
    if not frames:
        return ""
    return f", at {Path(frames[-1].filename).name}:{frames[-1].lineno}" + (
        f" `{frames[-1].line}`" if frames[-1].line else ""
    )
