"""A finished run that tests of faults read."""

from pathlib import Path

import pytest

import pvae
from tests.cli_runner import TINY

FEW_ROWS = ["data.splits.train=[0, 100]", "data.splits.validation=[1000, 1050]", "data.splits.test=[1350, 1400]"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run called vae, that nobody changes."""
    folder = tmp_path_factory.mktemp("runs")
    pvae.fit("vae", *TINY, *FEW_ROWS, "train.epochs=2", run_dir=folder, device="cpu", progress=False)
    return folder
