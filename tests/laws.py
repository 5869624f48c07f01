"""Laws that several test files hold pairs to."""

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pvae.analysis import evidence
from pvae.objectives.base import Objective
from pvae.objectives.elbo import TraceELBO
from pvae.objectives.importance import IWAE
from pvae.pair.pair import Pair
from pvae.training.evaluation import evaluate

FLOWS: dict[str, dict[str, Any]] = {
    "realnvp": {"kind": "realnvp", "hidden": [16]},
    "maf": {"kind": "maf", "hidden": [16]},
    "iaf": {"kind": "iaf", "hidden": [16]},
    "spline_coupling": {"kind": "spline_coupling", "hidden": [16]},
    "spline_autoregressive": {"kind": "spline_autoregressive", "hidden": [16]},
    "block_autoregressive": {"kind": "block_autoregressive", "hidden": [4]},
    "neural_autoregressive": {"kind": "neural_autoregressive", "hidden": [16], "units": 4},
}
"""Every kind of flow prior, small."""


def require_gradients(module: nn.Module) -> None:
    """Every parameter has a gradient that is finite and not zero."""
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def require_trainable(pair: Pair, x: Tensor) -> None:
    """A check finds nothing, and the gradient of the ELBO reaches every parameter."""
    assert pair.check(x) == []
    pair(x).mean().neg().backward()
    require_gradients(pair)


def require_bounds(pair: Pair, x: Tensor, want: float) -> None:
    """The ELBO lies below log p(x), the mean `want` of which importance weights reach; 4 standard errors."""
    found = evidence(pair, x, samples=3000)
    assert found.elbo.value < want + 4 * found.elbo.standard_error
    assert found.iwae.value > found.elbo.value
    assert found.iwae.value == pytest.approx(want, abs=4 * found.iwae.standard_error + 1e-3)


def shake(module: nn.Module, by: float) -> None:
    """Move every parameter off its start."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn_like(parameter))


def require_own_states(pair: Pair, again: Pair, x: Tensor, by: float = 0.3) -> None:
    """A used pair's copy reads its own weights, `again` has the pair's by its state; no parameter is held twice."""
    pair(x).sum().backward()
    other, before = copy.deepcopy(pair), evaluate(pair, x, 0)
    shake(pair, by)
    assert evaluate(other, x, 0) == before != evaluate(pair, x, 0)
    for one in (again, other):
        one.load_state_dict(pair.state_dict())
        assert evaluate(one, x, 0) == evaluate(pair, x, 0)
    twice = [id(p) for _, p in pair.named_parameters(remove_duplicate=False)]
    assert len(twice) == len(set(twice))


def require_importance_weights(pair: Pair, x: Tensor) -> None:
    """The loss of IWAE is minus the mean log of the mean importance weight."""
    torch.manual_seed(1)
    loss = IWAE(particles=6).loss(IWAE(particles=6).terms(pair, x), torch.ones(()))
    torch.manual_seed(1)
    terms = pair.terms(x, particles=6)
    weights = (terms.reconstruction - sum(terms.kl.values())).detach().double()
    assert loss.item() == pytest.approx(-float((weights.logsumexp(0) - torch.tensor(6.0).log()).mean()), rel=1e-5)


def require_pyros(pair: Pair, x: Tensor, ours: Objective | None = None, theirs: Any = None) -> None:
    """Value and gradient of an objective are those of Pyro's with the same seed."""
    ours, theirs = ours or TraceELBO(), theirs or Trace_ELBO()
    losses: tuple[Callable[[], Tensor], ...] = (
        lambda: ours.loss(ours.terms(pair, x), torch.ones(())),
        lambda: theirs.differentiable_loss(pair.model, pair.guide, x) / len(x),
    )
    found = []
    for loss in losses:
        pyro.set_rng_seed(3)
        value = loss()
        found.append((value.item(), torch.autograd.grad(value, list(pair.parameters()))))
    (a, da), (b, db) = found
    assert a == pytest.approx(b, rel=1e-5)
    for one, two in zip(da, db, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def require_slope(pair: Pair, x: Tensor) -> None:
    """The gradient is the slope of the ELBO, along three random directions; in double precision."""
    for _ in range(3):
        found, want = slope_along(pair, x)
        assert found == pytest.approx(want, rel=1e-5, abs=1e-6)


def slope_along(pair: Pair, x: Tensor) -> tuple[float, float]:
    """The slope of the ELBO along a random direction of all parameters, noise fixed: by autograd, by differences."""
    parameters = list(pair.parameters())
    way = [torch.randn_like(p) for p in parameters]

    def elbo(step: float) -> Tensor:
        with torch.no_grad():
            for p, w in zip(parameters, way, strict=True):
                p.add_(step * w)
        torch.manual_seed(5)
        terms = pair.terms(x, particles=3)
        return (terms.reconstruction - sum(terms.kl.values())).mean()

    gradients = torch.autograd.grad(elbo(0.0), parameters)
    with torch.no_grad():
        between = float(elbo(1e-6) - elbo(-2e-6)) / 2e-6
    return sum(float((g * w).sum()) for g, w in zip(gradients, way, strict=True)), between
