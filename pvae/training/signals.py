"""Handling of the signals that ask a fit to stop: SIGINT, SIGTERM and SIGUSR1."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = tuple(s for s in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, s))


class Stop:
    """Context manager that records a stop signal, so that a step can be finished; a second one exits at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.old: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for name in SIGNALS:
                number = int(getattr(signal, name))
                self.old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
