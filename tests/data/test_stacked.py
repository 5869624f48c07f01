"""Codes of an earlier run as data: M1 + M2, what is kept of its rows, fingerprints, new rows, refusals."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import pvae
from pvae.analysis.truths.example import example_run
from pvae.data import StackedCodes, load
from pvae.errors import DataError, DeclarationError
from pvae.experiment.experiment import Experiment
from tests.runs_shared import fit, interrupted, resume, tiny

PLAIN = {"network": {"kind": "mlp", "hidden": [32]}}
EAGER = {"engine": "eager", "optimizer": {"kind": "adam", "lr": 0.01}}


def m2(first: pvae.Run, **data: Any) -> Experiment:
    """M2 on the codes of M1, with 200 labels."""
    w = {"dim": 2, "posterior": {"kind": "normal", "given": ["x", "y"]}}
    return Experiment.from_dict({
        "data": {"source": "codes", "run": str(first.path), "labelled": 200, "scale": "standardise", **data},
        "latents": {"y": {"codes": 10, "observed": "label"}, "w": w}, "encoder": PLAIN,
        "decoder": {**PLAIN, "given": ["y", "w"], "likelihood": {"kind": "normal"}},
        "objective": {"classification": 5.0}, "train": {"epochs": 3, "batch_size": 50, "labelled": 0.5, **EAGER},
    })  # fmt: skip


@pytest.fixture(scope="module")
def m1(tmp_path_factory: pytest.TempPathFactory) -> pvae.Run:
    wide = {"network": {"kind": "mlp", "hidden": [64]}}
    e = tiny(epochs=10, optimizer={"kind": "adam", "lr": 0.01})
    e = e.with_changes({"latents": {"z": {"dim": 8}}, "encoder": wide, "decoder": wide})
    return fit(e, tmp_path_factory.mktemp("m1"))


def test_m2_stacked_on_m1_classifies_images(m1: pvae.Run, tmp_path: Path):
    run = resume(interrupted(m2(m1), tmp_path, 30))
    codes = {split.name: m1.encode(split, mean=True)["z"].double() for split in m1.data.splits}
    shift, scale = codes["train"].mean(0), codes["train"].std(0, correction=0)
    for split in run.data.splits:
        first = m1.data.split(split.name)
        torch.testing.assert_close(split.data, ((codes[split.name] - shift) / scale).float())
        assert split.y is not None
        assert first.y is not None
        assert torch.equal(split.y, first.y)
        assert (split.numbers == first.numbers).all()
    bunch = load_digits()
    images, y = bunch.data.reshape(-1, 8, 8).astype(np.uint8)[1350:], torch.tensor(bunch.target[1350:])
    new = run.rows((images, bunch.target[1350:]))
    assert new.y is not None
    assert torch.equal(new.y, y)
    own = m1.encode(images, mean=True)["z"].double()
    torch.testing.assert_close(new.data, ((own - shift) / scale).float())
    right = (run.encode(images, mean=True)["y"] == y).double().mean()
    assert right > 0.4  # by chance 0.1


def test_the_fingerprint_is_that_of_weights_data_and_choice(m1: pvae.Run, tmp_path: Path):
    plain = StackedCodes(run=str(m1.path))
    drawn = load(plain.model_copy(update={"sample": True}))
    assert torch.equal(drawn.test.x, m1.encode(m1.data.test, seed=2)["z"])
    other = fit(m1.experiment.with_overrides("seed=1", "train.epochs=1"), tmp_path)
    found = [load(data).fingerprint for data in (plain, StackedCodes(run=str(other.path)))]
    found += [drawn.fingerprint, load(plain.model_copy(update={"scale": "standardise"})).fingerprint]
    assert len({*found}) == 4
    assert load(StackedCodes(run=f"{m1.path.name}"), data_dir=m1.path.parent).fingerprint == found[0]


def test_what_is_no_data_is_refused(m1: pvae.Run, tmp_path: Path):
    def refused(problem: type[Exception], match: str, **data: Any) -> None:
        with pytest.raises(problem, match=match):
            load(m2(m1, **data).source)

    refused(DeclarationError, "expected one of z; got 'zz'", latent="zz")
    refused(DeclarationError, "Expected a run directory", run=str(tmp_path / "none"))
    refused(DeclarationError, "splits of the run", splits={"train": [0, 10]})
    refused(DataError, "expected a run of declared data; got one of data passed in Python", run=str(example_run().path))
    both = fit(tiny(epochs=1).with_changes({"latents": {"a": {"dim": 2}, "z": {"codes": 4}}}), tmp_path)
    refused(DeclarationError, "data.latent: expected one of a, z; got none", run=str(both.path))
    for latent, size in (("a", 2), ("z", 1)):
        assert load(m2(both, latent=latent).source).shape == (size,)
