"""Losses and gradients that are not finite: the diagnosis and the declared policies."""

import json
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pvae
from pvae.errors import NonFiniteError
from pvae.experiment.plan import Train
from pvae.runs import checkpoint
from pvae.runs.rundir import RunDirectory
from tests.training.pairs import Fragile, fit_pair


def fit_broken(part: Fragile, where: Path, **train: Any) -> pvae.Run:
    """A fit to forty rows, of which row 7 breaks the model."""
    x = torch.zeros(40, 2)
    x[7] = 99
    data = pvae.Dataset.from_tensors(x, validation=torch.zeros(5, 2), test=torch.zeros(5, 2))
    given = Train(epochs=2, batch_size=10, engine="eager", checkpoint_seconds=0.0, **train)
    return fit_pair(part, where, data=data, train=given)


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_not_finite(tmp_path: Path, policy: str) -> None:
    """FAULTS 18: the site, the rows, the last finite step; the policies."""
    part = Fragile()
    with pyro.validation_enabled(False):
        if policy == "skip":
            assert fit_broken(part, tmp_path, nonfinite=policy).status["skipped"] == 2
            assert torch.isfinite(part.loc).all()
            return
        with pytest.raises(NonFiniteError, match=r"first bad site model\.x, 1 of 10 rows \(data rows 7\)") as caught:
            fit_broken(part, tmp_path, nonfinite=policy)
    assert "last finite step" in str(caught.value)
    folder = next(tmp_path.glob("*/*"))
    assert (folder / "analysis" / "nonfinite_batch.safetensors").is_file()
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    rolled = [event for event in RunDirectory(folder).events() if "rolled back" in event["message"]]
    assert len(rolled) == (3 if policy == "rollback" else 0)


class Overflowing(Fragile):
    """A finite loss whose gradient is NaN for the marked row: sqrt at zero."""

    def model(self, x: Tensor) -> None:
        """As before, with a term of value 0 and derivative NaN."""
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            marked = (x == 99).any(-1, keepdim=True)
            zero = torch.where(marked, (self.loc * 0.0).square().sqrt() * 0.0, torch.zeros(()))
            pyro.sample("x", dist.Normal(z + self.loc + zero, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("clip", [None, 10.0])
def test_gradient_that_is_not_finite_never_reaches_a_checkpoint(tmp_path: Path, clip: float | None) -> None:
    """FAULTS 18: found at once where the norm is known, else at the next step; kept weights stay finite."""
    with pytest.raises(NonFiniteError, match="weights" if clip is None else "gradient norm nan"):
        fit_broken(Overflowing(), tmp_path, clip_norm=clip)
    saved = checkpoint.latest(next(tmp_path.glob("*/*")) / "checkpoints")
    assert saved is None or all(v.isfinite().all() for v in saved.tensors["weights"].values())
