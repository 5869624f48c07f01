"""Posteriors of codes and bits: laws of every engine; sums and score functions against brute force and Pyro's own;
relaxations against their limit; nearest codes against formulas written by hand."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, typeddict-item, union-attr"

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, TraceGraph_ELBO
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical
from vector_quantize_pytorch import VectorQuantize

import pvae
from pvae.data import Dataset
from pvae.distributions.codes import code_grid, joint_states
from pvae.distributions.relaxed import Discretised, RelaxedCodes
from pvae.distributions.simplex import from_coordinates, to_coordinates
from pvae.errors import DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.graph.space import Space
from pvae.guides.posteriors.base import Posterior
from pvae.guides.posteriors.nearest import NearestCodePosterior
from pvae.nn.codebook import SMOOTHING, NearestCodebook
from pvae.nn.schedules import Exponential
from pvae.objectives.base import Loss, Objective
from pvae.objectives.elbo import TraceELBO, TraceMeanFieldELBO
from pvae.objectives.iwae import IWAE
from pvae.pair.pair import Pair
from pvae.training.begin import begin
from pvae.training.evaluation import evaluate
from pvae.training.refit import refit
from pvae.training.step import Step
from tests.laws import FLOWS, require_gradients
from tests.runs_shared import assert_resumes_exactly, everything

ONE = torch.ones(())
NETWORK = {"network": {"kind": "mlp", "hidden": [8], "activation": "tanh"}}
X = 6


@dataclass(frozen=True)
class Engine:
    """A latent with its posterior, and what is special about it."""

    latent: dict[str, Any]
    features: tuple[int, ...]
    """Shape that the decoder sees."""
    certain: bool = False
    """Whether the same x has the same code at every draw."""
    moves: bool = False
    """Whether a step moves buffers of the pair."""


SUM, SCORE = ({"kind": "categorical", "estimator": one} for one in ("sum", "score"))
GRID = {"codes": 3, "grid": [2, 2]}
ENGINES = {
    "categorical": Engine({"codes": 3, "posterior": SUM}, (3,)),
    "categorical, grid": Engine({"codes": 3, "grid": [2], "posterior": "categorical"}, (3, 2)),
    "categorical, embedding": Engine({**GRID, "embedding": 5, "posterior": SUM}, (5, 2, 2)),
    "categorical, score": Engine({**GRID, "posterior": SCORE}, (3, 2, 2), moves=True),
    "categorical, score, network": Engine({**GRID, "posterior": {**SCORE, "baseline": "network"}}, (3, 2, 2)),
    "bernoulli": Engine({"bits": 3, "posterior": "bernoulli"}, (3,)),
    "bernoulli, score": Engine({"bits": 7, "posterior": {"kind": "bernoulli", "baseline": "none"}}, (7,)),
    "relaxed_onehot": Engine({"codes": 4, "posterior": "relaxed_onehot"}, (4,)),
    "relaxed_onehot, grid": Engine({**GRID, "embedding": 5, "posterior": "relaxed_onehot"}, (5, 2, 2)),
    "relaxed_onehot, categorical": Engine(
        {**GRID, "posterior": {"kind": "relaxed_onehot", "kl": "categorical"}}, (3, 2, 2)
    ),
    "straight_through": Engine({**GRID, "posterior": "straight_through"}, (3, 2, 2)),
    "straight_through, relaxed": Engine(
        {**GRID, "posterior": {"kind": "straight_through", "kl": "relaxed"}}, (3, 2, 2)
    ),
    "straight_through, no noise": Engine(
        {**GRID, "embedding": 5, "posterior": {"kind": "straight_through", "noise": False}}, (5, 2, 2), certain=True
    ),
    "nearest_code": Engine(
        {"codes": 6, "grid": [2, 2], "embedding": 5, "posterior": "nearest_code"}, (5, 2, 2), certain=True, moves=True
    ),
    "nearest_code, gradient": Engine(
        {"codes": 6, "embedding": 5, "posterior": {"kind": "nearest_code", "gradient": True, "evenness": 0.1}},
        (5,),
        certain=True,
        moves=True,
    ),
    "nearest_code, unit": Engine(
        {"codes": 6, "grid": [3], "embedding": 5, "posterior": {"kind": "nearest_code", "unit": True}},
        (5, 3),
        certain=True,
        moves=True,
    ),
}
every_engine = pytest.mark.parametrize("engine", ENGINES.values(), ids=list(ENGINES))


def built(latents: Mapping[str, Any], given: Sequence[str] | None = None, **more: Any) -> Pair:
    decoder = {**NETWORK, "likelihood": {"kind": "bernoulli"}, **({} if given is None else {"given": list(given)})}
    table = {"latents": latents, "encoder": NETWORK, "decoder": decoder, **more}
    return Experiment.from_dict(table).build((X,))


def declared(latent: Mapping[str, Any], off: float = 0.3, **more: Any) -> Pair:
    """A pair of one latent, off its start, so that prior and posterior differ in every code."""
    pair = built({"c": dict(latent)}, **more)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.add_(off * torch.randn_like(parameter))
    return pair


def rows(n: int = 5) -> Tensor:
    return (torch.rand(n, X, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def minus_elbo(pair: Pair, x: Tensor, objective: Objective | None = None) -> Tensor:
    objective = objective or TraceELBO()
    return objective.loss(objective.terms(pair, x), ONE.to(x))


def gradient(pair: Pair, loss: Tensor) -> Tensor:
    """Of every parameter in a row; zero where it plays no part."""
    parameters = list(pair.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([g.flatten() for g in flat])


# ---------------------------------------------------------------------- laws of every engine


def test_the_table_is_complete():
    shipped = {
        kind
        for kind, member in Posterior.members.items()
        if member.__module__.startswith("pvae.") and member.values in ("index", "binary")
    }
    posteriors = (engine.latent["posterior"] for engine in ENGINES.values())
    found = {one if isinstance(one, str) else one["kind"] for one in posteriors}
    assert found | {"exact"} == shipped  # exact: tests/test_em.py


@every_engine
def test_gradient_reaches_every_parameter_and_check_finds_nothing(engine):
    pair = declared(engine.latent)
    assert pair.check(rows()) == []
    # A code that nobody uses has no gradient of its own, so there are rows enough for all.
    minus_elbo(pair, rows(200)).backward()
    require_gradients(pair)


@every_engine
def test_the_decoder_sees_features(engine):
    pair = declared(engine.latent)
    with torch.no_grad():
        assert pair.guide(rows())["c"].shape == (5, *engine.features)
        assert pair.model(size=4).shape == (4, X)
        assert pair.simulate(rows()).nodes["c"]["value"].shape[0] == 5


@every_engine
def test_particles_broadcast_and_states_round_trip(engine):
    pair = declared(engine.latent).eval()
    terms = pair.terms(rows(), particles=3)
    assert terms.kl["c"].shape == terms.reconstruction.shape == (3, 5)
    expected = pair.terms(rows(), particles=3, expected=True)
    assert expected.kl["c"].shape == expected.reconstruction.shape == (3, 5)
    draws = pair.traces(rows(), 3)[0].nodes["c"]["value"]
    assert (draws[0] == draws).all() == engine.certain
    other, before = copy.deepcopy(pair), evaluate(pair, rows(40), 0)
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    assert evaluate(other, rows(40), 0) == before != evaluate(pair, rows(40), 0)
    again = declared(engine.latent)
    again.load_state_dict(pair.state_dict())
    assert evaluate(again, rows(40), 0) == evaluate(pair, rows(40), 0)
    twice = [id(p) for _, p in pair.named_parameters(remove_duplicate=False)]
    assert len(twice) == len(set(twice))


def state(pair: Pair) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in pair.state_dict().items()}


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        torch.allclose(value, two[name], rtol=0, atol=0, equal_nan=True) for name, value in one.items()
    )


@every_engine
def test_evaluation_moves_nothing_and_a_forward_pass_only_scratch(engine):
    pair, x = declared(engine.latent), rows(40)
    step = Step(Loss(TraceELBO(), pair, 40), torch.optim.SGD(pair.parameters(), 0.0), "eager", x)
    before, everything = state(pair), {n: b.clone() for n, b in pair.named_buffers()}
    evaluate(pair, x, 0)
    with torch.no_grad():
        pair.eval()
        pair(x)
        pair.train()
    assert same(everything, dict(pair.named_buffers()))
    minus_elbo(pair, x)
    assert same(before, state(pair))
    step(x)  # of length zero: what moves is no parameter
    assert same(before, state(pair)) != engine.moves


@every_engine
def test_the_same_seed_gives_the_same_number(engine):
    pair, x = declared(engine.latent), rows(9)
    found = []
    for seed in (3, 3, 4):
        pyro.set_rng_seed(seed)
        found.append(minus_elbo(pair, x).item())
    assert found[0] == found[1]
    exact = pair.layout.expected or engine.certain
    assert (found[0] == found[2]) == bool(exact)


# ---------------------------------------------------------------------- expectations, by brute force


def scored(program: Callable[..., Any], x: Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """log p of every site at given values, `(batch,)`."""
    trace = poutine.trace(poutine.condition(program, data=dict(values))).get_trace(x)
    trace.compute_log_prob()
    nodes = {name: node for name, node in trace.nodes.items() if node["type"] == "sample" and "log_prob" in node}
    return {name: node["log_prob"] for name, node in nodes.items() if not name.startswith("data")}


def joint_densities(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log q, log p of the latents and log p of x at every joint state of all latents, in a loop; each `(S, batch)`."""
    nodes = pair.guide_trace(x).nodes
    axes = []
    for name in pair.layout.latents:
        shape, fn = nodes[name]["value"].shape[1:], nodes[name]["fn"]
        states = fn.base_dist if shape else fn
        k = states.logits.shape[-1] if isinstance(states, Categorical) else 2
        one = torch.empty((), dtype=nodes[name]["value"].dtype)
        axes.append([torch.tensor(c).reshape(shape).to(one) for c in itertools.product(range(k), repeat=shape.numel())])
    found = []
    for joint in itertools.product(*axes):
        values = {n: c.expand(len(x), *c.shape) for n, c in zip(pair.layout.latents, joint, strict=True)}
        model = scored(pair.model, x, values)
        prior = sum(model.pop(name) for name in pair.layout.latents)
        found.append((sum(scored(pair.guide, x, values).values()), prior, sum(model.values())))
    log_q, prior, observed = (torch.stack(part) for part in zip(*found, strict=True))
    torch.testing.assert_close(log_q.detach().exp().sum(0), torch.ones_like(log_q[0]).detach())
    return log_q, prior, observed


def brute_force(pair: Pair, x: Tensor) -> Tensor:
    """sum_c q(c | x) (log p(x, c) - log q(c | x)) over all joint states of all latents, `(batch,)`."""
    log_q, prior, observed = joint_densities(pair, x)
    return (log_q.exp() * (prior + observed - log_q)).sum(0)


CHAIN = {
    "c2": {"codes": 3, "posterior": {"kind": "categorical", "given": ["x"]}},
    "c1": {"codes": 2, "grid": [2], "posterior": {"kind": "categorical", "given": ["x", "c2"]}},
}
SUMMED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "code": ({"c": {"codes": 5, "posterior": "categorical"}}, ["c"]),
    "code, embedding": ({"c": {"codes": 5, "embedding": 3, "posterior": "categorical"}}, ["c"]),
    "grid": ({"c": {"codes": 3, "grid": [2, 2], "posterior": SUM}}, ["c"]),
    "bits": ({"c": {"bits": 4, "posterior": "bernoulli"}}, ["c"]),
    "uniform": ({"c": {"bits": 3, "prior": "uniform", "posterior": "bernoulli"}}, ["c"]),
    "code and grid given it": (CHAIN, ["c2", "c1"]),
    "code and bits": ({"c": {"codes": 3, "posterior": "categorical"}, "b": {"bits": 2}}, ["c", "b"]),
}
every_sum = pytest.mark.parametrize(("latents", "given"), SUMMED.values(), ids=list(SUMMED))
every_dtype = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-10)])


def summed(latents: dict[str, Any], given: list[str] | None, dtype: torch.dtype) -> tuple[Pair, Tensor]:
    pair = built(latents, given).to(dtype)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return pair, rows().to(dtype)


def require_same(pair: Pair, one: Tensor, two: Tensor, tolerance: float) -> None:
    """Equal values and gradients."""
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient(pair, one), gradient(pair, two), rtol=20 * tolerance, atol=10 * tolerance)


@every_sum
@every_dtype
def test_a_sum_is_brute_force_s(latents, given, dtype, tolerance):
    pair, x = summed(latents, given, dtype)
    require_same(pair, minus_elbo(pair, x), -brute_force(pair, x).mean(), tolerance)
    torch.testing.assert_close(pair(x), brute_force(pair, x), rtol=tolerance, atol=tolerance)


@every_sum
@every_dtype
def test_a_sum_is_pyro_s(latents, given, dtype, tolerance):
    pair, x = summed(latents, given, dtype)
    theirs = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(pair.model, pair.guide, x) / len(x)
    require_same(pair, minus_elbo(pair, x), theirs, tolerance)


@every_sum
def test_a_sum_has_the_kl_of_independent_codes_in_closed_form(latents, given):
    pair, x = summed(latents, given, torch.float64)
    by_draws, closed = (objective.terms(pair, x) for objective in (TraceELBO(), TraceMeanFieldELBO()))
    for name, kl in by_draws.kl.items():
        torch.testing.assert_close(closed.kl[name], kl, rtol=1e-10, atol=1e-10)


WITH_VECTOR = {
    "c": {"codes": 3, "posterior": "categorical"},
    "z": {
        "dim": 2,
        "given": ["c"],
        "prior": {"kind": "conditional_normal", **NETWORK},
        "posterior": {"kind": "normal", "given": ["x", "c"]},
    },
}


@every_dtype
@pytest.mark.parametrize("given", [["z"], ["z", "c"]])
def test_a_vector_given_a_code_is_drawn_for_every_code(dtype, tolerance, given):
    pair, x = summed(WITH_VECTOR, given, dtype)
    pyro.set_rng_seed(3)
    ours = minus_elbo(pair, x)
    pyro.set_rng_seed(3)
    theirs = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(pair.model, pair.guide, x) / len(x)
    require_same(pair, ours, theirs, tolerance)
    # KL(z) is E_q(c) of closed forms, each known without enumeration.
    q = code_grid(pair.guide_trace(x).nodes["c"]["fn"].logits, 0).probs
    want = torch.zeros(len(x), dtype=dtype)
    for k in range(3):
        value = {"c": torch.full((len(x),), k)}
        guide = poutine.trace(poutine.condition(pair.guide, data=value)).get_trace(x)
        model = poutine.trace(poutine.replay(poutine.condition(pair.model, data=value), guide)).get_trace(x)
        want = want + q[:, k] * kl_divergence(guide.nodes["z"]["fn"], model.nodes["z"]["fn"])
    torch.testing.assert_close(pair.terms(x, closed_form=True, expected=True).kl["z"], want, rtol=1e-5, atol=1e-6)


def test_joint_states_are_all_and_each_once():
    found = joint_states(3, (2, 2), torch.device("cpu"))
    assert found.tolist() == [[list(c[:2]), list(c[2:])] for c in itertools.product(range(3), repeat=4)]
    with pytest.raises(NotImplementedError, match="10\\^4 joint states are more than 4096"):
        joint_states(10, (4,), torch.device("cpu"))


def test_a_sum_beside_a_latent_that_the_model_sums_out_is_refused():
    with pytest.raises(
        DeclarationError, match=r"latents\.c\.posterior\.estimator: expected score, because d is summed out"
    ):
        built({"c": {"codes": 3, "posterior": SUM}, "d": {"codes": 2}}, ["c", "d"])


def test_a_sum_beside_a_score_function_is_refused():
    with pytest.raises(DeclarationError, match=r"latents\.b\.posterior\.estimator: expected samples with a gradient"):
        built({"c": {"codes": 3, "posterior": SUM}, "b": {"bits": 2, "posterior": SCORED_BITS}}, ["c", "b"])


@pytest.mark.parametrize(
    ("marked", "message"),
    [
        (["model"], "c: expected draws beside b, which the model sums out given them"),
        ([], "b: expected a draw with a gradient, or a sum over its states too, beside c"),
    ],
)
def test_sums_of_two_kinds_are_refused_in_programs_written_by_hand(marked: list[str], message: str):
    def model(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3)), infer={"enumerate": "parallel"} if marked else None)
            c = pyro.sample("c", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(b + c, 1.0), obs=x)

    def guide(x):
        logits = pyro.param("logits", torch.zeros(3))
        with pyro.plate("data", len(x)):
            if not marked:
                pyro.sample("b", dist.Bernoulli(logits=logits[0]))
            pyro.sample("c", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})

    x = torch.randn(5)
    with pytest.raises(DeclarationError, match=message):
        Pair(model, guide).adopt(x).terms(x, expected=True)


# ---------------------------------------------------------------------- score functions

SCORED_BITS = {"kind": "bernoulli", "estimator": "score"}
SCORED: dict[str, dict[str, Any]] = {
    "bits": {"bits": 3, "posterior": SCORED_BITS},
    "grid": {"codes": 3, "grid": [2], "posterior": SCORE},
}
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


OBJECTIVES = {
    "trace": TraceELBO(),
    "particles": TraceELBO(particles=4),
    "mean field": TraceMeanFieldELBO(),
}


@every_scored
@pytest.mark.parametrize("baseline", ["none", "average", "network"])
@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_a_score_function_is_unbiased(latent, baseline, objective):
    # Along the exact gradient and 7 random directions, 4 standard errors of 200 means: one new seed in 1500 fails.
    pair, x = with_baseline(latent, baseline), rows(3).double()
    exact = without_baseline(pair, gradient(pair, -brute_force(pair, x).mean()))
    found = without_baseline(pair, gradients(pair, x, objective, 40))
    directions = torch.cat([exact[None], torch.randn(7, len(exact)).double()])
    gap = (found - exact) @ directions.T
    assert (gap.mean(0).abs() < 4 * gap.std(0) / len(gap) ** 0.5).all()
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
        found = gradients(pair, x, TraceELBO(), 1, 400)
        reached = torch.cat([torch.full((p.numel(),), n.startswith("guide.")) for n, p in pair.named_parameters()])
        noise[baseline] = float(found[:, reached].var(0).sum())
    pair = with_baseline(SCORED["grid"], "average")  # the mean of the others, whatever the average is
    found = gradients(pair, rows(3).double(), TraceELBO(particles=4), 1, 400)
    noise["others"] = 4 * float(found[:, reached].var(0).sum())
    assert noise["average"] < 0.2 * noise["none"]
    assert noise["others"] < 0.2 * noise["none"]


def steps(pair: Pair, x: Tensor, count: int, lr: float = 1e-2, objective: Objective | None = None) -> Step:
    loss = Loss(objective or TraceELBO(), pair, len(x))
    step = Step(loss, torch.optim.Adam(pair.parameters(), lr), "eager", x)
    for i in range(count):
        pyro.set_rng_seed(i)
        step(x)
    return step


def test_a_baseline_network_learns_the_gain():
    pair = declared({"bits": 4, "posterior": {**SCORED_BITS, "baseline": "network"}})
    x = rows(60)
    baseline = pair.guide.posteriors["c"]

    @torch.no_grad()
    def error() -> tuple[float, float]:
        gain = pair(x.repeat(20, 1)).reshape(20, 60).mean(0)
        foretold = baseline.infer({"x": pair.guide._encoded(x)})["baseline"]["baseline_value"]
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
    directions = torch.cat([exact[None], torch.randn(7, len(exact)).double()])
    gap = (found - exact) @ directions.T
    assert (gap.mean(0).abs() < 4 * gap.std(0) / len(gap) ** 0.5).all()
    assert gap[:, 0].std() > 0
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


# ---------------------------------------------------------------------- relaxations: the density


def relaxed(k: int, *lead: int, tau: float = 0.7, dtype: torch.dtype = torch.float64) -> RelaxedCodes:
    return RelaxedCodes(torch.randn(*lead, k, dtype=dtype), torch.tensor(tau, dtype=dtype), max(0, len(lead) - 1))


@pytest.mark.parametrize("k", [2, 3, 10])
@pytest.mark.parametrize("tau", [0.1, 0.7, 2.0])
def test_the_largest_entry_has_the_law_of_the_code(k, tau):
    # Chi-square of 20 000 draws at each of two positions: one new seed in 500 fails.
    q = relaxed(k, 1, 2, tau=tau)
    found = q.rsample((20_000,)).argmax(-1)[:, 0]
    for position in range(2):
        counts = found[:, position].bincount(minlength=k).numpy()
        want = 20_000 * q.logits[0, position].exp().numpy()
        assert scipy.stats.chisquare(counts, want).pvalue > 1e-3


@pytest.mark.parametrize("lead", [(4,), (4, 3), (4, 3, 2)])
def test_the_density_is_torch_s(lead):
    q = relaxed(5, *lead)
    value = q.rsample((7,))
    torch.testing.assert_close(value.exp().sum(-1), torch.ones(7, *lead, dtype=torch.float64))
    torch_s = ExpRelaxedCategorical(q.temperature, logits=q.logits, validate_args=False)
    want = (
        torch_s.log_prob(value).sum(tuple(range(1 - len(lead), 0)) or ()) if len(lead) > 1 else torch_s.log_prob(value)
    )
    torch.testing.assert_close(q.log_prob(value), want, rtol=1e-10, atol=1e-10)
    wide = q.expand((6, 4))
    assert wide.rsample().shape == (6, *lead, 5)
    assert (wide.rsample()[0] != wide.rsample()[1]).all()
    torch.testing.assert_close(wide.log_prob(value[:6]), want[:6], rtol=1e-10, atol=1e-10)
    assert q.expand((4,)) is q


@pytest.mark.parametrize("tau", [0.4, 1.0])
def test_the_density_integrates_to_one_in_coordinates_of_the_simplex(tau):
    axis = torch.linspace(-40, 40, 8001, dtype=torch.float64)
    density = relaxed(2, 1, tau=tau).log_prob(from_coordinates(axis[:, None])).exp()
    assert float(torch.trapezoid(density, axis)) == pytest.approx(1, abs=1e-6)
    axis = torch.linspace(-40, 40, 801, dtype=torch.float64)
    density = relaxed(3, 1, tau=tau).log_prob(from_coordinates(torch.cartesian_prod(axis, axis))).exp()
    total = torch.trapezoid(torch.trapezoid(density.reshape(801, 801), axis), axis)
    assert float(total) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("k", [2, 3, 7])
def test_coordinates_go_both_ways_and_change_the_volume_by_the_product(k):
    log_c = torch.randn(4, 3, k, dtype=torch.float64).mul(3).log_softmax(-1)
    u = to_coordinates(log_c)
    assert u.shape == (4, 3, k - 1)
    torch.testing.assert_close(from_coordinates(u), log_c, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(to_coordinates(torch.full((k,), -math.log(k)).double()), torch.zeros(k - 1).double())
    jacobian = torch.autograd.functional.jacobian(lambda u: from_coordinates(u).exp()[:-1], u[0, 0])
    assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(float(log_c[0, 0].sum()), abs=1e-9)


@pytest.mark.parametrize("tau", [0.1, 0.01])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_grids_stay_finite_in_single_precision(tau, scale):
    logits = (scale * torch.randn(50, 4, 4, 10)).requires_grad_()
    q = RelaxedCodes(logits, torch.tensor(tau), 2)
    value = q.rsample()
    assert value.isfinite().all()
    flat = value.reshape(50, -1).reshape(50, 4, 4, 10)
    score = q.log_prob(flat)
    assert score.isfinite().all()
    space = Space.codes(10, (4, 4))
    for hard in (False, True):
        seen = space.relaxed(is_hard=hard).see(flat, logits)
        assert seen.isfinite().all()
        (found,) = torch.autograd.grad(seen.square().sum() + score.sum(), logits, retain_graph=True)
        assert found.isfinite().all()
    back = to_coordinates(value)
    assert back.isfinite().all()
    assert from_coordinates(back).isfinite().all()


# ---------------------------------------------------------------------- relaxations: flow priors


def flow_pair(kind: str, grid: list[int] | None = None) -> Pair:
    latent = {"codes": 3, "prior": FLOWS[kind], "posterior": "relaxed_onehot"}
    return declared({**latent, **({} if grid is None else {"grid": grid})}, off=0.05)


every_flow = pytest.mark.parametrize("kind", FLOWS)


@every_flow
def test_a_flow_over_relaxed_codes_integrates_to_one(kind):
    axis = torch.linspace(-14, 14, 701)
    with torch.no_grad():
        p = flow_pair(kind).model.prior("c", {})
        density = p.log_prob(from_coordinates(torch.cartesian_prod(axis, axis))).double().exp().reshape(701, 701)
    total = torch.trapezoid(torch.trapezoid(density, axis.double()), axis.double())
    # The density of a spline has kinks at its knots, where the grid's own error is first order.
    assert float(total) == pytest.approx(1, abs=1e-3 if kind.startswith("spline") else 1e-4)


@every_flow
def test_what_a_flow_draws_is_what_it_scores(kind):
    # Marginals of 5000 draws by Kolmogorov-Smirnov: one new seed in 500 fails for a kind.
    axis = torch.linspace(-14, 14, 701)
    with torch.no_grad():
        p = flow_pair(kind).model.prior("c", {})
        density = p.log_prob(from_coordinates(torch.cartesian_prod(axis, axis))).double().exp().reshape(701, 701)
        draws = p.expand((5000,)).sample()
    assert draws.shape == (5000, 3)
    u = to_coordinates(draws).double()
    for d in range(2):
        integral = density.sum(1 - d).cumsum(0) * 0.04**2
        uniform = np.interp(u[:, d].numpy(), axis.double().numpy() + 0.02, integral.numpy())
        assert scipy.stats.kstest(uniform, "uniform").pvalue > 1e-3


def test_a_flow_over_a_grid_scores_what_it_draws_and_has_no_twin():
    pair = flow_pair("realnvp", [2, 2])
    assert pair.layout.relaxed == ()
    assert pair.check(rows()) == []
    with torch.no_grad():
        draws = pair.model.prior("c", {}).expand((4,)).sample((2,))
        assert draws.shape == (2, 4, 2, 2, 3)
        assert pair.model.prior("c", {}).log_prob(draws).isfinite().all()
    assert "relaxed_elbo" not in evaluate(pair, rows(), 0)


def test_a_flow_improves_the_elbo_over_even_codes():
    # Two prototypes, 9 in 10 rows of the first: 20 standard errors apart, so that no new seed fails.
    torch.manual_seed(0)
    first = torch.tensor([1.0, 1, 1, 0, 0, 0])
    x = torch.where(torch.rand(600, 1) < 0.9, first, 1 - first)
    x = torch.where(torch.rand(600, X) < 0.05, 1 - x, x)
    bound = {}
    for name, prior in (("uniform", "uniform"), ("flow", FLOWS["realnvp"])):
        pair = built({"c": {"codes": 3, "prior": prior, "posterior": "relaxed_onehot"}})
        steps(pair, x, 400)
        with torch.no_grad():
            pyro.set_rng_seed(9)
            terms = pair.terms(x, particles=50)
        bound[name] = (terms.reconstruction - terms.kl["c"]).mean(0)
    gain = bound["flow"] - bound["uniform"]
    assert float(gain.mean()) > 0.1
    assert float(gain.mean()) > 10 * float(gain.std()) / len(gain) ** 0.5


def test_a_density_of_relaxed_codes_prices_no_categoricals():
    with pytest.raises(
        DeclarationError, match="latents.c.posterior.kl: expected relaxed, because the prior realnvp is a"
    ):
        built({"c": {"codes": 3, "prior": FLOWS["realnvp"], "posterior": "straight_through"}})


def test_a_point_has_no_relaxed_density():
    with pytest.raises(DeclarationError, match='expected kl = "categorical" without noise'):
        built({"c": {"codes": 3, "posterior": {"kind": "straight_through", "noise": False, "kl": "relaxed"}}})


# ---------------------------------------------------------------------- relaxations: their limit


def twin(latent: Mapping[str, Any], posterior: Mapping[str, Any], pair: Pair) -> Pair:
    """The pair with the discrete posterior and the same weights."""
    other = built({"c": {**{k: v for k, v in latent.items() if k != "temperature"}, "posterior": dict(posterior)}})
    other = other.to(next(pair.parameters()).dtype)
    weights = {name: value for name, value in pair.state_dict().items() if "temperatures" not in name}
    other.load_state_dict(weights)
    return other


RELAXED = {
    "one": {"codes": 4, "posterior": "relaxed_onehot"},
    "grid": {**GRID, "posterior": "relaxed_onehot"},
    "categorical": {**GRID, "posterior": {"kind": "relaxed_onehot", "kl": "categorical"}},
    "straight": {**GRID, "embedding": 3, "posterior": "straight_through"},
}
every_relaxed = pytest.mark.parametrize("latent", RELAXED.values(), ids=list(RELAXED))


@every_relaxed
def test_the_twin_is_the_categorical_posterior_of_the_same_weights(latent):
    pair = declared(latent)
    other = twin(latent, {**SCORE, "baseline": "none"}, pair)
    assert pair.layout.relaxed == ("c",)
    found, want = evaluate(pair, rows(50), 3), evaluate(other, rows(50), 3)
    assert found.pop("relaxed_elbo") != found["elbo"]
    assert found == pytest.approx(want, abs=1e-5)
    pyro.set_rng_seed(3)
    with Discretised():
        ours = pair.terms(rows(50))
    pyro.set_rng_seed(3)
    theirs = other.terms(rows(50))
    torch.testing.assert_close(ours.kl["c"], theirs.kl["c"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.reconstruction, theirs.reconstruction, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("noise", [True, False])
def test_a_code_that_is_summed_out_leaves_the_kl_of_a_relaxed_one(noise):
    latent = {"codes": 4, "grid": [3], "prior": "uniform", "posterior": {"kind": "straight_through", "noise": noise}}
    table = {"latents": {"k": latent}, "encoder": NETWORK, "decoder": NETWORK}
    alone = Experiment.from_dict(table).build((X,))
    latents = {"k": latent, "c": {"codes": 3, "posterior": "exact"}}
    beside = Experiment.from_dict({**table, "latents": latents, "decoder": {**NETWORK, "given": ["k", "c"]}}).build(
        (X,)
    )
    beside.guide.load_state_dict(alone.guide.state_dict())
    x = rows(20)
    assert beside.layout.enumerated == ("c",)
    pyro.set_rng_seed(3)
    want = alone.terms(x).kl["k"]
    pyro.set_rng_seed(3)
    found = beside.terms(x).kl["k"]
    torch.testing.assert_close(found, want)
    if not noise:
        torch.testing.assert_close(found, torch.full((20,), 3 * math.log(4)))


PRICED: dict[str, tuple[dict[str, Any], str]] = {
    "iwae": (
        {"latents": {"k": {"codes": 4, "posterior": "straight_through"}}, "objective": "iwae"},
        r"latents.k.posterior.kl: expected relaxed with iwae, whose weights are densities",
    ),
    "a parent that is summed out": (
        {
            "latents": {
                "c": {"codes": 3, "posterior": "exact"},
                "k": {"codes": 4, "grid": [3], "given": ["c"], "prior": "transformer", "posterior": "straight_through"},
            },
            "decoder": {**NETWORK, "given": ["c", "k"]},
        },
        r"latents.k.posterior: expected one of codes .*, because p\(k\) reads c, which is summed out; or samples of c",
    ),
    "a parent inferred from it": (
        {
            "latents": {
                "k": {"codes": 4, "grid": [3], "given": ["z"], "prior": "transformer", "posterior": "straight_through"},
                "z": {"dim": 2, "posterior": {"kind": "normal", "given": ["x", "k"]}},
            },
            "encoder": {"kind": "per_latent", **NETWORK},
            "decoder": {**NETWORK, "given": ["k", "z"]},
        },
        r"latents.k.posterior: expected one of codes .*infers z from k while the model has k given z",
    ),
}


@pytest.mark.parametrize("case", [case for case in PRICED if case != "iwae"])
def test_a_prior_that_ignores_its_parents_prices_codes_all_the_same(case):
    changes = copy.deepcopy(PRICED[case][0])
    changes["latents"]["k"]["prior"] = "uniform"
    Experiment.from_dict({"encoder": NETWORK, "decoder": NETWORK, **changes})


@pytest.mark.parametrize("case", PRICED)
def test_the_kl_of_codes_is_refused_where_it_is_no_term_of_a_bound(case):
    changes, message = PRICED[case]
    table = {"latents": {}, "encoder": NETWORK, "decoder": NETWORK, **changes}
    with pytest.raises(DeclarationError, match=message):
        Experiment.from_dict(table)


class Side(torch.nn.Module):
    """One side of a mixture of three normals, whose code the guide sums over; its site stands under a handler."""

    def __init__(self, around: Callable[[], Any], *, outside: bool, is_model: bool) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(3) if is_model else torch.tensor([0.3, 0.1, -0.5]))
        self.around, self.outside, self.is_model = around, outside, is_model

    def forward(self, x: Tensor) -> None:
        data = pyro.plate("data", len(x))
        infer: Any = {} if self.is_model else {"enumerate": "parallel"}
        with contextlib.nullcontext() if self.outside else data, self.around():
            c = pyro.sample("c", dist.Categorical(logits=self.logits), infer=infer)
        if self.is_model:
            with data:
                loc = torch.tensor([-1.0, 0.5, 2.0])[c].unsqueeze(-1)
                pyro.sample("x", dist.Normal(loc, torch.ones(X)).to_event(1), obs=x)


def three(around: Callable[[], Any] = contextlib.nullcontext, *, outside: bool = False) -> Pair:
    return Pair(*(Side(around, outside=outside, is_model=is_model) for is_model in (True, False)))


LAST_OUT: Any = torch.arange(20) < 19
NOT_SUMMED = {
    "weighed": (lambda: three(lambda: poutine.scale(scale=0.3)), "without poutine.scale; got a scale of 0.3"),
    "masked": (lambda: three(lambda: poutine.mask(mask=LAST_OUT)), "without a mask; got one"),
    "global": (lambda: three(outside=True), "inside the data plate; got a global one"),
}


@pytest.mark.parametrize("case", NOT_SUMMED)
def test_a_site_that_cannot_be_summed_over_row_by_row_is_refused(case):
    make, message = NOT_SUMMED[case]
    with pytest.raises(DeclarationError, match=message):
        make().terms(rows(20), expected=True)
    plain = three()
    theirs = TraceEnum_ELBO(max_plate_nesting=1).loss(plain.model, plain.guide, rows(20)) / 20
    assert float(plain(rows(20)).detach().mean()) == pytest.approx(-theirs, rel=1e-5)


@pytest.mark.parametrize("posterior", ["relaxed_onehot", "straight_through"])
@pytest.mark.parametrize("prior", ["categorical", "uniform"])
def test_the_categorical_kl_is_torch_s(posterior, prior):
    pair = declared({**GRID, "prior": prior, "posterior": {"kind": posterior, "kl": "categorical"}}).double()
    x = rows().double()
    guide, model = pair.traces(x)
    q, p = guide.nodes["c"]["fn"], model.nodes["c"]["fn"]
    want = kl_divergence(Categorical(logits=q.logits), Categorical(logits=p.logits)).sum((-1, -2))
    torch.testing.assert_close(pair.terms(x).kl["c"], want, rtol=1e-10, atol=1e-10)
    assert pair.terms(x, particles=3).kl["c"].shape == (3, 5)


def at_temperature(latent: Mapping[str, Any], tau: float) -> Pair:
    """A relaxed pair with a linear decoder, in double precision."""
    decoder = {
        "network": {"kind": "mlp", "hidden": []},
        "likelihood": {"kind": "normal", "scale": "fixed", "value": 1.0},
    }
    table = {"latents": {"c": {**latent, "temperature": tau}}, "encoder": NETWORK, "decoder": decoder}
    pair = Experiment.from_dict(table).build((X,)).double()
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.add_(0.7 * torch.randn_like(parameter))
    return pair


def test_the_bias_of_a_relaxation_vanishes_with_its_temperature():
    # Bias of minus the ELBO in nats, and of its gradient relative to the exact one; means over 180 000 draws:
    # temperature     1       .5      .1      .02
    # bound        -1.633   -.963   -.206   -.039     each +- .003
    # gradient       .535    .345    .074    .018     each +- .002 to .02
    # Both fall in proportion to the temperature in the end; the limits below are 8 standard errors away.
    x, bound, slope = rows(3).double(), [], []
    for tau in (1.0, 0.5, 0.1, 0.02):
        pair = at_temperature({"codes": 3, "posterior": {"kind": "relaxed_onehot", "kl": "categorical"}}, tau)
        exact = exact_relaxed(pair, x)
        want = gradient(pair, exact)
        loss = minus_elbo(pair, x.repeat(60_000, 1))
        bound.append(abs(float((loss - exact).detach())))
        slope.append(float((gradient(pair, loss) - want).norm() / want.norm()))
    assert bound == pytest.approx([1.633, 0.963, 0.206, 0.039], abs=0.03)
    assert all(small < 0.75 * large for large, small in itertools.pairwise(bound))
    assert all(small < 0.75 * large for large, small in itertools.pairwise(slope))
    assert slope[0] > 0.5
    assert slope[2] < 0.1
    assert slope[3] < 0.06


def exact_relaxed(pair: Pair, x: Tensor) -> Tensor:
    """Minus the ELBO of the discrete twin, by the sum over codes."""
    with Discretised():
        return -brute_force(pair, x).mean()


def test_straight_through_is_hard_ahead_and_soft_behind():
    pair = declared(RELAXED["straight"]).double()
    site = pair.guide.sites[0]
    q = pair.guide_trace(rows().double()).nodes["c"]["fn"]
    value = q.rsample().detach().requires_grad_()
    book = pair.model.codebooks["c"].table.detach()
    way = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    hard, soft = (replace(site, hard=h).see(value, value, None) for h in (True, False))
    want = torch.nn.functional.one_hot(value.argmax(-1), 3).movedim(-1, 1)
    assert torch.equal(hard, want.double())  # to the last bit
    found = [torch.autograd.grad((seen * way).sum(), value)[0] for seen in (hard, soft)]
    assert torch.equal(*found)
    seen = site.see(value, value, book)
    assert torch.equal(seen, book[value.argmax(-1)].movedim(-1, 1))


def test_straight_through_with_noise_draws_from_the_posterior():
    # Chi-square of 20 000 draws: one new seed in 1000 fails.
    pair = declared({"codes": 4, "posterior": "straight_through"})
    x = rows(1).repeat(20_000, 1)
    with torch.no_grad():
        seen = pair.guide(x)["c"]
        q = pair.guide_trace(rows(1)).nodes["c"]["fn"]
    assert ((seen == 0) | (seen == 1)).all()
    assert scipy.stats.chisquare(seen.sum(0).numpy(), 20_000 * q.logits[0].exp().numpy(), sum_check=False).pvalue > 1e-3


def test_straight_through_without_noise_is_a_point_priced_by_the_prior():
    pair, x = declared(ENGINES["straight_through, no noise"].latent), rows()
    terms, again = pair.terms(x), pair.terms(x)
    assert torch.equal(terms.kl["c"], again.kl["c"])
    assert torch.equal(terms.reconstruction, again.reconstruction)
    guide, model = pair.traces(x)
    index = guide.nodes["c"]["value"].argmax(-1)
    assert torch.equal(index, guide.nodes["c"]["fn"].logits.argmax(-1))
    log_p = model.nodes["c"]["fn"].logits.expand(5, 2, 2, 3)
    want = -log_p.gather(-1, index[..., None]).sum((1, 2, 3))
    torch.testing.assert_close(terms.kl["c"], want)
    with Discretised():
        discrete = pair.terms(x)
    torch.testing.assert_close(discrete.kl["c"], want)
    torch.testing.assert_close(discrete.reconstruction, terms.reconstruction)


@every_relaxed
def test_prior_and_posterior_have_one_temperature(latent):
    pair = declared({**latent, "temperature": 0.3})
    assert float(pair.state_dict()["model.temperatures.c.value"]) == pytest.approx(0.3)
    pair.model.temperatures["c"].value.fill_(0.9)
    guide, model = pair.traces(rows())
    assert float(guide.nodes["c"]["fn"].temperature) == pytest.approx(0.9)
    assert float(model.nodes["c"]["fn"].temperature) == pytest.approx(0.9)


def test_a_temperature_follows_its_schedule(tmp_path):
    schedule = {"kind": "exponential", "start": 1.0, "end": 0.25}
    experiment = small({"codes": 4, "posterior": "relaxed_onehot", "temperature": schedule}, epochs=2, keep="last")
    run = fitted(experiment, tmp_path)
    last = Exponential(start=1.0, end=0.25).at(2 - 1 / 5, 2)  # filled before the last of ten steps
    assert float(run.pair.model.temperatures["c"].value) == pytest.approx(last, rel=1e-6)


def small(latent: Mapping[str, Any], **train: Any) -> Experiment:
    """A declaration of one latent of digits that is fitted in a moment."""
    train = {"epochs": 2, "batch_size": 20, "engine": "eager", **train}
    decoder = {**NETWORK, "likelihood": {"kind": "bernoulli"}}
    table = {"latents": {"c": dict(latent)}, "encoder": NETWORK, "decoder": decoder, "train": train}
    return Experiment.from_dict({**table, "data": {"source": "tensor"}})


def fitted(experiment: Experiment, where: Path) -> pvae.Run:
    data = Dataset.from_tensors(rows(100), validation=rows(30), test=rows(30))
    return pvae.fit(experiment, data=data, run_dir=where, device="cpu", progress=False)


# ---------------------------------------------------------------------- nearest codes: the codebook


def book(codes: int = 8, width: int = 3, **changes: Any) -> NearestCodebook:
    settings: dict[str, Any] = {"decay": 0.9, "restart": 0.0, "unit": False, **changes}
    return NearestCodebook(codes, width, **settings)


def drawn(n: int, width: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("unit", [False, True])
def test_the_nearest_code_is_brute_force_s(unit, monkeypatch):
    found = book(50, 4, unit=unit)
    with torch.no_grad():
        found.weight.copy_(drawn(50, 4, 1))
    z = found.place(drawn(600, 4)).reshape(20, 30, 4)
    want = (z[:, :, None].double() - found.table.double()).square().sum(-1).argmin(-1)
    assert torch.equal(found.nearest(z), want)
    if unit:
        assert torch.equal(torch.einsum("bie,ke->bik", z.double(), found.table.double()).argmax(-1), want)
        torch.testing.assert_close(found.table.norm(dim=1), torch.ones(50))
    monkeypatch.setattr("pvae.nn.codebook.BLOCK", 50 * 7)  # in parts of seven vectors
    assert torch.equal(found.nearest(z), want)


def by_hand(rows: np.ndarray, counts: np.ndarray, sums: np.ndarray, z: np.ndarray, decay: float) -> tuple[Any, ...]:
    """One step of the averages."""
    index = ((z[:, None] - rows) ** 2).sum(-1).argmin(1)
    hit = np.eye(len(rows))[index]
    counts = decay * counts + (1 - decay) * hit.sum(0)
    sums = decay * sums + (1 - decay) * hit.T @ z
    smooth = (counts + SMOOTHING) / (counts.sum() + len(rows) * SMOOTHING) * counts.sum()
    return sums / smooth[:, None], counts, sums


def test_averages_follow_the_formula():
    found = book().double()
    rows, counts, sums = (t.numpy().copy() for t in (found.weight, found.counts, found.sums))
    for i in range(5):
        z = drawn(40, 3, i).double()
        before = found.weight.clone()
        found.nearest(z.reshape(4, 10, 3))
        assert torch.equal(found.weight, before)
        found.after_step()
        rows, counts, sums = by_hand(rows, counts, sums, z.numpy(), 0.9)
        for ours, want in ((found.weight, rows), (found.counts, counts), (found.sums, sums)):
            np.testing.assert_allclose(ours.numpy(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("unit", [False, True])
def test_averages_are_vector_quantize_pytorch_s(unit):
    settings = {"commitment_weight": 0.25, "threshold_ema_dead_code": 0, "kmeans_init": False, "eps": SMOOTHING}
    peer = VectorQuantize(5, 12, decay=0.9, use_cosine_sim=unit, rotation_trick=False, **settings)
    found = book(12, 5, unit=unit)
    start = found.place(drawn(12, 5, 1))
    for table in (found.weight, found.sums, peer._codebook.embed[0], peer._codebook.embed_avg[0]):
        table.copy_(start)
    for i in range(8):
        z = found.place(drawn(60, 5, i + 2)).reshape(4, 15, 5)
        rows = found.table.clone()
        through, index, commitment = peer(z)
        ours = found.nearest(z)
        assert torch.equal(ours, index)
        torch.testing.assert_close(rows[ours], through, rtol=1e-5, atol=1e-5)
        loss = 0.25 * (z - rows[ours]).square().mean()
        torch.testing.assert_close(loss, commitment.squeeze(), rtol=1e-5, atol=1e-6)
        found.after_step()
        torch.testing.assert_close(found.table, peer._codebook.embed[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.counts, peer._codebook.cluster_size[0], rtol=1e-5, atol=1e-5)
    assert (found.table - start).abs().max() > 0.05


@pytest.mark.parametrize("decay", [0.9, None])
def test_dead_rows_move_to_vectors_of_the_batch_and_no_other(decay):
    found, z = book(8, 3, decay=decay, restart=0.125), drawn(64)  # an even share is 8 vectors, an eighth of it 1
    with torch.no_grad():
        found.weight[:4] = z[:4]
        found.weight[4:] = 100.0 + drawn(4, 3, 1)  # too far to be found
        found.counts.copy_(torch.tensor([9.0, 9, 9, 9, 0.5, 9, 0.9, 9]))
        if decay is not None:
            found.sums.copy_(found.weight * found.counts[:, None])
    before = found.weight.detach().clone()
    alive = copy.deepcopy(found)
    alive.restart = 0.0
    for one in (found, alive):
        one.nearest(z)
        one.after_step()
    still = [0, 1, 2, 3, 5, 7]
    torch.testing.assert_close(found.weight[still], alive.weight[still], rtol=0, atol=0)
    for row in (4, 6):
        assert (found.weight[row] == z).all(1).any()
        assert (alive.weight[row] - before[row]).abs().max() < 0.01
        assert found.counts[row] == 8.0
        if decay is not None:
            torch.testing.assert_close(found.sums[row], 8 * found.weight[row])


def test_codes_stay_where_they_are_found_with_fewer_vectors_than_codes():
    centres = 3 * drawn(128, 8, 1)
    found = book(128, 8, decay=0.99, restart=NearestCodePosterior.model_fields["restart"].default)
    with torch.no_grad():
        found.weight.copy_(centres)
        found.counts.fill_(40 / 128)
        found.sums.copy_(centres * found.counts[:, None])
    for step in range(400):
        found.nearest(centres[(torch.arange(40) + 40 * step) % 128] + 0.01 * drawn(40, 8, step))
        found.after_step()
    torch.testing.assert_close(found.weight, centres, rtol=0, atol=0.02)


@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_moves_nothing(decay, bad):
    found, z = book(8, 3, decay=decay, restart=0.5), drawn(64)
    with torch.no_grad():
        found.counts.copy_(torch.tensor([0.01] * 4 + [0.5] * 4))  # four would be restarted
    before = {name: value.clone() for name, value in found.state_dict().items()}
    z[7, 1] = bad
    found.nearest(z)
    found.after_step()
    assert same(before, found.state_dict())
    found.nearest(drawn(64))
    found.after_step()
    assert not same(before, found.state_dict())
    assert all(value.isfinite().all() for value in found.state_dict().values())


def test_nothing_moves_without_a_batch():
    found = book(8, 3, restart=0.5)
    found.nearest(drawn(64))
    found.after_step()
    before = {name: value.clone() for name, value in found.state_dict().items()}
    found.after_step()  # the same batch does not count twice
    found.eval()
    found.nearest(drawn(64, 3, 1))
    found.after_step()
    assert same(before, found.state_dict())


@pytest.mark.parametrize("unit", [False, True])
def test_k_means_finds_the_centres(unit):
    centres = torch.tensor([[4.0, 0, 0], [0, 4, 0], [0, 0, 4], [-4, 0, 0]])
    which = torch.arange(400) % 4
    which = torch.where(torch.arange(400) < 100, 0, which)  # 175 of the first, 75 of each other
    z = centres[which] + 0.05 * drawn(400)
    found = book(4, 3, unit=unit)
    found.start(z, seed=0, batch=40)
    order = (centres[:, None] - 4 * found.table if unit else centres[:, None] - found.table).square().sum(-1).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    if not unit:
        want = torch.stack([z[which == k].mean(0) for k in range(4)])
        torch.testing.assert_close(found.table[order], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.counts[order], torch.tensor([17.5, 7.5, 7.5, 7.5]))
    torch.testing.assert_close(found.sums, found.weight * found.counts[:, None])
    again = book(4, 3, unit=unit)
    again.start(z, seed=0, batch=40)
    assert torch.equal(again.table, found.table)


# ---------------------------------------------------------------------- nearest codes: in a pair

NEAREST = {"codes": 6, "grid": [2, 2], "embedding": 5, "prior": "uniform"}


def nearest(off: float = 0.3, **posterior: Any) -> Pair:
    pair = declared({**NEAREST, "posterior": {"kind": "nearest_code", **posterior}}, off=off).double()
    with torch.no_grad():
        pair.model.codebooks["c"].weight.normal_().mul_(0.5)
    return pair


def test_the_gradient_at_z_is_the_decoder_s_at_its_code():
    pair, x = nearest(commitment=0.0), rows().double()
    guide, model = pair.traces(x)
    point = guide.nodes["c/embedded"]["infer"]["point"]
    (found,) = torch.autograd.grad(model.nodes["x"]["fn"].log_prob(x).sum(), point)
    index = guide.nodes["c"]["value"]
    row = pair.model.codebooks["c"].table[index].movedim(-1, 1).clone().requires_grad_()
    assert torch.equal(guide.nodes["c/embedded"]["value"], row)  # to the last bit
    (want,) = torch.autograd.grad(pair.model.decoder({"c": row}).log_prob(x).sum(), row)
    assert torch.equal(found, want)
    assert float(found.abs().min()) > 0
    z = point.movedim(1, -1)
    assert torch.equal(index, (z[..., None, :] - pair.model.codebooks["c"].table).square().sum(-1).argmin(-1))


def test_only_the_codebook_loss_moves_a_codebook_by_gradients():
    pair, x = nearest(gradient=True), rows().double()
    terms = pair.terms(x)
    guide, _ = pair.traces(x)
    weight = pair.model.codebooks["c"].weight
    encoder = next(pair.guide.parameters())
    z = guide.nodes["c/embedded"]["infer"]["point"]
    e = weight[guide.nodes["c"]["value"]].movedim(-1, 1)
    distance = (z - e).square().sum((1, 2, 3))
    assert set(terms.penalties) == {"c/commitment", "c/codebook"}
    torch.testing.assert_close(terms.penalties["c/commitment"], 0.25 * distance)
    torch.testing.assert_close(terms.penalties["c/codebook"], distance)

    def slope(value: Tensor, of: Tensor) -> Tensor | None:
        return torch.autograd.grad(value.sum(), of, retain_graph=True, allow_unused=True)[0]

    assert slope(terms.reconstruction, weight) is None
    assert slope(terms.penalties["c/commitment"], weight) is None
    assert slope(terms.penalties["c/codebook"], encoder) is None
    torch.testing.assert_close(slope(terms.penalties["c/codebook"], weight), slope(distance, weight))
    torch.testing.assert_close(slope(terms.penalties["c/commitment"], encoder), 0.25 * slope(distance, encoder))


def test_averages_have_no_codebook_loss():
    pair = nearest(commitment=0.5)
    assert set(pair.terms(rows().double()).penalties) == {"c/commitment"}
    assert "model.codebooks.c.weight" not in dict(pair.named_parameters())


@pytest.mark.parametrize("closed_form", [False, True])
def test_a_certain_code_costs_positions_times_log_k(closed_form):
    pair, x = nearest(), rows().double()
    kl = pair.terms(x, closed_form=closed_form).kl["c"]
    assert (kl == kl[0]).all()
    assert float(kl[0]) == pytest.approx(4 * math.log(6), abs=1e-6)
    assert evaluate(pair, x, 0)["kl/c"] == pytest.approx(4 * math.log(6), abs=1e-6)


def test_the_evenness_loss_is_that_of_mean_soft_assignments():
    pair, x = nearest(evenness=0.7, softness=0.3), rows().double()
    guide, _ = pair.traces(x)
    z = guide.nodes["c/embedded"]["infer"]["point"].movedim(1, -1).reshape(-1, 5).detach().numpy()
    table = pair.model.codebooks["c"].table.numpy()
    score = -((z[:, None] - table) ** 2).sum(-1) / (0.3 * (z**2).sum(1).mean())
    share = np.exp(score - score.max(1, keepdims=True))
    share = (share / share.sum(1, keepdims=True)).mean(0)
    want = 0.7 * 4 * (math.log(6) - scipy.stats.entropy(share))
    np.testing.assert_allclose(pair.terms(x).penalties["c/evenness"].detach().numpy(), want, rtol=1e-5)


def test_a_child_of_a_nearest_code_reads_its_row():
    latents = {
        "c": {**NEAREST, "posterior": "nearest_code"},
        "z": {
            "dim": 2,
            "given": ["c"],
            "prior": {"kind": "conditional_normal", **NETWORK},
            "posterior": {"kind": "normal", "given": ["x", "c"]},
        },
    }
    pair = built(latents, ["z"])
    assert pair.check(rows()) == []
    minus_elbo(pair, rows(100)).backward()
    require_gradients(pair)
    assert pair.terms(rows(), particles=3).kl["z"].shape == (3, 5)
    assert "c/embedded" not in pair.layout.latents


@pytest.mark.parametrize("gradient", [False, True])
def test_a_fit_goes_on_bit_for_bit_in_the_middle_of_an_epoch(tmp_path, gradient):
    latent = {**NEAREST, "posterior": {"kind": "nearest_code", "decay": 0.8, "gradient": gradient}}
    data = Dataset.from_tensors(rows(100), validation=rows(30), test=rows(30))
    done = assert_resumes_exactly(small(latent, checkpoint_seconds=0.0), tmp_path, 7, data=data)
    assert (everything(done)["weights/model.codebooks.c.counts"] != 1).any()


def test_a_fit_starts_at_k_means_and_moves_from_there(tmp_path):
    run = fitted(small({**NEAREST, "posterior": "nearest_code"}, keep="last"), tmp_path)
    first = min((run.path / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert first
    book = run.pair.model.codebooks["c"]
    start = NearestCodebook(6, 5, 0.99, 1.0, False)
    fresh = small({**NEAREST, "posterior": "nearest_code"}).build((X,))
    begin(fresh, run.data.train, 20, 0)
    assert not torch.equal(fresh.model.codebooks["c"].weight, book.weight)
    assert float(fresh.model.codebooks["c"].counts.sum()) == pytest.approx(80, abs=1e-3)
    guide = fresh.guide_trace(run.data.train.x)
    z = guide.nodes["c/embedded"]["infer"]["point"].movedim(1, -1).reshape(-1, 5)
    index = guide.nodes["c"]["value"].reshape(-1)
    for k in range(6):  # every row is the mean of what is nearest to it
        torch.testing.assert_close(fresh.model.codebooks["c"].weight[k], z[index == k].mean(0), rtol=1e-4, atol=1e-4)
    del start


def test_a_second_stage_leaves_the_codebook_alone(tmp_path):
    run = fitted(small({**NEAREST, "posterior": "nearest_code"}), tmp_path)
    second = refit(run, "latents.c.prior.kind=categorical", device="cpu", progress=False)
    one, two = state(run.pair), state(second.pair)
    moved = [name for name in one if not torch.equal(one[name], two[name])]
    assert moved == []
    assert "model.priors.c.logits" in two
    assert two["model.priors.c.logits"].abs().max() > 0


# ---------------------------------------------------------------------- compiled


COMPILED = {
    "draws": {
        "c": {**NEAREST, "posterior": "nearest_code"},
        "r": {"codes": 4, "grid": [2], "posterior": "relaxed_onehot"},
        "s": {"bits": 3, "posterior": SCORED_BITS},
        "t": {"codes": 3, "grid": [2], "posterior": {**SCORE, "baseline": "network"}},
    },
    "sum": {"c": {"codes": 3, "posterior": SUM}, "h": {"codes": 4, "posterior": "straight_through"}},
}


@pytest.mark.parametrize("latents", COMPILED.values(), ids=list(COMPILED))
def test_a_compiled_step_is_the_eager_one(latents):
    x = rows(40)
    found = []
    for engine in ("eager", "compiled"):
        pair = built(latents, list(latents))
        with pyro.validation_enabled(False):
            step = Step(Loss(TraceELBO(), pair, 40), torch.optim.SGD(pair.parameters(), 0.05), engine, x)
            figures = []
            for i in range(4):
                pyro.set_rng_seed(i)
                figures.append(step(x).clone())
        found.append((pair, torch.stack(figures)))
    (eager, one), (compiled, two) = found
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
    fresh = state(built(latents, list(latents)))
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-3, atol=1e-4)
        if name.endswith(("counts", "sums", "average.value", "weight")):
            assert not torch.equal(compiled.state_dict()[name], fresh[name]), name
