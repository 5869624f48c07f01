"""Priors and posteriors: a table of kinds x laws, complete against the registry."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, misc, operator, union-attr"

import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor

from pvae.analysis import surgery
from pvae.analysis.aggregate.entry import quiet
from pvae.analysis.decompose.posterior_draws import draw
from pvae.data.sources import toys
from pvae.distributions.bijections import bisected
from pvae.distributions.exponential import Mixture, Normals
from pvae.errors import DeclarationError, NonFiniteError
from pvae.experiment.experiment import Experiment
from pvae.guides.posteriors.base import Posterior
from pvae.models.priors.base import Prior
from pvae.pair.pair import Pair
from tests.data import toy_densities
from tests.laws import FLOWS, require_own_states, require_trainable, shake

NETWORK = {"network": {"kind": "mlp", "hidden": [8]}}
# Priors of a latent without parents; `conditional_normal` has laws of its own elsewhere.
PRIORS: dict[str, dict[str, Any]] = {
    "standard_normal": {"kind": "standard_normal"},
    "mixture": {"kind": "mixture", "components": 7},
    "vamp": {"kind": "vamp", "components": 7},
    **FLOWS,
    "aggregated": {"kind": "aggregated"},
    "exemplar": {"kind": "exemplar", "components": 20},
}
OF_CODES = {"categorical", "bernoulli", "uniform", "pixelcnn", "transformer"}
"""Priors of codes and bits, whose laws are in tests/discrete, test_em.py and test_token_priors.py."""
SPLINES = ("spline_coupling", "spline_autoregressive")
BISECTED = ("block_autoregressive", "neural_autoregressive")
POSTERIORS: dict[str, dict[str, Any]] = {"normal": {"kind": "normal"}, "full_rank_normal": {"kind": "full_rank_normal"}}
ELSEWHERE = {"flow", "delta", "inverse", "dequantised", "ladder", "bidirectional", "exact", "prior"}
"""Posteriors whose laws are in test_posteriors.py, test_flow_vae.py, test_hierarchies.py, test_em.py, test_gan.py."""


def declared(prior: str = "standard_normal", posterior: str = "normal", dim: int = 2) -> Pair:
    latent = {"dim": dim, "prior": PRIORS[prior], "posterior": POSTERIORS[posterior]}
    likelihood = {"kind": "bernoulli"}
    table = {"latents": {"z": latent}, "encoder": NETWORK, "decoder": {**NETWORK, "likelihood": likelihood}}
    pair = Experiment.from_dict(table).build((6,)).attend(rows())
    if prior == "mixture":  # off its start, so that weights and scales matter
        module = pair.model.priors["z"]
        with torch.no_grad():
            module.logits.normal_()
            module.log_variance.normal_().mul_(0.5)
    return pair


def rows(n: int = 40) -> Tensor:
    return (torch.rand(n, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def prior_of(pair: Pair) -> dist.TorchDistribution:
    return pair.model.priors["z"]({})


every_prior = pytest.mark.parametrize("prior", PRIORS)
every_posterior = pytest.mark.parametrize("posterior", POSTERIORS)


def test_the_tables_are_complete():
    shipped = {kind for kind, member in Prior.members.items() if member.__module__.startswith("pvae.")}
    assert {*PRIORS, *OF_CODES, "conditional_normal", "vae"} == shipped  # `vae` scores a bound: test_vae_prior.py
    discrete = {f"pvae.guides.posteriors.{name}" for name in ("codes", "nearest", "quantisers")}
    shipped = {kind for kind, m in Posterior.members.items() if m.__module__.startswith("pvae.")}
    assert {*POSTERIORS, *ELSEWHERE} == {k for k in shipped if Posterior.members[k].__module__ not in discrete}


@pytest.mark.fast(
    "iaf", "maf", "realnvp", "vamp", "mixture", "standard_normal", "block_autoregressive", "spline_coupling"
)
@every_prior
def test_density_integrates_to_one_and_what_is_sampled_is_what_is_scored(prior):
    # Marginals of draws against those of the scored density, by Kolmogorov-Smirnov, and the mean of log p against its
    # integral (4 standard errors); one new seed in 400 fails for a prior.
    axis = torch.linspace(-9, 9, 601)
    with torch.no_grad():
        p = prior_of(declared(prior))
        log_p = p.log_prob(torch.cartesian_prod(axis, axis)).double().reshape(601, 601)
        draws = p.expand((20_000,)).sample()
        scored = p.log_prob(draws).double()
    total = torch.trapezoid(torch.trapezoid(log_p.exp(), axis.double()), axis.double())
    # The density of a spline has kinks at its knots, where the grid's own error is first order.
    assert float(total) == pytest.approx(1, abs=1e-3 if prior.startswith("spline") else 1e-5)
    density = log_p.exp() * 0.03**2
    assert draws.shape == (20_000, 2)
    assert abs(float(scored.mean() - (density * log_p).sum())) < 4 * float(scored.std()) / 20_000**0.5 + 1e-4
    for d in range(2):
        integral = density.sum(1 - d).cumsum(0)
        uniform = np.interp(draws[:, d].double().numpy(), axis.double().numpy() + 0.015, integral.numpy())
        assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-3


@every_prior
@every_posterior
def test_gradient_reaches_every_parameter(prior, posterior):
    require_trainable(declared(prior, posterior), rows())


@every_prior
@every_posterior
def test_particles_broadcast_and_states_round_trip(prior, posterior):
    pair = declared(prior, posterior)
    assert pair.terms(rows(5), particles=3).kl["z"].shape == (3, 5)
    require_own_states(pair, declared(prior, posterior), rows(), by=0.1)


@every_prior
def test_surgery_adds_up(prior):
    found = surgery(declared(prior), rows(200), samples=3)
    assert found.kl.value == pytest.approx(found.mutual_information.value + found.marginal_kl.value, abs=1e-10)
    assert found.marginal_kl.value > -4 * found.marginal_kl.standard_error


# ---------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("weighted", [True, False])
def test_a_mixture_is_torch_s(weighted):
    loc, scale, logits = torch.randn(50, 3), torch.rand(50, 3) + 0.1, torch.randn(50)
    parts = torch.distributions.Independent(torch.distributions.Normal(loc.double(), scale.double()), 1)
    choice = torch.distributions.Categorical(logits=(logits if weighted else torch.zeros(50)).double())
    want = torch.distributions.MixtureSameFamily(choice, parts)
    z = torch.randn(4, 20, 3)
    got = Mixture(Normals(loc, scale), logits.log_softmax(0) if weighted else None)
    torch.testing.assert_close(got.log_prob(z), want.log_prob(z.double()).float(), rtol=1e-6, atol=1e-6)
    assert got.expand((4, 20)).log_prob(z).shape == (4, 20)
    assert got.expand((4,)).sample((2,)).shape == (2, 4, 3)
    assert got.expand(()) is got


def test_small_scales_keep_their_digits_in_single_precision():
    # z^2 / 2 s^2 is 1e4 here: in float32 the product alone would lose the third digit after the point.
    loc = torch.randn(100, 4) * 3
    scale = torch.full_like(loc, math.exp(-4.0))
    z = loc[:20] + scale[:20] * torch.randn(20, 4)
    parts = torch.distributions.Normal(loc.double(), scale.double())
    want = parts.log_prob(z[:, None].double()).sum(-1).logsumexp(1) - math.log(100)
    torch.testing.assert_close(Mixture(Normals(loc, scale)).log_prob(z).double(), want, rtol=1e-6, atol=1e-5)


def test_gradient_of_a_mixture():
    z, loc, log_scale = (torch.randn(n, 2).double().requires_grad_() for n in (7, 5, 5))
    logits = torch.randn(5).double().requires_grad_()

    def density(z, loc, log_scale, logits):
        return Mixture(Normals(loc, log_scale.exp()), logits.log_softmax(0)).log_prob(z)

    assert torch.autograd.gradcheck(density, (z, loc, log_scale, logits))


class Aggregated(torch.nn.Module):
    """q_agg of given rows as the prior."""

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)

    def forward(self, _given):
        return Mixture(Normals(self.loc, self.scale))


def test_q_agg_as_the_prior_wins_the_marginal_kl():
    pair, x = declared(dim=3).double(), rows(60).double()
    before = surgery(pair, x, samples=3)
    with quiet(pair, x, 0):
        z = draw(pair, x).latents["z"]
    pair.model.priors["z"] = Aggregated(z.normal.loc, z.normal.scale)
    after = surgery(pair, x, samples=3)
    assert after.elbo.value - before.elbo.value == pytest.approx(before.marginal_kl.value, abs=1e-9)
    assert after.marginal_kl.value == pytest.approx(0, abs=1e-9)
    assert after.mutual_information.value == pytest.approx(before.mutual_information.value, abs=1e-12)


def test_pseudo_inputs_are_scored_by_the_guide_itself():
    pair = declared("vamp")
    module = pair.model.priors["z"]
    with torch.no_grad():
        module.pseudo_inputs.add_(5.0)  # beyond the data's range: read as 1
    mean = pair.guide.posterior("z", torch.ones(7, 6)).mean
    torch.testing.assert_close(prior_of(pair).members.loc, mean)
    assert [name for name in pair.state_dict() if "priors" in name] == ["model.priors.z.pseudo_inputs"]


def test_a_prior_made_of_the_posterior_needs_one_that_reads_x_alone():
    other = {"dim": 2, "prior": {"kind": "vamp"}, "posterior": {"kind": "normal", "given": ["x", "a"]}}
    table = {"latents": {"a": {"dim": 2}, "b": other}, "decoder": {"given": ["a", "b"]}}
    with pytest.raises(DeclarationError, match=r"latents.b.posterior.given: expected \['x'\] alone, because the prior"):
        Experiment.from_dict(table)


# ---------------------------------------------------------------------- flows


@pytest.mark.parametrize("kind", FLOWS)
@pytest.mark.parametrize("dim", [2, 5])
def test_bijections_are_inverted_with_their_determinants(kind, dim):
    module = declared(kind, dim=dim).double().model.priors["z"]
    u = torch.randn(6, dim).double()
    for step in module.steps:
        y, log_det = step.call(u)
        x, again = step.invert(y)
        torch.testing.assert_close(x, u, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(again, log_det, rtol=1e-9, atol=1e-9)
        jacobian = torch.autograd.functional.jacobian(lambda v, step=step: step.call(v)[0], u[0])
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[0])


def fit(module: torch.nn.Module, z: Tensor, steps: int, rate: float) -> None:
    """Fit a prior to rows `(n, D)` by steps of 500."""
    optimizer = torch.optim.Adam(module.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        (-module({}).log_prob(z[(torch.arange(500) + 500 * step) % len(z)]).mean()).backward()
        optimizer.step()
        schedule.step()


@pytest.mark.fast("realnvp", "maf", "iaf")
@pytest.mark.parametrize("kind", FLOWS)
def test_a_flow_recovers_a_known_density(kind):
    # A bent normal, z2 = z1^2 / 2 + .4 e: log p is known; what the flow lacks is the KL, on 20 000 fresh draws.
    torch.manual_seed(3)
    z1 = torch.randn(60_000)
    z = torch.stack([z1, 0.5 * z1**2 - 0.5 + 0.4 * torch.randn(60_000)], 1)
    z, fresh = z.split([40_000, 20_000])
    first, second = fresh.T
    true = dist.Normal(0.0, 1.0).log_prob(first) + dist.Normal(0.5 * first**2 - 0.5, 0.4).log_prob(second)
    pair = Experiment.from_dict({"latents": {"z": {"dim": 2, "prior": {"kind": kind}}}}).build((3,))
    module = pair.model.priors["z"]
    fit(module, z, 300 if kind != "iaf" else 200, 5e-3)
    with torch.no_grad():
        lacks = float((true - module({}).log_prob(fresh)).mean())
    assert -0.02 < lacks < (0.1 if kind in ("realnvp", "maf", "iaf") else 0.05)  # affine steps bend less


@pytest.mark.slow  # the fast twin is test_a_flow_recovers_a_known_density
@pytest.mark.parametrize("kind", ["spline_coupling", "spline_autoregressive"])
def test_splines_recover_eight_modes_to_their_entropy(kind):
    # What is lost is the KL: cross-entropy on 20 000 fresh draws less the known entropy. One normal loses 1.8 nats.
    draws, _ = toys.eight_gaussians(np.random.default_rng(0), 120_000, 0.2)
    z, fresh = torch.from_numpy(draws).float().split([100_000, 20_000])
    table = {"latents": {"z": {"dim": 2, "prior": {"kind": kind, "bins": 16}}}}
    module = Experiment.from_dict(table).build((3,)).model.priors["z"]
    fit(module, z, 400, 1e-2)
    with torch.no_grad():
        lost = -float(module({}).log_prob(fresh).mean()) - toy_densities.entropy("eight_gaussians")
    assert -0.02 < lost < 0.05


def bisected_steps(kind: str, dim: int, dtype: torch.dtype) -> list[Any]:
    """Bijections off their start."""
    module = declared(kind, dim=dim).to(dtype).model.priors["z"]
    shake(module, 0.1)
    return list(module.steps)


@pytest.mark.parametrize("kind", BISECTED)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_bisection_finds_roots_to_the_last_digits(kind, dtype, tolerance):
    for step in bisected_steps(kind, 3, dtype):
        u = 3 * torch.randn(2, 50, 3, dtype=dtype)
        torch.testing.assert_close(step.call(step.invert(u)[0])[0], u, rtol=0, atol=tolerance)
        torch.testing.assert_close(step.invert(step.call(u)[0])[0], u, rtol=0, atol=tolerance)
        u[0, 0] = torch.tensor([-40.0, 0.0, 30.0])  # brackets are doubled six times, for these alone
        torch.testing.assert_close(step.call(step.invert(u)[0])[0], u, rtol=tolerance, atol=10 * tolerance)


def test_bisection_says_where_there_is_no_root():
    y = torch.zeros(4, 2)
    y[1, 1] = 2.0
    with pytest.raises(
        NonFiniteError, match=r"got none at 1 of 4 within 2\^40 of 0, in coordinate 1. Look for weights"
    ):
        bisected(torch.tanh, y, range(2))
    y[1, 1] = torch.nan
    with pytest.raises(NonFiniteError, match="got none at 1 of 4"):
        bisected(lambda x: x, y, range(2))


@pytest.mark.parametrize("kind", BISECTED)
def test_bisected_flows_are_pyro_s(kind):
    for step in bisected_steps(kind, 3, torch.float64):
        z = torch.randn(50, 3).double()
        y, log_det = step.call(z)
        want = step.transform(z)
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)  # Pyro guards its logarithms otherwise
        torch.testing.assert_close(log_det, step.transform.log_abs_det_jacobian(z, want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BISECTED)
def test_far_values_keep_density_and_gradient_in_single_precision(kind):
    module = declared(kind).model.priors["z"]
    axis = torch.linspace(-50, 50, 101)
    z = torch.cartesian_prod(axis, axis).requires_grad_()
    log_p = module({}).log_prob(z)
    log_p.sum().backward()
    assert z.grad.isfinite().all()
    assert (z.grad.abs().sum(-1) > 0)[z.abs().amax(-1) > 5].all()  # nowhere flat
    assert all(p.grad.isfinite().all() for p in module.parameters())
    torch.testing.assert_close(module.double()({}).log_prob(z.double()), log_p.double(), rtol=1e-4, atol=1e-4)


def test_a_gate_that_rounds_to_one_leaves_the_identity():
    step = bisected_steps("block_autoregressive", 2, torch.float32)[0]
    with torch.no_grad():
        step.transform.gate.fill_(40.0)
    z = torch.randn(5, 2, requires_grad=True)
    y, log_det = step.call(z)
    (y.sum() + log_det.sum()).backward()
    assert torch.equal(y, z)
    torch.testing.assert_close(log_det, torch.zeros(5), rtol=0, atol=1e-12)
    assert all(p.grad.isfinite().all() for p in step.parameters())


def test_flows_need_a_hidden_layer():
    for kind in FLOWS:
        with pytest.raises(DeclarationError, match="prior.hidden: expected at least 1 item; got"):
            Experiment.from_dict({"latents": {"z": {"dim": 2, "prior": {"kind": kind, "hidden": []}}}})


def test_flows_need_two_coordinates():
    for kind in FLOWS:
        with pytest.raises(DeclarationError, match="latents.z.dim: expected at least 2 coordinates for a flow; got 1"):
            declared(kind, dim=1)


# ---------------------------------------------------------------------- posteriors


def test_full_rank_has_a_lower_triangle_and_a_closed_form():
    pair, x = declared(posterior="full_rank_normal", dim=4), rows(5)
    with torch.no_grad():
        q = pair.guide.posterior("z", x)
    assert q.batch_shape == (5,)
    assert float(q.scale_tril.triu(1).abs().max()) == 0
    assert float(q.scale_tril.tril(-1).abs().max()) > 0
    assert float(q.scale_tril.diagonal(dim1=-2, dim2=-1).min()) > 0
    found = surgery(pair, x.repeat(30, 1), samples=20)
    assert found.kl.value == pytest.approx(found.mutual_information.value + found.marginal_kl.value, abs=1e-10)
    assert found.latents["z"].active_units is not None
