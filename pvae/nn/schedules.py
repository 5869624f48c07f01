"""Numbers that change during training: beta, temperature, a factor on the learning rate."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn

from pvae.component import Component


class Schedule(Component):
    """A number as a function of training progress; a bare number is a constant."""

    @classmethod
    def shorthand(cls, value: Any) -> Any:
        """`beta = 0.5` means `beta = { kind = "constant", value = 0.5 }`."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return {"kind": "constant", "value": value} if number else value

    @classmethod
    def shorthand_schema(cls) -> list[dict[str, Any]]:
        """A bare number."""
        return [{"type": "number"}]

    @abstractmethod
    def at(self, epoch: float, epochs: float) -> float:
        """Return the value after `epoch` (fractional) of `epochs` epochs."""

    def extremes(self, epochs: float) -> tuple[float, ...]:
        """Return moments of `epochs` epochs among which the least and the largest value lie, if it is monotone."""
        return tuple(epochs * part / 20 for part in range(21))


@final
class Constant(Schedule):
    """Always `value`."""

    kind: Literal["constant"] = "constant"
    value: float = 1.0

    def at(self, epoch: float, epochs: float) -> float:
        return self.value


def progress(epoch: float, span: float) -> float:
    """Proportion of `span` epochs that have passed, from 0 to 1."""
    return min(max(epoch / span, 0.0), 1.0) if span > 0 else 1.0


@final
class Linear(Schedule):
    """A straight line from `start` to `end` over `epochs` (default: the whole training), then `end`."""

    kind: Literal["linear"] = "linear"
    start: float = 0.0
    end: float = 1.0
    epochs: float | None = Field(default=None, gt=0)

    def at(self, epoch: float, epochs: float) -> float:
        return self.start + (self.end - self.start) * progress(epoch, self.epochs or epochs)


@final
class Exponential(Schedule):
    """From `start` to `end` by equal ratios over `epochs` (default: the whole training), then `end`: a temperature.

    References:
        Categorical Reparameterization with Gumbel-Softmax (Jang, Gu, Poole, 2017), https://arxiv.org/abs/1611.01144
    """

    kind: Literal["exponential"] = "exponential"
    start: float = Field(default=1.0, gt=0)
    end: float = Field(default=0.5, gt=0)
    epochs: float | None = Field(default=None, gt=0)

    def at(self, epoch: float, epochs: float) -> float:
        return self.start * (self.end / self.start) ** progress(epoch, self.epochs or epochs)


@final
class Cosine(Schedule):
    """Half a cosine from `start` to `end` over `epochs` (default: the whole training), then `end`."""

    kind: Literal["cosine"] = "cosine"
    start: float = 1.0
    end: float = 0.0
    epochs: float | None = Field(default=None, gt=0)

    def at(self, epoch: float, epochs: float) -> float:
        turn = (1 - math.cos(math.pi * progress(epoch, self.epochs or epochs))) / 2
        return self.start + (self.end - self.start) * turn


@final
class Cyclical(Schedule):
    """A saw tooth: every `epochs` epochs, up from `start` to `end` during `ramp` of the cycle, then flat.

    References:
        Cyclical Annealing Schedule (Fu et al., 2019), https://arxiv.org/abs/1903.10145
    """

    kind: Literal["cyclical"] = "cyclical"
    start: float = 0.0
    end: float = 1.0
    epochs: float = Field(default=10.0, gt=0)
    """Length of a cycle."""
    ramp: float = Field(default=0.5, gt=0, le=1)
    """Share of a cycle spent rising."""

    def at(self, epoch: float, epochs: float) -> float:
        return self.start + (self.end - self.start) * progress(epoch % self.epochs, self.epochs * self.ramp)

    def extremes(self, epochs: float) -> tuple[float, ...]:
        return 0.0, math.nextafter(min(self.epochs * self.ramp, epochs), 0.0)  # at the end of a cycle it starts anew


class Scheduled(nn.Module):
    """A number inside a pair that follows a schedule: a buffer, filled before every step."""

    value: Tensor

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.schedule = schedule
        self.register_buffer("value", torch.tensor(schedule.at(0, 1)))

    def follow(self, epoch: float, epochs: float) -> None:
        """Take the value after `epoch` of `epochs` epochs."""
        self.value.fill_(self.schedule.at(epoch, epochs))
