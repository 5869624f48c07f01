"""Tiny runs that the tests of samples share, fitted once a session."""

from pathlib import Path
from typing import Any

import pytest

import pvae
from pvae.experiment.experiment import Experiment
from pvae.runs.run import Run
from tests.cli_runner import TINY

MOONS = {
    "name": "moons",
    "data": {"source": "toy", "density": "moons", "rows": 1000},
    "covariates": {"y": {"codes": 2}},
    "latents": {"z": {"dim": 2, "posterior": {"given": ["x", "y"]}}},
    "decoder": {"given": ["z", "y"], "likelihood": {"kind": "normal"}, "network": {"kind": "mlp", "hidden": [32]}},
    "encoder": {"network": {"kind": "mlp", "hidden": [32]}},
    "train": {"epochs": 30, "engine": "eager", "optimizer": {"kind": "adam", "lr": 0.01}},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `moons`, conditioned on its label, `digits`, of pictures, `vae` and `gan`."""
    where = tmp_path_factory.mktemp("runs")
    small = ["decoder.network.hidden=[16]", "objective.critic.hidden=[16]"]
    pvae.fit(Experiment.from_dict(MOONS), run_dir=where, device="cpu", progress=False)
    pvae.fit("vae", *TINY, "latents.z.dim=3", "train.epochs=1", name="digits", run_dir=where, progress=False)
    pvae.fit("vae", *TINY, "train.epochs=2", run_dir=where, device="cpu", progress=False)
    pvae.fit("gan", *small, "train.epochs=2", run_dir=where, device="cpu", progress=False)
    return where


def loaded(name: str) -> Any:
    """A fixture: the run of that name."""
    return pytest.fixture(name=name)(lambda folder: Run.load(name, root=folder))


moons, digits, vae, gan = (loaded(name) for name in ("moons", "digits", "vae", "gan"))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classifiers that learn for a moment, critics of few draws."""
    monkeypatch.setattr("pvae.analysis.samples.features.EXPOSURES", 4000)
    monkeypatch.setattr("pvae.analysis.samples.critic.CRITIC_CODES", 4000)
