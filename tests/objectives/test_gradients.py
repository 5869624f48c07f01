"""Estimators of the gradient: the same values and expectations, their formulas by autograd, what is refused."""

# Pyro programs and attributes of Modules have no types.
# mypy: disable-error-code="no-untyped-def, arg-type, attr-defined, misc, operator, union-attr"

import math
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import softplus

from pvae.errors import DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.objectives.base import Loss, Objective
from pvae.objectives.elbo import TraceELBO
from pvae.objectives.importance import IWAE
from pvae.pair.pair import Pair
from pvae.training.step import compile_forward
from tests.runs_shared import assert_resumes_exactly, tiny

SMALL = ("encoder.network.hidden=[8]", "decoder.network.hidden=[8]")
PAIRS: dict[str, tuple[str, tuple[str, ...]]] = {
    "normal": ("vae", ("latents.z.dim=3",)),
    "full rank": ("vae", ("latents.z.dim=3", "latents.z.posterior.kind=full_rank_normal")),
    "flow": ("vae", ("latents.z.dim=3", "latents.z.posterior={kind='flow', hidden=[8], context=4}")),
    "two levels": ("hvae", ("latents.z1.dim=3", "latents.z2.dim=2", "latents.z1.prior.network.hidden=[8]")),
    "ladder": (
        "ladder",
        ("encoder.levels.hidden=[8]", "latents.z1.dim=3", "latents.z2.dim=2", "latents.z1.prior.network.hidden=[8]"),
    ),
    "prior of the encoder": ("vamp", ("latents.z.dim=3", "latents.z.prior.components=4")),
}
every_pair = pytest.mark.parametrize("name", PAIRS)
DOUBLY = "doubly_reparameterised"
LANDED, DREG = TraceELBO(gradient="stick_the_landing"), IWAE(particles=4, gradient=DOUBLY)


@cache
def built(name: str, dtype: torch.dtype = torch.float32) -> Pair:
    kind, overrides = PAIRS[name]
    pair = Experiment.load(kind, [*SMALL, *overrides]).build((12,))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in pair.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return pair.to(dtype)


def rows(n: int = 5) -> Tensor:
    return torch.bernoulli(torch.full((n, 12), 0.4), generator=torch.Generator().manual_seed(0))


def found(objective: Objective, pair: Pair, x: Tensor, beta: float = 1.0, seed: int = 0) -> tuple[float, Tensor]:
    """Loss and gradient over all parameters at a seed."""
    torch.manual_seed(seed)
    value, _ = objective.evaluate(pair, x, None, torch.tensor(beta, dtype=x.dtype))
    slopes = torch.autograd.grad(value, list(pair.parameters()), allow_unused=True, materialize_grads=True)
    return value.item(), torch.cat([slope.flatten() for slope in slopes])


def guides(pair: Pair) -> Tensor:
    """True for each parameter that the guide alone has."""
    own = {id(p) for p in pair.guide.parameters()}
    return torch.cat([torch.full((p.numel(),), id(p) in own) for p in pair.parameters()])


# ---------------------------------------------------------------------- formulas


@every_pair
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_value_of_the_loss_is_that_without_the_estimator(name, beta):
    pair, x = built(name), rows()
    if name == "prior of the encoder":
        pair.attend(x)
    for objective in (LANDED, DREG, IWAE(particles=4, groups=2, gradient=DOUBLY, elbo=0.3)):
        plain = objective.model_copy(update={"gradient": "reparameterised"})
        assert found(objective, pair, x, beta)[0] == pytest.approx(found(plain, pair, x, beta)[0], rel=1e-5)


def by_autograd(pair: Pair, x: Tensor, particles: int, doubly: bool, beta: float, seed: int = 0) -> Tensor:
    """The gradient of the negative bound by its definition, from leaves at the samples of a guide of stopped weights.

    The derivative of log p by its parameters at fixed samples, weighed by v; plus (1 - beta + beta v) v (v = 1 for
    the ELBO) times the derivative of log w by the samples alone, along the samples' paths.
    """
    torch.manual_seed(seed)
    parameters, sites = list(pair.parameters()), [site.name for site in pair.guide.sites]
    with pyro.plate("_particles", particles, dim=-2):
        path = pyro.poutine.trace(pair.guide).get_trace(x)
        leaves = {z: path.nodes[z]["value"].detach().requires_grad_() for z in sites}
        conditioned = pyro.poutine.trace(pyro.condition(pair.guide, data=leaves)).get_trace(x)
        model = pyro.poutine.trace(pyro.condition(pair.model, data=leaves)).get_trace(x)

    def score(trace, name):
        return trace.nodes[name]["fn"].log_prob(trace.nodes[name]["value"])

    log_p = score(model, "x") + beta * sum(score(model, z) for z in sites)
    log_q = beta * sum(score(conditioned, z) for z in sites)
    log_w = (log_p - log_q).detach()
    share = log_w.softmax(0) if doubly else torch.full_like(log_w, 1 / particles)
    factor = share * (1 - beta + beta * share) if doubly else share
    at = torch.autograd.grad(((log_p - log_q) * factor).sum() / len(x), list(leaves.values()), retain_graph=True)
    direct = (log_p * share).sum() / len(x)
    along = sum((g * path.nodes[z]["value"]).sum() for z, g in zip(sites, at, strict=True))
    slopes = [
        torch.autograd.grad(part, parameters, allow_unused=True, materialize_grads=True, retain_graph=True)
        for part in (direct, along)
    ]
    return -torch.cat([(one + other).flatten() for one, other in zip(*slopes, strict=True)])


@every_pair
@pytest.mark.parametrize(("objective", "beta"), [(TraceELBO(particles=4), 1.0), (DREG, 1.0), (DREG, 0.4)])
def test_the_gradient_is_its_definition(name, objective, beta):
    pair, x = built(name, torch.float64), rows().double()
    doubly = isinstance(objective, IWAE)
    asked = objective if doubly else objective.model_copy(update={"gradient": "stick_the_landing"})
    torch.testing.assert_close(found(asked, pair, x, beta)[1], by_autograd(pair, x, 4, doubly, beta))


@every_pair
def test_groups_are_means_of_bounds_and_the_model_may_follow_all(name):
    pair, x = built(name, torch.float64), rows().double()
    (whole, all_8), (mean, by_2) = (found(IWAE(groups=m), pair, x) for m in (1, 2))
    value, gradient = found(IWAE(groups=2, partially=True), pair, x)
    if name in ("normal", "full rank", "flow", "two levels"):  # no parameter is read by both sides
        torch.testing.assert_close(gradient, torch.where(guides(pair), by_2, all_8))
    assert value == pytest.approx(whole)
    assert whole < mean  # of negative bounds
    assert not torch.allclose(by_2, all_8)


@every_pair
def test_one_sample_in_each_group_is_the_elbo_and_one_group_iwae(name):
    pair, x = built(name, torch.float64), rows().double()
    value, gradient = found(IWAE(particles=4, groups=4), pair, x, 0.7)
    want, slopes = found(TraceELBO(particles=4), pair, x, 0.7)
    assert value == pytest.approx(want)
    torch.testing.assert_close(gradient, slopes)
    doubly = found(IWAE(particles=4, groups=4, gradient=DOUBLY), pair, x, 0.7)[1]
    landed = found(TraceELBO(particles=4, gradient="stick_the_landing"), pair, x, 0.7)[1]
    torch.testing.assert_close(doubly, landed)


def test_bounds_of_the_same_samples_are_in_order():
    """Jensen's inequality holds for every set of samples."""
    pair, x = built("normal"), rows()
    ordered = [TraceELBO(particles=8), IWAE(groups=4), IWAE(groups=2), IWAE()]
    losses = [found(objective, pair, x)[0] for objective in ordered]
    assert losses == sorted(losses, reverse=True)
    mixed = found(IWAE(elbo=0.25), pair, x)[0]
    assert mixed == pytest.approx(0.25 * losses[0] + 0.75 * losses[-1], rel=1e-5)
    for objective in (*ordered[1:], IWAE(elbo=0.25), IWAE(groups=2, partially=True)):
        torch.manual_seed(0)
        bound = objective.bound(pair, x, None, torch.ones(()))
        assert bound.item() == pytest.approx(-found(objective, pair, x)[0], rel=1e-5)


# ---------------------------------------------------------------------- expectations


class Linear(nn.Module):
    """p(z) = N(0, 1), p(x | z) = N(w z, 1), q(z | x) = N(g x, s^2): a guide that may be the posterior."""

    def __init__(self, g: float, s: float) -> None:
        super().__init__()
        self.w, self.g = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (1.5, g))
        self.raw = nn.Parameter(torch.tensor(math.log(math.expm1(s)), dtype=torch.float64))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.w * z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.g * x, softplus(self.raw)).to_event(1))

    def pair(self) -> Pair:
        return Pair(self.model, self.guide).adopt(torch.zeros(3, 1).double())


EXACT = Linear(1.5 / 3.25, 3.25**-0.5)


@pytest.mark.parametrize("objective", [LANDED, DREG, IWAE(groups=2, gradient=DOUBLY, elbo=0.5)])
def test_at_the_posterior_the_gradient_of_the_guide_is_zero_for_every_sample(objective):
    x = torch.tensor([[-2.0], [0.3], [1.7]], dtype=torch.float64)
    names = [name for name, _ in EXACT.pair().named_parameters()]
    plain = objective.model_copy(update={"gradient": "reparameterised"})
    ours, theirs = (dict(zip(names, found(o, EXACT.pair(), x)[1].abs(), strict=True)) for o in (objective, plain))
    for name, slope in ours.items():
        assert slope > 1e-2 if name.endswith(".w") else slope < 1e-12
    assert all(slope > 1e-3 for slope in theirs.values())


@pytest.mark.parametrize("name", ["normal", pytest.param("two levels", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "objective", [LANDED, DREG, IWAE(particles=4, groups=2, partially=True, gradient=DOUBLY, elbo=0.2)]
)
def test_the_expectation_is_that_of_the_reparameterised_gradient(name, objective):
    # 400 draws in each of 10 batches; 8 directions, |t| < 4.8 with 18 degrees: fails for 0.1 % of new seeds.
    pair, x = built(name), rows(1).expand(400, -1)
    along = torch.randn(sum(p.numel() for p in pair.parameters()), 8, generator=torch.Generator().manual_seed(2))
    plain = objective.model_copy(update={"gradient": "reparameterised"})
    ours, theirs = (
        torch.stack([found(o, pair, x, 0.8, seed)[1] for seed in range(start, start + 10)]) @ along
        for start, o in ((0, objective), (100, plain))
    )
    error = ((ours.var(0) + theirs.var(0)) / 10).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4.8 * error).all()


def test_in_a_linear_model_the_mean_gradient_of_iwae_is_the_doubly_reparameterised_one():
    # 20 000 draws of each; three parameters, |z| < 4: fails for 0.02 % of new seeds; the seeds are fixed.
    pair, x = Linear(0.2, 0.9).pair(), torch.full((2000, 1), 1.3, dtype=torch.float64)
    ours, theirs = (
        torch.stack([found(o, pair, x, seed=s)[1] for s in range(start, start + 10)])
        for start, o in ((0, IWAE(particles=5, gradient=DOUBLY)), (100, IWAE(particles=5)))
    )
    error = ((ours.var(0) + theirs.var(0)) / 10).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 4.8 * error).all()  # t with 18 degrees of freedom
    assert (ours.var(0)[1:] < 0.5 * theirs.var(0)[1:]).all()


def test_a_table_stops_the_score_of_its_latents_alone():
    """The score of one latent by autograd, at fixed samples."""
    pair, x = built("two levels", torch.float64), rows().double()
    _, one = found(TraceELBO(gradient={"z1": "stick_the_landing"}), pair, x)
    _, plain = found(TraceELBO(), pair, x)
    torch.manual_seed(0)
    values = {
        z: v["value"].detach() for z, v in pyro.poutine.trace(pair.guide).get_trace(x).nodes.items() if z in "z1z2"
    }
    node = pyro.poutine.trace(pyro.condition(pair.guide, data=values)).get_trace(x).nodes["z1"]
    score = node["fn"].log_prob(node["value"]).mean()
    slopes = torch.autograd.grad(score, list(pair.parameters()), allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(plain - one, torch.cat([slope.flatten() for slope in slopes]))


def test_particles_of_a_program_that_takes_no_plate():
    """`z[:, 0]` reads another sample under a further plate."""
    slope = nn.Parameter(torch.tensor(0.4))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[:, 0], 1.0), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x[:, None]), 0.7).to_event(1))

    net = nn.Linear(1, 2)
    pair, x = Pair(model, guide), torch.randn(6)
    assert pair.way_of_particles(pair.accept(x)) == "rows"
    plain, landed = (found(TraceELBO(particles=3, gradient=g), pair, x) for g in ("reparameterised", LANDED.gradient))
    assert plain[0] == pytest.approx(landed[0])
    assert not torch.equal(plain[1], landed[1])
    with pytest.raises(DeclarationError, match="along a plate of particles"):
        found(DREG, pair, x)
    assert slope.grad is None


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("kind", "fields", "match"),
    [
        (IWAE, {"gradient": "stick_the_landing"}, "under which stick_the_landing is biased"),
        (IWAE, {"gradient": {"z": DOUBLY}}, "for all latents alike; got a table"),
        (TraceELBO, {"gradient": DOUBLY}, "which has no importance weights: use iwae"),
        (TraceELBO, {"gradient": "stick_the_landing", "free_bits": 0.1}, "free_bits = 0"),
        (IWAE, {"groups": 3}, "groups that divide the 8 particles; got 3"),
    ],
)
def test_what_contradicts_itself_is_refused(kind, fields, match):
    with pytest.raises(ValidationError, match=match):
        kind(**fields)


def test_closed_forms_have_no_score():
    with pytest.raises(DeclarationError, match="no log q of a sample: use trace_elbo"):
        Experiment.load("vae", ["objective={kind='trace_mean_field_elbo', gradient='stick_the_landing'}"])


@pytest.mark.parametrize(
    ("zoo", "overrides", "objective", "match"),
    [
        ("bernoulli_vae", ("latents.b.posterior.estimator=score",), LANDED, "b has no density on a fixed support"),
        ("categorical_vae", (), LANDED, "c is summed over.*or sample c: estimator = 'score'"),
        ("gumbel_softmax_vae", ("latents.c.posterior.kl=categorical",), LANDED, "c has a KL in closed form"),
        (
            "straight_through_vae",
            ("latents.c.posterior.noise=false",),
            IWAE(groups=2, partially=True),
            "c has a KL in closed form; got stick_the_landing or partially. Name .* and partially = false",
        ),
        ("autoencoder", (), LANDED, "z has no density"),
        ("flow_dequantised", (), LANDED, "x is determined by the latents"),
        ("vae", (), TraceELBO(gradient={"u": "stick_the_landing"}), "u is no latent"),
        ("vae", ("latents.z.prior.kind=vae",), DREG, "z has a prior whose density is a bound"),
        ("bernoulli_vae", ("latents.b.posterior={kind='bernoulli', estimator='score'}",), DREG, "b"),
    ],
)
def test_what_is_biased_or_has_no_sample_is_refused(zoo, overrides, objective, match):
    pair = Experiment.load(zoo, [*overrides]).build((1, 8, 8))
    with pytest.raises(DeclarationError, match=match):
        found(objective, pair, torch.ones(4, 1, 8, 8))


def test_a_support_that_moves_and_dropout_are_refused():
    width, drop = nn.Parameter(torch.tensor(1.0)), nn.Dropout(0.2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(drop(z), 1.0), obs=x)

    def guide(x, family):
        pyro.param("width", width)
        pyro.module("drop", drop)
        with pyro.plate("data", len(x)):
            pyro.sample("z", family(x))

    pair = Pair(model, lambda x: guide(x, lambda x: dist.Uniform(x - width, x + width)))
    with pytest.raises(DeclarationError, match="no density on a fixed support"):
        found(LANDED, pair, torch.zeros(4))
    pair = Pair(model, lambda x: guide(x, lambda x: dist.Normal(x, width)))
    found(LANDED, pair, torch.zeros(4))
    with pytest.raises(DeclarationError, match="Dropout"):
        found(DREG, pair, torch.zeros(4))


# ---------------------------------------------------------------------- in a fit

FITTED = {
    "landed": {"gradient": "stick_the_landing"},
    "doubly": {"kind": "iwae", "particles": 4, "groups": 2, "partially": True, "elbo": 0.1, "gradient": DOUBLY},
}


@pytest.mark.parametrize("case", [pytest.param("landed", marks=pytest.mark.slow), "doubly"])
def test_an_interrupted_fit_goes_on_bit_for_bit(tmp_path, case):
    few = tiny(epochs=2)
    assert_resumes_exactly(few.model_copy(update={"objective": Objective.parse(FITTED[case])}), tmp_path, 15)


@pytest.mark.slow
@pytest.mark.parametrize("case", FITTED)
@pytest.mark.parametrize("name", ["normal", "two levels", "flow", "prior of the encoder"])
def test_compiled_steps_are_eager_ones(name, case):
    """`compile_forward` itself compares value and gradient with the eager program's."""
    compile_forward(Loss(Objective.parse(FITTED[case]), built(name)), rows(20))
