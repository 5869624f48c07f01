"""Surgery of several levels, of global latents, and of plates beside the data."""

# Attributes of Modules and Pyro programs have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, union-attr"

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

from pvae.analysis.aggregate.aggregated import AggregatedPosterior
from pvae.analysis.bounds.evidence import evidence
from pvae.analysis.decompose.account import GUIDE_ROWS
from pvae.analysis.decompose.posterior_draws import draw
from pvae.analysis.decompose.surgery import surgery
from pvae.distributions.exponential import Normals
from pvae.pair.pair import Pair
from tests.decompose.pairs import S1, S2, A, Array, B, C, channel, number, random_global, small, two_levels, with_global


def joint_posterior(x: Array, link: float) -> tuple[Array, Array]:
    """Means `(n, 2)` and covariance of (z2, z1) given x, as one dense normal."""
    c = link * C[0, 0]
    mean = np.concatenate([x @ A, x @ B + c * (x @ A)], 1)
    return mean, np.array([[S2, c * S2], [c * S2, S1 + c * c * S2]])


def dense_log_q_agg(z: Array, mean: Array, covariance: Array) -> Array:
    precision = np.linalg.inv(covariance)
    gap = z[:, None] - mean
    log_q = -0.5 * (np.einsum("mnd,de,mne->mn", gap, precision, gap) + np.log(np.linalg.det(2 * np.pi * covariance)))
    top = log_q.max(1, keepdims=True)
    return (top + np.log(np.exp(log_q - top).mean(1, keepdims=True)))[:, 0]


def hierarchy_rows(n: int) -> Array:
    return np.random.default_rng(4).standard_normal((n, 2)) * 1.5


@pytest.mark.parametrize("link", [0.0, 1.0, -2.0])
def test_a_mixture_run_by_the_guide_is_the_dense_mixture(link):
    x = hierarchy_rows(300)
    pair = two_levels(link).adopt(torch.tensor(x))
    with torch.no_grad():
        d = draw(pair, torch.tensor(x))
    z = d.flat(["z2", "z1"])
    got = AggregatedPosterior.of(pair, torch.tensor(x)).log_prob(z)
    np.testing.assert_allclose(got.numpy(), dense_log_q_agg(z.numpy(), *joint_posterior(x, link)), rtol=0, atol=1e-10)


def test_a_mixture_run_by_the_guide_is_the_product_normal_when_levels_are_independent():
    x = torch.tensor(hierarchy_rows(300))
    pair = two_levels(0.0).adopt(x)
    with torch.no_grad():
        d = draw(pair, x)
    z = d.flat(["z2", "z1"])
    got = AggregatedPosterior.of(pair, x).log_prob(z)
    loc, scale = (torch.cat([getattr(z.normal, side) for z in d.latents.values()], 1) for side in ("loc", "scale"))
    product = AggregatedPosterior(Normals(loc, scale))
    torch.testing.assert_close(got, product.log_prob(z), rtol=0, atol=1e-10)


@pytest.mark.parametrize("n", [100, GUIDE_ROWS + 200])
@pytest.mark.parametrize("link", [0.0, 1.0])
def test_joint_information_of_two_levels(n, link):
    # Against 20 dense draws of every row; 4 standard errors, four rows: one new seed in 4000 fails.
    x = hierarchy_rows(n)
    found = surgery(two_levels(link), torch.tensor(x), samples=3)
    mean, covariance = joint_posterior(x, link)
    noise = np.random.default_rng(5).multivariate_normal([0, 0], covariance, size=(20, n))
    own = scipy.stats.multivariate_normal([0, 0], covariance).logpdf(noise)
    terms = own - np.stack([dense_log_q_agg(mean + e, mean, covariance) for e in noise])
    information = found.mutual_information
    assert abs(information.value - terms.mean()) < 4 * math.hypot(
        information.standard_error, terms.std() / terms.size**0.5
    )
    assert found.kl.value == pytest.approx(information.value + found.marginal_kl.value, abs=1e-12)
    assert found.elbo.value == pytest.approx(found.reconstruction.value - found.kl.value, abs=1e-12)
    assert 0 < information.value < math.log(n)


def test_a_hierarchy_has_rows_for_every_level():
    x = torch.tensor(hierarchy_rows(GUIDE_ROWS + 200))
    found = surgery(two_levels(), x, samples=2)
    rows = {name: e for name, e, _ in found.rows()}
    levels = {f"{z}.{term}" for z in ("z2", "z1") for term in ("kl", "mutual_information", "marginal_kl")}
    assert levels < set(rows)
    # q(z1 | x, z2) reads z2: no aggregated posterior of its own. p(z2) and q(z2 | x) read no other latent.
    assert rows["z1.mutual_information"] is rows["z1.marginal_kl"] is None
    assert found.latents["z2"].kl_exact.kind == "exact"
    assert found.latents["z1"].kl_exact.kind == found.kl_exact.kind == "estimate"
    z2 = found.latents["z2"]
    assert z2.kl.value == pytest.approx(z2.mutual_information.value + z2.marginal_kl.value, abs=1e-12)
    assert found.kl.value == pytest.approx(found.latents["z1"].kl.value + z2.kl.value, abs=1e-12)
    assert found.notes == (f"joint I_q over 2 levels: 512 of {len(x)} draws, each under all {len(x)} components",)
    assert {"z2.kl", "z1.kl", "elbo"} <= set(found.to_frame().index)
    assert {"z1", "z2"} == set(found.to_dict()["latents"])
    assert "z2.mutual_information" in str(found)


def test_a_level_that_reads_no_other_has_information_but_no_marginal_under_a_conditional_prior():
    found = surgery(two_levels(0.0), torch.tensor(hierarchy_rows(100)), samples=2)
    assert found.notes == ()
    assert found.latents["z1"].mutual_information is not None
    assert found.latents["z1"].marginal_kl is None
    assert found.latents["z2"].marginal_kl is not None


def test_a_single_level_has_no_rows_of_its_own():
    found = surgery(channel(torch.ones_like), torch.randn(9, 2).double())
    assert not [name for name, _, _ in found.rows() if "." in name]


class BottomUp(torch.nn.Module):
    """Model p(z2) p(z1 | z2) p(x | z1), guide q(z1 | x) q(z2 | z1): the prior of z1 reads what was inferred from it."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(0.7))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
            z1 = pyro.sample("z1", dist.Normal(self.w * z2, 1.0))
            pyro.sample("x", dist.Normal(z1, 0.5), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(0.8 * x, 0.6))
            pyro.sample("z2", dist.Normal(0.5 * z1, 0.9))


def test_bottom_up_guide_has_no_closed_form_for_what_it_reads_back():
    module = BottomUp()
    pair = Pair(module.model, module.guide)
    x = torch.linspace(-1, 1, 50)
    assert pair.dependencies(x).bottom_up == {"z1"}
    found = surgery(pair, x, samples=50)
    assert found.latents["z1"].kl_exact is None
    assert found.kl_exact is None
    assert found.latents["z1"].kl_per_dimension is None
    assert two_levels().dependencies(torch.zeros(5, 2).double()).bottom_up == set()


def test_a_latent_whose_scale_alone_reads_another_is_no_first_level():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0 * x, 1.0))
            b = pyro.sample("b", dist.Normal(0 * x, (a / 2).exp()))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x / 2, 1.0))
            pyro.sample("b", dist.Normal(x / 2, (a / 2).exp()))

    found = surgery(small(model, guide), torch.linspace(-2, 2, 40), samples=3)
    assert found.latents["b"].mutual_information is None
    assert found.latents["b"].kl_exact.kind == "estimate"
    assert "joint I_q" in found.notes[0]


def test_a_parent_that_hardly_moves_is_a_parent():
    # c is certain given x: two draws are alike, yet z reads it on both sides.
    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(0.5 * torch.ones(()).double()))
            z = pyro.sample("z", dist.Normal(3 * c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(logits=40 * x))
            pyro.sample("z", dist.Normal(3 * c + 0.1 * x, 0.5))

    x = torch.tensor([2.0, -2.0]).double().repeat(50)
    found = surgery(small(model, guide), x)
    assert found.latents["z"].mutual_information is found.latents["z"].marginal_kl is None
    assert found.latents["c"].marginal_kl.value == pytest.approx(0, abs=1e-6)
    assert found.mutual_information is not None


def test_numbers_of_another_type_are_cast_before_the_first_run():
    module = BottomUp()
    assert surgery(Pair(module.model, module.guide), np.linspace(-1, 1, 9)).n == 9


def test_global_latents_count_once():
    pair, x = with_global(), torch.linspace(-1, 1, 2500)
    found = surgery(pair, x, samples=2)
    rows = {name: e for name, e, _ in found.rows()}
    assert rows["elbo"].value == pytest.approx(
        rows["reconstruction"].value - rows["kl"].value - rows["global_kl"].value, abs=1e-12
    )
    exact = float(torch.distributions.kl_divergence(dist.Normal(0.3, 0.1), dist.Normal(0.0, 1.0)))
    assert found.shared["b"] == pytest.approx(exact, abs=4)  # one draw: its spread is below one nat
    assert evidence(pair, x[:50], samples=4).joint
    from pvae.training.evaluation import evaluate

    assert evaluate(pair, x, 0)["kl/b"] == pytest.approx(exact / 2500, abs=4 / 2500)


def test_a_posterior_that_reads_a_random_global_latent_has_no_information_of_its_own():
    pair, x = random_global(), torch.randn(300).double()
    found = [surgery(pair, x, samples=30, seed=seed) for seed in range(12)]
    assert found[0].mutual_information is found[0].marginal_kl is None
    assert "not available" in found[0].headline()
    # One draw of w is one unit of noise: the error is the spread over seeds (half to twice, with 12 seeds).
    spread = np.std([s.elbo.value for s in found], ddof=1)
    assert 0.5 < np.mean([s.elbo.standard_error for s in found]) / spread < 2


def test_one_draw_of_a_global_latent_serves_all_chunks():
    x = torch.zeros(2500).double()
    with torch.no_grad():
        d = draw(random_global().adopt(x), x)
    means = d.latents["z"].value[:, 0].split(1000)
    assert [float(m.mean()) for m in means] == pytest.approx([float(means[0].mean())] * 3, abs=0.03)


def test_a_plate_left_of_the_data_keeps_rows_apart():
    def model(x):
        rows = pyro.plate("data", len(x), dim=-1)
        with rows, pyro.plate("units", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(0 * number(0.0), 1.0))
        with rows:
            pyro.sample("x", dist.Normal(z.sum(0), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("units", 3, dim=-2):
            pyro.sample("z", dist.Normal(0.5 * x * torch.arange(1.0, 4.0)[:, None], 0.3))

    x = torch.linspace(-3, 3, 30)
    found = surgery(small(model, guide), x, samples=400)
    means = 0.5 * x.double()[:, None] * torch.arange(1.0, 4.0).double()
    want = AggregatedPosterior(Normals(means, torch.full_like(means, 0.3)))
    z = means + 0.3 * torch.randn(4000, 30, 3, dtype=torch.float64)
    own = dist.Normal(means, 0.3).log_prob(z).sum(-1)
    information = float((own - want.log_prob(z)).mean())
    assert found.mutual_information.value == pytest.approx(information, abs=0.03)
    kl = 0.5 * (means**2 + 0.09 - 1 - math.log(0.09)).sum(1).mean()
    assert found.kl_exact.value == pytest.approx(float(kl), abs=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 40])
def test_a_plate_that_has_as_many_elements_as_rows_is_not_the_data(rows):
    def model(x):
        with pyro.plate("sensors", 3, dim=-2), pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0 * number(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("sensors", 3, dim=-2), pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.T / 2, 0.5**0.5))

    x = torch.tensor(np.random.default_rng(0).normal(size=(rows, 3)))
    pair = small(model, guide).adopt(x)
    assert (pair.layout.plate, pair.layout.dim) == ("data", -1)
    log_p = scipy.stats.norm(0, 2**0.5).logpdf(x.numpy()).sum(1).mean()
    assert surgery(pair, x).elbo.value == pytest.approx(log_p, abs=1e-9)  # the guide is the posterior


def test_a_factor_outside_the_plate_is_shared_by_all_data():
    pair, x = channel(lambda x: torch.full_like(x, 0.5)), torch.randn(100, 2).double()

    def model(x):
        pair.model(x)
        pyro.factor("penalty", number(-5.0))

    found = surgery(Pair(model=model, guide=pair.guide), x, samples=2)
    assert found.elbo.value == pytest.approx(surgery(pair, x, samples=2).elbo.value - 0.05, abs=1e-9)
    terms = Pair(model=model, guide=pair.guide).terms(x[:10], rows=100)
    assert terms.reconstruction.shape == (10,)
