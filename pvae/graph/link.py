"""Shared reference by which the model and the guide of a pair reach each other at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.distributions import constraints

from pvae.graph.site import Frame

if TYPE_CHECKING:
    from pvae.guides.graph import GraphGuide
    from pvae.models.graph import GraphModel


class Link:
    """Reference from one program of a pair to the other; not a Module, so that no parameter is registered twice."""

    model: GraphModel
    guide: GraphGuide
    frame: Frame
    """Layout of a row of data: the data point, then its covariates."""
    support: constraints.Constraint = constraints.real
    """Support of one element of a data point under the declared likelihood."""
    building: bool = False
    """True while the pair is being built, when Modules that keep the training data have not received them yet."""
