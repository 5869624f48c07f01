"""Relaxed codes beside the codes they relax: twins, KL, temperatures, straight-through gradients."""

# Attributes of Modules have no types, and a figure that may be None fails its test if it is.
# mypy: disable-error-code="arg-type, attr-defined, index, misc, operator, typeddict-item, union-attr"

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from pvae.distributions.relaxed import Discretised
from pvae.errors import DeclarationError
from pvae.experiment.experiment import Experiment
from pvae.nn.schedules import Exponential
from pvae.pair.pair import Pair
from pvae.training.evaluation import evaluate
from tests.discrete.pairs import (
    ENGINES,
    GRID,
    NETWORK,
    RELAXED,
    SCORE,
    X,
    brute_force,
    built,
    declared,
    fitted,
    gradient,
    minus_elbo,
    rows,
    small,
)
from tests.laws import shake


def twin(latent: Mapping[str, Any], posterior: Mapping[str, Any], pair: Pair) -> Pair:
    """The pair with the discrete posterior and the same weights."""
    other = built({"c": {**{k: v for k, v in latent.items() if k != "temperature"}, "posterior": dict(posterior)}})
    other = other.to(next(pair.parameters()).dtype)
    weights = {name: value for name, value in pair.state_dict().items() if "temperatures" not in name}
    other.load_state_dict(weights)
    return other


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


NOT_SUMMED = {
    "weighed": (lambda: three(lambda: poutine.scale(scale=0.3)), "without poutine.scale; got a scale of 0.3"),
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
    shake(pair, 0.7)
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
    space = pair.guide.sites[0].space
    q = pair.guide_trace(rows().double()).nodes["c"]["fn"]
    value = q.rsample().detach().requires_grad_()
    book = pair.model.codebooks["c"].table.detach()
    way = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    hard, soft = (replace(space, is_hard=h).see(value, value, None) for h in (True, False))
    want = torch.nn.functional.one_hot(value.argmax(-1), 3).movedim(-1, 1)
    assert torch.equal(hard, want.double())  # to the last bit
    found = [torch.autograd.grad((seen * way).sum(), value)[0] for seen in (hard, soft)]
    assert torch.equal(*found)
    seen = space.see(value, value, book)
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
