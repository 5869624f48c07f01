"""Random programs agree with Pyro's own ELBO, and their evidence is at most log p(x) on a grid of all latents."""

import math
import os
from collections import Counter
from collections.abc import Callable

import pyro
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from torch import Tensor

from pvae import analysis
from pvae.errors import PvaeError
from pvae.objectives.elbo import TraceELBO
from pvae.pair.pair import Pair
from tests.pair.random_programs import CONTINUOUS, Drawn, programs

EXAMPLES = int(os.environ.get("RANDOM_PROGRAMS", "20"))
"""Number of random programs; `RANDOM_PROGRAMS=2000 pytest tests/pair/test_random_programs.py` draws more."""
REFUSED: Counter[str] = Counter()
SEEN: Counter[str] = Counter()


def loss_of_pyro(drawn: Drawn) -> ELBO:
    """The ELBO of Pyro that the program is meant for."""
    plain = drawn.flavour == "sampled" or all(s.kind in CONTINUOUS for s in drawn.sites)
    return Trace_ELBO() if plain else TraceEnum_ELBO(max_plate_nesting=2 if drawn.has_inner else 1)


def elbo_of_pyro(drawn: Drawn) -> Callable[[Tensor], float]:
    """A function of x that returns one sample of Pyro's own ELBO of all rows."""
    loss = loss_of_pyro(drawn)
    return lambda x: -loss.loss(drawn.model, drawn.guide, x)


def require_same_gradient(drawn: Drawn, pair: Pair, x: Tensor) -> None:
    """The gradient of the training loss is that of Pyro's ELBO at the same noise."""
    nested = drawn.has_inner or any(s.place == "global" for s in drawn.sites)
    if nested and drawn.flavour == "sampled" and any(s.kind not in CONTINUOUS for s in drawn.sites):
        return  # the gain of a score function holds other costs than Pyro's, which are 0 in the mean
    if drawn.factor == "score" and (drawn.flavour == "summed" or nested):
        return  # TraceEnum_ELBO counts the penalty's own gradient, Trace_ELBO leaves it out; both weigh globals by n
    torch.manual_seed(3)
    objective = TraceELBO()
    loss = objective.loss(objective.terms(pair, x, len(x)), torch.tensor(1.0))
    names, parameters = zip(*pair.named_parameters(), strict=True)
    ours = torch.autograd.grad(loss, parameters, allow_unused=True)
    torch.manual_seed(3)
    theirs = loss_of_pyro(drawn).differentiable_loss(drawn.model, drawn.guide, x) / len(x)
    store = {
        name: pyro.param(name).unconstrained() if hasattr(pyro.param(name), "unconstrained") else pyro.param(name)
        for name in pyro.get_param_store()
    }
    want = torch.autograd.grad(theirs, list(store.values()), allow_unused=True)
    table = dict(zip(store, want, strict=True))
    for name, got in zip(names, ours, strict=True):
        expected = table[name.removeprefix("free.")]
        a, b = (0.0 if g is None else g.item() for g in (got, expected))
        assert math.isclose(a, b, rel_tol=2e-3, abs_tol=2e-3), ("gradient", name, a, b)


def judge(drawn: Drawn) -> None:
    """Hold all figures of one program against Pyro and against the grid."""
    pyro.clear_param_store()
    x, n = drawn.data, drawn.rows
    pair = Pair(model=drawn.model, guide=drawn.guide)
    assert not (problems := pair.check(x)), problems
    require_same_gradient(drawn, pair, x)
    with torch.no_grad():
        torch.manual_seed(1)
        terms = pair.terms(x, expected=True)
        parts = [*terms.kl.items(), *terms.penalties.items()]
        shared = {s.name for s in drawn.sites if s.place == "global"}
        ours = terms.reconstruction.sum() - sum(v.sum() * (n if name in shared else 1) for name, v in parts)
        torch.manual_seed(1)
        theirs = elbo_of_pyro(drawn)(x)
        assert math.isclose(ours.item(), theirs, rel_tol=1e-4, abs_tol=1e-3), ("same noise", ours.item(), theirs)
        torch.manual_seed(2)
        estimate = elbo_of_pyro(drawn.plain())
        sample = torch.tensor([estimate(x) for _ in range(60)]).double() / n
        found = analysis.surgery(pair, x, samples=30)
        several = pair.terms(x, particles=50)
    points = [s for s in drawn.sites if s.kind == "point"]
    figure = found.log_joint if points else found.elbo
    assert figure is not None
    assert (found.elbo is None) == bool(points)
    error = max(sample.std().item() / 60**0.5, 1e-5)
    spread = (3 * error**2 + figure.standard_error**2) ** 0.5  # 30 samples of ours beside 60 of Pyro's
    assert abs(figure.value - sample.mean().item()) < 5.5 * spread + 1e-4, ("surgery", figure, sample.mean())
    total = several.reconstruction - sum(v for v in several.kl.values())
    assert abs(total.mean().item() - figure.value) < 5.5 * spread + 1e-4, ("particles", total.mean(), figure)
    if any(s.place != "global" for s in points):
        SEEN["points"] += 1
        try:
            analysis.evidence(pair, x, samples=10)
        except PvaeError:
            return
        raise AssertionError("evidence was given at points")
    bound = analysis.evidence(pair, x, samples=400)
    error = max(bound.iwae.standard_error, bound.elbo.standard_error, 1e-5)
    assert bound.elbo.value <= bound.iwae.value + 4 * error
    if drawn.on_a_grid:
        SEEN["grid"] += 1
        given_points = {s.name: pair.guide_trace(x).nodes[s.name]["value"] for s in points}
        exact = drawn.log_p(x, given_points)
        assert bound.iwae.value <= exact + 5 * bound.iwae.standard_error + 2e-3, ("evidence", bound.iwae, exact)
        assert bound.iwae.value >= exact - 1.0, ("evidence is far below", bound.iwae, exact)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:.*possibly invalid dependency:RuntimeWarning")  # of a record, which has no density
@given(programs())
@settings(max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_random_program_agrees_with_pyro_and_bounds_log_p(drawn: Drawn):
    SEEN["programs"] += 1
    try:
        judge(drawn)
    except PvaeError as error:
        REFUSED[str(error)[:80]] += 1
        assert sum(REFUSED.values()) <= max(1, 0.05 * SEEN["programs"]), REFUSED
    finally:
        pyro.clear_param_store()
