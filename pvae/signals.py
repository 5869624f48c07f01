"""Answers to SIGINT and SIGTERM: a line on standard error, and 128 + signal. Standard library only, imported first."""

import os
import signal
import sys
import threading
import time
from contextlib import ExitStack
from types import FrameType
from typing import Any, Self


class Answer(ExitStack):
    """Context that answers signals: the first ends the process, or what a subclass does; a second one always does."""

    numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
    signal: int | None = None
    """Number of the first signal; None before."""

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self.numbers:
                self.callback(signal.signal, number, signal.signal(number, self._note))
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            end(number, "ended at once, as it came twice")
        self.signal = number
        self.first(frame)

    def first(self, _frame: FrameType | None) -> None:
        """Answer the first signal, in the main thread, which has come to this frame."""
        assert self.signal is not None  # noqa: S101 - it is the first one
        end(self.signal, STOPPED)


class Raising(Answer):
    """Answer of a command at work: KeyboardInterrupt, so that it leaves nothing half done; in an import the end."""

    working = False
    """True while an exception is caught: not before the work begins, nor when only messages are left."""

    def __enter__(self) -> Self:
        self.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
        sys.unraisablehook = self._lost
        return super().__enter__()

    def first(self, frame: FrameType | None) -> None:
        while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
            frame = frame.f_back
        if frame is not None or not self.working:  # extensions take exceptions for failures of their own
            super().first(frame)
        raise KeyboardInterrupt

    def _lost(self, unraisable: Any) -> None:
        """Answer where Python can raise nothing, as in a finaliser."""
        if self.signal is not None and issubclass(unraisable.exc_type, KeyboardInterrupt):
            end(self.signal, STOPPED)
        sys.__unraisablehook__(unraisable)


STOPPED = "stopped before its end; what was written before is whole. Say the command again"


def end(number: int, text: str) -> None:
    """End this process at once, with a line on standard error and the exit code of the signal."""
    os.write(2, f"{signal.Signals(number).name}: {text}\n".encode())
    os._exit(128 + number)


def end_with(parent: int) -> None:
    """Send SIGTERM to this process as soon as its parent, which had this pid, is dead."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
