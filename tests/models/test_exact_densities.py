"""Densities with gamma functions: 1e-3 nats up to counts of 2^24, in every engine and precision, against SciPy."""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn

import pvae
from pvae.distributions.exact import GAMMA_FAMILIES, has_gamma, log_density, log_rising
from pvae.experiment.experiment import Experiment
from pvae.graph.site import Law
from pvae.models.likelihoods import LikelihoodModule
from pvae.models.likelihoods.columns import ColumnsModule
from pvae.models.likelihoods.counts import LOWEST_LOG_RATE, NegativeBinomial, Poisson
from pvae.nn.precision import products_in
from pvae.objectives.base import Loss

EXACT = 1e-3
COUNTS = torch.tensor([0, 1, 2, 3, 7, 20, 100, 1e3, 31_623, 1e5, 1e6, 1e7, 2**24 - 1, 2**24])
LOG_MEANS = torch.linspace(math.log(1e-6), 24 * math.log(2), 30)
SIZES = (1e-6, 1e-3, 0.5, 1.0, 30.0, 1e3, 1e5, 1e8, 1e12, 1e20, 1e30)
TABLE = COUNTS[:, None].expand(-1, len(LOG_MEANS))  # every count by every mean


def poisson(rate: Tensor, x: Tensor) -> np.ndarray:
    return scipy.stats.poisson.logpmf(x.double().numpy(), rate.double().numpy())


def negative_binomial(*given: Tensor) -> np.ndarray:
    """Log density of x: r (r + 1) ... (r + x - 1) / x! as a Beta function up to r = 1e6, else by Stirling's formula."""
    r, logits, x = np.broadcast_arrays(*(t.detach().double().numpy() for t in given))
    with np.errstate(divide="ignore", invalid="ignore"):
        small = -np.log(x) - scipy.special.betaln(r, np.maximum(x, 1e-300))
        large = x * np.log(r) + (r + x - 0.5) * np.log1p(x / r) - x - scipy.special.gammaln(x + 1)
    rising = np.where(x == 0, 0.0, np.where(r < 1e6, small, large))
    return rising - r * np.logaddexp(0, logits) - x * np.logaddexp(0, -logits)


def off(found: Tensor, exact: np.ndarray) -> float:
    assert found.dtype == torch.float64
    return float(np.abs(found.detach().numpy() - exact).max())


# ---------------------------------------------------------------------- declared likelihoods


def test_poisson_counts_are_exact():
    """FAULTS 73. Elements, and the columns of a table, whose log densities are those of the held rates."""
    fn = Poisson().build((len(LOG_MEANS),))(LOG_MEANS.expand(len(COUNTS), -1))
    assert off(fn.base_dist.log_prob(TABLE), poisson(fn.base_dist.rate, TABLE)) < EXACT
    assert off(fn.log_prob(TABLE), poisson(fn.base_dist.rate, TABLE).sum(-1)) < EXACT
    law = Law(column="n", family="poisson")
    rows = ColumnsModule((len(LOG_MEANS),), [law] * len(LOG_MEANS), 1e-3)(LOG_MEANS.expand(len(COUNTS), -1))
    assert off(rows.log_prob(TABLE), poisson(rows.parts[0].rate, TABLE).sum(-1)) < EXACT


@pytest.mark.parametrize("log_count", [-7.0, -1.0, 1.0, 7.0])
def test_negative_binomial_counts_are_exact(log_count: float):
    """FAULTS 73."""
    module = NegativeBinomial().build((len(LOG_MEANS),))
    torch.nn.init.constant_(module.get_parameter("log_count"), log_count)
    fn = module(LOG_MEANS.expand(len(COUNTS), -1)).base_dist
    assert off(fn.log_prob(TABLE), negative_binomial(fn.total_count, fn.logits, TABLE)) < EXACT


def test_heavy_tails_are_exact_at_any_degrees_of_freedom():
    law = Law(column="y", family="student_t")
    module = ColumnsModule((6,), [law] * 6, 1e-3)
    module.get_parameter("families.student_t.log_df").data.copy_(torch.tensor([-20.0, 0.0, 2.0, 6.0, 10.0, 12.0]))
    y = torch.tensor([0.0, 0.1, 1.0, 30.0, 1e3])[:, None].expand(-1, 6)
    fn = module(torch.zeros(5, 6))
    assert off(fn.log_prob(y), scipy.stats.t.logpdf(y.double(), fn.parts[0].df.double().detach()).sum(-1)) < EXACT


# ---------------------------------------------------------------------- distributions of hand-written pairs

HALF = torch.tensor([1e5, 3e6, 2.0**23])
WIDE = HALF.double()
"""Large parameters of the families below."""
GAMMA: dict[str, tuple[dist.TorchDistribution, Tensor, Callable[[np.ndarray], np.ndarray]]] = {
    "gamma": (dist.Gamma(HALF, 2.0), HALF / 2 + 10, lambda v: scipy.stats.gamma.logpdf(v, WIDE, scale=0.5)),
    "beta": (
        dist.Beta(HALF, 2 * HALF), torch.full((3,), 1 / 3), lambda v: scipy.stats.beta.logpdf(v, WIDE, 2 * WIDE),
    ),
    "binomial": (
        dist.Binomial(2 * HALF, probs=torch.tensor(0.5)), HALF + 5,
        lambda v: scipy.stats.binom.logpmf(v, 2 * WIDE, 0.5),
    ),
    "beta-binomial": (
        dist.BetaBinomial(HALF, HALF, total_count=2 * HALF), HALF - 3,
        lambda v: scipy.stats.betabinom.logpmf(v, 2 * WIDE, WIDE, WIDE),
    ),
    "Student's t": (dist.StudentT(HALF, 0.0, 1.0), torch.ones(3), lambda v: scipy.stats.t.logpdf(v, WIDE)),
    "inverse gamma": (
        dist.InverseGamma(HALF, HALF), torch.ones(3), lambda v: scipy.stats.invgamma.logpdf(v, WIDE, 0, WIDE),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GAMMA)
def test_large_parameters_of_any_family_are_exact(case: str):
    """Wrapped by plates, events and masks too; in float32 all of these are off by .01 to 3 nats."""
    fn, value, exact = GAMMA[case]
    want = np.asarray(exact(value.double().numpy()))
    assert off(log_density(fn, value), want) < EXACT
    wrapped = fn.expand([4, 3]).mask(torch.tensor([True, False, True])).to_event(1)
    assert off(log_density(wrapped, value.expand(4, 3)), np.full(4, want[[0, 2]].sum())) < EXACT


def test_dispersion_goes_to_its_limit():
    """Hand-written, at any size; from 1e20 on, a Poisson of the same mean to 1e-3 nats at every count."""
    for size in SIZES:
        r = torch.tensor(size).expand(TABLE.shape)
        fn = dist.NegativeBinomial(r, logits=LOG_MEANS - math.log(size))
        assert off(log_density(fn, TABLE), negative_binomial(fn.total_count, fn.logits, TABLE)) < EXACT
        if size > 1e19:
            mean = fn.total_count.double() * fn.logits.double().exp()
            assert off(log_density(fn, TABLE), scipy.stats.poisson.logpmf(TABLE.double(), mean)) < EXACT


def test_every_family_with_gamma_functions_is_named():
    """Read off the sources of torch and Pyro."""
    found = set()
    for module in (torch.distributions, dist):
        for cls in vars(module).values():
            if isinstance(cls, type) and issubclass(cls, torch.distributions.Distribution):
                own = [cls.__dict__.get(name) for name in ("log_prob", "_log_normalizer")]
                text = "".join(inspect.getsource(f) for f in own if inspect.isfunction(f))
                if re.search(r"\b(mv)?lgamma|log_beta|log_binomial", text):
                    found.add(cls)
    assert len(found) > 12
    assert [cls.__name__ for cls in found if not issubclass(cls, GAMMA_FAMILIES)] == []


def test_other_densities_stay_as_they_are():
    x = torch.randn(4, 3)
    for fn in (
        dist.Normal(x, 1.0).to_event(1),
        dist.MixtureSameFamily(dist.Categorical(torch.ones(4, 2)), dist.Normal(x[:, :2], 1.0)),
    ):
        value = fn.sample()
        assert not has_gamma(fn)
        assert torch.equal(log_density(fn, value), fn.log_prob(value))
        assert log_density(fn, value).dtype == torch.float32


# ---------------------------------------------------------------------- gradients


def test_gradients_are_those_of_digamma():
    n = torch.logspace(-6, 6, 30).double().requires_grad_()
    x = torch.tensor([0.0, 1, 5, 1000, 2**24]).double()[:, None]
    (found,) = torch.autograd.grad(log_rising(n, x).sum(), n)
    exact = (scipy.special.digamma((n + x).detach().numpy()) - scipy.special.digamma(n.detach().numpy())).sum(0)
    assert np.allclose(found, exact, rtol=1e-8)


@pytest.mark.parametrize("family", ["poisson", "negative_binomial"])
def test_gradients_of_counts(family: str):
    """d log p / d log m is x - m for a Poisson, r (x - m) / (r + m) for the other; of log r by differences."""
    h = LOG_MEANS.expand(len(COUNTS), -1).clone().requires_grad_()
    module = (Poisson() if family == "poisson" else NegativeBinomial()).build((len(LOG_MEANS),))
    module(h).log_prob(TABLE).sum().backward()
    m, x, weight = h.detach().clamp(min=LOWEST_LOG_RATE).double().exp(), TABLE.double(), torch.ones(())
    if isinstance(log_r := getattr(module, "log_count", None), Tensor):
        at = log_r.detach().double()
        weight = at.exp() / (at.exp() + m)
        low, high = (
            negative_binomial((at + step).exp().expand(x.shape), m.log() - at - step, x).sum(0)
            for step in (-1e-5, 1e-5)
        )
        assert log_r.grad is not None
        assert np.allclose(log_r.grad, (high - low) / 2e-5, rtol=1e-4, atol=1.0)
    assert h.grad is not None
    inside = (LOG_MEANS > LOWEST_LOG_RATE).expand_as(h)
    assert bool(((h.grad - weight * (x - m)).abs() <= 1e-5 * weight * (x + m))[inside].all())
    assert bool((h.grad[~inside] == 0).all())


# ---------------------------------------------------------------------- engines, precisions, analyses


def counts(n: int = 6) -> Tensor:
    rates = torch.logspace(0, 7, n)[:, None, None, None].expand(n, 1, 8, 8)
    return torch.poisson(rates, generator=torch.Generator().manual_seed(0))


def declared() -> tuple[Experiment, pvae.Pair]:
    experiment = Experiment.load(
        "vae", ["data.binarize=none", "data.scale=raw", "decoder.likelihood.kind=poisson", "latents.z.dim=2",
                "encoder.network.hidden=[8]", "decoder.network.hidden=[8]", "train.engine=eager"],
    )  # fmt: skip
    torch.manual_seed(0)
    pair = experiment.build((1, 8, 8))
    for name, p in pair.named_parameters():
        if name.startswith("model.") and p.dim() == 1:
            p.data.add_(10.0)  # rates of e^10
    return experiment, pair


def read(pair: pvae.Pair, x: Tensor, seed: int = 0) -> np.ndarray:
    """The exact log p(x | z) of every row, at the rates that the trace holds."""
    torch.manual_seed(seed)
    fn: Any = pair.traces(x)[1].nodes["x"]["fn"]
    return poisson(fn.base_dist.rate.reshape(x.shape).detach(), x).reshape(len(x), -1).sum(-1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_a_step_is_exact_in_every_precision(precision: Any):
    experiment, pair = declared()
    x = counts()
    around = torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else products_in(precision)
    with around:
        torch.manual_seed(0)
        found = pair.terms(x).reconstruction
        exact = read(pair, x)
    assert float(np.abs(exact).max()) > 1e5
    assert off(found, exact) < EXACT
    loss = Loss(experiment.objective, pair, precision="bfloat16" if precision == "bfloat16" else "float32")
    torch.manual_seed(0)
    value, metrics = loss(x)
    value.backward()
    assert abs(float(metrics[loss.names.index("reconstruction")]) - exact.mean()) < EXACT or precision == "autocast"
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in pair.parameters())


class Scored(nn.Module):
    """log p(x) of counts at log-means h; exponentials of two engines may differ in the last bit of a mean."""

    def __init__(self, likelihood: LikelihoodModule) -> None:
        super().__init__()
        self.likelihood = likelihood

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        fn: Any = self.likelihood(h)
        return fn.base_dist.log_prob(x)


@pytest.mark.slow
@pytest.mark.parametrize("family", [Poisson(), NegativeBinomial()], ids=lambda family: family.kind)
def test_compiled_densities_are_exact(family: Any):
    """Exported and compiled as a step is: counts within a few standard deviations of the mean, value and gradient."""
    x = COUNTS[3:].expand(4, -1)
    h = (x + torch.tensor([[-1.0], [0.0], [1.0], [2.0]]) * x.sqrt()).log()
    plain = Scored(family.build((x.shape[1],)))
    with pyro.validation_enabled(False):
        exported = torch.export.export(plain, (h, x), strict=False)
        compiled = torch.compile(exported.module())
        assert float((compiled(h, x) - plain(h, x)).detach().abs().max()) < EXACT
        slopes = []
        for module in (plain, compiled):
            at = h.clone().requires_grad_()
            slopes.append(torch.autograd.grad(module(at, x).sum(), [at, *plain.parameters()]))
    for one, other in zip(*slopes, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(x.max()))


def known(kind: str) -> tuple[pvae.Pair, Tensor, np.ndarray]:
    """A float32 pair by hand, its data, and the exact log p(x) of every row: nothing of z or all of c is summed out."""
    rates = torch.tensor([[3e5, 1e7, 2.0], [3.001e5, 1.0003e7, 5.0]])
    x = torch.poisson(rates[[0, 1, 0, 1, 1, 0]], generator=torch.Generator().manual_seed(1))
    if kind == "sampled":

        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
                pyro.sample("x", dist.Poisson(rates[0]).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))

        return pvae.Pair(model, guide), x, poisson(rates[0].expand(x.shape), x).sum(-1)

    def mixture(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.25, 0.75])), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Poisson(rates[c]).to_event(1), obs=x)

    each = np.stack([poisson(rate.expand(x.shape), x).sum(-1) for rate in rates])
    return pvae.Pair(mixture, lambda x: None), x, scipy.special.logsumexp(each + np.log([[0.25], [0.75]]), 0)


@pytest.mark.parametrize("kind", ["sampled", "summed out"])
def test_analyses_of_float32_pairs_are_exact(kind: str):
    """ELBO terms, surgery, evidence; the differences between rows are of 1 to 1e5 nats."""
    pair, x, exact = known(kind)
    assert np.ptp(exact) > 1
    terms = pair.terms(x)
    elbo = terms.reconstruction - sum(terms.kl.values())
    assert np.abs(elbo.detach().numpy() - exact).max() < EXACT
    assert pvae.analysis.surgery(pair, x).elbo.value == pytest.approx(exact.mean(), abs=EXACT)
    assert pvae.analysis.evidence(pair, x, samples=10).iwae.value == pytest.approx(exact.mean(), abs=EXACT)


def test_closed_form_kls_of_gammas_are_exact():
    """KL(Gamma(a, r) || Gamma(b, s)) at a = 1e6: in float32 off by half a nat."""
    a, b = torch.tensor([1e6, 4e6]), torch.tensor([1.001e6, 4.01e6])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(b, 2.0).to_event(1))
            pyro.sample("x", dist.Normal(z / b, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(a.expand(len(x), 2), 2.01).to_event(1))

    p, q = (t.double().numpy() for t in (b, a))
    exact = (q - p) * scipy.special.digamma(q) - scipy.special.gammaln(q) + scipy.special.gammaln(p)
    rate, rate_p = float(torch.tensor(2.01)), 2.0
    exact = exact + p * (np.log(rate) - np.log(rate_p)) + q * (rate_p - rate) / rate
    found = pvae.Pair(model, guide).terms(torch.zeros(3, 2), closed_form=True).kl["z"]
    assert off(found, np.full(3, exact.sum())) < EXACT
