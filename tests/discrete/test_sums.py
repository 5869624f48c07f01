"""Exact sums over joint states: brute force, and Pyro's."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, typeddict-item, union-attr"

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch.distributions import kl_divergence

from pvae.distributions.codes import code_grid
from pvae.errors import DeclarationError
from pvae.objectives.elbo import TraceELBO, TraceMeanFieldELBO
from pvae.pair.pair import Pair
from tests.discrete.pairs import (
    SCORED_BITS,
    SUM,
    SUMMED,
    WITH_VECTOR,
    brute_force,
    built,
    minus_elbo,
    require_same,
    summed,
)

every_sum = pytest.mark.parametrize(("latents", "given"), SUMMED.values(), ids=list(SUMMED))
every_dtype = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-10)])


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
    found = code_grid(torch.zeros(2, 2, 3), 2).enumerate_support()
    assert found.tolist() == [[list(c[:2]), list(c[2:])] for c in itertools.product(range(3), repeat=4)]
    with pytest.raises(NotImplementedError, match="10\\^4 joint states are more than 4096"):
        code_grid(torch.zeros(4, 10), 1).enumerate_support()


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
