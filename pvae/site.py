"""What model and guide know of a latent (`Site`), and how each side reaches the other (`Link`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import pyro

from pvae.component import Shape
from pvae.errors import DeclarationError

if TYPE_CHECKING:
    from pvae.guides.graph import GraphGuide
    from pvae.models.graph import GraphModel

OBSERVED = "x"
"""The name of the observed site, and of the data among a posterior's inputs."""


@dataclass(frozen=True)
class Site:
    """One latent variable of a declared graph."""

    name: str
    event: Shape
    """Shape of one sampled value."""
    features: Shape
    """Shape that children and the decoder see."""
    given: tuple[str, ...] = ()
    """Parents in the model, p(name | given)."""
    guide_given: tuple[str, ...] = (OBSERVED,)
    """Parents in the guide, q(name | guide_given)."""
    values: Literal["real"] = "real"
    """What a sampled value is; set by the posterior, the prior adapts."""


@lru_cache(maxsize=16)
def data_plate(count: int) -> pyro.plate:
    """The plate over the rows of a batch, dim -1; making one costs as much as a layer, so it is made once."""
    return pyro.plate("data", count, dim=-1)


class Link:
    """Gives one side of a pair the other at run time; not a Module, so nothing is registered twice."""

    model: GraphModel
    guide: GraphGuide
    x: Shape
    """Event shape of the data."""


def topological(parents: Mapping[str, Iterable[str]], what: str) -> list[str]:
    """Names in an order where parents come first; declaration order where the graph leaves it open.

    Raises:
        DeclarationError: the graph has a cycle; the message names its members.
    """
    order: list[str] = []
    waiting = {name: [p for p in above if p in parents] for name, above in parents.items()}
    while waiting:
        ready = [name for name, above in waiting.items() if all(p in order for p in above)]
        if not ready:
            raise DeclarationError(
                f"{what}: expected an acyclic graph; got a cycle among {', '.join(sorted(waiting))}. "
                f"Remove one of their `given` entries."
            )
        order.append(ready[0])
        del waiting[ready[0]]
    return order
