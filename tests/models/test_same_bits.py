"""Faster forms of Pyro's distributions and statements give the same bits, values and gradients."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pvae import Experiment
from pvae.distributions.base import Event, PlainNormal, UnitNormal
from tests.runs_shared import tiny

LOC, LOG_SCALE, VALUE = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
PLAIN = {
    "normal": (lambda a, b: Event(PlainNormal(a, b.exp()), 1), lambda a, b: dist.Normal(a, b.exp()).to_event(1)),
    "bits": (
        lambda a, b: Event(dist.Bernoulli(logits=a + b), 1),
        lambda a, b: dist.Bernoulli(logits=a + b).to_event(1),
    ),
    "grid of bits": (
        lambda a, b: Event(dist.Bernoulli(logits=a + b), 2),
        lambda a, b: dist.Bernoulli(logits=a + b).to_event(2),
    ),
    "standard normal": (
        lambda a, b: Event(UnitNormal(torch.zeros(5), torch.ones(5)), 1).expand((7,)),
        lambda a, b: dist.Normal(torch.zeros(7, 5), torch.ones(7, 5)).to_event(1),
    ),
}


@pytest.mark.parametrize("lead", [(), (4,)], ids=["same shape", "particles"])
@pytest.mark.parametrize("name", PLAIN)
def test_densities_and_gradients_have_the_same_bits(name: str, lead: tuple[int, ...]) -> None:
    found = []
    for make in PLAIN[name]:
        leaves = [t.clone().requires_grad_() for t in (LOC, LOG_SCALE, VALUE)]
        value = (leaves[2] > 0).float() if "bits" in name else leaves[2].tanh()
        with pyro.validation_enabled(False):
            fn = make(*leaves[:2])
            log_prob = fn.log_prob(value.expand(*lead, *value.shape))
        (log_prob * torch.linspace(-1, 2, log_prob.numel()).reshape(log_prob.shape)).sum().backward()
        found.append([fn.batch_shape, fn.event_shape, log_prob, *(t.grad for t in leaves)])
    (*shapes, one, a, b, c), (*others, two, d, e, f) = found
    assert shapes == others
    assert torch.equal(one, two)
    assert all((p is q is None) or torch.equal(p, q) for p, q in ((a, d), (b, e), (c, f)))


def test_the_kl_of_a_metric_is_that_of_torch() -> None:
    q, p = PLAIN["normal"][0](LOC, LOG_SCALE), PLAIN["standard normal"][0](LOC, LOG_SCALE)
    assert q.normal_kl(p) is None
    q.log_prob(VALUE)
    torch.testing.assert_close(q.normal_kl(p), torch.distributions.kl_divergence(q, p))
    assert q.normal_kl(q) is None


def test_a_standard_normal_is_made_once_and_again_where_it_moves() -> None:
    prior = Experiment.load("vae").build((1, 8, 8)).get_submodule("model.priors.z")
    wide = prior({}).expand((7,))
    assert prior({}).expand((7,)) is wide
    copied = deepcopy(prior).double()
    assert copied({}).expand((7,)).mean.dtype == torch.float64
    assert prior({}).expand((7,)) is wide
    with pyro.validation_enabled(False):
        prior({}).expand((8,)).log_prob(torch.full((8, *wide.event_shape), torch.nan))
    with pytest.raises(ValueError, match="support"):
        prior({}).expand((8,)).log_prob(torch.full((8, *wide.event_shape), torch.nan))


def test_values_outside_the_support_are_refused_in_validation() -> None:
    with pytest.raises(ValueError, match="support"):
        Event(dist.Bernoulli(logits=LOC), 1).log_prob(torch.full_like(LOC, 0.5))
    for normal in (PlainNormal, UnitNormal):
        with pytest.raises(ValueError, match="support"):
            Event(normal(LOC, LOC.exp()), 1).log_prob(torch.full_like(LOC, torch.nan))
        with pytest.raises(ValueError, match="scale"):
            normal(LOC, -LOC.exp())


@pytest.mark.parametrize("name", ["vae", "vq_vae", "ladder", "gumbel_softmax_vae", "mixture_prior"])
def test_a_statement_leaves_the_site_that_pyros_leaves(name: str) -> None:
    """A handler more, which does nothing, sends every statement through Pyro's own handlers."""
    pair = Experiment.load(name).build((1, 8, 8))
    x = (torch.rand(6, 1, 8, 8) > 0.5).float()

    def traced(run: Callable[[], tuple[poutine.Trace, poutine.Trace]]) -> list[dict[str, dict[str, Any]]]:
        pyro.set_rng_seed(1)
        return [{k: dict(v) for k, v in trace.nodes.items() if v["type"] == "sample"} for trace in run()]

    pair.adopt(x)
    fast = traced(lambda: pair.traces(x))
    with Messenger():
        slow = traced(lambda: pair.traces(x))
    for one, other in zip(fast, slow, strict=True):
        assert one.keys() == other.keys()
        for site, node in one.items():
            expected = other[site]
            assert torch.equal(node.pop("value"), expected.pop("value"))
            fn, wanted = node.pop("fn"), expected.pop("fn")
            assert (type(fn), fn.batch_shape, fn.event_shape) == (type(wanted), wanted.batch_shape, wanted.event_shape)
            assert {k: v for k, v in node.items() if k != "infer"} == {
                k: v for k, v in expected.items() if k != "infer"
            }
            assert node["infer"].keys() == expected["infer"].keys()


def test_a_step_writes_no_message() -> None:
    """The statements of a step are recorded at once: Pyro's stack is not walked."""
    pair = tiny().build((1, 8, 8)).adopt(torch.ones(6, 1, 8, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro.sample", lambda *_, **__: pytest.fail("a message"))
        assert isinstance(pair(torch.ones(6, 1, 8, 8)), Tensor)
