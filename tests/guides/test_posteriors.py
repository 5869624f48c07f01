"""The flow posterior: its density against grids and Jacobians, its fit against closed forms, its surgery by hand."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, operator, union-attr"

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn

from pvae.analysis import AggregatedPosterior, evidence, surgery
from pvae.analysis.aggregate.entry import quiet
from pvae.analysis.decompose.posterior_draws import draw
from pvae.errors import DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.guides.posteriors.flows import GatedStep, PushedNormal
from pvae.pair.pair import Pair
from tests.laws import (
    require_bounds,
    require_importance_weights,
    require_own_states,
    require_pyros,
    require_slope,
    require_trainable,
    shake,
)

NETWORK = {"network": {"kind": "mlp", "hidden": [8], "activation": "tanh"}}
FLOW = {"kind": "flow", "layers": 2, "hidden": [16], "context": 5}
ONE = torch.ones(())


def flow_pair(dim: int = 2, by: float = 0.3, encoder: str = "shared", **posterior: Any) -> Pair:
    table = {
        "latents": {"z": {"dim": dim, "posterior": {**FLOW, **posterior}}},
        "encoder": {"kind": encoder, **NETWORK},
        "decoder": {**NETWORK, "likelihood": {"kind": "bernoulli"}},
    }
    pair = Experiment.from_dict(table).build((6,))
    torch.manual_seed(2)
    shake(pair.guide, by)
    return pair


def rows(n: int = 5) -> Tensor:
    return (torch.rand(n, 6, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def posterior(pair: Pair, x: Tensor) -> PushedNormal:
    q = pair.guide.posterior("z", x)
    assert isinstance(q, PushedNormal)
    return q


every_dim = pytest.mark.parametrize("dim", [2, 5, 16])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


# ---------------------------------------------------------------------- density


def on_grid(q: PushedNormal, reach: float, n: int) -> tuple[Tensor, Tensor, float]:
    """Midpoints of an axis, log q over their square `(n, n)` for one x, and the area of a cell."""
    axis = (torch.arange(n, dtype=torch.float64) + 0.5) * (2 * reach / n) - reach
    with torch.no_grad():
        log_q = q.log_prob(torch.cartesian_prod(axis, axis)).reshape(n, n)
    return axis, log_q, (2 * reach / n) ** 2


def test_density_integrates_to_one_given_x():
    pair, x = flow_pair().double(), rows().double()
    seen = []
    for row in x:
        _, log_q, area = on_grid(posterior(pair, row[None]), 10.0, 500)
        assert float(log_q.exp().sum() * area) == pytest.approx(1, abs=1e-4)
        seen.append(log_q)
    assert float((seen[0] - seen[1]).abs().max()) > 0.1  # another x, another density


def test_what_is_sampled_is_what_is_scored():
    # Marginals of draws against the grid's by Kolmogorov-Smirnov, and the mean of log q against its integral (4
    # standard errors); one new seed in 400 fails.
    pair, x = flow_pair().double(), rows(1).double()
    q = posterior(pair, x)
    axis, log_q, area = on_grid(q, 10.0, 700)
    density = log_q.exp() * area
    with torch.no_grad():
        z = q.expand((20_000, 1)).rsample()[:, 0]
        scored = q.log_prob(z.clone())
    assert abs(float(scored.mean() - (density * log_q).sum())) < 4 * float(scored.std()) / 20_000**0.5 + 1e-4
    for d in range(2):
        integral = density.sum(1 - d).cumsum(0)
        uniform = np.interp(z[:, d].numpy(), axis.numpy() + 10.0 / 700, integral.numpy())
        assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-3
    found = np.corrcoef(z.T.numpy())[0, 1]
    centred = axis - (density.sum(1) @ axis), axis - (density.sum(0) @ axis)
    spread = [float(density.sum(1 - d) @ centred[d] ** 2) ** 0.5 for d in range(2)]
    assert found == pytest.approx(float(centred[0] @ density @ centred[1]) / math.prod(spread), abs=0.03)


@every_dim
def test_density_is_the_change_of_variables(dim):
    pair, x = flow_pair(dim).double(), rows(4).double()
    q = posterior(pair, x)
    u = q.base.rsample()

    def pushed(u: Tensor, context: Tensor) -> Tensor:
        for step in q.steps:
            shift, logit = step.net(u, context)
            gate = (logit + 2).sigmoid()
            u = (gate * u + (1 - gate) * shift).flip(-1)
        return u

    z = pushed(u, q.context)
    found = q.log_prob(z).detach()
    for i in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda v, i=i: pushed(v, q.context[i]), u[i])
        base = scipy.stats.norm.logpdf(
            u[i].detach().numpy(), q.base.base_dist.loc[i].detach().numpy(), q.base.base_dist.scale[i].detach().numpy()
        ).sum()
        want = base - float(torch.linalg.slogdet(jacobian)[1])
        assert float(found[i]) == pytest.approx(want, abs=1e-9)


@every_dim
def test_a_step_is_autoregressive_and_inverted(dim):
    step = GatedStep(dim, 5, (16,)).double()
    shake(step, 0.3)
    u, context = torch.randn(3, dim, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    z, log_det = step.call(u, context)
    back, again = step.invert(z, context)
    torch.testing.assert_close(back, u, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(again, log_det, rtol=1e-9, atol=1e-9)
    jacobian = torch.autograd.functional.jacobian(lambda v: step.call(v, context[0])[0], u[0])
    assert float(jacobian.triu(1).abs().max()) == 0
    assert float(jacobian.tril(-1).abs().max()) > 0
    assert float(jacobian.diagonal().log().sum()) == pytest.approx(float(log_det[0].detach()), abs=1e-12)
    # the first coordinate, too, follows the context
    u, context = torch.randn(200, dim, dtype=torch.float64), torch.randn(200, 5, dtype=torch.float64)
    assert ((step.call(u, context + 1)[0] != step.call(u, context)[0]).double().mean(0) > 0.2).all()


@every_dim
@every_dtype
def test_own_draws_have_the_density_of_any_other_value(dim, dtype):
    pair = flow_pair(dim).to(dtype)
    q = posterior(pair, rows().to(dtype)).expand((7, 5))
    z = q.rsample()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(q.log_prob(z.clone()), q.log_prob(z), rtol=tolerance, atol=tolerance)


def test_both_ways_to_score_have_one_gradient():
    pair, x = flow_pair(3).double(), rows().double()
    found = []
    for again in (False, True):
        torch.manual_seed(4)
        q = posterior(pair, x)
        z = q.rsample()
        score = q.log_prob(z.clone() if again else z).sum()
        found.append(torch.autograd.grad(score, list(pair.guide.parameters())))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)
    assert max(float(g.abs().max()) for g in found[0]) > 0


def test_a_draw_made_without_gradient_is_scored_with_one():
    q = posterior(flow_pair(), rows())
    z = q.sample()
    assert not z.requires_grad
    assert q.log_prob(z).requires_grad
    with torch.no_grad():
        assert torch.equal(q.log_prob(q.sample()), q.log_prob(q._drawn[0]))


def test_values_broadcast_against_rows_of_data():
    q = posterior(flow_pair(3), rows())
    value = torch.randn(7, 1, 3)
    found = q.log_prob(value)
    assert found.shape == (7, 5)
    torch.testing.assert_close(found, q.log_prob(value.expand(7, 5, 3).clone()))
    assert q.log_prob(torch.zeros(3)).shape == (5,)


def test_expand_keeps_the_density():
    q = posterior(flow_pair(3), rows())
    assert q.expand((5,)) is q
    wide = q.expand((4, 5))
    assert (wide.batch_shape, wide.event_shape) == ((4, 5), (3,))
    value = torch.randn(4, 5, 3)
    torch.testing.assert_close(wide.log_prob(value), q.log_prob(value))
    assert wide.rsample().shape == (4, 5, 3)
    assert wide.rsample((2,)).shape == (2, 4, 5, 3)
    draws = wide.rsample()
    assert (draws[0] != draws[1]).all()  # other draws, not copies


# ---------------------------------------------------------------------- in a pair


@pytest.mark.parametrize("encoder", ["shared", "per_latent", "bottom_up"])
@pytest.mark.parametrize("own", [None, {"kind": "mlp", "hidden": [7], "activation": "tanh"}])
def test_gradient_reaches_every_parameter(encoder, own):
    require_trainable(flow_pair(3, encoder=encoder, **({} if own is None else {"network": own})), rows(20))


def test_the_gradient_is_the_slope():
    pair = flow_pair(3, network={"kind": "mlp", "hidden": [7], "activation": "tanh"}).double()
    require_slope(pair, rows().double())


def test_particles_and_importance_weights():
    pair, x = flow_pair(3), rows()
    assert pair.terms(x, particles=4).kl["z"].shape == (4, 5)
    require_importance_weights(pair, x)


def test_copies_and_states_are_their_own():
    require_own_states(flow_pair(), flow_pair(), rows(20))


def test_trace_elbo_is_pyros():
    require_pyros(flow_pair(3), rows(9))


@pytest.mark.parametrize("encoder", ["shared", "per_latent", "bottom_up"])
def test_a_level_of_a_hierarchy(encoder):
    table = {
        "latents": {
            "z2": {"dim": 2},
            "z1": {
                "dim": 3,
                "given": ["z2"],
                "prior": {"kind": "conditional_normal", **NETWORK},
                "posterior": {**FLOW, "given": ["x", "z2"]},
            },
        },
        "encoder": {"kind": encoder, **NETWORK},
        "decoder": {**NETWORK, "given": ["z1"], "likelihood": {"kind": "bernoulli"}},
    }
    pair, x = Experiment.from_dict(table).build((6,)), rows()
    assert pair.check(x) == []
    assert {name: kl.shape for name, kl in pair.terms(x, particles=3).kl.items()} == {"z2": (3, 5), "z1": (3, 5)}
    first = {"z2": torch.zeros(5, 2), "z1": torch.zeros(5, 3)}
    with pyro.poutine.condition(data=first):
        at = pair.guide_trace(x).nodes["z1"]["fn"].log_prob(first["z1"])
    with pyro.poutine.condition(data={**first, "z2": torch.ones(5, 2)}):
        moved = pair.guide_trace(x).nodes["z1"]["fn"].log_prob(first["z1"])
    assert ((at - moved).abs() > 1e-6).all()


REFUSED: dict[str, tuple[int, dict[str, Any]]] = {
    "narrow": (4, {"hidden": [3]}),
    "narrow in its second layer": (4, {"hidden": [16, 3]}),
    "no hidden layer": (4, {"hidden": []}),
    "one coordinate": (1, {"hidden": [16]}),
}


@pytest.mark.parametrize(("dim", "change"), REFUSED.values(), ids=list(REFUSED))
def test_refused_declarations(dim, change):
    hidden = change["hidden"]
    found = rf"got dim = {dim} and \[{str(hidden)[1:-1]}\]"
    match = f"latents.z.posterior.hidden: expected a latent of at least 2 coordinates and one hidden layer .*; {found}"
    with pytest.raises(DeclarationError, match=match):
        flow_pair(dim, **change)
    assert flow_pair(4, hidden=[4]).check(rows()) == []


def test_codes_have_no_flow():
    with pytest.raises(DeclarationError, match=r"latents.c.posterior: expected a posterior of codes: .*; got \"flow\""):
        Experiment.from_dict({"latents": {"c": {"codes": 3, "posterior": {"kind": "flow"}}}})


# ---------------------------------------------------------------------- what it can fit


class Target(nn.Module):
    """z ~ N(0, I) in the plane and x ~ N(f(z), s^2), one number."""

    def __init__(self, bent: bool) -> None:
        super().__init__()
        self.bent, self.scale = bent, 0.5

    def mean(self, z: Tensor) -> Tensor:
        return z[..., 1] + z[..., 0] ** 2 if self.bent else z[..., 0] + z[..., 1]

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.mean(z)[..., None], self.scale).to_event(1), obs=x)

    def log_p(self, x: Tensor) -> Tensor:
        """log p(x) on a grid of z, `(n,)`."""
        axis = torch.linspace(-6, 6, 401).double()
        z = torch.cartesian_prod(axis, axis)
        log_z = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + 2 * math.log(12 / 400)
        log_x = dist.Normal(self.mean(z), self.scale).log_prob(x.double())
        return (log_z + log_x).logsumexp(-1)


def fitted(bent: bool, posterior: dict[str, Any], x: Tensor) -> float:
    """Mean ELBO of the data under a guide fitted to them."""
    table = {
        "latents": {"z": {"dim": 2, "posterior": posterior}},
        "encoder": {"network": {"kind": "mlp", "hidden": [32], "activation": "tanh"}},
    }
    guide = Experiment.from_dict(table).build((1,)).guide
    pair = Pair(Target(bent), guide).adopt(x)
    optimizer = torch.optim.Adam(pair.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    torch.manual_seed(0)
    for _ in range(500):
        optimizer.zero_grad()
        terms = pair.terms(x, particles=8)
        (terms.kl["z"] - terms.reconstruction).mean().backward()
        optimizer.step()
        schedule.step()
    return evidence(pair, x, samples=500).elbo.value


FLEXIBLE = {"kind": "flow", "layers": 3, "hidden": [32], "context": 16}


def test_a_correlated_posterior_is_matched():
    # Posterior precision I + 11^T / s^2: the best diagonal normal loses (sum log diag - log det) / 2, a flow nothing.
    x = torch.linspace(-3, 3, 20)[:, None]
    precision = np.eye(2) + 1 / 0.5**2
    loses = 0.5 * (np.log(np.diag(precision)).sum() - np.linalg.slogdet(precision)[1])
    log_p = float(Target(False).log_p(x).mean())
    want = scipy.stats.norm.logpdf(x.double().numpy(), 0, math.sqrt(2 + 0.5**2)).mean()
    assert log_p == pytest.approx(want, abs=1e-6)
    assert log_p - fitted(False, {"kind": "normal"}, x) == pytest.approx(loses, abs=0.03)
    assert -0.005 < log_p - fitted(False, FLEXIBLE, x) < 0.05 < 0.2 < loses


@pytest.mark.slow
def test_a_bent_posterior_is_followed_further_than_a_normal_can():
    x = torch.linspace(-1, 4, 20)[:, None]
    log_p = float(Target(True).log_p(x).mean())
    diagonal, full, flow = (
        log_p - fitted(True, posterior, x) for posterior in ({"kind": "normal"}, {"kind": "full_rank_normal"}, FLEXIBLE)
    )
    assert -0.005 < flow < full - 0.1
    assert flow < diagonal - 0.2
    assert flow < 0.6 * diagonal


# ---------------------------------------------------------------------- analysis


def test_surgery_is_that_of_all_pairs_of_draw_and_row():
    pair, x = flow_pair(), rows(60).unique(dim=0)
    n = len(x)
    found = surgery(pair, x, seed=3)
    with quiet(pair, x, 3):
        d = draw(pair, x).latents["z"]
    log_q = torch.empty(n, n, dtype=torch.float64)
    with torch.no_grad():
        for j in range(n):
            log_q[:, j] = posterior(pair, x[j : j + 1]).log_prob(d.value.float()).double()
    want = float((log_q.diagonal() - (log_q.logsumexp(1) - math.log(n))).mean())
    log_p = scipy.stats.norm.logpdf(d.value.numpy()).sum(1)
    assert found.mutual_information.value == pytest.approx(want, abs=1e-4)
    assert 0.05 < want < math.log(n) - 0.05
    assert found.kl.value == pytest.approx(float(log_q.diagonal().mean() - log_p.mean()), abs=1e-4)
    assert found.kl.value == pytest.approx(found.mutual_information.value + found.marginal_kl.value, abs=1e-10)
    assert found.kl_exact is None
    mixture = AggregatedPosterior.of(pair, x)
    np.testing.assert_allclose(
        mixture.log_prob(d.value).numpy(), (log_q.logsumexp(1) - math.log(n)).numpy(), rtol=0, atol=1e-4
    )


def test_evidence_lies_above_the_elbo_and_reaches_the_grid():
    pair, x = flow_pair(by=0.1), rows(8)
    axis = torch.linspace(-7, 7, 281)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_x = torch.stack([pair.model.decoder({"z": z}).log_prob(row) for row in x]).double()
    log_z = torch.from_numpy(scipy.stats.norm.logpdf(z.double().numpy()).sum(1)) + 2 * math.log(14 / 280)
    require_bounds(pair, x, float((log_x + log_z).logsumexp(1).mean()))
