"""One run for all tests of upkeep, and a copy of it for each."""

import shutil
from pathlib import Path

import pytest

import pvae
from tests.cli_runner import TINY


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with the checkpoints of its start and its end."""
    overrides = [*TINY, "data.source=digits", "latents.z.dim=3", "train.epochs=2"]
    return pvae.fit("vae", *overrides, run_dir=tmp_path_factory.mktemp("runs"), device="cpu", progress=False).path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def run(fitted: Path, root: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(fitted, root / "vae" / fitted.name))
