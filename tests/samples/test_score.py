"""Scores of rows beside closed forms: log p(x) with missing coordinates, elements, p-values."""

# A figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, union-attr, operator, index, attr-defined, dict-item"

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from pvae.analysis import evidence
from pvae.analysis.samples.score import REFERENCE_FILE, Scores, score
from pvae.errors import DataError
from pvae.experiment.experiment import Experiment
from pvae.runs.run import Run
from pvae.upkeep.verify import verify
from tests.cli_runner import TINY
from tests.samples import models
from tests.samples.models import MEANS, P_A, P_B, array, pair_of, rows


def near(found: Scores, exact: np.ndarray, errors: float = 5.0) -> None:
    """Assert that log p(x) is exact within its own errors, row by row, and on average as large as they say."""
    gap = np.abs(array(found.log_p) - exact)
    assert (gap <= errors * array(found.error) + 1e-5).all(), (gap / array(found.error)).max()
    assert gap.mean() < 2 * array(found.error).mean() + 1e-6


def test_missing_coordinates_are_integrated_out() -> None:
    table = models.Table()
    found = score(table.pair, table.x, samples=2000)
    exact, elements = np.empty(60), np.zeros((60, 5))
    for i, row in enumerate(table.x):
        there = ~row.isnan()
        w, s, y = table.w[there], table.scale[there], (row - table.b)[there]
        exact[i] = scipy.stats.multivariate_normal(np.zeros(len(y)), table.covariance[there][:, there]).logpdf(y)
        posterior = torch.linalg.inv(torch.eye(2).double() + w.T @ (w / s[:, None] ** 2))
        mean = posterior @ w.T @ (y / s**2)
        variance = (w @ posterior * w).sum(1) + (y - w @ mean) ** 2
        elements[i, there.numpy()] = -0.5 * variance / s**2 - (s * math.sqrt(2 * math.pi)).log()
    near(found, exact)
    assert found.log_p.dtype is torch.float64
    np.testing.assert_allclose(array(found.elements), elements, atol=0.35)
    np.testing.assert_allclose(array(found.elements.sum(1)), array(found.reconstruction), atol=1e-4)
    assert np.abs(array(found.elements) - elements).mean() < 0.02
    assert not found.elements[table.x.isnan()].any()
    assert (found.khat < 0.7).double().mean() > 0.8
    assert "a pair" in found.absent["p_value"]


def test_scores_are_those_of_evidence() -> None:
    table = models.Table()
    found, known = score(table.pair, table.x, samples=200, seed=3), evidence(table.pair, table.x, 200, 3)
    for name in ("log_p", "khat", "ess"):
        torch.testing.assert_close(getattr(found, name), getattr(known, name), equal_nan=True)
    assert found.elbo.mean() == pytest.approx(known.elbo.value)
    assert torch.equal(found.log_p, score(table.pair, table.x, samples=200, seed=3).log_p)


def test_neither_order_nor_chunks_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    table, order = models.Table(), torch.randperm(60, generator=torch.Generator().manual_seed(0))
    one = score(table.pair, table.x, samples=1000)
    monkeypatch.setattr("pvae.analysis.bounds.accumulate.LARGEST_BLOCK", 300)
    monkeypatch.setattr("pvae.analysis.bounds.accumulate.BLOCKS_PER_SUM", 2)
    other = score(table.pair, table.x[order], samples=1000)
    apart = (other.log_p - one.log_p[order]).abs() / (one.error[order] ** 2 + other.error**2).sqrt()
    assert apart.max() < 5
    assert (other.elements - one.elements[order]).abs().mean() < 0.05


def test_codes_that_are_summed_out() -> None:
    x = rows(40) + 2
    found = score(pair_of(models.Mixture()), x)
    log_p = (P_A[:, None] * P_B).log() + torch.distributions.Normal(MEANS, 1).log_prob(x[:, None, None])
    torch.testing.assert_close(found.log_p, log_p.flatten(1).logsumexp(1).double(), atol=1e-5, rtol=1e-5)
    posterior = log_p.flatten(1).softmax(1)
    expected = (posterior * torch.distributions.Normal(MEANS, 1).log_prob(x[:, None, None]).flatten(1)).sum(1)
    torch.testing.assert_close(found.elements.flatten(), expected, atol=1e-4, rtol=1e-4)
    assert not found.error.any()


def test_hierarchies() -> None:
    x = 3 + rows(40, 1) / 2  # where its guide is right
    found = score(pair_of(models.Hierarchy(), 1), x, samples=5000)
    exact = scipy.stats.norm(3, math.sqrt(9 * (4 + 0.25) + 1)).logpdf(array(x)[:, 0])
    np.testing.assert_allclose(array(found.log_p), exact, atol=0.4)
    assert (array(found.log_p) - exact).mean() == pytest.approx(0, abs=0.03)


def test_global_latents_give_the_posterior_predictive_density() -> None:
    x = 5 + rows(40, 1)
    found = score(pair_of(models.Global(), 1), x, samples=500)
    near(found, scipy.stats.norm(5, math.sqrt(0.25 + 0.02)).logpdf(array(x)[:, 0]), 6)


def test_p_values_are_uniform_on_fresh_rows() -> None:
    module = models.Linear()
    pair, x = pair_of(module, 3), rows(3000, 3)
    found = score(pair, x[:1500], samples=20, reference=x[1500:])
    assert scipy.stats.kstest(array(found.p_value), "uniform").pvalue > 1e-3
    assert found.p_value.min() >= 1 / 1501
    torch.testing.assert_close(found.p_value, (1 + found.rank).double() / 1501)
    odd = score(pair, x[:50] + torch.tensor([0.0, 0.0, 9.0]), samples=20, reference=x[1500:])
    assert odd.p_value.median() < 0.01


def test_a_run_ranks_beside_its_validation_rows_which_a_copy_without_data_keeps(moons: Run, tmp_path: Path) -> None:
    x = moons.data.test.x
    found = score(moons, x, samples=20)
    assert scipy.stats.kstest(array(found.p_value), "uniform").pvalue > 1e-3
    reference = score(moons.pair, moons.data.validation.x, samples=20).log_p
    assert torch.equal(found.rank, (reference <= found.log_p[:, None]).sum(1))
    copy = Run.load(shutil.copytree(moons.path, tmp_path / "copy"))
    copy.plan.data.__dict__["rows"] = 999  # other data than the fit's, whose fingerprint differs
    assert torch.equal(score(copy, x, samples=20).p_value, found.p_value)
    assert {check.level for check in verify(copy.path, data=False).checks} == {"ok"}
    kept = copy.files.analysis / REFERENCE_FILE
    for odd in ('"x"', "{}", "null", "[[1], [2, 3]]", "[true, {}]"):
        kept.write_text(json.dumps(dict.fromkeys(json.loads(kept.read_text()), json.loads(odd))))
        assert "expected scores" in score(copy, x, samples=20).absent["p_value"]
    kept.unlink()
    without = score(copy, x, samples=20)
    assert "expected data of fingerprint" in without.absent["p_value"]
    assert without.elements.shape == (len(x), 2)


def test_a_guide_without_a_density_gives_what_it_can() -> None:
    pair = Experiment.load("autoencoder", TINY).build((1, 8, 8))
    x = rows(30, 1, 8, 8)
    found = score(pair, x, reference=x)
    assert found.log_p is None
    assert "prior_evidence" in found.absent["log_p"]
    with torch.no_grad():
        nodes = pair.model_trace(x, {"z": pair.guide_trace(x).nodes["z"]["value"]}).nodes
    torch.testing.assert_close(found.elements, nodes["x"]["fn"].base_dist.log_prob(x), atol=1e-4, rtol=1e-4)
    assert found.rank.max() == 30


def test_flows_are_exact_and_their_elements_absent() -> None:
    pair = Experiment.load("flow").build((2,))
    x = rows(20, 2)
    found = score(pair, x)
    torch.testing.assert_close(found.log_p, evidence(pair, x).log_p)
    assert not found.error.any()
    assert found.elements is None
    assert "z determines x" in found.absent["elements"]
    with pytest.raises(DataError, match="samples"):
        score(pair, x, samples=0)
