"""The skeletons of a prior and a likelihood in CONTRIBUTING, run as they stand there."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pvae.component import Component
from pvae.experiment.experiment import Experiment
from pvae.models.likelihoods import Likelihood
from pvae.models.priors import Prior
from pvae.objectives.elbo import TraceELBO

CONTRIBUTING = Path(__file__).parents[2] / "CONTRIBUTING.md"
REAL: dict[str, Any] = {"likelihood": "normal"}
SKELETONS: dict[str, tuple[type[Component], dict[str, Any]]] = {
    "(Prior)": (Prior, {"latents": {"z": {"dim": 2, "prior": "laplace"}}, "decoder": REAL}),
    "(Likelihood)": (Likelihood, {"latents": {"z": {"dim": 2}}, "decoder": {"likelihood": "laplace"}}),
}


@pytest.mark.parametrize("base", SKELETONS)
def test_a_skeleton_is_a_whole_member(base: str) -> None:
    """Registered, declared by its kind, built, checked, and its gradient reaches every parameter."""
    family, declared = SKELETONS[base]
    blocks = [block.split("```")[0] for block in CONTRIBUTING.read_text().split("```python\n")[1:]]
    (code,) = (block for block in blocks if base in block)
    try:
        exec(compile(code, "CONTRIBUTING.md", "exec", dont_inherit=True), {"__name__": "example"})  # noqa: S102 - our own document
        pair, x = Experiment.from_dict(declared).build((5,)), torch.rand(4, 5)
        assert pair.check(x) == []
        loss = TraceELBO().loss(pair.terms(x), torch.ones(()))
        gradients = torch.autograd.grad(loss, list(pair.parameters()))
        assert all(gradient.isfinite().all() for gradient in gradients)
    finally:
        family.members.pop("laplace", None)
