"""Adam optimiser without torch's `Optimizer` class, for small fits inside an analysis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam


class LeanAdam:
    """Adam with the default settings and results of `torch.optim.Adam(parameters)`, but without `Optimizer`.

    The first `Optimizer` of a process imports torch's compiler, which takes longer than a small fit.

    Arguments:
        parameters: tensors that `step` changes in place.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = list(parameters)
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.steps = [torch.tensor(0.0) for _ in self.parameters]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """Update the parameters by one Adam step along the given gradients, at learning rate `lr`."""
        adam(
            self.parameters, list(gradients), self.means, self.squares, [], self.steps,
            amsgrad=False, beta1=0.9, beta2=0.999, lr=lr, weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip
