"""Likelihoods: every kind x shapes, densities against SciPy, own samples, supports, gradients, floors."""

# Attributes of Modules and Pyro programs have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, union-attr"

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch

from pvae.component import Shape
from pvae.distributions.base import DiscretizedLogistic, FactoredNormal, lattice
from pvae.models.likelihoods.base import Likelihood, LikelihoodModule
from pvae.models.likelihoods.continuous import Beta, ContinuousBernoulli, LogNormal, StudentT
from pvae.models.likelihoods.counts import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from pvae.models.likelihoods.standard import (
    Bernoulli,
    Categorical,
    DiscretizedLogisticLikelihood,
    MixtureOfLogistics,
    MultivariateNormal,
    Normal,
)

Array = np.ndarray
Score = Callable[[Array, Array], Array]
"""log p of every element from the decoder's output, split into `(channels, ..., *x)`, and x; float64."""


def logistic_cdf_difference(loc: Array, log_scale: Array, x: Array, levels: int) -> Array:
    """log of F(k + 1/2) - F(k - 1/2) with open ends, through whichever tail is the smaller."""
    half = 0.5 / (levels - 1)
    upper = np.where(x > 1 - half, np.inf, (x - loc + half) / np.exp(log_scale))
    lower = np.where(x < half, -np.inf, (x - loc - half) / np.exp(log_scale))
    left = scipy.special.expit(upper) - scipy.special.expit(lower)
    right = scipy.special.expit(-lower) - scipy.special.expit(-upper)
    return np.log(np.where(lower > 0, right, left))


def categorical_score(h: Array, x: Array) -> Array:
    logits = np.moveaxis(h, 0, -1)
    picked = np.take_along_axis(np.broadcast_to(logits, (*x.shape, logits.shape[-1])), x[..., None].astype(int), -1)
    return picked[..., 0] - scipy.special.logsumexp(logits, axis=-1)


def mixture_score(h: Array, x: Array) -> Array:
    """Log density under three components, whose centres start at 1/6, 3/6 and 5/6."""
    weights, loc, log_scale = np.split(h, 3)
    parts = [logistic_cdf_difference(loc[k] + (k + 0.5) / 3, np.maximum(log_scale[k] - 2, -7), x, 17) for k in range(3)]
    return scipy.special.logsumexp(np.stack(parts) + scipy.special.log_softmax(weights, 0)[:, None], 0)


def zero_inflated_score(h: Array, x: Array) -> Array:
    plain = scipy.stats.nbinom.logpmf(x, np.exp(h[1]), 1 / (1 + np.exp(h[0] - h[1])))
    gate = scipy.special.expit(h[2])
    return np.log(gate * (x == 0) + (1 - gate) * np.exp(plain))


def beta_shapes(h: Array) -> tuple[Array, Array]:
    c = 2 * np.exp(h[1])
    return c * scipy.special.expit(h[0]), c * scipy.special.expit(-h[0])


def continuous(h: Array) -> torch.distributions.ContinuousBernoulli:
    return torch.distributions.ContinuousBernoulli(logits=torch.as_tensor(h[0]))


@dataclass(frozen=True)
class Row:
    """A member, its density written a second time, and data it must refuse."""

    likelihood: Likelihood
    score: Score | None
    """None where elements are not independent."""
    bad: float
    levels: tuple[float, ...] | None = None
    """Every value of an element; None for real numbers."""
    cdf: Score | None = None
    """Distribution function of a density that is not smooth on the whole line."""


ROWS = {
    "bernoulli": Row(
        Bernoulli(), lambda h, x: scipy.stats.bernoulli.logpmf(x, scipy.special.expit(h[0])), 0.5, (0.0, 1.0)
    ),
    "normal, shared": Row(Normal(), lambda h, x: scipy.stats.norm.logpdf(x, h[0], 0.3), np.nan),
    "normal, fixed": Row(Normal(scale="fixed", value=0.7), lambda h, x: scipy.stats.norm.logpdf(x, h[0], 0.7), np.nan),
    "normal, fixed below the floor": Row(  # of learned scales
        Normal(scale="fixed", value=0.05, floor=0.1), lambda h, x: scipy.stats.norm.logpdf(x, h[0], 0.05), np.nan
    ),
    "normal, per_datum": Row(
        Normal(scale="per_datum", value=0.5),
        lambda h, x: scipy.stats.norm.logpdf(x, h[0], 0.5 * np.exp(h[1])),
        np.nan,
    ),
    "multivariate_normal": Row(MultivariateNormal(), None, np.nan),
    "multivariate_normal, tied": Row(MultivariateNormal(covariance="tied"), None, np.nan),
    "categorical": Row(Categorical(levels=4), categorical_score, 4.0, (0.0, 1.0, 2.0, 3.0)),
    "discretized_logistic": Row(
        DiscretizedLogisticLikelihood(levels=17),
        lambda h, x: logistic_cdf_difference(h[0] + 0.5, np.maximum(h[1] - 2, -7), x, 17),
        0.03,
        tuple(k / 16 for k in range(17)),
    ),
    "discretized_logistic, 256 levels": Row(
        DiscretizedLogisticLikelihood(),
        lambda h, x: logistic_cdf_difference(h[0] + 0.5, np.maximum(h[1] - 2, -7), x, 256),
        0.5,
        tuple(k / 255 for k in range(256)),
    ),
    "poisson": Row(
        Poisson(), lambda h, x: scipy.stats.poisson.logpmf(x, np.exp(h[0])), 1.5, tuple(float(k) for k in range(200))
    ),
    "negative_binomial": Row(
        NegativeBinomial(), lambda h, x: scipy.stats.nbinom.logpmf(x, np.e, np.e / (np.e + np.exp(h[0]))), 1.5,
        tuple(float(k) for k in range(1000)),
    ),
    "negative_binomial, decoder": Row(
        NegativeBinomial(dispersion="decoder"),
        lambda h, x: scipy.stats.nbinom.logpmf(x, np.exp(h[1]), 1 / (1 + np.exp(h[0] - h[1]))), 1.5,
        tuple(float(k) for k in range(2000)),
    ),
    "negative_binomial, shared": Row(
        NegativeBinomial(dispersion="shared"),
        lambda h, x: scipy.stats.nbinom.logpmf(x, np.e, np.e / (np.e + np.exp(h[0]))), -1.0,
        tuple(float(k) for k in range(1000)),
    ),
    "zero_inflated_negative_binomial": Row(
        ZeroInflatedNegativeBinomial(dispersion="decoder"), zero_inflated_score, 1.5,
        tuple(float(k) for k in range(2000)),
    ),
    "student_t": Row(
        StudentT(), lambda h, x: scipy.stats.t.logpdf(x, 1 + np.exp(2), h[0]), np.nan
    ),
    "log_normal": Row(
        LogNormal(), lambda h, x: scipy.stats.lognorm.logpdf(x, 1.0, scale=np.exp(h[0])), 0.0,
        cdf=lambda h, x: scipy.stats.lognorm.cdf(x, 1.0, scale=np.exp(h[0])),
    ),
    "beta": Row(
        Beta(), lambda h, x: scipy.stats.beta.logpdf(x, *beta_shapes(h)), 1.0,
        cdf=lambda h, x: scipy.stats.beta.cdf(x, *beta_shapes(h)),
    ),
    "continuous_bernoulli": Row(
        ContinuousBernoulli(), lambda h, x: continuous(h).log_prob(torch.as_tensor(x)).numpy(), 1.5,
        cdf=lambda h, x: continuous(h).cdf(torch.as_tensor(x)).numpy(),
    ),
    "mixture_of_logistics": Row(
        MixtureOfLogistics(levels=17, components=3), mixture_score, 0.03, tuple(k / 16 for k in range(17))
    ),
}  # fmt: skip
SHAPES: list[Shape] = [(5,), (1,), (1, 4, 3), (2, 3, 4), (3, 6)]
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
every_independent_row = pytest.mark.parametrize(
    "row", [row for row in ROWS.values() if row.score], ids=[name for name, row in ROWS.items() if row.score]
)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def build(row: Row, shape: Shape) -> LikelihoodModule:
    return row.likelihood.build(shape).double()


def output(module: LikelihoodModule, *lead: int) -> torch.Tensor:
    """A decoder's output, `(*lead, *inputs)`."""
    return torch.randn(*lead, *module.inputs, dtype=torch.float64)


def channels(h: torch.Tensor, module: LikelihoodModule) -> Array:
    """The output as `(channels, *lead, *x)`: blocks of x[0] along the first event dimension."""
    first = h.dim() - len(module.x)
    return np.stack(np.split(h.detach().numpy(), module.channels, axis=first))


def test_table_is_complete():
    shipped = {kind for kind, member in Likelihood.members.items() if member.__module__.startswith("pvae.")}
    elsewhere = {"determined", "rounded"}  # no densities; their laws: tests/guides/test_flow_vae.py
    elsewhere |= {"columns"}  # of a declared table: tests/data/test_tables.py
    assert {row.likelihood.kind for row in ROWS.values()} == shipped - elsewhere


@every_shape
@every_row
@pytest.mark.parametrize("lead", [(), (6,), (3, 6)], ids=str)
def test_shapes(row, shape, lead):
    module = build(row, shape)
    if row.score is not None:
        assert module.inputs == (row.likelihood.channels * shape[0], *shape[1:])
    d = module(output(module, *lead))
    assert (d.batch_shape, d.event_shape) == (lead, shape)
    assert d.sample().shape == (*lead, *shape)
    assert d.log_prob(d.sample()).shape == lead
    assert d.expand(torch.Size((2, *lead))).sample().shape == (2, *lead, *shape)
    assert d.mean.shape == (*lead, *shape) or row.likelihood.kind == "categorical"  # levels have no mean


@every_shape
@every_independent_row
def test_density_is_scipys(row, shape):
    module = build(row, shape)
    h = output(module, 7)
    d = module(h)
    x = d.sample((3,))
    want = row.score(channels(h, module), x.numpy()).sum(tuple(range(2, 2 + len(shape))))
    np.testing.assert_allclose(d.log_prob(x).detach().numpy(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.fast(
    "negative_binomial, shared",
    "zero_inflated_negative_binomial",
    "discretized_logistic, 256 levels",
    "student_t",
    "poisson",
    "normal, shared",
    "normal, fixed",
    "normal, per_datum",
    "beta",
    "mixture_of_logistics",
    "continuous_bernoulli",
)
@every_independent_row
def test_samples_follow_the_density(row):
    # Eight elements per row of the table, each refused with probability 1e-5 when the law holds: 1e-3 over the
    # table for a new seed; the seed is fixed.
    module = build(row, (8,))
    h = output(module)
    d = module(h)
    draws = d.sample((20_000,)).numpy()
    if row.cdf is not None:
        assert min(scipy.stats.kstest(u, "uniform").pvalue for u in row.cdf(channels(h, module), draws).T) > 1e-5
        return
    test = against_levels if row.levels else against_density
    for i in range(8):
        assert test(row, d, draws[:, i], i) > 1e-5


def element_log_prob(d: torch.distributions.Distribution, values: Array, i: int) -> Array:
    """log p of `values` at element i, whatever the other elements are."""
    x = d.sample((len(values),))
    x[:, i] = torch.as_tensor(values)
    return d.base_dist.log_prob(x)[:, i].detach().numpy()


def against_levels(row: Row, d: torch.distributions.Distribution, draws: Array, i: int) -> float:
    """p value of a chi-square test; levels expected fewer than 5 times are pooled."""
    levels = np.array(row.levels)
    want = np.exp(element_log_prob(d, levels, i)) * len(draws)
    assert want.sum() == pytest.approx(len(draws), rel=1e-6)
    found = (np.abs(draws[:, None] - levels) < 1e-6).sum(0)
    assert found.sum() == len(draws)
    rare = want < 5
    if want[rare].sum() < 5:  # too few for a cell of their own: into the largest
        top = want.argmax()
        want[top] += want[rare].sum()
        found[top] += found[rare].sum()
        want, found = want[~rare], found[~rare]
    else:
        want, found = np.append(want[~rare], want[rare].sum()), np.append(found[~rare], found[rare].sum())
    if len(want) == 1:
        return 1.0
    return scipy.stats.chisquare(found, want * found.sum() / want.sum()).pvalue


def against_density(row: Row, d: torch.distributions.Distribution, draws: Array, i: int) -> float:
    """p value of a Kolmogorov-Smirnov test against the integral of the scored density."""
    grid = np.linspace(draws.min() - 8, draws.max() + 8, 40_001)
    density = np.exp(element_log_prob(d, grid, i))
    integral = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(grid))])
    assert integral[-1] == pytest.approx(1, abs=1e-6)
    return scipy.stats.kstest(np.interp(draws, grid, integral), "uniform").pvalue


@pytest.mark.parametrize("kind", ["beta", "continuous_bernoulli", "log_normal", "student_t"])
def test_densities_integrate_to_one(kind):
    module = build(ROWS[kind], (1,))
    d = module(torch.tensor([0.3] * module.channels).double())
    low, high = {"log_normal": (0, np.inf), "student_t": (-np.inf, np.inf)}.get(kind, (0, 1))
    total, _ = scipy.integrate.quad(lambda x: d.log_prob(torch.tensor([x]).double()).exp().item(), low, high)
    assert total == pytest.approx(1, abs=1e-6)


def test_single_precision_is_exact():
    """Near means of 1/2, where the constant cancels in float32, and at large concentrations."""
    h = torch.linspace(-0.01, 0.01, 64)
    x = torch.linspace(0.01, 0.99, 64)
    exact = continuous(h.double().numpy()[None]).log_prob(x.double())
    assert (ContinuousBernoulli().build((64,))(h).base_dist.log_prob(x) - exact).abs().max() < 1e-9
    d = Beta().build((64,))(torch.cat([h, torch.full((64,), 9.0)])).base_dist
    shapes = d.concentration1.double(), d.concentration0.double()
    np.testing.assert_allclose(d.log_prob(x), scipy.stats.beta.logpdf(x.double(), *shapes), atol=1e-6)


@every_shape
@every_row
def test_support_accepts_own_samples(row, shape):
    module = build(row, shape).float()
    d = module(output(module, 50).float())
    x = d.sample()
    assert row.likelihood.support.check(x).all()
    assert d.support.check(x).all()
    assert torch.isfinite(d.log_prob(x)).all()


@every_row
def test_support_refuses_a_bad_value(row):
    module = build(row, (3,))
    d = module(output(module))
    x = d.sample()
    x[1] = row.bad
    assert not row.likelihood.support.check(x).all()
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(x)


@every_shape
@every_row
def test_gradient_reaches_output_and_parameters(row, shape):
    module = build(row, shape)
    h = output(module, 9).requires_grad_()
    d = module(h)
    d.log_prob(d.sample()).sum().backward()
    assert (h.grad != 0).double().mean() > 0.9
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


@every_row
def test_state_round_trips(row):
    one, two = build(row, (4,)), build(row, (4,))
    with torch.no_grad():
        for p in one.parameters():
            p.add_(0.5)
    two.load_state_dict(one.state_dict())
    h = output(one, 5)
    x = one(h).sample()
    torch.testing.assert_close(two(h).log_prob(x), one(h).log_prob(x), rtol=0, atol=0)


# ---------------------------------------------------------------------- elements that depend on each other


def random_factor(*lead: int, size: int) -> torch.Tensor:
    """Cholesky factors of moderate condition, `(*lead, size, size)`."""
    below = (torch.randn(*lead, size, size, dtype=torch.float64) / size).tril(-1)
    return below + torch.diag_embed(0.5 + torch.rand(*lead, size, dtype=torch.float64))


@every_shape
@pytest.mark.parametrize("covariance", ["full", "tied"])
def test_multivariate_density_is_scipys(covariance, shape):
    d = int(np.prod(shape))
    module = MultivariateNormal(covariance=covariance, floor=0.01, value=0.5).build(shape).double()
    assert module.inputs == ((d * (d + 3) // 2,) if covariance == "full" else shape)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / d)
    h = output(module, 3) / d
    x = torch.randn(3, *shape, dtype=torch.float64)
    free = h[:, d:] if covariance == "full" else dict(module.named_parameters())["factor"].detach().expand(3, -1)
    for i in range(3):
        scale, unit = np.sqrt(0.25 * np.exp(2 * free[i, :d].numpy()) + 0.01), np.eye(d)
        unit[np.tril_indices(d, -1)] = free[i, d:].numpy()
        factor = scale[:, None] * unit
        want = scipy.stats.multivariate_normal.logpdf(x[i].flatten(), h[i].flatten()[:d], factor @ factor.T)
        assert module(h).log_prob(x)[i].item() == pytest.approx(want, abs=1e-9)
        np.testing.assert_allclose(module(h).variance[i].detach().flatten(), (factor**2).sum(1), atol=1e-12)


# Batch shapes of the mean, of the factor, and of what the distribution is expanded to.
BATCHES = [
    ((), (), ()),
    ((), (), (5,)),
    ((5,), (), (5,)),
    ((5,), (5,), (5,)),
    ((1,), (1,), (5,)),
    ((3, 1), (3, 1), (3, 5)),
    ((3, 1), (), (3, 5)),
    ((3, 5), (3, 5), (3, 5)),
    ((5,), (5,), (3, 5)),
    ((3, 1), (3, 1), (2, 3, 5)),
]


@pytest.mark.parametrize(("loc", "factor", "batch"), BATCHES, ids=str)
def test_factored_normal_is_torchs(loc, factor, batch):
    mean, tril = torch.randn(*loc, 6).double(), random_factor(*factor, size=6)
    mine = FactoredNormal(mean, tril, (2, 3)).expand(batch)
    theirs = torch.distributions.MultivariateNormal(mean, scale_tril=tril).expand(batch)
    assert (mine.batch_shape, mine.event_shape) == (theirs.batch_shape, (2, 3))
    for x in (torch.randn(2, 3).double(), torch.randn(4, *batch, 2, 3).double()):
        torch.testing.assert_close(mine.log_prob(x), theirs.log_prob(x.flatten(-2)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mine.mean.flatten(-2), theirs.mean)
    torch.testing.assert_close(mine.variance.flatten(-2), theirs.variance)
    torch.manual_seed(1)
    draws = mine.rsample((7,))
    torch.manual_seed(1)
    torch.testing.assert_close(draws.flatten(-2), theirs.rsample((7,)), rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------- floors


def test_conditional_variances_stop_at_their_floor():
    module = MultivariateNormal(floor=0.04).build((3,)).double()
    h = torch.cat([torch.zeros(3), torch.full((3,), -200.0), torch.zeros(3)]).double()
    want = -3 * (np.log(0.2) + 0.5 * np.log(2 * np.pi))
    assert module(h).log_prob(torch.zeros(3).double()).item() == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("scale", ["shared", "per_datum"])
def test_normal_scale_stops_at_its_floor(scale):
    module = Normal(scale=scale, floor=0.05).build((3,)).double()
    h = torch.full(module.inputs, -200.0, dtype=torch.float64)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(-200.0)
    d = module(h)
    # At its own centre a normal density is 1 / (scale sqrt(2 pi)).
    want = -3 * (np.log(0.05) + 0.5 * np.log(2 * np.pi))
    assert d.log_prob(d.mean).item() == pytest.approx(want, abs=1e-6)


def test_normal_scales_start_where_declared():
    for scale, learned in (("fixed", 0), ("shared", 1), ("per_datum", 0)):
        module = Normal(scale=scale, value=0.25).build((2,))
        assert sum(p.numel() for p in module.parameters()) == learned
        assert module(torch.zeros(module.inputs)).stddev.tolist() == pytest.approx([0.25, 0.25])


def test_logistic_scale_stops_at_its_floor():
    module = DiscretizedLogisticLikelihood(levels=256, floor=-4.0).build((3,)).double()
    h = torch.cat([torch.zeros(3), torch.full((3,), -1e3)]).double()
    value = torch.full((3,), 127 / 255, dtype=torch.float64)
    want = logistic_cdf_difference(np.full(3, 0.5), np.full(3, -4.0), value.numpy(), 256).sum()
    assert module(h).log_prob(value).item() == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("h", [-1e4, 1e4])
def test_poisson_rate_is_bounded(h):
    d = Poisson().build((2,))(torch.full((2,), h))
    assert torch.isfinite(d.log_prob(d.sample()))


# ---------------------------------------------------------------------- the discretised logistic by itself

LOCS = (-30.0, -1.0, 0.0, 0.1, 0.5, 0.77, 1.0, 2.0, 30.0)
LOG_SCALES = (-30.0, -12.0, -7.0, -4.0, -2.0, 0.0, 3.0, 10.0)


def grid(levels: int, dtype: torch.dtype) -> tuple[DiscretizedLogistic, torch.Tensor]:
    """Every loc x every log_scale against every level, `(levels, locs, log_scales)`."""
    loc = torch.tensor(LOCS, dtype=dtype)[:, None].expand(-1, len(LOG_SCALES))
    log_scale = torch.tensor(LOG_SCALES, dtype=dtype).expand(len(LOCS), -1)
    values = torch.arange(levels, dtype=dtype) / (levels - 1)
    return DiscretizedLogistic(loc, log_scale, levels), values[:, None, None].expand(-1, *loc.shape)


# At e^-30 a centre on a bin's edge differs from it by rounding alone; in single precision, where a bin holds all mass.
@pytest.mark.parametrize(("dtype", "least", "tolerance"), [(torch.float64, -20, 1e-6), (torch.float32, -4, 2e-5)])
@pytest.mark.parametrize("levels", [2, 3, 17, 256])
def test_logistic_sums_to_one(levels, dtype, least, tolerance):
    d, values = grid(levels, dtype)
    total = d.log_prob(values).exp().sum(0)[d.log_scale >= least]
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=tolerance)


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
def test_logistic_is_the_difference_of_distribution_functions(levels):
    d, values = grid(levels, torch.float64)
    with np.errstate(divide="ignore", over="ignore"):
        want = logistic_cdf_difference(d.loc.numpy(), d.log_scale.numpy(), values.numpy(), levels)
    trusted = want > -600  # beyond, exp underflows in the reference
    assert trusted.mean() > 0.4
    np.testing.assert_allclose(d.log_prob(values).numpy()[trusted], want[trusted], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_logistic_has_no_nan_in_single_precision(levels):
    d, values = grid(levels, torch.float32)
    loc, log_scale = d.loc.clone().requires_grad_(), d.log_scale.clone().requires_grad_()
    score = DiscretizedLogistic(loc, log_scale, levels).log_prob(values)
    assert torch.isfinite(score).all()
    assert (score <= 1e-6).all()
    gradients = torch.autograd.grad(score.sum(), (loc, log_scale))
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("levels", [2, 17, 256, 1024])
def test_lattice_knows_its_members_in_single_precision(levels):
    values = torch.arange(levels, dtype=torch.float32) / (levels - 1)
    half_way = (values[:-1] + values[1:]) / 2
    assert lattice(levels).check(values).all()
    assert not lattice(levels).check(half_way).any()
    assert not lattice(levels).check(torch.tensor([-1 / (levels - 1), 1 + 1 / (levels - 1), torch.nan])).any()
