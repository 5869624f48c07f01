"""Fixtures of the tests of data."""

import pytest

from pvae.data.sources import collections
from tests.data.writers import small_collection


@pytest.fixture
def small_mnist(monkeypatch: pytest.MonkeyPatch) -> collections.Collection:
    """MNIST of sixteen small images in place of the real one."""
    small = small_collection()
    monkeypatch.setattr(collections, "MNIST_FILES", small)
    return small
