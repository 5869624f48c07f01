"""Score functions and their baselines: unbiased, Pyro's, quieter."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, typeddict-item, union-attr"

import itertools
import math
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceGraph_ELBO
from torch import Tensor

from pvae.objectives.base import Loss, Objective
from pvae.objectives.elbo import TraceELBO, TraceMeanFieldELBO
from pvae.objectives.importance import IWAE
from pvae.pair.pair import Pair
from pvae.training.step import Step
from tests.discrete.pairs import (
    ONE,
    SCORE,
    SCORED,
    SCORED_BITS,
    WITH_VECTOR,
    brute_force,
    declared,
    gradient,
    joint_densities,
    minus_elbo,
    rows,
    same,
    scored,
    state,
    summed,
)

every_scored = pytest.mark.parametrize("latent", SCORED.values(), ids=list(SCORED))


def with_baseline(latent: dict[str, Any], baseline: str) -> Pair:
    """A scored latent whose baseline is off its start, and far from the gain."""
    pair = declared({**latent, "posterior": {**latent["posterior"], "baseline": baseline}}, seed=1).double()
    if baseline == "average":
        pair.guide.posteriors["c"].average.value.fill_(-3.0)
    return pair


def without_baseline(pair: Pair, flat: Tensor) -> Tensor:
    """A gradient without the entries of a baseline network."""
    sizes = [(n, p.numel()) for n, p in pair.named_parameters()]
    parts = flat.split([size for _, size in sizes], -1)
    return torch.cat([part for (n, _), part in zip(sizes, parts, strict=True) if ".baseline." not in n], -1)


def gradients(pair: Pair, x: Tensor, objective: Objective, draws: int, groups: int = 200) -> Tensor:
    """Estimates of the gradient, each the mean over `draws` draws for every row, `(groups, P)`."""
    many = x.repeat(draws, 1)
    return torch.stack([gradient(pair, minus_elbo(pair, many, objective)) for _ in range(groups)])


def require_unbiased(found: Tensor, exact: Tensor) -> None:
    """The mean of estimates `(groups, P)` is `exact` along it and 7 random directions, to 4 standard errors."""
    directions = torch.cat([exact[None], torch.randn(7, len(exact)).double()])
    gap = (found - exact) @ directions.T
    assert (gap.mean(0).abs() < 4 * gap.std(0) / len(gap) ** 0.5).all()
    assert gap[:, 0].std() > 0


OBJECTIVES = {"trace": TraceELBO(), "particles": TraceELBO(particles=4), "mean field": TraceMeanFieldELBO()}


@pytest.mark.fast(
    "particles-network-grid",
    "mean field-average-bits",
    "trace-none-grid",
    "particles-none-bits",
    "mean field-none-grid",
)
@every_scored
@pytest.mark.parametrize("baseline", ["none", "average", "network"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_a_score_function_is_unbiased(latent, baseline, objective):
    # Along the exact gradient and 7 random directions, 4 standard errors of 200 means: one new seed in 1500 fails.
    pair, x = with_baseline(latent, baseline), rows(3).double()
    exact = without_baseline(pair, gradient(pair, -brute_force(pair, x).mean()))
    found = without_baseline(pair, gradients(pair, x, objective, 40))
    require_unbiased(found, exact)
    pathwise = objective.terms(pair, x.repeat(500, 1))  # what is left without the score function is another gradient
    dropped = gradient(pair, (sum(pathwise.kl.values()) - pathwise.reconstruction).mean())
    assert (without_baseline(pair, dropped) - exact).norm() > 0.1 * exact.norm()


def test_a_score_function_beside_a_vector_given_it_is_unbiased():
    # As above, along the exact gradient of TraceEnum with 20 000 draws of the vector: one new seed in 5000 fails.
    latents = {**WITH_VECTOR, "c": {"codes": 3, "posterior": {**SCORE, "baseline": "none"}}}
    pair, x = summed(latents, ["z", "c"], torch.float64)
    x = x[:2]
    found = gradients(pair, x, TraceELBO(), 50)
    exact, _ = summed(WITH_VECTOR, ["z", "c"], torch.float64)
    assert same(state(exact), state(pair))
    want = gradients(exact, x, TraceELBO(), 50)
    way = want.mean(0)
    gap = found.mean(0) @ way - want.mean(0) @ way
    spread = ((found @ way).var() + (want @ way).var()) / len(found)
    assert abs(float(gap)) < 4 * float(spread) ** 0.5


def pyro_s(pair: Pair, x: Tensor) -> tuple[float, Tensor]:
    """Value and gradient of `TraceGraph_ELBO`, per datum."""
    for parameter in pair.parameters():
        parameter.grad = None
    value = TraceGraph_ELBO().loss_and_grads(pair.model, pair.guide, x)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in pair.parameters()]
    return value / len(x), torch.cat([g.flatten() for g in found]) / len(x)


@every_scored
@pytest.mark.parametrize("baseline", ["none", "network"])
def test_a_score_function_is_pyro_s(latent, baseline):
    pair, x = with_baseline(latent, baseline), rows(9).double()
    pyro.set_rng_seed(3)
    loss = minus_elbo(pair, x)
    found = gradient(pair, loss)
    pyro.set_rng_seed(3)
    value, want = pyro_s(pair, x)
    assert loss.item() == pytest.approx(value, abs=1e-10)
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)


def test_a_hand_written_baseline_is_read_as_pyro_reads_it():
    def model(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(b @ pyro.param("w", torch.tensor([1.0, -2.0])), 1.0), obs=x)

    def guide(x):
        level = pyro.param("level", torch.tensor(-1.5))
        with pyro.plate("data", len(x)):
            q = dist.Bernoulli(logits=pyro.param("a", torch.tensor([0.3, -0.4])).expand(len(x), 2)).to_event(1)
            infer = {
                "value": {"baseline_value": level * x},
                "network": {"nn_baseline": lambda x: level * x, "nn_baseline_input": x},
            }[kind]
            pyro.sample("b", q, infer={"baseline": infer})

    x = torch.tensor([0.5, 2.0, -1.0])
    for kind in ("value", "network"):  # noqa: B007 - the guide reads it
        pair = Pair(model, guide).adopt(x)
        assert pair.check(x) == []
        with pair.own_store():
            pyro.set_rng_seed(3)
            value, want = pyro_s(pair, x)
        pyro.set_rng_seed(3)
        loss = minus_elbo(pair, x)
        assert loss.item() == pytest.approx(value, abs=1e-5)
        names = [name for name, _ in pair.named_parameters()]
        found = dict(zip(names, gradient(pair, loss).split([p.numel() for p in pair.parameters()]), strict=True))
        theirs = dict(zip(names, want.split([p.numel() for p in pair.parameters()]), strict=True))
        assert float(found["free.level"].abs()) > 0
        for name, one in found.items():
            torch.testing.assert_close(one, theirs[name], rtol=1e-5, atol=1e-5)


def test_a_baseline_makes_the_gradient_quieter():
    # Of the encoder alone: variance 20 to 500 times less than without; the bound is far from either.
    noise = {}
    for baseline in ("none", "average"):
        pair, x = with_baseline(SCORED["grid"], baseline), rows(3).double()
        module = pair.guide.posteriors["c"]
        if baseline == "average":
            module.average.value.fill_(float(brute_force(pair, x).detach().mean()))
        found = gradients(pair, x, TraceELBO(), 1, 150)
        reached = torch.cat([torch.full((p.numel(),), n.startswith("guide.")) for n, p in pair.named_parameters()])
        noise[baseline] = float(found[:, reached].var(0).sum())
    pair = with_baseline(SCORED["grid"], "average")  # the mean of the others, whatever the average is
    found = gradients(pair, rows(3).double(), TraceELBO(particles=4), 1, 150)
    noise["others"] = 4 * float(found[:, reached].var(0).sum())
    assert noise["average"] < 0.2 * noise["none"]
    assert noise["others"] < 0.2 * noise["none"]


def test_a_baseline_network_learns_the_gain():
    pair = declared({"bits": 4, "posterior": {**SCORED_BITS, "baseline": "network"}})
    x = rows(60)
    baseline = pair.guide.posteriors["c"]

    @torch.no_grad()
    def error() -> tuple[float, float]:
        gain = pair(x.repeat(20, 1)).reshape(20, 60).mean(0)
        foretold = baseline.infer({"x": pair.guide._encoded(x)[1]})["baseline"]["baseline_value"]
        return float((gain - foretold).square().mean()), float(gain.var())

    for p in [*pair.model.parameters(), *pair.guide.encoder.parameters(), *baseline.network.parameters()]:
        p.requires_grad_(False)
    before, _ = error()
    loss = Loss(TraceELBO(), pair, 60)
    step = Step(loss, torch.optim.Adam(baseline.baseline.parameters(), 1e-2), "eager", x)
    for i in range(400):
        pyro.set_rng_seed(i)
        step(x)
    after, spread = error()
    assert after < 0.05 * before
    assert after < 0.5 * spread  # it foretells which rows gain more, not only their mean


def test_a_moving_average_follows_the_mean_gain():
    pair, x = with_baseline(SCORED["bits"], "average"), rows(9).double()
    average = pair.guide.posteriors["c"].average
    average.value.zero_()
    step = Step(Loss(TraceELBO(), pair, 9), torch.optim.SGD(pair.parameters(), 0.0), "eager", x)
    seen = []
    for i in range(4):
        pyro.set_rng_seed(i)
        seen.append(-float(step(x)[0]))
    want = seen[0]
    for gain in seen[1:]:
        want = 0.9 * want + 0.1 * gain
    assert float(average.value) == pytest.approx(want, abs=1e-5)
    average.seen.fill_(torch.nan)
    average.after_step()
    assert float(average.value) == pytest.approx(want, abs=1e-5)


def test_a_scored_latent_beside_one_that_the_model_sums_out_keeps_its_gradient():
    # As above: along the exact gradient, 4 standard errors; one new seed in 10 000 fails.
    latents = {"c": {"codes": 3, "posterior": {**SCORE, "baseline": "none"}}, "d": {"codes": 2}}
    pair, x = summed(latents, ["c", "d"], torch.float64)
    exact = torch.zeros(len(x), dtype=x.dtype)
    for c in range(3):
        value = torch.full((len(x),), c)
        log_q = scored(pair.guide, x, {"c": value})["c"]
        parts = [sum(scored(pair.model, x, {"c": value, "d": torch.full((len(x),), d)}).values()) for d in range(2)]
        exact = exact + log_q.exp() * (torch.stack(parts).logsumexp(0) - log_q)
    way = gradient(pair, -exact.mean())
    gap = gradients(pair, x, TraceELBO(), 20) @ way - way @ way
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / len(gap) ** 0.5
    assert float(gap.std()) > 0


def test_free_bits_refuse_score_functions():
    pair = declared(SCORED["bits"])
    (found,) = TraceELBO(free_bits=0.5).misfits(pair, 100)
    assert "c" in found


def bound_by_brute_force(pair: Pair, x: Tensor, k: int, beta: float = 1.0) -> Tensor:
    """E log 1/K sum_k p(x | c_k) (p(c_k) / q(c_k | x))^beta over all K-tuples of joint states, `(batch,)`."""
    log_q, prior, observed = joint_densities(pair, x)
    tuples = torch.tensor(list(itertools.product(range(len(log_q)), repeat=k)))
    bounds = (observed + beta * (prior - log_q))[tuples].logsumexp(1) - math.log(k)
    return (log_q[tuples].sum(1).exp() * bounds).sum(0)


SCORED_CHAIN = {
    "c2": {"codes": 3, "posterior": {**SCORE, "given": ["x"]}},
    "c1": {"codes": 2, "grid": [2], "posterior": {**SCORE, "given": ["x", "c2"]}},
}


@pytest.mark.parametrize(
    ("latents", "k", "beta"),
    [({"c": SCORED["bits"]}, 2, 1.0), ({"c": SCORED["bits"]}, 3, 0.4), (SCORED_CHAIN, 2, 1.0), (SCORED_CHAIN, 2, 0.4)],
    ids=["bits", "bits, beta", "code given a code", "code given a code, beta"],
)
def test_importance_weights_of_scored_draws_are_unbiased(latents, k, beta):
    # Along the exact gradient and 7 random directions, 4 standard errors of 200 means: one new seed in 1500 fails.
    pair, x = summed(latents, list(latents), torch.float64)
    x = x[:3]
    exact = gradient(pair, -bound_by_brute_force(pair, x, k, beta).mean())
    many, factor, objective = x.repeat(60, 1), torch.tensor(beta, dtype=torch.float64), IWAE(particles=k)
    losses = [objective.loss(objective.terms(pair, many), factor) for _ in range(200)]
    found = torch.stack([gradient(pair, loss) for loss in losses])
    require_unbiased(found, exact)
    value = torch.stack([loss.detach() for loss in losses])
    exact_value = -bound_by_brute_force(pair, x, k, beta).mean().detach()
    assert abs(float(value.mean() - exact_value)) < 4 * float(value.std()) / len(value) ** 0.5
    bare = replace(objective.terms(pair, x.repeat(500, 1)), scores={})  # without score functions it is another one
    assert (gradient(pair, objective.loss(bare, factor)) - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("objective", [TraceELBO(), IWAE(particles=2)], ids=["elbo", "bound"])
def test_a_weight_of_a_scored_site_weighs_its_kl_and_not_its_score(objective):
    """Under `poutine.scale` log q counts 0.3 in the ELBO; the law that draws has the weight 1."""
    x = torch.zeros(3000, dtype=torch.float64)
    logit = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    gains = torch.tensor([0.5, 2.0], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
            pyro.sample("x", dist.Normal(gains[c.long()], 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=0.3):
            pyro.sample("c", dist.Bernoulli(logits=pyro.param("logit", logit)))

    pair = Pair(model, guide).adopt(x[:2])
    free = next(pair.parameters())
    q = dist.Bernoulli(logits=free)
    log_q = torch.stack([q.log_prob(torch.tensor(float(c), dtype=torch.float64)) for c in range(2)])
    log_p = torch.tensor([0.7, 0.3], dtype=torch.float64).log() + dist.Normal(gains, 1.0).log_prob(x[:1])
    log_w = log_p - 0.3 * log_q
    if isinstance(objective, IWAE):
        tuples = torch.tensor(list(itertools.product(range(2), repeat=2)))
        value = (log_q[tuples].sum(1).exp() * (log_w[tuples].logsumexp(1) - math.log(2))).sum()
    else:
        value = (log_q.exp() * log_w).sum()
    (exact,) = torch.autograd.grad(-value, free)
    found = torch.stack([gradient(pair, objective.loss(objective.terms(pair, x), ONE.double())) for _ in range(100)])
    assert abs(float(found.mean() - exact)) < 4 * float(found.std()) / 10


def test_an_impossible_draw_leaves_the_others_their_baseline():
    log_weight = torch.tensor([[-math.inf], [-1.0], [-2.0]])
    found = IWAE.without_each(log_weight)[:, 0]
    want = [[-1.5, -1.0, -2.0], [-math.inf, -math.inf, -2.0], [-math.inf, -1.0, -math.inf]]
    torch.testing.assert_close(found, torch.tensor(want).logsumexp(1) - math.log(3))


def test_vimco_is_quieter_than_its_bound_alone():
    """The baseline of the others takes most of the noise off (bound) grad log q."""
    pair, x = with_baseline(SCORED["bits"], "none"), rows(3).double()
    objective, many = IWAE(particles=3), x.repeat(20, 1)
    quiet, loud = [], []
    for _ in range(50):
        quiet.append(gradient(pair, objective.loss(objective.terms(pair, many), ONE.double())))
        terms = objective.terms(pair, many)
        log_weight = terms.reconstruction - sum(terms.kl.values())
        bound = log_weight.logsumexp(0) - math.log(3)
        left = (bound - log_weight.softmax(0)).detach()
        loud.append(gradient(pair, -bound.mean() - (left * terms.scores["c"].log_q).sum(0).mean()))
    noise = [float(torch.stack(one).var(0).sum()) for one in (quiet, loud)]
    assert noise[0] < 0.2 * noise[1]


def test_importance_weights_refuse_sums_and_baseline_networks():
    (found,) = IWAE().misfits(declared({"bits": 3, "posterior": "bernoulli"}), 100)
    assert "expected trace_elbo with c, whose states are summed over" in found
    (found,) = IWAE().misfits(with_baseline(SCORED["bits"], "network"), 100)
    assert found == "latents.c.posterior.baseline: expected 'none' or 'average' with iwae; got 'network'."
    assert not IWAE().misfits(with_baseline(SCORED["bits"], "average"), 100)
