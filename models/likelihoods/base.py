"""Likelihoods p(x | h): from the decoder's output to a distribution over one datum."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Component, Shape
from pvae.graph.column_law import Law
from pvae.models.likelihoods.closed_form import ClosedForm


class Likelihood(Component):
    """The density of a datum given the decoder's output."""

    hint: ClassVar[str] = ""
    of_tables: ClassVar[bool] = False
    """True if it scores the columns of a table, and no other data."""
    closed_form: ClassVar[bool] = False
    """True if the objective `em` can fit it: its module has a `closed_form`."""

    @property
    @abstractmethod
    def support(self) -> constraints.Constraint:
        """Values a datum may take, elementwise."""

    @property
    def channels(self) -> int:
        """Numbers the decoder must produce per element of x."""
        return 1

    @property
    def is_point(self) -> bool:
        """True if z determines x: its posterior must then invert the decoder."""
        return False

    def over(self, laws: Sequence[Law]) -> Likelihood:
        """The likelihood of a table of such columns: itself, where it asks for none."""
        return self

    def reader(self) -> ReaderModule | None:
        """Return the module that prepares x for the guide's networks; None where they read x itself."""
        return None

    @abstractmethod
    def build(self, x: Shape) -> LikelihoodModule:
        """A module from the decoder's output `(..., channels * x[0], *x[1:])` to a distribution of event `x`."""


class ReaderModule(nn.Module):
    """Data `(..., *x)` as the guide's networks read them, `(..., *output)`; it learns nothing."""

    output: Shape


class LikelihoodModule(nn.Module):
    """Base of what likelihoods build: splits the decoder's output into the parameters of each element."""

    is_point: ClassVar[bool] = False
    """True if z determines x."""

    def __init__(self, x: Shape, channels: int) -> None:
        super().__init__()
        self.x = tuple(x)
        self.channels = channels

    @property
    def inputs(self) -> Shape:
        """Event shape expected of the decoder."""
        return (self.channels * self.x[0], *self.x[1:])

    def split(self, h: Tensor) -> tuple[Tensor, ...]:
        """`channels` tensors `(..., *x)`."""
        return h.unflatten(-len(self.x), (self.channels, self.x[0])).unbind(-len(self.x) - 1)

    def closed_form(self) -> ClosedForm | None:
        """Return its maximisation step; None where it has none in closed form."""
        return None

    def implicit(self) -> LikelihoodModule:
        """Return this likelihood without its density, for a pair in which x is sampled and never scored."""
        raise NotImplementedError  # pragma: no cover - declarations ask only a likelihood under which z determines x
