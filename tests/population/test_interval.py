"""The interval on new data: its parts against sums written out, its honesty, its errors and its coverage."""

# The results of these data sets have all their parts.
# mypy: disable-error-code="union-attr, operator"

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture

import pvae
from pvae.analysis.decompose.surgery import surgery
from pvae.analysis.population.interval import ALIKE, PairsBound, Population, interval
from pvae.analysis.population.kernels import FittedNormal, FullPrior, KernelPrior, fitted_flow, widened
from pvae.analysis.population.sample import NewRows, folds, mixture_weights
from pvae.analysis.population.sweep import PairCritic, counted_twice, spread, sweep
from pvae.analysis.truths.linear import gaussian_channel
from pvae.distributions.exponential import FullRankNormals, Normals
from pvae.distributions.exponential_codes import product
from tests.cli_runner import TINY, run_cli_json
from tests.decompose.pairs import channel
from tests.soak.population import TRUTHS, gaussian, mixture, run

DOUBLE = torch.float64


@pytest.fixture
def rows() -> NewRows:
    return gaussian(2, 2.0, 0.3).rows(60, 3)


def table(rows: NewRows) -> np.ndarray:
    """log q(z_i | x_j), `(n, n)`, by scipy."""
    assert isinstance(rows.q, Normals)
    means, variance = rows.q.loc.numpy(), float(rows.q.scale[0, 0]) ** 2
    return np.stack([multivariate_normal.logpdf(rows.value.numpy(), m, variance) for m in means], 1)


# ---------------------------------------------------------------------- passes over pairs


@pytest.mark.parametrize("tile", [2**20, 600], ids=["one tile", "tiles"])
def test_information_is_the_sum_written_out(rows, tile, monkeypatch):
    monkeypatch.setattr("pvae.analysis.population.sweep.TILE", tile)
    n, logs = len(rows), table(rows)
    apart = logs + np.where(np.eye(n), -np.inf, 0)
    found, none = sweep(rows.q, rows.value, rows.own)
    whole = logsumexp(logs, 1)
    assert not none.any()
    assert found.inside.numpy() == pytest.approx(np.diag(logs) - whole + math.log(n), abs=1e-6)
    assert found.outside.numpy() == pytest.approx(np.diag(logs) - logsumexp(apart, 1) + math.log(n - 1), abs=1e-6)
    assert found.inside_shares.numpy() == pytest.approx(np.exp(apart - whole[:, None]).sum(0), rel=1e-5)
    assert found.outside_shares.numpy() == pytest.approx(np.exp(apart - logsumexp(apart, 1)[:, None]).sum(0), rel=1e-5)


@pytest.mark.parametrize("sizes", [(20, 19, 21), (60,)], ids=["folds", "train"])
@pytest.mark.parametrize("tile", [2**20, 600], ids=["one tile", "tiles"])
def test_pairs_bound_is_the_sum_written_out(rows, sizes, tile, monkeypatch):
    monkeypatch.setattr("pvae.analysis.population.sweep.TILE", tile)
    n, logs = len(rows), table(rows)
    log_r = torch.randn(n, dtype=DOUBLE) - 3
    critic = PairCritic(log_r, sizes, 0.75, 2.0)
    _, sums = sweep(rows.q, rows.value, rows.own, critic)
    fold = np.repeat(np.arange(len(sizes)), sizes)
    paired = (fold[:, None] == fold) | (fold == (fold[:, None] - 1) % len(sizes))
    np.fill_diagonal(paired, False)
    assert (paired | paired.T | np.eye(n, dtype=bool)).all()  # no two rows go unpaired
    t = np.minimum(0.75 * (logs - log_r.numpy()[:, None]), 2.0)
    e = np.where(paired, np.exp(t), 0)
    assert sums[0].sum(1).numpy() == pytest.approx(e.sum(1), rel=1e-5)
    assert sums[1].sum(1).numpy() == pytest.approx(e.sum(0), rel=1e-5)
    bound = PairsBound.of(critic, rows.own, sums)
    m, g = e.sum() / paired.sum(), ALIKE / n**2 * np.exp(np.diag(t)).mean()
    assert float(bound.terms.mean()) == pytest.approx(np.diag(t).mean() - math.log(m + g), rel=1e-5)
    assert bound.seen == pytest.approx(m / (m + g), rel=1e-5)
    assert bound.largest == pytest.approx(max(e.sum(1).max(), e.sum(0).max()) / e.sum(), rel=1e-5)


def test_noise_of_pairs_is_counted_once():
    """The mean over symmetric pairs of pure noise: its error, not that times root two."""
    n, means, errors = 60, [], []
    for seed in range(200):
        noise = torch.triu(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE), 1)
        e = 2 * (noise + noise.T) / n  # a row enters with both terms of its pairs
        half = torch.stack([e[:, : n // 2].sum(1), e[:, n // 2 :].sum(1)], 1)
        means.append(float(half.sum(1).mean()) / 2)
        errors.append((spread(half.sum(1)), spread(half.sum(1), counted_twice(half))))
    plain, once = np.array(errors).mean(0) / np.std(means)
    assert plain == pytest.approx(math.sqrt(2), rel=0.1)
    assert once == pytest.approx(1, rel=0.1)


# ---------------------------------------------------------------------- kernels, normals, weights


def test_widened_posteriors():
    loc, scale = torch.randn(5, 2, dtype=DOUBLE), torch.rand(5, 2, dtype=DOUBLE) + 0.1
    tril = torch.tensor([[0.5, 0.0], [0.3, 0.4]], dtype=DOUBLE).expand(5, 2, 2)
    more, z = torch.tensor([0.2, 0.3], dtype=DOUBLE), torch.randn(5, 2, dtype=DOUBLE)
    for q, covariances in (
        (Normals(loc, scale), torch.diag_embed(scale**2)),
        (FullRankNormals(loc, tril), tril @ tril.mT),
        (product([Normals(loc[:, :1], scale[:, :1]), Normals(loc[:, 1:], scale[:, 1:])]), torch.diag_embed(scale**2)),
    ):
        found = widened(q, more)
        assert found is not None
        exact = [multivariate_normal.logpdf(z[i], loc[i], covariances[i] + torch.diag(more)) for i in range(5)]
        assert found.log_prob(z).numpy() == pytest.approx(np.array(exact))


def test_influence_of_a_row_on_the_normal():
    """A row doubled in the fit, against the derivative; the shrinkage is left out of both by many rows."""
    value = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    weight = (value[:, 0] > 0.5).double()
    fit = FittedNormal(value)
    found = fit.influence(value, weight)
    more = FittedNormal(torch.cat([value, value[:20].repeat(3, 1)]))
    change = float((weight * (more.log_prob(value) - fit.log_prob(value))).sum())
    assert change == pytest.approx(3 * float((found[:20] - found.mean()).sum()), rel=0.05)


def test_weights_of_a_mixture():
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(4000, generator=generator) < 0.3
    z = torch.where(first, -5.0, 5.0) + torch.randn(4000, generator=generator)
    scores = torch.stack([torch.distributions.Normal(m, 1.0).log_prob(z) for m in (-5.0, 5.0, 40.0)], 1).double()
    log_w = mixture_weights(scores)
    assert log_w.exp().tolist() == pytest.approx(
        [float(first.double().mean()), 1 - float(first.double().mean()), 0], abs=1e-3
    )


# ---------------------------------------------------------------------- honesty


def test_prior_does_not_know_the_row_it_is_scored_on(rows):
    """Row i enters log r(z_i) by its own z_i alone: with another posterior of x_i nothing changes."""
    _, fold = folds(len(rows), 0, rows.value.device)
    found = KernelPrior().scored(rows, fold)
    for i in (0, 30, 59):
        scale = rows.q.scale.clone()
        scale[i] *= 3
        changed = KernelPrior().scored(replace(rows, q=Normals(rows.q.loc, scale)), fold)
        assert changed.log_r[i] == found.log_r[i]
        assert not torch.equal(changed.log_r, found.log_r)


def test_prior_of_the_pairs_knows_neither_row(rows):
    """It is made of the fold after that of row i alone: other values in both other folds change nothing at z_i."""
    _, fold = folds(len(rows), 0, rows.value.device)
    found = KernelPrior().scored(rows, fold)
    i = int((fold == 1).nonzero()[0, 0])
    value = rows.value.clone()
    others = (fold != 2) & (torch.arange(len(rows)) != i)
    value[others] += 5.0
    changed = KernelPrior().scored(replace(rows, value=value, log_p=torch.where(others, -9.0, rows.log_p)), fold)
    assert float(changed.apart[i]) == pytest.approx(float(found.apart[i]), abs=1e-9)
    value[fold == 2] += 5.0
    assert float(KernelPrior().scored(replace(rows, value=value), fold).apart[i]) != pytest.approx(
        float(found.apart[i]), abs=1e-3
    )


# ---------------------------------------------------------------------- errors and coverage


@pytest.mark.parametrize("train", [0, 1], ids=["rows alone", "train rows"])
def test_errors_and_coverage_of_a_normal_channel(train):
    truth = gaussian(2, 1.5, 0.295)
    found = [run(truth, 100, seed, train) for seed in range(60)]
    check(found, truth.gain, ("gain", "information", "upper"), 54)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "figures", "width"),
    [
        ("linear d=2, I=1.5", ("gain", "information", "upper"), 0.4),
        ("linear d=10, I=7", ("gain", "information", "upper"), 1.2 * 0.49),
        ("linear d=10, I=11.5", ("gain", "information", "upper"), 1.2 * 2.21),
        ("mixture d=6, unsaturated", ("gain", "information", "upper"), 0.4),
        ("mixture d=6, saturated", ("gain", "upper"), 1.2 * 1.6),
        ("20 000 points", (), 1.2 * 7.0),
    ],
)
def test_errors_and_coverage_at_1000_rows(name, figures, width):
    truth = TRUTHS[name]()
    found = [run(truth, 1000, seed, 0) for seed in range(100)]
    check(found, truth.gain, figures, 90)
    assert np.mean([f["high"] - f["low"] for f in found]) <= width


def check(found, gain: float, figures: tuple[str, ...], holds: int) -> None:
    """The interval holds the exact gain in so many data sets; the errors are those that the data sets show."""
    assert sum(f["low"] <= gain <= f["high"] for f in found) >= holds
    for name in figures:
        z = np.array([f[name] for f in found])
        assert 0.8 < z.std() / np.mean([f[f"{name}_error"] for f in found]) < 1.25, name


def test_saturated_rows_say_so():
    found = interval(gaussian(10, 11.5, 0.648).rows(400, 0), KernelPrior())
    assert isinstance(found, Population)
    assert found.slope > 0.9
    assert found.midpoint is None
    assert found.gain_upper.value > 0.648 > found.gain.value - 2 * found.gain.standard_error
    assert [s.n for s in found.sizes] == [25, 100, 400]
    assert found.sizes[-1].information.value == pytest.approx(math.log(400), abs=0.1)
    assert any("cannot tell" in remark for remark in found.remarks)


def test_midpoint_where_rows_can_tell():
    truth = gaussian(2, 1.5, 0.295)
    found = interval(truth.rows(2000, 0), KernelPrior())
    assert isinstance(found, Population)
    assert found.midpoint is not None
    assert abs(found.midpoint.value - truth.information) < 3 * found.midpoint.standard_error
    assert found.information.value < found.midpoint.value < found.sizes[-1].leave_one_out.value


def test_lower_end_beats_priors_refitted_to_the_codes():
    """Each is an r: none beats the lower end on rows held out, within errors, and none exceeds the upper end."""
    truth = mixture(0.3225, 0.0943)
    rows = truth.rows(1000, 5)
    found = interval(rows, KernelPrior())
    assert isinstance(found, Population)
    train, test = rows.value[::2].numpy(), rows.value[1::2].numpy()
    gains = []
    for k in (1, 3, 10, 30):
        fitted = GaussianMixture(k, random_state=0, reg_covar=1e-3).fit(train)
        gained = fitted.score_samples(test) - rows.log_p[1::2].numpy()
        gains.append((gained.mean(), gained.std() / math.sqrt(len(test))))
    best, error = max(gains)
    high = found.gain_upper.value + 2 * found.gain_upper.standard_error
    assert max(g - 2 * e for g, e in gains) < high
    assert found.gain.value > best - 2 * math.hypot(error, found.gain.standard_error)


def test_covariates_have_a_bound_from_the_pairs_of_each_value():
    """M = E_y KL(q_pi(z | y) || p(z | y)) is the mean of two exact values; no pair is of two covariate values."""
    truths = gaussian(10, 7.0, 0.648), gaussian(10, 7.0, 2.0)
    for seed in range(3):
        first, second = (truth.rows(400, 2 * seed + k) for k, truth in enumerate(truths))
        rows = replace(first.joined(second), group=torch.arange(800) // 400)
        found, alone = interval(rows, KernelPrior()), [interval(part, KernelPrior()) for part in (first, second)]
        low, high = (e.value + k * 2 * e.standard_error for e, k in ((found.gain, -1), (found.gain_upper, 1)))
        assert low <= 1.324 <= high < np.mean([e.gain_upper.value for e in alone]) + 0.3
        assert found.information.value > math.log(400) + 0.2  # which no I_n within a value exceeds
        assert found.seen > 0.5
        few = interval(replace(rows, group=torch.arange(800) % 8), KernelPrior())
        assert few.seen is None
        assert few.information.value < math.log(100)


# ---------------------------------------------------------------------- in a surgery


def test_interval_of_a_surgery():
    truth = gaussian_channel(2, math.exp(-1.5), 1000)
    found = surgery(truth.pair, truth.x)
    new = found.population
    assert new is not None
    low, high = new.gain.value - 2 * new.gain.standard_error, new.gain_upper.value + 2 * new.gain_upper.standard_error
    assert low <= 0.0 <= high < 0.2  # q_pi is p
    assert new.information.value <= 1.5 + 2 * new.information.standard_error
    assert new.information_upper.value >= 1.5 - 2 * new.information_upper.standard_error
    assert new.sizes[-1].information.value == pytest.approx(found.mutual_information.value, abs=1e-5)
    assert surgery(truth.pair, truth.x, seen=True).population is None
    assert surgery(truth.pair, truth.x, population=None).population is None
    with_train = surgery(truth.pair, truth.x[:500], train=truth.x[500:]).population
    assert with_train is not None
    assert "train" in with_train.prior


def test_too_few_rows_are_told():
    found = surgery(channel(lambda x: torch.full_like(x, 0.4)), torch.randn(5, 2, dtype=DOUBLE))
    assert found.population is None
    assert any("at least 20 rows" in note for note in found.notes)


def test_full_prior_finds_more_than_kernels(monkeypatch):
    monkeypatch.setattr("pvae.analysis.population.kernels.FLOW_STEPS", 100)
    monkeypatch.setattr("pvae.analysis.population.kernels.CLUSTERS", (5, 10))
    truth = mixture(0.3225, 0.0943)
    train, rows = truth.rows(1000, 1), truth.rows(300, 2)
    found, plain = (interval(rows, prior, train=train) for prior in (FullPrior(), KernelPrior()))
    assert isinstance(found, Population)
    assert isinstance(plain, Population)
    assert plain.gain.value < found.gain.value < truth.gain + 2 * found.gain.standard_error
    assert "a mixture of 10 normals" in found.prior


def test_flow_is_a_density(monkeypatch):
    monkeypatch.setattr("pvae.analysis.population.kernels.FLOW_STEPS", 200)
    value = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=DOUBLE).exp()
    flow = fitted_flow(value, value[:50], 0)
    grid = torch.linspace(-10, 20, 301, dtype=DOUBLE)
    points = torch.cartesian_prod(grid, grid)
    assert float(flow(points).exp().sum()) * 0.1**2 == pytest.approx(1, abs=0.05)
    assert float(flow(value).mean()) > float(FittedNormal(value).log_prob(value).mean()) + 0.1


def test_rows_that_the_model_makes():
    """The model's own rows: under the exact posterior q_pi is p, and the information that of 4 n rows."""
    truth = gaussian_channel(2, math.exp(-1.5), 300)
    found = surgery(truth.pair, truth.x, population="model").population
    assert found is not None
    assert found.n == 1200
    assert any("model makes" in note for note in found.remarks)


def test_values_that_are_not_finite_are_told(rows):
    value = rows.value.clone()
    value[3, 0] = math.inf
    found = interval(replace(rows, value=value), KernelPrior())
    assert isinstance(found, str)
    assert "not finite" in found


def test_time_is_bounded_by_fewer_rows(rows, monkeypatch):
    monkeypatch.setattr("pvae.analysis.population.interval.WORK", 4 * 30**2)
    found = interval(rows, KernelPrior())
    assert isinstance(found, Population)
    assert found.n == 30


def test_posteriors_of_no_family_have_kernels_on_their_samples(rows):
    """As a flow or a hierarchy has: r of the samples alone, the upper end from what the guide could score."""
    inside = sweep(rows.q, rows.value, rows.own)[0].inside
    found = interval(replace(rows, q=None, information=inside[:40]), KernelPrior())
    assert isinstance(found, Population)
    assert found.seen is None
    assert found.gain.value < 0.3 + 2 * found.gain.standard_error
    assert found.gain_upper.value == pytest.approx(float(rows.kl.mean() - inside[:40].mean()))
    assert interval(replace(rows, q=None), KernelPrior()).gain_upper is None


def test_population_on_the_command_line(monkeypatch, tmp_path):
    monkeypatch.setattr("pvae.analysis.population.kernels.FLOW_STEPS", 20)
    monkeypatch.setattr("pvae.analysis.population.kernels.CLUSTERS", (2,))
    fitted = pvae.fit("vae", *TINY, "train.epochs=1", run_dir=tmp_path, progress=False)
    run = str(fitted.path)
    found = run_cli_json("surgery", run, "--rows", "60", "--population")["population"]
    assert "a mixture made of train rows" in found["prior"]
    assert "kernels on the other rows" in run_cli_json("surgery", run, "--rows", "60")["population"]["prior"]
    fitted_on = run_cli_json("surgery", run, "--rows", "60", "--split", "train", "--population")
    assert fitted_on["population"] is None
    assert fitted_on["seen"] is True
