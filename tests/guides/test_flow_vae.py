"""Flows as decoders: bijections against Jacobians, ELBOs against exact likelihoods, noise in the cells of levels."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, operator, union-attr"

import copy
import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from pyro import poutine
from torch import Tensor

import pvae
from pvae.analysis import ais, bracket, evidence, gap, prior_evidence, surgery
from pvae.data.sources import toys
from pvae.distributions.base import Determined, Rounded
from pvae.errors import DataError, DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.models.priors.base import Prior
from pvae.models.priors.flows import BijectionModule, BijectionNetwork, FlowPrior
from pvae.objectives.elbo import TraceELBO, TraceMeanFieldELBO
from pvae.objectives.importance import IWAE
from pvae.pair.densities import closed_kl
from pvae.pair.pair import Pair
from tests.data import toy_densities
from tests.laws import FLOWS, require_gradients, require_own_states, require_slope, require_trainable, shake

BISECTED = ("block_autoregressive", "neural_autoregressive")
NETWORK = {"network": {"kind": "mlp", "hidden": [8]}}
ONE = torch.ones(())

every_flow = pytest.mark.parametrize("kind", FLOWS)
every_squash = pytest.mark.parametrize("squash", ["none", "logit"])
every_noise = pytest.mark.parametrize("noise", ["uniform", "variational"])


def bijection(
    kind: str,
    dim: int = 3,
    squash: str = "none",
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float64,
) -> BijectionModule:
    torch.manual_seed(1)
    declared = BijectionNetwork.model_validate({"flow": {**FLOWS[kind], "layers": 3}, "squash": squash})
    module = declared.build({"z": (dim,)}, shape or (dim,))
    shake(module, 0.1)
    assert isinstance(module, BijectionModule)
    return module.to(dtype)


def flow_vae(kind: str = "realnvp", dim: int = 2, squash: str = "none", by: float = 0.1, **latent: Any) -> Pair:
    network = {"kind": "bijection", "flow": {**FLOWS[kind], "layers": 3}, "squash": squash}
    table = {
        "latents": {"z": {"dim": dim, "posterior": {"kind": "inverse"}, **latent}},
        "decoder": {"network": network, "likelihood": {"kind": "determined"}},
    }
    pair = Experiment.from_dict(table).build((dim,))
    shake(pair, by)
    return pair


def outward_log_det(net: BijectionModule, z: Tensor, kind: str) -> Tensor:
    """log|det dx/dz| of rows `(n, D)` in the direction of sampling: autograd, or differences where it is bisected."""
    found = []
    for row in z:
        if kind in BISECTED:
            h = 1e-5 * torch.eye(len(row), dtype=row.dtype)
            with torch.no_grad():
                jacobian = ((net({"z": row + h}) - net({"z": row - h})) / 2e-5).flatten(1).T
        else:
            jacobian = torch.autograd.functional.jacobian(lambda v: net({"z": v}).flatten(), row)
        found.append(torch.linalg.slogdet(jacobian)[1])
    return torch.stack(found)


def test_the_table_is_complete():
    shipped = {k for k, m in Prior.members.items() if issubclass(m, FlowPrior) and m.__module__.startswith("pvae.")}
    assert set(FLOWS) == shipped


# ---------------------------------------------------------------------- the network


@every_flow
@every_squash
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_there_and_back(kind, squash, dtype):
    # Where a logistic map is steep backwards, single precision loses a digit: |dz/dx| is 1e2 at its ends.
    net = bijection(kind, squash=squash, dtype=dtype)
    z = torch.randn(4, 20, 3, dtype=dtype)
    with torch.no_grad():
        x = net({"z": z})
        back, log_det = net.invert(x)
        again = net({"z": back})
    assert x.shape == (4, 20, 3)
    assert log_det.shape == (4, 20)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5 if squash == "none" else 5e-5
    torch.testing.assert_close(back, z, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(again, x, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=tolerance)
    assert float((x - z).abs().max()) > 0.1
    if squash == "logit":  # a little beyond [0, 1], by edge / (1 - 2 edge)
        assert float(x.min()) > -0.0103
        assert float(x.max()) < 1.0103


@pytest.mark.fast(
    "2-none-neural_autoregressive",
    "2-logit-block_autoregressive",
    "2-none-spline_coupling",
    "5-none-spline_autoregressive",
    "2-logit-maf",
    "5-none-iaf",
    "5-logit-realnvp",
    "2-none-realnvp",
)
@every_flow
@every_squash
@pytest.mark.parametrize("dim", [2, 5])
def test_log_det_is_that_of_the_jacobian_both_ways(kind, squash, dim):
    net = bijection(kind, dim, squash)
    z = torch.randn(2, dim, dtype=torch.float64)
    with torch.no_grad():
        x = net({"z": z})
        log_det = net.invert(x)[1]
    for row, found in zip(x, log_det, strict=True):
        inward = torch.autograd.functional.jacobian(lambda v: net.invert(v)[0], row)
        assert float(torch.linalg.slogdet(inward)[1]) == pytest.approx(float(found), abs=1e-9)
    torch.testing.assert_close(outward_log_det(net, z, kind), -log_det, rtol=0, atol=1e-5 if kind in BISECTED else 1e-9)


@every_flow
def test_images_are_vectors_in_order(kind):
    flat, image = bijection(kind, 8), bijection(kind, 8, shape=(2, 2, 2))
    z = torch.randn(3, 2, 8, dtype=torch.float64)
    with torch.no_grad():
        x = image({"z": z})
        back, log_det = image.invert(x)
        assert x.shape == (3, 2, 2, 2, 2)
        torch.testing.assert_close(x.flatten(2), flat({"z": z}), rtol=0, atol=1e-12)
        torch.testing.assert_close(back, z, rtol=1e-9, atol=1e-9)
        assert log_det.shape == (3, 2)
        torch.testing.assert_close(log_det, flat.invert(x.flatten(2))[1], rtol=0, atol=1e-12)


@every_flow
@every_squash
def test_gradient_reaches_every_parameter(kind, squash):
    require_trainable(flow_vae(kind, 3, squash), torch.rand(20, 3))


@pytest.mark.parametrize("edge", [0.01, 0.2])
def test_squash_is_a_logistic_map_with_room_at_both_ends(edge):
    net = BijectionNetwork.model_validate({"squash": "logit", "edge": edge}).build({"z": (2,)}, (2,)).double()
    v = torch.tensor([[0.0, 1.0], [0.3, 0.5]], dtype=torch.float64)
    net.flow.steps = torch.nn.ModuleList()  # the identity: what is left is the squash
    h, slope = net.invert(v)  # the very ends of [0, 1] have a place
    inner = edge + (1 - 2 * edge) * v.numpy()
    np.testing.assert_allclose(h.numpy(), scipy.special.logit(inner), rtol=1e-12)
    np.testing.assert_allclose(slope.numpy(), np.log((1 - 2 * edge) / (inner * (1 - inner))).sum(1), rtol=1e-12)
    torch.testing.assert_close(net({"z": h}), v, rtol=0, atol=1e-15)


BIJECTION = {"kind": "bijection"}
DETERMINED = {"network": BIJECTION, "likelihood": {"kind": "determined"}}
ROUNDED = {"network": BIJECTION, "likelihood": {"kind": "rounded", "levels": 4}}
INVERSE = {"dim": 4, "posterior": {"kind": "inverse"}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another number of coordinates": (
        {"latents": {"z": {**INVERSE, "dim": 3}}, "decoder": DETERMINED},
        r"network bijection: expected one latent of dim = 4; got inputs {'z': 3}",
    ),
    "two latents": (
        {"latents": {"z": INVERSE, "y": {"dim": 4}}, "decoder": DETERMINED},
        r"network bijection: expected one latent of dim = 4; got inputs {'z': 4, 'y': 4}",
    ),
    "as an encoder": (
        {"latents": {"z": {"dim": 4}}, "encoder": {"network": BIJECTION}},
        r"network bijection: expected a decoder; got inputs {'x': 4}",
    ),
    "no flow": (
        {"latents": {"z": INVERSE}, "decoder": {**DETERMINED, "network": {**BIJECTION, "flow": "mixture"}}},
        r"decoder.network.flow: expected a flow: one of realnvp, maf, .*; got 'mixture'",
    ),
    "inverse of a dense network": (
        {"latents": {"z": INVERSE}, "decoder": {**NETWORK, "likelihood": {"kind": "determined"}}},
        r"decoder: expected the network bijection and the likelihood determined, .* inverse .* got \"mlp, determined\"",
    ),
    "inverse of noise": (
        {"latents": {"z": INVERSE}, "decoder": {"network": BIJECTION, "likelihood": {"kind": "normal"}}},
        r"decoder: expected the network bijection and the likelihood determined.*; got \"bijection, normal\"",
    ),
    "inverse of levels": (
        {"latents": {"z": INVERSE}, "decoder": ROUNDED},
        r"decoder: expected the network bijection and the likelihood determined.*; got \"bijection, rounded\"",
    ),
    "dequantised without levels": (
        {"latents": {"z": {"dim": 4, "posterior": {"kind": "dequantised"}}}, "decoder": DETERMINED},
        r"decoder: expected the network bijection and the likelihood rounded, which the posterior dequantised inverts",
    ),
    "a normal posterior of what is determined": (
        {"latents": {"z": {"dim": 4}}, "decoder": DETERMINED},
        r"decoder.likelihood: expected a density of x given z .* unless the posterior is inverse or .* \"determined",
    ),
    "a normal posterior of levels": (
        {"latents": {"z": {"dim": 4}}, "decoder": ROUNDED},
        r"decoder.likelihood: expected a density of x given z .*; got \"rounded\"",
    ),
}


@pytest.mark.parametrize(("table", "match"), REFUSED.values(), ids=list(REFUSED))
def test_refused_declarations(table, match):
    with pytest.raises(DeclarationError, match=match):
        Experiment.from_dict(table).build((4,))


def test_a_single_coordinate_is_refused():
    with pytest.raises(DeclarationError, match="latents.z.dim: expected at least 2 coordinates for a flow; got 1"):
        flow_vae(dim=1)


# ---------------------------------------------------------------------- a flow as a VAE


@pytest.mark.fast(
    "none-neural_autoregressive",
    "logit-spline_autoregressive",
    "none-spline_coupling",
    "logit-maf",
    "none-iaf",
    "logit-realnvp",
    "none-realnvp",
)
@every_flow
@every_squash
def test_the_elbo_is_the_exact_log_likelihood(kind, squash):
    # log N(z; 0, I) - log|det dx/dz| in the direction of sampling, in double precision; the pair's own is in single.
    pair = flow_vae(kind, 3, squash)
    twin = copy.deepcopy(pair.model.decoder.network).double()
    z = torch.randn(6, 3, dtype=torch.float64)
    with torch.no_grad():
        x = twin({"z": z})
    want = scipy.stats.norm.logpdf(z.numpy()).sum(1) - outward_log_det(twin, z, kind).numpy()
    with torch.no_grad():
        np.testing.assert_allclose(pair(x.float()).double().numpy(), want, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            copy.deepcopy(pair).double()(x).numpy(), want, rtol=0, atol=1e-5 if kind in BISECTED else 1e-9
        )


@every_flow
def test_the_elbo_is_a_log_density_of_x(kind):
    pair = flow_vae(kind)
    axis = torch.linspace(-9, 9, 301)
    with torch.no_grad():
        z, log_det = pair.model.decoder.network.invert(torch.cartesian_prod(axis, axis))
        few = torch.cartesian_prod(axis, axis)[45_000:45_010]
        log_p = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + log_det
        torch.testing.assert_close(pair(few), log_p[45_000:45_010])
        density = log_p.double().exp().reshape(301, 301)
    total = torch.trapezoid(torch.trapezoid(density, axis.double()), axis.double())
    assert float(total) == pytest.approx(1, abs=3e-3)  # affine steps of relu networks have kinks


def test_evidence_is_exact_and_the_gap_zero():
    pair, x = flow_vae("spline_coupling", 3), torch.randn(30, 3)
    found = evidence(pair, x, samples=5)
    assert found.exact.kind == "exact"
    assert found.exact.value == pytest.approx(float(pair(x).detach().double().mean()), abs=1e-6)
    assert found.gap == pytest.approx(0, abs=1e-9)
    assert found.iwae.value == pytest.approx(found.exact.value, abs=1e-9)
    np.testing.assert_allclose(found.log_p.numpy(), pair(x).detach().double().numpy(), atol=1e-5)
    np.testing.assert_allclose(found.ess.numpy(), 5, atol=1e-6)
    assert "log_p" in found.to_dict()["figures"]


def test_surgery_of_points():
    pair, x = flow_vae("maf", 3), torch.randn(40, 3)
    found = surgery(pair, x, samples=2)
    assert found.mutual_information.kind == "exact"
    assert found.mutual_information.value == pytest.approx(math.log(40), abs=1e-12)
    assert found.marginal_kl is None
    assert found.latents["z"].marginal_kl is None
    assert found.reconstruction.value == 0
    assert found.kl_exact.value == pytest.approx(found.kl.value, abs=1e-6)
    assert found.elbo.value == pytest.approx(float(pair(x).detach().double().mean()), abs=1e-6)
    assert any(note.startswith("z: a deterministic code") for note in found.notes)


def test_rows_that_coincide_share_their_information():
    # 30 rows, 10 of them three times, 5 twice, the rest once: I_q is the entropy of which row it is.
    pair, rows = flow_vae("realnvp", 3), torch.randn(30, 3)
    x = rows.repeat_interleave(torch.tensor([3] * 10 + [2] * 5 + [1] * 15), 0)
    counts = np.array(list(Counter(map(tuple, x.tolist())).values())) / len(x)
    assert surgery(pair, x).mutual_information.value == pytest.approx(-(counts * np.log(counts)).sum(), abs=1e-12)


def test_a_learned_prior_under_a_flow():
    pair = flow_vae("maf", 2, prior={"kind": "mixture", "components": 3})
    x = torch.randn(20, 2)
    z, log_det = pair.model.decoder.network.invert(x)
    prior = pair.model.priors["z"]
    weights = prior.logits.softmax(0).detach().double().numpy()
    loc, scale = prior({}).members.loc.detach().double().numpy(), prior({}).members.scale.detach().double().numpy()
    parts = scipy.stats.norm.pdf(z.detach().double().numpy()[:, None], loc, scale).prod(-1)
    want = np.log(parts @ weights) + log_det.detach().double().numpy()
    np.testing.assert_allclose(pair(x).detach().double().numpy(), want, rtol=1e-5, atol=1e-5)
    assert pair.check(x) == []


@pytest.mark.parametrize("ask", [gap, ais, prior_evidence, bracket])
def test_what_needs_a_likelihood_refuses(ask):
    for pair in (flow_vae(), levels_pair("uniform")):
        with pytest.raises(
            DataError, match=f"{ask.__name__}: expected a density p.x . z.; got x determined by the lat"
        ):
            ask(pair, torch.zeros(4, 2))


def test_every_objective_is_minus_the_log_likelihood():
    pair, x = flow_vae("spline_autoregressive", 3), torch.randn(9, 3)
    want = -float(pair(x).detach().mean())
    for objective in (TraceELBO(), TraceMeanFieldELBO(), TraceELBO(particles=4), IWAE(particles=4)):
        assert objective.loss(objective.terms(pair, x), ONE).item() == pytest.approx(want, rel=1e-5)
    terms = pair.terms(x, particles=4)
    assert terms.kl["z"].shape == (4, 9)
    torch.testing.assert_close(terms.kl["z"], terms.kl["z"][:1].expand(4, 9))


def test_copies_and_states_are_their_own():
    pair = flow_vae("spline_coupling")
    require_own_states(pair, flow_vae("spline_coupling"), torch.randn(20, 2))
    assert all(name.startswith("model.decoder.network.flow.") for name in pair.state_dict())


@pytest.mark.slow
def test_a_flow_learns_a_density_to_its_entropy(tmp_path: Path):
    # Minus the entropy bounds every mean log density; one normal lies 1.8 nats below it. 20 000 fresh draws.
    table = {
        "data": {"source": "toy", "density": "eight_gaussians", "rows": 40_000},
        "latents": {"z": {"dim": 2, "posterior": {"kind": "inverse"}}},
        "decoder": {
            "network": {"kind": "bijection", "flow": {"kind": "spline_coupling", "bins": 16}},
            "likelihood": {"kind": "determined"},
        },
        "train": {
            "epochs": 5,
            "batch_size": 500,
            "optimizer": {"kind": "adam", "lr": 1e-2},
            "schedule": {"kind": "cosine"},
            "engine": "eager",
        },
    }
    run = pvae.fit(Experiment.from_dict(table), run_dir=tmp_path, device="cpu", progress=False)
    draws, _ = toys.eight_gaussians(np.random.default_rng(7), 20_000, 0.2)
    with torch.no_grad():
        lost = -float(run.pair(torch.from_numpy(draws).float()).double().mean()) - toy_densities.entropy(
            "eight_gaussians"
        )
    assert -0.02 < lost < 0.06
    assert run.metrics.query("split == 'validation'")["elbo"].iloc[-1] == pytest.approx(
        -toy_densities.entropy("eight_gaussians"), abs=0.1
    )


# ---------------------------------------------------------------------- levels

LEVELS = 4
CELLS = torch.cartesian_prod(torch.arange(LEVELS), torch.arange(LEVELS))
"""Every x there is, `(16, 2)`."""
X = CELLS.double() / (LEVELS - 1)


def last(pair: Pair) -> torch.nn.Linear:
    """The layer that gives location and log-variance of the noise's logit."""
    return [m for m in pair.guide.posteriors["z"].noise.modules() if isinstance(m, torch.nn.Linear)][-1]


def levels_pair(noise: str) -> Pair:
    """A bent flow whose logistic map leaves some of the mass outside of [0, 1]^2."""
    flow = {"kind": "realnvp", "layers": 3, "hidden": [16]}
    network = {"kind": "bijection", "flow": flow, "squash": "logit", "edge": 0.1}
    posterior = {"kind": "dequantised", "noise": noise, "network": {"kind": "mlp", "hidden": [16]}}
    table = {
        "latents": {"z": {"dim": 2, "posterior": posterior}},
        "decoder": {"network": network, "likelihood": {"kind": "rounded", "levels": LEVELS}},
    }
    pair = Experiment.from_dict(table).build((2,)).double()
    torch.manual_seed(3)
    shake(pair.model, 0.1)
    if noise == "variational":
        shake(pair.guide, 0.05)
        with torch.no_grad():  # wide, or importance weights at the ends of a cell vary too much
            last(pair).bias[2:] += 1.4
    return pair


def exact_log_p(pair: Pair, nodes: int = 60) -> Tensor:
    """log P of every x: the flow's density integrated over its cell by Gauss and Legendre, `(16,)`."""
    at, weight = (torch.from_numpy(a) / 2 for a in np.polynomial.legendre.leggauss(nodes))
    u, w = torch.cartesian_prod(at + 0.5, at + 0.5), torch.cartesian_prod(weight, weight).prod(1)
    with torch.no_grad():
        z, log_det = pair.model.decoder.network.invert((CELLS[:, None] + u) / LEVELS)
    log_density = torch.from_numpy(scipy.stats.norm.logpdf(z.numpy())).sum(-1) + log_det
    return (log_density + w.log() - 2 * math.log(LEVELS)).logsumexp(1)


def mass_outside(pair: Pair) -> float:
    """Share of the prior's mass whose image lies outside of [0, 1]^2, on a grid of z."""
    axis = (torch.arange(1000) + 0.5) * (12 / 1000) - 6
    z = torch.cartesian_prod(axis, axis).double()
    with torch.no_grad():
        v = pair.model.decoder.network({"z": z})
    outside = ((v < 0) | (v > 1)).any(1)
    return float(scipy.stats.norm.pdf(z[outside].numpy()).prod(1).sum()) * (12 / 1000) ** 2


@every_noise
def test_q_integrates_to_one_over_z(noise):
    # The support has sharp edges, on which the grid's error is of first order.
    pair, n = levels_pair(noise), 1000
    axis = (torch.arange(n) + 0.5) * (10 / n) - 5
    for row in X[[1, 10]]:
        q = pair.guide.posterior("z", row[None])
        total = 0.0
        with torch.no_grad():
            for part in torch.cartesian_prod(axis, axis).double().split(250_000):
                total += float(q.log_prob(part).exp().sum())
        assert total * (10 / n) ** 2 == pytest.approx(1, abs=3e-3)


@every_noise
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_own_draws_have_the_density_of_any_other_value(noise, dtype):
    pair, x = levels_pair(noise).to(dtype), X.to(dtype)
    q = pair.guide.posterior("z", x).expand((50, 16))
    z = q.rsample()
    scored, inverted = q.log_prob(z), q.log_prob(z.clone())
    assert z.shape == (50, 16, 2)
    assert scored.shape == inverted.shape == (50, 16)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3  # logit u near 0 and 1
    torch.testing.assert_close(inverted, scored, rtol=tolerance, atol=tolerance)
    assert (q.log_prob(z.roll(1, 1).clone()) == -math.inf).all()  # the cells of distinct x are disjoint


def test_learned_noise_is_logit_normal():
    pair = levels_pair("variational")
    q = pair.guide.posterior("z", X)
    z = q.rsample()
    normal = pair.guide.posteriors["z"].noise({"x": X}).base_dist
    v = pair.model.decoder.network({"z": z})
    t = scipy.special.logit((v * LEVELS - CELLS).detach().numpy())
    log_u = scipy.stats.norm.logpdf(t, normal.loc.detach().numpy(), normal.scale.detach().numpy())
    log_u -= np.log(scipy.special.expit(t)) + np.log(scipy.special.expit(-t))
    inward = [torch.autograd.functional.jacobian(lambda a: pair.model.decoder.network.invert(a)[0], row) for row in v]
    slope = torch.linalg.slogdet(torch.stack(inward))[1].numpy()
    want = log_u.sum(1) + 2 * math.log(LEVELS) - slope
    np.testing.assert_allclose(q.log_prob(z).detach().numpy(), want, atol=1e-9)


def test_cells_and_what_lies_outside_add_up_to_one():
    pair = levels_pair("uniform")
    outside = mass_outside(pair)
    assert outside > 0.03
    assert float(exact_log_p(pair).exp().sum()) == pytest.approx(1 - outside, abs=2e-3)


def test_model_draws_land_on_levels_as_often_as_they_should():
    # Rounding puts what lies outside of [0, 1] into the outermost cells: these are drawn more often than P says.
    pair, n = levels_pair("uniform"), 100_000
    with torch.no_grad():
        x = pair.model(size=n)
    index = (x * (LEVELS - 1)).round()
    torch.testing.assert_close(x, index / (LEVELS - 1), rtol=0, atol=1e-12)
    drawn = torch.bincount((index[:, 0] * LEVELS + index[:, 1]).long(), minlength=16) / n
    p = exact_log_p(pair).exp()
    error = 4 * (p * (1 - p) / n).sqrt()
    inner = ((CELLS > 0) & (CELLS < LEVELS - 1)).all(1)
    assert inner.sum() == 4
    assert ((drawn - p).abs() < error)[inner].all()
    assert (drawn > p - error).all()
    assert float((drawn - p).sum()) == pytest.approx(mass_outside(pair), abs=5e-3)


@every_noise
def test_the_elbo_bounds_the_mass_of_a_cell_and_iwae_reaches_it(noise):
    pair = levels_pair(noise)
    want = exact_log_p(pair)
    found = evidence(pair, X, samples=4000)
    assert found.exact is None
    assert found.elbo.value < float(want.mean()) - 0.02
    assert found.iwae.value == pytest.approx(float(want.mean()), abs=4 * found.iwae.standard_error + 1e-3)
    # datum by datum, to the error of 4000 weights
    error = (1 / found.ess - 1 / 4000).clamp(min=0).sqrt()
    assert ((found.log_p - want).abs() < 4 * error + 2e-3).all()


def test_learned_noise_is_tighter_than_uniform_on_the_same_flow():
    uniform, learned = levels_pair("uniform"), levels_pair("variational")
    learned.model.load_state_dict(uniform.model.state_dict())
    optimizer = torch.optim.Adam(learned.guide.parameters(), 1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        learned.terms(X, particles=8).kl["z"].mean().backward()
        optimizer.step()
    want = float(exact_log_p(uniform).mean())
    loose, tight = (evidence(pair, X, samples=4000).elbo for pair in (uniform, learned))
    assert loose.value < tight.value - 4 * math.hypot(loose.standard_error, tight.standard_error)
    assert want - tight.value < 0.5 * (want - loose.value)
    assert tight.value < want + 4 * tight.standard_error


@pytest.mark.parametrize("far", [0.0, 13.0, 50.0, 500.0, -500.0])
def test_noise_squeezed_against_an_edge_is_no_way_around_the_bound(far):
    # A logit-normal at t has the density of u = sigmoid(t), however close to 0 or 1 that rounds.
    pair = levels_pair("variational")
    head = last(pair)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([far, far, 0.0, 0.0]))
        terms = pair.terms(X, particles=400)
    elbo = float(-terms.kl["z"].mean())
    bound = float(exact_log_p(pair).mean())
    assert elbo < bound - 2 * max(0.0, abs(far) - 10)
    pair.terms(X, particles=400).kl["z"].mean().backward()
    pull = float(head.bias.grad[:2].sum())
    assert math.isfinite(pull)
    if abs(far) >= 13:
        assert pull * far > 0  # the loss rises outwards: a step leads back


@every_noise
def test_what_is_known_of_levels_is_which_x_it_is(noise):
    pair = levels_pair(noise)
    found = surgery(pair, X)
    assert found.mutual_information.value == pytest.approx(math.log(16), abs=1e-9)
    assert found.kl.value == pytest.approx(found.mutual_information.value + found.marginal_kl.value, abs=1e-9)
    twice = surgery(pair, X[:8].repeat(2, 1))
    assert twice.mutual_information.value == pytest.approx(math.log(8), abs=1e-9)


@every_noise
def test_gradient_and_particles_of_levels(noise):
    pair = levels_pair(noise)
    assert pair.check(X) == []
    assert pair.terms(X, particles=3).kl["z"].shape == (3, 16)
    loss = IWAE(particles=5)
    loss.loss(loss.terms(pair, X), ONE).backward()
    require_gradients(pair)


@pytest.mark.parametrize("which", ["uniform", "variational", "inverse"])
def test_the_gradient_is_the_slope(which):
    pair = flow_vae("maf", squash="logit").double() if which == "inverse" else levels_pair(which)
    require_slope(pair, X)


@every_noise
def test_images_of_levels(noise):
    posterior = {"kind": "dequantised", "noise": noise}
    network = {"kind": "bijection", "flow": {**FLOWS["realnvp"], "layers": 2}, "squash": "logit"}
    table = {
        "latents": {"z": {"dim": 8, "posterior": posterior}},
        "decoder": {"network": network, "likelihood": {"kind": "rounded", "levels": 256}},
    }
    pair = Experiment.from_dict(table).build((2, 2, 2))
    x = torch.randint(256, (30, 2, 2, 2)) / 255
    assert pair.check(x) == []
    assert pair.terms(x, particles=3).kl["z"].shape == (3, 30)
    with torch.no_grad():
        guide = pair.guide_trace(x)
        z = guide.nodes["z"]["value"]
        torch.testing.assert_close(pair.model.decoder({"z": z}).v, x)  # each z decodes to its own x
    drawn = pair.model(size=5) * 255
    assert drawn.shape == (5, 2, 2, 2)
    torch.testing.assert_close(drawn, drawn.round(), rtol=0, atol=1e-3)
    assert surgery(pair, x).mutual_information.value == pytest.approx(math.log(30), abs=1e-6)


def test_a_draw_made_without_gradient_is_scored_with_one():
    q = levels_pair("variational").guide.posterior("z", X)
    z = q.sample()
    assert not z.requires_grad
    assert q.log_prob(z).requires_grad
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z.clone()))


def test_data_off_the_levels_are_refused(tmp_path: Path):
    posterior = {"kind": "dequantised"}
    table = {
        "latents": {"z": {"dim": 2, "posterior": posterior}},
        "decoder": ROUNDED,
        "train": {"epochs": 1, "engine": "eager"},
    }
    experiment = Experiment.from_dict(table)
    for bad in (torch.rand(40, 2), X.float().repeat(3, 1) * 4):
        with pytest.raises(DataError, match=r"multiples of 1/3 in \[0, 1\].*levels"):
            pvae.fit(experiment, data=bad, run_dir=tmp_path, device="cpu", progress=False)
    good = X.float().repeat(3, 1)
    run = pvae.fit(experiment, data=good, run_dir=tmp_path, device="cpu", progress=False)
    assert math.isfinite(run.metrics["elbo"].iloc[-1])


# ---------------------------------------------------------------------- points


def test_a_determined_value_is_never_compared():
    value, log_density = torch.randn(5, 3), torch.randn(5)
    q = Determined(value, log_density)
    assert (q.batch_shape, q.event_shape) == ((5,), (3,))
    assert torch.equal(q.log_prob(value + 1e-3), log_density)
    assert torch.equal(q.log_prob(value * 100), log_density)
    assert torch.equal(q.log_prob(torch.randn(4, 1, 3)), log_density.expand(4, 5))
    assert torch.equal(q.rsample((2,)), value.expand(2, 5, 3))
    wide = q.expand((4, 5))
    assert type(wide) is Determined
    assert torch.equal(wide.rsample(), value.expand(4, 5, 3))
    assert torch.equal(wide.log_prob(value), log_density.expand(4, 5))
    assert q.expand((5,)) is q
    assert torch.equal(Determined(value).log_prob(value), torch.zeros(5))
    image = Determined(torch.randn(5, 2, 4, 4), event_dim=3)
    assert image.log_prob(torch.randn(7, 5, 2, 4, 4)).shape == (7, 5)


@pytest.mark.parametrize("log_density", [0.0, 2.5])
def test_kl_of_a_point_counts_its_density(log_density):
    value = torch.randn(5, 3, dtype=torch.float64)
    q = Determined(value, torch.full((5,), log_density, dtype=torch.float64))
    p = dist.Normal(torch.full((3,), 0.3, dtype=torch.float64), 1.7).to_event(1)
    want = log_density - scipy.stats.norm.logpdf(value.numpy(), 0.3, 1.7).sum(1)
    layout = flow_vae().layout
    for particles, fn in ((0, q), (4, q.expand((4, 5)))):
        shape = (4, 5) if particles else (5,)
        with pyro.plate("_particles", 4, dim=-2) if particles else nullcontext(), pyro.plate("data", 5, dim=-1):
            sites = [poutine.trace(pyro.sample).get_trace("z", d, obs=value.expand(*shape, 3)) for d in (fn, p)]
        found = closed_kl(sites[0].nodes["z"], sites[1].nodes["z"], layout, particles, 5)
        np.testing.assert_allclose(found.numpy(), np.broadcast_to(want, shape), rtol=1e-12)


def test_rounding_is_down_to_cells_of_equal_width():
    v = torch.tensor([[-0.2, 0.0, 0.2499], [0.25, 0.51, 0.999], [0.75, 1.0, 1.3]])
    want = torch.tensor([[0, 0, 0], [1, 2, 3], [3, 3, 3]]) / 3
    q = Rounded(v, 4)
    assert torch.equal(q.rsample(), want)
    assert torch.equal(q.log_prob(torch.rand(2, 3, 3)), torch.zeros(2, 3))
    assert torch.equal(q.expand((2, 3)).rsample(), want.expand(2, 3, 3))


def autoencoder() -> Pair:
    table = {
        "latents": {"z": {"dim": 2, "posterior": {"kind": "delta"}}},
        "encoder": {"network": {"kind": "mlp", "hidden": [8], "activation": "tanh"}},  # no two x in one place
        "decoder": {**NETWORK, "likelihood": {"kind": "bernoulli"}},
    }
    return Experiment.from_dict(table).build((6,))


def bits(n: int) -> Tensor:
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6)[torch.randperm(64)[:n]]


def test_a_point_of_an_autoencoder():
    pair, x = autoencoder(), bits(40)
    assert pair.check(x) == []
    z = pair.guide_trace(x).nodes["z"]["value"].detach()
    p = pair.model.decoder({"z": z}).base_dist.probs.detach().double().numpy()
    want = scipy.stats.bernoulli.logpmf(x.numpy(), p).sum(1) + scipy.stats.norm.logpdf(z.double().numpy()).sum(1)
    np.testing.assert_allclose(pair(x).detach().double().numpy(), want, rtol=1e-5)
    found = surgery(pair, x)
    assert found.mutual_information.value == pytest.approx(math.log(40), abs=1e-12)
    assert found.marginal_kl is None
    assert any("a deterministic code" in note for note in found.notes)
    with pytest.raises(DataError, match="evidence: expected posterior densities; got a point for z, as in an autoenc"):
        evidence(pair, x, samples=3)
    assert prior_evidence(pair, x, samples=50).evidence.value < 0  # the guide plays no part


TURNS: dict[str, Callable[[], tuple[Pair, Tensor]]] = {
    "inverse": lambda: (flow_vae(dim=6), torch.randn(3, 6)),
    "delta": lambda: (autoencoder(), bits(3)),
}


@pytest.mark.parametrize("kind", TURNS)
def test_points_have_particles_that_agree(kind):
    pair, x = TURNS[kind]()
    terms = pair.terms(x, particles=4)
    assert terms.kl["z"].shape == terms.reconstruction.shape == (4, 3)
    torch.testing.assert_close(terms.kl["z"][0], terms.kl["z"][3])


def test_equal_rows_share_a_code_whatever_their_batch():
    # Equal rows in batches of other sizes may get codes that differ in the last bit: rows are told apart by x.
    table = {
        "latents": {"z": {"dim": 5, "posterior": "delta"}},
        "encoder": {"network": {"kind": "mlp", "hidden": [33]}},
        "decoder": {"network": {"kind": "mlp", "hidden": [8]}, "likelihood": "bernoulli"},
    }
    pair = Experiment.from_dict(table).build((6,))
    number = torch.randint(64, (2017,), generator=torch.Generator().manual_seed(0))
    x = ((number[:, None] >> torch.arange(6)) & 1).float()
    shares = number.bincount().double() / 2017
    found = surgery(pair, x)
    assert found.mutual_information is not None
    assert found.mutual_information.value == pytest.approx(float(-(shares * shares.log()).sum()), abs=1e-9)


def test_a_squashed_flow_takes_data_in_the_unit_interval_only(tmp_path):
    network = {"kind": "bijection", "squash": "logit"}
    table = {
        "data": {"source": "toy", "rows": 50},
        "latents": {"z": {"dim": 2, "posterior": "inverse"}},
        "decoder": {"network": network, "likelihood": "determined"},
    }
    with pytest.raises(DataError, match=r"expected a value in .*0.*1.*, as the likelihood does"):
        pvae.fit(Experiment.from_dict(table), run_dir=tmp_path, progress=False)
