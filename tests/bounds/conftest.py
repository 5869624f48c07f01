"""One thread for the tests of bounds: they run thousands of small operations."""

from collections.abc import Iterator

import pytest

from pvae.util.threads import threads


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Run with one thread: several would mostly wait for each other."""
    with threads(1):
        yield
