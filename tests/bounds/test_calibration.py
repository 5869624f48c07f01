"""Calibration of the guide: exact posteriors pass at the stated rate; widths, shifts and deaf guides are found."""

# mypy: disable-error-code="no-untyped-call, no-untyped-def"

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import binom, kstest, multivariate_normal, norm
from torch import Tensor
from torch.distributions import Categorical, constraints

from pvae import Experiment, Pair
from pvae.analysis import calibration
from pvae.analysis.bounds.calibration import JOINT, Calibration, _nearest_before
from pvae.analysis.bounds.ranks import RankTest, _normals, holm, rank_tests
from pvae.analysis.truths.linear import LinearGaussian, LinearPrograms, probabilistic_pca
from pvae.errors import DataError

LAW = probabilistic_pca(np.random.default_rng(0).standard_normal((400, 5)) @ np.diag([3, 2, 2, 1, 1]), 2)
"""A linear VAE whose guide is the posterior, of two independent coordinates."""


def linear(law: LinearGaussian) -> Pair:
    programs = LinearPrograms(law)
    return Pair(programs.model, programs.guide).adopt(torch.zeros(2, len(law.b), dtype=torch.float64))


def verdicts(found: Calibration) -> list[str]:
    return [test.verdict for test in found.guide]


# ---------------------------------------------------------------------- the tests of ranks


@pytest.mark.parametrize(("width", "shift"), [(1.0, 0.0), (0.8, 0.3), (1.5, -1.0), (0.3, 0.1)])
def test_width_and_shift_are_those_of_normals(width, shift):
    """m = P(z' < z) and a = P(z', z'' < z) by scipy, for z ~ N(0, 1) and z', z'' ~ N(shift, width^2)."""
    spread = math.sqrt(1 + width**2)
    h, rho = -shift / spread, 1 / spread**2
    a = multivariate_normal([0, 0], [[1, rho], [rho, 1]]).cdf([h, h])
    found = _normals(np.array([norm.cdf(h)]), np.array([a]))
    np.testing.assert_allclose(np.ravel(found), [width, shift], atol=1e-5)


def uniform(n: int, dim: int, samples: int, seed: int) -> tuple[RankTest, ...]:
    ranks = np.random.default_rng(seed).integers(0, samples + 1, (n, dim))
    return rank_tests(ranks, samples, [str(d) for d in range(dim)])


@pytest.mark.parametrize(("n", "samples"), [(100, 2), (100, 19), (1000, 99)])
def test_p_values_of_uniform_ranks_are_uniform(n, samples):
    """1000 coordinates at once: a Kolmogorov-Smirnov test, one new seed in 1000."""
    assert kstest([test.p for test in uniform(n, 1000, samples, 1)], "uniform").pvalue > 1e-3


def test_any_verdict_on_uniform_ranks_is_rare():
    """At most 5 % of 400 families of 8; the bound is passed by one new seed in 1000."""
    alarms = sum(any(test.verdict != "fine" for test in uniform(200, 8, 19, seed)) for seed in range(400))
    assert binom.ppf(0.001, 400, 0.05) <= alarms <= binom.ppf(0.999, 400, 0.05)


def test_holm_adjusts_the_smallest_most():
    assert holm(np.array([0.04, 0.01, 0.03])).tolist() == pytest.approx([0.06, 0.03, 0.06])
    assert holm(np.array([0.5, 0.9])).tolist() == [1.0, 1.0]


def test_the_reference_is_the_nearest_row_before():
    x = torch.randn(700, 3)
    apart = torch.cdist(x, x)
    assert _nearest_before(x).tolist() == [0] + [int(apart[i, :i].argmin()) for i in range(1, 700)]


# ---------------------------------------------------------------------- pairs whose posterior is known


@pytest.mark.slow
def test_an_exact_posterior_passes_at_the_stated_rate():
    alarms = sum(any(v != "fine" for v in verdicts(calibration(linear(LAW), 150, seed=s))) for s in range(60))
    assert alarms <= binom.ppf(0.999, 60, 0.05)


@pytest.mark.slow
def test_an_exact_posterior_passes_at_the_stated_rate_over_many_seeds():
    pair = linear(LAW)
    alarms = sum(any(v != "fine" for v in verdicts(calibration(pair, 500, seed=s))) for s in range(500))
    assert binom.ppf(0.001, 500, 0.05) <= alarms <= binom.ppf(0.999, 500, 0.05)


@pytest.mark.parametrize(
    ("law", "verdict", "width", "shift"),
    [
        (replace(LAW, s=0.64 * LAW.s), "too narrow", 0.8, 0.0),
        (replace(LAW, s=1.44 * LAW.s), "too wide", 1.2, 0.0),
        (replace(LAW, c=LAW.c + 0.25 * np.sqrt(np.diag(LAW.s))), "shifted", 1.0, 0.25),
    ],
)
def test_a_fifth_off_is_found_with_1000_rows(law, verdict, width, shift):
    pair = linear(law)
    for seed in range(5):
        found = calibration(pair, 1000, seed=seed)
        for test in found.guide[:2]:
            assert verdict in test.verdict
            assert test.width.value == pytest.approx(width, abs=5 * test.width.standard_error)
            assert test.shift.value == pytest.approx(shift, abs=5 * test.shift.standard_error)
        assert (found.joint.verdict == verdict) is (verdict != "shifted")
        assert f"q(z | x) is {verdict} in 2 of 2 coordinates (z[" in found.sentences[0]


def test_a_guide_that_ignores_x_is_found_jointly_alone():
    deaf = replace(LAW, g=0 * LAW.g, c=0 * LAW.c, s=np.eye(2))
    found = calibration(linear(deaf))
    assert verdicts(found) == ["fine", "fine", "too wide"]
    assert "q is too cautious" in str(found)


def test_coverage_is_that_of_the_ranks_of_distances():
    found = calibration(linear(replace(LAW, s=0.25 * LAW.s)))
    counts = np.array(found.joint.counts)
    assert counts.sum() == found.n == 1000
    assert found.joint.within(0.9).value == pytest.approx(counts[:18].sum() / 1000)
    assert found.joint.within(0.025).value == pytest.approx(counts[0] / 2000)
    assert found.joint.within(0.9).value < 0.7


def test_importance_weights_mend_a_wide_guide():
    found = calibration(linear(replace(LAW, s=2.25 * LAW.s)), importance=64)
    assert verdicts(found) == ["too wide"] * 3
    assert [test.verdict for test in found.weighted] == ["fine"] * 3
    assert "With importance weights (each sample one of 64) no coordinate" in str(found)
    plain = calibration(linear(replace(LAW, s=2.25 * LAW.s)))
    assert plain.weighted == ()
    assert "weights" not in str(plain)


def test_a_correlated_posterior_is_not_a_product():
    """The best product of normals is too narrow in every coordinate by sqrt(1 - rho^2)."""
    w = np.array([[1.0, 0.9], [0.0, 0.3]])
    law = LinearGaussian(w, np.zeros(2), 0.5, np.zeros((2, 2)), np.zeros(2), np.eye(2), np.eye(2))
    covariance = np.linalg.inv(law.precision)
    exact = replace(law, g=covariance @ w.T / 0.25, s=covariance)
    product = replace(exact, s=np.diag(1 / np.diag(law.precision)))
    assert verdicts(calibration(linear(exact), seed=1)) == ["fine"] * 3
    found = calibration(linear(product))
    assert verdicts(found) == ["too narrow"] * 3
    want = np.sqrt(np.diag(product.s) / np.diag(covariance))
    for test, width in zip(found.guide[:2], want, strict=True):
        assert test.width.value == pytest.approx(width, abs=4 * test.width.standard_error)


def hand(model, guide, x: Tensor) -> Pair:
    return Pair(model=model, guide=guide).adopt(x)


PRIOR, PLACES = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.0, 2.0, 4.0])


def coded(temper: float, *, one_hot: bool = False, order: Sequence[int] = (0, 1, 2)) -> Pair:
    """Three codes behind x ~ N(2 c, 1), and their posterior to the power `temper`, its codes reordered."""
    family: Any = dist.OneHotCategorical if one_hot else dist.Categorical

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", family(logits=PRIOR))
            loc = c @ PLACES if one_hot else PLACES[c]
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    def guide(x):
        pyro.param("unused", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            logits = temper * (PRIOR - (x[:, None] - PLACES).square() / 2)
            pyro.sample("c", family(logits=logits[:, list(order)]))

    return hand(model, guide, torch.zeros(3))


@pytest.mark.parametrize("one_hot", [False, True])
def test_codes_are_ranked_by_how_rare_they_are(one_hot):
    """The width is the ratio of E[1 - sum q^2] and E[1 - sum q p], integrated over x."""
    assert verdicts(calibration(coded(1.0, one_hot=one_hot), seed=3)) == ["fine", "fine"]
    x = torch.linspace(-6, 10, 1601)
    joint = PRIOR + dist.Normal(PLACES, 1.0).log_prob(x[:, None])
    weight = joint.logsumexp(1).softmax(0)
    for temper, verdict in ((3.0, "too narrow"), (0.3, "too wide")):
        q, p = (temper * joint).softmax(1), joint.softmax(1)
        want = (weight @ (1 - (q * q).sum(1))) / (weight @ (1 - (q * p).sum(1)))
        (test, _) = calibration(coded(temper, one_hot=one_hot), 2000).guide
        assert (test.name, test.verdict) == ("c", verdict)
        assert test.width.value == pytest.approx(float(want), abs=4 * test.width.standard_error)
        assert 0 < test.width.standard_error < 0.03
    assert calibration(coded(0.3, one_hot=one_hot)).joint.verdict == "too wide"


def test_codes_have_no_order():
    """A guide with two codes exchanged is as wrong wherever they stand, and no shift is told."""
    found = calibration(coded(1.0, order=[1, 0, 2]))
    assert found.guide[0].verdict == "too narrow"
    assert found.guide[0].shift.value == 0
    assert "shift" not in found.sentences[0]


@pytest.mark.slow
def test_exact_codes_pass_at_the_stated_rate():
    pair = coded(1.0)
    alarms = sum(any(v != "fine" for v in verdicts(calibration(pair, 200, seed=s))) for s in range(60))
    assert alarms <= binom.ppf(0.999, 60, 0.05)


def levels(width: float) -> Pair:
    """z2 ~ N(0, 1), z1 ~ N(z2, 1), x ~ N(z1, 1), and the exact q(z1 | x) q(z2 | z1), its last scale times `width`."""

    def model(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.param("unused", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(2 * x / 3, math.sqrt(2 / 3)).to_event(1))
            pyro.sample("z2", dist.Normal(z1 / 2, width * math.sqrt(1 / 2)).to_event(1))

    return hand(model, guide, torch.zeros(3, 1))


def test_every_level_of_a_hierarchy_is_tested():
    found = calibration(levels(1.0))
    assert [test.name for test in found.guide] == ["z1", "z2", JOINT]
    assert verdicts(found) == ["fine"] * 3
    # 0.5 of the variance 0.5 + 2/3 / 4 of z2 given x is made four times as small
    narrow = calibration(levels(0.5), 2000)
    assert verdicts(narrow) == ["fine", "too narrow", "too narrow"]
    want = math.sqrt((0.125 + 1 / 6) / (0.5 + 1 / 6))
    assert narrow.guide[1].width.value == pytest.approx(want, abs=4 * narrow.guide[1].width.standard_error)


def with_global(heed: float) -> Pair:
    """x ~ N(z + b, 1) with a global b that the guide of z reads, or does not."""

    def model(x):
        b = pyro.sample("b", dist.Normal(torch.tensor(0.0), 3.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z + b, 1.0), obs=x)

    def guide(x):
        b = pyro.sample("b", dist.Normal(torch.tensor(4.0), 0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - heed * b) / 2, math.sqrt(1 / 2)))

    return hand(model, guide, torch.zeros(3))


def test_global_latents_are_given():
    assert verdicts(calibration(with_global(1.0))) == ["fine", "fine"]
    found = calibration(with_global(0.0))
    assert "shifted" in found.guide[0].verdict
    assert found.guide[0].shift.value > 1


def several(scale: float) -> Pair:
    """model(x, y): y is given, x ~ N(z + y, 1) is made anew."""

    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z + y, 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - y) / 2, pyro.param("s", torch.tensor(scale))))

    return Pair(model=model, guide=guide)


def test_what_the_model_reads_is_taken_from_given_rows():
    data = torch.zeros(50), 10 * torch.randn(50)
    for scale, verdict in ((math.sqrt(1 / 2), "fine"), (0.5, "too narrow")):
        pair = several(scale)
        pair.accept(data)
        assert calibration(pair, x=data).guide[0].verdict == verdict
        with pytest.raises(DataError, match="the model reads several arguments; got none. Pass x="):
            calibration(pair)


@cache
def conditional() -> tuple[Pair, Tensor]:
    pair = Experiment.load("conditional").build((1, 8, 8))
    rows = torch.cat([torch.zeros(20, 64), torch.arange(20.0)[:, None] % 10], 1)
    return pair, rows


def test_covariates_are_those_of_given_rows():
    pair, rows = conditional()
    found = calibration(pair, 40, 5, x=rows)
    assert len(found.guide) == 1 + pair.structure.shapes["z"].numel
    with pytest.raises(DataError, match="the model reads y; got none"):
        calibration(pair, 40)


def test_relaxed_latents_are_ranked_as_codes():
    pair = Experiment.load("gumbel_softmax_vae").build((1, 8, 8))
    found = calibration(pair, 30, 5, importance=2)
    assert [test.name for test in found.guide[:2]] == ["c[0]", "c[1]"]
    assert len(found.guide) == len(found.weighted) == 11


def test_the_same_seed_gives_the_same_numbers_and_nothing_moves():
    pair = linear(LAW)
    state = torch.get_rng_state()
    one, two = (calibration(pair, 60, importance=2, seed=4).to_dict() for _ in range(2))
    assert one == two
    assert one != calibration(pair, 60, importance=2, seed=5).to_dict()
    assert torch.equal(state, torch.get_rng_state())


# ---------------------------------------------------------------------- refusals


def of(guide, obs=lambda x: x, model=None) -> Pair:
    def usual(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=obs(x))

    return hand(model or usual, guide, torch.arange(3.0))


def amortised(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.5)) * x, 1.0))


def pointed(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(pyro.param("a", torch.tensor(0.5)) * x))


def by_row(x):
    with pyro.plate("data", len(x)):
        loc, scale = pyro.param("loc", torch.zeros(3)), pyro.param("scale", torch.ones(3), constraints.positive)
        pyro.sample("z", dist.Normal(loc, scale))


def summed(x):
    places = pyro.param("places", torch.tensor([0.0, 1.0]))
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.5])), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(places[c], 1.0), obs=x)


def reads_x(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


REFUSED = {
    "rows": (lambda: calibration(of(amortised), 1), "at least two rows and draws"),
    "draws": (lambda: calibration(of(amortised), draws=1), "at least two rows and draws"),
    "a point": (lambda: calibration(of(pointed)), r"got a point for z \(Delta\), which has no spread"),
    "parameters of rows": (lambda: calibration(of(by_row), x=torch.arange(3.0)), "parameters of every row"),
    "summed out": (lambda: calibration(of(lambda x: None, model=summed)), "got c, summed out exactly"),
    "reads x": (lambda: calibration(of(amortised, model=reads_x)), "the model reads them; got none. Pass x="),
    "observes another": (lambda: calibration(of(amortised, lambda x: 2 * x + 1)), "observed as it is"),
    "a flow": (lambda: calibration(Experiment.load("flow").build((2,))), "x determined by the latents"),
    "a GAN": (lambda: calibration(Experiment.load("gan").build((1, 8, 8))), "a generator without a likelihood"),
    "an autoencoder": (lambda: calibration(Experiment.load("autoencoder").build((1, 8, 8))), "got a point for z"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_asked_is_refused(name):
    act, words = REFUSED[name]
    with pytest.raises(DataError, match=words):
        act()


def test_codes_of_the_oracle_are_bayes():
    """The untempered guide of `coded` is Bayes' rule."""
    pair = coded(1.0)
    x = torch.linspace(-2, 6, 9)
    guide: Any = pair.guide_trace(x).nodes["c"]["fn"]
    joint = PRIOR + dist.Normal(PLACES, 1.0).log_prob(x[:, None])
    assert torch.allclose(guide.logits, Categorical(logits=joint).logits, atol=1e-5)
