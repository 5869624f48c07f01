"""Number of threads that torch uses for a piece of work."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Context manager in which torch runs with a number of threads; with as many as before where it is None.

    On small tensors a second thread mostly waits: it spins between two operations, and on a busy machine the first
    thread waits for it as well.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
