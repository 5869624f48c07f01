"""Laws that several test files hold pairs to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pvae.pair.pair import Pair

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


def require_gradients(pair: Pair) -> None:
    """Every parameter has a gradient that is finite and not zero."""
    for name, parameter in pair.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


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
