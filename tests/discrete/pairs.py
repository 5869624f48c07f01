"""Pairs with discrete latents, one for every engine, and what their losses must be."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, typeddict-item, union-attr"

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Categorical

import pvae
from pvae.data import Dataset
from pvae.distributions.relaxed import RelaxedCodes
from pvae.experiment.experiment import Experiment
from pvae.objectives.base import Loss, Objective
from pvae.objectives.elbo import TraceELBO
from pvae.pair.pair import Pair
from pvae.training.step import Step
from tests.laws import shake

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
    """True where the same x has the same code at every draw."""
    moves: bool = False
    """True where a step moves buffers of the pair."""


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
    "nearest_code, rotation": Engine(
        {"codes": 6, "grid": [3], "embedding": 5, "posterior": {"kind": "nearest_code", "passes": "rotation"}},
        (5, 3),
        certain=True,
        moves=True,
    ),
    "finite_scalar": Engine(
        {"codes": 12, "grid": [2, 2], "posterior": {"kind": "finite_scalar", "levels": [4, 3]}}, (2, 2, 2), certain=True
    ),
    "lookup_free": Engine(
        {"codes": 8, "grid": [2, 2], "posterior": {"kind": "lookup_free", "sharpness": 1.0}}, (3, 2, 2), certain=True
    ),
    "simvq": Engine(
        {"codes": 6, "grid": [2, 2], "embedding": 5, "posterior": {"kind": "simvq", "passes": "rotation"}},
        (5, 2, 2),
        certain=True,
    ),
    "residual": Engine(
        {"codes": 6, "grid": [2, 2], "embedding": 5, "posterior": {"kind": "residual", "depth": 3}},
        (5, 2, 2),
        certain=True,
        moves=True,
    ),
    "residual, shared, gradient": Engine(
        {"codes": 6, "embedding": 5, "posterior": {"kind": "residual", "depth": 2, "shared": True, "gradient": True}},
        (5,),
        certain=True,
        moves=True,
    ),
    "grouped": Engine(
        {"codes": 6, "grid": [2], "embedding": 6, "posterior": {"kind": "grouped", "groups": 3, "passes": "rotation"}},
        (6, 2),
        certain=True,
        moves=True,
    ),
}
QUANTISERS = {name: engine for name, engine in ENGINES.items() if engine.certain and "noise" not in name}
every_engine = pytest.mark.parametrize("engine", ENGINES.values(), ids=list(ENGINES))


def built(latents: Mapping[str, Any], given: Sequence[str] | None = None, **more: Any) -> Pair:
    decoder = {**NETWORK, "likelihood": {"kind": "bernoulli"}, **({} if given is None else {"given": list(given)})}
    table = {"latents": latents, "encoder": NETWORK, "decoder": decoder, **more}
    return Experiment.from_dict(table).build((X,))


def declared(latent: Mapping[str, Any], off: float = 0.3, **more: Any) -> Pair:
    """A pair of one latent, off its start, so that prior and posterior differ in every code."""
    pair = built({"c": dict(latent)}, **more)
    torch.manual_seed(7)
    shake(pair, off)
    return pair


def rows(n: int = 5) -> Tensor:
    return (torch.rand(n, X, generator=torch.Generator().manual_seed(0)) > 0.5).float()


def minus_elbo(pair: Pair, x: Tensor, objective: Objective | None = None) -> Tensor:
    objective = objective or TraceELBO()
    return objective.loss(objective.terms(pair, x), ONE.to(x))


def gradient(pair: Pair, loss: Tensor) -> Tensor:
    """Gradients of all parameters in a row; zero for a parameter that plays no part."""
    parameters = list(pair.parameters())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([g.flatten() for g in flat])


def state(pair: Pair) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in pair.state_dict().items()}


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        torch.allclose(value, two[name], rtol=0, atol=0, equal_nan=True) for name, value in one.items()
    )


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


def summed(latents: dict[str, Any], given: list[str] | None, dtype: torch.dtype) -> tuple[Pair, Tensor]:
    pair = built(latents, given).to(dtype)
    torch.manual_seed(7)
    shake(pair, 0.3)
    return pair, rows().to(dtype)


def require_same(pair: Pair, one: Tensor, two: Tensor, tolerance: float) -> None:
    """Equal values and gradients."""
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradient(pair, one), gradient(pair, two), rtol=20 * tolerance, atol=10 * tolerance)


WITH_VECTOR = {
    "c": {"codes": 3, "posterior": "categorical"},
    "z": {
        "dim": 2,
        "given": ["c"],
        "prior": {"kind": "conditional_normal", **NETWORK},
        "posterior": {"kind": "normal", "given": ["x", "c"]},
    },
}
SCORED_BITS = {"kind": "bernoulli", "estimator": "score"}
SCORED: dict[str, dict[str, Any]] = {
    "bits": {"bits": 3, "posterior": SCORED_BITS},
    "grid": {"codes": 3, "grid": [2], "posterior": SCORE},
}


def steps(pair: Pair, x: Tensor, count: int, lr: float = 1e-2, objective: Objective | None = None) -> Step:
    loss = Loss(objective or TraceELBO(), pair, len(x))
    step = Step(loss, torch.optim.Adam(pair.parameters(), lr), "eager", x)
    for i in range(count):
        pyro.set_rng_seed(i)
        step(x)
    return step


def relaxed(k: int, *lead: int, tau: float = 0.7, dtype: torch.dtype = torch.float64) -> RelaxedCodes:
    return RelaxedCodes(torch.randn(*lead, k, dtype=dtype), torch.tensor(tau, dtype=dtype), max(0, len(lead) - 1))


RELAXED = {
    "one": {"codes": 4, "posterior": "relaxed_onehot"},
    "grid": {**GRID, "posterior": "relaxed_onehot"},
    "categorical": {**GRID, "posterior": {"kind": "relaxed_onehot", "kl": "categorical"}},
    "straight": {**GRID, "embedding": 3, "posterior": "straight_through"},
}


def small(latent: Mapping[str, Any], **train: Any) -> Experiment:
    """A declaration of one latent of digits that is fitted in a moment."""
    train = {"epochs": 2, "batch_size": 20, "engine": "eager", **train}
    decoder = {**NETWORK, "likelihood": {"kind": "bernoulli"}}
    table = {"latents": {"c": dict(latent)}, "encoder": NETWORK, "decoder": decoder, "train": train}
    return Experiment.from_dict({**table, "data": {"source": "tensor"}})


def fitted(experiment: Experiment, where: Path) -> pvae.Run:
    data = Dataset.from_tensors(rows(100), validation=rows(30), test=rows(30))
    return pvae.fit(experiment, data=data, run_dir=where, device="cpu", progress=False)


NEAREST = {"codes": 6, "grid": [2, 2], "embedding": 5, "prior": "uniform"}


def nearest(off: float = 0.3, **posterior: Any) -> Pair:
    pair = declared({**NEAREST, "posterior": {"kind": "nearest_code", **posterior}}, off=off).double()
    with torch.no_grad():
        pair.model.codebooks["c"].weight.normal_().mul_(0.5)
    return pair
