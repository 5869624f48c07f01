"""Imputations beside the conditional distributions of the model; observed elements, masks, categories."""

# A figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, union-attr, operator, index, attr-defined, dict-item"

import math
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from pvae.analysis.samples.impute import Imputations, impute
from pvae.analysis.samples.score import score
from pvae.data import Dataset
from pvae.errors import DataError
from pvae.experiment.experiment import Experiment
from tests.cli_runner import TINY
from tests.data.test_tables import MIXED, mixed
from tests.samples import models
from tests.samples.models import pair_of, refused, rows


def conditional(b: Tensor, covariance: Tensor, row: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviations of the missing coordinates of a normal row given the others."""
    seen = ~gone
    gain = torch.linalg.solve(covariance[seen][:, seen], covariance[seen][:, gone]).T
    left = covariance[gone][:, gone] - gain @ covariance[seen][:, gone]
    return b[gone] + gain @ (row[seen] - b[seen]), left.diagonal().sqrt()


def check(found: Imputations, x: Tensor, gone: Tensor, b: Tensor, covariance: Tensor, size: float) -> None:
    """Assert means, deviations, intervals and draws of normal rows; `size` is the effective number of samples."""
    mean, std = found.mean.clone(), found.std.clone()
    for i in range(len(x)):
        mean[i, gone[i]], std[i, gone[i]] = conditional(b, covariance, x[i], gone[i])
    unit = ((found.mean - mean) / std)[gone]
    assert unit.abs().max() < 5 / math.sqrt(size)
    assert (found.std / std)[gone].log().abs().max() < 5 / math.sqrt(size)
    low, high = (mean[gone] + std[gone] * scipy.stats.norm.ppf(p) for p in (0.1, 0.9))
    assert ((found.lower[gone] - low) / std[gone]).abs().max() < 9 / math.sqrt(size)
    assert ((found.upper[gone] - high) / std[gone]).abs().max() < 9 / math.sqrt(size)
    draws = ((found.draws - mean[:, None]) / std[:, None]).movedim(1, -1)[gone]
    assert scipy.stats.kstest(draws[:, 0].numpy(), "norm").pvalue > 1e-3
    torch.testing.assert_close(found.x[gone], found.mean[gone])


def test_missing_columns_have_their_conditional_normals() -> None:
    table = models.Table()
    found = impute(table.pair, table.x, samples=4000, interval=0.8, draws=3)
    assert found.khat[:50].median() < 0.7
    size = float(found.ess[:50].min())
    assert size > 30
    check(found, table.x, table.x.isnan(), table.b, table.covariance, size)
    seen = ~table.x.isnan()
    for t in (found.x, *found.draws.unbind(1)):
        assert torch.equal(t[seen], table.x[seen])
    assert found.std[seen].isnan().all()
    assert found.ess[50:].isnan().all()
    assert found.x.dtype is torch.float64
    assert torch.equal(found.missing, table.x.isnan())


def test_sweeps_correct_a_guide_that_reads_all_of_x() -> None:
    module = models.Linear()
    w = module.w.detach()
    posterior = torch.linalg.inv(torch.eye(2) + w.T @ w / models.NOISE**2)
    with torch.no_grad():
        module.g.copy_(posterior @ w.T / models.NOISE**2)
        module.c.copy_(-module.g @ module.b)
        module.scale.copy_(1.3 * posterior.diagonal().sqrt())
    x = rows(60, 2) @ w.T + module.b.detach() + models.NOISE * rows(60, 3, seed=1)
    gone = torch.zeros(60, 3, dtype=torch.bool)
    gone[::2, 1], gone[1::2, [0, 2]] = True, True
    covariance = (module.w @ module.w.T).detach() + models.NOISE**2 * torch.eye(3)
    found = impute(pair_of(module, 3), x, mask=gone, samples=200, draws=100, sweeps=100, interval=0.8)
    check(found, x, gone, module.b.detach(), covariance, 300)


def test_values_under_a_mask_are_never_read() -> None:
    pair, x = pair_of(models.Linear(), 3), rows(20, 3)
    gone = rows(20, 3, seed=1) > 0.5
    one, other = (impute(pair, x.masked_fill(gone, value), mask=gone) for value in (7.0, math.nan))
    for name, t in one.tensors().items():
        assert torch.equal(t.nan_to_num(99.0), other.tensors()[name].nan_to_num(99.0)), name
    refused("expected a pair that scores missing values", impute, pair, x.masked_fill(gone, math.nan))
    refused(r"expected booleans \[20, 3\]; got torch.bool \[20, 2\]", impute, pair, x, mask=gone[:, :2])
    refused("between 0 and 1; got 1", impute, pair, x, mask=gone, interval=1)


def test_neither_order_nor_chunks_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    table, order = models.Table(), torch.randperm(60, generator=torch.Generator().manual_seed(0))
    one = impute(table.pair, table.x, samples=1000)
    assert torch.equal(impute(table.pair, table.x, samples=1000).draws, one.draws)
    monkeypatch.setattr("pvae.analysis.samples.running.CHUNK_ROWS", 7)
    calls: list[Any] = []
    other = impute(table.pair, table.x[order], samples=1000, on_progress=lambda *at: calls.append(at))
    assert calls[-1] == (50, 50)
    assert len(calls) == 8
    gone = one.missing[order]
    apart = (other.mean - one.mean[order])[gone] / one.std[order][gone]
    assert apart.abs().max() < 8 / math.sqrt(float(one.ess[:50].min()))


def test_columns_of_all_kinds_stay_in_their_supports() -> None:
    network = {"kind": "mlp", "hidden": [8]}
    parts = {"encoder": {"network": network}, "decoder": {"network": network, "likelihood": "columns"}}
    plan = Experiment.from_dict({"data": {"source": "frame", "columns": MIXED}, "latents": {"z": {"dim": 2}}, **parts})
    x = Dataset.from_frame(mixed(), MIXED).train.x[:50]
    pair = plan.build((6,))
    found = impute(pair, x)
    inside = pair.model.decoder.likelihood(torch.zeros(1, *pair.model.decoder.likelihood.inputs)).support
    for t in (found.x, *found.draws.unbind(1)):
        assert not t.isnan().any()
        assert bool(inside.check(t).all())
    levels = found.missing[:, 4]
    assert levels.any()
    assert (found.probability[levels, 4] >= 1 / 3).all()
    assert found.mean[levels, 4].isnan().all()
    assert found.probability[found.missing[:, 1], 1].isnan().all()


def test_codes_that_are_summed_out() -> None:
    """The missing one of two pixels, which a mixture of two binary patterns explains, has its exact mean."""
    module = models.Patterns()
    p = module.p.detach()
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).repeat(200, 1)
    gone = torch.tensor([False, True]).expand(400, 2)
    found = impute(pair_of(module, 2), x, mask=gone, samples=400, draws=4, sweeps=0)
    for i, pixel in enumerate((1.0, 0.0)):
        weights = torch.tensor([0.3, 0.7]) * torch.where(torch.tensor(pixel > 0), p[:, 0], 1 - p[:, 0])
        exact = float((weights * p[:, 1]).sum() / weights.sum())
        assert float(found.mean[i::2, 1].mean()) == pytest.approx(exact, abs=0.02)
        assert float(found.draws[i::2, :, 1].mean()) == pytest.approx(exact, abs=0.08)
        assert (found.x[i::2, 1] == round(exact)).all()


def test_pictures_and_conditions() -> None:
    pair = Experiment.load("conditional", TINY).build((1, 8, 8))
    x = torch.cat([(rows(10, 64) > 0).float(), torch.arange(10.0)[:, None]], 1)
    gone = torch.zeros(10, 1, 8, 8, dtype=torch.bool)
    gone[..., 4:] = True
    found = impute(pair, x, mask=gone, samples=20, sweeps=2)
    assert found.draws.shape == (10, 10, 1, 8, 8)
    assert torch.equal(found.x[~gone], x[:, :64].reshape(10, 1, 8, 8)[~gone])
    assert set(found.draws.unique().tolist()) == {0.0, 1.0}
    assert ((found.mean[gone] >= 0) & (found.mean[gone] <= 1)).all()


def test_codes_and_points_are_pseudo_gibbs() -> None:
    pair = Experiment.load("autoencoder", TINY).build((1, 8, 8))
    gone = rows(5, 1, 8, 8) > 1
    assert impute(pair, rows(5, 1, 8, 8, seed=1), mask=gone, samples=5, sweeps=2).x.isfinite().all()
    with pytest.raises(DataError, match="independent given z"):
        impute(Experiment.load("flow").build((2,)), rows(5, 2), mask=rows(5, 2) > 0)


@pytest.mark.parametrize("name", ["hvae", "vq_vae", "kmeans", "gumbel_softmax_vae", "ladder"])
def test_latents_of_all_kinds_are_scored_and_imputed(name: str) -> None:
    pair = Experiment.load(name).build((1, 8, 8))
    x = (rows(6, 1, 8, 8) > 0).float()
    found = score(pair, x, samples=10, reference=x)
    assert (found.log_p >= found.elbo - 1e-6).all()
    assert found.elements.shape == x.shape
    gone = rows(6, 1, 8, 8, seed=1) > 0
    filled = impute(pair, x, mask=gone, samples=10, draws=2, sweeps=2)
    assert filled.x.isfinite().all()
    assert torch.equal(filled.x[~gone], x[~gone])
