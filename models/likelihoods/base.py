"""Likelihoods p(x | h): from the decoder's output to a distribution over one datum."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn
from torch.distributions import constraints

from pvae.component import Component, Shape
from pvae.graph.frame import Law
from pvae.models.likelihoods.closed_form import ClosedForm


class Likelihood(Component):
    """Declared likelihood p(x | h): distribution of a datum x given the decoder's output h."""

    hint: ClassVar[str] = ""
    of_tables: ClassVar[bool] = False
    """True if the likelihood is for tables only, and scores each column by a distribution of its own."""
    closed_form: ClassVar[type[ClosedForm] | None] = None
    """Closed form of its M-step, with which the objective `em` fits it; None if it has none."""
    is_point: ClassVar[bool] = False
    """True if z determines x, x = g(z); the posterior must then invert the decoder, except in a GAN."""

    @property
    @abstractmethod
    def support(self) -> constraints.Constraint:
        """Constraint on each element of x (real numbers, 0 or 1, ...)."""

    @property
    def channels(self) -> int:
        """Number of parameters that the decoder outputs for each element of x."""
        return 1

    def over(self, laws: Sequence[Law]) -> Likelihood:
        """Return this likelihood bound to table columns with the given distributions; itself if it scores no tables."""
        return self

    def reader(self) -> ReaderModule | None:
        """Return the module that prepares x for the guide's networks; None if they read x itself."""
        return None

    @abstractmethod
    def build(self, x: Shape) -> LikelihoodModule:
        """Return a module from the decoder's output `(..., channels * x[0], *x[1:])` to a distribution of event `x`."""


class ReaderModule(nn.Module):
    """Base of fixed encodings (no parameters) of data `(..., *x)` as inputs `(..., *output)` of guide networks."""

    output: Shape


class LikelihoodModule(nn.Module):
    """Base of the modules of likelihoods: splits the decoder's output into the parameters of each element of x."""

    form: type[ClosedForm] | None = None
    """Closed form of the M-step; None if there is none."""
    is_point: bool = False
    """True if x is a deterministic function of z."""

    def __init__(self, x: Shape, channels: int) -> None:
        super().__init__()
        self.x = tuple(x)
        self.channels = channels

    @property
    def inputs(self) -> Shape:
        """Event shape of the decoder's output, which holds the parameters of the likelihood."""
        return (self.channels * self.x[0], *self.x[1:])

    def split(self, h: Tensor) -> tuple[Tensor, ...]:
        """Return the decoder's output as `channels` tensors of parameters, each `(..., *x)`."""
        if self.channels == 1:
            return (h,)
        return h.unflatten(-len(self.x), (self.channels, self.x[0])).unbind(-len(self.x) - 1)

    def closed_form(self) -> ClosedForm | None:
        """Return the closed-form M-step of this likelihood; None if it has none."""
        return None if self.form is None else self.form(self)

    def implicit(self) -> LikelihoodModule:
        """Return this likelihood without its density, for a GAN, in which x is sampled but never scored."""
        raise NotImplementedError  # pragma: no cover - declarations ask only a likelihood under which z determines x
