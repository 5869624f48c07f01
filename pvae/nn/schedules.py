"""Schedules of hyperparameters during training (beta, temperature, a factor on the learning rate), and optimisers.

Optimisers are declarations of torch's own in their fused implementations; a lean Adam is for fits inside an analysis.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim.adam import adam

from pvae.component import Component


class Schedule(Component):
    """Declaration of a hyperparameter as a function of training progress; a bare number means a constant."""

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        """Return a bare number as a constant schedule: `beta = 0.5` is `beta = { kind = "constant", value = 0.5 }`."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return {"kind": "constant", "value": value} if number else value

    @classmethod
    def shorthand_schema(cls) -> list[dict[str, Any]]:
        """Return the JSON schema of the shorthand, a bare number."""
        return [{"type": "number"}]

    @abstractmethod
    def at(self, epoch: float, epochs: float) -> float:
        """Return the value after `epoch` (fractional) of `epochs` epochs."""

    def extremes(self, epochs: float) -> tuple[float, ...]:
        """Return epochs at which the schedule is evaluated to find its minimum and maximum, exact if it is monotone."""
        return tuple(epochs * part / 20 for part in range(21))


class Constant(Schedule):
    """Constant schedule: always `value`."""

    kind: Literal["constant"] = "constant"
    value: float = 1.0

    def at(self, epoch: float, epochs: float) -> float:
        return self.value


def progress(epoch: float, span: float) -> float:
    """Return the proportion of `span` epochs that have passed at `epoch`, between 0 and 1."""
    return min(max(epoch / span, 0.0), 1.0) if span > 0 else 1.0


class Linear(Schedule):
    """Linear schedule from `start` to `end` over `epochs` (default: the whole training), then `end`."""

    kind: Literal["linear"] = "linear"
    start: float = 0.0
    end: float = 1.0
    epochs: float | None = Field(default=None, gt=0)

    def at(self, epoch: float, epochs: float) -> float:
        return self.start + (self.end - self.start) * progress(epoch, self.epochs or epochs)


class Exponential(Schedule):
    """Exponential schedule, as of a temperature: `start` to `end` over `epochs` (default: all of training), then `end`.

    References:
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017), https://arxiv.org/abs/1611.01144
    """

    kind: Literal["exponential"] = "exponential"
    start: float = Field(default=1.0, gt=0)
    end: float = Field(default=0.5, gt=0)
    epochs: float | None = Field(default=None, gt=0)

    def at(self, epoch: float, epochs: float) -> float:
        return self.start * (self.end / self.start) ** progress(epoch, self.epochs or epochs)


class Cosine(Schedule):
    """Cosine schedule from `start` to `end` over `epochs` (default: the whole training), then `end`."""

    kind: Literal["cosine"] = "cosine"
    start: float = 1.0
    end: float = 0.0
    epochs: float | None = Field(default=None, gt=0)

    def at(self, epoch: float, epochs: float) -> float:
        turn = (1 - math.cos(math.pi * progress(epoch, self.epochs or epochs))) / 2
        return self.start + (self.end - self.start) * turn


class Cyclical(Schedule):
    """Cyclical schedule: in each cycle of `epochs`, goes from `start` to `end` during a proportion `ramp`, then stays.

    References:
        Cyclical Annealing Schedule (Fu et al., 2019), https://arxiv.org/abs/1903.10145
    """

    kind: Literal["cyclical"] = "cyclical"
    start: float = 0.0
    end: float = 1.0
    epochs: float = Field(default=10.0, gt=0)
    """Length of a cycle, in epochs."""
    ramp: float = Field(default=0.5, gt=0, le=1)
    """Proportion of a cycle during which the value goes from `start` to `end`."""

    def at(self, epoch: float, epochs: float) -> float:
        return self.start + (self.end - self.start) * progress(epoch % self.epochs, self.epochs * self.ramp)

    def extremes(self, epochs: float) -> tuple[float, ...]:
        return 0.0, math.nextafter(min(self.epochs * self.ramp, epochs), 0.0)  # at the end of a cycle it starts anew


class Scheduled(nn.Module):
    """Scalar buffer of a model or guide whose value follows a schedule, updated before every training step."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule, self.value = schedule, nn.Buffer(torch.tensor(schedule.at(0, 1)))

    def follow(self, epoch: float, epochs: float) -> None:
        """Set the buffer to the value of the schedule after `epoch` of `epochs` epochs."""
        self.value.fill_(self.schedule.at(epoch, epochs))


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
