"""Figures of a pair held against Pyro's own ELBO and a known log p(x)."""

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO

from pvae import analysis
from pvae.pair.pair import Pair

Program = Callable[..., Any]
SIGMAS = 5.0
"""Largest distance of two estimates, in standard errors."""


def elbo_of_pyro(model: Program, guide: Program, *args: Any, rows: int, loss: ELBO | None = None, samples: int = 80):
    """Return mean and standard error of Pyro's ELBO per row."""
    loss = Trace_ELBO() if loss is None else loss
    with torch.no_grad():
        found = torch.tensor([-loss.loss(model, guide, *args) for _ in range(samples)]).double() / rows
    return found.mean().item(), found.std().item() / samples**0.5


def require_right(
    model: Program, guide: Program, x: Any, log_p: float | None = None, *, loss: ELBO | None = None, slack: float = 0.3
) -> Pair:
    """Hold check, surgery, particles and evidence of a pair against Pyro's ELBO and log p(x); return the pair."""
    args = x if isinstance(x, tuple) else (x,)
    rows = len(args[0])
    pair = Pair(model=model, guide=guide)
    assert not (problems := [p for p in pair.check(x) if "gradient" not in p.message]), problems
    want, error = elbo_of_pyro(model, guide, *args, rows=rows, loss=loss)
    surgery = analysis.surgery(pair, x, samples=20)
    assert surgery.elbo is not None
    spread = SIGMAS * (error**2 + surgery.elbo.standard_error**2) ** 0.5 + 1e-4
    assert abs(surgery.elbo.value - want) < spread, ("surgery", surgery.elbo, want, error)
    evidence = analysis.evidence(pair, x, samples=200)
    spread = SIGMAS * (error**2 + evidence.elbo.standard_error**2) ** 0.5 + 1e-4
    assert abs(evidence.elbo.value - want) < spread, ("evidence at one sample", evidence.elbo, want, error)
    if log_p is not None:
        above = SIGMAS * evidence.iwae.standard_error + 1e-4
        assert log_p - slack < evidence.iwae.value < log_p + above, ("evidence", evidence.iwae, log_p)
    return pair
