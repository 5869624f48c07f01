"""Audits beside closed forms, torch, scipy and figures by hand, on linear maps and the layouts of four libraries."""

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributions as td
from sklearn.datasets import make_swiss_roll
from torch import nn

from pvae import analysis
from pvae.analysis.audits.audit import intrinsic_dimension, moments
from pvae.errors import DataError
from tests.audits.layouts import DIGITS, LAYOUTS
from tests.cli_runner import run_cli, run_cli_json


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def audited(name):
    module, encode, decode, x = LAYOUTS[name]()
    return module, encode, decode, x[:400], analysis.audit(encode, decode, x[:400])


@pytest.mark.parametrize("name", LAYOUTS)
def test_scale_factors_and_errors_of_reconstructions_are_those_by_hand(name):
    module, encode, decode, x, found = audited(name)
    assert module.training
    module.eval()
    with torch.no_grad():
        z = encode(x)
        q = z
        if isinstance(z, tuple):
            q = None if len(z) == 3 else td.Normal(z[0], (z[1] / 2).exp())
        mean = z[0] if q is None else q.mean
        z = mean if q is None else q.sample((200,)).flatten(0, 1)
        mse = (decode(mean) - x).square().mean()
    module.train()
    assert found["scale"].value == pytest.approx(1 / z.std().item(), rel=0.01)
    assert abs(found["shift"].value - z.mean().item()) < 4 * found["shift"].standard_error
    channels = z.movedim(1 if z.dim() == 4 else -1, 0).flatten(1)
    for i, channel in enumerate(channels):
        assert found[f"scale.{i}"].value == pytest.approx(1 / channel.std().item(), rel=0.01)
    assert found["mse"].value == pytest.approx(mse.item(), rel=1e-4)
    if q is not None:
        kl = td.kl_divergence(q, td.Normal(0.0, 1.0)).flatten(1).sum(1).mean()
        assert found["kl_exact"].value == pytest.approx(kl.item(), rel=1e-4)
        assert found["active"].value == (mean.flatten(1).var(0) > 0.01).sum()
        assert found["kl"].value == pytest.approx(found["mutual_information"].value + found["marginal_kl"].value)


def test_dead_and_duplicate_codes_are_counted():
    module, encode, _, x, found = audited("vector-quantize-pytorch")
    index, book = encode(x)[1], module.vq.codebook.data
    seen = index.unique()
    assert (found["used"].value, found["codes"].value) == (len(seen), int(index.max()) + 1)
    whole = analysis.audit(encode, LAYOUTS["vector-quantize-pytorch"]()[2], x, codes=book)
    assert (whole["codes"].value, whole["used"].value, whole["dead"].value) == (12, len(seen), 12 - len(seen))
    alone = analysis.audit(
        lambda x: torch.tensor([0, 1, 1, 3])[x.long()[:, 0]], lambda c: c[:, None].float() * 0, X4, codes=5
    )
    assert [alone[name].value for name in ("codes", "used", "dead")] == [5, 3, 2]
    assert alone["duplicates"] is None
    assert alone["mutual_information"].value == pytest.approx(1.5 * math.log(2))
    vectors = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    same = analysis.audit(lambda x: (x.long()[:, 0], vectors[x.long()[:, 0]]), lambda q: q[:, :1], X4)
    assert (same["duplicates"].value, same["dead"].value, same["perplexity"].value) == (2, 0, pytest.approx(4))


X4 = (torch.arange(80) % 4)[:, None].float()


def test_information_and_elbo_of_a_linear_encoder_are_the_closed_forms():
    x, a, s = draws(1000, 2), torch.tensor([3.0, 1.0]), 0.5
    found = analysis.audit(lambda x: a * x, lambda z: z / a, x, noise=s, likelihood="normal", scale=0.8)
    information = 0.5 * torch.log1p(a**2 / s**2).sum().item()
    variance = a**2 + s**2
    marginal = 0.5 * (variance - 1 - variance.log()).sum().item()
    assert found.surgery is not None
    new = found.surgery.population
    assert new is not None
    assert new.midpoint is not None

    assert abs(new.midpoint.value - information) < 4 * new.midpoint.standard_error
    low, high = new.ends
    assert high is not None
    assert low - 0.1 < marginal < high + 0.1
    noise = (s / a) ** 2
    reconstruction = -0.5 * (math.log(2 * math.pi * 0.64) + noise / 0.64).sum().item()
    assert abs(found["reconstruction"].value - reconstruction) < 5 * found["reconstruction"].standard_error + 1e-3
    bits = -found["elbo"].value / (2 * math.log(2))
    assert found["bits_per_dimension"].value == pytest.approx(bits)
    fitted = analysis.audit(lambda x: a * x, lambda z: z / a, x, noise=s, likelihood="normal")
    assert fitted.scale == pytest.approx(noise.mean().sqrt().item(), rel=0.05)
    bound = analysis.evidence(found.pair, x[:50], 50)
    assert bound.iwae.value > found["elbo"].value


def test_likelihoods_are_those_of_torch():
    x = (draws(60, 5) > 0).float()
    bits = analysis.audit(lambda x: x, lambda z: 0.25 + 0.5 * z, x, likelihood="bernoulli")
    assert bits["log_likelihood"].value == pytest.approx(5 * math.log(0.75), rel=1e-5)
    assert bits.surgery is None
    assert bits["bits_per_dimension"] is None
    grey = (draws(60, 5).sigmoid() * 15).round() / 15
    found = analysis.audit(
        lambda x: x, lambda z: z, grey, likelihood="discretized_logistic", scale=0.05, levels=16, noise=1e-3
    )
    assert found["reconstruction"].value < 0
    assert found["bits_per_dimension"].value == pytest.approx(-found["elbo"].value / (5 * math.log(2)))
    with pytest.raises(DataError, match="expected data in"):
        analysis.audit(lambda x: x, lambda z: z, draws(60, 2), likelihood="bernoulli")


def test_shapes_and_dependence_of_coordinates_are_those_of_scipy_and_the_closed_form():
    z = draws(800, 3).double()
    z = torch.stack([z[:, 0], 0.8 * z[:, 0] + 0.6 * z[:, 1], z[:, 2].exp()], 1)
    found = analysis.audit(lambda x: x, lambda z: z, z)
    given = found.coordinates
    assert given["skewness"] == pytest.approx(scipy.stats.skew(z, 0), rel=1e-4, abs=1e-4)
    assert given["kurtosis"] == pytest.approx(scipy.stats.kurtosis(z, 0), rel=1e-4, abs=1e-4)
    for column, distance in zip(z.T.numpy(), given["distance"], strict=True):
        normal = scipy.stats.norm(column.mean(), column.std())
        assert distance == pytest.approx(scipy.stats.kstest(column, normal.cdf).statistic, abs=1e-5)
    r = np.corrcoef(z.T.numpy())
    assert found["correlation"].value == pytest.approx(r[0, 1])
    exact = -0.5 * math.log(1 - 0.8**2)
    assert abs(found["gaussian_correlation"].value - exact) < 4 * found["gaussian_correlation"].standard_error


def correlation(z):
    return {name: figure for name, figure, _ in moments(z.double(), {})}.get("gaussian_correlation")


def test_total_correlation_is_unbiased_and_its_error_the_spread():
    found = [correlation(draws(60, 20, seed=i)) for i in range(200)]
    values = np.array([f.value for f in found])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(200)
    assert correlation(draws(60, 31)) is None
    r = torch.linalg.cholesky(torch.tensor([[1.0, 0.7], [0.7, 1.0]]))
    found = [correlation(draws(200, 2, seed=i) @ r.T) for i in range(200)]
    values, errors = (np.array([getattr(f, name) for f in found]) for name in ("value", "standard_error"))
    assert values.mean() == pytest.approx(-0.5 * math.log(1 - 0.49), abs=4 * values.std() / math.sqrt(200))
    assert 0.85 < values.std() / errors.mean() < 1.15


def test_errors_of_moments_are_their_spread():
    found = [{k: f for k, f, _ in moments((draws(300, 4, seed=i) + 1).sigmoid().double(), {})} for i in range(100)]
    for name in ("skewness", "kurtosis"):
        values, errors = (np.array([getattr(f[name], k) for f in found]) for k in ("value", "standard_error"))
        assert 0.7 < values.std() / errors.mean() < 1.4


def sphere(d, n):
    z = draws(n, d + 1)
    return (z / z.norm(dim=1, keepdim=True)) @ draws(d + 1, 2 * d + 5, seed=1)


MANIFOLDS = {
    "swiss roll": (2, 0.0, lambda n: torch.tensor(make_swiss_roll(n, random_state=0)[0])),
    "S^2": (2, 0.0, lambda n: sphere(2, n)),
    "S^5": (5, 0.1, lambda n: sphere(5, n)),
    "S^10": (10, 1.0, lambda n: sphere(10, n)),
    "line": (1, 0.0, lambda n: draws(n, 1) @ draws(1, 20, seed=1)),
    "plane of 4": (4, 0.1, lambda n: draws(n, 4) @ torch.linalg.qr(draws(20, 4, seed=1))[0].T),
}


@pytest.mark.parametrize("name", MANIFOLDS)
def test_intrinsic_dimensions_are_those_of_known_manifolds(name):
    """Within the bias that `intrinsic_dimension` states, and three errors."""
    d, bias, make = MANIFOLDS[name]
    found = intrinsic_dimension(make(1500))
    assert found is not None
    assert -bias - 3 * found.standard_error < found.value - d < 3 * found.standard_error


def test_errors_cover_the_scale_factor():
    scores = []
    for seed in range(30):
        x = 2 * draws(200, 4, seed=seed) + 1
        found = analysis.audit(lambda x: x, lambda z: z, x)
        scores.append([(found[n].value - v) / found[n].standard_error for n, v in (("scale", 0.5), ("shift.1", 1.0))])
    assert 0.5 < np.square(scores).mean() < 2


def test_modules_are_in_evaluation_mode_and_stay_as_they_were():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.9))
    seen = []

    def encode(x):
        seen.append((net.training, torch.is_grad_enabled(), len(x)))
        return net(x)

    analysis.audit(encode, lambda z: z, draws(1200, 3))
    assert net.training
    assert {s[:2] for s in seen} == {(False, False)}
    assert max(s[2] for s in seen) == 512


@pytest.mark.parametrize(
    ("encode", "decode", "data", "said"),
    [
        (lambda x: x, lambda z: z[:, :1], draws(50, 3), r"decode: expected a tensor of shape \[50, 3\]; got \[50, 1\]"),
        (lambda x: x, lambda z: (z, z), draws(50, 3), "decode: expected a tensor .* got tuple"),
        (lambda x: x / 0, lambda z: z, draws(50, 3), "encode: expected a finite tensor"),
        (lambda x: "z", lambda z: z, draws(50, 3), "got str"),
        (lambda x: td.Gamma(x.abs() + 1, 1.0), lambda z: z, draws(50, 3), "got Gamma"),
        (lambda x: x[:5], lambda z: z, draws(50, 3), "expected one encoding for each of 50 rows; got 5"),
        (lambda x: (x[:, 0] * 100).long(), lambda c: c[:, None], draws(50, 3), "expected codes from 0 to"),
        (lambda x: x, lambda z: z, draws(39, 3), "expected at least 40 rows"),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(encode, decode, data, said):
    with pytest.raises(DataError, match=said):
        analysis.audit(encode, decode, data)


def test_the_result_reads_as_table_and_as_json():
    _, _, _, _, found = audited("diffusers")
    assert "scale.1" in found.to_frame().index
    plain = found.to_dict()
    assert plain["shape"] == [2, 4, 4]
    assert len(plain["coordinates"]["variance"]) == 32
    assert plain["figures"]["scale"]["kind"] == "estimate"
    memory = analysis.audit(
        lambda x: x, lambda z: z, np.zeros((60, 2), "uint8") + np.arange(60)[:, None].astype("uint8"), rows=45
    )
    assert memory.n == 45


@pytest.mark.slow
def test_large_latents_are_examined():
    encode, decode = nn.Conv2d(3, 4, 2, 2), nn.ConvTranspose2d(4, 3, 2, 2)
    found = analysis.audit(encode, decode, draws(2000, 3, 64, 64), noise=0.1)
    assert found.shape == (4, 32, 32)
    assert found["new_gain"] is None
    assert found["kl_exact"].value > found["mutual_information"].value


MINE = """
import torch
W = torch.randn(64, 4, generator=torch.Generator().manual_seed(0)) / 8
def encode(x): return x.flatten(1) @ W
def decode(z): return (z @ torch.linalg.pinv(W)).reshape(-1, 1, 8, 8)
"""


def test_the_command_says_what_the_function_says_and_writes_a_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)
    np.save("x.npy", DIGITS[:200].numpy())
    asked = ("audit", "mine.py:encode,decode", "--data", "x.npy", "--noise", "0.1")
    said = run_cli_json(*asked, "--out", "page.html")
    names: dict = {}
    exec(MINE, names)  # noqa: S102 - written above
    found = analysis.audit(names["encode"], names["decode"], DIGITS[:200], noise=0.1)
    for name, figure in found.to_dict()["figures"].items():  # arrays in memory elsewhere differ in the last bit
        assert figure is None or said["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-3, abs=1e-3)
    page = Path("page.html").read_text()
    assert page.count("<img") == 2
    assert "scale.3" in page
    for wrong in ("mine.py:encode", "mine.py:encode,decoder"):
        assert "expected two functions" in run_cli("audit", wrong, "--data", "x.npy", code=2)[1]
