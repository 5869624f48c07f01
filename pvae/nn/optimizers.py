"""Declarations of torch's optimisers in their fused implementations, and a lean Adam for fits inside an analysis."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim.adam import adam

from pvae.component import Component

Betas = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)]


class Optimizer(Component):
    """Declaration of the optimiser that updates parameters by their gradients."""

    lr: float = Field(default=1e-3, gt=0)
    """Learning rate before its schedule."""

    implementation: ClassVar[Any]
    """Class of torch; the fields of the declaration are its arguments."""

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the torch optimiser over `parameters`."""
        return self.implementation(parameters, fused=True, **self.model_dump(exclude={"kind"}))


class Adam(Optimizer):
    """Adam (Kingma, Ba, 2015), https://arxiv.org/abs/1412.6980."""

    kind: Literal["adam"] = "adam"
    implementation: ClassVar[Any] = torch.optim.Adam
    betas: Betas = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov, Hutter, 2019), https://arxiv.org/abs/1711.05101."""

    kind: Literal["adamw"] = "adamw"
    implementation: ClassVar[Any] = torch.optim.AdamW
    betas: Betas = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)


class SGD(Optimizer):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    implementation: ClassVar[Any] = torch.optim.SGD
    momentum: float = Field(default=0.0, ge=0, lt=1)


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
