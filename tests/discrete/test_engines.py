"""Laws of every engine of a discrete latent: gradients, particles, states, seeds, compiled steps."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, typeddict-item, union-attr"

import pyro
import pytest
import torch

from pvae.guides.posteriors.base import Posterior
from pvae.objectives.base import Loss
from pvae.objectives.elbo import TraceELBO
from pvae.training.evaluation import evaluate
from pvae.training.step import Step
from tests.discrete import pairs
from tests.laws import require_gradients, require_own_states


def test_the_table_is_complete():
    shipped = {
        kind
        for kind, member in Posterior.members.items()
        if member.__module__.startswith("pvae.") and member.values in ("index", "binary")
    }
    posteriors = (engine.latent["posterior"] for engine in pairs.ENGINES.values())
    found = {one if isinstance(one, str) else one["kind"] for one in posteriors}
    assert found | {"exact"} == shipped  # exact: tests/objectives/test_em.py


@pairs.every_engine
def test_gradient_reaches_every_parameter_and_check_finds_nothing(engine):
    pair = pairs.declared(engine.latent)
    assert pair.check(pairs.rows()) == []
    # A code that nobody uses has no gradient of its own, so there are rows enough for all.
    pairs.minus_elbo(pair, pairs.rows(200)).backward()
    require_gradients(pair)


@pairs.every_engine
def test_the_decoder_sees_features(engine):
    pair = pairs.declared(engine.latent)
    with torch.no_grad():
        assert pair.guide(pairs.rows())["c"].shape == (5, *engine.features)
        assert pair.model(size=4).shape == (4, pairs.X)
        assert pair.simulate(pairs.rows()).nodes["c"]["value"].shape[0] == 5


@pairs.every_engine
def test_particles_broadcast_and_states_round_trip(engine):
    pair = pairs.declared(engine.latent).eval()
    terms = pair.terms(pairs.rows(), particles=3)
    assert terms.kl["c"].shape == terms.reconstruction.shape == (3, 5)
    expected = pair.terms(pairs.rows(), particles=3, expected=True)
    assert expected.kl["c"].shape == expected.reconstruction.shape == (3, 5)
    draws = pair.traces(pairs.rows(), 3)[0].nodes["c"]["value"]
    assert (draws[0] == draws).all() == engine.certain
    require_own_states(pair, pairs.declared(engine.latent), pairs.rows(40), by=0.5)


@pairs.every_engine
def test_evaluation_moves_nothing_and_a_forward_pass_only_scratch(engine):
    pair, x = pairs.declared(engine.latent), pairs.rows(40)
    step = Step(Loss(TraceELBO(), pair, 40), torch.optim.SGD(pair.parameters(), 0.0), "eager", x)
    before, everything = pairs.state(pair), {n: b.clone() for n, b in pair.named_buffers()}
    evaluate(pair, x, 0)
    with torch.no_grad():
        pair.eval()
        pair(x)
        pair.train()
    assert pairs.same(everything, dict(pair.named_buffers()))
    pairs.minus_elbo(pair, x)
    assert pairs.same(before, pairs.state(pair))
    step(x)  # of length zero: what moves is no parameter
    assert pairs.same(before, pairs.state(pair)) != engine.moves


@pairs.every_engine
def test_the_same_seed_gives_the_same_number(engine):
    pair, x = pairs.declared(engine.latent), pairs.rows(9)
    found = []
    for seed in (3, 3, 4):
        pyro.set_rng_seed(seed)
        found.append(pairs.minus_elbo(pair, x).item())
    assert found[0] == found[1]
    exact = pair.layout.expected or engine.certain
    assert (found[0] == found[2]) == bool(exact)


COMPILED = {
    "draws": {
        "c": {**pairs.NEAREST, "posterior": "nearest_code"},
        "r": {"codes": 4, "grid": [2], "posterior": "relaxed_onehot"},
        "s": {"bits": 3, "posterior": pairs.SCORED_BITS},
        "t": {"codes": 3, "grid": [2], "posterior": {**pairs.SCORE, "baseline": "network"}},
    },
    "sum": {"c": {"codes": 3, "posterior": pairs.SUM}, "h": {"codes": 4, "posterior": "straight_through"}},
}


@pytest.mark.slow  # fast twins: test_engines.py of training
@pytest.mark.parametrize("latents", COMPILED.values(), ids=list(COMPILED))
def test_a_compiled_step_is_the_eager_one(latents):
    x = pairs.rows(40)
    found = []
    for engine in ("eager", "compiled"):
        pair = pairs.built(latents, list(latents))
        with pyro.validation_enabled(False):
            step = Step(Loss(TraceELBO(), pair, 40), torch.optim.SGD(pair.parameters(), 0.05), engine, x)
            figures = []
            for i in range(4):
                pyro.set_rng_seed(i)
                figures.append(step(x).clone())
        found.append((pair, torch.stack(figures)))
    (eager, one), (compiled, two) = found
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
    fresh = pairs.state(pairs.built(latents, list(latents)))
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-3, atol=1e-4)
        if name.endswith(("counts", "sums", "average.value", "weight")):
            assert not torch.equal(compiled.state_dict()[name], fresh[name]), name
