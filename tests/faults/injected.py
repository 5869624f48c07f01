"""Faults that tests inject."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

ASLEEP = ["train.epochs=5", "train.optimizer.lr=0.02", "train.keep=last", "objective.beta=100"]
"""Overrides under which the latent of `vae` collapses onto its prior."""


@contextmanager
def disk_full(size: int) -> Iterator[None]:
    """Every write beyond so many bytes of a file fails, as on a full disk, in this process and for a while."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def without_naps(patch: pytest.MonkeyPatch) -> list[float]:
    """Long waits pass at once, and are noted here."""
    naps: list[float] = []
    sleep = time.sleep
    patch.setattr(time, "sleep", lambda seconds: naps.append(seconds) if seconds >= 0.1 else sleep(seconds))
    return naps
