"""Evidence against exact truths (probabilistic PCA, channels), its stream against one sum, k-hat against ArviZ."""

# Pyro programs have no types.
# mypy: disable-error-code="arg-type, misc, operator"

import io
import json
import math
from functools import partial

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from rich.console import Console
from torch import Tensor

from pvae.analysis.bounds.accumulate import accumulated, block_size, group_sizes
from pvae.analysis.bounds.evidence import evidence, prior_evidence
from pvae.analysis.bounds.weights import (
    PriorEvidence,
    inverse_ess,
    khat_limit,
    log_mean,
    pareto_k,
    squared_error,
    tail_length,
)
from pvae.errors import DataError
from pvae.pair.pair import Pair

EPS = torch.finfo(torch.float64).eps


# ---------------------------------------------------------------------- probabilistic PCA: x = W z + mu + eps in R^4

W = torch.tensor([[0.9, 0.4], [-0.4, 0.9], [0.3, 0.1], [0.1, -0.3]]).double()  # of orthogonal columns
MU = torch.tensor([0.5, -1.0, 0.0, 2.0]).double()
NOISE = 0.8
VARIANCE = 1 / (1 + W.square().sum(0) / NOISE**2)


def rows(n: int) -> Tensor:
    """Draws of the model."""
    z, noise = (torch.tensor(np.random.default_rng(0).standard_normal((n, d))) for d in (2, 4))
    return MU + z @ W.T + NOISE * noise


def log_p(x: Tensor) -> Tensor:
    """Exactly, of every row."""
    covariance = W @ W.T + NOISE**2 * torch.eye(4).double()
    return torch.tensor(scipy.stats.multivariate_normal(MU.numpy(), covariance.numpy()).logpdf(x.numpy()))


def posterior(x: Tensor, stretch: float = 1.0) -> dist.TorchDistribution:
    """p(z | x), its variances times `stretch`."""
    return dist.Normal((x - MU) @ W * VARIANCE / NOISE**2, (stretch * VARIANCE).sqrt()).to_event(1)


def ppca(stretch: float = 1.0, *, reshapes: bool = False) -> Pair:
    """The model with its true posterior, stretched; one that reshapes takes no particles."""

    def model(x):
        mu = pyro.param("mu", MU.clone())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = (z.reshape(len(x), 2) if reshapes else z) @ W.T
            pyro.sample("x", dist.Normal(mu + loc, NOISE).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(x, stretch))

    return Pair(model=model, guide=guide)


BOTH = pytest.mark.parametrize("bound", [evidence, prior_evidence])


@pytest.mark.parametrize("reshapes", [False, True])
@pytest.mark.parametrize("samples", [2, 7, 60, 1000])
def test_true_posterior_has_equal_weights(samples, reshapes):
    x = rows(20)
    found = evidence(ppca(reshapes=reshapes), x, samples=samples)
    for k, bound in found.curve:
        assert bound.value == pytest.approx(log_p(x).mean().item(), abs=1e-12), k
        assert bound.standard_error < 1e-7  # the root of the rounding error of 1 / ess
        assert bound.kind == "lower_bound"
    torch.testing.assert_close(found.log_p, log_p(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.ess, torch.full_like(found.ess, samples), rtol=1e-9, atol=0)
    # Weights equal to rounding have no tail: no k-hat, and nothing to worry about.
    assert found.khat.isnan().all()
    assert found.khat_share == 0 if samples > 20 else math.isnan(found.khat_share)


@pytest.mark.parametrize("reshapes", [False, True])
def test_stretched_posterior(reshapes):
    # KL(q || p) in closed form; 4 standard errors each, three figures: one new seed in 5000 fails.
    x, pair = rows(50), ppca(1.5, reshapes=reshapes)
    assert (pair.way_of_particles(x) == "plate") is not reshapes
    found = evidence(pair, x, samples=1000)
    kl = 0.5 * 2 * (1.5 - 1 - math.log(1.5))
    assert abs(found.elbo.value - (log_p(x).mean().item() - kl)) < 4 * found.elbo.standard_error
    assert abs(found.iwae.value - log_p(x).mean().item()) < 4 * found.iwae.standard_error + bias(found.ess)
    assert abs(found.gap - kl) < 4 * math.hypot(found.elbo.standard_error, found.iwae.standard_error)
    assert found.khat_share == 0  # wider than the posterior: the weights have an upper bound


def bias(ess: Tensor) -> float:
    """The log of a mean of weights lies below, by half their squared variation over their number."""
    return float((0.5 / ess).mean())


@pytest.mark.parametrize("reshapes", [False, True])
def test_prior_evidence_and_jensen(reshapes):
    # 4 standard errors each, three figures: one new seed in 5000 fails.
    x = rows(60)
    found = prior_evidence(ppca(reshapes=reshapes), x, samples=2000)
    jensen = dist.Normal(MU, NOISE).log_prob(x).sum(1) - W.square().sum() / (2 * NOISE**2)
    prior = dist.Normal(torch.zeros(60, 2).double(), 1.0).to_event(1)
    kl = torch.distributions.kl_divergence(prior, posterior(x))
    torch.testing.assert_close(log_p(x) - jensen, kl, rtol=0, atol=1e-12)  # the truths agree
    assert abs(found.jensen.value - jensen.mean().item()) < 4 * found.jensen.standard_error
    assert abs(found.evidence.value - log_p(x).mean().item()) < 4 * found.evidence.standard_error + bias(found.ess)
    error = math.hypot(found.jensen.standard_error, found.evidence.standard_error)
    assert abs(found.gap - kl.mean().item()) < 4 * error + bias(found.ess)
    assert found.evidence.standard_error < 0.02
    assert found.jensen.kind == found.evidence.kind == "lower_bound"
    assert found.ess.shape == found.khat.shape == found.log_p.shape == (60,)


# ---------------------------------------------------------------------- the curve


@pytest.mark.parametrize("samples", [1, 2, 3, 8, 20, 97, 360, 4096, 5000, 9999, 10**6])
def test_group_sizes(samples):
    sizes = group_sizes(samples)
    assert (sizes[0], sizes[-1]) == (1, samples)
    assert all(b % a == 0 and b > a for a, b in zip(sizes, sizes[1:], strict=False))
    assert len(sizes) <= 11


def test_group_sizes_by_hand():
    assert group_sizes(5000) == (1, 5, 10, 50, 100, 500, 1000, 5000)
    assert group_sizes(97) == (1, 97)
    assert group_sizes(60) == (1, 5, 10, 30, 60)


@BOTH
@pytest.mark.parametrize("samples", [2, 30, 97, 500])
def test_curve_never_falls(bound, samples):
    # Surely, not on average: groups nest and the logarithm is concave. Rounding alone is allowed for.
    found = bound(ppca(3.0), rows(11), samples=samples)
    values = [e.value for _, e in found.curve]
    assert all(b >= a - 1e-12 for a, b in zip(values, values[1:], strict=False))
    assert [k for k, _ in found.curve] == list(group_sizes(samples))
    assert values[-1] == pytest.approx(found.log_p.mean().item(), abs=1e-12)
    assert found.gap == values[-1] - values[0]


# ---------------------------------------------------------------------- sums of weights


@pytest.mark.parametrize("samples", [2, 30, 97, 500, 1024])
def test_sums_of_weights_are_those_of_the_groups(samples):
    weights = 2 * torch.randn(samples, 6).double() - 500
    found = accumulated(weights, EPS)
    for i, k in enumerate(group_sizes(samples)):
        groups = weights.reshape(-1, k, 6).logsumexp(1) - math.log(k)
        torch.testing.assert_close(found.bounds[i], groups.mean(0), rtol=0, atol=1e-11)
        if k < samples:
            torch.testing.assert_close(found.squared_errors[i], groups.var(0) / len(groups), rtol=1e-9, atol=0)
    share = weights.softmax(0).square().sum(0)
    torch.testing.assert_close(found.ess, 1 / share, rtol=1e-9, atol=0)
    falls = torch.log1p(-weights.softmax(0))  # without one sample after another; small shares fall by themselves
    jackknife = (samples - 1) * falls.var(0, unbiased=False)
    torch.testing.assert_close(found.squared_errors[-1], jackknife, rtol=0.05, atol=1e-12)
    torch.testing.assert_close(found.khat, pareto_k(weights, samples), rtol=1e-9, atol=0, equal_nan=True)


def test_memory_does_not_grow_with_samples():
    sizes = []

    def model(x):
        gain = pyro.param("gain", torch.tensor(1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            sizes.append(z.numel())
            pyro.sample("x", dist.Normal((gain * z)[..., None], 1.0).expand([*z.shape, 900]).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), 0.1))

    x = torch.zeros(3, 900)
    evidence(Pair(model=model, guide=guide), x, samples=4000)
    assert max(sizes) <= block_size(x) < 4000
    assert sum(sizes) < 3 * 4000 + 40  # and the particle check


def test_impossible_data_and_impossible_draws():
    weights = torch.randn(200, 4).double()
    weights[:, 0] = -math.inf
    weights[::2, 1] = -math.inf
    weights[1:, 2] = -math.inf
    found = accumulated(weights, EPS)
    assert not found.bounds.isnan().any()
    assert not found.squared_errors.isnan().any()
    assert found.log_p[0] == -math.inf
    torch.testing.assert_close(found.log_p[1:], weights[:, 1:].logsumexp(0) - math.log(200))
    assert found.ess[0] == 0
    assert found.ess[2].item() == pytest.approx(1)
    assert found.khat[0].isnan()
    assert found.khat[2] == math.inf  # a single weight holds all


def boxes(spread: float) -> Pair:
    """x uniform on z +- 1: most z make x impossible."""

    def model(x):
        shift = pyro.param("shift", torch.tensor(0.0).double())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0 * shift, 1.0))
            pyro.sample("x", dist.Uniform(z - 1, z + 1, validate_args=False), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, spread))

    return Pair(model=model, guide=guide)


@BOTH
def test_evidence_where_draws_are_impossible(bound):
    # 4 standard errors: one new seed in 15 000 each.
    x = torch.linspace(-2, 2, 21).double()
    found = bound(boxes(1.0), x, samples=4000)
    truth = np.log((scipy.stats.norm.cdf(x + 1) - scipy.stats.norm.cdf(x - 1)) / 2).mean()
    assert abs(found.curve[-1][1].value - truth) < 4 * found.curve[-1][1].standard_error + bias(found.ess)
    assert found.curve[0][1].value == -math.inf
    json.dumps(found.to_dict(), allow_nan=False)


def test_data_that_no_draw_explains():
    x = torch.tensor([0.0, 100.0]).double()
    found = prior_evidence(boxes(1.0), x, samples=50)
    assert found.log_p[0].isfinite()
    assert found.log_p[1] == -math.inf
    assert found.evidence.value == -math.inf
    assert found.ess[1] == 0
    assert found.to_dict()["figures"]["prior_50"]["value"] is None
    json.dumps(found.to_dict(), allow_nan=False)
    str(found)


# ---------------------------------------------------------------------- k-hat

LOG_WEIGHTS = {
    "normal": lambda r, size: r.standard_normal(size),
    "lognormal of a heavy tail": lambda r, size: 30 * r.standard_normal(size),
    "Pareto, k = 2": lambda r, size: 2 * r.exponential(size=size),
    "Pareto, k = 0.3": lambda r, size: 0.3 * r.exponential(size=size) - 700,
    "Cauchy": lambda r, size: r.standard_cauchy(size),
    "bounded": lambda r, size: -r.exponential(size=size),
    "uniform": lambda r, size: np.log(r.uniform(size=size)),
    "nearly constant": lambda r, size: 1e-3 * r.standard_normal(size),
    "far below": lambda r, size: r.standard_normal(size) - 1e4,
    "with ties": lambda r, size: r.standard_normal(size).round(1),
    "half of them zero": lambda r, size: np.where(r.uniform(size=size) < 0.5, -np.inf, r.standard_normal(size)),
    "one holds all": lambda r, size: 1e3 * r.standard_normal(size),
}


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("samples", [21, 25, 26, 100, 1000, 5000])
@pytest.mark.parametrize("kind", LOG_WEIGHTS)
def test_khat_is_that_of_arviz(kind, samples):
    weights = LOG_WEIGHTS[kind](np.random.default_rng(7), (15, samples))
    _, want = arviz.psislw(weights)
    found = pareto_k(torch.tensor(weights.T), samples)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-8, atol=1e-8)
    largest = torch.tensor(np.sort(weights, 1)[:, -tail_length(samples) - 1 :].T)
    torch.testing.assert_close(pareto_k(largest, samples), found, rtol=1e-12, atol=1e-12)


def test_khat_where_there_is_no_tail():
    # ArviZ calls all of these infinite.
    assert pareto_k(torch.randn(20, 3), 20).isnan().all()
    assert not pareto_k(torch.randn(21, 3), 21).isnan().any()
    assert pareto_k(torch.full((100, 3), -7.0), 100).isnan().all()
    assert pareto_k(torch.full((100, 3), -math.inf), 100).isnan().all()
    noise = 1e-9 * torch.randn(100, 3).double()
    assert pareto_k(noise, 100).isfinite().all()
    assert pareto_k(noise, 100, resolution=1e-8).isnan().all()
    assert pareto_k(noise, 100, resolution=torch.tensor([1e-8, 0.0, 0.0])).isnan().tolist() == [True, False, False]


def test_khat_limit():
    assert khat_limit(10**6) == khat_limit(5000) == 0.7
    assert khat_limit(100) == 0.5
    assert khat_limit(1) < khat_limit(10) == 0


def test_khat_finds_a_guide_that_is_too_narrow():
    x = rows(40)
    narrow, wide = evidence(ppca(0.1), x, samples=1000), evidence(ppca(2.0), x, samples=1000)
    # Weights of a variance ratio r have the shape 1 - r: 0.9 and below 0.
    assert narrow.khat_share > 0.5
    assert wide.khat_share == 0
    assert narrow.to_dict()["khat_max"] > 0.7 > 0.5 > wide.to_dict()["khat_max"]
    assert f"not reliable: k-hat exceeds its limit 0.67 on {100 * narrow.khat_share:.3g} % of data" in str(narrow)
    assert "reliable: k-hat exceeds its limit 0.67 on no data point" in str(wide)
    few = evidence(ppca(0.001), x, samples=30)
    assert "k-hat exceeds its limit 0.32 on" in str(few)
    assert "there the samples are too few" in str(few)


# ---------------------------------------------------------------------- global latents

POINT = {
    "point": lambda b: dist.Delta(b),
    "expanded": lambda b: dist.Delta(b).expand(torch.Size(())),
    "masked": lambda b: dist.Delta(b).mask(True),
    "event": lambda b: dist.Delta(b).expand(torch.Size((1,))).to_event(1),
}


def shifted(law) -> Pair:
    """x = z + b + eps with one global b; q(z | x) is the posterior given b = 0.4."""

    def model(x):
        b = pyro.sample("b", dist.Normal(torch.zeros(law(torch.tensor(0.4)).event_shape), 1.0).to_event())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + b.reshape(-1)[0], 1.0), obs=x)

    def guide(x):
        b = pyro.param("b_loc", torch.tensor(0.4).double())
        pyro.sample("b", law(b))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - b) / 2, 0.5**0.5))

    return Pair(model=model, guide=guide)


@pytest.mark.parametrize("law", POINT.values(), ids=list(POINT))
def test_global_points_are_given(law):
    x = torch.linspace(-2, 3, 30).double()
    truth = dist.Normal(0.4, 2**0.5).log_prob(x)
    pair = shifted(law)
    found = evidence(pair, x, samples=25)
    torch.testing.assert_close(found.log_p, truth, rtol=0, atol=1e-7)
    assert found.elbo.value == pytest.approx(truth.mean().item(), abs=1e-7)
    # 4 standard errors: one new seed in 15 000.
    prior = prior_evidence(pair, x, samples=2000)
    assert abs(prior.evidence.value - truth.mean().item()) < 4 * prior.evidence.standard_error + bias(prior.ess)


def test_global_latents_with_a_spread_make_one_bound_of_all_rows():
    pair, x = shifted(lambda b: dist.Normal(b, 0.1)), torch.zeros(5).double()
    with pytest.raises(DataError, match=r"got global b\. Sample them from Delta"):
        prior_evidence(pair, x, samples=2)
    found = evidence(pair, x, samples=200)
    assert found.joint
    assert found.log_p.shape == (1,)
    assert found.iwae.value == pytest.approx(float(found.log_p[0]) / 5)
    assert found.elbo.value < found.iwae.value


# ---------------------------------------------------------------------- manners


@BOTH
def test_bad_input(bound):
    pair = ppca()
    with pytest.raises(DataError, match=r"evidence: expected samples of at least 1; got 0"):
        bound(pair, rows(3), samples=0)
    bound(pair, rows(3), samples=1)
    with pytest.raises(DataError, match=r"expected at least one row, of shape \(4\)"):
        bound(pair, torch.zeros(3, 5), samples=2)


def test_khat_needs_its_tail():
    with pytest.raises(DataError, match=r"expected the 214 largest of 5000 log weights; got 213"):
        pareto_k(torch.zeros(213, 2), 5000)


@BOTH
def test_same_seed_same_numbers_and_nothing_moves(bound):
    pair, x = ppca(2.0).adopt(rows(7)).train(), rows(7)
    state = torch.get_rng_state()
    first = bound(pair, x, samples=30, seed=3).to_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert pair.training
    torch.rand(5)
    assert bound(pair, x, samples=30, seed=3).to_dict() == first
    assert bound(pair, x, samples=30, seed=4).to_dict() != first


@BOTH
@pytest.mark.parametrize("samples", [1, 5, 5000])
def test_progress_ends_with_all_rows(bound, samples):
    seen: list[tuple[int, int]] = []
    bound(ppca(2.0), rows(25), samples=samples, on_progress=lambda *done: seen.append(done))
    assert seen[-1] == (25, 25)
    assert seen == sorted(seen)


@BOTH
@pytest.mark.parametrize("samples", [1, 30, 97])
def test_every_rendering_tells_the_curve(bound, samples):
    found = bound(ppca(2.0), rows(7), samples=samples)
    one, many = type(found).names
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(found)
    texts = [console.export_text(), str(found), repr(found), found._repr_html_(), json.dumps(found.to_dict())]
    for text in texts:
        assert one in text
        assert f"{many}_{samples}" in text
        assert all(f"{many}_{k}" in text for k, _ in found.curve[1:])
    assert "KL(p(z) || p(z|x))" in texts[0] or "KL(q(z|x) || p(z|x))" in texts[0]
    assert ("conservative" in texts[0]) == (samples == 1)
    assert ("too few samples for k-hat" in texts[1]) == (samples == 1)
    told = found.to_dict()
    assert [row["samples"] for row in told["curve"]] == list(group_sizes(samples))
    assert told["curve"][-1]["value"] == told["figures"][f"{many}_{samples}"]["value"]
    assert (told["khat_share"] is None) == (samples == 1)


def test_one_row_and_one_sample_have_no_error():
    found = partial(evidence, ppca(2.0), rows(1))
    assert math.isnan(found(samples=1).elbo.standard_error)
    json.dumps(found(samples=1).to_dict(), allow_nan=False)
    assert found(samples=10).elbo.standard_error > 0
    assert isinstance(prior_evidence(ppca(), rows(1), samples=1), PriorEvidence)


# ---------------------------------------------------------------------- codes


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=str)
def test_log_p_of_codes_is_the_sum_over_every_state(shape):
    # Against NumPy over the joint states; the bound lies below it by at most its error and bias.
    rng, positions = np.random.default_rng(0), math.prod(shape)
    weights = torch.tensor(rng.normal(size=(positions, 4)))
    means = torch.tensor(rng.normal(size=(positions, 4)))

    def model(x):
        gain = pyro.param("gain", torch.tensor(1.0, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=weights.reshape(*shape, 4)).to_event(len(shape)))
            index = c.reshape(*c.shape[: c.dim() - len(shape)], positions)
            loc = means.expand(*index.shape, 4).gather(-1, index[..., None]).sum((-1, -2))
            pyro.sample("x", dist.Normal(gain * loc, torch.tensor(0.8, dtype=torch.float64)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            logits = (weights + 0.3 * x[:, None, None]).reshape(len(x), *shape, 4)
            pyro.sample("c", dist.Categorical(logits=logits).to_event(len(shape)))

    x = torch.tensor(rng.normal(size=7))
    found = evidence(Pair(model=model, guide=guide), x, samples=2000)
    states = np.stack(np.meshgrid(*[np.arange(4)] * positions, indexing="ij"), -1).reshape(-1, positions)
    log_p = weights.log_softmax(-1).numpy()
    prior = sum(log_p[p, states[:, p]] for p in range(positions))
    centre = sum(means.numpy()[p, states[:, p]] for p in range(positions))
    want = scipy.special.logsumexp(prior + scipy.stats.norm(centre, 0.8).logpdf(x.numpy()[:, None]), axis=1)
    assert found.exact is not None
    assert found.exact.kind == "exact"
    assert found.exact.value == pytest.approx(want.mean(), abs=1e-10)
    assert abs(found.iwae.value - want.mean()) < 4 * found.iwae.standard_error + 2e-3
    assert found.to_dict()["figures"]["log_p"]["value"] == found.exact.value


def test_other_latents_have_no_sum():
    assert evidence(ppca(), rows(3), samples=2).exact is None


# ---------------------------------------------------------------------- errors under heavy weights


def narrow(narrower: float, d: int, samples: int, sets: int) -> np.ndarray:
    """Bound less log p = 0, and its error, for sets of 50 data: the proposal N(0, narrower^2) of the target N(0, 1)."""
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(sets):
        z = narrower * torch.randn(samples, 50, d, generator=generator, dtype=torch.float64)
        weights = ((z / narrower) ** 2 - z**2).sum(-1) / 2 + d * math.log(narrower)
        bound = accumulated(weights, 1e-16).curve()[-1][1]
        found.append((bound.value, bound.standard_error))
    return np.array(found).T


@pytest.mark.fast("1.3-20-16", "0.5-1-16", "0.8-20-4", "0.8-1-200")
@pytest.mark.parametrize("samples", [4, 16, 200])
@pytest.mark.parametrize("d", [1, 20])
@pytest.mark.parametrize("narrower", [0.5, 0.8, 1.3])
def test_the_error_holds_where_few_samples_have_the_weight(narrower, d, samples):
    # k-hat is above .7 for .5. A deviation of 200 numbers of heavy tails has an error of 10 %.
    values, errors = narrow(narrower, d, samples, 200)
    assert values.mean() < 3 * values.std() / 200**0.5
    assert 0.9 * 0.8 < np.std((values - values.mean()) / errors, ddof=1) < 1.25 * 1.1


def test_the_error_of_a_log_mean_is_that_of_leaving_out_each_sample():
    weights = 4 * torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    left_out = torch.stack([torch.cat([weights[:k], weights[k + 1 :]]).logsumexp(0) for k in range(40)])
    want = 39 * left_out.var(0, unbiased=False)
    inverse, mean = inverse_ess(weights), log_mean(weights)
    got = squared_error(weights.sort(0, True).values, mean, inverse, 40)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
    few = squared_error(weights.topk(10, 0).values, mean, inverse, 40)
    torch.testing.assert_close(few, want, rtol=0.02, atol=1e-6)
    equal = torch.zeros(40, 2, dtype=torch.float64)
    assert float(squared_error(equal[:5], equal[0], inverse_ess(equal), 40).max()) < 1e-15
