"""The link by which each side of a pair reaches the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributions import constraints

from pvae.component import Shape
from pvae.graph.frame import Frame

if TYPE_CHECKING:
    from pvae.guides.graph import GraphGuide
    from pvae.models.graph import GraphModel


class Link:
    """Gives one side of a pair the other at run time; not a Module, so nothing is registered twice."""

    model: GraphModel
    guide: GraphGuide
    frame: Frame
    """Layout of a row of data."""
    support: constraints.Constraint = constraints.real
    """Values that an element of a datum may take."""
    building: bool = False
    """True while the pair is built: parts made of data have none yet."""

    @property
    def x(self) -> Shape:
        """Event shape of a datum."""
        return self.frame.x
