"""Declarations of torch's optimisers, in their fused implementations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, Literal, final

import torch
from pydantic import Field
from torch import nn

from pvae.component import Component

Betas = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)]


class Optimizer(Component):
    """Declaration of the optimiser that updates parameters by their gradients."""

    lr: float = Field(default=1e-3, gt=0)
    """Learning rate before its schedule."""

    @abstractmethod
    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the torch optimiser over `parameters`."""


@final
class Adam(Optimizer):
    """Adam (Kingma, Ba, 2015), https://arxiv.org/abs/1412.6980."""

    kind: Literal["adam"] = "adam"
    betas: Betas = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


@final
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov, Hutter, 2019), https://arxiv.org/abs/1711.05101."""

    kind: Literal["adamw"] = "adamw"
    betas: Betas = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            parameters, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, fused=True
        )


@final
class SGD(Optimizer):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(default=0.0, ge=0, lt=1)

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum, fused=True)
